"""diffusers' AllegroTransformer3DModel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, randn, text_mask

LAYERS = {
    "Allegro block": 2,
    "attention (AllegroAttnProcessor2_0)": 4,
    "feed-forward activation": 2,
    "patch embedding (Conv2d, kernel = stride)": 1,
    "text padding (a 0/1 mask over the keys)": 1,
    "output norm (modulated by the model)": 1,
}


def allegro(**config) -> Any:
    """AllegroTransformer3DModel of two narrow layers."""
    from diffusers import AllegroTransformer3DModel

    small = dict(
        num_attention_heads=2, attention_head_dim=24, cross_attention_dim=48, num_layers=2, caption_channels=20
    )
    return randomize(AllegroTransformer3DModel(**{**small, **config}))


def rotary(head_dim: int, grid: tuple[int, int, int]) -> tuple:
    """What the pipeline prepares: (cos, sin) of each axis, and the position (1, N) of each token on it."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

    frames, height, width = grid
    made: Any = get_3d_rotary_pos_embed_allegro(
        head_dim, ((0, 0), (height, width)), (height, width), frames, interpolation_scale=(2.2, 2.0, 2.0)
    )
    places = torch.cartesian_prod(*(positions.long() for positions in made[3:]))
    return tuple(made[:3]), tuple(places.t().reshape(3, 1, -1).contiguous())


def inputs(**masks: Tensor) -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, 4, 3, 6, 10),
        encoder_hidden_states=randn(2, 7, 20, seed=2),
        timestep=torch.tensor([3, 987]),
        image_rotary_emb=rotary(24, (3, 3, 5)),
        **{"encoder_attention_mask": text_mask(7, 3, total=7), **masks},
    )


NAME = "AllegroTransformer3DModel"
KEEPS = ("timestep", "image_rotary_emb")
MODELS = (
    Model(NAME, "allegro", allegro, inputs, LAYERS, keeps=KEEPS),
    Model(f"{NAME}, a mask over the video", "allegro", allegro,
          lambda: inputs(attention_mask=torch.arange(10).lt(6).long().expand(2, 3, 6, 10)), LAYERS, keeps=KEEPS),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def allegro_row(grid: tuple[int, int, int] = (8, 16, 16), text: int = 512, valid: int = 100) -> Whole:
    """Allegro, 24 heads of 96, with one of its 32 blocks."""
    tokens = math.prod(grid)

    def build() -> nn.Module:
        return allegro(
            num_attention_heads=24, attention_head_dim=96, cross_attention_dim=2304, caption_channels=4096, num_layers=1
        )

    def run(dtype: torch.dtype, device: str) -> Run:
        x = randn(1, 4, grid[0], 2 * grid[1], 2 * grid[2]).to(device, dtype)
        context = randn(1, text, 4096, seed=2).to(device, dtype)
        timestep, mask = torch.tensor([500], device=device), text_mask(valid, total=text).to(device)
        axes, places = rotary(96, grid)
        rope = tuple(tuple(t.to(device) for t in pair) for pair in axes), tuple(t.to(device) for t in places)

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return model(x, encoder_hidden_states=context, timestep=timestep, encoder_attention_mask=mask,
                             image_rotary_emb=rope, return_dict=False)[0]  # fmt: skip

        return call

    return Whole(
        "Allegro block", f"1x{tokens}x2304, one block, {valid} of {text} text tokens", build, run,
        compile=lambda model: model.transformer_blocks[0].compile(dynamic=False),
    )  # fmt: skip


ROWS = (allegro_row(),)
