"""diffusers' AutoencoderKLHunyuanVideo: decode and encode, whole and in tiles."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastdit.testing import whole
from fastdit.testing.models import randomize
from fastdit.testing.zoo import Model, call_decode, call_encode, randn

SMALL = dict(latent_channels=4, block_out_channels=(8, 16, 24, 24), layers_per_block=1, norm_num_groups=4)
LAYERS = {
    "residual block with repeated borders (GroupNorm, SiLU, conv, twice)": 4 + 2 + 8 + 2,
    "mid block with frame-causal attention": 2,
    "nearest upsampling with repeated borders (first frame apart)": 3,
    "convolution with repeated borders": 3,
    "encoder with repeated borders (first and last convolution)": 1,
    "decoder with repeated borders (first and last convolution)": 1,
}


def around_one(model: Any) -> Any:
    """The model; the weights of its GroupNorms around one, so that every branch matters."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.GroupNorm):
                module.weight.add_(1)
    return model


def hunyuan_video(**config) -> Any:
    """AutoencoderKLHunyuanVideo; without config the full-size one."""
    from diffusers import AutoencoderKLHunyuanVideo

    return around_one(randomize(AutoencoderKLHunyuanVideo(**config)))


def tiled(model: Any) -> Any:
    """Tiles of 4 x 4 latents and 2 + 1 latent frames."""
    model.enable_tiling(32, 32, 8, 24, 24, 4)
    return model


MODELS = (
    Model(
        "AutoencoderKLHunyuanVideo decode", "hunyuan_video_vae", lambda: hunyuan_video(**SMALL),
        lambda: dict(z=randn(2, 4, 3, 3, 5)), LAYERS, call_decode,
    ),
    Model(
        "AutoencoderKLHunyuanVideo encode", "hunyuan_video_vae", lambda: hunyuan_video(**SMALL),
        lambda: dict(x=randn(2, 3, 5, 24, 40)), LAYERS, call_encode,
    ),
    Model(
        "AutoencoderKLHunyuanVideo decode, in tiles", "hunyuan_video_vae", lambda: tiled(hunyuan_video(**SMALL)),
        lambda: dict(z=randn(1, 4, 4, 5, 5)), LAYERS, call_decode,
    ),
)  # fmt: skip
ROWS = (whole.decode_row("AutoencoderKLHunyuanVideo", hunyuan_video, (16, 2, 4, 4), probe=(16, 2, 2, 2)),)
