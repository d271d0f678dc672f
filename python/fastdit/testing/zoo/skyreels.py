"""diffusers' SkyReelsV2Transformer3DModel: one timestep per video, one per frame, frame-causal attention."""

from __future__ import annotations

import math
from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, model_row
from fastdit.testing.zoo import Model, randn, wan


def skyreels(**config) -> Any:
    from diffusers import SkyReelsV2Transformer3DModel

    small = dict(**wan.SMALL, in_channels=4, out_channels=4, num_layers=2)
    return randomize(SkyReelsV2Transformer3DModel(**{**small, **config}))


def inputs(*, forcing: bool = False, image: bool = False, fps: bool = False) -> dict[str, Any]:
    timestep = torch.tensor([3.0, 987.0])
    if forcing:
        timestep = timestep[:, None] * torch.tensor([0.25, 0.5, 0.75, 1.0])
    return dict(
        hidden_states=randn(2, 4, 4, 6, 10),
        timestep=timestep,
        encoder_hidden_states=randn(2, 512 if image else 7, 32),
        encoder_hidden_states_image=randn(2, 257, 20) if image else None,
        enable_diffusion_forcing=forcing,
        fps=[1] if fps else None,
    )


LAYERS = {**wan.LAYERS, "SkyReels-V2 block": 2}
del LAYERS["Wan block"]
CAUSAL = dict(num_frame_per_block=2)


def model(variant: str, config: dict[str, Any], layers: dict[str, int] = LAYERS, **given: bool) -> Model:
    name = f"SkyReelsV2Transformer3DModel{variant}"
    return Model(name, "wan", lambda: skyreels(**config), lambda: inputs(**given), layers)


MODELS = (
    model("", {}),
    model(", image to video", wan.I2V, image=True),
    model(", a timestep per frame", {}, forcing=True),
    model(", a timestep per frame, frame-causal", CAUSAL, forcing=True),
    model(
        ", frames per second", dict(inject_sample_info=True), LAYERS | {"feed-forward activation": 2}, forcing=True,
        fps=True,
    ),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(grid: tuple[int, int, int] = (8, 16, 16)) -> Whole:
    """SkyReels-V2 1.3B, 12 heads of 128, with one of its 30 blocks; a timestep per frame."""
    frames, height, width = grid

    def given(dtype: torch.dtype) -> dict[str, Any]:
        return dict(
            hidden_states=randn(1, 16, frames, 2 * height, 2 * width).to(dtype),
            timestep=torch.linspace(300, 900, frames)[None],
            encoder_hidden_states=randn(1, 512, 4096, seed=2).to(dtype),
            enable_diffusion_forcing=True,
        )

    return model_row(
        "SkyReels-V2 block", f"1x{math.prod(grid)}x1536, one block, 512 text tokens, a timestep per frame",
        lambda: skyreels(**wan.SIZE_1_3B), "blocks.0", given,
    )  # fmt: skip


ROWS = (row(),)
