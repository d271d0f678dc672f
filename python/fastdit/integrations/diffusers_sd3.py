"""diffusers' SD3Transformer2DModel (SD3, SD3.5) and its ControlNets: joint block, single block, attention."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_flux_attention import is_processor, norms_of
from fastdit.integrations.diffusers_processor import Processor, shared
from fastdit.integrations.joint import (
    Stream,
    Tables,
    adaln_zero,
    close_stream,
    joint_attention,
    open_stream,
    projections,
    refuse_adaln,
    refuse_plain_norms,
    refuse_qk_norms,
    text_projections,
)
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The blocks --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor | None, Tensor]:
    if self._chunk_size is not None:
        return original(self, hidden_states, encoder_hidden_states, temb, joint_attention_kwargs)
    options, x = joint_attention_kwargs or {}, hidden_states
    tables = self.norm1.linear(self.norm1.silu(temb)).chunk(9 if self.use_dual_attention else 6, dim=1)
    image, norm = Tables(*tables[:6]), self.norm1.norm
    precision = law(self, x, image.gate1)
    if self.context_pre_only:
        h_context = self.norm1_context(encoder_hidden_states, temb)
    else:
        text = adaln_zero(self.norm1_context, temb)
        text_precision = law(self, encoder_hidden_states, text.gate1)
        h_context = open_stream(encoder_hidden_states, text, self.norm1_context.norm, text_precision)
    attn_output, context_attn_output = self.attn(
        hidden_states=open_stream(x, image, norm, precision), encoder_hidden_states=h_context, **options
    )
    if self.use_dual_attention:
        shift, scale, gate = tables[6:]
        h = ops.norm_modulate(x, shift=shift, scale=scale, eps=norm.eps, precision=precision)
        x = ops.gate_residual(x, attn_output, image.gate1, precision=precision)
        attn_output, image = self.attn2(hidden_states=h, **options), image._replace(gate1=gate)
    x = close_stream(x, attn_output, image, self.norm2, self.ff, precision)
    if self.context_pre_only:
        return None, x
    context = close_stream(
        encoder_hidden_states, context_attn_output, text, self.norm2_context, self.ff_context, text_precision
    )
    return context, x


def single_forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
    tables = adaln_zero(self.norm1, temb)
    precision = law(self, hidden_states, tables.gate1)
    h = open_stream(hidden_states, tables, self.norm1.norm, precision)
    attn_output = self.attn(hidden_states=h, encoder_hidden_states=None)
    return close_stream(hidden_states, attn_output, tables, self.norm2, self.ff, precision)


block_forward.__name__ = single_forward.__name__ = "forward"

SINGLE = ("norm1", "attn", "norm2", "ff")
BLOCK = (*SINGLE, "norm1_context", "attn2", "norm2_context", "ff_context", "use_dual_attention", "context_pre_only")


def refuse_block(block: Any) -> str | None:
    reason = refuse_adaln(block.norm1, 9 if block.use_dual_attention else 6) or refuse_plain_norms(block.norm2)
    if not block.context_pre_only:
        reason = reason or refuse_adaln(block.norm1_context) or refuse_plain_norms(block.norm2_context)
    return reason or unknown(block, *BLOCK)


def absorbed_by_block(block: Any) -> list[Any]:
    text = [] if block.context_pre_only else [block.norm1_context, block.norm1_context.norm, block.norm2_context]
    return [block.norm1, block.norm1.norm, block.norm2, *text]


register(
    Kind(
        name="SD3 joint block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: (
            has(m, *BLOCK)
            and parameters(m) == ["hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs"]
        ),
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=absorbed_by_block,
        # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3 = 9; a
        # second attention adds scale 2, shift 2, gate 2, add 3 = 9, fused 2 + 3
        saving=lambda block: (
            (17 if block.use_dual_attention else 13) * block.norm2.normalized_shape[0] * itemsize(block)
        ),
        block=True,
    )
)
register(
    Kind(
        name="SD3 single block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *SINGLE) and parameters(m) == ["hidden_states", "temb"] and has(m.attn, "processor"),
        refuse=lambda m: refuse_adaln(m.norm1) or refuse_plain_norms(m.norm2) or unknown(m, *SINGLE),
        patches=lambda block: [(block, "forward", single_forward)],
        absorbs=lambda block: [block.norm1, block.norm1.norm, block.norm2],
        saving=lambda block: 13 * block.norm2.normalized_shape[0] * itemsize(block),
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditJointAttnProcessor(Processor):
    """JointAttnProcessor2_0 with `qk_norm_rope` and `attention`; like it, blind to masks."""

    def __init__(self):
        from diffusers.models.attention_processor import JointAttnProcessor2_0

        super().__init__(JointAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        streams = [Stream(*projections(attn, hidden_states), attn.norm_q, attn.norm_k)]
        if encoder_hidden_states is not None:
            text = text_projections(attn, encoder_hidden_states)
            streams.append(Stream(*text, attn.norm_added_q, attn.norm_added_k))
        x, *context = joint_attention(*streams)
        x = attn.to_out[1](attn.to_out[0](x))
        if not context:
            return x
        return x, context[0] if attn.context_pre_only else attn.to_add_out(context[0])


READS = frozenset(
    "shape to_q to_k to_v heads view transpose norm_q norm_k add_q_proj add_k_proj add_v_proj norm_added_q "
    "norm_added_k torch cat F scaled_dot_product_attention reshape to dtype context_pre_only to_add_out to_out".split()
)


def saving(attn: Any) -> int:
    # passes over (tokens, C) for q and k: the norm's six operations, with casts in two bytes, against 2
    passes = 0 if attn.norm_q is None else 2 * ((17 if itemsize(attn) == 2 else 7) - 2)
    return passes * attn.inner_dim * itemsize(attn)


register(
    Kind(
        name="attention (JointAttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(
                m, "to_q", "add_q_proj", "to_out", "norm_added_q", "inner_dim", "heads", "processor", "context_pre_only"
            )
            and is_processor(m.processor, READS, frozenset())
        ),
        refuse=lambda attn: refuse_qk_norms(*norms_of(attn)),
        patches=lambda attn: [(attn, "processor", shared(FastditJointAttnProcessor))],
        absorbs=norms_of,
        saving=saving,
        part=True,
    )
)
