"""diffusers' QwenImage21Transformer2DModel: a condition image between texts, with and without rows of their own."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn, text_mask

LAYERS = {
    "Qwen-Image 2.1 block": 2,
    "feed-forward (SwiGLU of three linear layers)": 2,
    "output norm (Qwen-Image 2.1)": 1,
}
SLOTS = [False] * 3 + [True] + [False] * 2 + [True] * 4  # text, one slot of four tokens, text, the target's four slots


def qwen21(**config) -> Any:
    """QwenImage21Transformer2DModel of two narrow layers: two heads of 24."""
    from diffusers import QwenImage21Transformer2DModel

    small = dict(in_channels=6, out_channels=6, num_layers=2, attention_head_dim=24, num_attention_heads=2,
                 context_in_dim=20, axes_dims_rope=(8, 8, 8))  # fmt: skip
    return randomize(QwenImage21Transformer2DModel(**{**small, **config}))


def inputs(*, mask: bool = True) -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 4 + 16, 6),
        encoder_hidden_states=randn(2, 6, 20, seed=2),
        timestep=torch.tensor([0.25, 0.75]),  # in the model's dtype, which all of its embedding takes
        img_shapes=[[(1, 2, 2), (1, 4, 4)]] * 2,
        img_mask=torch.tensor([SLOTS] * 2),
        encoder_hidden_states_mask=text_mask(6, 5, total=6).bool() if mask else None,
    )


NAME = "QwenImage21Transformer2DModel"
MODELS = (
    Model(NAME, "qwen", qwen21, inputs, LAYERS),
    Model(f"{NAME}, one timestep for all tokens", "qwen", lambda: qwen21(causal_condition=False),
          lambda: inputs(mask=False), LAYERS),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(text: int = 128, image: int = 896) -> Whole:
    """32 heads of 128, with one of its 32 blocks: the image at its timestep, the text before it at 0."""

    def given(dtype: torch.dtype) -> tuple:
        tokens = text + image
        x, tables = randn(1, tokens, 4096).to(dtype), randn(2, 4 * 4096, seed=2).to(dtype)
        rope = torch.polar(torch.ones(tokens, 64), randn(tokens, 64, seed=3))
        return x, tables, rope, None, torch.arange(tokens) >= text, None, None, None, [(0, text, True)]

    return block_row(
        "Qwen-Image 2.1 block", f"1x{text + image}x4096, one block, {text} text tokens among them",
        lambda: qwen21(num_layers=1, attention_head_dim=128, num_attention_heads=32, axes_dims_rope=(16, 56, 56)),
        "transformer_blocks.0", given,
    )  # fmt: skip


ROWS = (row(),)
