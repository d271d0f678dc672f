"""What Wan's block shares with those that grew out of it (VACE, SkyReels-V2, Helios, AnyFlow, Wan's own repository).

    x = x + gate * attention(n(x) * (1 + scale) + shift)
    x = x + cross(norm(x))
    x = x + gate' * ffn(n(x) * (1 + scale') + shift')

Modulation is the fp32 law: table + temb stay in fp32 beside bf16 tokens, whatever the dtype of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.registry import Kind, record_of, register
from fastdit.integrations.structure import has, itemsize, law


class Rows(NamedTuple):
    """Modulation in few rows, as the model hands it to the blocks that take it (`per_block`).

    table (R, K, C) and row_index (B, N): token n of sample b takes row row_index[b, n]. Without one the table is
    (B, M, K, C) and a row serves N / M consecutive tokens.
    """

    table: Tensor
    row_index: Tensor | None = None

    def dense(self, tokens: int) -> Tensor:
        """(B, N, K, C)."""
        if self.row_index is not None:
            return self.table[self.row_index]
        return self.table.repeat_interleave(tokens // self.table.shape[1], dim=1)


def distinct(timestep: Tensor) -> tuple[Tensor, Tensor] | None:
    """The different timesteps (R,) and which of them each token has; None where nothing can wait for their number.

    Counting them makes the host wait for the device once per call of the model; a graph (torch.compile, CUDA graphs)
    cannot, and keeps a row per token.
    """
    if torch.compiler.is_compiling() or timestep.is_meta:
        return None
    if timestep.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    return torch.unique(timestep, return_inverse=True)


def per_block(
    blocks: Iterable[nn.Module], temb: Tensor | Rows, dense: Callable[[Rows], Tensor]
) -> Iterator[tuple[nn.Module, Any]]:
    """Each block with its modulation; a block that is left gets the `dense` form of the rows, made once."""
    made = None
    for block in blocks:
        if isinstance(temb, Rows) and record_of(block) is None:
            made = dense(temb) if made is None else made
            yield block, made
        else:
            yield block, temb


def six(table: Tensor, temb: Tensor | Rows) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """(1, 6, C) + temb (B, 6, C), (B, N, 6, C) or rows: shift, scale, gate of both halves; the row of each token."""
    temb, index = temb if isinstance(temb, Rows) else (temb, None)
    return (table.to(temb.device) + temb.float()).unbind(dim=-2), index


def run(
    block: Any,
    x: Tensor,
    tables: tuple[Tensor, ...],
    index: Tensor | None,
    norms: tuple[Any, Any, Any],
    attention: Callable[[Tensor], Tensor],
    cross: Callable[[Tensor], Tensor],
) -> Tensor:
    """The whole block: norms in the order of their use, the second affine or nn.Identity; `block.ffn` is called."""
    shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = tables
    norm1, norm2, norm3 = norms
    precision = law(block, x, shift)
    h = ops.norm_modulate(x, shift=shift, scale=scale, eps=norm1.eps, row_index=index, precision=precision)
    y = attention(h)
    if isinstance(norm2, nn.Identity):
        x = h = ops.gate_residual(x, y, gate, row_index=index, precision=precision)
    else:
        x, h = ops.gate_residual_norm_modulate(
            x,
            y,
            gate,
            weight=norm2.weight,
            bias=norm2.bias,
            eps=norm2.eps,
            gate_row_index=index,
            precision=precision,
        )
    x, h = ops.gate_residual_norm_modulate(
        x, cross(h), shift=ffn_shift, scale=ffn_scale, eps=norm3.eps, row_index=index, precision=precision
    )
    return ops.gate_residual(x, block.ffn(h), ffn_gate, row_index=index, precision=precision)


def refuse_norms(*norms: Any) -> str | None:
    """Of the norms in the order of their use: the modulated ones plain, the one between affine or absent."""
    for norm in norms:
        plain = isinstance(norm, nn.LayerNorm) and (norm.weight is None) == (norm.bias is None)
        if not plain and not (norm is norms[1] and isinstance(norm, nn.Identity)):
            return f"its norm is a {type(norm).__name__}, not a LayerNorm"
    if norms[0].elementwise_affine or norms[2].elementwise_affine:
        return "its modulated norms are affine"
    return None


def register_block(
    name: str, table: str, forward: Callable, match: Callable[[Any], bool], refuse: Callable[[Any], str | None]
) -> None:
    """A kind of block that `run` serves; table: what the modulation of the model is added to."""
    register(
        Kind(
            name=name,
            ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
            match=match,
            refuse=refuse,
            patches=lambda block: [(block, "forward", forward)],
            absorbs=lambda block: [norm for norm in (block.norm1, block.norm2, block.norm3) if has(norm, "eps")],
            saving=lambda block: saving(getattr(block, table).shape[-1], itemsize(block)),
            precision="fp32",
            block=True,
        )
    )


def saving(channels: int, size: int) -> int:
    """Bytes per token: in units of (tokens, C) in the model's dtype, of which each fp32 pass of eager moves two.

    2 modulated norms (cast 3, norm 4, scale 4, shift 4, cast 3), the affine norm (3, 4, 3), 2 gates (cast 3,
    product 4, sum 6, cast 3), the plain sum 3: 81; fused 2 + 4 + 4 + 3.
    """
    return 68 * channels * size
