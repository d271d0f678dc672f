"""diffusers' Lumina2Transformer2DModel (Lumina-Image 2.0): block, attention with grouped queries, output layer."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit import ops
from fastdit.integrations.diffusers_flux_attention import is_processor
from fastdit.integrations.diffusers_processor import Processor, refuse_choice, shared
from fastdit.integrations.joint import (
    Stream,
    complex_rotation_saving,
    joint_attention,
    plain,
    projections,
    refuse_plain_norms,
    refuse_qk_norms,
)
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.sandwich import refuse_modulation, refuse_norms, sandwich_block, saving
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block ---------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    attention_mask: Tensor | None,
    image_rotary_emb: Tensor,
    temb: Tensor | None = None,
) -> Tensor:
    if hidden_states.dtype != self.norm2.weight.dtype:
        return original(self, hidden_states, attention_mask, image_rotary_emb, temb)
    tables = self.norm1.linear(self.norm1.silu(temb)) if self.modulation else None

    def attend(h: Tensor) -> Tensor:
        return self.attn(
            hidden_states=h,
            encoder_hidden_states=h,
            attention_mask=attention_mask,
            image_rotary_emb=image_rotary_emb,
        )

    return sandwich_block(self, hidden_states, norms_of(self), attend, self.feed_forward, tables)


BLOCK = ("attn", "feed_forward", "norm1", "norm2", "ffn_norm1", "ffn_norm2", "modulation")


def norms_of(block: Any) -> list[Any]:
    return [plain(block.norm1), block.norm2, block.ffn_norm1, block.ffn_norm2]


def refuse_block(block: Any) -> str | None:
    reason = refuse_modulation(block.norm1) if block.modulation else None
    return reason or refuse_norms(*norms_of(block)) or unknown(block, *BLOCK)


register(
    Kind(
        name="Lumina 2 block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: (
            has(m, *BLOCK) and parameters(m) == ["hidden_states", "attention_mask", "image_rotary_emb", "temb"]
        ),
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.norm1, *norms_of(block)],
        saving=lambda block: saving(block, block.norm2.weight.numel(), block.modulation),
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditLumina2AttnProcessor(Processor):
    """Lumina2AttnProcessor2_0 with `qk_norm_rope` and `attention`: no repeated keys, masks as key lengths."""

    def __init__(self):
        from diffusers.models.transformers.transformer_lumina2 import Lumina2AttnProcessor2_0

        super().__init__(Lumina2AttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        base_sequence_length: int | None = None,
    ) -> Tensor:
        if base_sequence_length is not None or encoder_hidden_states is not hidden_states:
            return self.original(
                attn,
                hidden_states,
                encoder_hidden_states,
                attention_mask,
                image_rotary_emb,
                base_sequence_length,
            )
        cos = sin = None
        if image_rotary_emb is not None:  # in fp64
            cos, sin = (part.unsqueeze(2).float() for part in (image_rotary_emb.real, image_rotary_emb.imag))
        stream = Stream(*projections(attn, hidden_states), attn.norm_q, attn.norm_k, cos, sin)
        valid = None if attention_mask is None else attention_mask.view(hidden_states.shape[0], -1)
        (o,) = joint_attention(stream, key_mask=valid)
        return attn.to_out[1](attn.to_out[0](o))


READS = frozenset(
    "shape to_q to_k to_v heads dtype view norm_q norm_k apply_rotary_emb to math sqrt log scale unsqueeze repeat "
    "flatten bool transpose F scaled_dot_product_attention reshape type_as to_out".split()
)


def refuse_attention(attn: Any) -> str | None:
    if not attn.scale_qk:
        return "its scale is not that of its head"
    return refuse_choice(attn.processor) or refuse_qk_norms(attn.norm_q, attn.norm_k)


register(
    Kind(
        name="attention (Lumina2AttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "norm_q", "scale_qk", "heads", "processor")
            and is_processor(m.processor, READS, frozenset())
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditLumina2AttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        saving=complex_rotation_saving,
        part=True,
    )
)


# The output layer --------------------------------------------------------------------------------------------------


def norm_out_forward(self, x: Tensor, conditioning_embedding: Tensor) -> Tensor:
    scale = self.linear_1(self.silu(conditioning_embedding).to(x.dtype))
    h = ops.norm_modulate(x, scale=scale, eps=self.norm.eps, precision=law(self, x, scale))
    return h if self.linear_2 is None else self.linear_2(h)


block_forward.__name__ = norm_out_forward.__name__ = "forward"

register(
    Kind(
        name="output norm (LuminaLayerNormContinuous)",
        ops=("norm_modulate",),
        match=lambda m: (
            has(m, "silu", "linear_1", "norm", "linear_2") and parameters(m) == ["x", "conditioning_embedding"]
        ),
        refuse=lambda m: refuse_plain_norms(m.norm) or unknown(m, "silu", "linear_1", "norm", "linear_2"),
        patches=lambda m: [(m, "forward", norm_out_forward)],
        absorbs=lambda m: [m.norm],
        saving=lambda m: 2 * m.linear_1.out_features * itemsize(m),  # norm 2, scale 2 against 2
    )
)
