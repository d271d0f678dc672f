"""diffusers' Krea2Transformer2DModel: with and without padded text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn, rotation, text_mask

LAYERS = {
    "Krea 2 block": 2,
    "Krea 2 text block": 2,
    "attention (Krea2AttnProcessor)": 4,
    "feed-forward (SwiGLU of three linear layers)": 4,
    "Krea 2 output layer (norm, modulation)": 1,
}


def krea2(**config) -> Any:
    """Krea2Transformer2DModel of two narrow layers: four heads of queries, two of keys."""
    from diffusers import Krea2Transformer2DModel

    small = dict(in_channels=6, num_layers=2, attention_head_dim=12, num_attention_heads=4, num_key_value_heads=2,
                 intermediate_size=64, timestep_embed_dim=16, text_hidden_dim=20, num_text_layers=3,
                 text_num_attention_heads=2, text_num_key_value_heads=1, text_intermediate_size=36,
                 num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 4, 4))  # fmt: skip
    return randomize(Krea2Transformer2DModel(**{**small, **config}))


def positions(text: int, height: int, width: int) -> Tensor:
    image = torch.cartesian_prod(torch.tensor([0]), torch.arange(height), torch.arange(width))
    return torch.cat([torch.zeros(text, 3), image.float()])


def inputs(*, mask: bool = True) -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 15, 6),
        encoder_hidden_states=randn(2, 7, 3, 20, seed=2),
        timestep=torch.tensor([0.25, 0.75]),
        position_ids=positions(7, 3, 5),
        encoder_attention_mask=text_mask(7, 3, total=7).bool() if mask else None,
    )


KEEPS = ("timestep", "position_ids")
MODELS = (
    Model("Krea2Transformer2DModel", "krea2", krea2, inputs, LAYERS, keeps=KEEPS, fixed=KEEPS),
    Model("Krea2Transformer2DModel, without a mask", "krea2", krea2, lambda: inputs(mask=False), LAYERS, keeps=KEEPS,
          fixed=KEEPS),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(text: int = 256, side: int = 16) -> Whole:
    """Krea 2, 48 heads of 128, 12 of keys, with one of its 28 blocks."""
    tokens = text + side * side

    def given(dtype: torch.dtype) -> tuple:
        x, temb, mask = randn(1, tokens, 6144).to(dtype), randn(1, 1, 6 * 6144, seed=2).to(dtype), torch.ones(1, tokens)
        mask[:, text // 2 : text] = 0
        return x, temb, rotation(tokens), mask.bool()[:, None, None]

    return block_row(
        "Krea 2 block", f"1x{tokens}x6144, one block, {text // 2} of {text} text tokens",
        lambda: krea2(num_layers=1, attention_head_dim=128, num_attention_heads=48, num_key_value_heads=12,
                      intermediate_size=16384, axes_dims_rope=(32, 48, 48)),
        "transformer_blocks.0", given,
    )  # fmt: skip


ROWS = (row(),)
