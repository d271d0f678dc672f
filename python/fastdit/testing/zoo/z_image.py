"""diffusers' ZImageTransformer2DModel: samples of one length and of two, Omni."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import block_row
from fastdit.testing.zoo import Model, randn


def z_image(**config) -> Any:
    from diffusers import ZImageTransformer2DModel

    small = dict(in_channels=4, dim=72, n_layers=2, n_refiner_layers=1, n_heads=3, n_kv_heads=3, cap_feat_dim=20,
                 axes_dims=[4, 8, 12], axes_lens=[256, 16, 16])  # fmt: skip
    return randomize(ZImageTransformer2DModel(**{**small, **config}))


def inputs(*texts: int) -> dict[str, Any]:
    """An image of 4 x 6 patches for each text, and tokens of padding: lengths are multiples of 32."""
    return dict(
        x=[randn(4, 1, 8, 12, seed=n) for n in range(len(texts))],
        t=torch.linspace(0.03, 0.98, len(texts)),
        cap_feats=[randn(n, 20, seed=n) for n in texts],
    )


def omni_inputs() -> dict[str, Any]:
    """Two images a sample, the first one clean, and the features of the first."""
    return dict(
        x=[[randn(4, 1, 4, 4, seed=n), randn(4, 1, 8, 12, seed=n + 1)] for n in (1, 3)],
        t=torch.tensor([0.03, 0.98]),
        cap_feats=[[randn(n, 20, seed=n), randn(n + 30, 20, seed=n)] for n in (3, 6)],
        siglip_feats=[[randn(2, 3, 16, seed=n), None] for n in (1, 2)],
        image_noise_mask=[[0, 1]] * 2,
    )


def call(model: Any, given: dict[str, Any]) -> Tensor:
    return torch.stack(list(model(**given, return_dict=False)[0]))


LAYERS = {
    "Z-Image block": 4,
    "attention (ZSingleStreamAttnProcessor)": 4,
    "feed-forward (SwiGLU of three linear layers)": 4,
    "Z-Image output layer (norm, modulation)": 1,
}
OMNI = {name: n + (n > 1) for name, n in LAYERS.items()}
NAME = "ZImageTransformer2DModel"


def model(variant: str, build: Callable[[], Any], given: Callable[[], dict[str, Any]], layers: dict[str, int]) -> Model:
    return Model(NAME + variant, "z_image", build, given, layers, call=call, keeps=("t",), fixed=("t",))


MODELS = (
    model("", z_image, lambda: inputs(5, 7), LAYERS),
    model(", texts of two lengths", z_image, lambda: inputs(5, 40), LAYERS),
    model(", omni", lambda: z_image(siglip_feat_dim=16), omni_inputs, OMNI),
)


# ---- at full width ------------------------------------------------------------------------------------------


def block_inputs(dtype: torch.dtype, tokens: int = 2048) -> tuple:
    """30 heads of 128."""
    freqs = torch.polar(torch.ones(1, tokens, 64), randn(1, tokens, 64))
    return randn(1, tokens, 3840).to(dtype), None, freqs, randn(1, 256).to(dtype)


ROWS = (
    block_row(
        "Z-Image block", "1x2048x3840, text among them",
        lambda: z_image(dim=3840, n_layers=1, n_refiner_layers=0, n_heads=30, n_kv_heads=30, axes_dims=[32, 48, 48]),
        "layers.0", block_inputs,
    ),
)  # fmt: skip
