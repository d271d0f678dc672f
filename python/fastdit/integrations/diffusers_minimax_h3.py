"""diffusers' MiniMaxH3Transformer3DModel: the block, the text's block, the attention, the output norm.

One packed sequence of text, video and audio, the same for all samples. A row of the tables belongs to a timestep and a
modality, and an index says which row each token has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor, refuse_choice, shared
from fastdit.integrations.joint import Stream, joint_attention, projections, refuse_qk_norms, rotation_passes
from fastdit.integrations.probe import follows, numbers
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

Rotary = tuple[Tensor, Tensor] | None


def rms(norm: nn.RMSNorm) -> dict[str, Any]:
    """What the modulated operators take for the norm."""
    return dict(weight=norm.weight, norm="rms", eps=norm.eps)


def refuse_rms(*norms: Any) -> str | None:
    for norm in norms:
        if type(norm) is not nn.RMSNorm or norm.weight is None or norm.eps is None or len(norm.normalized_shape) != 1:
            return f"its norm is a {type(norm).__name__}, not an nn.RMSNorm with a weight and an eps"
    return None


def row_index(indices: Tensor, x: Tensor) -> Tensor:
    """(N,), the same for all samples -> (B, N)."""
    return indices.expand(x.shape[0], -1).contiguous()


# The blocks --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    temb: Tensor,
    adaln_indices: Tensor,
    rotary_emb: Rotary,
    attention_mask: Tensor | None = None,
) -> Tensor:
    x, index = hidden_states, row_index(adaln_indices, hidden_states)
    shift1, scale1, gate1, shift2, scale2, gate2 = self.adaln_proj(temb)
    common: dict[str, Any] = dict(row_index=index, precision=law(self, x, scale1, self.norm1.weight))
    h = ops.norm_modulate(x, shift=shift1, scale=scale1, **rms(self.norm1), **common)
    y = self.attn(h, rotary_emb, attention_mask)
    x, h = ops.gate_residual_norm_modulate(
        x, y, gate1, gate_row_index=index, shift=shift2, scale=scale2, **rms(self.norm2), **common
    )
    return ops.gate_residual(x, self.ff(h), gate2, **common)


def text_forward(self, hidden_states: Tensor) -> Tensor:
    x, precision = hidden_states, law(self, hidden_states)
    y = self.attn(ops.norm_modulate(x, **rms(self.norm1), precision=precision))
    x, h = ops.gate_residual_norm_modulate(x, y, **rms(self.norm2), precision=precision)
    return x + self.ff(h)


def norm_out_forward(self, hidden_states: Tensor, temb: Tensor, timestep_indices: Tensor) -> Tensor:
    from diffusers.models.modeling_utils import get_parameter_dtype

    x = hidden_states
    shift, scale = self.linear(F.silu(temb).to(get_parameter_dtype(self.linear))).chunk(2, dim=-1)
    precision = law(self, x, scale, self.norm.weight)
    index = row_index(timestep_indices, x)
    return ops.norm_modulate(x, shift=shift, scale=scale, row_index=index, precision=precision, **rms(self.norm))


for function in (block_forward, text_forward, norm_out_forward):
    function.__name__ = "forward"

TEXT = ("norm1", "attn", "norm2", "ff")
BLOCK = (*TEXT, "adaln_proj")
NORM_OUT = ("norm", "linear")


def is_text_block(module: Any) -> bool:
    """Its names are everybody's: known by what it computes."""
    if not has(module, *TEXT) or parameters(module) != ["hidden_states"]:
        return False
    x = numbers(2, 3)
    parts: dict[str, Any] = dict(norm1=lambda x: 2 * x, attn=lambda x: x + 1, norm2=lambda x: 3 * x, ff=torch.square)
    first = x + 2 * x + 1
    return follows(module, parts, (x,), first + (3 * first).square())


register(
    Kind(
        name="MiniMax-H3 block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: (
            has(m, *BLOCK)
            and parameters(m) == ["hidden_states", "temb", "adaln_indices", "rotary_emb", "attention_mask"]
        ),
        refuse=lambda m: refuse_rms(m.norm1, m.norm2) or unknown(m, *BLOCK),
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.norm1, block.norm2],
        # passes over (tokens, C): eager 2*(norm 2; a row for each token: scale, shift, gate 3, 1 + scale 2; product 3,
        # shift 3, gate 3, add 3), fused 2 + 4 + 3
        saving=lambda block: 29 * block.norm1.normalized_shape[0] * itemsize(block),
        block=True,
    )
)
register(
    Kind(
        name="MiniMax-H3 text block",
        ops=("norm_modulate", "gate_residual_norm_modulate"),
        match=is_text_block,
        refuse=lambda m: refuse_rms(m.norm1, m.norm2) or unknown(m, *TEXT),
        patches=lambda block: [(block, "forward", text_forward)],
        absorbs=lambda block: [block.norm1, block.norm2],
        # passes over (tokens, C): eager 2*(norm 2, add 3), fused 2 + 4, add 3
        saving=lambda block: block.norm1.normalized_shape[0] * itemsize(block),
        precision="fp32",  # torch's RMSNorm rounds once
        block=True,
    )
)
register(
    Kind(
        name="output norm (MiniMax-H3)",
        ops=("norm_modulate",),
        match=lambda m: has(m, *NORM_OUT) and parameters(m) == ["hidden_states", "temb", "timestep_indices"],
        refuse=lambda m: refuse_rms(m.norm) or unknown(m, *NORM_OUT),
        patches=lambda m: [(m, "forward", norm_out_forward)],
        absorbs=lambda m: [m.norm],
        # passes over (tokens, C): norm 2; a row for each token 2, 1 + scale 2; product 3, shift 3, against 2
        saving=lambda m: 10 * m.norm.normalized_shape[0] * itemsize(m),
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


def halves(rotary_emb: Rotary) -> tuple[Tensor | None, Tensor | None]:
    """One value per pair of channels, of tables (..., R) that hold each twice: pairs are (i, i + R/2)."""
    if rotary_emb is None:
        return None, None
    cos, sin = rotary_emb
    return cos[..., : cos.shape[-1] // 2], sin[..., : sin.shape[-1] // 2]


class FastditMiniMaxH3AttnProcessor(Processor):
    """MiniMaxH3AttnProcessor with `qk_norm_rope`, of the first channels of each head, and `attention`."""

    name = "MiniMaxH3AttnProcessor"

    def __init__(self):
        from diffusers.models.transformers.transformer_minimax_h3 import MiniMaxH3AttnProcessor

        super().__init__(MiniMaxH3AttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        rotary_emb: Rotary = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        q, k, v = projections(attn, hidden_states)
        stream = Stream(q, k, v, attn.norm_q, attn.norm_k, *halves(rotary_emb), layout="half")
        o = joint_attention(stream, attn_mask=attention_mask)[0]
        return attn.to_out[1](attn.to_out[0](o))


def register_attention(processor: Any, call: list[str], width: str) -> None:
    """A processor of an attention with these parameters; width: its attribute that makes `heads` heads of channels."""
    register(
        Kind(
            name=f"attention ({processor.name})",
            ops=("qk_norm_rope", "attention"),
            match=lambda m: (
                has(m, "to_q", "to_k", "to_v", "to_out", "norm_q", "norm_k", "heads", width, "processor")
                and parameters(m) == call
                and type(m.processor).__name__ == processor.name
            ),
            refuse=lambda attn: refuse_choice(attn.processor) or refuse_qk_norms(attn.norm_q, attn.norm_k),
            patches=lambda attn: [(attn, "processor", shared(processor))],
            absorbs=lambda attn: [attn.norm_q, attn.norm_k],
            saving=lambda attn: rotation_passes(itemsize(attn)) * attn.to_q.out_features * itemsize(attn),
            part=True,
        )
    )


register_attention(FastditMiniMaxH3AttnProcessor, ["hidden_states", "rotary_emb", "attention_mask"], "inner_dim")
