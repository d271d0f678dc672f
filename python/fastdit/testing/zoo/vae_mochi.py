"""diffusers' AutoencoderKLMochi: encode (attention over the frames of each pixel), decode, in tiles."""

from __future__ import annotations

from typing import Any

from fastdit.testing.models import randomize
from fastdit.testing.whole import decode_row
from fastdit.testing.zoo import Model, call_decode, call_encode, randn

SMALL = dict(
    encoder_block_out_channels=(64, 64, 96, 128), decoder_block_out_channels=(64, 96, 64, 96), latent_channels=5,
    layers_per_block=(1, 1, 2, 1, 1), latents_mean=(0.0,) * 5, latents_std=(1.0,) * 5,
)  # fmt: skip
LAYERS = {
    "Mochi residual block (GroupNorm of frames, SiLU, conv, twice)": 12,
    "Mochi strided convolution": 3,
    "Mochi attention over the frames of each pixel": 4,
    "Mochi encoder (first and last projection)": 1,
    "Mochi decoder (first convolution, channels to pixels)": 1,
}


def mochi_vae(**config: Any) -> Any:
    """AutoencoderKLMochi; without config the full-size one."""
    from diffusers import AutoencoderKLMochi

    return randomize(AutoencoderKLMochi(**config))


def tiled() -> Any:
    model = mochi_vae(**SMALL)
    model.enable_tiling(32, 32, 24, 24)
    return model


MODELS = (
    Model(
        "AutoencoderKLMochi encode", "mochi_vae", lambda: mochi_vae(**SMALL),
        lambda: dict(x=randn(2, 3, 13, 16, 24)), LAYERS, call_encode,
    ),
    Model(
        "AutoencoderKLMochi decode", "mochi_vae", lambda: mochi_vae(**SMALL),
        lambda: dict(z=randn(2, 5, 3, 2, 3)), LAYERS, call_decode,
    ),
    Model("AutoencoderKLMochi decode, in tiles", "mochi_vae", tiled, lambda: dict(z=randn(1, 5, 2, 5, 3)), LAYERS,
          call_decode),
)  # fmt: skip

ROWS = (
    decode_row(
        "AutoencoderKLMochi", lambda: mochi_vae(encoder_block_out_channels=(64, 64, 96, 128)), (12, 2, 4, 4),
        probe=(12, 2, 2, 2),
    ),
)  # fmt: skip
