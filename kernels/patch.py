"""Patch embedding: y[b, n, d] = sum_k W[d, k] x[patch(b, n)][k] + bias[d] + pos[n, d], k = (c, dt, dh, dw).

One kernel gathers, multiplies, adds, rounds once and packs; no matrix of patches is stored. A program owns BM tokens
and `per` tiles of BN outputs. K is small (16 to 192 in the models), so the gathered tile A[BM, BK] is one to three
k-steps, and stays while the loop runs over outputs: the traffic is y, written once in 16-byte stores, and W from L2, BN
rows a step. Larger K takes the k loop inside. Programs of one token tile are neighbours: they gather again from L2.

A list of videos of any sizes is one launch for up to eight of them: `locate` finds a tile's video by comparing with
where each one begins. The token axis of a dense batch is B*N, so small videos fill a tile together.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple


@triton.jit
def locate(tile, a0, a1, a2, a3, a4, a5, a6, a7, a8, s0, s1, s2, s3, s4, s5, s6, s7):
    """The video of a tile. a_i = first tile << 32 | first row of video i, s_i = h << 32 | w; a_8, and every slot that
    is not used, holds the ends. -> first tile, first row, rows, h, w."""
    at, end, size = a0, a1, s0
    for_1 = tile >= (a1 >> 32)
    at, end, size = tl.where(for_1, a1, at), tl.where(for_1, a2, end), tl.where(for_1, s1, size)
    for_2 = tile >= (a2 >> 32)
    at, end, size = tl.where(for_2, a2, at), tl.where(for_2, a3, end), tl.where(for_2, s2, size)
    for_3 = tile >= (a3 >> 32)
    at, end, size = tl.where(for_3, a3, at), tl.where(for_3, a4, end), tl.where(for_3, s3, size)
    for_4 = tile >= (a4 >> 32)
    at, end, size = tl.where(for_4, a4, at), tl.where(for_4, a5, end), tl.where(for_4, s4, size)
    for_5 = tile >= (a5 >> 32)
    at, end, size = tl.where(for_5, a5, at), tl.where(for_5, a6, end), tl.where(for_5, s5, size)
    for_6 = tile >= (a6 >> 32)
    at, end, size = tl.where(for_6, a6, at), tl.where(for_6, a7, end), tl.where(for_6, s6, size)
    for_7 = tile >= (a7 >> 32)
    at, end, size = tl.where(for_7, a7, at), tl.where(for_7, a8, end), tl.where(for_7, s7, size)
    row0 = (at & 0x7FFFFFFF).to(tl.int32)
    rows = (end & 0x7FFFFFFF).to(tl.int32) - row0
    return (at >> 32).to(tl.int32), row0, rows, (size >> 32).to(tl.int32), (size & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def corners(row, N, h, w, sB, sT, sH, sW, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Where the patches of these tokens begin: offsets of x[b, 0, t*PT, h*PH, w*PW]."""
    b, n = row // N, row % N
    t, rest = n // (h * w), n % (h * w)
    offset = b.to(tl.int64) * sB + (t * PT).to(tl.int64) * sT
    return offset + (rest // w * PH).to(tl.int64) * sH + (rest % w * PW).to(tl.int64) * sW


@triton.jit
def inside(k, sC, sT, sH, sW, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """Offsets of the values k = (c, dt, dh, dw) from the beginning of a patch."""
    dw, dh, dt, c = k % PW, k // PW % PH, k // (PW * PH) % PT, k // (PW * PH * PT)
    return c.to(tl.int64) * sC + dt.to(tl.int64) * sT + dh.to(tl.int64) * sH + dw * sW


@triton.jit
def gather(X, corner, live, k, sC, sT, sH, sW, K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr):
    """A[m, k]: the values k of each patch; zero beyond K and in rows that are not live."""
    spot = X + corner[:, None] + inside(k, sC, sT, sH, sW, PT, PH, PW)[None, :]
    return tl.load(spot, mask=live[:, None] & (k < K)[None, :], other=0.0)


@triton.jit
def weights(
    W, d, k, wD, wC, wT, wH, wW, D: tl.constexpr, K: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr,
    PW: tl.constexpr, PACKED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """W[k, d]; rows of K values side by side where PACKED."""
    if PACKED:
        spot = W + k[:, None] + d.to(tl.int64)[None, :] * K
    else:
        spot = W + inside(k, wC, wT, wH, wW, PT, PH, PW)[:, None] + (d.to(tl.int64) * wD)[None, :]
    if K % BK == 0 and D % BN == 0:
        return tl.load(spot)
    else:
        return tl.load(spot, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)


@kernel(kind="gemm")
def patch_embed(
    X, W, BIAS, POS, Y,
    rows: tl.int32, N: tl.int32, h: tl.int32, w: tl.int32,
    sB: tl.int64, sC: tl.int64, sT: tl.int64, sH: tl.int64, sW: tl.int64,
    wD: tl.int64, wC: tl.int64, wT: tl.int64, wH: tl.int64, wW: tl.int64,
    pB: tl.int64, pN: tl.int64, per: tl.int32, parts: tl.int32,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
    a8: tl.int64, s0: tl.int64, s1: tl.int64, s2: tl.int64, s3: tl.int64, s4: tl.int64, s5: tl.int64, s6: tl.int64,
    s7: tl.int64,
    C: tl.constexpr, D: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    UNIT: tl.constexpr, ALIGN: tl.constexpr, PALIGN: tl.constexpr, PACKED: tl.constexpr, MANY: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: token tiles * parts. MANY: X is a list of contiguous videos, one after the other, and h, w, the strides and
    rows come from the table. UNIT: x's W axis has stride 1. ALIGN, PALIGN: what divides the strides of x and pos."""
    K: tl.constexpr = C * PT * PH * PW
    STEPS: tl.constexpr = (K + BK - 1) // BK
    tile = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    row0 = 0
    if MANY:
        first, row0, rows, h, w = locate(
            tile, a0, a1, a2, a3, a4, a5, a6, a7, a8, s0, s1, s2, s3, s4, s5, s6, s7
        )  # fmt: skip
        tile -= first
        N = rows
        X += row0.to(tl.int64) * K
        sH = (w * PW).to(tl.int64)
        sT = sH * (h * PH)
        sC = rows.to(tl.int64) * (PT * PH * PW)
        sB = sC  # one sample: never used
    else:
        sB, sC, sT, sH = multiple(sB, ALIGN), multiple(sC, ALIGN), multiple(sT, ALIGN), multiple(sH, ALIGN)
    step = 1 if UNIT else sW
    row = tile * BM + tl.arange(0, BM)
    live = row < rows
    corner = corners(row, N, h, w, sB, sT, sH, step, PT, PH, PW)
    k = tl.arange(0, BK)
    wide: tl.constexpr = W.dtype.element_ty
    if STEPS <= 3:
        x0 = gather(X, corner, live, k, sC, sT, sH, step, K, PT, PH, PW).to(wide)
    if STEPS == 2 or STEPS == 3:
        x1 = gather(X, corner, live, k + BK, sC, sT, sH, step, K, PT, PH, PW).to(wide)
    if STEPS == 3:
        x2 = gather(X, corner, live, k + 2 * BK, sC, sT, sH, step, K, PT, PH, PW).to(wide)
    out = Y + (row0 + row).to(tl.int64)[:, None] * D
    if POS is not None:
        pN, pB = multiple(pN, PALIGN), multiple(pB, PALIGN)
        table = POS + ((row0 + row % N).to(tl.int64) * pN + (row // N).to(tl.int64) * pB)[:, None]
    last = tl.minimum((part + 1) * per, (D + BN - 1) // BN)
    for j in range(part * per, last):
        d = j * BN + tl.arange(0, BN)
        acc = tl.zeros((BM, BN), tl.float32)
        if STEPS <= 3:
            b = weights(W, d, k, wD, wC, wT, wH, wW, D, K, PT, PH, PW, PACKED, BN, BK)
            acc = tl.dot(x0, b, acc, input_precision=PRECISION)
            if STEPS >= 2:
                b = weights(W, d, k + BK, wD, wC, wT, wH, wW, D, K, PT, PH, PW, PACKED, BN, BK)
                acc = tl.dot(x1, b, acc, input_precision=PRECISION)
            if STEPS == 3:
                b = weights(W, d, k + 2 * BK, wD, wC, wT, wH, wW, D, K, PT, PH, PW, PACKED, BN, BK)
                acc = tl.dot(x2, b, acc, input_precision=PRECISION)
        else:
            for i in range(0, STEPS):
                ki = k + i * BK
                x = gather(X, corner, live, ki, sC, sT, sH, step, K, PT, PH, PW).to(wide)
                b = weights(W, d, ki, wD, wC, wT, wH, wW, D, K, PT, PH, PW, PACKED, BN, BK)
                acc = tl.dot(x, b, acc, input_precision=PRECISION)
        mask = live[:, None] & (d < D)[None, :]
        if BIAS is not None:
            acc += tl.load(BIAS + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        if POS is not None:
            acc += tl.load(table + d[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(out + d[None, :], acc.to(Y.dtype.element_ty), mask=mask)
