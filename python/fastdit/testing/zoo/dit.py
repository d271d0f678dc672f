"""diffusers' DiTTransformer2DModel."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import diffusers_dit
from fastdit.testing.zoo import Model, randn


def inputs() -> dict[str, Any]:
    return dict(hidden_states=randn(2, 4, 16, 16), timestep=torch.tensor([3, 987]), class_labels=torch.tensor([1, 999]))


MODELS = (
    Model(
        "DiTTransformer2DModel",
        "dit",
        diffusers_dit,
        inputs,
        {
            "adaLN-Zero block": 2,
            "attention (AttnProcessor2_0)": 2,
            "feed-forward activation": 2,
            "patch embedding (Conv2d, kernel = stride)": 1,
            "DiT output layer (norm, modulation, unpatchify)": 1,
        },
    ),
)
