"""diffusers' AuraFlowTransformer2DModel: joint and single block, attention.

    h = n(x + gate_1 * attention(n(x) * (1 + scale_1) + shift_1)) * (1 + scale_2) + shift_2
    x = x + gate_2 * ff(h)                                                        of each stream

Unlike elsewhere the attention's output reaches the stream only through the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_flux_attention import norms_of
from fastdit.integrations.diffusers_processor import Processor, refuse_processor, shared
from fastdit.integrations.diffusers_sd3 import FastditJointAttnProcessor, saving
from fastdit.integrations.joint import (
    Tables,
    adaln_passes,
    adaln_zero,
    open_stream,
    refuse_adaln,
    refuse_plain_norms,
    refuse_qk_norms,
)
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The blocks --------------------------------------------------------------------------------------------------------


def joint_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    x, context = hidden_states, encoder_hidden_states
    image, text = adaln_zero(self.norm1, temb), adaln_zero(self.norm1_context, temb)
    precision = law(self, x, image.gate1)
    attn_output, context_attn_output = self.attn(
        hidden_states=open_stream(x, image, self.norm1.norm, precision),
        encoder_hidden_states=open_stream(context, text, self.norm1_context.norm, precision),
        **(attention_kwargs or {}),
    )
    x = close(x, attn_output, image, self.norm2, self.ff, precision)
    return close(context, context_attn_output, text, self.norm2_context, self.ff_context, precision), x


def single_forward(self, hidden_states: Tensor, temb: Tensor, attention_kwargs: dict[str, Any] | None = None) -> Tensor:
    tables = adaln_zero(self.norm1, temb)
    precision = law(self, hidden_states, tables.gate1)
    h = open_stream(hidden_states, tables, self.norm1.norm, precision)
    attn_output = self.attn(hidden_states=h, **(attention_kwargs or {}))
    return close(hidden_states, attn_output, tables, self.norm2, self.ff, precision)


def close(
    x: Tensor, attn_output: Tensor, tables: Tables, norm: Any, ff: Callable[[Tensor], Tensor], precision: str
) -> Tensor:
    _, h = ops.gate_residual_norm_modulate(
        x,
        attn_output,
        tables.gate1,
        shift=tables.shift2,
        scale=tables.scale2,
        eps=norm.eps,
        precision=precision,
    )
    return ops.gate_residual(x, ff(h), tables.gate2, precision=precision)


joint_forward.__name__ = single_forward.__name__ = "forward"

SINGLE = ("norm1", "attn", "norm2", "ff")
JOINT = (*SINGLE, "norm1_context", "norm2_context", "ff_context")
CALL = ["hidden_states", "temb", "attention_kwargs"]


def register_block(name: str, forward: Callable, parts: tuple[str, ...], call: list[str]) -> None:
    def norms(block: Any) -> tuple[list[Any], list[Any]]:
        return [getattr(block, n) for n in parts if "norm1" in n], [getattr(block, n) for n in parts if "norm2" in n]

    def refuse(block: Any) -> str | None:
        first, second = norms(block)
        reasons = (*(refuse_adaln(norm) for norm in first), refuse_plain_norms(*second), unknown(block, *parts))
        return next((reason for reason in reasons if reason is not None), None)

    def absorbs(block: Any) -> list[Any]:
        first, second = norms(block)
        return [*first, *(norm.norm for norm in first), *second]

    register(
        Kind(
            name=name,
            ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
            match=lambda m: has(m, *parts) and parameters(m) == call and has(m.ff, "out_projection"),
            refuse=refuse,
            patches=lambda block: [(block, "forward", forward)],
            absorbs=absorbs,
            saving=lambda m: adaln_passes(itemsize(m)) * m.norm2.normalized_shape[0] * itemsize(m),
            block=True,
        )
    )


register_block("AuraFlow joint block", joint_forward, JOINT, [CALL[0], "encoder_hidden_states", *CALL[1:]])
register_block("AuraFlow single block", single_forward, SINGLE, CALL)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditAuraFlowAttnProcessor(FastditJointAttnProcessor):
    """AuraFlowAttnProcessor2_0, with text first: keys have no order, and without positions neither have tokens."""

    def __init__(self):
        from diffusers.models.attention_processor import AuraFlowAttnProcessor2_0

        Processor.__init__(self, AuraFlowAttnProcessor2_0())


def refuse_attention(attn: Any) -> str | None:
    if attn.scale != (attn.inner_dim // attn.heads) ** -0.5:
        return "its scale is not that of its head dim"
    return refuse_qk_norms(*norms_of(attn))


register(
    Kind(
        name="attention (AuraFlowAttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_out", "norm_q", "norm_added_q", "added_kv_proj_dim", "inner_dim", "heads", "scale")
            and refuse_processor(getattr(m, "processor", None), "AuraFlowAttnProcessor2_0") is None
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditAuraFlowAttnProcessor))],
        absorbs=norms_of,
        saving=saving,
        part=True,
    )
)
