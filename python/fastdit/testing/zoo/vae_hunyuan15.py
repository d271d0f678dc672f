"""diffusers' AutoencoderKLHunyuanVideo15 and AutoencoderKLHunyuanImageRefiner: decode and encode, also in tiles."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdit.testing import whole
from fastdit.testing.models import randomize
from fastdit.testing.zoo import Model, call_decode, call_encode, randn

SMALL = dict(latent_channels=4, block_out_channels=(8, 16, 32, 64), layers_per_block=1, spatial_compression_ratio=8)
LAYERS = {
    "residual block with repeated borders (channel norm, SiLU, conv, twice)": 4 + 2 + 8 + 2,
    "video attention of a VAE (frame-causal where the original is)": 2,
    "upsampling by pixel shuffle": 3,
    "downsampling by pixel shuffle": 3,
    "encoder with repeated borders and shortcuts (first and last convolution)": 1,
    "decoder with repeated borders and shortcuts (first and last convolution)": 1,
}


def hunyuan_video15(**config) -> Any:
    """AutoencoderKLHunyuanVideo15; without config the full-size one."""
    from diffusers import AutoencoderKLHunyuanVideo15

    return randomize(AutoencoderKLHunyuanVideo15(**config))


def full_width_decoder() -> Any:
    """The decoder's own widths with one residual block per level, 608 M parameters; no encoder."""
    model = hunyuan_video15(layers_per_block=0)
    model.encoder = nn.Identity()
    return model


def image_refiner(**config) -> Any:
    from diffusers import AutoencoderKLHunyuanImageRefiner

    return randomize(AutoencoderKLHunyuanImageRefiner(**config))


def sliced(model: Any) -> Any:
    """One sample at a time: the original's mask does not fit a larger batch."""
    model.enable_slicing()
    return model


def tiled(model: Any) -> Any:
    """Tiles of 4 x 4 latents."""
    model.enable_tiling(32, 32, 4, 4)
    return model


MODELS = (
    Model(
        "AutoencoderKLHunyuanVideo15 decode", "hunyuan_video_vae", lambda: sliced(hunyuan_video15(**SMALL)),
        lambda: dict(z=randn(2, 4, 3, 3, 5)), LAYERS, call_decode,
    ),
    Model(
        "AutoencoderKLHunyuanVideo15 encode", "hunyuan_video_vae", lambda: sliced(hunyuan_video15(**SMALL)),
        lambda: dict(x=randn(2, 3, 9, 24, 40)), LAYERS, call_encode,
    ),
    Model(
        "AutoencoderKLHunyuanVideo15 decode, in tiles", "hunyuan_video_vae", lambda: tiled(hunyuan_video15(**SMALL)),
        lambda: dict(z=randn(1, 4, 2, 5, 5)), LAYERS, call_decode,
    ),
    Model(
        "AutoencoderKLHunyuanImageRefiner decode", "hunyuan_video_vae", lambda: image_refiner(**SMALL),
        lambda: dict(z=randn(2, 4, 2, 3, 5)), LAYERS, call_decode,
    ),
    Model(
        "AutoencoderKLHunyuanImageRefiner encode", "hunyuan_video_vae", lambda: image_refiner(**SMALL),
        lambda: dict(x=randn(2, 3, 2, 24, 40)), LAYERS, call_encode,
    ),
)  # fmt: skip
ROWS = (whole.decode_row("AutoencoderKLHunyuanVideo15", full_width_decoder, (32, 2, 3, 3), probe=(32, 2, 2, 2)),)
