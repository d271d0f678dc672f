"""diffusers' AutoencoderKLQwenImage and AutoencoderKLQwenImage21: Wan's VAE, and its specialisation to images."""

from __future__ import annotations

from typing import Any

from fastdit.testing import models, whole
from fastdit.testing.zoo import Model, call_decode, call_encode, randn

SMALL = dict(
    base_dim=8, z_dim=4, dim_mult=[1, 2, 2, 3], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
)
SMALL21 = dict(base_dim=8, decoder_base_dim=12, z_dim=4, dim_mult=[1, 2, 4, 4], num_res_blocks=1,
               temperal_downsample=[False, True, True], scale_factor_spatial=8, scale_factor_temporal=4,
               latents_mean=[0.0] * 4, latents_std=[1.0] * 4)  # fmt: skip
LAYERS = {
    "causal residual block (norm, SiLU, conv, twice)": 16,
    "causal resampling (2x in space, 2x in time)": 6,
    "frame attention of a VAE": 2,
    "causal encoder (first and last convolution)": 1,
    "causal decoder (first and last convolution)": 1,
    "loop over time (encode, decode)": 1,
}


def qwen_image(**config) -> Any:
    """AutoencoderKLQwenImage; without config the full-size one."""
    from diffusers import AutoencoderKLQwenImage

    return models.randomize(AutoencoderKLQwenImage(**config))


def qwen_image21(**config) -> Any:
    from diffusers import AutoencoderKLQwenImage21

    return models.randomize(AutoencoderKLQwenImage21(**config))


MODELS = (
    Model(
        "AutoencoderKLQwenImage decode", "qwen_vae", lambda: qwen_image(**SMALL),
        lambda: dict(z=randn(2, 4, 3, 3, 5)), LAYERS, call_decode,
    ),
    Model(
        "AutoencoderKLQwenImage encode", "qwen_vae", lambda: qwen_image(**SMALL),
        lambda: dict(x=randn(2, 3, 9, 40, 56)), LAYERS, call_encode,
    ),
    Model(
        "AutoencoderKLQwenImage21 decode", "qwen_vae", lambda: qwen_image21(**SMALL21),
        lambda: dict(z=randn(2, 4, 1, 3, 5)), LAYERS, call_decode,
    ),
    Model(
        "AutoencoderKLQwenImage21 encode", "qwen_vae", lambda: qwen_image21(**SMALL21),
        lambda: dict(x=randn(2, 4, 1, 24, 40)), LAYERS, call_encode,
    ),
)  # fmt: skip
ROWS = (whole.decode_row("AutoencoderKLQwenImage", qwen_image, (16, 1, 16, 16), probe=(16, 1, 4, 4)),)
