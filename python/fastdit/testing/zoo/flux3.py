"""diffusers' Flux3Transformer2DModel: with and without a reference image, and for few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn, rotation

LAYERS = {
    "Flux.3 block of one stream": 3,
    "Flux.3 joint block": 2,
    "attention (Flux3AttnProcessor)": 5,
    "feed-forward activation (SwiGLU)": 5,
    "modulation of tokens (Flux.3)": 6,
    "output norm (Flux.3)": 1,
}


def flux3(**config) -> Any:
    """Flux3Transformer2DModel of one narrow layer per stream (text, image, reference) and two joint ones."""
    from diffusers import Flux3Transformer2DModel

    small = dict(in_channels=6, cond_in_channels=5, num_layers=1, num_single_layers=2, attention_head_dim=24,
                 num_attention_heads=2, joint_attention_dim=20, timestep_channels=16,
                 axes_dims_rope=(6, 6, 6, 6))  # fmt: skip
    return randomize(Flux3Transformer2DModel(**{**small, **config}))


def ids(height: int, width: int, time: int = 0) -> Tensor:
    return torch.cartesian_prod(torch.tensor([time]), torch.arange(height), torch.arange(width), torch.tensor([0]))


def inputs(*, reference: bool = False, target: bool = False) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if reference:
        more.update(image_cond_hidden_states=randn(2, 6, 5, seed=3), image_cond_ids=ids(2, 3, time=1))
    if target:
        more.update(target_timestep=torch.tensor([0.125, 0.25]))
    return dict(
        hidden_states=randn(2, 15, 6),
        encoder_hidden_states=randn(2, 7, 20, seed=2),
        timestep=torch.tensor([0.25, 0.75]),  # rounded to the model's dtype
        img_ids=ids(3, 5),
        txt_ids=torch.nn.functional.pad(torch.arange(7)[:, None], (3, 0)),
        **more,
    )


NAME = "Flux3Transformer2DModel"
FIXED: dict[str, Any] = dict(keeps=("timestep", "target_timestep"), fixed=("timestep", "target_timestep"))
MODELS = (
    Model(NAME, "flux3", flux3, inputs, LAYERS, **FIXED),
    Model(f"{NAME}, a reference image", "flux3", flux3, lambda: inputs(reference=True), LAYERS, **FIXED),
    Model(f"{NAME}, flow map", "flux3", lambda: flux3(flow_map=True), lambda: inputs(target=True), LAYERS, **FIXED),
)


# ---- at full width ------------------------------------------------------------------------------------------


def one_block(joint: bool) -> Any:
    """24 heads of 128, and one block: of both streams, or of the image alone."""
    return flux3(num_layers=int(not joint), num_single_layers=int(joint), attention_head_dim=128,
                 num_attention_heads=24, axes_dims_rope=(32, 32, 32, 32))  # fmt: skip


def row(tokens: int = 1024, text: int = 512, width: int = 3072) -> Whole:
    """FLUX.3, with one of its joint blocks; one timestep for each stream."""

    def given(dtype: torch.dtype) -> tuple:
        x, context = randn(1, tokens, width).to(dtype), randn(1, text, width, seed=2).to(dtype)
        mod, text_mod = (randn(1, 1, 3 * width, seed=n).to(dtype).expand(1, n, -1) for n in (tokens, text))
        return x, context, mod, text_mod, rotation(tokens + text)

    return block_row(
        "FLUX.3 joint block", f"1x{tokens}x{width}, {text} text tokens",
        lambda: one_block(joint=True),
        "single_transformer_blocks.0", given,
    )  # fmt: skip


def stream_row(tokens: int = 1024, width: int = 3072) -> Whole:
    """FLUX.3, with one of its blocks of the image alone."""

    def given(dtype: torch.dtype) -> tuple:
        mod = randn(1, 1, 3 * width, seed=2).to(dtype)
        return randn(1, tokens, width).to(dtype), mod.expand(1, tokens, -1), rotation(tokens)

    return block_row(
        "FLUX.3 block of one stream", f"1x{tokens}x{width}",
        lambda: one_block(joint=False),
        "mode_blocks.image.0", given,
    )  # fmt: skip


ROWS = (row(), stream_row())
