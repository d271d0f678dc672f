"""diffusers' SanaVideoTransformer3DModel and SanaTransformer2DModel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, randn, text_mask

SMALL = dict(
    num_attention_heads=3, attention_head_dim=20, num_cross_attention_heads=2, cross_attention_head_dim=30,
    cross_attention_dim=60, num_layers=2, caption_channels=18,
)  # fmt: skip
LAYERS = {
    "Sana block": 2,
    "cross-attention (SanaAttnProcessor2_0)": 2,
    "output norm (SanaModulatedNorm)": 1,
    "text padding (a 0/1 mask over the keys)": 1,
}
VIDEO = {**LAYERS, "patch embedding (Conv3d, kernel = stride)": 1}
IMAGE = {**LAYERS, "patch embedding (Conv2d, kernel = stride)": 1}


def sana_video(**config) -> Any:
    """SanaVideoTransformer3DModel of two narrow layers, with queries and keys normalised over all heads."""
    from diffusers import SanaVideoTransformer3DModel

    small = dict(**SMALL, in_channels=4, out_channels=4, rope_max_seq_len=32)
    return randomize(SanaVideoTransformer3DModel(**{**small, **config}))


def sana() -> Any:
    """SanaTransformer2DModel of two narrow layers, as released without norm of queries and keys."""
    from diffusers import SanaTransformer2DModel

    return randomize(SanaTransformer2DModel(**SMALL, in_channels=4, out_channels=4, sample_size=6))


def text(mask: Tensor | None = None) -> dict[str, Any]:
    mask = text_mask(7, 3, total=7) if mask is None else mask
    return dict(encoder_hidden_states=randn(2, 7, 18, seed=2), encoder_attention_mask=mask)


def video_inputs(per_token: bool = False) -> dict[str, Any]:
    timestep = torch.tensor([3.0, 987.0])
    if per_token:  # a timestep per token: the only rows beside one per sample that broadcast in the original
        timestep = timestep[:, None] * torch.arange(30).remainder(2)
    return dict(hidden_states=randn(2, 4, 2, 6, 10), timestep=timestep, **text())


def image_inputs() -> dict[str, Any]:
    return dict(hidden_states=randn(2, 4, 6, 5), timestep=torch.tensor([3, 987]), **text(text_mask(0, 4, total=7)))


NAME = "SanaVideoTransformer3DModel"
MODELS = (
    Model(NAME, "sana", sana_video, video_inputs, VIDEO),
    Model(f"{NAME}, a timestep per token", "sana", sana_video, lambda: video_inputs(per_token=True), VIDEO),
    Model("SanaTransformer2DModel", "sana", sana, image_inputs, IMAGE),
)


# ---- at full width ------------------------------------------------------------------------------------------


def sana_video_row(grid: tuple[int, int, int] = (6, 16, 20), text_tokens: int = 300, valid: int = 60) -> Whole:
    """SANA-Video 2B, 20 heads of 112, with one of its 20 blocks."""
    tokens = math.prod(grid)

    def build() -> nn.Module:
        return sana_video(
            in_channels=16, out_channels=16, num_attention_heads=20, attention_head_dim=112, mlp_ratio=3.0,
            num_cross_attention_heads=20, cross_attention_head_dim=112, cross_attention_dim=2240, num_layers=1,
            caption_channels=2304, rope_max_seq_len=1024,
        )  # fmt: skip

    def run(dtype: torch.dtype, device: str) -> Run:
        x = randn(1, 16, grid[0], 2 * grid[1], 2 * grid[2]).to(device, dtype)
        context = randn(1, text_tokens, 2304, seed=2).to(device, dtype)
        timestep, mask = torch.tensor([500], device=device), text_mask(valid, total=text_tokens).to(device)

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return model(x, encoder_hidden_states=context, timestep=timestep, encoder_attention_mask=mask,
                             return_dict=False)[0]  # fmt: skip

        return call

    return Whole(
        "SANA-Video block", f"1x{tokens}x2240, one block, {valid} of {text_tokens} text tokens", build, run,
        compile=lambda model: model.transformer_blocks[0].compile(dynamic=False),
    )  # fmt: skip


ROWS = (sana_video_row(),)
