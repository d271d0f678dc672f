"""diffusers' SkyReelsV2Transformer3DModel: one timestep per video, one per frame, frame-causal attention."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
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
