"""diffusers' LuminaNextDiT2DModel: grouped queries with norms, and proportional attention without either."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import block_row
from fastdit.testing.zoo import Model, randn, text_mask


def lumina_next(**config) -> Any:
    """Four heads of queries, two of keys."""
    from diffusers import LuminaNextDiT2DModel

    small = dict(sample_size=8, in_channels=4, hidden_size=96, num_layers=2, num_attention_heads=4, num_kv_heads=2,
                 multiple_of=16, cross_attention_dim=20)  # fmt: skip
    return randomize(LuminaNextDiT2DModel(**{**small, **config}))


def rotation(*shape: int) -> Tensor:
    return torch.polar(torch.ones(shape), randn(*shape, seed=5))


def inputs(**attention: Any) -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 4, 6, 10),
        timestep=torch.tensor([0.25, 0.75]),
        encoder_hidden_states=randn(2, 7, 20, seed=2),
        encoder_mask=text_mask(7, 3, total=7).flip(1),  # its tokenizer pads in front
        image_rotary_emb=rotation(8, 8, 12),
        cross_attention_kwargs=attention,
    )


LAYERS = {
    "Lumina-Next block": 2,
    "attention (LuminaAttnProcessor2_0)": 4,
    "feed-forward (SwiGLU of three linear layers)": 2,
    "output norm (LuminaLayerNormContinuous)": 1,
}
NAME = "LuminaNextDiT2DModel"
PLAIN = dict(qk_norm=False, num_kv_heads=None, num_layers=1)
ONE = {layer: count // 2 or 1 for layer, count in LAYERS.items()}
MODELS = (
    Model(NAME, "lumina_next", lumina_next, inputs, LAYERS),
    Model(f"{NAME}, proportional attention, no query and key norms", "lumina_next", lambda: lumina_next(**PLAIN),
          lambda: inputs(base_sequence_length=4), ONE),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def block_inputs(dtype: torch.dtype, tokens: int = 2048, text: int = 256) -> tuple:
    """32 heads of 72 over 8 of keys."""
    x, context = randn(1, tokens, 2304).to(dtype), randn(1, text, 2048, seed=2).to(dtype)
    masks = torch.ones(1, tokens, dtype=torch.int32), text_mask(text // 2, total=text).bool()
    return x, masks[0], rotation(1, tokens, 36), context, masks[1], randn(1, 1024, seed=3).to(dtype), {}


ROWS = (
    block_row(
        "Lumina-Next block", "1x2048x2304, 128 of 256 text tokens",
        lambda: lumina_next(hidden_size=2304, num_layers=1, num_attention_heads=32, num_kv_heads=8, multiple_of=256,
                            cross_attention_dim=2048),
        "layers.0", block_inputs,
    ),
)  # fmt: skip
