"""Where the tokens of a batch stand: the layout of `VideoDiT`'s one packed sequence, built once per batch shape.

Sample s is one segment: its video tokens, given frames first as they come, then `extra` tokens (text, conditioning).
So the rows of the modulation tables, one per sample, or two where frames are given, follow one another in the sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, wraps

import torch
from torch import Tensor

from fastdit import ops
from fastdit.models.dit import sincos_pos_embed
from fastdit.packing import Grid, packed

Kind = tuple[Tensor, Sequence[int]]  # packed tokens of one kind, and how many of them each sample has


@dataclass(frozen=True, eq=False)
class Layout:
    """cu_seqlens, max_seqlen: of the segments; row_index (N,): the row of each token in the tables; cos, sin
    (N, R/2) or None: of each token, extra tokens unrotated; pieces: video and extra tokens of each sample in turn;
    rows: the patches that take part, None for all."""

    cu_seqlens: Tensor
    max_seqlen: int
    row_index: Tensor
    cos: Tensor | None
    sin: Tensor | None
    pieces: list[int]
    rows: Tensor | None = None


def remembered(function: Callable) -> Callable:
    """The function with its last results kept, as tensors that training may save even if inference asked first."""

    @lru_cache(maxsize=32)
    def ordinary(*args):
        with torch.inference_mode(False):
            return function(*args)

    @wraps(function)
    def call(*args):
        return function(*args) if torch.compiler.is_compiling() else ordinary(*args)

    return call


def build(
    lengths: Sequence[int],
    given: Sequence[int] | None,
    extra: Sequence[int],
    tables: Sequence[Sequence[Tensor]] | None,
    device: torch.device,
) -> Layout:
    """lengths, given, extra: of each sample, its video tokens, those of them that are given, the tokens after them.
    tables: cos and sin of the video tokens of each sample."""
    pieces = [n for pair in zip(lengths, extra, strict=True) for n in pair]
    runs = [n + e for n, e in zip(lengths, extra, strict=True)]
    rows = runs if given is None else [n for g, run in zip(given, runs, strict=True) for n in (g, run - g)]
    p = packed(torch.empty(sum(runs), 0, device=device), [(1, 1, n) for n in rows])
    cu_seqlens = p.cu_seqlens if given is None else p.cu_seqlens[::2].contiguous()
    cos, sin = None, None
    if tables is not None:
        cosines, sines = [], []
        for (c, s), e in zip(tables, extra, strict=True):
            cosines += [c, c.new_ones(e, c.shape[1])]
            sines += [s, s.new_zeros(e, s.shape[1])]
        cos, sin = torch.cat(cosines), torch.cat(sines)
    return Layout(cu_seqlens, max(runs), p.segment_ids, cos, sin, pieces)


@remembered
def rope(grid: Grid, axes: tuple[int, int, int], theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    return ops.rope_table(grid, axes, theta=theta, device=device)


@remembered
def whole(
    grids: tuple[Grid, ...],
    given: tuple[int, ...] | None,
    extra: tuple[int, ...],
    axes: tuple[int, int, int] | None,
    theta: float,
    device: torch.device,
) -> Layout:
    """The layout of samples without dropped tokens."""
    tables = None if axes is None else [rope(grid, axes, theta, device) for grid in grids]
    return build([math.prod(grid) for grid in grids], given, extra, tables, device)


def partial(
    grids: tuple[Grid, ...],
    given: tuple[int, ...] | None,
    extra: tuple[int, ...],
    axes: tuple[int, int, int] | None,
    theta: float,
    device: torch.device,
    keep: Sequence[Tensor],
) -> Layout:
    """The layout of samples of which only the tokens `keep` take part."""
    rows, parts = places(grids, keep)
    tables = None
    if axes is not None:
        tables = [
            tuple(t[k.to(device)] for t in rope(g, axes, theta, device)) for g, k in zip(grids, parts, strict=True)
        ]
    seen = None if given is None else [int((k < g).sum()) for k, g in zip(parts, given, strict=True)]
    layout = build([k.numel() for k in parts], seen, extra, tables, device)
    return replace(layout, rows=rows.to(device))


def places(grids: Sequence[Grid], keep: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Places of the tokens `keep` among the packed patches of all samples, and each sample's own. On the host."""
    if len(keep) != len(grids):
        raise ValueError(f"VideoDiT: one keep per sample; got {len(keep)}, expected {len(grids)}; add the rest.")
    parts, shifted, start = [k.cpu() for k in keep], [], 0
    for k, grid in zip(parts, grids, strict=True):
        size = math.prod(grid)
        if k.numel() == 0 or int(k[0]) < 0 or int(k[-1]) >= size or bool((k[1:] <= k[:-1]).any()):
            raise ValueError(
                f"VideoDiT: keep must be increasing places in a sample; got {k.tolist()[:8]}, expected at least "
                f"one of 0 .. {size - 1}; see drop_tokens."
            )
        shifted.append(k + start)
        start += size
    return torch.cat(shifted), parts


def count(grids: Sequence[Grid]) -> int:
    """Patches of all samples."""
    return sum(math.prod(grid) for grid in grids)


@remembered
def sincos(width: int, grid: Grid, device: torch.device) -> Tensor:
    return sincos_pos_embed(width, grid).to(device)


def drop_tokens(grids: Sequence[Grid], rate: float, generator: torch.Generator | None = None) -> list[Tensor]:
    """The tokens of each sample that stay when a share `rate` of them is dropped at random (NaViT, arXiv 2307.06304):
    `keep` of `VideoDiT`, one increasing int64 (K,) per grid, at least one token each."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"drop_tokens: rate must lie in [0, 1); got {rate}, expected e.g. 0.5; set it.")
    sizes = [math.prod(grid) for grid in grids]
    return [torch.randperm(n, generator=generator)[: max(1, round(n * (1 - rate)))].sort().values for n in sizes]


def interleave(*parts: Kind) -> Tensor:
    """Packed tokens of several kinds, (tensor, lengths) each, as one sequence: all kinds of a sample side by side."""
    if len(parts) == 1:
        return parts[0][0]
    pieces = zip(*(tokens.split(list(lengths)) for tokens, lengths in parts), strict=True)
    return torch.cat([piece for sample in pieces for piece in sample])
