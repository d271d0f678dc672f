"""diffusers' MochiTransformer3DModel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, randn

LAYERS = {
    "Mochi block": 3,
    "attention (MochiAttnProcessor2_0)": 3,
    "feed-forward activation": 5,
    "patch embedding (Conv2d, kernel = stride)": 1,
    "output norm (AdaLayerNormContinuous)": 1,
}
TEXT = 7


def mochi(seed: int = 0, **config) -> nn.Module:
    from diffusers import MochiTransformer3DModel

    small = dict(num_attention_heads=3, attention_head_dim=16, num_layers=3, pooled_projection_dim=40, in_channels=4,
                 text_embed_dim=32, time_embed_dim=20)  # fmt: skip
    return randomize(MochiTransformer3DModel(**{**small, **config}), seed)


def inputs(*, holes: bool = False) -> dict[str, Any]:
    mask = [[1, 0, 1, 1, 0, 0, 0], [1, 1, 0, 1, 1, 1, 0]] if holes else [[1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 0]]
    return dict(
        hidden_states=randn(2, 4, 3, 6, 10),
        encoder_hidden_states=randn(2, TEXT, 32, seed=2),
        timestep=torch.tensor([3, 987]),
        encoder_attention_mask=torch.tensor(mask, dtype=torch.bool),
    )


MODELS = (
    Model("MochiTransformer3DModel", "mochi", mochi, inputs, LAYERS),
    Model("MochiTransformer3DModel, a mask with holes", "mochi", mochi, lambda: inputs(holes=True), LAYERS),
)


def block(grid: tuple[int, int, int] = (2, 32, 32), text: int = 256, valid: int = 60) -> Whole:
    width, tokens = 3072, math.prod(grid)

    def run(dtype: torch.dtype, device: str) -> Run:
        x = randn(1, tokens, width).to(device, dtype)
        context, temb = randn(1, text, 1536, seed=2).to(device, dtype), randn(1, width, seed=3).to(device, dtype)
        mask = (torch.arange(text) < valid)[None].to(device)

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                rope = model.rope(model.pos_frequencies, *grid, device=x.device, dtype=torch.float32)
                return model.transformer_blocks[0](x, context, temb, mask, rope)[0]

        return call

    return Whole(
        "Mochi block", f"1x{tokens}x{width}, one block, {valid} of {text} text tokens",
        lambda: mochi(num_attention_heads=24, attention_head_dim=128, pooled_projection_dim=1536, num_layers=2), run,
        compile=lambda model: model.transformer_blocks[0].compile(dynamic=False),
    )  # fmt: skip


ROWS = (block(),)
