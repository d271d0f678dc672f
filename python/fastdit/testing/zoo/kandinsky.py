"""diffusers' Kandinsky5Transformer3DModel and Kandinsky6Transformer3DModel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole, model_row
from fastdit.testing.zoo import Model, randn, text_mask

GRID = (2, 3, 5)
K5 = {
    "Kandinsky 5 text block": 1,
    "Kandinsky 5 block": 2,
    "attention (Kandinsky)": 5,
    "feed-forward (Kandinsky 5)": 3,
    "output layer (Kandinsky)": 1,
}
K6 = {
    "Kandinsky 6 text block": 2,
    "Kandinsky 6 block": 2,
    "attention (Kandinsky)": 14,
    "feed-forward activation": 6,
    "output layer (Kandinsky)": 1,
}


def kandinsky5(**config) -> Any:
    """Kandinsky5Transformer3DModel of one text block and two visual blocks: 3 heads of 20."""
    from diffusers import Kandinsky5Transformer3DModel

    small = dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=18, in_text_dim2=14, time_dim=16, model_dim=60,
                 ff_dim=88, num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 8, 8))  # fmt: skip
    return randomize(Kandinsky5Transformer3DModel(**{**small, **config}))


def kandinsky6(**config) -> Any:
    """Kandinsky6Transformer3DModel of a text block and two fused blocks: video 3 heads of 20, audio 2 of 12."""
    from diffusers import Kandinsky6Transformer3DModel

    small = dict(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=18, in_text_dim2=14, time_dim=16, model_dim=60, ff_dim=88,
        num_text_blocks=1, num_visual_blocks=2, axes_dims=(4, 8, 8), visual_cond=False, in_audio_dim=6, out_audio_dim=6,
        model_dim_a=24, time_dim_a=16, ff_dim_a=40, axes_dims_a=(4, 4, 4),
    )  # fmt: skip
    return randomize(Kandinsky6Transformer3DModel(**{**small, **config}))


def call5(model: Any, given: dict[str, Any]) -> Tensor:
    return model(**given, return_dict=False)


def call6(model: Any, given: dict[str, Any]) -> Tensor:
    return torch.cat([t.flatten() for t in model(**given, return_dict=False)])


def inputs() -> dict[str, Any]:
    frames, height, width = GRID
    return dict(
        hidden_states=randn(2, frames, 2 * height, 2 * width, 4),
        encoder_hidden_states=randn(2, 7, 18, seed=2),
        pooled_projections=randn(2, 14, seed=3),
        timestep=torch.tensor([3.0, 992.0]),  # bf16 holds them
    )


def inputs5() -> dict[str, Any]:
    return dict(
        **inputs(),
        visual_rope_pos=tuple(torch.arange(n) for n in GRID),
        text_rope_pos=torch.arange(7),
        scale_factor=(1.0, 2.0, 2.0),
    )


def inputs6(**more: Any) -> dict[str, Any]:
    return dict(**inputs(), audio_hidden_states=randn(2, 9, 6, seed=4), **more)


RELEASED = dict(ca_rope=True, cross_gates=True, fix_modulation=True)
SAME = dict(axes_dims_a=(4, 8, 8), model_dim_a=40)  # heads that the video's rotation fits too
MODELS = (
    Model("Kandinsky5Transformer3DModel", "kandinsky", kandinsky5, inputs5, K5, call5, keeps=()),
    Model("Kandinsky6Transformer3DModel", "kandinsky", kandinsky6, inputs6, K6, call6),
    Model("Kandinsky6Transformer3DModel as released, padded text", "kandinsky",
          lambda: kandinsky6(**RELEASED, **SAME),
          lambda: inputs6(encoder_attention_mask=text_mask(7, 3, total=7).bool().flip(1)), K6, call6),
    Model("Kandinsky6Transformer3DModel, no audio", "kandinsky", kandinsky6, inputs, K6, call6),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def kandinsky_row(grid: tuple[int, int, int] = (8, 16, 16), text: int = 256) -> Whole:
    """Kandinsky 5 Lite, 28 heads of 64, with one of its 32 visual blocks and none of its text blocks."""
    tokens, sizes = math.prod(grid), [torch.arange(n) for n in grid]

    def build() -> nn.Module:
        return kandinsky5(in_visual_dim=16, out_visual_dim=16, in_text_dim=3584, in_text_dim2=768, time_dim=512,
                          model_dim=1792, ff_dim=7168, num_text_blocks=0, num_visual_blocks=1,
                          axes_dims=(16, 24, 24))  # fmt: skip

    def run(dtype: torch.dtype, device: str) -> Run:
        x = randn(1, grid[0], 2 * grid[1], 2 * grid[2], 16).to(device, dtype)
        context, pooled = randn(1, text, 3584, seed=2).to(device, dtype), randn(1, 768, seed=3).to(device, dtype)
        given = dict(
            timestep=torch.tensor([500.0], device=device), text_rope_pos=torch.arange(text, device=device),
            visual_rope_pos=[size.to(device) for size in sizes],
        )  # fmt: skip

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return model(x, context, pooled_projections=pooled, **given, return_dict=False)

        return call

    return Whole(
        "Kandinsky 5 Lite block", f"1x{tokens}x1792, one block, {text} text tokens", build, run,
        compile=lambda model: model.visual_transformer_blocks[0].compile(dynamic=False),
    )  # fmt: skip


def kandinsky6_row(grid: tuple[int, int, int] = (4, 16, 16), text: int = 256) -> Whole:
    """Kandinsky 6, 32 heads of 128, with one of its 60 fused blocks, without audio and none of its text blocks."""
    frames, height, width = grid

    def given(dtype: torch.dtype) -> dict[str, Any]:
        return dict(
            hidden_states=randn(1, frames, 2 * height, 2 * width, 16).to(dtype),
            encoder_hidden_states=randn(1, text, 3584, seed=2).to(dtype),
            pooled_projections=randn(1, 768, seed=3).to(dtype),
            timestep=torch.tensor([500.0]),
        )

    return model_row(
        "Kandinsky 6 block", f"1x{math.prod(grid)}x4096, one block, {text} text tokens",
        lambda: kandinsky6(**RELEASED, in_visual_dim=16, out_visual_dim=16, in_text_dim=3584, in_text_dim2=768,
                           time_dim=1024, model_dim=4096, ff_dim=16384, num_text_blocks=0, num_visual_blocks=1,
                           axes_dims=(32, 48, 48)), "visual_transformer_blocks.0", given,
    )  # fmt: skip


ROWS = (kandinsky_row(), kandinsky6_row())
