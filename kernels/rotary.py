"""qk_norm_rope: the norm of queries and keys and the rotation of their channels, one read and one write of each.

    n(x) = (x - mean) * rstd * w + b over the channels of a head, or of all heads;   (y1, y2) -> R(angle) (y1, y2)

A program holds BT tokens with all their heads (or a group of them), q's and k's, in registers: chunks of (BT, HB, D),
all loaded before the first is worked on. So x is read once under either scope, and the rows of the table, loaded once
per token in the very layout of a chunk (a thread owns the same channels in each), serve every head of q and of k. H
needs no power of two above it: only HB is one.

Pairs: a chunk is always the two tensors (BT, HB, P) of the first and the second channels of the pairs. Interleaved, it
is loaded whole, 16 bytes a thread, and split in registers. Otherwise the two halves are two loads of 16 bytes; channels
that do not rotate pair up as a last section. What the angle leaves alone is selected, never multiplied by 1 and 0.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.rotary_table import aligned_table, head_rows, table_rows


class Law(NamedTuple):
    """What is computed."""

    NORM: str | None
    HIDDEN: bool  # statistics over all heads
    NATIVE: bool  # round where eager modules do


@triton.jit
def channels(HEAD: tl.constexpr):
    """First and second channel of every pair of a tile that is not interleaved, (1, 1, P)."""
    R: tl.constexpr = HEAD.W0 + HEAD.W1 + HEAD.W2
    REST: tl.constexpr = (HEAD.D + 1) // 2 - R
    GRAIN: tl.constexpr = HEAD.GRAIN
    p = tl.arange(0, HEAD.P)
    start, width = p * 0, p * 0 + R
    if HEAD.LAYOUT == "axis_half":
        start = tl.where(p < HEAD.W0, 0, tl.where(p < HEAD.W0 + HEAD.W1, HEAD.W0, HEAD.W0 + HEAD.W1))
        width = tl.where(p < HEAD.W0, HEAD.W0, tl.where(p < HEAD.W0 + HEAD.W1, HEAD.W1, HEAD.W2))
    if REST > 0:
        start, width = tl.where(p < R, start, R), tl.where(p < R, width, REST)
    first = tl.max_contiguous(tl.multiple_of(p + start, GRAIN), GRAIN)
    second = tl.max_contiguous(tl.multiple_of(p + start + width, GRAIN), GRAIN)
    return first[None, None, :], second[None, None, :]


@triton.jit
def filled(HEAD: tl.constexpr):
    """Which places of a tile hold a channel: of the first, and of the second of each pair."""
    p = tl.arange(0, HEAD.P)[None, None, :]
    return p < (HEAD.D + 1) // 2, p < HEAD.D // 2


@triton.jit
def load_pairs(X, at, ok, HEAD: tl.constexpr):
    """The channels of the heads at X + at, (BT, HB, 1), as two tiles (BT, HB, P) in X's dtype; 0 where not ok."""
    if HEAD.LAYOUT == "interleaved":
        c = tl.arange(0, 2 * HEAD.P)[None, None, :]
        x = tl.load(X + at + c, mask=ok & (c < HEAD.D), other=0.0)
        a, b = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], HEAD.P, 2)))
    else:
        first, second = channels(HEAD)
        has_first, has_second = filled(HEAD)
        a = tl.load(X + at + first, mask=ok & has_first, other=0.0)
        b = tl.load(X + at + second, mask=ok & has_second, other=0.0)
    return a, b


@triton.jit
def store_pairs(X, at, ok, a, b, HEAD: tl.constexpr):
    T: tl.constexpr = X.dtype.element_ty
    if HEAD.LAYOUT == "interleaved":
        c = tl.arange(0, 2 * HEAD.P)[None, None, :]
        x = tl.reshape(tl.join(a.to(T), b.to(T)), (a.shape[0], a.shape[1], 2 * HEAD.P))
        tl.store(X + at + c, x, mask=ok & (c < HEAD.D))
    else:
        first, second = channels(HEAD)
        has_first, has_second = filled(HEAD)
        tl.store(X + at + first, a.to(T), mask=ok & has_first)
        tl.store(X + at + second, b.to(T), mask=ok & has_second)


@triton.jit
def chunk_of(i, group, BT: tl.constexpr, HB: tl.constexpr, SIDE: tl.constexpr):
    """Heads of chunk i, (BT, HB, 1), and which of them exist."""
    head = (group * SIDE.CHUNKS + i) * HB + tl.arange(0, HB)[None, :, None]
    head = head + tl.zeros((BT, 1, 1), tl.int32)
    return head, head < SIDE.H


@triton.jit
def load_heads(x, b, n, ok, group, BT: tl.constexpr, HB: tl.constexpr, HEAD: tl.constexpr, SIDE: tl.constexpr):
    """The chunks of tokens n of samples b, (BT, 1, 1), as pairs of tiles."""
    CHUNKS: tl.constexpr = SIDE.CHUNKS
    X, stride, at = x[0], x[3], place(x, b, n)
    chunks = ()
    for i in tl.static_range(CHUNKS):
        head, exists = chunk_of(i, group, BT, HB, SIDE)
        chunks = chunks + (load_pairs(X, at + head * stride, ok & exists, HEAD),)
    return chunks


@triton.jit
def load_affine(W, head, exists, HEAD: tl.constexpr, HIDDEN: tl.constexpr):
    """The norm's parameter beside a chunk, fp32."""
    if HIDDEN:
        a, b = load_pairs(W, head * HEAD.D, exists, HEAD)
    else:
        a, b = load_pairs(W, head * 0, exists, HEAD)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def _total(v, HIDDEN: tl.constexpr):
    v = tl.sum(v, axis=2, keep_dims=True)
    if HIDDEN:
        v = tl.sum(v, axis=1, keep_dims=True)
    return v


@triton.jit
def _centred(chunk, mean, exists, HEAD: tl.constexpr):
    has_first, has_second = filled(HEAD)
    a = tl.where(exists & has_first, chunk[0].to(tl.float32) - mean, 0.0)
    return a, tl.where(exists & has_second, chunk[1].to(tl.float32) - mean, 0.0)


@triton.jit
def statistics(
    chunks, group, eps, BT: tl.constexpr, HB: tl.constexpr, HEAD: tl.constexpr, SIDE: tl.constexpr, LAW: tl.constexpr
):
    """(mean, rstd) of every chunk, (BT, HB, 1); under scope "hidden" (BT, 1, 1), the same for all."""
    CHUNKS: tl.constexpr = SIDE.CHUNKS
    COUNT: tl.constexpr = HEAD.D * SIDE.H if LAW.HIDDEN else HEAD.D
    means = ()
    if LAW.NORM == "layer":
        totals = ()
        for i in tl.static_range(CHUNKS):
            totals = totals + (chunks[i][0].to(tl.float32) + chunks[i][1].to(tl.float32),)
        means = means_of(totals, COUNT, SIDE, LAW)
    squares = ()
    for i in tl.static_range(CHUNKS):
        if LAW.NORM == "layer":
            _, exists = chunk_of(i, group, BT, HB, SIDE)
            a, b = _centred(chunks[i], means[i], exists, HEAD)
        else:
            a, b = chunks[i][0].to(tl.float32), chunks[i][1].to(tl.float32)
        squares = squares + (a * a + b * b,)
    variances = means_of(squares, COUNT, SIDE, LAW)
    found = ()
    for i in tl.static_range(CHUNKS):
        rstd = tl.rsqrt(variances[i] + eps)
        if LAW.NORM == "layer":
            found = found + ((means[i], rstd),)
        else:
            found = found + ((0.0, rstd),)
    return found


@triton.jit
def means_of(tiles, COUNT: tl.constexpr, SIDE: tl.constexpr, LAW: tl.constexpr):
    """Means over the tile of each chunk, or over all of them."""
    CHUNKS: tl.constexpr = SIDE.CHUNKS
    found = ()
    if LAW.HIDDEN:
        total = tiles[0]
        for i in tl.static_range(1, CHUNKS):
            total += tiles[i]
        total = _total(total, True) / COUNT
        for _ in tl.static_range(CHUNKS):
            found = found + (total,)
    else:
        for i in tl.static_range(CHUNKS):
            found = found + (_total(tiles[i], False) / COUNT,)
    return found


# ---- forward --------------------------------------------------------------------------------------------------
@triton.jit
def rounded(v, T: tl.constexpr):
    return v.to(T).to(tl.float32)


@triton.jit
def normed(v, mean, rstd, w, b, T: tl.constexpr, LAW: tl.constexpr):
    """The norm of fp32 channels. F.layer_norm rounds once; RMSNorm before its weight and after each of its steps."""
    NATIVE: tl.constexpr = LAW.NATIVE
    RMS: tl.constexpr = LAW.NORM == "rms"
    if LAW.NORM == "layer":
        v = (v - mean) * rstd
    if RMS:
        v = v * rstd
        if NATIVE:
            v = rounded(v, T)
    if w is not None:
        v = v * w
        if NATIVE and RMS:
            v = rounded(v, T)
    if b is not None:
        v = v + b
        if NATIVE and RMS:
            v = rounded(v, T)
    if NATIVE and LAW.NORM == "layer":
        v = rounded(v, T)
    return v


@triton.jit
def turn(x, y, cos, sin, turns, T: tl.constexpr, HEAD: tl.constexpr, ROUND: tl.constexpr):
    """Rotates pairs of fp32 channels; the others, and those of tokens that do not turn, stay as they are."""
    R: tl.constexpr = HEAD.W0 + HEAD.W1 + HEAD.W2
    xc, ys, yc, xs = x * cos, y * sin, y * cos, x * sin
    if ROUND:
        xc, ys, yc, xs = rounded(xc, T), rounded(ys, T), rounded(yc, T), rounded(xs, T)
    turns = turns & (tl.arange(0, HEAD.P)[None, None, :] < R)
    return tl.where(turns, xc - ys, x), tl.where(turns, yc + xs, y)


@triton.jit
def write_heads(
    out, affine, table, chunks, cos, sin, b, n, ok, first, turns, eps, group,
    BT: tl.constexpr, HB: tl.constexpr, HEAD: tl.constexpr, SIDE: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """Norm, rotation and store of the loaded chunks; cos and sin: the rows that all heads share."""
    CHUNKS: tl.constexpr = SIDE.CHUNKS
    OUT, stride, at = out[0], out[3], place(out, b, n)
    W, BIAS = affine
    T: tl.constexpr = OUT.dtype.element_ty
    if LAW.NORM is not None:
        found = statistics(chunks, group, eps, BT, HB, HEAD, SIDE, LAW)
    wa, wb, ba, bb = None, None, None, None
    for i in tl.static_range(CHUNKS):
        head, exists = chunk_of(i, group, BT, HB, SIDE)
        x, y = chunks[i][0].to(tl.float32), chunks[i][1].to(tl.float32)
        if LAW.NORM is not None:
            if W is not None and (LAW.HIDDEN or i == 0):
                wa, wb = load_affine(W, head, exists, HEAD, LAW.HIDDEN)
            if BIAS is not None and (LAW.HIDDEN or i == 0):
                ba, bb = load_affine(BIAS, head, exists, HEAD, LAW.HIDDEN)
            mean, rstd = found[i]
            x = normed(x, mean, rstd, wa, ba, T, LAW)
            y = normed(y, mean, rstd, wb, bb, T, LAW)
        if SIDE.TABLE is not None:
            if SIDE.PER_HEAD:
                cos, sin = head_rows(table, n - first, b, head, ok & exists & turns, HEAD, SIDE)
            x, y = turn(x, y, cos, sin, turns, T, HEAD, SIDE.ROUND)
        store_pairs(OUT, at + head * stride, ok & exists, x, y, HEAD)


@triton.jit
def rows_of(tile, tokens, batch, BT: tl.constexpr):
    """Sample and token of every row of a tile, and which of them exist, (BT, 1, 1)."""
    row = tile * BT + tl.arange(0, BT)[:, None, None]
    b = row // tokens
    return b, row - b * tokens, b < batch


@triton.jit
def operand(X, batch_stride, stride, head_stride, ALIGN: tl.constexpr):
    return X, multiple(batch_stride, ALIGN), multiple(stride, ALIGN), multiple(head_stride, ALIGN)


@triton.jit
def place(x, b, n):
    """Offsets of tokens in an operand, (BT, 1, 1)."""
    return b.to(tl.int64) * x[1] + n.to(tl.int64) * x[2]


@triton.jit
def _one(
    x, out, affine, table, axes, tile, tokens, batch, start, stop, eps, group,
    BT: tl.constexpr, HB: tl.constexpr, HEAD: tl.constexpr, SIDE: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """A tile of q alone, or of k."""
    b, n, ok = rows_of(tile, tokens, batch, BT)
    turns = (n >= start) & (n < stop)
    chunks = load_heads(x, b, n, ok, group, BT, HB, HEAD, SIDE)
    cos, sin = table_rows(table, axes, n - start, b, ok & turns, HB, HEAD, SIDE)
    write_heads(out, affine, table, chunks, cos, sin, b, n, ok, start, turns, eps, group, BT, HB, HEAD, SIDE, LAW)


@kernel
def qk_norm_rope(
    Q, K, Q_OUT, K_OUT, Q_WEIGHT, K_WEIGHT, Q_BIAS, K_BIAS, COS, SIN, K_COS, K_SIN,
    COS_T, SIN_T, COS_H, SIN_H, COS_W, SIN_W, GRIDS, ENDS,
    batch: tl.int32, q_tokens: tl.int32, k_tokens: tl.int32, q_tiles: tl.int32,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64, k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    qo_b: tl.int64, qo_n: tl.int64, qo_h: tl.int64, ko_b: tl.int64, ko_n: tl.int64, ko_h: tl.int64,
    c_b: tl.int64, c_n: tl.int64, c_h: tl.int64, c_p: tl.int64,
    kc_b: tl.int64, kc_n: tl.int64, kc_h: tl.int64, kc_p: tl.int64,
    size_t: tl.int32, size_h: tl.int32, size_w: tl.int32, segments: tl.int32, steps: tl.int32,
    start: tl.int32, stop: tl.int32, eps: tl.float32,
    BT: tl.constexpr, HB: tl.constexpr, HEAD: tl.constexpr, QS: tl.constexpr, KS: tl.constexpr, LAW: tl.constexpr,
    TOGETHER: tl.constexpr, ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr,
):  # fmt: skip
    """Program (tile, group of heads): a tile of tokens of q and of k TOGETHER; else q_tiles tiles of q, then k's."""
    tile, group = tl.program_id(0), tl.program_id(1)
    q, k = operand(Q, q_b, q_n, q_h, ALIGN), operand(K, k_b, k_n, k_h, ALIGN)
    q_out, k_out = operand(Q_OUT, qo_b, qo_n, qo_h, ALIGN), operand(K_OUT, ko_b, ko_n, ko_h, ALIGN)
    q_affine, k_affine = (Q_WEIGHT, Q_BIAS), (K_WEIGHT, K_BIAS)
    table = aligned_table(COS, SIN, c_b, c_n, c_h, c_p, TABLE_ALIGN)
    axes = (COS_T, SIN_T, COS_H, SIN_H, COS_W, SIN_W, GRIDS, ENDS, size_t, size_h, size_w, segments, steps)
    if TOGETHER:
        b, n, ok = rows_of(tile, q_tokens, batch, BT)
        turns = (n >= start) & (n < stop)
        qs = load_heads(q, b, n, ok, group, BT, HB, HEAD, QS)
        ks = load_heads(k, b, n, ok, group, BT, HB, HEAD, KS)
        cos, sin = table_rows(table, axes, n - start, b, ok & turns, HB, HEAD, QS)
        write_heads(q_out, q_affine, table, qs, cos, sin, b, n, ok, start, turns, eps, group, BT, HB, HEAD, QS, LAW)
        write_heads(k_out, k_affine, table, ks, cos, sin, b, n, ok, start, turns, eps, group, BT, HB, HEAD, KS, LAW)
    elif tile < q_tiles:
        _one(q, q_out, q_affine, table, axes, tile, q_tokens, batch, start, stop, eps, group, BT, HB, HEAD, QS, LAW)
    else:
        k_table = aligned_table(K_COS, K_SIN, kc_b, kc_n, kc_h, kc_p, TABLE_ALIGN)
        rest = tile - q_tiles
        _one(k, k_out, k_affine, k_table, axes, rest, k_tokens, batch, start, stop, eps, group, BT, HB, HEAD, KS, LAW)
