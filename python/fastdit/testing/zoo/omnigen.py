"""diffusers' OmniGenTransformer2DModel: an image among the text under the pipeline's mask, and text without a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import block_row
from fastdit.testing.zoo import Model, randn

LAYERS = {
    "OmniGen block": 2,
    "attention (OmniGenAttnProcessor2_0)": 2,
    "feed-forward (SwiGLU of two linear layers)": 2,
    "output norm (AdaLayerNorm)": 1,
    "patch embedding (Conv2d, kernel = stride)": 1,
}


def omnigen(head_dim: int = 24, **config) -> Any:
    from diffusers import OmniGenTransformer2DModel

    factors = dict(short_factor=[1.0 + i / 7 for i in range(head_dim // 2)], long_factor=[2.0] * (head_dim // 2))
    small = dict(hidden_size=2 * head_dim, num_attention_heads=2, num_key_value_heads=2, intermediate_size=64,
                 num_layers=2, pad_token_id=0, vocab_size=40, rope_scaling=factors, pos_embed_max_size=16,
                 time_step_dim=16)  # fmt: skip
    return randomize(OmniGenTransformer2DModel(**{**small, **config}))


def mask(text: int, image: int, *padded: int) -> Tensor:
    """(B, N, N): causal over text and time, the image sees all; padding in front is not seen, and sees all."""
    tokens = text + 1 + image
    seen = torch.ones(tokens, tokens).tril().repeat(len(padded), 1, 1)
    seen[:, -image:] = 1
    for sample, n in zip(seen, padded, strict=True):
        sample[:, :n], sample[:n] = 0, 1
    return seen


def inputs(*, images: bool = True) -> dict[str, Any]:
    seen = mask(9, 15, 0, 3)
    seen[0, 2:8, 2:8] = 1
    return dict(
        hidden_states=randn(2, 4, 6, 10),
        timestep=torch.tensor([0.25, 0.75]),
        input_ids=torch.arange(18).reshape(2, 9) + 1,
        input_img_latents=[randn(1, 4, 4, 6, seed=2)] if images else [],
        input_image_sizes={0: [[2, 8]]} if images else {},
        attention_mask=seen if images else None,
        position_ids=torch.arange(25).repeat(2, 1),
    )


FIXED = ("timestep", "attention_mask")
NAME = "OmniGenTransformer2DModel"
MODELS = (
    Model(NAME, "omnigen", omnigen, inputs, LAYERS, fixed=FIXED),
    Model(f"{NAME}, without images and mask", "omnigen", omnigen, lambda: inputs(images=False), LAYERS, fixed=FIXED),
)


# ---- at full width ------------------------------------------------------------------------------------------


def block_inputs(dtype: torch.dtype, text: int = 255, image: int = 1024) -> tuple:
    """32 heads of 96."""
    tokens = text + 1 + image
    angles, bias = randn(tokens, 48).repeat(1, 2), (1 - mask(text, image, 100)) * torch.finfo(dtype).min
    return randn(1, tokens, 3072).to(dtype), bias[:, None].to(dtype), (angles.cos(), angles.sin())


ROWS = (
    block_row(
        "OmniGen block", "1x1280x3072, 155 of 255 text tokens",
        lambda: omnigen(96, hidden_size=3072, num_attention_heads=32, num_key_value_heads=32, intermediate_size=8192,
                        num_layers=1),
        "layers.0", block_inputs,
    ),
)  # fmt: skip
