"""diffusers' Flux2Transformer2DModel."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn
from fastdit.testing.zoo.flux import GRID, KEEPS, TEXT, positions


def flux2(**config) -> Any:
    from diffusers import Flux2Transformer2DModel

    small = dict(in_channels=12, num_layers=2, num_single_layers=2, attention_head_dim=24, num_attention_heads=3,
                 joint_attention_dim=32, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 8, 8))  # fmt: skip
    return randomize(Flux2Transformer2DModel(**{**small, **config}))


def inputs(**more: Any) -> dict[str, Any]:
    img_ids, txt_ids = positions(GRID, TEXT, axes=4)
    txt_ids[:, 3] = torch.arange(TEXT)
    return dict(
        hidden_states=randn(2, len(img_ids), 12),
        encoder_hidden_states=randn(2, TEXT, 32, seed=2),
        timestep=torch.tensor([0.03, 0.987]),
        img_ids=img_ids,
        txt_ids=txt_ids,
        **more,
    )


LAYERS = {
    "Flux.2 double block": 2,
    "Flux.2 single block": 2,
    "attention (Flux2AttnProcessor)": 2,
    "attention and MLP (Flux2ParallelSelfAttnProcessor)": 2,
    "feed-forward activation (SwiGLU)": 4,
    "output norm (AdaLayerNormContinuous)": 1,
}
NAME = "Flux2Transformer2DModel"
MODELS = (
    Model(NAME, "flux2", flux2, lambda: inputs(guidance=torch.tensor([4.0, 1.0])), LAYERS, keeps=KEEPS, fixed=KEEPS),
    Model(f"{NAME}, no guidance", "flux2", lambda: flux2(guidance_embeds=False), inputs, LAYERS, keeps=KEEPS,
          fixed=KEEPS),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(kind: str, double: int, single: int, block: str, grid: tuple[int, int] = (32, 32), text: int = 512) -> Whole:
    """FLUX.2 klein 4B: 24 heads of 128."""
    tokens, width = grid[0] * grid[1], 24 * 128

    def given(dtype: torch.dtype) -> tuple:
        from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed

        tables = Flux2PosEmbed(2000, [32, 32, 32, 32])(torch.cat(positions(grid, text, axes=4)[::-1]))
        if single:
            return randn(1, tokens + text, width).to(dtype), None, randn(1, 3 * width).to(dtype), tables
        streams = (randn(1, n, width, seed=n).to(dtype) for n in (tokens, text))
        return *streams, *(randn(1, 6 * width, seed=s).to(dtype) for s in (3, 4)), tables

    return block_row(
        f"FLUX.2 klein {kind} block", f"1x{tokens}x{width}, {text} text tokens",
        lambda: flux2(num_layers=double, num_single_layers=single, attention_head_dim=128, num_attention_heads=24,
                      axes_dims_rope=(32, 32, 32, 32)), block, given,
    )  # fmt: skip


ROWS = (
    row("double", 1, 0, "transformer_blocks.0"),
    row("single", 0, 1, "single_transformer_blocks.0"),
)
