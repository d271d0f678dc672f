"""diffusers' ErnieImageTransformer2DModel: texts of two lengths, and a text of the tokens' width without padding."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn

LAYERS = {
    "ERNIE-Image block": 2,
    "attention (ErnieImageSingleStreamAttnProcessor)": 2,
    "feed-forward (GEGLU of three linear layers)": 2,
    "modulation of samples (ERNIE-Image)": 1,
    "output norm (ERNIE-Image)": 1,
    "patch embedding (Conv2d, kernel = stride)": 1,
}


def ernie_image(**config) -> Any:
    """ErnieImageTransformer2DModel of two narrow layers: two heads of 24."""
    from diffusers import ErnieImageTransformer2DModel

    small = dict(hidden_size=48, num_attention_heads=2, num_layers=2, ffn_hidden_size=112, in_channels=6,
                 out_channels=4, patch_size=2, text_in_dim=20, rope_axes_dim=(4, 8, 12))  # fmt: skip
    return randomize(ErnieImageTransformer2DModel(**{**small, **config}))


def inputs(*lengths: int, width: int = 20) -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 6, 6, 10),
        timestep=torch.tensor([3.0, 984.0]),
        text_bth=randn(2, max(lengths), width, seed=2),
        text_lens=torch.tensor(lengths),
    )


NAME = "ErnieImageTransformer2DModel"
MODELS = (
    Model(NAME, "ernie_image", ernie_image, lambda: inputs(7, 3), LAYERS),
    Model(f"{NAME}, text of the tokens' width", "ernie_image", lambda: ernie_image(text_in_dim=48),
          lambda: inputs(7, 7, width=48), LAYERS),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(tokens: int = 1024, text: int = 256, width: int = 3072) -> Whole:
    """ERNIE-Image, 24 heads of 128, with one of its 24 blocks; the tables as the accelerated model hands them."""

    def given(dtype: torch.dtype) -> tuple:
        n = tokens + text
        x, mask = randn(n, 1, width).to(dtype), torch.arange(n) < n - text // 2
        temb = [t.expand(n, 1, -1) for t in randn(1, 6 * width, seed=2).to(dtype).chunk(6, dim=-1)]
        angles = randn(1, n, 1, 64, seed=3).repeat_interleave(2, dim=-1)
        return x, angles, temb, mask[None, None, None]

    return block_row(
        "ERNIE-Image block", f"{tokens}+{text}x1x{width}, one block, {text // 2} of {text} text tokens",
        lambda: ernie_image(hidden_size=width, num_attention_heads=24, num_layers=1, ffn_hidden_size=8192,
                            rope_axes_dim=(32, 48, 48)),
        "layers.0", given,
    )  # fmt: skip


ROWS = (row(),)
