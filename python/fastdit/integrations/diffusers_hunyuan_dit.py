"""diffusers' HunyuanDiT2DModel and its ControlNet: the block and its two attentions.

    x = x + attention(n_1(x) + shift);    x = x + cross(n_2(x));    x = x + ff(n_3(x))

The time gives a shift and nothing else, so the three norms with their weights and the sums before them are what fuses.
In the cross-attention the image rotates and the text does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_dit import attend, matches_attention
from fastdit.integrations.diffusers_flux_attention import pairs
from fastdit.integrations.diffusers_processor import Processor, refuse_processor, shared
from fastdit.integrations.joint import affine, head_norms, is_layer_norm, queries_only, refuse_qk_norms, rotation_passes
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: Any = None,
    skip: Tensor | None = None,
) -> Tensor:
    assert temb is not None  # the original needs what is asserted here too
    x = hidden_states.contiguous()  # the first block's come transposed from an eager patch embedding
    if self.skip_linear is not None:
        assert skip is not None
        x = self.skip_linear(self.skip_norm(torch.cat([x, skip], dim=-1)))
    zero = self.norm1
    shift = zero.linear(zero.silu(temb.float()).to(temb.dtype))
    precision = law(self, x, shift, zero.norm.weight)
    first, second, third = (affine(norm, precision) for norm in (zero.norm, self.norm2, self.norm3))

    h = ops.norm_modulate(x, shift=shift, **first)
    y = self.attn1(h, image_rotary_emb=image_rotary_emb)
    x, h = ops.gate_residual_norm_modulate(x, y, **second)
    y = self.attn2(h, encoder_hidden_states=encoder_hidden_states, image_rotary_emb=image_rotary_emb)
    x, h = ops.gate_residual_norm_modulate(x, y, **third)
    return x + self.ff(h)


block_forward.__name__ = "forward"


BLOCK = ("norm1", "attn1", "norm2", "attn2", "norm3", "ff", "skip_linear")
CALL = ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "skip"]


def refuse_block(block: Any) -> str | None:
    zero = block.norm1
    if not has(zero, "norm", "linear") or type(getattr(zero, "silu", None)) is not nn.SiLU:
        return f"its modulation is a {type(zero).__name__}, not SiLU, linear layer and norm"
    for norm in (zero.norm, block.norm2, block.norm3):
        if not is_layer_norm(norm):
            return f"its norm is a {type(norm).__name__}, not a LayerNorm"
    return unknown(zero, "silu", "linear", "norm") or unknown(block, *BLOCK, "skip_norm")


def block_saving(block: Any) -> int:
    # passes over (tokens, C) in 2 bytes: 3 norms (to fp32 3, norm 4, rounding 3), shift 2, 3 sums 3: 41; in 4 bytes 3
    # norms 2: 17; fused 2 + 4 + 4, and a sum 3
    return (28 if itemsize(block) == 2 else 4) * block.norm2.normalized_shape[0] * itemsize(block)


register(
    Kind(
        name="HunyuanDiT block",
        ops=("norm_modulate", "gate_residual_norm_modulate"),
        match=lambda m: has(m, *BLOCK) and parameters(m) == CALL,
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.norm1, block.norm1.norm, block.norm2, block.norm3],
        saving=block_saving,
        block=True,
    )
)


# Attention --------------------------------------------------------------------------------------------------------


class FastditHunyuanDiTAttnProcessor(Processor):
    """HunyuanAttnProcessor2_0 with `qk_norm_rope` and `attention`; masks go to the original."""

    def __init__(self):
        from diffusers.models.attention_processor import HunyuanAttnProcessor2_0

        super().__init__(HunyuanAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: Any = None,
    ) -> Tensor:
        if attention_mask is not None or hidden_states.ndim != 3:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb)
        rope: dict[str, Any] = {}
        if image_rotary_emb is not None:
            cos, sin = (t.to(hidden_states.device) for t in pairs(*image_rotary_emb))
            rope = queries_only(cos, sin) if attn.is_cross_attention else dict(cos=cos, sin=sin)

        def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return ops.qk_norm_rope(q, k, **head_norms(attn.norm_q, attn.norm_k, q.dtype), **rope)

        plain = attn.norm_q is None and not rope
        return attend(attn, hidden_states, encoder_hidden_states, None, None if plain else rotated)


def refuse_attention(attn: Any) -> str | None:
    if attn.spatial_norm is not None or attn.group_norm is not None:
        return "norms before the attention"
    return refuse_processor(attn.processor, "HunyuanAttnProcessor2_0") or refuse_qk_norms(attn.norm_q, attn.norm_k)


register(
    Kind(
        name="attention (HunyuanAttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: matches_attention(m, "image_rotary_emb"),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditHunyuanDiTAttnProcessor))],
        absorbs=lambda attn: [attn.norm_q, attn.norm_k],
        # of the image's tokens: in the cross-attention the queries only
        saving=lambda attn: (
            rotation_passes(itemsize(attn)) // (2 if attn.is_cross_attention else 1) * attn.inner_dim * itemsize(attn)
        ),
        part=True,
    )
)
