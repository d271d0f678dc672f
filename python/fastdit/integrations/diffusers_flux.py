"""diffusers' Flux.1 blocks, double and single, and those of the models built on them: Bria, LongCat, Ovis, Chroma.

They differ in where the tables of modulation come from, whether the single blocks get the streams joined, and in the
activation of the MLP that runs beside the single blocks' attention.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.joint import (
    Tables,
    adaln_zero,
    clip_half,
    close_stream,
    open_stream,
    plain,
    refuse_adaln,
    refuse_plain_norms,
)
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, reads, unknown

STREAMS = ["hidden_states", "encoder_hidden_states"]
ROTARY = ["temb", "image_rotary_emb"]
OPTIONS = (["joint_attention_kwargs"], ["attention_kwargs"])

# The double block --------------------------------------------------------------------------------------------------


def double_block(
    self, x: Tensor, context: Tensor, image: Tables, text: Tables, attention: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """Text and image after one block, from their tables; attention: further arguments of `self.attn`."""
    precision, text_precision = law(self, x, image.gate1), law(self, context, text.gate1)  # autocast may widen one
    attn_output, context_attn_output, *ip_attn_output = self.attn(
        hidden_states=open_stream(x, image, plain(self.norm1), precision),
        encoder_hidden_states=open_stream(context, text, plain(self.norm1_context), text_precision),
        **attention,
    )
    x = close_stream(x, attn_output, image, self.norm2, self.ff, precision)
    context = close_stream(context, context_attn_output, text, self.norm2_context, self.ff_context, text_precision)
    return clip_half(context), x + ip_attn_output[0] if ip_attn_output else x


def double_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    image, text = adaln_zero(self.norm1, temb), adaln_zero(self.norm1_context, temb)
    attention = dict(image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or attention_kwargs or {}))
    return double_block(self, hidden_states, encoder_hidden_states, image, text, attention)


def chroma_double_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    image, text = Tables(*temb[:, :6].unbind(1)), Tables(*temb[:, 6:].unbind(1))
    options = dict(image_rotary_emb=image_rotary_emb, attention_mask=outer(attention_mask))
    attention = dict(**options, **(joint_attention_kwargs or {}))
    return double_block(self, hidden_states, encoder_hidden_states, image, text, attention)


def outer(mask: Tensor | None) -> Tensor | None:
    """Chroma's mask over pairs of tokens, (B, 1, N, N), of the one over tokens."""
    return None if mask is None else mask[:, None, None, :] * mask[:, None, :, None]


DOUBLE = ("norm1", "norm1_context", "attn", "norm2", "ff", "norm2_context", "ff_context")


def refuse_tableless(norm: Any) -> str | None:
    """For Chroma's norms, whose tables one network makes for the whole model."""
    return refuse_plain_norms(norm.norm) or unknown(norm, "emb", "norm")


def refuse_double(block: Any) -> str | None:
    refuse = refuse_tableless if "attention_mask" in parameters(block) else refuse_adaln
    norms = refuse(block.norm1) or refuse(block.norm1_context) or refuse_plain_norms(block.norm2, block.norm2_context)
    return norms or unknown(block, *DOUBLE)


def register_double(name: str, forward: Any, *signatures: list[str]) -> None:
    register(
        Kind(
            name=name,
            ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
            match=lambda m: has(m, *DOUBLE) and has(m.norm1, "norm") and parameters(m) in signatures,
            refuse=refuse_double,
            patches=lambda block: [(block, "forward", forward)],
            absorbs=lambda block: [
                *(block.norm1, block.norm1.norm, block.norm2),
                *(block.norm1_context, block.norm1_context.norm, block.norm2_context),
            ],
            # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3), fused 2 + 4 + 3
            saving=lambda block: 13 * block.norm2.normalized_shape[0] * itemsize(block),
            block=True,
        )
    )


# The single block --------------------------------------------------------------------------------------------------


def single_block(self, x: Tensor, tables: tuple[Tensor, ...], attention: dict[str, Any]) -> Tensor:
    """The joined streams after one block, from its shift, scale and gate; attention: arguments of `self.attn`."""
    shift, scale, gate = tables
    precision = law(self, x, gate)
    h = ops.norm_modulate(x, shift=shift, scale=scale, eps=self.norm.norm.eps, precision=precision)
    attn_output = self.attn(hidden_states=h, **attention)
    y = self.proj_out(torch.cat([attn_output, parallel_mlp(self, h)], dim=2))
    return clip_half(ops.gate_residual(x, y, gate, precision=precision))


def parallel_mlp(block: Any, h: Tensor) -> Tensor:
    """The first half of the MLP beside the attention: GELU, or SwiGLU after a projection twice as wide."""
    h = block.proj_mlp(h)
    if isinstance(block.act_mlp, nn.GELU):
        return ops.activation(h, "gelu_tanh")
    up, gate = h.chunk(2, dim=-1)
    return ops.activation(gate, "silu", up=up)


def single_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    text = encoder_hidden_states.shape[1]
    x = joined_forward(
        self,
        torch.cat([encoder_hidden_states, hidden_states], dim=1),
        temb,
        image_rotary_emb,
        joint_attention_kwargs or attention_kwargs,
    )
    return x[:, :text], x[:, text:]


def joined_forward(
    self,
    hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    tables = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
    attention = dict(image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    return single_block(self, hidden_states, tables, attention)


def chroma_single_forward(
    self,
    hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> Tensor:
    options = dict(image_rotary_emb=image_rotary_emb, attention_mask=outer(attention_mask))
    attention = dict(**options, **(joint_attention_kwargs or {}))
    return single_block(self, hidden_states, temb.unbind(1), attention)


SINGLE = ("norm", "proj_mlp", "act_mlp", "proj_out", "attn", "mlp_hidden_dim")


def refuse_single(block: Any) -> str | None:
    act, gated = block.act_mlp, "split" in reads(type(block).forward)
    gelu = type(act) is nn.GELU and act.approximate == "tanh" and not gated
    if not gelu and not (type(act) is nn.SiLU and gated):
        return "its MLP is neither GELU (tanh) nor SwiGLU"
    tableless = "attention_mask" in parameters(block)
    norm = refuse_tableless(block.norm) if tableless else refuse_adaln(block.norm, 3)
    return norm or unknown(block, *SINGLE)


def single_saving(block: Any) -> int:
    # passes over (tokens, C): eager norm 2, scale 2, shift 2, gate 2, add 3, fused 2 + 3; SwiGLU one product less
    gated = 2 * block.mlp_hidden_dim if isinstance(block.act_mlp, nn.SiLU) else 0
    return (6 * block.norm.norm.normalized_shape[0] + gated) * itemsize(block)


def register_single(name: str, forward: Any, *signatures: list[str]) -> None:
    register(
        Kind(
            name=name,
            ops=("norm_modulate", "activation", "gate_residual"),
            match=lambda m: has(m, *SINGLE) and parameters(m) in signatures,
            refuse=refuse_single,
            patches=lambda block: [(block, "forward", forward)],
            absorbs=lambda block: [block.norm, block.norm.norm, block.act_mlp],
            saving=single_saving,
            block=True,
        )
    )


for function in (double_forward, chroma_double_forward, single_forward, joined_forward, chroma_single_forward):
    function.__name__ = "forward"
register_double("Flux double block", double_forward, *(STREAMS + ROTARY + options for options in OPTIONS))
register_single("Flux single block", single_forward, *(STREAMS + ROTARY + options for options in OPTIONS))
register_single("Flux single block, streams joined", joined_forward, STREAMS[:1] + ROTARY + OPTIONS[0])
register_double("Chroma double block", chroma_double_forward, STREAMS + ROTARY + ["attention_mask"] + OPTIONS[0])
register_single("Chroma single block", chroma_single_forward, STREAMS[:1] + ROTARY + ["attention_mask"] + OPTIONS[0])
