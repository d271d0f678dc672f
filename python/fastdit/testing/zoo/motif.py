"""diffusers' MotifVideoTransformer3DModel: with and without its text attention, an image, blocks of the decoder."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn, rotation, text_mask

LAYERS = {
    "Motif-Video dual block": 1,
    "Motif-Video single block": 3,
    "attention (MotifVideoAttnProcessor2_0)": 4,
    "feed-forward activation": 2,
    "patch embedding (Conv3d, kernel = stride)": 1,
    "output norm (AdaLayerNormContinuous)": 1,
}
TEXT = dict(enable_text_cross_attention_dual=True, enable_text_cross_attention_single=True)
WITH_TEXT = {**LAYERS, "attention (MotifVideoCrossAttnProcessor2_0)": 3}  # none in the decoder


def motif(**config) -> Any:
    """MotifVideoTransformer3DModel: one dual block, two single ones and one of the decoder; two heads of 24."""
    from diffusers import MotifVideoTransformer3DModel

    small = dict(in_channels=5, out_channels=4, num_attention_heads=2, attention_head_dim=24, num_layers=1,
                 num_single_layers=3, num_decoder_layers=1, text_embed_dim=20, rope_axes_dim=(8, 8, 8))  # fmt: skip
    return randomize(MotifVideoTransformer3DModel(**{**small, **config}))


def inputs(*, image: bool = False, mask: bool = True) -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 5, 2, 6, 10),
        timestep=torch.tensor([3, 987]),
        encoder_hidden_states=randn(2, 7, 20, seed=2),
        encoder_attention_mask=text_mask(7, 3, total=7).flip(1) if mask else None,
        image_embeds=randn(2, 3, 12, seed=3) if image else None,
    )


NAME = "MotifVideoTransformer3DModel"
MODELS = (
    Model(NAME, "motif", motif, inputs, LAYERS),
    Model(f"{NAME}, attention to the text, an image", "motif", lambda: motif(**TEXT, image_embed_dim=12),
          lambda: inputs(image=True), WITH_TEXT),
    Model(f"{NAME}, attention to the text, no mask", "motif", lambda: motif(**TEXT), lambda: inputs(mask=False),
          WITH_TEXT),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(kind: str, block: str, tokens: int = 2048, text: int = 256, valid: int = 60, **config: Any) -> Whole:
    """Motif-Video 2B, 12 heads of 128, with one block, its attention to the text among it."""

    def given(dtype: torch.dtype) -> tuple:
        x, context, temb = (randn(1, n, 1536, seed=n).to(dtype) for n in (tokens, text, 1))
        there = torch.cat([torch.ones(1, tokens), text_mask(valid, total=text)], dim=1).bool()[:, None, None]
        return x, context, temb[:, 0], there, rotation(tokens)

    return block_row(
        f"Motif-Video {kind} block", f"1x{tokens}x1536, one block, {valid} of {text} text tokens",
        lambda: motif(num_attention_heads=12, attention_head_dim=128, num_decoder_layers=0, rope_axes_dim=(16, 56, 56),
                      **TEXT, **config), block, given,
    )  # fmt: skip


ROWS = (
    row("dual", "transformer_blocks.0", num_layers=1, num_single_layers=0),
    row("single", "single_transformer_blocks.0", num_layers=0, num_single_layers=1),
)
