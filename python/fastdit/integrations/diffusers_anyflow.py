"""diffusers' AnyFlowTransformer3DModel and AnyFlowFARTransformer3DModel: Wan's block, and timesteps of frames.

The model repeats the modulation of each frame for its tokens; here it stays a row per frame. FAR's self-attention, by
block masks or over a cache of keys before their rotation, and its model's forward are the original's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.integrations import wan_block
from fastdit.integrations.diffusers_lora import lora_scaled
from fastdit.integrations.diffusers_processor import Processor, queries_keys_values
from fastdit.integrations.diffusers_wan import PROCESSORS, normed, register_block
from fastdit.integrations.diffusers_wan_model import caller, embedded, output, register_model
from fastdit.integrations.wan_block import Rows, per_block

# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor | Rows,
    rotary_emb: dict[str, Tensor],
    attention_mask: Any,
    kv_cache: Any = None,
    kv_cache_flag: Any = None,
) -> Tensor:
    cache = {} if kv_cache is None else dict(kv_cache=kv_cache, kv_cache_flag=kv_cache_flag)
    tables, index = wan_block.six(self.scale_shift_table, temb)
    return wan_block.run(
        self,
        hidden_states.contiguous(),  # the first block's come transposed from an eager patch embedding
        tables,
        index,
        (self.norm1, self.norm2, self.norm3),
        lambda h: self.attn1(hidden_states=h, rotary_emb=rotary_emb, attention_mask=attention_mask, **cache),
        lambda h: self.attn2(hidden_states=h, encoder_hidden_states=encoder_hidden_states),
    )


block_forward.__name__ = "forward"

register_block(
    "AnyFlow block",
    block_forward,
    (
        *("hidden_states", "encoder_hidden_states", "temb", "rotary_emb", "attention_mask"),
        *("kv_cache", "kv_cache_flag"),
    ),
)


# Attention --------------------------------------------------------------------------------------------------------


class FastditAnyFlowAttnProcessor(Processor):
    """AnyFlowAttnProcessor with `qk_norm_rope` and `attention`; masks go to the original."""

    def __init__(self):
        from diffusers.models.transformers.transformer_anyflow import AnyFlowAttnProcessor

        super().__init__(AnyFlowAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: dict[str, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        return attend(attn, hidden_states, encoder_hidden_states, rotary_emb)


class FastditAnyFlowCrossAttnProcessor(Processor):
    """AnyFlowCrossAttnProcessor likewise."""

    def __init__(self):
        from diffusers.models.transformers.transformer_anyflow import AnyFlowCrossAttnProcessor

        super().__init__(AnyFlowCrossAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask)
        return attend(attn, hidden_states, encoder_hidden_states, None)


def attend(attn: Any, x: Tensor, context: Tensor | None, rotary_emb: dict[str, Tensor] | None) -> Tensor:
    q, k, v = queries_keys_values(attn, x, context)
    rope: dict[str, Tensor] = {}
    if rotary_emb is not None:
        rope = {**table(rotary_emb["query"]), **table(rotary_emb["key"], "k_")}
    q, k = normed(q, k, attn.norm_q, attn.norm_k, **rope)
    return attn.to_out[1](attn.to_out[0](ops.attention(q, k, v).flatten(2)))


def table(freqs: Tensor, prefix: str = "") -> dict[str, Tensor]:
    """(1, 1, N, D/2), complex fp64."""
    angles = freqs.to(torch.complex64).transpose(1, 2)
    return {f"{prefix}cos": angles.real, f"{prefix}sin": angles.imag}


PROCESSORS["AnyFlowAttnProcessor"] = FastditAnyFlowAttnProcessor
PROCESSORS["AnyFlowCrossAttnProcessor"] = FastditAnyFlowCrossAttnProcessor


# The model --------------------------------------------------------------------------------------------------------


@lora_scaled
def model_forward(
    self,
    hidden_states: Tensor,
    timestep: Tensor,
    r_timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
    attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
):
    """Videos are (B, T, C, H, W)."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    video = hidden_states.transpose(1, 2)
    _, p_h, p_w = self.config.patch_size
    height, width = video.shape[3] // p_h, video.shape[4] // p_w
    layout = dict(total_frames=video.shape[2], full_frame_shape=(height, width), full_token_per_frame=1)
    rotary_emb = self.rope(layout_cfg=layout, device=video.device)
    x = embedded(self.patch_embedding, video)
    temb, projected, context, image = self.condition_embedder(  # (B, T, C), (B, T, 6 C)
        timestep, r_timestep, encoder_hidden_states, encoder_hidden_states_image, layout_cfg=layout
    )
    context = context if image is None else torch.cat([image, context], dim=1)
    frames, call, tokens = Rows(projected.unflatten(2, (6, -1))), caller(self), x.shape[1]
    for block, rows in per_block(self.blocks, frames, lambda few: few.dense(tokens)):
        x = call(block, x, context, rows, rotary_emb, None)
    (sample,) = output(self, x, temb, video, return_dict=False)
    sample = sample.transpose(1, 2).contiguous()
    return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


register_model(model_forward)
