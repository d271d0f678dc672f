"""diffusers' Lumina2Transformer2DModel: texts of one length and of two."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import block_row
from fastdit.testing.zoo import Model, randn


def lumina2(**config) -> Any:
    from diffusers import Lumina2Transformer2DModel

    small = dict(sample_size=8, in_channels=4, hidden_size=96, num_layers=2, num_refiner_layers=1,
                 num_attention_heads=4, num_kv_heads=2, multiple_of=16, axes_dim_rope=(8, 8, 8), axes_lens=(32, 16, 16),
                 cap_feat_dim=20)  # fmt: skip
    return randomize(Lumina2Transformer2DModel(**{**small, **config}))


def inputs(*texts: int) -> dict[str, Any]:
    return dict(
        hidden_states=randn(len(texts), 4, 6, 10),
        timestep=torch.linspace(0.03, 0.98, len(texts)),
        encoder_hidden_states=randn(len(texts), 7, 20, seed=2),
        encoder_attention_mask=torch.arange(7) < torch.tensor(texts)[:, None],
    )


LAYERS = {
    "Lumina 2 block": 4,
    "attention (Lumina2AttnProcessor2_0)": 4,
    "feed-forward (SwiGLU of three linear layers)": 4,
    "output norm (LuminaLayerNormContinuous)": 1,
}
NAME = "Lumina2Transformer2DModel"
MODELS = (
    Model(NAME, "lumina2", lumina2, lambda: inputs(7, 7), LAYERS),
    Model(f"{NAME}, texts of two lengths", "lumina2", lumina2, lambda: inputs(7, 3), LAYERS),
)


# ---- at full width ------------------------------------------------------------------------------------------


def block_inputs(dtype: torch.dtype, tokens: int = 2048) -> tuple:
    """24 heads of 96 over 8 of keys."""
    freqs = torch.polar(torch.ones(1, tokens, 48), randn(1, tokens, 48))
    return randn(1, tokens, 2304).to(dtype), None, freqs, randn(1, 1024).to(dtype)


ROWS = (
    block_row(
        "Lumina-Image 2.0 block", "1x2048x2304, text among them",
        lambda: lumina2(hidden_size=2304, num_layers=1, num_refiner_layers=0, num_attention_heads=24, num_kv_heads=8,
                        multiple_of=256, axes_dim_rope=(32, 32, 32)),
        "layers.0", block_inputs,
    ),
)  # fmt: skip
