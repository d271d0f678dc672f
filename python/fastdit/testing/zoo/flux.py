"""diffusers' FluxTransformer2DModel and the models that share its blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn

KEEPS = ("timestep", "guidance", "img_ids", "txt_ids")
GRID = (3, 5)
TEXT = 7


def flux(**config) -> Any:
    from diffusers import FluxTransformer2DModel

    small = dict(in_channels=12, num_layers=2, num_single_layers=2, attention_head_dim=24, num_attention_heads=3,
                 joint_attention_dim=32, pooled_projection_dim=20, axes_dims_rope=(4, 8, 12))  # fmt: skip
    return randomize(FluxTransformer2DModel(**{**small, **config}))


def positions(grid: tuple[int, int], text: int, axes: int = 3) -> tuple[Tensor, Tensor]:
    """img_ids (H * W, axes) and txt_ids (text, axes)."""
    image = torch.zeros(*grid, axes)
    image[..., 1] += torch.arange(grid[0])[:, None]
    image[..., 2] += torch.arange(grid[1])
    return image.flatten(0, 1), torch.zeros(text, axes)


def inputs(*, guidance: bool = False) -> dict[str, Any]:
    img_ids, txt_ids = positions(GRID, TEXT)
    given = dict(
        hidden_states=randn(2, len(img_ids), 12),
        encoder_hidden_states=randn(2, TEXT, 32, seed=2),
        pooled_projections=randn(2, 20, seed=3),
        timestep=torch.tensor([0.03, 0.987]),
        img_ids=img_ids,
        txt_ids=txt_ids,
    )
    return {**given, "guidance": torch.tensor([3.5, 1.0])} if guidance else given


LAYERS = {
    "Flux double block": 2,
    "Flux single block": 2,
    "attention (FluxAttnProcessor)": 4,
    "feed-forward activation": 4,
    "output norm (AdaLayerNormContinuous)": 1,
}

MODELS = (
    Model("FluxTransformer2DModel", "flux", flux, inputs, LAYERS, keeps=KEEPS, fixed=KEEPS),
    Model(
        "FluxTransformer2DModel, guidance",
        "flux",
        lambda: flux(guidance_embeds=True),
        lambda: inputs(guidance=True),
        LAYERS,
        keeps=KEEPS,
        fixed=KEEPS,
    ),
)


# ---- at full width ------------------------------------------------------------------------------------------


def row(kind: str, double: int, single: int, block: str, grid: tuple[int, int] = (32, 32), text: int = 512) -> Whole:
    """FLUX.1: 24 heads of 128, 512 text tokens."""

    def inputs(dtype: torch.dtype) -> tuple:
        from diffusers.models.transformers.transformer_flux import FluxPosEmbed

        streams = (randn(1, n, 3072, seed=n).to(dtype) for n in (grid[0] * grid[1], text))
        ids = torch.cat(positions(grid, text)[::-1])
        return *streams, randn(1, 3072).to(dtype), FluxPosEmbed(10000, [16, 56, 56])(ids)

    return block_row(
        f"FLUX.1 {kind} block", f"1x{grid[0] * grid[1]}x3072, {text} text tokens",
        lambda: flux(num_layers=double, num_single_layers=single, attention_head_dim=128, num_attention_heads=24,
                     axes_dims_rope=(16, 56, 56)), block, inputs,
    )  # fmt: skip


ROWS = (
    row("double", 1, 0, "transformer_blocks.0"),
    row("single", 0, 1, "single_transformer_blocks.0"),
)
