"""Models built on Flux.1's blocks: Bria, Bria FIBO, LongCat-Image, Ovis-Image, Chroma."""

from __future__ import annotations

from typing import Any

import torch

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn, rotation
from fastdit.testing.zoo.flux import GRID, KEEPS, LAYERS, TEXT, positions

SMALL = dict(in_channels=12, num_layers=2, num_single_layers=2, attention_head_dim=24, num_attention_heads=2,
             joint_attention_dim=32, axes_dims_rope=(4, 8, 12))  # fmt: skip
TOKENS = GRID[0] * GRID[1]


def build(name: str, **config) -> Any:
    import diffusers

    return randomize(getattr(diffusers, name)(**{**SMALL, **config}))


def inputs(**more: Any) -> dict[str, Any]:
    img_ids, txt_ids = positions(GRID, TEXT)
    return dict(
        hidden_states=randn(2, TOKENS, 12),
        encoder_hidden_states=randn(2, TEXT, 32, seed=2),
        timestep=torch.tensor([0.03, 0.987]),
        img_ids=img_ids,
        txt_ids=txt_ids,
        **more,
    )


def fibo_inputs() -> dict[str, Any]:
    return inputs(text_encoder_layers=[randn(2, TEXT, 16, seed=3 + i) for i in range(4)])


def chroma(**config: Any) -> Any:
    return build("ChromaTransformer2DModel", approximator_num_channels=8, approximator_hidden_dim=20,
                 approximator_layers=2, **config)  # fmt: skip


FIBO = {("Flux single block, streams joined" if k == "Flux single block" else k): n for k, n in LAYERS.items()}
CHROMA = {k.replace("Flux", "Chroma").replace("ChromaAttn", "FluxAttn"): n for k, n in LAYERS.items()}
del CHROMA["output norm (AdaLayerNormContinuous)"]

MODELS = (
    Model(
        "BriaTransformer2DModel",
        "flux",
        lambda: build("BriaTransformer2DModel"),
        inputs,
        LAYERS,
        keeps=KEEPS,
        fixed=KEEPS,
    ),
    Model(
        "BriaFiboTransformer2DModel",
        "flux",
        lambda: build("BriaFiboTransformer2DModel", text_encoder_dim=16),
        fibo_inputs,
        FIBO,
        keeps=KEEPS,
        fixed=KEEPS,
    ),
    Model(
        "LongCatImageTransformer2DModel",
        "flux",
        lambda: build("LongCatImageTransformer2DModel", pooled_projection_dim=20),
        inputs,
        LAYERS,
        keeps=KEEPS,
        fixed=KEEPS,
    ),
    Model(
        "OvisImageTransformer2DModel",
        "flux",
        lambda: build("OvisImageTransformer2DModel"),
        inputs,
        LAYERS,
        keeps=KEEPS,
        fixed=KEEPS,
    ),
    Model("ChromaTransformer2DModel", "flux", chroma, inputs, CHROMA, keeps=KEEPS, fixed=KEEPS),
)


# ---- at full width ------------------------------------------------------------------------------------------


def chroma_row(kind: str, block: str, tables: int, *streams: int, **config: Any) -> Whole:
    """Chroma, 24 heads of 128, with one block, whose tables the model makes; 1,024 tokens and 512 of text."""

    def given(dtype: torch.dtype) -> tuple:
        tokens = (randn(1, n, 3072, seed=n).to(dtype) for n in streams)
        return *tokens, randn(1, tables, 3072).to(dtype), rotation(sum(streams))

    return block_row(
        f"Chroma {kind} block", "1x1024x3072, 512 text tokens",
        lambda: chroma(attention_head_dim=128, num_attention_heads=24, axes_dims_rope=(16, 56, 56), **config), block,
        given,
    )  # fmt: skip


def fibo_row(tokens: int = 1536) -> Whole:
    """Bria FIBO, 24 heads of 128, with one single block, over both streams joined."""

    def given(dtype: torch.dtype) -> tuple:
        return *(randn(1, *n, 3072).to(dtype) for n in ((tokens,), ())), rotation(tokens)

    return block_row(
        "Bria FIBO single block", f"1x{tokens}x3072, text among them",
        lambda: build("BriaFiboTransformer2DModel", num_layers=0, num_single_layers=1, attention_head_dim=128,
                      num_attention_heads=24, axes_dims_rope=(16, 56, 56), text_encoder_dim=16),
        "single_transformer_blocks.0", given,
    )  # fmt: skip


ROWS = (
    fibo_row(),
    chroma_row("double", "transformer_blocks.0", 12, 1024, 512, num_layers=1, num_single_layers=0),
    chroma_row("single", "single_transformer_blocks.0", 3, 1536, num_layers=0, num_single_layers=1),
)
