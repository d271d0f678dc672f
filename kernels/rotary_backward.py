"""Gradients of qk_norm_rope.

    n = (x - mean) * rstd,  a = n * w + b,  y = R(angle) a            (rms: without mean)
    da = R(-angle) dy,  dw = sum da * n,  db = sum da,  g = da * w,  dx = rstd * (g - mean(g) - n * mean(g * n))
    dcos = dy1 * a1 + dy2 * a2,  dsin = dy2 * a1 - dy1 * a2            for the pair (1, 2)

Statistics are computed again: 3 tensors of q's size move, not 4. The tiles are the forward's, (BT, HB, P) in pairs;
a program walks over every `programs`-th tile of q, or of k, and sums dw and db of its tiles in registers, (HB, P) under
scope "head" and a chunk each under "hidden". `sum_partials` then adds the rows that the programs left, always in one
order: the same bits in every run.

Few models learn a table: its gradients are a pass of their own, that writes one row per token (and head, where the
table has heads). The rows of an axis are summed by `axes_gradients`, a program for each.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.rotary import (
    chunk_of,
    load_affine,
    load_heads,
    means_of,
    normed,
    operand,
    place,
    rows_of,
    statistics,
    store_pairs,
    turn,
)
from fastdit.kernels.rotary_table import aligned_table, head_rows, positions, table_rows


class Wanted(NamedTuple):
    """Gradients of which parameters are summed."""

    Q_WEIGHT: bool
    Q_BIAS: bool
    K_WEIGHT: bool
    K_BIAS: bool


@triton.jit
def _rows(SUMS, at, WANTED: tl.constexpr):
    if WANTED:
        rows = SUMS + multiple(at, 4)
    else:
        rows = None
    return rows


@triton.jit
def _keep(SUMS, sums, row, HB: tl.constexpr, HEAD: tl.constexpr, SIDE: tl.constexpr, LAW: tl.constexpr):
    """Row `row` of the partial sums: of every channel of all heads, or of one head."""
    CHUNKS: tl.constexpr = SIDE.CHUNKS
    if LAW.HIDDEN:
        for i in tl.static_range(CHUNKS):
            head, exists = chunk_of(i, 0, 1, HB, SIDE)
            at = row.to(tl.int64) * (SIDE.H * HEAD.D) + head * HEAD.D
            a, b = tl.sum(sums[2 * i], 0, keep_dims=True), tl.sum(sums[2 * i + 1], 0, keep_dims=True)
            store_pairs(SUMS, at, exists, a, b, HEAD)
    else:
        a = tl.sum(tl.sum(sums[0], 1, keep_dims=True), 0, keep_dims=True)
        b = tl.sum(tl.sum(sums[1], 1, keep_dims=True), 0, keep_dims=True)
        at = tl.zeros((1, 1, 1), tl.int64) + row.to(tl.int64) * HEAD.D
        store_pairs(SUMS, at, at >= 0, a, b, HEAD)


@triton.jit
def _input(g, n, mean_g, mean_gn, rstd, LAW: tl.constexpr):
    """dx of fp32 channels."""
    if LAW.NORM == "layer":
        g = g - mean_g
    return (g - n * mean_gn) * rstd


@triton.jit
def _side(
    x, g, dx, W, DW, DB, table, axes, program, programs, tokens, batch, start, stop, eps, group, groups,
    BT: tl.constexpr, HB: tl.constexpr, HEAD: tl.constexpr, SIDE: tl.constexpr, LAW: tl.constexpr,
):  # fmt: skip
    """Every tile of q, or of k, that belongs to this program."""
    CHUNKS: tl.constexpr = SIDE.CHUNKS
    KEPT: tl.constexpr = SIDE.CHUNKS if LAW.HIDDEN else 1
    COUNT: tl.constexpr = HEAD.D * SIDE.H if LAW.HIDDEN else HEAD.D
    T: tl.constexpr = g[0].dtype.element_ty
    P: tl.constexpr = HEAD.P
    zero = tl.zeros((BT, HB, P), tl.float32)
    dw, db = (), ()
    for _ in tl.static_range(KEPT):
        if DW is not None:
            dw = dw + (zero, zero)
        if DB is not None:
            db = db + (zero, zero)
    wa, wb = None, None
    if W is not None and not LAW.HIDDEN:
        head, exists = chunk_of(0, group, BT, HB, SIDE)
        wa, wb = load_affine(W, head, exists, HEAD, False)
    for tile in range(program, tl.cdiv(batch * tokens, BT), programs):
        b, n, ok = rows_of(tile, tokens, batch, BT)
        turns = (n >= start) & (n < stop)
        grads = load_heads(g, b, n, ok, group, BT, HB, HEAD, SIDE)
        if LAW.NORM is not None:
            chunks = load_heads(x, b, n, ok, group, BT, HB, HEAD, SIDE)
            found = statistics(chunks, group, eps, BT, HB, HEAD, SIDE, LAW)
        cos, sin = table_rows(table, axes, n - start, b, ok & turns, HB, HEAD, SIDE)
        gs, ns, totals, crosses, grown_w, grown_b = (), (), (), (), (), ()
        for i in tl.static_range(CHUNKS):
            head, exists = chunk_of(i, group, BT, HB, SIDE)
            g0, g1 = grads[i][0].to(tl.float32), grads[i][1].to(tl.float32)
            if SIDE.TABLE is not None:
                if SIDE.PER_HEAD:
                    cos, sin = head_rows(table, n - start, b, head, ok & exists & turns, HEAD, SIDE)
                g0, g1 = turn(g0, g1, cos, -sin, turns, T, HEAD, False)
            if LAW.NORM is not None:
                mean, rstd = found[i]
                n0, n1 = chunks[i][0].to(tl.float32), chunks[i][1].to(tl.float32)
                if LAW.NORM == "layer":
                    n0, n1 = n0 - mean, n1 - mean
                n0, n1 = n0 * rstd, n1 * rstd
                if DW is not None:  # a row beyond the last may be no number
                    w0, w1 = tl.where(ok & exists, g0 * n0, 0.0), tl.where(ok & exists, g1 * n1, 0.0)
                    if LAW.HIDDEN:
                        grown_w = grown_w + (dw[2 * i] + w0, dw[2 * i + 1] + w1)
                    else:
                        dw = (dw[0] + w0, dw[1] + w1)
                if DB is not None:
                    if LAW.HIDDEN:
                        grown_b = grown_b + (db[2 * i] + g0, db[2 * i + 1] + g1)
                    else:
                        db = (db[0] + g0, db[1] + g1)
                if W is not None:
                    if LAW.HIDDEN:
                        va, vb = load_affine(W, head, exists, HEAD, True)
                    else:
                        va, vb = wa, wb
                    g0, g1 = g0 * va, g1 * vb
                if LAW.HIDDEN:
                    gs, ns = gs + ((g0, g1),), ns + ((n0, n1),)
                    totals, crosses = totals + (g0 + g1,), crosses + (g0 * n0 + g1 * n1,)
                else:
                    mean_g = tl.sum(g0 + g1, 2, keep_dims=True) / COUNT
                    mean_gn = tl.sum(g0 * n0 + g1 * n1, 2, keep_dims=True) / COUNT
                    g0, g1 = _input(g0, n0, mean_g, mean_gn, rstd, LAW), _input(g1, n1, mean_g, mean_gn, rstd, LAW)
            if dx[0] is not None and not LAW.HIDDEN:
                store_pairs(dx[0], place(dx, b, n) + head * dx[3], ok & exists, g0, g1, HEAD)
        if LAW.HIDDEN:
            if DW is not None:
                dw = grown_w
            if DB is not None:
                db = grown_b
            if dx[0] is not None:
                mean_gs, mean_gns = means_of(totals, COUNT, SIDE, LAW), means_of(crosses, COUNT, SIDE, LAW)
                for i in tl.static_range(CHUNKS):
                    head, exists = chunk_of(i, group, BT, HB, SIDE)
                    g0 = _input(gs[i][0], ns[i][0], mean_gs[i], mean_gns[i], found[i][1], LAW)
                    g1 = _input(gs[i][1], ns[i][1], mean_gs[i], mean_gns[i], found[i][1], LAW)
                    store_pairs(dx[0], place(dx, b, n) + head * dx[3], ok & exists, g0, g1, HEAD)
    row = program * groups + group
    if DW is not None:
        _keep(DW, dw, row, HB, HEAD, SIDE, LAW)
    if DB is not None:
        _keep(DB, db, row, HB, HEAD, SIDE, LAW)


@kernel
def qk_norm_rope_backward(
    Q, K, GQ, GK, DQ, DK, Q_WEIGHT, K_WEIGHT, COS, SIN, K_COS, K_SIN,
    COS_T, SIN_T, COS_H, SIN_H, COS_W, SIN_W, GRIDS, ENDS, SUMS,
    batch: tl.int32, q_tokens: tl.int32, k_tokens: tl.int32, q_programs: tl.int32, k_programs: tl.int32,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64, k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    gq_b: tl.int64, gq_n: tl.int64, gq_h: tl.int64, gk_b: tl.int64, gk_n: tl.int64, gk_h: tl.int64,
    dq_b: tl.int64, dq_n: tl.int64, dq_h: tl.int64, dk_b: tl.int64, dk_n: tl.int64, dk_h: tl.int64,
    c_b: tl.int64, c_n: tl.int64, c_h: tl.int64, c_p: tl.int64,
    kc_b: tl.int64, kc_n: tl.int64, kc_h: tl.int64, kc_p: tl.int64,
    size_t: tl.int32, size_h: tl.int32, size_w: tl.int32, segments: tl.int32, steps: tl.int32,
    start: tl.int32, stop: tl.int32, eps: tl.float32, q_w: tl.int64, q_bias: tl.int64, k_w: tl.int64, k_bias: tl.int64,
    BT: tl.constexpr, HB: tl.constexpr, HEAD: tl.constexpr, QS: tl.constexpr, KS: tl.constexpr, LAW: tl.constexpr,
    ALIGN: tl.constexpr, TABLE_ALIGN: tl.constexpr, WANTED: tl.constexpr,
):  # fmt: skip
    """q_programs for q, then k_programs for k; groups of heads along the second axis of the grid.

    GQ or GK is None where nothing is wanted of q or k. Rows of the partial sums begin at SUMS + q_w, ... .
    """
    program, group, groups = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    axes = (COS_T, SIN_T, COS_H, SIN_H, COS_W, SIN_W, GRIDS, ENDS, size_t, size_h, size_w, segments, steps)
    if program < q_programs:
        if GQ is not None:
            q, gq = operand(Q, q_b, q_n, q_h, ALIGN), operand(GQ, gq_b, gq_n, gq_h, ALIGN)
            dq = operand(DQ, dq_b, dq_n, dq_h, ALIGN)
            table = aligned_table(COS, SIN, c_b, c_n, c_h, c_p, TABLE_ALIGN)
            _side(
                q, gq, dq, Q_WEIGHT, _rows(SUMS, q_w, WANTED.Q_WEIGHT), _rows(SUMS, q_bias, WANTED.Q_BIAS), table, axes,
                program, q_programs, q_tokens, batch, start, stop, eps, group, groups, BT, HB, HEAD, QS, LAW,
            )  # fmt: skip
    else:
        if GK is not None:
            k, gk = operand(K, k_b, k_n, k_h, ALIGN), operand(GK, gk_b, gk_n, gk_h, ALIGN)
            dk = operand(DK, dk_b, dk_n, dk_h, ALIGN)
            k_table = aligned_table(K_COS, K_SIN, kc_b, kc_n, kc_h, kc_p, TABLE_ALIGN)
            _side(
                k, gk, dk, K_WEIGHT, _rows(SUMS, k_w, WANTED.K_WEIGHT), _rows(SUMS, k_bias, WANTED.K_BIAS), k_table,
                axes, program - q_programs, k_programs, k_tokens, batch, start, stop, eps, group, groups, BT, HB, HEAD,
                KS, LAW,
            )  # fmt: skip


@triton.jit
def _sum(SUMS, OUT, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = tl.arange(0, ROWS)[:, None]
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, rows, ROWS):
        ok = (first + row < rows) & (column < width)
        total += tl.load(SUMS + (first + row).to(tl.int64) * width + column, mask=ok, other=0.0)
    total = tl.sum(total, 0, keep_dims=True)
    tl.store(OUT + column, total.to(OUT.dtype.element_ty), mask=column < width)


@kernel(kind="small")
def sum_partials(
    SUMS, Q_WEIGHT, Q_BIAS, K_WEIGHT, K_BIAS,
    q_rows: tl.int32, k_rows: tl.int32, q_width: tl.int32, k_width: tl.int32,
    q_w: tl.int64, q_bias: tl.int64, k_w: tl.int64, k_bias: tl.int64, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds the rows of the partial sums in order, a block of columns a program; the four along the second axis."""
    which = tl.program_id(1)
    if Q_WEIGHT is not None:
        if which == 0:
            _sum(SUMS + q_w, Q_WEIGHT, q_rows, q_width, ROWS, COLUMNS)
    if Q_BIAS is not None:
        if which == 1:
            _sum(SUMS + q_bias, Q_BIAS, q_rows, q_width, ROWS, COLUMNS)
    if K_WEIGHT is not None:
        if which == 2:
            _sum(SUMS + k_w, K_WEIGHT, k_rows, k_width, ROWS, COLUMNS)
    if K_BIAS is not None:
        if which == 3:
            _sum(SUMS + k_bias, K_BIAS, k_rows, k_width, ROWS, COLUMNS)


# ---- tables ---------------------------------------------------------------------------------------------------
@kernel(kind="small")
def table_gradients(
    X, G, W, BIAS, DCOS, DSIN, batch: tl.int32, start: tl.int32, length: tl.int32,
    x_b: tl.int64, x_n: tl.int64, x_h: tl.int64, g_b: tl.int64, g_n: tl.int64, g_h: tl.int64, eps: tl.float32,
    BT: tl.constexpr, HB: tl.constexpr, HEAD: tl.constexpr, SIDE: tl.constexpr, LAW: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """DCOS, DSIN (B, length, H or 1, R/2): what each rotated token adds to its row of the table, a tile a program."""
    CHUNKS: tl.constexpr = SIDE.CHUNKS
    R: tl.constexpr = HEAD.W0 + HEAD.W1 + HEAD.W2
    T: tl.constexpr = X.dtype.element_ty
    x, g = operand(X, x_b, x_n, x_h, ALIGN), operand(G, g_b, g_n, g_h, ALIGN)
    b, n, ok = rows_of(tl.program_id(0), length, batch, BT)
    row = (b * length + n).to(tl.int64)
    chunks = load_heads(x, b, n + start, ok, 0, BT, HB, HEAD, SIDE)
    grads = load_heads(g, b, n + start, ok, 0, BT, HB, HEAD, SIDE)
    if LAW.NORM is not None:
        found = statistics(chunks, 0, eps, BT, HB, HEAD, SIDE, LAW)
    wa, wb, ba, bb = None, None, None, None
    P: tl.constexpr = HEAD.P
    p = tl.arange(0, P)[None, None, :]
    dcos, dsin = tl.zeros((BT, HB, P), tl.float32), tl.zeros((BT, HB, P), tl.float32)
    for i in tl.static_range(CHUNKS):
        head, exists = chunk_of(i, 0, BT, HB, SIDE)
        a0, a1 = chunks[i][0].to(tl.float32), chunks[i][1].to(tl.float32)
        if LAW.NORM is not None:
            if W is not None:
                wa, wb = load_affine(W, head, exists, HEAD, LAW.HIDDEN)
            if BIAS is not None:
                ba, bb = load_affine(BIAS, head, exists, HEAD, LAW.HIDDEN)
            a0 = normed(a0, found[i][0], found[i][1], wa, ba, T, LAW)
            a1 = normed(a1, found[i][0], found[i][1], wb, bb, T, LAW)
        g0, g1 = grads[i][0].to(tl.float32), grads[i][1].to(tl.float32)
        here = ok & exists & (p < R)
        c, s = tl.where(here, g0 * a0 + g1 * a1, 0.0), tl.where(here, g1 * a0 - g0 * a1, 0.0)
        if SIDE.PER_HEAD:
            at = (row * SIDE.H + head) * R + p
            tl.store(DCOS + at, c, mask=here)
            tl.store(DSIN + at, s, mask=here)
        dcos += c
        dsin += s
    if not SIDE.PER_HEAD:
        tl.store(DCOS + row * R + p, tl.sum(dcos, 1, keep_dims=True), mask=ok & (p < R))
        tl.store(DSIN + row * R + p, tl.sum(dsin, 1, keep_dims=True), mask=ok & (p < R))


@kernel(kind="small")
def axes_gradients(
    DCOS, DSIN, GRIDS, ENDS, OUT,
    batch: tl.int32, length: tl.int32, size_t: tl.int32, size_h: tl.int32, size_w: tl.int32,
    segments: tl.int32, steps: tl.int32,
    AXES: tl.constexpr, HEAD: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Program (i, axis): the sum of all tokens at position i of the axis, in fp64.

    OUT: cos then sin of every axis, (size, width) each, one after another.
    """
    i, axis = tl.program_id(0), tl.program_id(1)
    second, third = axis == 1, axis == 2
    size = tl.where(third, size_w, tl.where(second, size_h, size_t))
    width = tl.where(third, HEAD.W2, tl.where(second, HEAD.W1, HEAD.W0))
    begin = tl.where(third, HEAD.W0 + HEAD.W1, tl.where(second, HEAD.W0, 0))
    out = 2 * (tl.where(axis > 0, size_t * HEAD.W0, 0) + tl.where(third, size_h * HEAD.W1, 0))
    R: tl.constexpr = HEAD.W0 + HEAD.W1 + HEAD.W2
    c = tl.arange(0, WIDTH)[None, :]
    cos, sin = tl.zeros((BLOCK, WIDTH), tl.float64), tl.zeros((BLOCK, WIDTH), tl.float64)
    if i < size:
        for first in range(0, batch * length, BLOCK):
            row = first + tl.arange(0, BLOCK)[:, None]
            b = row // length
            ok = b < batch
            t, h, w = positions(tl.where(ok, row - b * length, 0), b, GRIDS, ENDS, segments, steps, AXES)
            mine = ok & (tl.where(third, w, tl.where(second, h, t)) == i) & (c < width)
            at = row.to(tl.int64) * R + begin + c
            cos += tl.load(DCOS + at, mask=mine, other=0.0).to(tl.float64)
            sin += tl.load(DSIN + at, mask=mine, other=0.0).to(tl.float64)
        at = out + i * width + c
        tl.store(OUT + at, tl.sum(cos, 0, keep_dims=True), mask=c < width)
        tl.store(OUT + at + size * width, tl.sum(sin, 0, keep_dims=True), mask=c < width)
