"""diffusers' FluxTransformer2DModel and its kin (Bria, LongCat-Image, Ovis-Image): the double and the single block."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.joint import (
    adaln_zero,
    clip_half,
    close_stream,
    open_stream,
    refuse_adaln,
    refuse_plain_norms,
)
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, reads, unknown

# The double block --------------------------------------------------------------------------------------------------


def double_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    image, text = adaln_zero(self.norm1, temb), adaln_zero(self.norm1_context, temb)
    precision = law(self, hidden_states, image.gate1)
    attn_output, context_attn_output, *ip_attn_output = self.attn(
        hidden_states=open_stream(hidden_states, image, self.norm1.norm, precision),
        encoder_hidden_states=open_stream(encoder_hidden_states, text, self.norm1_context.norm, precision),
        image_rotary_emb=image_rotary_emb,
        **(joint_attention_kwargs or {}),
    )
    x = close_stream(hidden_states, attn_output, image, self.norm2, self.ff, precision)
    context = close_stream(
        encoder_hidden_states, context_attn_output, text, self.norm2_context, self.ff_context, precision
    )
    return clip_half(context), x + ip_attn_output[0] if ip_attn_output else x


DOUBLE = ("norm1", "norm1_context", "attn", "norm2", "ff", "norm2_context", "ff_context")


def matches_double(module: Any) -> bool:
    return has(module, *DOUBLE) and parameters(module) in (
        ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs"],
        ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "attention_kwargs"],
    )


def refuse_double(block: Any) -> str | None:
    return (
        refuse_adaln(block.norm1)
        or refuse_adaln(block.norm1_context)
        or refuse_plain_norms(block.norm2, block.norm2_context)
        or unknown(block, *DOUBLE)
    )


def absorbed_by_double(block: Any) -> list[nn.Module]:
    return [block.norm1, block.norm1.norm, block.norm1_context, block.norm1_context.norm,
            block.norm2, block.norm2_context]  # fmt: skip


register(
    Kind(
        name="Flux double block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=matches_double,
        refuse=refuse_double,
        patches=lambda block: [(block, "forward", double_forward)],
        absorbs=absorbed_by_double,
        # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3 = 9
        saving=lambda block: 13 * block.norm2.normalized_shape[0] * itemsize(block),
        block=True,
    )
)


# The single block --------------------------------------------------------------------------------------------------


def single_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    text = encoder_hidden_states.shape[1]
    hidden_states = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    shift, scale, gate = self.norm.linear(self.norm.silu(temb)).chunk(3, dim=1)
    precision = law(self, hidden_states, gate)
    h = ops.norm_modulate(hidden_states, shift=shift, scale=scale, eps=self.norm.norm.eps, precision=precision)
    attn_output = self.attn(hidden_states=h, image_rotary_emb=image_rotary_emb, **(joint_attention_kwargs or {}))
    y = self.proj_out(torch.cat([attn_output, parallel_mlp(self, h)], dim=2))
    x = clip_half(ops.gate_residual(hidden_states, y, gate, precision=precision))
    return x[:, :text], x[:, text:]


def parallel_mlp(block: Any, h: Tensor) -> Tensor:
    """The first half of the MLP beside the attention: GELU, or SwiGLU after a projection twice as wide."""
    h = block.proj_mlp(h)
    if isinstance(block.act_mlp, nn.GELU):
        return ops.activation(h, "gelu_tanh")
    up, gate = h.chunk(2, dim=-1)
    return ops.activation(gate, "silu", up=up)


SINGLE = ("norm", "proj_mlp", "act_mlp", "proj_out", "attn", "mlp_hidden_dim")


def matches_single(module: Any) -> bool:
    return has(module, *SINGLE) and parameters(module) in (
        ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs"],
        ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "attention_kwargs"],
    )


def refuse_parallel_mlp(block: Any) -> str | None:
    act, gated = block.act_mlp, "split" in reads(type(block).forward)
    plain = type(act) is nn.GELU and act.approximate == "tanh" and not gated
    return None if plain or (type(act) is nn.SiLU and gated) else "its MLP is neither GELU (tanh) nor SwiGLU"


register(
    Kind(
        name="Flux single block",
        ops=("norm_modulate", "activation", "gate_residual"),
        match=matches_single,
        refuse=lambda block: refuse_adaln(block.norm, 3) or refuse_parallel_mlp(block) or unknown(block, *SINGLE),
        patches=lambda block: [(block, "forward", single_forward)],
        absorbs=lambda block: [block.norm, block.norm.norm, block.act_mlp],
        # passes over (tokens, C): eager norm 2, scale 2, shift 2, gate 2, add 3, fused 2 + 3; SwiGLU's product 3 less 1
        saving=lambda block: (
            itemsize(block)
            * (
                6 * block.norm.norm.normalized_shape[0]
                + (2 * block.mlp_hidden_dim if isinstance(block.act_mlp, nn.SiLU) else 0)
            )
        ),
        block=True,
    )
)
double_forward.__name__ = single_forward.__name__ = "forward"
