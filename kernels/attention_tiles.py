"""Packed segments as tiles, on the device: which tiles there are, from `cu_seqlens` alone, the costly ones first.

The plan is int32 (2, S + 2). Segments stand in order of falling cost (keys that each of their rows meets), so the
longest work starts first; rank r holds

    plan[0, r]   the first tile of that segment in launch order; plan[0, S + 1] is the number of all tiles
    plan[1, r]   which segment it is; segment S are the rows behind the last one, which have no partners and come last

A segment of n rows has ceil(n / BLOCK) tiles; one with a (T, H, W) grid has as many as bricks of BT x BH x BW cover it.
Nobody waits for a count on the host: a launch takes a bound (tiles of all rows + S + 1) and programs walk
`tile, tile + programs, ...` up to plan[0, S + 1].

Cost: one launch of S + 1 programs, each reads cu_seqlens once (8 bytes a segment, from the caches).
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel
from fastdit.kernels.attention_mask import bricks


@triton.jit
def _tiles_and_cost(CU, CU_OTHER, GRIDS, s, segments, rows, BT, BH, BW, WT, WH, WW):
    """Of segments s (a vector; s == segments is the tail): tiles, and the partners of one row; -1 outside."""
    real = s < segments
    begin = tl.load(CU + s, mask=s <= segments, other=0)
    length = tl.load(CU + s + 1, mask=real, other=0) - begin
    length = tl.where(real, length, rows - begin)
    if GRIDS is not None:
        T = tl.load(GRIDS + s * 3, mask=real, other=1)  # the tail is a line of tokens
        H = tl.load(GRIDS + s * 3 + 1, mask=real, other=1)
        W = tl.load(GRIDS + s * 3 + 2, mask=real, other=0)
        tiles = bricks(T, H, tl.where(real, W, length), BT, BH, BW)
        cost = tl.minimum(T, WT) * tl.minimum(H, WH) * tl.minimum(W, WW)
    else:
        tiles = (length + BW - 1) // BW
        cost = tl.load(CU_OTHER + s + 1, mask=real, other=0) - tl.load(CU_OTHER + s, mask=real, other=0)
    return tl.where(s <= segments, tiles, 0), tl.where(real, cost, -1)


@kernel(kind="small")
def plan_tiles(
    PLAN, CU, CU_OTHER, GRIDS, segments: tl.int32, rows: tl.int32,
    BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,
    WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Program s ranks segment s among all by counting those that go before it: no sort, no atomics. Without grids,
    BW is the tile's rows. rows: of the packed tensor, the tail included."""
    s = tl.program_id(0)
    own = s + tl.arange(0, 1)
    own_tiles, own_cost = _tiles_and_cost(CU, CU_OTHER, GRIDS, own, segments, rows, BT, BH, BW, WT, WH, WW)
    rank = tl.zeros((1,), tl.int32)
    first = tl.zeros((1,), tl.int32)
    for c in range(0, segments + 1, CHUNK):
        other = c + tl.arange(0, CHUNK)
        tiles, cost = _tiles_and_cost(CU, CU_OTHER, GRIDS, other, segments, rows, BT, BH, BW, WT, WH, WW)
        before = (other <= segments) & ((cost > own_cost) | ((cost == own_cost) & (other < own)))
        rank += tl.sum(before.to(tl.int32), 0)
        first += tl.sum(tl.where(before, tiles, 0), 0)
    tl.store(PLAN + rank, first)
    tl.store(PLAN + segments + 2 + rank, own)
    tl.store(PLAN + segments + 1 + tl.arange(0, 1), first + own_tiles, mask=own == segments)  # the tail ends the list


@triton.jit
def find_tile(PLAN, tile, segments):
    """(segment, tile's number inside it) of a tile below plan[0, S + 1]."""
    low = 0
    high = segments + 1
    while high - low > 1:  # plan[0, low] <= tile < plan[0, high]
        middle = (low + high) // 2
        left = tl.load(PLAN + middle) <= tile
        low = tl.where(left, middle, low)
        high = tl.where(left, high, middle)
    return tl.load(PLAN + segments + 2 + low), tile - tl.load(PLAN + low)
