"""diffusers' WanAnimate2Transformer3DModel: the pass over the reference, which fills the cache of keys and values.

The pass that reads it needs flex attention under torch.compile; the blocks are the same.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole, block_row
from fastdit.testing.zoo import Model, randn

LAYERS = {
    "Wan-Animate-2 block": 2,
    "attention (WanAttnProcessor)": 2,  # the cross-attentions
    "activation (nn.GELU)": 2,
    "patch embedding (Conv3d, kernel = stride)": 1,
    "head (Wan-Video)": 1,
}


def animate2(**config) -> Any:
    """WanAnimate2Transformer3DModel of two narrow layers: two heads of 24."""
    from diffusers import WanAnimate2Transformer3DModel

    small = dict(text_len=9, in_dim=7, dim=48, ffn_dim=96, freq_dim=16, text_dim=32, out_dim=4, num_heads=2,
                 num_layers=2)  # fmt: skip
    return randomize(WanAnimate2Transformer3DModel(**{**small, **config}))


def inputs(*, image: bool = True) -> dict[str, Any]:
    return dict(
        hidden_states=[randn(4, 2, 6, 10, seed=s) for s in (1, 2)],
        condition_latents=[randn(3, 2, 6, 10, seed=s) for s in (3, 4)],
        timestep=torch.tensor([3.0, 987.0]),
        encoder_hidden_states=[randn(n, 32, seed=n) for n in (9, 5)],
        encoder_hidden_states_image=randn(2, 6, 1280, seed=5) if image else None,
        seq_len=2 * 3 * 5,
        offset_grid_sizes=torch.tensor([[2, 3, 5]] * 2),
    )


def call_reference(model: Any, inputs: dict[str, Any]) -> Tensor:
    from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVCache

    model.gradient_checkpointing = False  # the model gives it keywords, of which diffusers' own takes none
    cache = WanAnimate2KVCache(len(model.blocks))
    output = model(**inputs, kv_cache=cache, kv_cache_mode="extract", return_dict=False)[0]
    kept = [t for layer in cache.layer_caches for t in layer.get()]
    return torch.cat([t.flatten() for t in (*output, *kept)])


NAME = "WanAnimate2Transformer3DModel"
MODELS = (
    Model(NAME, "wan", animate2, inputs, LAYERS, call=call_reference),
    Model(f"{NAME}, text only", "wan", lambda: animate2(use_img_emb=False, cross_attn_norm=False),
          lambda: inputs(image=False), LAYERS, call=call_reference),
)  # fmt: skip


# ---- at full width ------------------------------------------------------------------------------------------


def row(grid: tuple[int, int, int] = (3, 16, 16)) -> Whole:
    """40 heads of 128, with one of its 40 blocks, over a reference; texts of 512 tokens, images of 257."""
    tokens = math.prod(grid)

    def given(dtype: torch.dtype) -> tuple:
        from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2KVLayerCache

        x, text, image = (randn(1, n, 5120, seed=n).to(dtype) for n in (tokens, 512, 257))
        rope = torch.polar(torch.ones(16, 64), randn(16, 64)).to(torch.complex128)
        temb, cache = randn(1, 6, 5120, seed=2), WanAnimate2KVLayerCache()
        return x, temb, text, cache, "extract", rope, torch.tensor([grid]), image

    return block_row(
        "Wan-Animate-2 block", f"1x{tokens}x5120, one block, 512 text tokens and 257 of an image",
        lambda: animate2(dim=5120, ffn_dim=13824, num_heads=40, num_layers=1), "blocks.0", given,
    )  # fmt: skip


ROWS = (row(),)
