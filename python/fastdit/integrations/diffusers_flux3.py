"""diffusers' Flux3Transformer2DModel: blocks whose attention and MLP read the same modulated tokens, side by side.

    x = x + gate * (attention(h) + ff(h)),    h = n(x) * (1 + scale) + shift

Modulation comes per token, but the model expands one row of a sample over all tokens of a stream. Layers that make
tables of such rows make them once, and the expanded tables are read as the single row that they are. Those of the image
are dense all the same: its rows go through a SiLU after they were expanded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_flux_attention import is_processor, pairs
from fastdit.integrations.diffusers_processor import Processor, refuse_choice, shared
from fastdit.integrations.joint import (
    Stream,
    joint_attention,
    projections,
    refuse_plain_norms,
    refuse_qk_norms,
    rotation_passes,
)
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, reads, unknown

# Tables of tokens --------------------------------------------------------------------------------------------------


def once(temb: Tensor) -> Tensor:
    """(B, N, C) -> (B, 1, C) where all tokens of a sample are one row in memory, as `expand` makes them."""
    return temb[:, :1] if temb.stride(1) == 0 else temb


def modulation_forward(self, temb: Tensor) -> Tensor:
    return self.linear(once(temb)).expand(-1, temb.shape[1], -1)


def norm_out_forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
    scale, shift = self.linear(self.act_fn(once(temb))).chunk(2, dim=-1)
    precision = law(self, hidden_states, scale)
    return ops.norm_modulate(hidden_states, shift=shift, scale=scale, eps=self.norm.eps, precision=precision)


register(
    Kind(
        name="modulation of tokens (Flux.3)",
        ops=("norm_modulate",),
        match=lambda m: has(m, "linear") and parameters(m) == ["temb"] and reads(type(m).forward) == {"linear"},
        refuse=lambda m: unknown(m, "linear"),
        patches=lambda m: [(m, "forward", modulation_forward)],
        saving=lambda m: 3 * m.linear.in_features * itemsize(m),  # of text and references: tables that are not written
    )
)
register(
    Kind(
        name="output norm (Flux.3)",
        ops=("norm_modulate",),
        match=lambda m: (
            has(m, "linear", "norm", "act_fn")  # the last: models of diffusers warn where it is in their config
            and parameters(m) == ["hidden_states", "temb"]
            and reads(type(m).forward) == {"linear", "act_fn", "torch", "chunk", "norm"}
        ),
        refuse=lambda m: (
            f"its activation is {type(m.act_fn).__name__}, not SiLU"
            if type(m.act_fn) is not nn.SiLU
            else refuse_plain_norms(m.norm) or unknown(m, "act_fn", "linear", "norm")
        ),
        patches=lambda m: [(m, "forward", norm_out_forward)],
        absorbs=lambda m: [m.norm],
        # passes over (tokens, C): norm 2, scale 3, shift 3, and the tables 2 against 2
        saving=lambda m: 8 * m.norm.normalized_shape[0] * itemsize(m),
    )
)


# The blocks --------------------------------------------------------------------------------------------------------


def mode_forward(self, hidden_states: Tensor, temb_mod: Tensor, image_rotary_emb: tuple[Tensor, Tensor]) -> Tensor:
    h, gate = modulated(self, hidden_states, temb_mod)
    y = self.attn(hidden_states=h, image_rotary_emb=image_rotary_emb) + self.ff(h)
    return ops.gate_residual(hidden_states, y, gate, precision=law(self, hidden_states, gate))


def joint_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb_mod: Tensor,
    temb_mod_context: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor]:
    x, context = hidden_states, encoder_hidden_states
    (h, gate), (c, c_gate) = modulated(self, x, temb_mod), modulated(self, context, temb_mod_context)
    both, precision = torch.cat([c, h], dim=1), law(self, x, gate)
    y = self.attn(hidden_states=both, image_rotary_emb=image_rotary_emb) + self.ff(both)
    text, content = y.split([context.shape[1], x.shape[1]], dim=1)
    context = ops.gate_residual(context, text, c_gate, precision=precision)
    return context, ops.gate_residual(x, content, gate, precision=precision)


def modulated(block: Any, x: Tensor, temb_mod: Tensor) -> tuple[Tensor, Tensor]:
    """What enters attention and MLP, and the gate of what leaves them."""
    shift, scale, gate = once(temb_mod).chunk(3, dim=-1)
    return ops.norm_modulate(x, shift=shift, scale=scale, eps=block.norm.eps, precision=law(block, x, scale)), gate


for function in (modulation_forward, norm_out_forward, mode_forward, joint_forward):
    function.__name__ = "forward"

BLOCK = ("norm", "attn", "ff")


def register_block(name: str, forward: Any, call: list[str]) -> None:
    register(
        Kind(
            name=name,
            ops=("norm_modulate", "gate_residual"),
            match=lambda m: has(m, *BLOCK) and parameters(m) == call,
            refuse=lambda m: refuse_plain_norms(m.norm) or unknown(m, *BLOCK),
            patches=lambda block: [(block, "forward", forward)],
            absorbs=lambda block: [block.norm],
            # passes over (tokens, C): norm 2, scale 3, shift 3, gate 3, add 3, with a row per token, fused 2 + 3
            saving=lambda block: 9 * block.norm.normalized_shape[0] * itemsize(block),
            block=True,
        )
    )


register_block("Flux.3 block of one stream", mode_forward, ["hidden_states", "temb_mod", "image_rotary_emb"])
register_block(
    "Flux.3 joint block",
    joint_forward,
    ["hidden_states", "encoder_hidden_states", "temb_mod", "temb_mod_context", "image_rotary_emb"],
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditFlux3AttnProcessor(Processor):
    """Flux3AttnProcessor, whose norm and rotation stay in fp32 together; a mask keeps diffusers' attention."""

    def __init__(self):
        from diffusers.models.transformers.transformer_flux3 import Flux3AttnProcessor

        super().__init__(Flux3AttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        cos, sin = (None, None) if image_rotary_emb is None else pairs(*image_rotary_emb)
        stream = Stream(*projections(attn, hidden_states), attn.norm_q, attn.norm_k, cos, sin)
        return attn.to_out[1](attn.to_out[0](joint_attention(stream, attn_mask=attention_mask)[0]))


READS = frozenset(
    "_get_qkv_projections unflatten heads norm_q float norm_k apply_rotary_emb to dtype dispatch_attention_fn "
    "_attention_backend _parallel_config flatten to_out".split()
)

register(
    Kind(
        name="attention (Flux3AttnProcessor)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", "inner_dim", "processor")
            and is_processor(m.processor, READS, frozenset())
        ),
        refuse=lambda attn: refuse_choice(attn.processor) or refuse_qk_norms(attn.norm_q, attn.norm_k),
        patches=lambda attn: [(attn, "processor", shared(FastditFlux3AttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        saving=lambda attn: rotation_passes(itemsize(attn)) * attn.inner_dim * itemsize(attn),
        part=True,
    )
)
