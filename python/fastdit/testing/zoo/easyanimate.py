"""diffusers' EasyAnimateTransformer3DModel: with and without the text's own layers, with a norm behind the MLP."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn
from fastdit.testing.zoo.cogvideox import rotary

LAYERS = {
    "EasyAnimate block": 2,
    "attention (EasyAnimateAttnProcessor2_0)": 2,
    "feed-forward activation": 4,
    "output norm (AdaLayerNorm)": 1,
    "patch embedding (Conv2d, kernel = stride)": 1,
}


def easyanimate(**config) -> Any:
    from diffusers import EasyAnimateTransformer3DModel

    small = dict(num_attention_heads=3, attention_head_dim=32, in_channels=4, out_channels=4, patch_size=2,
                 num_layers=2, mmdit_layers=2, time_embed_dim=20, text_embed_dim=28)  # fmt: skip
    return randomize(EasyAnimateTransformer3DModel(**{**small, **config}))


def inputs() -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 4, 3, 6, 10),
        timestep=torch.tensor([3.0, 987.0]),
        encoder_hidden_states=randn(2, 7, 28, seed=2),
    )


NAME = "EasyAnimateTransformer3DModel"
MODELS = (
    Model(NAME, "easyanimate", easyanimate, inputs, LAYERS),
    Model(f"{NAME}, one set of layers, norm behind the MLP", "easyanimate",
          lambda: easyanimate(mmdit_layers=1, after_norm=True), inputs, {**LAYERS, "feed-forward activation": 3}),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(grid: tuple[int, int, int] = (4, 16, 16), text: int = 256) -> Whole:
    """EasyAnimate 5.1 12B, 48 heads of 64, with one of its 48 blocks."""
    tokens = grid[0] * grid[1] * grid[2]

    def given(dtype: torch.dtype) -> tuple:
        x, context, temb = randn(1, tokens, 3072), randn(1, text, 3072, seed=2), randn(1, 512, seed=3)
        return *(t.to(dtype) for t in (x, context, temb)), rotary(grid, 64)

    return block_row(
        "EasyAnimate block", f"1x{tokens}x3072, one block, {text} text tokens",
        lambda: easyanimate(num_attention_heads=48, attention_head_dim=64, time_embed_dim=512, num_layers=1,
                            mmdit_layers=1),
        "transformer_blocks.0", given,
    )  # fmt: skip


ROWS = (row(),)
