"""diffusers' PixArtTransformer2DModel and LatteTransformer3DModel: the adaLN-single block.

Their attentions, patch embedding and feed-forward activations are those of DiT (diffusers_dit.py).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit.integrations.adaln_single import refuse_table, sublayers
from fastdit.integrations.joint import refuse_plain_norms
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, unknown


def block_forward(
    self,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    if hidden_states.ndim != 3 or self._chunk_size is not None or cross_attention_kwargs or timestep is None:
        return original(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )
    own = encoder_hidden_states if self.only_cross_attention else None

    def attention(h: Tensor) -> Tensor:
        return self.attn1(h, encoder_hidden_states=own, attention_mask=attention_mask)

    def cross(x: Tensor) -> Tensor:
        return self.attn2(x, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)

    return sublayers(self, hidden_states, timestep, attention, None if self.attn2 is None else cross)


block_forward.__name__ = "forward"

BLOCK = ("norm1", "attn1", "norm2", "attn2", "ff", "scale_shift_table")
SETTINGS = ("norm_type", "only_cross_attention", "pos_embed")


def refuse_block(block: Any) -> str | None:
    if block.pos_embed is not None:
        return "has positions of its own"
    return refuse_plain_norms(block.norm1, block.norm2) or refuse_table(block) or unknown(block, *BLOCK, *SETTINGS)


register(
    Kind(
        name="adaLN-single block",
        ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"),
        match=lambda m: has(m, *BLOCK, *SETTINGS, "_chunk_size") and m.norm_type == "ada_norm_single",
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.norm1, block.norm2],
        # passes over (tokens, C): 2 norms, scales, shifts and gates 2 each, 3 sums 3: 25, fused 2 + 3 + 4 + 3; without
        # cross-attention 22 and 2 + 4 + 3
        saving=lambda block: 13 * block.scale_shift_table.shape[-1] * itemsize(block),
        block=True,
    )
)
