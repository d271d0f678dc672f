"""diffusers' LTXVideoTransformer3DModel: the block and its two attentions, with padding as key lengths."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit import ops
from fastdit.integrations.adaln_single import refuse_table, sublayers
from fastdit.integrations.diffusers_processor import (
    Processor,
    queries_keys_values,
    refuse_processor,
    refuse_weighted_rms,
    shared,
)
from fastdit.integrations.diffusers_wan import normed
from fastdit.integrations.joint import is_diffusers_rms
from fastdit.integrations.padding import is_lengths
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, parameters, unknown
from fastdit.integrations.timestep_rows import PerToken, register_model

# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor | PerToken,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    return sublayers(
        self,
        hidden_states,
        temb,
        lambda h: self.attn1(h, None, None, image_rotary_emb),
        lambda x: self.attn2(x, encoder_hidden_states, encoder_attention_mask, None),
        norm="rms",
    )


block_forward.__name__ = "forward"

BLOCK = ("norm1", "attn1", "norm2", "attn2", "ff", "scale_shift_table")
CALL = ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "encoder_attention_mask"]


def refuse_rms_norms(*norms: Any) -> str | None:
    """Modulated norms have to be diffusers' RMSNorm without weights."""
    for norm in norms:
        if not is_diffusers_rms(norm) or norm.weight is not None:
            return f"its norm is a {type(norm).__name__}, not diffusers' RMSNorm without weights"
    return None


def refuse_block(block: Any) -> str | None:
    return refuse_rms_norms(block.norm1, block.norm2) or refuse_table(block) or unknown(block, *BLOCK)


register(
    Kind(
        name="LTX block",
        ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"),
        match=lambda m: has(m, *BLOCK) and parameters(m) == CALL,
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.norm1, block.norm2],
        # passes over (tokens, C) in 2 bytes: 2 norms (to fp32 3, square 4, mean 2, product 3, rounding 3); scales,
        # shifts and gates 2 each, 3 sums 3: 51, fused 2 + 3 + 4 + 3
        saving=lambda block: 39 * block.scale_shift_table.shape[-1] * itemsize(block),
        block=True,
    )
)
register_model("a timestep per token (LTX)", CALL, refuse_block)


# Attention --------------------------------------------------------------------------------------------------------


class FastditLTXAttnProcessor(Processor):
    """LTXVideoAttnProcessor with `qk_norm_rope` and `attention`; masks that are no lengths go to the original."""

    def __init__(self):
        from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor

        super().__init__(LTXVideoAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None and not is_lengths(attention_mask):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        q, k, v = queries_keys_values(attn, hidden_states, encoder_hidden_states)
        cos, sin = pair_tables(image_rotary_emb, attn.heads)
        q, k = normed(q, k, attn.norm_q, attn.norm_k, cos=cos, sin=sin)
        o = ops.attention(q, k, v, kv_len=attention_mask).flatten(2)
        return attn.to_out[1](attn.to_out[0](o))


def pair_tables(rotary: tuple[Tensor, Tensor] | None, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """cos, sin (B, N, C) over all heads, each value twice -> (B, N, H, D/2) views: every head has its own angles."""
    if rotary is None:
        return None, None
    cos, sin = (t[..., ::2].unflatten(-1, (heads, -1)) for t in rotary)
    return cos, sin


def refuse_attention(attn: Any, *names: str) -> str | None:
    reason = refuse_processor(attn.processor, *names) or refuse_weighted_rms(attn.norm_q, attn.norm_k)
    if reason is None and attn.inner_dim != attn.inner_kv_dim:
        return "its keys have fewer heads, which the original does not cover either"
    return reason


ATTENTION = ("to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", "processor", "inner_kv_dim")

register(
    Kind(
        name="attention (LTXVideoAttnProcessor)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: has(m, *ATTENTION) and not hasattr(m, "to_gate_logits"),
        refuse=lambda attn: refuse_attention(attn, "LTXVideoAttnProcessor"),
        patches=lambda attn: [(attn, "processor", shared(FastditLTXAttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        # q and k in 2 bytes: norm 2, negate and stack 4, two casts 6, two products 8, sum 6, rounding 3, against 2;
        # one of the two attentions of a block rotates
        saving=lambda attn: 27 * attn.inner_dim * itemsize(attn),
        part=True,
    )
)
