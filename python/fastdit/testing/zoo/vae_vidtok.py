"""diffusers' AutoencoderVidTok: causal and not, whole and in tiles, whose decoder goes on over the kept frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, call_encode, randn

SMALL = dict(ch=8, ch_mult=[1, 2, 2], z_channels=3, num_res_blocks=1)
LAYERS = {
    f"VidTok {side} (residual blocks of images and of lines, attention, resampling)": 1
    for side in ("encoder", "decoder")
}


def vidtok(**config: Any) -> Any:
    """AutoencoderVidTok; without config the full-size one."""
    from diffusers import AutoencoderVidTok

    return randomize(AutoencoderVidTok(**config))


def tiled(model: Any) -> Any:
    """Tiles of 2 x 2 latents; the first frame, then chunks of four and one that comes again."""
    model.enable_tiling(8, 8)
    # The frames kept lie in the modules: what checkpointing computes again meets later ones, in the original too.
    model._supports_gradient_checkpointing = False
    return model


def emptied(call: Callable[[Any, dict[str, Any]], Tensor]) -> Callable[[Any, dict[str, Any]], Tensor]:
    """The original leaves the frames that it keeps to the next call, which drops them."""

    def run(model: Any, inputs: dict[str, Any]) -> Tensor:
        result = call(model, inputs)
        model._empty_causal_cached(model)
        return result

    return run


encode = emptied(call_encode)
decode = emptied(lambda model, inputs: model.decode(**inputs))
MODELS = (
    Model("AutoencoderVidTok encode", "vidtok", lambda: vidtok(**SMALL), lambda: dict(x=randn(2, 3, 8, 8, 12)),
          LAYERS, encode),
    Model("AutoencoderVidTok decode", "vidtok", lambda: vidtok(**SMALL), lambda: dict(z=randn(2, 3, 3, 2, 3)),
          LAYERS, decode),
    Model("AutoencoderVidTok decode, in tiles", "vidtok", lambda: tiled(vidtok(**SMALL)),
          lambda: dict(z=randn(1, 3, 6, 4, 3)), LAYERS, decode),
    Model("AutoencoderVidTok encode, not causal", "vidtok", lambda: vidtok(**SMALL, is_causal=False),
          lambda: dict(x=randn(1, 3, 8, 8, 12)), LAYERS, encode),
    Model("AutoencoderVidTok decode, not causal", "vidtok", lambda: vidtok(**SMALL, is_causal=False),
          lambda: dict(z=randn(1, 3, 4, 2, 3)), LAYERS, decode),
)  # fmt: skip


def decoding(*size: int) -> Callable[[torch.dtype, str], Run]:
    def run(dtype: torch.dtype, device: str) -> Run:
        z = randn(1, *size, seed=3).to(device, dtype)

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return decode(model, dict(z=z))

        return call

    return run


ROWS = (
    Whole("AutoencoderVidTok decode", "1x4x2x8x8", vidtok, decoding(4, 2, 8, 8), (torch.float32, torch.bfloat16),
          probe=decoding(4, 2, 3, 3), rounds=5),
)  # fmt: skip
