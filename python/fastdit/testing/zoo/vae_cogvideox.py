"""diffusers' AutoencoderKLCogVideoX: decode and encode, chunks of an even and of an odd number of frames, in tiles."""

from __future__ import annotations

from typing import Any

from fastdit.testing import whole
from fastdit.testing.models import randomize
from fastdit.testing.zoo import Model, call_decode, call_encode, randn
from fastdit.testing.zoo.vae_hunyuan import around_one

SMALL = dict(block_out_channels=(8, 12, 12, 16), layers_per_block=1, latent_channels=4, norm_num_groups=4,
             sample_height=64, sample_width=64)  # fmt: skip
LAYERS = {
    "cached residual block (GroupNorm or spatial norm, SiLU, conv, twice)": 4 + 2 + 8 + 2,
    "nearest upsampling (2x in space, frames repeated)": 3,
    "downsampling (mean of two frames, 2x in space)": 3,
    "cached encoder (first and last convolution)": 1,
    "cached decoder (first and last convolution)": 1,
}


def cogvideox(**config) -> Any:
    """AutoencoderKLCogVideoX; without config the full-size one."""
    from diffusers import AutoencoderKLCogVideoX

    return around_one(randomize(AutoencoderKLCogVideoX(**config)))


def full_size() -> Any:
    return cogvideox(
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(128, 256, 256, 512), layers_per_block=3,
    )  # fmt: skip


def tiled(model: Any) -> Any:
    model.enable_tiling(32, 32)
    return model


MODELS = (
    Model(
        "AutoencoderKLCogVideoX decode", "cogvideox_vae", lambda: cogvideox(**SMALL),
        lambda: dict(z=randn(2, 4, 5, 3, 5)), LAYERS, call_decode,
    ),
    Model(
        "AutoencoderKLCogVideoX decode, even chunks", "cogvideox_vae", lambda: cogvideox(**SMALL),
        lambda: dict(z=randn(2, 4, 4, 3, 5)), LAYERS, call_decode,
    ),
    Model(
        "AutoencoderKLCogVideoX encode", "cogvideox_vae", lambda: cogvideox(**SMALL),
        lambda: dict(x=randn(2, 3, 17, 24, 40)), LAYERS, call_encode,
    ),
    Model(
        "AutoencoderKLCogVideoX decode, in tiles", "cogvideox_vae", lambda: tiled(cogvideox(**SMALL)),
        lambda: dict(z=randn(1, 4, 2, 5, 6)), LAYERS, call_decode,
    ),
)  # fmt: skip
ROWS = (whole.decode_row("AutoencoderKLCogVideoX", full_size, (16, 2, 4, 4), probe=(16, 2, 2, 2)),)
