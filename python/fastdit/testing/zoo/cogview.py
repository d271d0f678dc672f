"""diffusers' CogView3PlusTransformer2DModel, CogView4Transformer2DModel and GlmImageTransformer2DModel."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn, text_mask

SMALL = dict(patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=24, num_attention_heads=2,
             text_embed_dim=20, time_embed_dim=28, condition_dim=8)  # fmt: skip


def layers(name: str, attention: str, feed_forwards: int = 2) -> dict[str, int]:
    return {
        f"{name} block": 2,
        f"attention ({attention})": 2,
        "feed-forward activation": feed_forwards,
        "output norm (AdaLayerNormContinuous)": 1,
    }


def cogview3(**config) -> Any:
    from diffusers import CogView3PlusTransformer2DModel

    small = dict(pos_embed_max_size=6, sample_size=8)
    return randomize(CogView3PlusTransformer2DModel(**{**SMALL, **small, **config}))


def cogview4(**config) -> Any:
    from diffusers import CogView4Transformer2DModel

    small = dict(pos_embed_max_size=6, sample_size=8, rope_axes_dim=(8, 8))
    return randomize(CogView4Transformer2DModel(**{**SMALL, **small, **config}))


def glm_image(**config) -> Any:
    from diffusers import GlmImageTransformer2DModel

    return randomize(GlmImageTransformer2DModel(**{**SMALL, "prior_vq_quantizer_codebook_size": 16, **config}))


def inputs(**more: Any) -> dict[str, Any]:
    sizes = torch.tensor([[96.0, 160.0], [64.0, 64.0]])
    return dict(
        hidden_states=randn(2, 4, 6, 10),
        encoder_hidden_states=randn(2, 7, 20, seed=2),
        timestep=torch.tensor([3, 987]),
        target_size=sizes,
        crop_coords=torch.zeros(2, 2),
        **more,
    )


def sized(**more: Any) -> dict[str, Any]:
    return inputs(original_size=torch.tensor([[128.0, 192.0], [96.0, 64.0]]), **more)


def glm_inputs() -> dict[str, Any]:
    ids = torch.arange(30).remainder(16).view(2, 15)
    return inputs(prior_token_id=ids, prior_token_drop=torch.tensor([False, True])[:, None].expand(2, 15))


KEEPS = ("timestep", "target_size", "crop_coords", "original_size")
CALLS: dict[str, Any] = dict(keeps=KEEPS, fixed=KEEPS)
MODELS = (
    Model("CogView3PlusTransformer2DModel", "cogview", cogview3, sized,
          layers("CogView3+", "CogVideoXAttnProcessor2_0"), **CALLS),
    Model("CogView4Transformer2DModel", "cogview", cogview4, sized,
          layers("CogView4", "CogView4AttnProcessor"), **CALLS),
    Model("CogView4Transformer2DModel, a text mask", "cogview", cogview4,
          lambda: sized(attention_mask=text_mask(7, 3, total=7)), layers("CogView4", "CogView4AttnProcessor"), **CALLS),
    Model("GlmImageTransformer2DModel", "cogview", glm_image, glm_inputs,
          layers("GLM-Image", "GlmImageAttnProcessor"), **CALLS),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def streams(dtype: torch.dtype, width: int, tokens: int, text: int) -> tuple:
    given = randn(1, tokens, width), randn(1, text, width, seed=2), randn(1, 512, seed=3)
    return tuple(t.to(dtype) for t in given)


def positions(build: Any, tokens: int) -> Any:
    """The tables of heads of 128 over a square image."""
    side = 2 * int(tokens**0.5)
    return build(num_layers=0, attention_head_dim=128, num_attention_heads=1).rope(randn(1, 4, side, side))


def row(name: str, build: Any, tokens: int = 1024, text: int = 224) -> Whole:
    """CogView4-6B or GLM-Image, 32 heads of 128, with one of its blocks."""
    return block_row(
        f"{name} block", f"1x{tokens}x4096, one block, {text} text tokens",
        lambda: build(attention_head_dim=128, num_attention_heads=32, time_embed_dim=512, num_layers=1),
        "transformer_blocks.0",
        lambda dtype: (*streams(dtype, 4096, tokens, text), positions(build, tokens)),
    )  # fmt: skip


def cogview3_row(tokens: int = 1024, text: int = 224) -> Whole:
    """CogView3+, 64 heads of 40, with one of its 30 blocks."""
    return block_row(
        "CogView3+ block", f"1x{tokens}x2560, one block, {text} text tokens",
        lambda: cogview3(attention_head_dim=40, num_attention_heads=64, time_embed_dim=512, num_layers=1),
        "transformer_blocks.0",
        lambda dtype: streams(dtype, 2560, tokens, text),
    )  # fmt: skip


ROWS = (row("CogView4-6B", cogview4), row("GLM-Image", glm_image, text=32), cogview3_row())
