"""diffusers' LuminaNextDiT2DModel (Lumina-Next): the block, and the attention that serves image and text.

attention(h) = self(h) + tanh(gate) * cross(h, n(text)),  one gate per head, one output layer for the sum
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_flux_attention import is_processor
from fastdit.integrations.diffusers_lumina2 import norms_of, refuse_attention
from fastdit.integrations.diffusers_processor import Processor, shared
from fastdit.integrations.joint import head_norms, queries_only
from fastdit.integrations.masks import valid_first
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.sandwich import refuse_modulation, refuse_norms, sandwich_block, saving
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block ---------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    attention_mask: Tensor,
    image_rotary_emb: Tensor,
    encoder_hidden_states: Tensor,
    encoder_mask: Tensor,
    temb: Tensor,
    cross_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    x, text, norm = hidden_states, encoder_hidden_states, self.norm1_context
    if x.dtype != self.norm2.weight.dtype or text.dtype != norm.weight.dtype:
        return original(
            self, x, attention_mask, image_rotary_emb, text, encoder_mask, temb, cross_attention_kwargs or {}
        )
    options = dict(query_rotary_emb=image_rotary_emb, **(cross_attention_kwargs or {}))

    def attend(h: Tensor) -> Tensor:
        context = ops.norm_modulate(text, weight=norm.weight, norm="rms", eps=norm.eps, precision=law(self, text))
        y = self.attn1(h, h, attention_mask=attention_mask, key_rotary_emb=image_rotary_emb, **options)
        cross = self.attn2(h, context, attention_mask=encoder_mask, key_rotary_emb=None, **options)
        gate = self.gate.repeat_interleave(y.shape[-1])[None]  # of each head, for its channels
        y, cross = y.flatten(2), cross.flatten(2)
        return self.attn2.to_out[0](ops.gate_residual(y, cross, gate, gate_act="tanh", precision=law(self, y, gate)))

    return sandwich_block(self, x, norms_of(self), attend, self.feed_forward, self.norm1.linear(self.norm1.silu(temb)))


block_forward.__name__ = "forward"

BLOCK = ("gate", "attn1", "attn2", "feed_forward", "norm1", "ffn_norm1", "norm2", "ffn_norm2", "norm1_context")
CALL = ["hidden_states", "attention_mask", "image_rotary_emb", "encoder_hidden_states", "encoder_mask", "temb"]


def refuse_block(block: Any) -> str | None:
    reason = refuse_modulation(block.norm1) or refuse_norms(*norms_of(block), block.norm1_context)
    return reason or unknown(block, *BLOCK)


def block_saving(block: Any) -> int:
    width = block.norm2.weight.numel()
    return saving(block, width, modulated=True) + 2 * width * itemsize(block)  # and the sum of attentions: 5, fused 3


register(
    Kind(
        name="Lumina-Next block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *BLOCK) and parameters(m) == [*CALL, "cross_attention_kwargs"],
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.norm1, *norms_of(block), block.norm1_context],
        saving=block_saving,
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditLuminaAttnProcessor(Processor):
    """LuminaAttnProcessor2_0 with `qk_norm_rope` (norms over all heads) and `attention`: (B, N, H, D), no output layer.

    Masks, over the image's tokens or the text's, may have any pattern; keys are not repeated for the queries' heads.
    """

    def __init__(self):
        from diffusers.models.attention_processor import LuminaAttnProcessor2_0

        super().__init__(LuminaAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Tensor | None = None,
        key_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        rotates = key_rotary_emb is not None
        if hidden_states.ndim != 3 or query_rotary_emb is None or (rotates and key_rotary_emb is not query_rotary_emb):
            return self.original(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                query_rotary_emb,
                key_rotary_emb,
                base_sequence_length,
            )
        cos, sin = (part.float().unsqueeze(2) for part in (query_rotary_emb.real, query_rotary_emb.imag))
        rope = dict(cos=cos, sin=sin) if rotates else queries_only(cos, sin)
        q = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1))
        k, v = (layer(encoder_hidden_states).unflatten(-1, (-1, q.shape[-1])) for layer in (attn.to_k, attn.to_v))
        q, k = ops.qk_norm_rope(q, k, scope="hidden", **head_norms(attn.norm_q, attn.norm_k, q.dtype), **rope)
        lengths = None
        if attention_mask is not None:
            lengths, k, v = valid_first(attention_mask.flatten(1), k, v)
        scale = None
        if rotates and base_sequence_length is not None:  # proportional attention
            scale = math.sqrt(math.log(hidden_states.shape[1], base_sequence_length) / q.shape[-1])
        return ops.attention(q, k, v, kv_len=lengths, scale=scale)


READS = frozenset(
    "embeddings apply_rotary_emb ndim shape view transpose to_q to_k to_v heads dtype norm_q norm_k to math sqrt log "
    "scale unsqueeze repeat flatten bool expand F scaled_dot_product_attention".split()
)


register(
    Kind(
        name="attention (LuminaAttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "norm_q", "norm_k", "scale_qk", "heads", "inner_dim", "processor")
            and is_processor(m.processor, READS, frozenset())
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditLuminaAttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        # of the queries: norm 2, a product of complex numbers 10, or 2 without casts to fp32 and back, against 2
        saving=lambda attn: (10 if itemsize(attn) == 2 else 2) * attn.inner_dim * itemsize(attn),
        part=True,
    )
)
