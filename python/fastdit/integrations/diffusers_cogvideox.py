"""diffusers' CogVideoXTransformer3DModel (1.0, 1.5) and ConsisID: the block, its attention, the output norm.

Video and text are two streams with rows of their own in one modulation table; the affine LayerNorms serve both.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor, shared
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, unknown

# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    text = encoder_hidden_states.shape[1]
    (shift, scale, gate), (c_shift, c_scale, c_gate) = tables(self.norm1, temb)
    precision = law(self, hidden_states, gate)
    first, second = norm(self.norm1, precision), norm(self.norm2, precision)

    a, c = self.attn1(
        hidden_states=ops.norm_modulate(hidden_states, shift=shift, scale=scale, **first),
        encoder_hidden_states=ops.norm_modulate(encoder_hidden_states, shift=c_shift, scale=c_scale, **first),
        image_rotary_emb=image_rotary_emb,
        **(attention_kwargs or {}),
    )
    (shift, scale, ff_gate), (c_shift, c_scale, c_ff_gate) = tables(self.norm2, temb)
    x, h = ops.gate_residual_norm_modulate(hidden_states, a, gate, shift=shift, scale=scale, **second)
    c, ch = ops.gate_residual_norm_modulate(encoder_hidden_states, c, c_gate, shift=c_shift, scale=c_scale, **second)

    y = self.ff(torch.cat([ch, h], dim=1))
    x = ops.gate_residual(x, y[:, text:], ff_gate, precision=precision)
    return x, ops.gate_residual(c, y[:, :text], c_ff_gate, precision=precision)


block_forward.__name__ = "forward"


def tables(zero: Any, temb: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """(shift, scale, gate) of the video and of the text, each (B, C)."""
    rows = zero.linear(zero.silu(temb)).chunk(6, dim=1)
    return rows[:3], rows[3:]


def norm(zero: Any, precision: str) -> dict[str, Any]:
    return dict(weight=zero.norm.weight, bias=zero.norm.bias, eps=zero.norm.eps, precision=precision)


BLOCK = ("norm1", "attn1", "norm2", "ff")
SIGNATURE = ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"]


def matches_block(module: Any) -> bool:
    if not has(module, *BLOCK) or not all(has(m, "silu", "linear", "norm") for m in (module.norm1, module.norm2)):
        return False
    parameters = list(inspect.signature(type(module).forward).parameters)[1:]
    return parameters in (SIGNATURE, [*SIGNATURE, "attention_kwargs"])


def refuse_block(block: Any) -> str | None:
    for zero in (block.norm1, block.norm2):
        if type(zero.norm) is not nn.LayerNorm:
            return f"its norm is a {type(zero.norm).__name__}, not a LayerNorm"
        if why := unknown(zero, "silu", "linear", "norm"):
            return why
    return unknown(block, *BLOCK)


register(
    Kind(
        name="CogVideoX block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=matches_block,
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [m for zero in (block.norm1, block.norm2) for m in (zero, zero.norm)],
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
        text = encoder_hidden_states.shape[1]
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        fused = attn.fused_projections
        projected = attn.to_qkv(x).chunk(3, dim=-1) if fused else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in projected)
        q, k = normed(q, k, attn.norm_q, attn.norm_k, image_rotary_emb, text)
        o = attn.to_out[1](attn.to_out[0](ops.attention(q, k, v).flatten(2)))
        return o[:, text:], o[:, :text]


def normed(
    q: Tensor, k: Tensor, norm_q: Any, norm_k: Any, rotary: tuple[Tensor, Tensor] | None, text: int
) -> tuple[Tensor, Tensor]:
    """LayerNorm over each head, then RoPE of the tokens behind the text, in one pass; rounds as eager modules do."""
    cos, sin = (None, None) if rotary is None else (t.to(q.device, torch.float32) for t in rotary)
    affine = dict(q_weight=norm_q.weight, k_weight=norm_k.weight, q_bias=norm_q.bias, k_bias=norm_k.bias)
    same = all(w is None or w.dtype == q.dtype for w in affine.values())
    return ops.qk_norm_rope(
        q,
        k,
        **affine,
        norm="layer",
        eps=norm_q.eps,
        cos=None if cos is None else cos[..., 0::2],  # each value stands twice
        sin=None if sin is None else sin[..., 0::2],
        rope_start=0 if cos is None else text,
        precision="native" if same else "fp32",
    )


PROCESSORS = ("CogVideoXAttnProcessor2_0", "FusedCogVideoXAttnProcessor2_0")


def refuse_attention(attn: Any) -> str | None:
    if any(type(norm) is not nn.LayerNorm for norm in (attn.norm_q, attn.norm_k)) or attn.norm_q.eps != attn.norm_k.eps:
        return "its norms are not nn.LayerNorm with one eps"
    return "it is a cross-attention" if attn.is_cross_attention else None


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
        # q and k, with RoPE in fp32: norm 2, pairs 3, casts 6, products 8, sum 6, cast 3, into the slice 2; fused 2
        saving=lambda attn: 2 * 28 * attn.inner_dim * itemsize(attn),
        part=True,
    )
)


# The output norm --------------------------------------------------------------------------------------------------


def output_norm_forward(self, x: Tensor, timestep: Tensor | None = None, temb: Tensor | None = None) -> Tensor:
    shift, scale = self.linear(self.silu(temb)).chunk(2, dim=1)
    return ops.norm_modulate(x, shift=shift, scale=scale, **norm(self, law(self, x, scale)))


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
