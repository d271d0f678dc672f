"""diffusers' WanAnimate2Transformer3DModel: Wan's block under the names of its own repository, beside a cache of keys.

The self-attention is the original's: it keeps keys before their rotation, and attends to a packed buffer by a block
mask. The head is that of Wan's own repository (wan_native.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit.integrations import wan_block
from fastdit.integrations.diffusers_processor import Processor
from fastdit.integrations.diffusers_wan import PROCESSORS, attend_beside
from fastdit.integrations.structure import has, parameters, unknown


def block_forward(
    self,
    hidden_states: Tensor,
    temb: Tensor,
    encoder_hidden_states: Tensor,
    kv_cache: Any,
    kv_cache_mode: str,
    rotary_emb: Tensor,
    grid_sizes: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    reference_rotary_emb: Tensor | None = None,
    reference_grid_sizes: Tensor | None = None,
    attention_mask: Any = None,
    origin_latent_frames: int | None = None,
    origin_latent_hw: int | None = None,
) -> Tensor:
    def attention(h: Tensor) -> Tensor:
        return self.self_attn(
            h,
            rotary_emb=rotary_emb,
            grid_sizes=grid_sizes,
            kv_cache=kv_cache,
            kv_cache_mode=kv_cache_mode,
            rope_stride=self.refer_stride if kv_cache_mode == "extract" else 1,
            reference_rotary_emb=reference_rotary_emb,
            reference_grid_sizes=reference_grid_sizes,
            reference_rope_stride=self.refer_stride,
            attention_mask=attention_mask,
            origin_latent_frames=origin_latent_frames,
            origin_latent_hw=origin_latent_hw,
        )

    def cross(h: Tensor) -> Tensor:
        return self.cross_attn(
            h,
            encoder_hidden_states=encoder_hidden_states,
            encoder_hidden_states_image=encoder_hidden_states_image,
        )

    tables, index = wan_block.six(self.modulation, temb)
    norms = (self.norm1, self.norm3, self.norm2)
    return wan_block.run(self, hidden_states, tables, index, norms, attention, cross)


block_forward.__name__ = "forward"

BLOCK = ("norm1", "self_attn", "norm3", "cross_attn", "norm2", "ffn", "modulation")
TAKEN = [
    *("hidden_states", "temb", "encoder_hidden_states", "kv_cache", "kv_cache_mode", "rotary_emb", "grid_sizes"),
    *("encoder_hidden_states_image", "reference_rotary_emb", "reference_grid_sizes", "attention_mask"),
    *("origin_latent_frames", "origin_latent_hw"),
]


def refuse_block(block: Any) -> str | None:
    norms = wan_block.refuse_norms(block.norm1, block.norm3, block.norm2)
    return norms or unknown(block, *BLOCK, "refer_stride")


wan_block.register_block(
    "Wan-Animate-2 block",
    "modulation",
    block_forward,
    lambda m: has(m, *BLOCK) and parameters(m) == TAKEN,
    refuse_block,
)


class FastditWanAnimate2CrossAttnProcessor(Processor):
    """WanAnimate2CrossAttnProcessor with `qk_norm_rope` and `attention`."""

    def __init__(self):
        from diffusers.models.transformers.transformer_wan_animate_2 import WanAnimate2CrossAttnProcessor

        super().__init__(WanAnimate2CrossAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
    ) -> Tensor:
        return attend_beside(attn, hidden_states, encoder_hidden_states, encoder_hidden_states_image)


PROCESSORS["WanAnimate2CrossAttnProcessor"] = FastditWanAnimate2CrossAttnProcessor
