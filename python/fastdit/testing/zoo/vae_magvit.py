"""diffusers' AutoencoderKLMagvit (EasyAnimate): the first frame, then chunks over the convolutions' own caches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole, decode_row
from fastdit.testing.zoo import Model, call_decode, call_encode, randn

SMALL = dict(latent_channels=3, block_out_channels=(8, 12, 16), layers_per_block=1, norm_num_groups=4,
             down_block_types=("SpatialDownBlock3D",) + ("SpatialTemporalDownBlock3D",) * 2,
             up_block_types=("SpatialUpBlock3D",) + ("SpatialTemporalUpBlock3D",) * 2)  # fmt: skip
LAYERS = {
    "EasyAnimate residual block (GroupNorm, SiLU, conv, twice)": 11,
    "EasyAnimate downsampling": 2,
    "EasyAnimate upsampling": 2,
    "EasyAnimate encoder (first and last convolution)": 1,
    "EasyAnimate decoder (first and last convolution)": 1,
}


def magvit_vae(**config: Any) -> Any:
    """AutoencoderKLMagvit; without config the full-size one."""
    from diffusers import AutoencoderKLMagvit

    model = randomize(AutoencoderKLMagvit(**config))
    # Its caches lie in its modules: what checkpointing computes again meets other frames, in the original too.
    model._supports_gradient_checkpointing = False
    return model


def decode(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The original leaves the caches of one decode to the next."""
    result = call_decode(model, inputs)
    model._clear_conv_cache()
    return result


MODELS = (
    Model("AutoencoderKLMagvit encode", "magvit_vae", lambda: magvit_vae(**SMALL),
          lambda: dict(x=randn(2, 3, 8, 16, 24)), LAYERS, call_encode),
    Model("AutoencoderKLMagvit decode", "magvit_vae", lambda: magvit_vae(**SMALL),
          lambda: dict(z=randn(2, 3, 3, 2, 3)), LAYERS, decode),
    Model("AutoencoderKLMagvit decode, GroupNorm over time", "magvit_vae",
          lambda: magvit_vae(**SMALL, spatial_group_norm=False), lambda: dict(z=randn(2, 3, 3, 2, 3)), LAYERS, decode),
)  # fmt: skip


def clearing(row: Whole) -> Whole:
    def run(dtype: torch.dtype, device: str) -> Run:
        call = row.run(dtype, device)

        def cleared(model: Any) -> Tensor:
            model._clear_conv_cache()
            return call(model)

        return cleared

    return replace(row, run=run)


ROWS = (clearing(decode_row("AutoencoderKLMagvit", magvit_vae, (16, 2, 4, 4))),)
