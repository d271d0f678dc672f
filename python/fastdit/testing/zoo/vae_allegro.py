"""diffusers' AutoencoderKLAllegro: encode and decode, which are always in tiles."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import decode_row
from fastdit.testing.zoo import Model, call_decode, call_encode, randn

SMALL = dict(block_out_channels=(8, 16, 16, 24), latent_channels=3, layers_per_block=1, norm_num_groups=4)
LAYERS = {
    "Allegro block (2-D residual blocks, temporal layers, resampling)": 10,
    "Allegro encoder (first and last convolutions)": 1,
    "Allegro decoder (first and last convolutions)": 1,
}


def allegro_vae(tile: tuple[int, int, int], stride: tuple[int, int, int], dropout: float = 0.1, **config: Any) -> Any:
    """AutoencoderKLAllegro; without config the full-size one. Its temporal layers have a dropout of 0.1."""
    from diffusers import AutoencoderKLAllegro

    model = randomize(AutoencoderKLAllegro(**config))
    model.use_tiling = model.use_slicing = True
    model.kernel, model.stride = tile, stride
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = dropout if module.p else 0.0
    return model


def small() -> Any:
    return allegro_vae((8, 16, 24), (4, 8, 24), dropout=0.0, **SMALL)


MODELS = (
    Model("AutoencoderKLAllegro encode", "allegro_vae", small, lambda: dict(x=randn(2, 3, 12, 24, 24)), LAYERS,
          call_encode),
    Model("AutoencoderKLAllegro decode", "allegro_vae", small, lambda: dict(z=randn(2, 3, 3, 3, 3)), LAYERS,
          call_decode),
)  # fmt: skip

ROWS = (
    decode_row(
        "AutoencoderKLAllegro", lambda: allegro_vae((8, 32, 48), (8, 32, 48)), (4, 2, 4, 6),
    ),
)  # fmt: skip
