"""diffusers' AllegroTransformer3DModel: the block and its attentions, which rotate each third of a head by its axis."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import ops
from fastdit.integrations.adaln_single import refuse_table, sublayers
from fastdit.integrations.diffusers_dit import attend, matches_attention, refuse_attention
from fastdit.integrations.diffusers_processor import Processor, shared
from fastdit.integrations.joint import refuse_plain_norms
from fastdit.integrations.padding import is_lengths
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, parameters, unknown

# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    attention_mask: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    image_rotary_emb: tuple | None = None,
) -> Tensor:
    if hidden_states.ndim != 3 or temb is None:
        return original(
            self, hidden_states, encoder_hidden_states, temb, attention_mask, encoder_attention_mask, image_rotary_emb
        )

    def attention(h: Tensor) -> Tensor:
        return self.attn1(h, attention_mask=attention_mask, image_rotary_emb=image_rotary_emb)

    def cross(x: Tensor) -> Tensor:
        return self.attn2(x, encoder_hidden_states, encoder_attention_mask, image_rotary_emb=None)

    return sublayers(self, hidden_states, temb, attention, cross)


block_forward.__name__ = "forward"

BLOCK = ("norm1", "attn1", "norm2", "attn2", "norm3", "ff", "scale_shift_table")  # norm3 is never called
CALL = ["hidden_states", "encoder_hidden_states", "temb", "attention_mask", "encoder_attention_mask"]

register(
    Kind(
        name="Allegro block",
        ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"),
        match=lambda m: has(m, *BLOCK) and parameters(m) == [*CALL, "image_rotary_emb"],
        refuse=lambda block: (
            refuse_plain_norms(block.norm1, block.norm2) or refuse_table(block) or unknown(block, *BLOCK)
        ),
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.norm1, block.norm2],
        saving=lambda block: 13 * block.scale_shift_table.shape[-1] * itemsize(block),  # as in diffusers_pixart
        block=True,
    )
)


# Attention --------------------------------------------------------------------------------------------------------


class FastditAllegroAttnProcessor(Processor):
    """AllegroAttnProcessor2_0 with `qk_norm_rope` and `attention`; masks that are no lengths go to the original."""

    def __init__(self):
        from diffusers.models.attention_processor import AllegroAttnProcessor2_0

        super().__init__(AllegroAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        image_rotary_emb: tuple | None = None,
    ) -> Tensor:
        masked = attention_mask is not None and not is_lengths(attention_mask)
        if masked or hidden_states.ndim != 3:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, image_rotary_emb)
        if image_rotary_emb is None or attn.is_cross_attention:
            return attend(attn, hidden_states, encoder_hidden_states, attention_mask)
        cos, sin = token_tables(*image_rotary_emb)

        def rotated(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return ops.qk_norm_rope(q, k, cos=cos, sin=sin, layout="axis_half", precision="native")

        return attend(attn, hidden_states, encoder_hidden_states, attention_mask, rotated)


def token_tables(axes: tuple, positions: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Per axis (cos, sin), each (size, D/3) with its half twice, and positions (1 or B, N) -> (1 or B, N, 1, D/2)."""
    cos, sin = (
        torch.cat(
            [F.embedding(at, table[:, : table.shape[1] // 2]) for at, table in zip(positions, tables, strict=True)], -1
        ).unsqueeze(2)
        for tables in zip(*axes, strict=True)
    )
    return cos, sin


register(
    Kind(
        name="attention (AllegroAttnProcessor2_0)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: matches_attention(m, "image_rotary_emb"),
        refuse=lambda attn: refuse_attention(attn, "AllegroAttnProcessor2_0"),
        patches=lambda attn: [(attn, "processor", shared(FastditAllegroAttnProcessor))],
        # q and k in 2 bytes: negate and join 4, two casts 6, two products 8, sum 6, rounding 3, join the thirds 2,
        # against 2; one of the two attentions of a block rotates
        saving=lambda attn: 27 * attn.inner_dim * itemsize(attn),
        part=True,
    )
)
