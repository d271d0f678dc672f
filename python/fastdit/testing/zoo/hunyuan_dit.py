"""diffusers' HunyuanDiT2DModel: 1.1 (style and sizes as conditions) and 1.2."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn, text_mask

LAYERS = {
    "HunyuanDiT block": 4,
    "attention (HunyuanAttnProcessor2_0)": 8,
    "feed-forward activation": 4,
    "patch embedding (Conv2d, kernel = stride)": 1,
    "output norm (AdaLayerNormContinuous)": 1,
}


def hunyuan_dit(**config) -> Any:
    """HunyuanDiT2DModel of four narrow layers, the last of which takes the first one's output too."""
    from diffusers import HunyuanDiT2DModel

    small = dict(num_attention_heads=2, attention_head_dim=20, in_channels=4, patch_size=2, hidden_size=40,
                 num_layers=4, cross_attention_dim=24, cross_attention_dim_t5=16, pooled_projection_dim=12,
                 text_len=5, text_len_t5=6)  # fmt: skip
    return randomize(HunyuanDiT2DModel(**{**small, **config}))


def rotary(head_dim: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    cos, sin = get_2d_rotary_pos_embed(head_dim, ((0, 0), grid), grid, output_type="pt")
    return cos, sin


def inputs(*, conditions: bool = True) -> dict[str, Any]:
    sizes = torch.tensor([[1024, 1024, 512, 384, 0, 0]] * 2)
    return dict(
        hidden_states=randn(2, 4, 6, 10),
        timestep=torch.tensor([3.0, 984.0]),  # in the model's dtype, which all of its embedding takes
        encoder_hidden_states=randn(2, 5, 24, seed=2),
        text_embedding_mask=text_mask(5, 2, total=5),
        encoder_hidden_states_t5=randn(2, 6, 16, seed=3),
        text_embedding_mask_t5=text_mask(3, 6, total=6),
        image_meta_size=sizes if conditions else None,
        style=torch.zeros(2, dtype=torch.long) if conditions else None,
        image_rotary_emb=rotary(20, (3, 5)),
    )


NAME = "HunyuanDiT2DModel"
MODELS = (
    Model(NAME, "hunyuan_dit", hunyuan_dit, inputs, LAYERS, keeps=("image_rotary_emb",)),
    Model(f"{NAME}, 1.2", "hunyuan_dit", lambda: hunyuan_dit(use_style_cond_and_image_meta_size=False),
          lambda: inputs(conditions=False), LAYERS, keeps=("image_rotary_emb",)),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(grid: tuple[int, int] = (44, 46), text: int = 333) -> Whole:
    """HunyuanDiT, 16 heads of 88, with one of its 40 blocks."""
    tokens = grid[0] * grid[1]

    def given(dtype: torch.dtype) -> tuple:
        x, context = randn(1, tokens, 1408).to(dtype), randn(1, text, 1024, seed=2).to(dtype)
        return x, context, randn(1, 1408, seed=3).to(dtype), rotary(88, grid)

    return block_row(
        "HunyuanDiT block", f"1x{tokens}x1408, one block, {text} text tokens",
        lambda: hunyuan_dit(num_attention_heads=16, attention_head_dim=88, hidden_size=1408, num_layers=1,
                            mlp_ratio=4.3637, cross_attention_dim=1024),
        "blocks.0", given,
    )  # fmt: skip


ROWS = (row(),)
