"""Rows of rotary tables beside the heads of a token: dense tables of any strides, and the compact tables of the axes.

A tile (BT, HB, P) holds one value per pair of channels, alike for the HB heads unless each has a row of its own: every
thread loads, once per token, the values of the channels that it owns in all chunks of heads. The compact tables,
(T + H + W) x D/2 in all, stay in L1: a token's place on the axes is computed, its segment in a pack found by a binary
search of the running totals that `segment_ends` wrote.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple


class Head(NamedTuple):
    """How the channels of a head make pairs."""

    D: int
    P: int  # pairs of a tile, a power of two
    LAYOUT: str
    W0: int  # pairs of the rotated sections: of the axes, or of the thirds of axis_half; else W0 alone
    W1: int
    W2: int
    GRAIN: int  # channels that sections begin at multiples of: 16 bytes' worth, or 1


class Side(NamedTuple):
    """What q or k is to a program."""

    H: int
    CHUNKS: int  # of HB heads that it holds
    TABLE: str | None  # "dense", "axes", or not rotated
    PER_HEAD: bool  # the table has a row for each head
    UNIT: bool  # neighbouring pairs are neighbours in the table
    ROUND: bool  # the products of the rotation round


@triton.jit
def positions(token, b, GRIDS, ENDS, segments, steps, AXES: tl.constexpr):
    """Place of the rotated tokens on the axes of their grid; the last runs fastest. ENDS: grids lie packed."""
    segment = tl.minimum(b, segments - 1)
    if ENDS is not None:
        low, high = token * 0, token * 0 + (segments - 1)
        for _ in range(steps):  # the first segment that ends beyond the token
            middle = (low + high) // 2
            before = tl.load(ENDS + middle) <= token
            low = tl.where(before, tl.minimum(middle + 1, high), low)
            high = tl.where(before, high, middle)
        segment = low
        token = token - tl.where(low > 0, tl.load(ENDS + tl.maximum(low - 1, 0)), 0)
    first, second, third = token, token, token
    if AXES > 1:
        last = tl.maximum(tl.load(GRIDS + segment * AXES + (AXES - 1)).to(tl.int32), 1)
        first, second = token // last, token % last
    if AXES > 2:
        middle = tl.maximum(tl.load(GRIDS + segment * AXES + 1).to(tl.int32), 1)
        first, second, third = first // middle, first % middle, second
    return first, second, third


@triton.jit
def _axis(cos, sin, COS, SIN, place, size, p, ok, BEGIN: tl.constexpr, WIDTH: tl.constexpr):
    """The section of one axis, laid into the tiles of all."""
    mine = (p >= BEGIN) & (p < BEGIN + WIDTH)
    at = tl.minimum(place, size - 1) * WIDTH + (p - BEGIN)  # no grid leads out of the table
    c = tl.load(COS + at, mask=ok & mine, other=0.0).to(tl.float32)
    s = tl.load(SIN + at, mask=ok & mine, other=0.0).to(tl.float32)
    return tl.where(mine, c, cos), tl.where(mine, s, sin)


@triton.jit
def axes_rows(axes, token, b, ok, HB: tl.constexpr, HEAD: tl.constexpr):
    """cos and sin of the tokens from the tables of the axes, (BT, HB, P)."""
    COS_T, SIN_T, COS_H, SIN_H, COS_W, SIN_W, GRIDS, ENDS, size_t, size_h, size_w, segments, steps = axes
    AXES: tl.constexpr = 1 if COS_H is None else 2 if COS_W is None else 3
    t, h, w = positions(tl.where(ok, token, 0), b, GRIDS, ENDS, segments, steps, AXES)
    p = tl.arange(0, HEAD.P)[None, None, :] + tl.zeros((token.shape[0], HB, 1), tl.int32)
    cos, sin = _axis(p * 0.0, p * 0.0, COS_T, SIN_T, t, size_t, p, ok, 0, HEAD.W0)
    if AXES > 1:
        cos, sin = _axis(cos, sin, COS_H, SIN_H, h, size_h, p, ok, HEAD.W0, HEAD.W1)
    if AXES > 2:
        cos, sin = _axis(cos, sin, COS_W, SIN_W, w, size_w, p, ok, HEAD.W0 + HEAD.W1, HEAD.W2)
    return cos, sin


@triton.jit
def dense_rows(COS, SIN, at, ok, step, HEAD: tl.constexpr, UNIT: tl.constexpr):
    """Rows of the table at COS + at, SIN + at, (BT, HB, 1), as (BT, HB, P)."""
    R: tl.constexpr = HEAD.W0 + HEAD.W1 + HEAD.W2
    p = tl.arange(0, HEAD.P)[None, None, :]
    ok = ok & (p < R)
    if UNIT:
        at = at + p
    else:
        at = at + p * step
    cos = tl.load(COS + at, mask=ok, other=0.0)
    return cos.to(tl.float32), tl.load(SIN + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def table_rows(table, axes, token, b, ok, HB: tl.constexpr, HEAD: tl.constexpr, SIDE: tl.constexpr):
    """The rows that all heads of a token share, if there are such. token: from the slice's first on."""
    if SIDE.TABLE == "dense" and not SIDE.PER_HEAD:
        COS, SIN, batch_stride, stride, _, step = table
        at = b.to(tl.int64) * batch_stride + token.to(tl.int64) * stride + tl.zeros((token.shape[0], HB, 1), tl.int64)
        cos, sin = dense_rows(COS, SIN, at, ok, step, HEAD, SIDE.UNIT)
    elif SIDE.TABLE == "axes":
        cos, sin = axes_rows(axes, token, b, ok, HB, HEAD)
    else:
        cos, sin = 0.0, 0.0
    return cos, sin


@triton.jit
def head_rows(table, token, b, head, ok, HEAD: tl.constexpr, SIDE: tl.constexpr):
    """The rows of the heads of a chunk, (BT, HB, 1), where each has its own."""
    COS, SIN, batch_stride, stride, head_stride, step = table
    at = b.to(tl.int64) * batch_stride + token.to(tl.int64) * stride + head * head_stride
    return dense_rows(COS, SIN, at, ok, step, HEAD, SIDE.UNIT)


@triton.jit
def aligned_table(COS, SIN, batch_stride, stride, head_stride, step, ALIGN: tl.constexpr):
    """A table as the functions above take it."""
    return COS, SIN, multiple(batch_stride, ALIGN), multiple(stride, ALIGN), multiple(head_stride, ALIGN), step


@kernel
def segment_ends(GRIDS, ENDS, segments: tl.int32, AXES: tl.constexpr, BLOCK: tl.constexpr):
    """Running total of the tokens of packed grids, one program: what the binary search of `positions` reads."""
    total = 0
    s = tl.arange(0, BLOCK)
    for first in range(0, segments, BLOCK):
        inside = first + s < segments
        tokens = inside.to(tl.int32)
        for axis in tl.static_range(AXES):
            tokens *= tl.load(GRIDS + (first + s) * AXES + axis, mask=inside, other=0).to(tl.int32)
        tl.store(ENDS + first + s, total + tl.cumsum(tokens, 0), mask=inside)
        total += tl.sum(tokens, 0)
