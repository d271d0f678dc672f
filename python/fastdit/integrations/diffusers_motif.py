"""diffusers' MotifVideoTransformer3DModel: HunyuanVideo's blocks, with an attention of the video to the text behind it.

The text's attention takes what the joint one gives the video as its queries, and its output is added without a gate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_flux_attention import pairs
from fastdit.integrations.diffusers_hunyuan_attention import FastditHunyuanImageAttnProcessor, register_attention
from fastdit.integrations.diffusers_hunyuan_video import (
    DUAL,
    SINGLE,
    START,
    Rotary,
    absorbed_by_dual,
    absorbed_by_single,
    dual,
    refuse_dual,
    refuse_single,
    single,
)
from fastdit.integrations.diffusers_processor import Processor, refuse_processor, shared
from fastdit.integrations.joint import (
    adaln_zero,
    head_norms,
    queries_only,
    refuse_qk_norms,
    rotation_passes,
)
from fastdit.integrations.masks import is_key_mask, valid_first
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, parameters

# The blocks --------------------------------------------------------------------------------------------------------


def dual_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary = None,
    image_embed_seq_len: int = 0,
) -> tuple[Tensor, Tensor]:
    video = adaln_zero(self.norm1, temb)

    def close(x: Tensor, y: Tensor, c: Tensor, precision: str) -> Tensor:
        x = ops.gate_residual(x, y, video.gate1, precision=precision)
        y = self.cross_attn(
            hidden_states=y,
            encoder_hidden_states=c,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
            image_embed_seq_len=image_embed_seq_len,
        )
        x, h = ops.gate_residual_norm_modulate(
            x, y, shift=video.shift2, scale=video.scale2, eps=self.norm2.eps, precision=precision
        )
        return ops.gate_residual(x, self.ff(h), video.gate2, precision=precision)

    return dual(
        self,
        hidden_states,
        encoder_hidden_states,
        temb,
        video,
        None,
        attention_mask,
        image_rotary_emb,
        None if self.cross_attn is None else close,
    )


def single_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rotary = None,
    image_embed_seq_len: int = 0,
) -> tuple[Tensor, Tensor]:
    n = hidden_states.shape[1]

    def with_text(attn_output: Tensor, h: Tensor) -> Tensor:
        if self.cross_attn is None:
            return attn_output
        y = attn_output[:, :n]
        y = y + self.cross_attn(
            hidden_states=y,
            encoder_hidden_states=h[:, n:],
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
            image_embed_seq_len=image_embed_seq_len,
        )
        return torch.cat([y, attn_output[:, n:]], dim=1)

    x = torch.cat([hidden_states, encoder_hidden_states], dim=1)
    return single(self, x, n, temb, None, attention_mask, image_rotary_emb, with_text)


dual_forward.__name__ = single_forward.__name__ = "forward"

CALL = [*START, "image_rotary_emb", "image_embed_seq_len"]
MORE = ("cross_attn", "enable_text_cross_attention")
register(
    Kind(
        name="Motif-Video dual block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *DUAL, *MORE) and parameters(m) == CALL,
        refuse=lambda block: refuse_dual(block, *MORE),
        patches=lambda block: [(block, "forward", dual_forward)],
        absorbs=absorbed_by_dual,
        # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3 = 9;
        # with a text attention a sum 3 more, and fused 3
        saving=lambda block: 13 * block.norm2.normalized_shape[0] * itemsize(block),
        block=True,
    )
)
register(
    Kind(
        name="Motif-Video single block",
        ops=("norm_modulate", "activation", "gate_residual"),
        match=lambda m: has(m, *SINGLE, *MORE) and parameters(m) == CALL,
        refuse=lambda block: refuse_single(block, *MORE),
        patches=lambda block: [(block, "forward", single_forward)],
        absorbs=absorbed_by_single,
        # passes over (tokens, C): eager norm 2, scale 2, shift 2, gate 2, add 3, streams joined again 2, fused 2 + 3
        saving=lambda block: 8 * block.norm.norm.normalized_shape[0] * itemsize(block),
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditMotifVideoAttnProcessor(FastditHunyuanImageAttnProcessor):
    """MotifVideoAttnProcessor2_0: HunyuanImage's, whose mask may have any pattern over the text."""

    name = "MotifVideoAttnProcessor2_0"

    def __init__(self):
        from diffusers.models.transformers.transformer_motif_video import MotifVideoAttnProcessor2_0

        Processor.__init__(self, MotifVideoAttnProcessor2_0())


register_attention(FastditMotifVideoAttnProcessor.name, FastditMotifVideoAttnProcessor)


class FastditMotifVideoCrossAttnProcessor(Processor):
    """MotifVideoCrossAttnProcessor2_0 with `qk_norm_rope` and `attention`: the video rotates, the text does not."""

    name = "MotifVideoCrossAttnProcessor2_0"

    def __init__(self):
        from diffusers.models.transformers.transformer_motif_video import MotifVideoCrossAttnProcessor2_0

        super().__init__(MotifVideoCrossAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rotary = None,
        image_embed_seq_len: int = 0,
    ) -> Tensor:
        if attention_mask is not None and not is_key_mask(attention_mask):
            return self.original(
                attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, image_embed_seq_len
            )
        text = encoder_hidden_states[:, image_embed_seq_len:]
        heads = (-1, attn.inner_dim // attn.heads)
        q, k, v = (t.unflatten(-1, heads) for t in (attn.to_q(hidden_states), attn.to_k(text), attn.to_v(text)))
        rope = {} if image_rotary_emb is None else queries_only(*pairs(*image_rotary_emb))
        q, k = ops.qk_norm_rope(q, k, **head_norms(attn.norm_q, attn.norm_k, q.dtype), **rope)
        lengths = None
        if attention_mask is not None:  # over video and text
            lengths, k, v = valid_first(attention_mask.flatten(1)[:, -text.shape[1] :], k, v)
        o = ops.attention(q, k, v, kv_len=lengths).flatten(2)
        return attn.to_out[1](attn.to_out[0](o))


register(
    Kind(
        name=f"attention ({FastditMotifVideoCrossAttnProcessor.name})",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", "inner_dim", "processor")
            and refuse_processor(m.processor, FastditMotifVideoCrossAttnProcessor.name) is None
        ),
        refuse=lambda attn: refuse_qk_norms(attn.norm_q, attn.norm_k),
        patches=lambda attn: [(attn, "processor", shared(FastditMotifVideoCrossAttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        saving=lambda attn: rotation_passes(itemsize(attn)) // 2 * attn.inner_dim * itemsize(attn),  # queries only
        part=True,
    )
)
