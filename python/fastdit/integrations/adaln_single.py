"""What adaLN-single blocks share (PixArt, Latte, Allegro, LTX, Sana): a table for all beside six rows a sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.integrations.structure import law
from fastdit.integrations.timestep_rows import PerToken, with_index


def sublayers(
    block: Any,
    x: Tensor,
    temb: Tensor | PerToken,
    attention: Callable[[Tensor], Tensor],
    cross: Callable[[Tensor], Tensor] | None = None,
    feed_forward: Callable[[Tensor], Tensor] | None = None,
    norm: str = "layer",
) -> Tensor:
    """Self-attention, cross-attention (without norm and gate) and feed-forward of a block with `scale_shift_table`.

    x (B, N, C); temb (B, 6C), (B, 1, 6C), or (B, N, 6C) with a timestep per token, of which few may differ.
    """
    rows, index = with_index(temb)
    if index is None:
        rows = rows.reshape(x.shape[0], -1, rows.shape[-1])
    table = block.scale_shift_table
    tables = table.to(rows.device) + rows.unflatten(-1, table.shape)  # (B, 1 or N, 6, C), or (R, 6, C)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = tables.unbind(-2)
    x = x.contiguous()  # the first block's comes transposed from an eager patch embedding
    x = x.to(torch.promote_types(x.dtype, tables.dtype))  # autocast: the table is fp32, and widens the stream

    h = ops.norm_modulate(
        x,
        shift=shift_msa,
        scale=scale_msa,
        norm=norm,
        eps=block.norm1.eps,
        row_index=index,
        precision=law(block, x, tables),
    )
    y, gate = attention(h), gate_msa
    precision = law(block, y, tables)
    if cross is not None:
        x = ops.gate_residual(x, y, gate, row_index=index, precision=precision)
        y, gate = cross(x), None
    x, h = ops.gate_residual_norm_modulate(
        x,
        y,
        gate,
        shift=shift_mlp,
        scale=scale_mlp,
        norm=norm,
        eps=block.norm2.eps,
        row_index=index,
        precision=precision,
    )
    return ops.gate_residual(x, (feed_forward or block.ff)(h), gate_mlp, row_index=index, precision=precision)


def refuse_table(block: Any) -> str | None:
    table = block.scale_shift_table
    plain = isinstance(table, Tensor) and table.ndim == 2 and table.shape[0] == 6
    return None if plain else "its table is not (6, C)"
