"""diffusers' BriaFibo2Transformer2DModel: texts of two lengths; one image to edit and no mask."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn, text_mask

LAYERS = {
    "Bria FIBO 2 block": 3,
    "Bria FIBO 2 Perceiver layer": 1,
    "attention (BriaFibo2AttnProcessor)": 6,
    "feed-forward (SwiGLU of three linear layers)": 4,
    "Z-Image output layer (norm, modulation)": 1,
}


def fibo2(**config) -> Any:
    """BriaFibo2Transformer2DModel: a refiner and two narrow layers, the second of which reads the text; heads of 24."""
    from diffusers import BriaFibo2Transformer2DModel

    small = dict(in_channels=3, dim=72, n_layers=2, n_refiner_layers=1, n_heads=3, cap_feat_dim=20,
                 injection_layer_ids=(1,), perceiver_num_layers=1, min_num_gist_tokens=3, max_num_gist_tokens=9,
                 gist_step=3, gist_min_text_len=4, gist_max_text_len=12, axes_dims=(4, 8, 12),
                 axes_lens=(32, 16, 16))  # fmt: skip
    return randomize(BriaFibo2Transformer2DModel(**{**small, **config}))


def inputs(*lengths: int, edited: bool = False) -> dict[str, Any]:
    """Of texts of two lengths the shorter one has fewer gist tokens."""
    return dict(
        hidden_states=randn(2, 3, 6, 10),
        timestep=torch.tensor([0.03, 0.98]),
        encoder_hidden_states=randn(2, 2, max(lengths), 20, seed=2),
        encoder_attention_mask=None if edited else text_mask(*lengths, total=max(lengths)).bool(),
        context_latents=[randn(2, 3, 4, 6, seed=3)] if edited else None,
    )


NAME = "BriaFibo2Transformer2DModel"
MODELS = (
    Model(NAME, "bria_fibo2", fibo2, lambda: inputs(11, 4), LAYERS),
    Model(f"{NAME}, an image to edit", "bria_fibo2", fibo2, lambda: inputs(7, 7, edited=True), LAYERS),
)


# ---- at full width ------------------------------------------------------------------------------------------


def row(tokens: int = 768, gist: int = 256, text: int = 256, width: int = 3584) -> Whole:
    """FIBO 2, 28 heads of 128, with one of its five blocks that read the text."""

    def given(dtype: torch.dtype) -> tuple:
        n = gist + tokens
        noisy, clean = (randn(1, 256, seed=s).to(dtype) for s in (3, 4))
        freqs = torch.polar(torch.ones(1, n, 64), randn(1, n, 64))
        mask = (torch.arange(n) >= gist).long()[None]
        context = randn(1, text, 7680, seed=2).to(dtype)
        return randn(1, n, width).to(dtype), None, freqs, None, mask, noisy, clean, context, None

    return block_row(
        "Bria FIBO 2 block with text", f"1x{gist}+{tokens}x{width}, one block, {text} text tokens",
        lambda: fibo2(dim=width, n_layers=1, n_refiner_layers=0, n_heads=28, cap_feat_dim=7680,
                      injection_layer_ids=(0,), perceiver_num_layers=0, axes_dims=(32, 48, 48)),
        "layers.0", given,
    )  # fmt: skip


ROWS = (row(),)
