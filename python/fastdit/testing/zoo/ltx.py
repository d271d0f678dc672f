"""diffusers' LTXVideoTransformer3DModel: text masks, a timestep per token, given coordinates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, randn, text_mask

LAYERS = {
    "LTX block": 2,
    "attention (LTXVideoAttnProcessor)": 4,
    "feed-forward activation": 2,
    "text padding (a 0/1 mask over the keys)": 1,
    "a timestep per token (LTX)": 1,
    "output norm (modulated by the model)": 1,
}


def ltx(**config) -> Any:
    """LTXVideoTransformer3DModel of two narrow layers: C = 2 x 22, which leaves two channels without an angle."""
    from diffusers import LTXVideoTransformer3DModel

    small = dict(in_channels=6, out_channels=6, num_attention_heads=2, attention_head_dim=22, cross_attention_dim=44,
                 num_layers=2, caption_channels=20)  # fmt: skip
    return randomize(LTXVideoTransformer3DModel(**{**small, **config}))


def inputs(*, mask: Tensor | None = None, per_token: bool = False, coordinates: bool = False) -> dict[str, Any]:
    grid = dict(num_frames=2, height=3, width=5)
    tokens = math.prod(grid.values())
    timestep = torch.tensor([3.0, 987.0])
    if per_token:
        timestep = timestep[:, None] * torch.arange(tokens).remainder(2)
    place = dict(video_coords=randn(2, 3, tokens).abs() * 20) if coordinates else grid
    return dict(
        hidden_states=randn(2, tokens, 6),
        encoder_hidden_states=randn(2, 7, 20, seed=2),
        timestep=timestep,
        encoder_attention_mask=text_mask(7, 3, total=7) if mask is None else mask,
        **place,
    )


NAME = "LTXVideoTransformer3DModel"
MODELS = (
    Model(NAME, "ltx", ltx, inputs, LAYERS),
    Model(f"{NAME}, a timestep per token", "ltx", ltx, lambda: inputs(per_token=True, coordinates=True), LAYERS,
          keeps=("timestep", "video_coords"), fixed=("timestep", "video_coords")),
    Model(f"{NAME}, a mask with holes", "ltx", ltx,
          lambda: inputs(mask=torch.tensor([[False, True, True, False, True, False, True], [False] * 7])), LAYERS),
    Model(f"{NAME}, a mask of weights", "ltx", ltx,
          lambda: inputs(mask=text_mask(7, 3, total=7) - 1e-4 * randn(2, 7).abs()), LAYERS,
          keeps=("timestep", "encoder_attention_mask"), fixed=("timestep", "encoder_attention_mask")),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def ltx_row(grid: tuple[int, int, int] = (8, 16, 16), text: int = 128, valid: int = 40) -> Whole:
    """LTX-Video 2B, 32 heads of 64, with one of its 28 blocks."""
    tokens, sizes = math.prod(grid), dict(zip(("num_frames", "height", "width"), grid, strict=True))

    def build() -> nn.Module:
        return ltx(in_channels=128, out_channels=128, num_attention_heads=32, attention_head_dim=64,
                   cross_attention_dim=2048, caption_channels=4096, num_layers=1)  # fmt: skip

    def run(dtype: torch.dtype, device: str) -> Run:
        x, context = randn(1, tokens, 128).to(device, dtype), randn(1, text, 4096, seed=2).to(device, dtype)
        timestep, mask = torch.tensor([500.0], device=device), text_mask(valid, total=text).to(device)

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return model(x, context, timestep, encoder_attention_mask=mask, **sizes, return_dict=False)[0]

        return call

    return Whole(
        "LTX-Video block", f"1x{tokens}x2048, one block, {valid} of {text} text tokens", build, run,
        compile=lambda model: model.transformer_blocks[0].compile(dynamic=False),
    )  # fmt: skip


ROWS = (ltx_row(),)
