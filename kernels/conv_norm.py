"""Norm over the channels of a pixel, SiLU, and the moves of a video between layouts; forward and backward.

    y = act(n(x) * weight + bias)      n: x * sqrt(C) / max(||x||, eps) | x * rsqrt(mean(x^2) + eps) | (x - mean) * rstd

A program owns BLOCK_P pixels of one frame, with all their channels where the norm needs them, so x is read once:
2 * itemsize bytes a value, backward 3. Its frame decides by scalars whether x or the cache is read, which makes the
virtual cat; without norm and act it is the layout pass of `causal_conv3d` and `next_cache`, bit for bit. Tiles hold
4,096 values, in 16-byte accesses along channels (channels_last_3d) or pixels (NCDHW).

SiLU is not computed in the convolution's A tile: there every value would pass through it once per tap and tile of Cout,
two special-function operations each, of which an SM does 16 a clock: 1,024 clocks for 128 pixels x 64 channels, whose
products with 96 columns take 384 on sm_90. Once per value, in this pass, it hides behind 2 * itemsize bytes.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.conv_index import channel_offset, pixel_count, pixel_offset, silu, silu_slope


@triton.jit
def _tile(
    A, pixel, channel, live, width, s_c, s_h, s_w, LAYOUT: tl.constexpr, ALIGN: tl.constexpr
):  # fmt: skip
    rows = pixel_offset(pixel, width, s_h, s_w, LAYOUT, ALIGN)
    return tl.load(A + (rows[:, None] + channel_offset(channel, s_c, LAYOUT, ALIGN)[None, :]), mask=live, other=0.0)


@triton.jit
def _inverse(x, eps, C: tl.constexpr, NORM: tl.constexpr):
    """What a pixel's channels are multiplied by: (P,)."""
    squares = tl.sum(x * x, 1)
    if NORM == 1:
        inverse = tl.sqrt(C + 0.0) / tl.maximum(tl.sqrt(squares), eps)
    else:
        inverse = 1.0 / tl.sqrt(squares / C + eps)
    return inverse


@kernel
def normalize(
    Y, X, CACHE, WEIGHT, BIAS, STATS,
    frames: tl.int32, cached: tl.int32, height: tl.int32, width: tl.int32,
    x_b: tl.int64, x_c: tl.int64, x_t: tl.int64, x_h: tl.int64, x_w: tl.int64,
    c_b: tl.int64, c_c: tl.int64, c_t: tl.int64, c_h: tl.int64, c_w: tl.int64,
    y_b: tl.int64, y_c: tl.int64, y_t: tl.int64, y_h: tl.int64, y_w: tl.int64, eps: tl.float32,
    C: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, X_LAYOUT: tl.constexpr, X_ALIGN: tl.constexpr,
    C_LAYOUT: tl.constexpr, C_ALIGN: tl.constexpr, Y_LAYOUT: tl.constexpr, Y_ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Y (B, C, frames, H, W): `cached` frames from CACHE, then those of X. NORM: 0 none, 1 l2, 2 rms, 3 group.

    STATS (B, 2, C): mean and rstd of each channel's group. Grid: B * frames * tiles of H * W, blocks of channels.
    """
    pixels = pixel_count(height, width, X_LAYOUT, X_ALIGN, Y_LAYOUT, Y_ALIGN)
    tiles = tl.cdiv(pixels, BLOCK_P)
    spot = tl.program_id(0)
    t = spot // tiles % frames
    b = (spot // tiles // frames).to(tl.int64)
    pixel = spot % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    live = (pixel < pixels)[:, None] & (channel < C)[None, :]
    if CACHE is not None:
        if t < cached:
            A = CACHE + (b * multiple(c_b, C_ALIGN) + t * multiple(c_t, C_ALIGN))
            raw = _tile(A, pixel, channel, live, width, c_c, c_h, c_w, C_LAYOUT, C_ALIGN)
        else:
            A = X + (b * multiple(x_b, X_ALIGN) + (t - cached) * multiple(x_t, X_ALIGN))
            raw = _tile(A, pixel, channel, live, width, x_c, x_h, x_w, X_LAYOUT, X_ALIGN)
    else:
        A = X + (b * multiple(x_b, X_ALIGN) + t * multiple(x_t, X_ALIGN))
        raw = _tile(A, pixel, channel, live, width, x_c, x_h, x_w, X_LAYOUT, X_ALIGN)

    if NORM == 0 and not ACT:
        y = raw
    else:
        x = raw.to(tl.float32)
        if NORM == 3:
            at = STATS + b * 2 * C + channel
            x = (x - tl.load(at, mask=channel < C, other=0.0)[None, :]) * tl.load(at + C, mask=channel < C, other=0.0)[
                None, :
            ]
        elif NORM != 0:
            x = x * _inverse(x, eps, C, NORM)[:, None]
        if WEIGHT is not None:
            x = x * tl.load(WEIGHT + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
        if BIAS is not None:
            x = x + tl.load(BIAS + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
        if ACT:
            x = silu(x)
        y = x.to(Y.dtype.element_ty)
    rows = pixel_offset(pixel, width, y_h, y_w, Y_LAYOUT, Y_ALIGN)
    columns = channel_offset(channel, y_c, Y_LAYOUT, Y_ALIGN)
    Y += b * multiple(y_b, Y_ALIGN) + t * multiple(y_t, Y_ALIGN)
    tl.store(Y + (rows[:, None] + columns[None, :]), y, mask=live)


@kernel
def normalize_backward(
    X, G, DX, WEIGHT, BIAS, PARTS,
    count: tl.int32, frames: tl.int32, height: tl.int32, width: tl.int32,
    x_b: tl.int64, x_c: tl.int64, x_t: tl.int64, x_h: tl.int64, x_w: tl.int64,
    g_b: tl.int64, g_c: tl.int64, g_t: tl.int64, g_h: tl.int64, g_w: tl.int64,
    d_b: tl.int64, d_c: tl.int64, d_t: tl.int64, d_h: tl.int64, d_w: tl.int64, eps: tl.float32,
    C: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, X_LAYOUT: tl.constexpr, X_ALIGN: tl.constexpr,
    G_LAYOUT: tl.constexpr, G_ALIGN: tl.constexpr, D_LAYOUT: tl.constexpr, D_ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """DX of the channel norms from G; may be G's own memory. PARTS (programs, 2, C): sums for WEIGHT and BIAS.

    A program takes every num_programs-th of `count` tiles and sums in that order: the same bits every time.
    """
    pixels = pixel_count(height, width, X_LAYOUT, X_ALIGN, G_LAYOUT, G_ALIGN)
    tiles = tl.cdiv(pixels, BLOCK_P)
    channel = tl.arange(0, BLOCK_C)
    known = channel < C
    d_weight = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    d_bias = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    weight = tl.full((BLOCK_C,), 1.0, dtype=tl.float32)
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + channel, mask=known, other=0.0).to(tl.float32)
    for spot in range(tl.program_id(0), count, tl.num_programs(0)):
        t = spot // tiles % frames
        b = (spot // tiles // frames).to(tl.int64)
        pixel = spot % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        live = (pixel < pixels)[:, None] & known[None, :]
        A = X + (b * multiple(x_b, X_ALIGN) + t * multiple(x_t, X_ALIGN))
        x = _tile(A, pixel, channel, live, width, x_c, x_h, x_w, X_LAYOUT, X_ALIGN).to(tl.float32)
        A = G + (b * multiple(g_b, G_ALIGN) + t * multiple(g_t, G_ALIGN))
        g = _tile(A, pixel, channel, live, width, g_c, g_h, g_w, G_LAYOUT, G_ALIGN).to(tl.float32)
        inverse = tl.full((BLOCK_P,), 1.0, dtype=tl.float32)
        if NORM != 0:
            inverse = _inverse(x, eps, C, NORM)
        unit = x * inverse[:, None]
        if ACT:
            z = unit * weight[None, :]
            if BIAS is not None:
                z += tl.load(BIAS + channel, mask=known, other=0.0).to(tl.float32)[None, :]
            g = g * silu_slope(z)
        if PARTS is not None:
            d_weight += g * unit
            if BIAS is not None:
                d_bias += g
        if DX is not None:
            g = g * weight[None, :]
            if NORM != 0:
                along = tl.sum(g * unit, 1) / C
                if NORM == 1:  # a pixel shorter than eps was divided by a constant
                    along = tl.where(tl.sqrt(tl.sum(x * x, 1)) < eps, 0.0, along)
                g = (g - unit * along[:, None]) * inverse[:, None]
            rows = pixel_offset(pixel, width, d_h, d_w, D_LAYOUT, D_ALIGN)
            columns = channel_offset(channel, d_c, D_LAYOUT, D_ALIGN)
            D = DX + (b * multiple(d_b, D_ALIGN) + t * multiple(d_t, D_ALIGN))
            tl.store(D + (rows[:, None] + columns[None, :]), g.to(DX.dtype.element_ty), mask=live)
    if PARTS is not None:
        at = PARTS + tl.program_id(0).to(tl.int64) * 2 * C + channel
        tl.store(at, tl.sum(d_weight, 0), mask=known)
        if BIAS is not None:
            tl.store(at + C, tl.sum(d_bias, 0), mask=known)


@kernel(kind="small")
def sum_rows(
    Y, PARTS, rows: tl.int32, columns: tl.int32, row: tl.int64, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Y[c] = sum of PARTS[r, c] over r, in one fixed order. row: distance of PARTS' rows. Grid: blocks of columns."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for first in range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        at = PARTS + (r[:, None] * row + column[None, :])
        total += tl.load(at, mask=(r < rows)[:, None] & (column < columns)[None, :], other=0.0)
    tl.store(Y + column, tl.sum(total, 0).to(Y.dtype.element_ty), mask=column < columns)
