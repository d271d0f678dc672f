"""diffusers' EasyAnimateTransformer3DModel: CogVideoX's modulation, with layers of the text's own where there are any.

A block may norm what leaves its MLPs; the blocks behind `mmdit_layers` have one set of layers for both streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_cogvideox import (
    SIGNATURE,
    Half,
    absorbed_by_block,
    attended,
    is_block,
    joined,
    refuse_block,
)
from fastdit.integrations.diffusers_flux_attention import norms_of, pairs
from fastdit.integrations.diffusers_processor import Processor, refuse_processor, shared
from fastdit.integrations.joint import (
    Stream,
    adaln_passes,
    joint_attention,
    projections,
    refuse_qk_norms,
    rotation_passes,
    text_projections,
)
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, parameters

# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    attention = dict(image_rotary_emb=image_rotary_emb)
    video, text, precision = attended(self, hidden_states, encoder_hidden_states, temb, attention)

    def closed(half: Half, ff: Callable[[Tensor], Tensor]) -> Tensor:
        y = ff(half.h)
        return ops.gate_residual(half.x, y if self.norm3 is None else self.norm3(y), half.gate, precision=precision)

    return closed(video, self.ff), closed(text, self.ff if self.txt_ff is None else self.txt_ff)


block_forward.__name__ = "forward"

register(
    Kind(
        name="EasyAnimate block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: is_block(m) and has(m, "txt_ff", "norm3") and parameters(m) == SIGNATURE,
        refuse=lambda block: refuse_block(block, "txt_ff", "norm3"),
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=absorbed_by_block,
        saving=lambda m: adaln_passes(itemsize(m)) * m.norm1.norm.normalized_shape[0] * itemsize(m),
        block=True,
    )
)


# Attention --------------------------------------------------------------------------------------------------------


class FastditEasyAnimateAttnProcessor(Processor):
    """EasyAnimateAttnProcessor2_0 with `qk_norm_rope` and `attention` over [text, video]; masks go to the original.

    Without projections of its own, the text's share of the output stays as the attention gives it.
    """

    def __init__(self):
        from diffusers.models.transformers.transformer_easyanimate import EasyAnimateAttnProcessor2_0

        super().__init__(EasyAnimateAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None or encoder_hidden_states is None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        cos = sin = None
        if image_rotary_emb is not None:
            cos, sin = (t.to(hidden_states.device) for t in pairs(*image_rotary_emb))
        if attn.add_q_proj is None:
            n = encoder_hidden_states.shape[1]
            both = joined(attn, hidden_states, encoder_hidden_states, cos, sin)
            context, x = both.split([n, hidden_states.shape[1]], dim=1)
        else:
            text = Stream(*text_projections(attn, encoder_hidden_states), attn.norm_added_q, attn.norm_added_k)
            video = Stream(*projections(attn, hidden_states), attn.norm_q, attn.norm_k, cos, sin)
            context, x = joint_attention(text, video)
            context = attn.to_add_out(context)
        return attn.to_out[1](attn.to_out[0](x)), context


def refuse_attention(attn: Any) -> str | None:
    if attn.is_cross_attention or (attn.add_q_proj is None) != (attn.to_add_out is None):
        return "it is a cross-attention, or has an output projection of the text without the others"
    return refuse_qk_norms(*norms_of(attn))


NAME = "EasyAnimateAttnProcessor2_0"
register(
    Kind(
        name=f"attention ({NAME})",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_out", "norm_q", "norm_added_q", "added_kv_proj_dim", "is_cross_attention", "processor")
            and refuse_processor(m.processor, NAME) is None
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditEasyAnimateAttnProcessor))],
        absorbs=norms_of,
        saving=lambda attn: rotation_passes(itemsize(attn)) * attn.inner_dim * itemsize(attn),
        part=True,
    )
)
