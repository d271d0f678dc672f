"""Causal 3-D convolution as an implicit GEMM; its own backward towards the input (transposed weights).

    y[b, n, p] = sum over taps and c of x[b, c, p * stride + tap * dilation - pad] * w[n, tap, c]  + bias[n] + residual

The GEMM is (pixels of one output frame) x Cout x (taps * C). A program owns BLOCK_M pixels of one frame (b, t'), so
which input frames its taps meet is a matter of a few scalars: they bound the loop, and frames that do not exist cost
nothing; frames of the cache and of x come from two pointers with their own strides, in two loops over one accumulator.
Space padding is index arithmetic in the load of the A tile: zeros are a mask (cp.async fills them in), repeated pixels
another address. Nothing is copied, padded or concatenated.

Tiles: BLOCK_M pixels by N0 + N1 of Cout by K of C. Tiles are powers of two and the models' widths are not: 96 = 64 + 32
and 192 = 128 + 64 are two accumulators that share the A tile; padding 96 to 128 lanes would waste a quarter of the
products. K is 64 where it divides C, else 32: two K parts a step would make Triton wait for each product.

Order of the loop: frame, row and column of the tap, channels innermost, all in one loop so that loads are pipelined
across taps. Row addresses are kept as pointers; a step adds one scalar to them and compares two indices. Each tap reads
the tile's pixels again, from L2 (cp.async bypasses L1 for 16 bytes): (1 / BLOCK_M + 1 / (N0 + N1)) * itemsize bytes a
multiply-add.

The A tile is not a TMA box: Triton 3.6 and 3.7 offer no im2col descriptors, and tiled boxes of H x W know no stride.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.conv_index import channel_offset, fold, pixel_count, pixel_offset, taps_before


@triton.jit
def _weights(W, k, n, w_n, C: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr):
    """A (K, BLOCK_N) tile of w, contiguous along K. k: channel of this tap; W: of this tap."""
    if C % K == 0 and N % BLOCK_N == 0:
        b = tl.load(W + (k[:, None] + n[None, :] * w_n))
    else:
        b = tl.load(W + (k[:, None] + n[None, :] * w_n), mask=(k < C)[:, None] & (n < N)[None, :], other=0.0)
    return b


@triton.jit
def _sweep(
    acc0, acc1, A, W, h0, w0, n0, n1, begin, end, frame0, frames, height, width, a_t, a_h, a_w, w_n, w_t, w_h, w_w,
    C: tl.constexpr, N: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, TIME_FIRST: tl.constexpr, SPACE_PAD: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds the taps of frames `begin` to `end` of the kernel, which all lie in the source A, to the accumulators."""
    STEPS: tl.constexpr = (C + K - 1) // K
    rows = A + (h0 * a_h + w0 * a_w)[:, None]
    for step in range(begin * (KH * KW * STEPS), end * (KH * KW * STEPS)):
        c = step % STEPS * K
        tap = step // STEPS
        dw = tap % KW
        dh = tap // KW % KH
        dt = tap // (KW * KH)
        frame = frame0 + dt * DT
        if TIME_FIRST:
            frame = tl.minimum(tl.maximum(frame, 0), frames - 1)
        h = h0 + dh * DH
        w = w0 + dw * DW
        if SPACE_PAD == 0:
            here = rows + (frame * a_t + dh * DH * a_h + dw * DW * a_w + c)
            inside = ((h >= 0) & (h < height) & (w >= 0) & (w < width))[:, None]
        else:
            h = fold(h, height, SPACE_PAD == 2)
            w = fold(w, width, SPACE_PAD == 2)
            here = A + (h * a_h + w * a_w)[:, None] + (frame * a_t + c)
            inside = (h >= 0)[:, None]
        there = W + (dt * w_t + dh * w_h + dw * w_w)

        k = tl.arange(0, K)
        live = inside if C % K == 0 else inside & (c + k < C)[None, :]
        if SPACE_PAD == 0 or C % K != 0:
            a = tl.load(here + k[None, :], mask=live, other=0.0)
        else:
            a = tl.load(here + k[None, :])
        acc0 = tl.dot(a, _weights(there, c + k, n0, w_n, C, N, K, N0 + N1), acc0, input_precision=PRECISION)
        if N1 > 0:
            acc1 = tl.dot(a, _weights(there, c + k, n1, w_n, C, N, K, N0 + N1), acc1, input_precision=PRECISION)
    return acc0, acc1


@triton.jit
def _finish(
    acc, Y, BIAS, RESIDUAL, pixel, n, pixels, width, y_c, y_h, y_w, r_c, r_h, r_w,
    N: tl.constexpr, Y_LAYOUT: tl.constexpr, Y_ALIGN: tl.constexpr, R_LAYOUT: tl.constexpr, R_ALIGN: tl.constexpr,
):  # fmt: skip
    """Bias, residual, one rounding, store."""
    live = (pixel < pixels)[:, None] & (n < N)[None, :]
    if BIAS is not None:
        acc += tl.load(BIAS + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if RESIDUAL is not None:
        rows = pixel_offset(pixel, width, r_h, r_w, R_LAYOUT, R_ALIGN)
        columns = channel_offset(n, r_c, R_LAYOUT, R_ALIGN)
        acc += tl.load(RESIDUAL + (rows[:, None] + columns[None, :]), mask=live, other=0.0).to(tl.float32)
    rows = pixel_offset(pixel, width, y_h, y_w, Y_LAYOUT, Y_ALIGN)
    columns = channel_offset(n, y_c, Y_LAYOUT, Y_ALIGN)
    tl.store(Y + (rows[:, None] + columns[None, :]), acc.to(Y.dtype.element_ty), mask=live)


@kernel(kind="gemm")
def conv(
    Y, X, CACHE, W, BIAS, RESIDUAL,
    out_frames: tl.int32, out_height: tl.int32, out_width: tl.int32,
    frames: tl.int32, cached: tl.int32, height: tl.int32, width: tl.int32,
    start_t: tl.int32, start_h: tl.int32, start_w: tl.int32,
    x_b: tl.int64, x_t: tl.int64, x_h: tl.int64, x_w: tl.int64,
    c_b: tl.int64, c_t: tl.int64, c_h: tl.int64, c_w: tl.int64,
    w_0: tl.int64, w_n: tl.int64, w_t: tl.int64, w_h: tl.int64, w_w: tl.int64,
    y_b: tl.int64, y_c: tl.int64, y_t: tl.int64, y_h: tl.int64, y_w: tl.int64,
    r_b: tl.int64, r_c: tl.int64, r_t: tl.int64, r_h: tl.int64, r_w: tl.int64,
    C: tl.constexpr, N: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, DT: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TIME_FIRST: tl.constexpr, SPACE_PAD: tl.constexpr, X_ALIGN: tl.constexpr, W_ALIGN: tl.constexpr,
    Y_LAYOUT: tl.constexpr, Y_ALIGN: tl.constexpr, R_LAYOUT: tl.constexpr, R_ALIGN: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    """Y (B, N, T', H', W') over the virtual cat of CACHE (`cached` frames) and X (`frames`), channels adjacent in both.

    start_*: input index of tap 0 for output 0 in that cat (minus the padding). SPACE_PAD: 0 zeros, 1 edge, 2 reflect.
    W: tap 0 at element w_0, taps by strides, which may be negative; channels adjacent.
    Grid: B * T' * tiles of H' * W' * tiles of N, the latter fastest.
    """
    tiles_n: tl.constexpr = (N + N0 + N1 - 1) // (N0 + N1)
    pixels = pixel_count(out_height, out_width, Y_LAYOUT, Y_ALIGN, R_LAYOUT, R_ALIGN)
    tiles_m = tl.cdiv(pixels, BLOCK_M)
    spot = tl.program_id(0)
    first_n = spot % tiles_n * (N0 + N1)
    tile = spot // tiles_n % tiles_m
    plane = spot // tiles_n // tiles_m
    t = plane % out_frames
    b = (plane // out_frames).to(tl.int64)

    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    clamped = tl.minimum(pixel, pixels - 1)  # rows beyond the frame repeat its last pixel and are not stored
    h0 = clamped // out_width * SH + start_h
    w0 = clamped % out_width * SW + start_w
    n0 = first_n + tl.arange(0, N0)
    n1 = first_n + N0 + tl.arange(0, N1 if N1 > 0 else N0)
    acc0 = tl.zeros((BLOCK_M, N0), dtype=tl.float32)
    acc1 = tl.zeros((BLOCK_M, N1 if N1 > 0 else 1), dtype=tl.float32)

    W += multiple(w_0, W_ALIGN)
    w_n = multiple(w_n, W_ALIGN)
    w_t = multiple(w_t, W_ALIGN)
    w_h = multiple(w_h, W_ALIGN)
    w_w = multiple(w_w, W_ALIGN)
    frame0 = t * ST + start_t
    begin = 0 if TIME_FIRST else taps_before(frame0, 0, DT, KT)
    middle = taps_before(frame0, cached, DT, KT)
    end = KT if TIME_FIRST else taps_before(frame0, cached + frames, DT, KT)
    if CACHE is not None:
        acc0, acc1 = _sweep(
            acc0, acc1, CACHE + b * multiple(c_b, X_ALIGN), W, h0, w0, n0, n1, begin, middle, frame0, cached, height,
            width, multiple(c_t, X_ALIGN), multiple(c_h, X_ALIGN), multiple(c_w, X_ALIGN), w_n, w_t, w_h, w_w,
            C, N, KH, KW, DT, DH, DW, TIME_FIRST, SPACE_PAD, N0, N1, K, PRECISION,
        )  # fmt: skip
        begin = tl.maximum(begin, middle)
    acc0, acc1 = _sweep(
        acc0, acc1, X + b * multiple(x_b, X_ALIGN), W, h0, w0, n0, n1, begin, end, frame0 - cached, frames, height,
        width, multiple(x_t, X_ALIGN), multiple(x_h, X_ALIGN), multiple(x_w, X_ALIGN), w_n, w_t, w_h, w_w,
        C, N, KH, KW, DT, DH, DW, TIME_FIRST, SPACE_PAD, N0, N1, K, PRECISION,
    )  # fmt: skip

    Y += b * multiple(y_b, Y_ALIGN) + t * multiple(y_t, Y_ALIGN)
    if RESIDUAL is not None:
        RESIDUAL += b * multiple(r_b, R_ALIGN) + t * multiple(r_t, R_ALIGN)
    _finish(
        acc0, Y, BIAS, RESIDUAL, pixel, n0, pixels, out_width, y_c, y_h, y_w, r_c, r_h, r_w,
        N, Y_LAYOUT, Y_ALIGN, R_LAYOUT, R_ALIGN,
    )  # fmt: skip
    if N1 > 0:
        _finish(
            acc1, Y, BIAS, RESIDUAL, pixel, n1, pixels, out_width, y_c, y_h, y_w, r_c, r_h, r_w,
            N, Y_LAYOUT, Y_ALIGN, R_LAYOUT, R_ALIGN,
        )  # fmt: skip
