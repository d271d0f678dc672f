"""diffusers' AnyFlowTransformer3DModel: the time to arrive at or the interval, with and without an image.

The models of FAR attend by flex attention, which has no gradient on a CPU: see tests/test_accelerate_anyflow.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, model_row
from fastdit.testing.zoo import Model, randn, wan

LAYERS = {
    "AnyFlow block": 2,
    "attention (WanAttnProcessor)": 4,
    "feed-forward activation": 2,
    "patch embedding (Conv3d, kernel = stride)": 1,
    "Wan output layer (norm, modulation, unpatchify)": 1,
}
SMALL = dict(num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=5, text_dim=32, freq_dim=16,
             ffn_dim=96, num_layers=2, rope_max_seq_len=32)  # fmt: skip


def anyflow(**config) -> Any:
    """AnyFlowTransformer3DModel of two narrow layers: two heads of 24."""
    from diffusers import AnyFlowTransformer3DModel

    return randomize(AnyFlowTransformer3DModel(**{**SMALL, **config}))


def inputs(*, image: bool = False) -> dict[str, Any]:
    """Three frames, each with its own pair of timesteps."""
    timestep = torch.tensor([[3.0, 300.0, 987.0], [40.0, 40.0, 500.0]])
    return dict(
        hidden_states=randn(2, 3, 4, 6, 10),
        timestep=timestep,
        r_timestep=timestep / 2,
        encoder_hidden_states=randn(2, 7, 32, seed=2),
        encoder_hidden_states_image=randn(2, 5, 20, seed=3) if image else None,
    )


NAME, KEEPS = "AnyFlowTransformer3DModel", ("timestep", "r_timestep")
MODELS = (
    Model(NAME, "wan", anyflow, inputs, LAYERS, keeps=KEEPS, fixed=KEEPS),
    Model(f"{NAME}, image and interval", "wan",
          lambda: anyflow(image_dim=20, deltatime_type="t-r", cross_attn_norm=False), lambda: inputs(image=True),
          LAYERS, keeps=KEEPS, fixed=KEEPS),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(grid: tuple[int, int, int] = (8, 16, 16)) -> Whole:
    """The model of Wan 2.1's 1.3B, 12 heads of 128, with one of its 30 blocks; a pair of timesteps per frame."""
    frames, height, width = grid

    def given(dtype: torch.dtype) -> dict[str, Any]:
        timestep = torch.linspace(300, 900, frames)[None]
        return dict(
            hidden_states=randn(1, frames, 16, 2 * height, 2 * width).to(dtype),
            timestep=timestep,
            r_timestep=timestep / 2,
            encoder_hidden_states=randn(1, 512, 4096, seed=2).to(dtype),
        )

    return model_row(
        "AnyFlow block", f"1x{math.prod(grid)}x1536, one block, 512 text tokens, a timestep per frame",
        lambda: anyflow(**wan.SIZE_1_3B), "blocks.0", given,
    )  # fmt: skip


ROWS = (row(),)
