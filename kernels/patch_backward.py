"""Gradients of the patch embedding: two GEMMs, both with the patches gathered or scattered on the way.

dx[patch(n)][k] = sum_d g[n, d] W[d, k]      a tile owns BM tokens and all of K (up to BK), the loop runs over d:
                                             g is read once, patches do not overlap, so each value is stored once
dW[d, k] = sum_n g[n, d] x[patch(n)][k]      split over tokens: a program owns BN outputs, BK values and `per` token
db[d]    = sum_n g[n, d]                     tiles, and writes fp32 partials; `patch_sum` adds them in order of the
                                             split: the same bits in every run
"""

import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.patch import corners, gather, inside, locate, weights


@kernel(kind="gemm")
def patch_embed_dx(
    G, W, DX,
    rows: tl.int32, N: tl.int32, h: tl.int32, w: tl.int32,
    wD: tl.int64, wC: tl.int64, wT: tl.int64, wH: tl.int64, wW: tl.int64,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
    a8: tl.int64, s0: tl.int64, s1: tl.int64, s2: tl.int64, s3: tl.int64, s4: tl.int64, s5: tl.int64, s6: tl.int64,
    s7: tl.int64,
    C: tl.constexpr, D: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, PACKED: tl.constexpr,
    MANY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: token tiles * tiles of K, which are neighbours and read g together. G (rows, D) and DX (the videos) are
    contiguous."""
    K: tl.constexpr = C * PT * PH * PW
    KTILES: tl.constexpr = (K + BK - 1) // BK
    tile = tl.program_id(0) // KTILES
    row0 = 0
    if MANY:
        first, row0, rows, h, w = locate(
            tile, a0, a1, a2, a3, a4, a5, a6, a7, a8, s0, s1, s2, s3, s4, s5, s6, s7
        )  # fmt: skip
        tile -= first
        N = rows
        DX += row0.to(tl.int64) * K
    sH = (w * PW).to(tl.int64)
    sT = sH * (h * PH)
    sC = N.to(tl.int64) * (PT * PH * PW)
    row = tile * BM + tl.arange(0, BM)
    live = row < rows
    k = tl.program_id(0) % KTILES * BK + tl.arange(0, BK)
    grad = G + (row0 + row).to(tl.int64)[:, None] * D
    acc = tl.zeros((BM, BK), tl.float32)
    for start in range(0, D, BN):
        d = start + tl.arange(0, BN)
        g = tl.load(grad + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        b = weights(W, d, k, wD, wC, wT, wH, wW, D, K, PT, PH, PW, PACKED, BN, BK)
        acc = tl.dot(g.to(W.dtype.element_ty), tl.trans(b), acc, input_precision=PRECISION)
    corner = corners(row, N, h, w, sC * C, sT, sH, 1, PT, PH, PW)
    spot = DX + corner[:, None] + inside(k, sC, sT, sH, 1, PT, PH, PW)[None, :]
    tl.store(spot, acc.to(DX.dtype.element_ty), mask=live[:, None] & (k < K)[None, :])


@kernel(kind="gemm")
def patch_embed_dw(
    G, X, DW, DB,
    rows: tl.int32, N: tl.int32, h: tl.int32, w: tl.int32,
    sB: tl.int64, sC: tl.int64, sT: tl.int64, sH: tl.int64, sW: tl.int64,
    tiles: tl.int32, per: tl.int32, split0: tl.int32, pitch: tl.int64,
    a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64, a7: tl.int64,
    a8: tl.int64, s0: tl.int64, s1: tl.int64, s2: tl.int64, s3: tl.int64, s4: tl.int64, s5: tl.int64, s6: tl.int64,
    s7: tl.int64,
    C: tl.constexpr, D: tl.constexpr, PT: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, UNIT: tl.constexpr,
    ALIGN: tl.constexpr, DALIGN: tl.constexpr, MANY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: tiles of D * tiles of K, splits. Split s writes DW + (split0 + s) * pitch, and DB likewise.
    DALIGN divides pitch."""
    K: tl.constexpr = C * PT * PH * PW
    KTILES: tl.constexpr = (K + BK - 1) // BK
    d = tl.program_id(0) // KTILES * BN + tl.arange(0, BN)
    k = tl.program_id(0) % KTILES * BK + tl.arange(0, BK)
    split = tl.program_id(1)
    step = 1 if UNIT else sW
    if not MANY:
        sB, sC, sT, sH = multiple(sB, ALIGN), multiple(sC, ALIGN), multiple(sT, ALIGN), multiple(sH, ALIGN)
    acc = tl.zeros((BN, BK), tl.float32)
    total = tl.zeros((BN,), tl.float32)
    for tile in range(split * per, tl.minimum(split * per + per, tiles)):
        if MANY:
            first, row0, count, th, tw = locate(
                tile, a0, a1, a2, a3, a4, a5, a6, a7, a8, s0, s1, s2, s3, s4, s5, s6, s7
            )  # fmt: skip
            row = (tile - first) * BM + tl.arange(0, BM)
            live = row < count
            yH = (tw * PW).to(tl.int64)
            yT = yH * (th * PH)
            yC = count.to(tl.int64) * (PT * PH * PW)
            corner = row0.to(tl.int64) * K + corners(row, count, th, tw, yC, yT, yH, 1, PT, PH, PW)
            grad = G + (row0 + row).to(tl.int64)[:, None] * D
        else:
            row = tile * BM + tl.arange(0, BM)
            live = row < rows
            yC, yT, yH = sC, sT, sH
            corner = corners(row, N, h, w, sB, sT, sH, step, PT, PH, PW)
            grad = G + row.to(tl.int64)[:, None] * D
        g = tl.load(grad + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)
        if DW is not None:
            x = gather(X, corner, live, k, yC, yT, yH, step, K, PT, PH, PW)
            acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
        if DB is not None:
            total += tl.sum(g.to(tl.float32), axis=0)
    at = (split0 + split).to(tl.int64) * multiple(pitch, DALIGN)
    if DW is not None:
        spot = DW + at + d.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(spot, acc.to(DW.dtype.element_ty), mask=(d < D)[:, None] & (k < K)[None, :])
    if DB is not None:
        if KTILES == 1:
            tl.store(DB + at + d, total.to(DB.dtype.element_ty), mask=d < D)
        else:
            tl.store(DB + at + d, total.to(DB.dtype.element_ty), mask=(d < D) & (tl.program_id(0) % KTILES == 0))


@kernel(kind="small")
def patch_sum(
    P, OUT, TAIL, count: tl.int32, size: tl.int64, tail: tl.int64, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """OUT[i] = sum_s P[s, i] for i < size, TAIL[i - size] for the next `tail`; s ascends. Either may be None.

    Grid: blocks of size + tail; ALIGN divides both. The second stage of dW and db, and pos's gradient
    (the sum over the batch)."""
    size, tail = multiple(size, ALIGN), multiple(tail, ALIGN)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = i < size + tail
    acc = tl.zeros((BLOCK,), tl.float32)
    for s in range(0, count):
        acc += tl.load(P + s * (size + tail) + i, mask=live, other=0.0).to(tl.float32)
    if OUT is not None:
        tl.store(OUT + i, acc.to(OUT.dtype.element_ty), mask=i < size)
    if TAIL is not None:
        tl.store(TAIL + i - size, acc.to(TAIL.dtype.element_ty), mask=live & (i >= size))
