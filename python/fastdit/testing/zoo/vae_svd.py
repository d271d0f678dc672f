"""diffusers' AutoencoderKLTemporalDecoder: decode. Its encoder is that of images."""

from __future__ import annotations

from typing import Any

from fastdit.testing.models import randomize
from fastdit.testing.whole import decode_row
from fastdit.testing.zoo import Model, call_decode, randn

LAYERS = {"SVD decoder (2-D residual blocks, temporal layers, upsampling)": 1}


def svd_vae(**config: Any) -> Any:
    """AutoencoderKLTemporalDecoder of two levels; the released one has four: 128, 256, 512, 512."""
    from diffusers import AutoencoderKLTemporalDecoder

    small = dict(block_out_channels=(32, 64), layers_per_block=2, latent_channels=4,
                 down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"))  # fmt: skip
    return randomize(AutoencoderKLTemporalDecoder(**{**small, **config}))


def inputs(frames: int = 3) -> dict[str, Any]:
    return dict(z=randn(2 * frames, 4, 6, 5), num_frames=frames)


MODELS = (
    Model("AutoencoderKLTemporalDecoder decode", "svd_vae", svd_vae, inputs, LAYERS, call_decode),
    Model("AutoencoderKLTemporalDecoder decode, one frame", "svd_vae", svd_vae, lambda: inputs(1), LAYERS, call_decode),
)


def full_width() -> Any:
    return svd_vae(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4)


ROWS = (
    decode_row(
        "AutoencoderKLTemporalDecoder", full_width, (4, 8, 8), probe=(4, 4, 4), batch=2, num_frames=2,
    ),
)  # fmt: skip
