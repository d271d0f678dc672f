"""diffusers' QwenImage21Transformer2DModel (Qwen-Image 2.1): the block, whose tables all blocks share; the output norm.

    x = x + tanh(gate_1) * attention(n(x) * (1 + scale_1));    x = x + tanh(gate_2) * mlp(n(x) * (1 + scale_2))

Text and condition images are modulated by a timestep of 0: one row more in the tables, and a row index for the tokens.
The attention, a call per segment of a sequence that is causal in parts, is the original's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.joint import clip_half, refuse_plain_norms
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown


def row_index(x: Tensor, target_token_mask: Tensor | None) -> Tensor | None:
    """The row of each token (B, N): its sample's where the mask (N,) is true, the last one elsewhere; or None."""
    if target_token_mask is None:
        return None
    own = torch.arange(x.shape[0], device=x.device, dtype=torch.int32)
    return torch.where(target_token_mask, own[:, None], x.shape[0])


def block_forward(
    self,
    hidden_states: Tensor,
    modulation: Tensor,
    rotary_emb: Tensor | None = None,
    attention_mask: Any = None,
    target_token_mask: Tensor | None = None,
    layer_cache: Any = None,
    kv_cache_mode: str | None = None,
    cache_write_slice: slice | None = None,
    segments: list[tuple[int, int, bool]] | None = None,
    key_valid: Tensor | None = None,
) -> Tensor:
    x, (scale1, gate1, scale2, gate2) = hidden_states, modulation.chunk(4, dim=-1)
    precision = law(self, x, modulation)
    index = row_index(x, target_token_mask)
    h = ops.norm_modulate(x, scale=scale1, eps=self.img_norm1.eps, row_index=index, precision=precision)
    y = self.attn(
        hidden_states=h,
        attention_mask=attention_mask,
        rotary_emb=rotary_emb,
        layer_cache=layer_cache,
        kv_cache_mode=kv_cache_mode,
        cache_write_slice=cache_write_slice,
        segments=segments,
        key_valid=key_valid,
    )
    x, h = ops.gate_residual_norm_modulate(
        x,
        y,
        gate1,
        gate_act="tanh",
        scale=scale2,
        eps=self.img_norm2.eps,
        gate_row_index=index,
        row_index=index,
        precision=precision,
    )
    return clip_half(
        ops.gate_residual(x, self.img_mlp(h), gate2, gate_act="tanh", row_index=index, precision=precision)
    )


def norm_out_forward(
    self, hidden_states: Tensor, conditioning_embedding: Tensor, target_token_mask: Tensor | None = None
) -> Tensor:
    x = hidden_states
    scale = self.linear(self.silu(conditioning_embedding).to(x.dtype))
    index, precision = row_index(x, target_token_mask), law(self, x, scale)
    return ops.norm_modulate(x, scale=scale, eps=self.norm.eps, row_index=index, precision=precision)


block_forward.__name__ = norm_out_forward.__name__ = "forward"

BLOCK = ("img_norm1", "attn", "img_norm2", "img_mlp")
CALL = [
    *("hidden_states", "modulation", "rotary_emb", "attention_mask", "target_token_mask", "layer_cache"),
    *("kv_cache_mode", "cache_write_slice", "segments", "key_valid"),
]
register(
    Kind(
        name="Qwen-Image 2.1 block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *BLOCK) and parameters(m) == CALL,
        refuse=lambda m: refuse_plain_norms(m.img_norm1, m.img_norm2) or unknown(m, *BLOCK),
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.img_norm1, block.img_norm2],
        # passes over (tokens, C): eager 2*(tokens' rows: scale 1, its sum 2, gate 1, tanh 2; norm 2, scale 3, gate 3,
        # add 3) = 34, fused 2 + 4 + 3
        saving=lambda block: 25 * block.img_norm1.normalized_shape[0] * itemsize(block),
        block=True,
    )
)
register(
    Kind(
        name="output norm (Qwen-Image 2.1)",
        ops=("norm_modulate",),
        match=lambda m: (
            has(m, "silu", "linear", "norm")
            and parameters(m) == ["hidden_states", "conditioning_embedding", "target_token_mask"]
        ),
        refuse=lambda m: (
            f"its activation is {type(m.silu).__name__}, not SiLU"
            if type(m.silu) is not nn.SiLU
            else refuse_plain_norms(m.norm) or unknown(m, "silu", "linear", "norm")
        ),
        patches=lambda m: [(m, "forward", norm_out_forward)],
        absorbs=lambda m: [m.norm],
        # passes over (tokens, C): rows of the tokens 1 and 2, norm 2, scale 3, against 2
        saving=lambda m: 6 * m.norm.normalized_shape[0] * itemsize(m),
    )
)
