"""diffusers' MochiTransformer3DModel: the block and its attention.

    x = x + rms(attn) * tanh(gate_1);    x = x + rms(ff(rms(x) * (1 + scale_2))) * tanh(gate_2)     for each stream

Norms and gates are computed in fp32 whatever the dtype of the model. The last block only reads the text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor, shared
from fastdit.integrations.joint import (
    Stream,
    is_diffusers_rms,
    joint_attention,
    projections,
    rotation_passes,
    text_projections,
)
from fastdit.integrations.masks import valid_first
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    encoder_attention_mask: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    x, context = hidden_states.contiguous(), encoder_hidden_states
    scale, *video = self.norm1.linear(self.norm1.silu(temb)).chunk(4, dim=1)
    precision = law(self, x, scale)
    if self.context_pre_only:
        c_scale, text = self.norm1_context.linear_1(self.norm1_context.silu(temb).to(context.dtype)), None
    else:
        c_scale, *text = self.norm1_context.linear(self.norm1_context.silu(temb)).chunk(4, dim=1)
    a, c = self.attn1(
        hidden_states=modulated(x, scale, self.norm1, precision),
        encoder_hidden_states=modulated(context, c_scale, self.norm1_context, precision),
        image_rotary_emb=image_rotary_emb,
        attention_mask=encoder_attention_mask,
    )
    x = close(x, a, video, (self.norm2, self.norm3, self.norm4), self.ff, precision)
    if text is not None:
        norms = (self.norm2_context, self.norm3_context, self.norm4_context)
        context = close(context, c, text, norms, self.ff_context, precision)
    return x, context


def modulated(x: Tensor, scale: Tensor, norm: Any, precision: str) -> Tensor:
    return ops.norm_modulate(x, scale=scale, norm="rms", eps=rms(norm).eps, precision=precision)


def close(
    x: Tensor, y: Tensor, tables: list[Tensor], norms: tuple[Any, ...], ff: Callable[[Tensor], Tensor], precision: str
) -> Tensor:
    """From the attention's output to the end of the block; tables: gate, scale of the MLP, gate of the MLP."""
    gate, scale, ff_gate = tables
    gated: dict[str, Any] = dict(gate_act="tanh", post_norm="rms", precision=precision)
    x, h = ops.gate_residual_norm_modulate(
        x, y, gate, post_norm_eps=rms(norms[0]).eps, scale=scale, norm="rms", eps=rms(norms[1]).eps, **gated
    )
    return ops.gate_residual(x, ff(h), ff_gate, post_norm_eps=rms(norms[2]).eps, **gated)


block_forward.__name__ = "forward"


def rms(norm: Any) -> Any:
    """The RMSNorm inside one of Mochi's norms: MochiRMSNormZero, MochiModulatedRMSNorm, MochiLayerNormContinuous."""
    return norm.norm.norm if hasattr(norm.norm, "norm") else norm.norm


NORMS = ("norm1", "norm1_context", "norm2", "norm2_context", "norm3", "norm3_context", "norm4", "norm4_context")
BLOCK = (*NORMS, "attn1", "ff", "ff_context", "context_pre_only")
SIGNATURE = ["hidden_states", "encoder_hidden_states", "temb", "encoder_attention_mask", "image_rotary_emb"]


def norms_of(block: Any) -> list[Any]:
    return [norm for norm in (getattr(block, name) for name in NORMS) if norm is not None]


def absorbed(block: Any) -> list[nn.Module]:
    return [m for norm in norms_of(block) for m in norm.modules() if hasattr(m, "eps") or hasattr(m, "norm")]


def refuse_block(block: Any) -> str | None:
    for norm in norms_of(block):
        if not hasattr(norm, "norm") or not is_diffusers_rms(rms(norm)) or rms(norm).weight is not None:
            return f"its norm is a {type(norm).__name__}, not an RMSNorm without parameters"
        if why := unknown(norm, "silu", "linear", "linear_1", "norm", "eps"):
            return why
    return unknown(block, *BLOCK)


register(
    Kind(
        name="Mochi block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *BLOCK) and parameters(m) == SIGNATURE and has(m.norm1, "silu", "linear", "norm"),
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=absorbed,
        # in passes over (tokens, C) of two bytes: 4 norms (cast 3, square 4, mean 2, product 4), their 4 products with
        # scale or gate (4 and cast 3), 2 sums 3: 86; fused 2 + 4 + 3
        saving=lambda block: 77 * block.attn1.out_dim * itemsize(block),
        precision="fp32",
        block=True,
    )
)


# Attention --------------------------------------------------------------------------------------------------------


class FastditMochiAttnProcessor(Processor):
    """MochiAttnProcessor2_0 with `qk_norm_rope` and `attention`, all samples at once.

    The mask (B, T) says which text tokens are there. Eager takes them out of each sample in turn and puts their results
    first and zeros behind them; so the text is sorted here, and its length is a count.
    """

    def __init__(self):
        from diffusers.models.attention_processor import MochiAttnProcessor2_0

        super().__init__(MochiAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        cos, sin = (None, None) if image_rotary_emb is None else image_rotary_emb  # (N, H, D/2), learned
        count, context = valid_first(attention_mask, encoder_hidden_states)
        video = Stream(*projections(attn, hidden_states), attn.norm_q, attn.norm_k, cos, sin)
        text = Stream(*text_projections(attn, context), attn.norm_added_q, attn.norm_added_k)
        x, context = joint_attention(video, text, kv_len=hidden_states.shape[1] + count)
        padding = torch.arange(context.shape[1], device=context.device) >= count[:, None]
        context = context.masked_fill(padding.unsqueeze(-1), 0.0)
        return attn.to_out[1](attn.to_out[0](x)), attn.to_add_out(context) if hasattr(attn, "to_add_out") else context


QK_NORMS = ("norm_q", "norm_k", "norm_added_q", "norm_added_k")


def refuse_attention(attn: Any) -> str | None:
    norms = [getattr(attn, name) for name in QK_NORMS]
    if any(type(norm).__name__ != "MochiRMSNorm" or norm.eps != norms[0].eps for norm in norms):
        return "its norms are not MochiRMSNorm with one eps"
    return None


register(
    Kind(
        name="attention (MochiAttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "add_q_proj", "heads", "inner_dim", "processor", *QK_NORMS)
            and type(m.processor).__name__ == "MochiAttnProcessor2_0"
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditMochiAttnProcessor))],
        absorbs=lambda attn: [getattr(attn, name) for name in QK_NORMS],
        saving=lambda attn: rotation_passes(itemsize(attn)) * attn.inner_dim * itemsize(attn),
        part=True,
    )
)
