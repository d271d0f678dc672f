"""diffusers' QwenImageTransformer2DModel: with and without a text mask, edit (rows by index), layered."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import block_row
from fastdit.testing.zoo import Model, randn

FIXED = ("timestep", "encoder_hidden_states_mask")


def qwen(**config) -> Any:
    from diffusers import QwenImageTransformer2DModel

    small = dict(in_channels=12, out_channels=3, num_layers=2, attention_head_dim=24, num_attention_heads=3,
                 joint_attention_dim=32, axes_dims_rope=(4, 8, 12))  # fmt: skip
    return randomize(QwenImageTransformer2DModel(**{**small, **config}))


def inputs(
    *images: tuple[int, int, int], mask: torch.Tensor | None = None, text: int = 7, **more: Any
) -> dict[str, Any]:
    images = images or ((1, 3, 5),)
    tokens = sum(t * h * w for t, h, w in images)
    return dict(
        hidden_states=randn(2, tokens, 12),
        encoder_hidden_states=randn(2, text, 32, seed=2),
        encoder_hidden_states_mask=mask,
        timestep=torch.tensor([0.03, 0.987]),
        img_shapes=[list(images)] * 2,
        **more,
    )


PADDED = torch.arange(7) < torch.tensor([[3], [7]])
HOLES = torch.tensor([[0, 1, 1, 0, 1, 0, 1], [0, 0, 0, 0, 0, 0, 0]])
EDIT = dict(zero_cond_t=True)
LAYERED = dict(use_additional_t_cond=True, use_layer3d_rope=True)
LAYERS = {
    "Qwen-Image block": 2,
    "attention (QwenDoubleStreamAttnProcessor2_0)": 2,
    "feed-forward activation": 4,
    "output norm (AdaLayerNormContinuous)": 1,
}
NAME = "QwenImageTransformer2DModel"
MODELS = (
    Model(NAME, "qwen", qwen, inputs, LAYERS, fixed=FIXED),
    Model(f"{NAME}, text mask", "qwen", qwen, lambda: inputs(mask=PADDED), LAYERS, fixed=FIXED),
    Model(f"{NAME}, text mask with holes", "qwen", qwen, lambda: inputs(mask=HOLES), LAYERS, fixed=FIXED),
    Model(f"{NAME}, edit", "qwen", lambda: qwen(**EDIT), lambda: inputs((1, 3, 5), (1, 2, 4), mask=PADDED), LAYERS,
          fixed=FIXED),
    Model(f"{NAME}, layered", "qwen", lambda: qwen(**LAYERED),
          lambda: inputs((2, 3, 5), (1, 2, 4), additional_t_cond=torch.tensor([0, 1])), LAYERS, fixed=FIXED),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def block_inputs(dtype: torch.dtype, side: int = 40, text: int = 256, valid: int = 60) -> tuple:
    """Qwen-Image: 24 heads of 128."""
    rope = qwen(num_layers=0, axes_dims_rope=(16, 56, 56)).pos_embed
    streams = (randn(1, n, 3072, seed=n).to(dtype) for n in (side * side, text))
    return *streams, torch.arange(text)[None] < valid, randn(1, 3072).to(dtype), rope([[(1, side, side)]], None, text)


ROWS = (
    block_row(
        "Qwen-Image block", "1x1600x3072, 60 of 256 text tokens",
        lambda: qwen(num_layers=1, attention_head_dim=128, num_attention_heads=24, axes_dims_rope=(16, 56, 56)),
        "transformer_blocks.0", block_inputs,
    ),
)  # fmt: skip
