"""diffusers' CogVideoXTransformer3DModel (1.0, 1.5) and ConsisID: the block, its attention, the output norm.

Video and text are two streams with rows of their own in one modulation table; the affine LayerNorms serve both.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_flux_attention import pairs
from fastdit.integrations.diffusers_processor import Processor, shared
from fastdit.integrations.joint import (
    Stream,
    affine,
    is_layer_norm,
    joint_attention,
    projections,
    refuse_qk_norms,
    rotation_passes,
)
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block --------------------------------------------------------------------------------------------------------


class Half(NamedTuple):
    """A stream between its attention and the end of its MLP: x, what enters the MLP, the gate of what leaves it."""

    x: Tensor
    h: Tensor
    gate: Tensor


def attended(self, x: Tensor, context: Tensor, temb: Tensor, attention: dict[str, Any]) -> tuple[Half, Half, str]:
    """Video and text up to the MLP, and the rounding law; attention: further arguments of `self.attn1`."""
    (shift, scale, gate), (c_shift, c_scale, c_gate) = tables(self.norm1, temb)
    precision = law(self, x, gate, self.norm1.norm.weight)
    first, second = affine(self.norm1.norm, precision), affine(self.norm2.norm, precision)

    a, c = self.attn1(
        hidden_states=ops.norm_modulate(x, shift=shift, scale=scale, **first),
        encoder_hidden_states=ops.norm_modulate(context, shift=c_shift, scale=c_scale, **first),
        **attention,
    )
    (shift, scale, ff_gate), (c_shift, c_scale, c_ff_gate) = tables(self.norm2, temb)
    x, h = ops.gate_residual_norm_modulate(x, a, gate, shift=shift, scale=scale, **second)
    c, ch = ops.gate_residual_norm_modulate(context, c, c_gate, shift=c_shift, scale=c_scale, **second)
    return Half(x, h, ff_gate), Half(c, ch, c_ff_gate), precision


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    text = encoder_hidden_states.shape[1]
    attention = dict(image_rotary_emb=image_rotary_emb, **(attention_kwargs or {}))
    video, context, precision = attended(self, hidden_states, encoder_hidden_states, temb, attention)
    y = self.ff(torch.cat([context.h, video.h], dim=1))
    x = ops.gate_residual(video.x, y[:, text:], video.gate, precision=precision)
    return x, ops.gate_residual(context.x, y[:, :text], context.gate, precision=precision)


block_forward.__name__ = "forward"


def tables(zero: Any, temb: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(shift, scale, gate) of the video and of the text, each (B, C)."""
    rows = zero.linear(zero.silu(temb)).chunk(6, dim=1)
    return rows[:3], rows[3:]


BLOCK = ("norm1", "attn1", "norm2", "ff")
SIGNATURE = ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"]


def is_block(module: Any) -> bool:
    return has(module, *BLOCK) and all(has(m, "silu", "linear", "norm") for m in (module.norm1, module.norm2))


def refuse_block(block: Any, *more: str) -> str | None:
    """`more` are the children that this kind of block has besides CogVideoX's."""
    for zero in (block.norm1, block.norm2):
        if not is_layer_norm(zero.norm):
            return f"its norm is a {type(zero.norm).__name__}, not a LayerNorm"
        if why := unknown(zero, "silu", "linear", "norm"):
            return why
    return unknown(block, *BLOCK, *more)


def absorbed_by_block(block: Any) -> list[Any]:
    return [m for zero in (block.norm1, block.norm2) for m in (zero, zero.norm)]


register(
    Kind(
        name="CogVideoX block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: (
            is_block(m)
            and not hasattr(m, "txt_ff")  # EasyAnimate's
            and parameters(m) in (SIGNATURE, [*SIGNATURE, "attention_kwargs"])
        ),
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=absorbed_by_block,
        # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3 = 9
        saving=lambda block: 13 * block.norm1.norm.normalized_shape[0] * itemsize(block),
        block=True,
    )
)


# Attention --------------------------------------------------------------------------------------------------------


class FastditCogVideoXAttnProcessor(Processor):
    """CogVideoXAttnProcessor2_0 with `qk_norm_rope` and `attention` over [text, video]; masks go to the original."""

    def __init__(self):
        from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0

        super().__init__(CogVideoXAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        if attention_mask is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        cos, sin = (None, None) if image_rotary_emb is None else pairs(*image_rotary_emb)
        return text_first(attn, hidden_states, encoder_hidden_states, cos, sin)


def joined(
    attn: Any, x: Tensor, context: Tensor, cos: Tensor | None, sin: Tensor | None, layout: str = "interleaved"
) -> Tensor:
    """One attention over [text, x] by the same layers, of which x rotates."""
    both = torch.cat([context, x], dim=1)
    norms = attn.norm_q, attn.norm_k
    return joint_attention(Stream(*projections(attn, both), *norms, cos, sin, layout, start=context.shape[1]))[0]


def text_first(
    attn: Any, x: Tensor, context: Tensor, cos: Tensor | None, sin: Tensor | None, layout: str = "interleaved"
) -> tuple[Tensor, Tensor]:
    """`joined` and the output layers: what x gets, and what the text gets."""
    text = context.shape[1]
    o = attn.to_out[1](attn.to_out[0](joined(attn, x, context, cos, sin, layout)))
    return o[:, text:], o[:, :text]


PROCESSORS = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")


def refuse_attention(attn: Any) -> str | None:
    return "it is a cross-attention" if attn.is_cross_attention else refuse_qk_norms(attn.norm_q, attn.norm_k)


register(
    Kind(
        name="attention (CogVideoXAttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "heads", "processor", "norm_q", "norm_k", "is_cross_attention")
            and type(m.processor).__name__ in PROCESSORS
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditCogVideoXAttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        saving=lambda attn: rotation_passes(itemsize(attn)) * attn.inner_dim * itemsize(attn),
        part=True,
    )
)


# The output norm --------------------------------------------------------------------------------------------------


def output_norm_forward(self, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
    shift, scale = self.linear(self.silu(temb)).chunk(2, dim=1)
    return ops.norm_modulate(x, shift=shift, scale=scale, **affine(self.norm, law(self, x, scale, self.norm.weight)))


output_norm_forward.__name__ = "forward"


def refuse_output_norm(module: Any) -> str | None:
    if module.emb is not None or module.chunk_dim != 1:
        return "its table is an embedding, or has one row for all samples"
    if type(module.norm) is not nn.LayerNorm:
        return f"its norm is a {type(module.norm).__name__}, not a LayerNorm"
    return unknown(module, "silu", "linear", "norm", "emb", "chunk_dim")


register(
    Kind(
        name="output norm (AdaLayerNorm)",
        ops=("norm_modulate",),
        match=lambda m: has(m, "emb", "silu", "linear", "norm", "chunk_dim"),
        refuse=refuse_output_norm,
        patches=lambda module: [(module, "forward", output_norm_forward)],
        absorbs=lambda module: [module.norm],
        # passes over (tokens, C): norm 2, scale 2, shift 2 against 2
        saving=lambda module: 4 * module.norm.normalized_shape[0] * itemsize(module),
    )
)
