"""diffusers' VAEs of KVAE. Video: 17 frames, then chunks of up to 16 over the caches of one call. Images."""

from __future__ import annotations

from typing import Any

from fastdit.testing import whole
from fastdit.testing.models import randomize
from fastdit.testing.zoo import Model, call_decode, call_encode, randn
from fastdit.testing.zoo.vae_hunyuan import around_one

SMALL = dict(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4)
LAYERS = {
    "KVAE residual block (GroupNorm or spatial norm, SiLU, conv, twice)": 5 + 8,
    "KVAE downsampling (convolution + mean)": 2,
    "KVAE upsampling (repeated + its convolution)": 2,
    "KVAE encoder (first and last convolution)": 1,
    "KVAE decoder (first and last convolution)": 1,
}
IMAGE_SMALL = dict(channels=32, ch_mult=(1, 1, 2), num_enc_blocks=1, num_dec_blocks=1, z_channels=4)
IMAGE_LAYERS = {
    "KVAE image block (GroupNorm or spatial norm, SiLU, conv, twice)": 5 + 8,
    "KVAE image downsampling (convolution + mean)": 2,
    "KVAE image upsampling (repeated + its convolution)": 2,
    "KVAE image encoder (first and last convolution)": 1,
    "KVAE image decoder (first and last convolution)": 1,
}


def kvae(**config: Any) -> Any:
    """AutoencoderKLKVAEVideo; without config the full-size one."""
    from diffusers import AutoencoderKLKVAEVideo

    model = around_one(randomize(AutoencoderKLKVAEVideo(**config)))
    # The caches of a call outlive its blocks: what checkpointing computes again meets other frames, originally too.
    model._supports_gradient_checkpointing = False
    return model


def kvae_image(**config: Any) -> Any:
    """AutoencoderKLKVAE; without config the full-size one."""
    from diffusers import AutoencoderKLKVAE

    return around_one(randomize(AutoencoderKLKVAE(**config)))


def tiled(model: Any) -> Any:
    """Tiles of 3 x 3 latents, if the model's images are of 12 x 12 pixels."""
    model.enable_tiling()
    return model


MODELS = (
    Model("AutoencoderKLKVAEVideo encode", "kvae", lambda: kvae(**SMALL), lambda: dict(x=randn(1, 3, 21, 8, 12)),
          LAYERS, call_encode),
    Model("AutoencoderKLKVAEVideo decode", "kvae", lambda: kvae(**SMALL), lambda: dict(z=randn(2, 4, 7, 2, 3)),
          LAYERS, call_decode),
    Model("AutoencoderKLKVAEVideo decode, one frame, half the frames", "kvae",
          lambda: kvae(**SMALL, temporal_compress_times=2), lambda: dict(z=randn(2, 4, 1, 2, 3)), LAYERS, call_decode),
    Model("AutoencoderKLKVAE encode", "kvae", lambda: kvae_image(**IMAGE_SMALL), lambda: dict(x=randn(2, 3, 12, 20)),
          IMAGE_LAYERS, call_encode),
    Model("AutoencoderKLKVAE decode", "kvae", lambda: kvae_image(**IMAGE_SMALL), lambda: dict(z=randn(2, 4, 3, 5)),
          IMAGE_LAYERS, call_decode),
    Model("AutoencoderKLKVAE decode, in tiles", "kvae", lambda: tiled(kvae_image(**IMAGE_SMALL, sample_size=12)),
          lambda: dict(z=randn(1, 4, 3, 4)), IMAGE_LAYERS, call_decode),
)  # fmt: skip
ROWS = (
    whole.decode_row("AutoencoderKLKVAEVideo", kvae, (16, 2, 4, 4), probe=(16, 2, 2, 2), rounds=3),
    whole.decode_row("AutoencoderKLKVAE", kvae_image, (16, 16, 16), probe=(16, 4, 4), rounds=3),
)
