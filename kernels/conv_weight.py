"""The convolution's weight: its gradient as a GEMM over pixels, and the moves between weight layouts.

    dw[n, tap, c] = sum over b, t', p of g[b, n, t', p] * x[b, c, t' * stride + tap - pad, p * stride + tap - pad]

A program owns one tap, M of Cout by N0 + N1 of C, and one of `splits` runs of pixel blocks; a block is BLOCK_P pixels
of one output frame, so frames that a tap does not meet bound the loop, and cache and x are two loops as in the forward.
It writes fp32 parts (splits, Cout, taps, C), which `move_weight` sums in their order: no atomics, the same bits always.
FLOPs: the forward's. Bytes: every tap reads g and x again from L2; parts 2 * splits * weight * 4.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.conv_index import fold, taps_before


@triton.jit
def _sweep(
    acc0, acc1, A, G, n, c0, c1, begin, end, t_begin, t_count, frame0, frames, height, width, out_height, out_width,
    start_h, start_w, a_b, a_t, a_h, a_w, g_b, g_t, g_h, g_w,
    C: tl.constexpr, N: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    TIME_FIRST: tl.constexpr, SPACE_PAD: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds blocks `begin` to `end` of those over samples and the `t_count` output frames from t_begin on."""
    pixels = out_height * out_width
    blocks = tl.cdiv(pixels, BLOCK_P)
    for block in range(begin, end):
        t = t_begin + block // blocks % t_count
        b = block // blocks // t_count
        pixel = block % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
        live = pixel < pixels
        row = pixel // out_width
        column = pixel % out_width
        at = G + (row * g_h + column * g_w)[None, :] + (b * g_b + t * g_t) + n[:, None]
        if N % M == 0:
            g = tl.load(at, mask=live[None, :], other=0.0)
        else:
            g = tl.load(at, mask=live[None, :] & (n < N)[:, None], other=0.0)
        frame = frame0 + t * ST
        if TIME_FIRST:
            frame = tl.minimum(tl.maximum(frame, 0), frames - 1)
        h = row * SH + start_h
        w = column * SW + start_w
        if SPACE_PAD == 0:
            live = live & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        else:
            h = fold(h, height, SPACE_PAD == 2)
            w = fold(w, width, SPACE_PAD == 2)
        here = A + (h * a_h + w * a_w)[:, None] + (b * a_b + frame * a_t)
        mask = live[:, None] if C % (N0 + N1) == 0 else live[:, None] & (c0 < C)[None, :]
        acc0 = tl.dot(g, tl.load(here + c0[None, :], mask=mask, other=0.0), acc0, input_precision=PRECISION)
        if N1 > 0:
            mask = live[:, None] if C % (N0 + N1) == 0 else live[:, None] & (c1 < C)[None, :]
            acc1 = tl.dot(g, tl.load(here + c1[None, :], mask=mask, other=0.0), acc1, input_precision=PRECISION)
    return acc0, acc1


@kernel(kind="gemm")
def conv_weight_grad(
    PARTS, X, CACHE, G,
    splits: tl.int32, samples: tl.int32, out_frames: tl.int32, out_height: tl.int32, out_width: tl.int32,
    frames: tl.int32, cached: tl.int32, height: tl.int32, width: tl.int32,
    start_t: tl.int32, start_h: tl.int32, start_w: tl.int32,
    x_b: tl.int64, x_t: tl.int64, x_h: tl.int64, x_w: tl.int64,
    c_b: tl.int64, c_t: tl.int64, c_h: tl.int64, c_w: tl.int64,
    g_b: tl.int64, g_t: tl.int64, g_h: tl.int64, g_w: tl.int64,
    C: tl.constexpr, N: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TIME_FIRST: tl.constexpr, SPACE_PAD: tl.constexpr, X_ALIGN: tl.constexpr, G_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, M: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
):  # fmt: skip
    """PARTS (splits, N, taps, C). Arguments as in `conv`. Grid: splits * tiles of N * taps * tiles of C, C fastest."""
    tiles_c: tl.constexpr = (C + N0 + N1 - 1) // (N0 + N1)
    tiles_n: tl.constexpr = (N + M - 1) // M
    TAPS: tl.constexpr = KT * KH * KW
    spot = tl.program_id(0)
    first_c = spot % tiles_c * (N0 + N1)
    tap = spot // tiles_c % TAPS
    n = spot // (tiles_c * TAPS) % tiles_n * M + tl.arange(0, M)
    split = (spot // (tiles_c * TAPS * tiles_n)).to(tl.int64)
    c0 = first_c + tl.arange(0, N0)
    c1 = first_c + N0 + tl.arange(0, N1 if N1 > 0 else N0)
    start_w += tap % KW * DW
    start_h += tap // KW % KH * DH
    frame0 = start_t + tap // (KW * KH) * DT
    acc0 = tl.zeros((M, N0), dtype=tl.float32)
    acc1 = tl.zeros((M, N1 if N1 > 0 else 1), dtype=tl.float32)

    # output frames whose tap lies in the cache, then those where it lies in x: each a range
    MANY: tl.constexpr = 0x7FFFFFFF
    first = 0 if TIME_FIRST else taps_before(frame0, 0, ST, MANY)
    middle = tl.minimum(taps_before(frame0, cached, ST, MANY), out_frames)
    last = out_frames if TIME_FIRST else tl.minimum(taps_before(frame0, cached + frames, ST, MANY), out_frames)
    blocks = tl.cdiv(out_height * out_width, BLOCK_P) * samples
    if CACHE is not None:
        count = tl.maximum(middle - first, 0)
        acc0, acc1 = _sweep(
            acc0, acc1, CACHE, G, n, c0, c1, (split * (blocks * count) // splits).to(tl.int32),
            ((split + 1) * (blocks * count) // splits).to(tl.int32), first, count, frame0, cached,
            height, width, out_height, out_width, start_h, start_w,
            multiple(c_b, X_ALIGN), multiple(c_t, X_ALIGN), multiple(c_h, X_ALIGN), multiple(c_w, X_ALIGN),
            multiple(g_b, G_ALIGN), multiple(g_t, G_ALIGN), multiple(g_h, G_ALIGN), multiple(g_w, G_ALIGN),
            C, N, ST, SH, SW, TIME_FIRST, SPACE_PAD, BLOCK_P, M, N0, N1, PRECISION,
        )  # fmt: skip
        first = tl.maximum(first, middle)
    count = tl.maximum(last - first, 0)
    acc0, acc1 = _sweep(
        acc0, acc1, X, G, n, c0, c1, (split * (blocks * count) // splits).to(tl.int32),
        ((split + 1) * (blocks * count) // splits).to(tl.int32), first, count, frame0 - cached, frames,
        height, width, out_height, out_width, start_h, start_w,
        multiple(x_b, X_ALIGN), multiple(x_t, X_ALIGN), multiple(x_h, X_ALIGN), multiple(x_w, X_ALIGN),
        multiple(g_b, G_ALIGN), multiple(g_t, G_ALIGN), multiple(g_h, G_ALIGN), multiple(g_w, G_ALIGN),
        C, N, ST, SH, SW, TIME_FIRST, SPACE_PAD, BLOCK_P, M, N0, N1, PRECISION,
    )  # fmt: skip

    at = PARTS + (((split * N + n) * TAPS + tap) * C)[:, None]
    tl.store(at + c0[None, :], acc0, mask=(n < N)[:, None] & (c0 < C)[None, :])
    if N1 > 0:
        tl.store(at + c1[None, :], acc1, mask=(n < N)[:, None] & (c1 < C)[None, :])


@kernel(kind="small")
def move_weight(
    Y, X, parts: tl.int32, columns: tl.int32,
    x_p: tl.int64, x_n: tl.int64, x_c: tl.int64, x_t: tl.int64, x_h: tl.int64, x_w: tl.int64,
    y_n: tl.int64, y_c: tl.int64, y_t: tl.int64, y_h: tl.int64, y_w: tl.int64,
    KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, X_LAST: tl.constexpr, Y_LAST: tl.constexpr,
    TAPS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Y[n, c, tap] = sum over parts of X[part, n, c, tap], any strides: packs a weight, or sums its gradient's parts.

    *_LAST: channels adjacent. TAPS: KT * KH * KW as a power of two. Grid: blocks of channels, rows.
    """
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    tap = tl.arange(0, TAPS)
    t = tap // (KW * KH)
    h = tap // KW % KH
    w = tap % KW
    live = (tap < KT * KH * KW)[:, None] & (c < columns)[None, :]
    at = X + n * x_n + (t * x_t + h * x_h + w * x_w)[:, None] + (c if X_LAST else c * x_c)[None, :]
    if parts == 1:
        y = tl.load(at, mask=live, other=0.0).to(tl.float32)
    else:
        y = tl.zeros((TAPS, BLOCK_C), dtype=tl.float32)
        for part in range(0, parts):
            y += tl.load(at + part * x_p, mask=live, other=0.0).to(tl.float32)
    at = Y + n * y_n + (t * y_t + h * y_h + w * y_w)[:, None] + (c if Y_LAST else c * y_c)[None, :]
    tl.store(at, y.to(Y.dtype.element_ty), mask=live)
