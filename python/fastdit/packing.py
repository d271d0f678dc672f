"""Videos of different sizes as one sequence of tokens (NaViT's patch n' pack), without padding.

`ops.patch_embed3d` of a list gives a `Packed`; `pack` makes one from token tensors, `unpack` takes it apart. The layout
goes to the ops as it is: `attention_varlen(cu_seqlens_q=p.cu_seqlens, max_seqlen_q=p.max_seqlen)`,
`norm_modulate(p.tokens, scale=rows, row_index=p.segment_ids)`, `rope_table(p.host_grids, ...)`,
`unpatchify3d(tokens, grid=p.host_grids, ...)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Grid = tuple[int, int, int]


class RowOrder(NamedTuple):
    """The tokens of each table row: order[offsets[r]:offsets[r + 1]] use row r, in their order of appearance."""

    order: Tensor | None  # (N,) int32; None: the tokens stand in order already
    offsets: Tensor  # (R + 1,) int32


@dataclass(frozen=True, eq=False)
class Packed:
    """S segments of tokens in one sequence. Device facts are tensors, host facts are ints.

    tokens (N, D); cu_seqlens (S + 1,) int32: where segments begin; max_seqlen: the longest; grids (S, 3) int32: tokens
    along t, h, w; segment_ids (N,) int32: the segment of each token, a `row_index`; host_grids: `grids` as ints.
    """

    tokens: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    grids: Tensor
    segment_ids: Tensor
    host_grids: tuple[Grid, ...]

    def __len__(self) -> int:
        return len(self.host_grids)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each segment."""
        return [t * h * w for t, h, w in self.host_grids]

    @property
    def row_order(self) -> RowOrder:
        """`row_order(self.segment_ids, len(self))`, known without sorting."""
        return RowOrder(None, self.cu_seqlens)

    def with_tokens(self, tokens: Tensor) -> Packed:
        """The same layout around other tokens, e.g. the output of a layer."""
        if tokens.shape[:-1] != self.tokens.shape[:-1]:
            raise ValueError(
                f"Packed.with_tokens: one row per token is needed; got {list(tokens.shape)}, "
                f"expected [{self.tokens.shape[0]}, D]; keep the packed order and length."
            )
        return replace(self, tokens=tokens)


def pack(tokens: Sequence[Tensor], grids: Sequence[Grid] | None = None) -> Packed:
    """Join segments of tokens.

    Args:
        tokens (list of Tensor[N_i, D]): at least one; one D, dtype and device.
        grids (list of (t, h, w)): the tokens of each segment along t, h, w. Default: (1, 1, N_i), a plain sequence.
    Returns:
        Packed. Differentiable; `unpack` is the inverse.
    Raises:
        ValueError: empty list, shapes, devices, a grid that is not its segment's.   TypeError: dtypes.
    """
    if len(tokens) == 0:
        raise ValueError("pack: no segments; got an empty list, expected at least one [N, D]; skip the call.")
    first = tokens[0]
    for i, t in enumerate(tokens):
        if t.dim() != 2 or t.shape[1] != first.shape[-1]:
            raise ValueError(
                f"pack: every segment must be [N, D] with one D; got {list(t.shape)} at {i} beside "
                f"{list(first.shape)}, expected [N, {first.shape[-1]}]; flatten t, h, w to tokens."
            )
        if t.dtype != first.dtype:
            raise TypeError(
                f"pack: segments differ in dtype; got {t.dtype} at {i}, expected {first.dtype}; cast them to one."
            )
        if t.device != first.device:
            raise ValueError(
                f"pack: segments are on different devices; got {t.device} at {i}, expected {first.device}; move them."
            )
    if grids is None:
        grids = [(1, 1, t.shape[0]) for t in tokens]
    if len(grids) != len(tokens):
        raise ValueError(
            f"pack: one grid per segment; got {len(grids)} grids for {len(tokens)} segments, expected as many."
        )
    for i, (grid, segment) in enumerate(zip(grids, tokens, strict=True)):
        if math.prod(grid) != segment.shape[0]:
            raise ValueError(
                f"pack: grid {i} is not its segment's; got {tuple(grid)} for {segment.shape[0]} tokens, "
                "expected t * h * w tokens; check the patch size."
            )
    return packed(torch.cat(list(tokens)), [(t, h, w) for t, h, w in grids])


def unpack(p: Packed) -> list[Tensor]:
    """The segments of a Packed as views [N_i, D] of its tokens."""
    return list(p.tokens.split(p.lengths))


def packed(tokens: Tensor, grids: Sequence[Grid]) -> Packed:
    """The layout of segments with these grids around tokens that are packed already."""
    lengths = [t * h * w for t, h, w in grids]
    starts = [0]
    for n in lengths:
        starts.append(starts[-1] + n)
    device = tokens.device
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    segment_ids = torch.repeat_interleave(
        torch.arange(len(lengths), dtype=torch.int32, device=device),
        torch.tensor(lengths, device=device),
        output_size=starts[-1],  # known here: the device is not asked
    )
    p = Packed(
        tokens,
        cu_seqlens,
        max([0, *lengths]),  # Dynamo has no max(..., default=) of symbolic sizes
        torch.tensor(list(grids), dtype=torch.int32, device=device).view(-1, 3),
        segment_ids,
        tuple(grids),
    )
    if not torch.compiler.is_compiling():
        _remember(segment_ids, len(lengths), p.row_order)
    return p


# Orders by index tensor: (its version, {rows: order}). An entry goes when its tensor goes.
_orders = WeakTensorKeyDictionary()


def _version(t: Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _remember(row_index: Tensor, rows: int, order: RowOrder) -> None:
    version, known = _orders.get(row_index, (None, {}))
    if version != _version(row_index):
        version, known = _version(row_index), {}
        _orders[row_index] = (version, known)
    known[rows] = order


def row_order(row_index: Tensor, rows: int) -> RowOrder:
    """The tokens of each row of a table, sorted stably once per index tensor and then remembered.

    Gradients of a table are sums over these runs, in the order of the tokens: the same bits in every run. The
    `segment_ids` of a Packed are in order as they are and cost nothing.
    """
    version, known = _orders.get(row_index, (None, {}))
    if version == _version(row_index) and rows in known:
        return known[rows]
    flat = row_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    edges = torch.arange(rows + 1, dtype=flat.dtype, device=flat.device)
    offsets = torch.searchsorted(flat[order], edges, out_int32=True)
    found = RowOrder(order.to(torch.int32), offsets)
    _remember(row_index, rows, found)
    return found
