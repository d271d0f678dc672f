"""diffusers' Krea2Transformer2DModel: the block, the blocks that fuse the text, the attention, the output layer.

Norms are zero-centred, n(x) * (1 + weight), with weights in fp32; fewer key heads; a sigmoid gate on the attention.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import ops
from fastdit.integrations.adaln_single import refuse_table
from fastdit.integrations.diffusers_flux_attention import is_processor, pairs
from fastdit.integrations.diffusers_processor import Processor, refuse_choice, shared
from fastdit.integrations.joint import adaln_passes, rotation_passes
from fastdit.integrations.masks import is_key_mask, valid_first
from fastdit.integrations.probe import follows, numbers
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# Norms -------------------------------------------------------------------------------------------------------------


def is_zero_centred(norm: Any) -> bool:
    if not has(norm, "weight", "eps", "dim"):
        return False
    x, weight = numbers(2, norm.dim), numbers(norm.dim, seed=1)
    return follows(norm, dict(weight=weight), (x,), F.rms_norm(x, (norm.dim,), weight + 1.0, norm.eps))


def refuse_norms(*norms: Any) -> str | None:
    for norm in norms:
        if not is_zero_centred(norm):
            return f"its norm is a {type(norm).__name__}, not a zero-centred RMSNorm"
    return None


def centred(norm: Any, precision: str) -> dict[str, Any]:
    return dict(weight=norm.weight, weight_offset=1.0, norm="rms", eps=norm.eps, precision=precision)


# The blocks --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
) -> Tensor:
    x, tables = hidden_states, temb.unflatten(-1, (6, -1)) + self.scale_shift_table
    scale, shift, gate, ff_scale, ff_shift, ff_gate = tables.unbind(-2)
    precision = law(self, x, tables, self.norm1.weight)
    first, second = centred(self.norm1, precision), centred(self.norm2, precision)
    h = ops.norm_modulate(x, shift=shift, scale=scale, **first)
    y = self.attn(h, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)
    x, h = ops.gate_residual_norm_modulate(x, y, gate, shift=ff_shift, scale=ff_scale, **second)
    return ops.gate_residual(x, self.ff(h), ff_gate, precision=law(self, x, tables))


def text_forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    weight = self.norm1.weight
    h = ops.norm_modulate(hidden_states, **centred(self.norm1, law(self, hidden_states, weight)))
    y = self.attn(h, attention_mask=attention_mask)
    x, h = ops.gate_residual_norm_modulate(hidden_states, y, **centred(self.norm2, law(self, hidden_states, y, weight)))
    return x + self.ff(h)


def final_forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
    scale, shift = (temb + self.scale_shift_table).chunk(2, dim=1)
    common = centred(self.norm, law(self, hidden_states, scale, self.norm.weight))
    return self.linear(ops.norm_modulate(hidden_states, shift=shift, scale=scale, **common))


for function in (block_forward, text_forward, final_forward):
    function.__name__ = "forward"

TEXT = ("norm1", "norm2", "attn", "ff")
BLOCK = (*TEXT, "scale_shift_table")
FINAL = ("norm", "linear", "scale_shift_table")

register(
    Kind(
        name="Krea 2 block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: (
            has(m, *BLOCK) and parameters(m) == ["hidden_states", "temb", "image_rotary_emb", "attention_mask"]
        ),
        refuse=lambda m: refuse_norms(m.norm1, m.norm2) or refuse_table(m) or unknown(m, *BLOCK),
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.norm1, block.norm2],
        saving=lambda block: adaln_passes(itemsize(block)) * block.norm1.dim * itemsize(block),
        block=True,
    )
)
register(
    Kind(
        name="Krea 2 text block",
        ops=("norm_modulate", "gate_residual_norm_modulate"),
        match=lambda m: has(m, *TEXT) and parameters(m) == ["hidden_states", "attention_mask"],
        refuse=lambda m: refuse_norms(m.norm1, m.norm2) or unknown(m, *TEXT),
        patches=lambda block: [(block, "forward", text_forward)],
        absorbs=lambda block: [block.norm1, block.norm2],
        # as above without modulation, 26 or 10, fused 2 + 4 and a sum 3
        saving=lambda block: (17 if itemsize(block) == 2 else 1) * block.norm1.dim * itemsize(block),
        block=True,
    )
)
register(
    Kind(
        name="Krea 2 output layer (norm, modulation)",
        ops=("norm_modulate",),
        match=lambda m: has(m, *FINAL) and parameters(m) == ["hidden_states", "temb"] and is_zero_centred(m.norm),
        refuse=lambda m: unknown(m, *FINAL),
        patches=lambda m: [(m, "forward", final_forward)],
        absorbs=lambda m: [m.norm],
        saving=lambda m: (12 if itemsize(m) == 2 else 4) * m.norm.dim * itemsize(m),
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditKrea2AttnProcessor(Processor):
    """Krea2AttnProcessor with `qk_norm_rope` and `attention`: key heads are not repeated, masks become key lengths.

    The model's masks, (B, 1, 1, N) of booleans, say which keys there are; any other goes to the original.
    """

    def __init__(self):
        from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor

        super().__init__(Krea2AttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None and not is_key_mask(attention_mask):
            return self.original(attn, hidden_states, attention_mask, image_rotary_emb)
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, attn.head_dim)) for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        cos, sin = (None, None) if image_rotary_emb is None else pairs(*image_rotary_emb)
        q_weight, k_weight = attn.norm_q.weight + 1.0, attn.norm_k.weight + 1.0
        q, k = ops.qk_norm_rope(
            q, k, q_weight=q_weight, k_weight=k_weight, norm="rms", eps=attn.norm_q.eps, cos=cos, sin=sin
        )
        lengths = None
        if attention_mask is not None:
            lengths, k, v = valid_first(attention_mask.flatten(1), k, v)
        o = ops.attention(q, k, v, kv_len=lengths).flatten(2)
        return attn.to_out[0](o * torch.sigmoid(attn.to_gate(hidden_states)))


READS = frozenset(
    "to_q unflatten num_heads head_dim to_k num_kv_heads to_v to_gate norm_q norm_k apply_rotary_emb repeat_interleave "
    "dispatch_attention_fn _attention_backend _parallel_config flatten torch sigmoid to_out".split()
)


def refuse_attention(attn: Any) -> str | None:
    if attn.norm_q.eps != attn.norm_k.eps:
        return "its query and key norms differ"
    return refuse_choice(attn.processor) or refuse_norms(attn.norm_q, attn.norm_k)


register(
    Kind(
        name="attention (Krea2AttnProcessor)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_gate", "to_out", "norm_q", "norm_k", "head_dim", "processor")
            and is_processor(m.processor, READS, frozenset())
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditKrea2AttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        # of queries and keys together, and the repeated keys and values, which are not written
        saving=lambda attn: (
            (
                rotation_passes(itemsize(attn)) * (attn.num_heads + attn.num_kv_heads) // 2
                + 2 * (attn.num_heads if attn.num_heads > attn.num_kv_heads else 0)
            )
            * attn.head_dim
            * itemsize(attn)
        ),
        part=True,
    )
)
