"""diffusers' AutoencoderKLCosmos: encode, decode, both ways of patching, attention outside of the middle."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import decode_row
from fastdit.testing.zoo import Model, call_decode, randn

SMALL = dict(
    encoder_block_out_channels=(8, 12, 16, 24), decode_block_out_channels=(12, 16, 24, 32), latent_channels=5,
    num_layers=1, patch_size=2, resolution=32, attention_resolutions=(8,), latents_mean=None, latents_std=None,
)  # fmt: skip
REARRANGED = SMALL | dict(patch_type="rearrange", temporal_compression_ratio=4, attention_resolutions=())


def layers(attentions: int, up: int = 2) -> dict[str, int]:
    return {
        "Cosmos residual block (GroupNorm of frames, SiLU, factorised conv, twice)": 13,
        "Cosmos downsampling (convolution + mean)": 2,
        "Cosmos upsampling (repeated + its convolution)": up,
        "Cosmos attention in each frame, then over frames": attentions,
        "Cosmos encoder (first and last convolution, patches)": 1,
        "Cosmos decoder (first and last convolution, patches)": 1,
        "Cosmos convolutions beside the latents": 1,
    }


def encode(model: Any, inputs: dict[str, Any]) -> Tensor:
    """On a CPU torch's avg_pool3d has no bf16; the original calls it."""
    pool = F.avg_pool3d

    def pooled(x: Tensor, *args: Any, **options: Any) -> Tensor:
        return pool(x.to(torch.promote_types(x.dtype, torch.float32)), *args, **options).to(x.dtype)

    with mock.patch("torch.nn.functional.avg_pool3d", pooled):
        return model.encode(**inputs).latent_dist.mode()


def cosmos_vae(**config: Any) -> Any:
    """AutoencoderKLCosmos; without config the full-size one."""
    from diffusers import AutoencoderKLCosmos

    return randomize(AutoencoderKLCosmos(**config))


MODELS = (
    Model(
        "AutoencoderKLCosmos encode", "cosmos_vae", lambda: cosmos_vae(**SMALL),
        lambda: dict(x=randn(2, 3, 17, 16, 32)), layers(4, up=1), encode,
    ),
    Model(
        "AutoencoderKLCosmos decode", "cosmos_vae", lambda: cosmos_vae(**SMALL),
        lambda: dict(z=randn(2, 5, 3, 2, 3)), layers(4, up=1), call_decode,
    ),
    Model(
        "AutoencoderKLCosmos encode, rearranged", "cosmos_vae", lambda: cosmos_vae(**REARRANGED),
        lambda: dict(x=randn(2, 3, 9, 16, 32)), layers(2), encode,
    ),
    Model(
        "AutoencoderKLCosmos decode, rearranged", "cosmos_vae", lambda: cosmos_vae(**REARRANGED),
        lambda: dict(z=randn(2, 5, 2, 2, 3)), layers(2), call_decode,
    ),
)  # fmt: skip

ROWS = (
    decode_row(
        "AutoencoderKLCosmos", lambda: cosmos_vae(encoder_block_out_channels=(8, 12, 16, 24)), (16, 2, 16, 16),
        probe=(16, 2, 4, 4),
    ),
)  # fmt: skip
