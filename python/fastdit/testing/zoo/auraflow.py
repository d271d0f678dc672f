"""diffusers' AuraFlowTransformer2DModel: joint and single blocks."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn

LAYERS = {
    "AuraFlow joint block": 2,
    "AuraFlow single block": 2,
    "attention (AuraFlowAttnProcessor2_0)": 4,
    "feed-forward (SwiGLU of three linear layers)": 6,
}


def auraflow(**config) -> Any:
    """AuraFlowTransformer2DModel of two joint and two single narrow layers."""
    from diffusers import AuraFlowTransformer2DModel

    small = dict(sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_mmdit_layers=2,
                 num_single_dit_layers=2, attention_head_dim=20, num_attention_heads=2, joint_attention_dim=24,
                 caption_projection_dim=40, pos_embed_max_size=36)  # fmt: skip
    return randomize(AuraFlowTransformer2DModel(**{**small, **config}))


def inputs() -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 4, 6, 10),
        encoder_hidden_states=randn(2, 7, 24, seed=2),
        timestep=torch.tensor([0.25, 0.75]),
    )


MODELS = (Model("AuraFlowTransformer2DModel", "auraflow", auraflow, inputs, LAYERS),)


# ---- at full width ------------------------------------------------------------------------------------------


def row(name: str, block: str, tokens: int, text: int, **layers: int) -> Whole:
    """AuraFlow, 12 heads of 256, with one of its 4 joint or 32 single blocks."""

    def given(dtype: torch.dtype) -> tuple:
        x, context, temb = randn(1, tokens, 3072), randn(1, text, 3072, seed=2), randn(1, 3072, seed=3)
        return tuple(t.to(dtype) for t in ((x, context, temb) if text else (x, temb)))

    return block_row(
        name, f"1x{tokens}x3072, one block" + (f", {text} text tokens" if text else ""),
        lambda: auraflow(attention_head_dim=256, num_attention_heads=12, caption_projection_dim=3072,
                         joint_attention_dim=2048, **layers),
        block, given,
    )  # fmt: skip


ROWS = (
    row("AuraFlow joint block", "joint_transformer_blocks.0", 1024, 264, num_mmdit_layers=1, num_single_dit_layers=0),
    row("AuraFlow single block", "single_transformer_blocks.0", 1288, 0, num_mmdit_layers=0, num_single_dit_layers=1),
)
