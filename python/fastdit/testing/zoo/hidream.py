"""diffusers' HiDreamImageTransformer2DModel: with and without experts, an image as it is and a padded one."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn


def hidream(**config) -> Any:
    """Two heads of 24. Tokens go to all experts: the choice of some would follow the rounding of the gate."""
    from diffusers import HiDreamImageTransformer2DModel

    small = dict(patch_size=2, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=24,
                 num_attention_heads=2, caption_channels=[20, 28], text_emb_dim=12, num_routed_experts=2,
                 num_activated_experts=2, axes_dims_rope=(8, 8, 8), max_resolution=(8, 12), llama_layers=[1, 0],
                 force_inference_output=True)  # fmt: skip
    return randomize(HiDreamImageTransformer2DModel(**{**small, **config}))


def inputs(height: int, width: int) -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 4, height, width),
        timesteps=torch.tensor([30, 980]),
        encoder_hidden_states_t5=randn(2, 5, 20, seed=2),
        encoder_hidden_states_llama3=randn(2, 2, 7, 28, seed=3),
        pooled_embeds=randn(2, 12, seed=4),
    )


LAYERS = {
    "HiDream joint block": 1,
    "HiDream single block": 1,
    "attention (HiDreamAttnProcessor)": 2,
    "feed-forward (SwiGLU of three linear layers)": 7,  # two experts and a shared one in each block, the text's
    "HiDream output layer (norm, modulation)": 1,
}
NAME = "HiDreamImageTransformer2DModel"
DENSE = {**LAYERS, "feed-forward (SwiGLU of three linear layers)": 3}
HALF = dict(num_routed_experts=0, axes_dims_rope=(4, 4, 4))
MODELS = (
    Model(NAME, "hidream", hidream, lambda: inputs(6, 6), LAYERS, keeps=("timesteps",), fixed=("timesteps",)),
    Model(f"{NAME}, padded, half of a head rotated, no experts", "hidream", lambda: hidream(**HALF),
          lambda: inputs(6, 10), DENSE, keeps=("timesteps",), fixed=("timesteps",)),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(kind: str, block: str, *streams: int, **config: Any) -> Whole:
    """HiDream-I1: 20 heads of 128, 384 text tokens, two of four experts."""

    def given(dtype: torch.dtype) -> tuple:
        angles = randn(1, sum(streams), 1, 64)
        rotation = torch.stack([angles.cos(), -angles.sin(), angles.sin(), angles.cos()], dim=-1).unflatten(-1, (2, 2))
        x, c = ([randn(1, n, 2560, seed=n).to(dtype) for n in streams] + [None])[:2]
        return x, None, c, randn(1, 2560, seed=3).to(dtype), rotation

    return block_row(
        f"HiDream-I1 {kind} block", "1x1024x2560, 384 text tokens, 2 of 4 experts",
        lambda: hidream(attention_head_dim=128, num_attention_heads=20, num_routed_experts=4,
                        axes_dims_rope=(64, 32, 32), llama_layers=[0], **config), block, given,
    )  # fmt: skip


ROWS = (
    row("joint", "double_stream_blocks.0.block", 1024, 384, num_layers=1, num_single_layers=0),
    row("single", "single_stream_blocks.0.block", 1408, num_layers=0, num_single_layers=1),
)
