"""diffusers' CogVideoXTransformer3DModel (1.0 and 1.5) and ConsisIDTransformer3DModel, which shares its block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, randn

GRID, TEXT = (3, 3, 5), 7  # tokens
SMALL = dict(num_attention_heads=3, attention_head_dim=32, in_channels=4, out_channels=4, time_embed_dim=20,
             text_embed_dim=28, num_layers=2, sample_height=6, sample_width=10, sample_frames=9,
             max_text_seq_length=TEXT)  # fmt: skip
ROTARY = dict(use_rotary_positional_embeddings=True)
FACE = dict(is_train_face=True, cross_attn_interval=2, cross_attn_dim_head=8, cross_attn_num_heads=2, LFE_id_dim=12,
            LFE_vit_dim=16, LFE_depth=2, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=2, LFE_num_querie=3,
            LFE_output_dim=64, LFE_num_scale=2)  # fmt: skip
LAYERS = {
    "CogVideoX block": 2,
    "attention (CogVideoXAttnProcessor2_0)": 2,
    "feed-forward activation": 2,
    "output norm (AdaLayerNorm)": 1,
}
PATCHED = {**LAYERS, "patch embedding (Conv2d, kernel = stride)": 1}


def cogvideox(seed: int = 0, **config) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return randomize(CogVideoXTransformer3DModel(**{**SMALL, **config}), seed)


def consisid(seed: int = 0, **config) -> nn.Module:
    from diffusers import ConsisIDTransformer3DModel

    return randomize(ConsisIDTransformer3DModel(**{**SMALL, **ROTARY, **config}), seed)


def rotary(grid: tuple[int, int, int], head_dim: int) -> tuple[Tensor, Tensor]:
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    cos, sin = get_3d_rotary_pos_embed(head_dim, ((0, 0), grid[1:]), grid[1:], grid[0])
    return cos, sin


def inputs(*, frames: int = 3, rope: bool = True, **extra: Any) -> dict[str, Any]:
    return dict(
        hidden_states=randn(2, frames, 4, 6, 10),
        encoder_hidden_states=randn(2, TEXT, 28, seed=2),
        timestep=torch.tensor([3, 987]),
        image_rotary_emb=rotary(GRID, 32) if rope else None,
        **extra,
    )


def model(name: str, build: Any, given: Any, layers: dict[str, int]) -> Model:
    return Model(name, "cogvideox", build, given, layers, keeps=("timestep", "image_rotary_emb"))


MODELS = (
    model("CogVideoXTransformer3DModel, 2B", cogvideox, lambda: inputs(rope=False), PATCHED),
    model("CogVideoXTransformer3DModel, 5B", lambda: cogvideox(**ROTARY), inputs, PATCHED),
    model(
        "CogVideoXTransformer3DModel, 5B image to video",
        lambda: cogvideox(**ROTARY, use_learned_positional_embeddings=True),
        inputs,
        PATCHED,
    ),
    model(
        "CogVideoXTransformer3DModel, 1.5",
        lambda: cogvideox(**ROTARY, patch_size_t=2, ofs_embed_dim=20, patch_bias=False),
        lambda: inputs(frames=6, ofs=torch.tensor([2.0, 2.0])),
        LAYERS,
    ),
    model("ConsisIDTransformer3DModel", consisid, inputs, PATCHED),
    model(
        "ConsisIDTransformer3DModel, with a face",
        lambda: consisid(**FACE),
        lambda: inputs(id_cond=randn(2, 12), id_vit_hidden=[randn(2, 5, 16, seed=s) for s in (3, 4)]),
        PATCHED,
    ),
)


def block(name: str, heads: int, grid: tuple[int, int, int], text: int = 226) -> Whole:
    width, tokens = 64 * heads, math.prod(grid)

    def run(dtype: torch.dtype, device: str) -> Run:
        x, context = (randn(1, n, width, seed=n).to(device, dtype) for n in (tokens, text))
        temb = randn(1, 512).to(device, dtype)
        cos, sin = rotary(grid, 64)

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return torch.cat(model.transformer_blocks[0](x, context, temb, (cos.to(device), sin.to(device))), dim=1)

        return call

    return Whole(
        name, f"1x{tokens}x{width}, one block, {text} text tokens",
        lambda: cogvideox(**ROTARY, num_attention_heads=heads, attention_head_dim=64, time_embed_dim=512, num_layers=1),
        run, compile=lambda model: model.transformer_blocks[0].compile(dynamic=False),
    )  # fmt: skip


ROWS = (block("CogVideoX-5B block", 48, (4, 16, 32)),)
