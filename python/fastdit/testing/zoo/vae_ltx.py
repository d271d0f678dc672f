"""diffusers' AutoencoderKLLTXVideo and AutoencoderKLLTX2Video: encode, decode, in tiles, with a timestep and noise."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import decode_row
from fastdit.testing.zoo import Model, call_decode, call_encode, randn

LTX = dict(
    latent_channels=8, block_out_channels=(12, 16, 24, 24), decoder_block_out_channels=(12, 16, 24),
    layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1), patch_size=2,
    spatio_temporal_scaling=(True, True, False, False), decoder_spatio_temporal_scaling=(True, True, False),
    decoder_inject_noise=(False,) * 4, upsample_residual=(False,) * 3, upsample_factor=(1,) * 3,
)  # fmt: skip
LTX_095 = LTX | dict(
    block_out_channels=(12, 16, 32, 32), down_block_types=("LTXVideo095DownBlock3D",) * 3,
    layers_per_block=(1, 1, 1, 1), spatio_temporal_scaling=(True,) * 3,
    downsample_type=("spatial", "temporal", "spatiotemporal"), decoder_block_out_channels=(32, 64),
    decoder_layers_per_block=(1, 1, 1), decoder_spatio_temporal_scaling=(True, True),
    decoder_inject_noise=(False, True, True), upsample_residual=(True, True), upsample_factor=(2, 2),
    timestep_conditioning=True,
)  # fmt: skip
LTX2 = dict(
    latent_channels=8, block_out_channels=(16, 32, 32), down_block_types=("LTX2VideoDownBlock3D",) * 3,
    layers_per_block=(1, 1, 1, 1), spatio_temporal_scaling=(True,) * 3, patch_size=2,
    downsample_type=("spatial", "temporal", "spatiotemporal"), decoder_block_out_channels=(16, 32),
    decoder_layers_per_block=(1, 1, 1), decoder_spatio_temporal_scaling=(True, True),
    decoder_inject_noise=(False,) * 3, upsample_type=("spatiotemporal", "spatial"), upsample_residual=(True, False),
    upsample_factor=(2, 2),
)  # fmt: skip


def ltx_vae(**config: Any) -> Any:
    from diffusers import AutoencoderKLLTXVideo

    model = randomize(AutoencoderKLLTXVideo(**config))
    if config.get("timestep_conditioning"):
        model.decoder.timestep_scale_multiplier.data.fill_(1000.0)
    return model


def ltx2_vae(**config: Any) -> Any:
    from diffusers import AutoencoderKLLTX2Video

    return randomize(AutoencoderKLLTX2Video(**config))


def tiled(model: Any) -> Any:
    model.enable_tiling(32, 32, 8, 24, 24, 4)
    model.use_framewise_decoding = True  # which encode reads, too
    return model


def decode_with_noise(model: Any, inputs: dict[str, Any]) -> Tensor:
    """The same noise in every dtype: torch draws other numbers in fp64 than in fp32."""
    draw, generator = torch.randn, torch.Generator().manual_seed(7)

    def drawn(*size: Any, dtype: torch.dtype, device: Any, **_: Any) -> Tensor:
        return draw(*size, generator=generator).to(device, dtype)

    with mock.patch("torch.randn", drawn):
        return call_decode(model, inputs)


def latents(height: int = 3, width: int = 5) -> dict[str, Any]:
    return dict(z=randn(2, 8, 3, height, width))


def clip() -> dict[str, Any]:
    return dict(x=randn(2, 3, 9, 24, 40).clamp(-1, 1))


def layers(blocks: int, down: int = 0, strided: int = 0, up: int = 0) -> dict[str, int]:
    counts = {
        "LTX residual block (RMS norm, SiLU, conv, twice)": blocks,
        "LTX downsampling (conv, space to depth)": down,
        "LTX strided convolution": strided,
        "LTX upsampling (conv, depth to space)": up,
        "LTX encoder (first and last convolution, patches)": 1,
        "LTX decoder (first and last convolution, patches)": 1,
    }
    return {name: count for name, count in counts.items() if count}


OLD, NEW = layers(13, strided=2, up=2), layers(7, down=3, up=2)
TIMESTEP = dict(temb=torch.tensor([0.0625, 0.03125]))

MODELS = (
    Model("AutoencoderKLLTXVideo encode", "ltx_vae", lambda: ltx_vae(**LTX), clip, OLD, call_encode),
    Model("AutoencoderKLLTXVideo decode", "ltx_vae", lambda: ltx_vae(**LTX), latents, OLD, call_decode),
    Model("AutoencoderKLLTXVideo 0.9.5 encode", "ltx_vae", lambda: ltx_vae(**LTX_095), clip, NEW, call_encode),
    Model(
        "AutoencoderKLLTXVideo 0.9.5 decode, with a timestep and noise", "ltx_vae", lambda: ltx_vae(**LTX_095),
        lambda: latents() | TIMESTEP, NEW, decode_with_noise, fixed=("temb",),
    ),
    Model("AutoencoderKLLTXVideo decode, in tiles", "ltx_vae", lambda: tiled(ltx_vae(**LTX, decoder_causal=True)),
          lambda: latents(5, 3), OLD, call_decode),
    Model("AutoencoderKLLTX2Video encode", "ltx_vae", lambda: ltx2_vae(**LTX2), clip, NEW, call_encode),
    Model("AutoencoderKLLTX2Video decode", "ltx_vae", lambda: ltx2_vae(**LTX2), latents, NEW, call_decode),
    Model(
        "AutoencoderKLLTX2Video decode, not causal", "ltx_vae", lambda: ltx2_vae(**LTX2, decoder_causal=False),
        latents, NEW, call_decode,
    ),
)  # fmt: skip

# The decoders at their own widths, each with a small encoder
FULL_095 = LTX_095 | dict(
    latent_channels=128, patch_size=4, decoder_block_out_channels=(256, 512, 1024),
    decoder_layers_per_block=(5, 5, 5, 5), decoder_spatio_temporal_scaling=(True,) * 3,
    decoder_inject_noise=(False,) * 4, upsample_residual=(True,) * 3, upsample_factor=(2,) * 3,
)  # fmt: skip
FULL_2 = LTX2 | dict(
    latent_channels=128, patch_size=4, decoder_block_out_channels=(256, 512, 1024),
    decoder_layers_per_block=(5, 5, 5, 5), decoder_spatio_temporal_scaling=(True,) * 3,
    decoder_inject_noise=(False,) * 4, upsample_residual=(True,) * 3, upsample_factor=(2,) * 3,
    upsample_type=("spatiotemporal",) * 3,
)  # fmt: skip

ROWS = (
    decode_row(
        "AutoencoderKLLTXVideo 0.9.5", lambda: ltx_vae(**FULL_095), (128, 2, 3, 4), probe=(128, 2, 2, 2),
        temb=torch.tensor([0.0625]),
    ),
    decode_row("AutoencoderKLLTX2Video", lambda: ltx2_vae(**FULL_2), (128, 2, 3, 4), probe=(128, 2, 2, 2)),
)  # fmt: skip
