"""diffusers' WanTransformer3DModel: text to video, image to video, a timestep per token."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import diffusers_wan
from fastdit.testing.zoo import Model, randn

I2V = dict(image_dim=20, added_kv_proj_dim=48)
LAYERS = {
    "Wan block": 2,
    "attention (WanAttnProcessor)": 4,
    "patch embedding (Conv3d, kernel = stride)": 1,
    "feed-forward activation": 2,
}


def inputs(*, image: bool = False, per_token: bool = False, text: int = 512) -> dict[str, Any]:
    timestep = torch.tensor([3.0, 987.0])
    if per_token:
        timestep = timestep[:, None] * torch.arange(2 * 4 * 6).remainder(2)
    return dict(
        hidden_states=randn(2, 4, 2, 8, 12),
        timestep=timestep,
        encoder_hidden_states=randn(2, text, 32),
        encoder_hidden_states_image=randn(2, 257, 20) if image else None,
    )


MODELS = (
    Model("WanTransformer3DModel", "wan", diffusers_wan, inputs, LAYERS),
    Model(
        "WanTransformer3DModel, image to video", "wan", lambda: diffusers_wan(**I2V), lambda: inputs(image=True), LAYERS
    ),
    Model("WanTransformer3DModel, a timestep per token", "wan", diffusers_wan, lambda: inputs(per_token=True), LAYERS),
    Model("WanTransformer3DModel, no cross norm", "wan", lambda: diffusers_wan(cross_attn_norm=False), inputs, LAYERS),
)
