"""GroupNorm of a video in three small steps around `conv_norm.normalize`: statistics, and the sums of its backward.

    mean, M2 per (sample, run of tiles, channel) -> combined per group by Chan's formula -> (x - mean) * rstd * w + b
    backward: with g = dy * silu'(z), u = (x - mean) * rstd:  S1 = sum g, S2 = sum g * u per channel; over a group
              dx = rstd * (w * g - mean(w * S1) - u * mean(w * S2)),  dw = sum over samples of S2,  db of S1

A program of the first step runs over every programs-th tile of its sample, always in one order, and keeps a mean and
M2 per row of the tile and channel: no square of a mean is ever subtracted, and no atomics are needed. Bytes a value in
units of x's itemsize: forward 3 (statistics 1, apply 2), backward 6 (statistics 1, sums 2, apply 3).
"""

import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.conv_index import channel_offset, pixel_count, pixel_offset, silu_slope


@kernel
def group_statistics(
    PARTS, X, programs: tl.int32, frames: tl.int32, height: tl.int32, width: tl.int32,
    x_b: tl.int64, x_c: tl.int64, x_t: tl.int64, x_h: tl.int64, x_w: tl.int64,
    C: tl.constexpr, X_LAYOUT: tl.constexpr, X_ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """PARTS (B, programs, 3, C): values seen, mean, summed squared distance from it. Grid: B * programs, channels."""
    b = (tl.program_id(0) // programs).to(tl.int64)
    pixels = pixel_count(height, width, X_LAYOUT, X_ALIGN, 0, 1)
    tiles = tl.cdiv(pixels, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    columns = channel_offset(channel, x_c, X_LAYOUT, X_ALIGN)
    mean = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    m2 = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    seen = tl.zeros((BLOCK_P,), dtype=tl.float32)
    for spot in range(tl.program_id(0) % programs, frames * tiles, programs):
        pixel = spot % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        live = (pixel < pixels)[:, None] & (channel < C)[None, :]
        rows = pixel_offset(pixel, width, x_h, x_w, X_LAYOUT, X_ALIGN)
        A = X + (b * multiple(x_b, X_ALIGN) + (spot // tiles) * multiple(x_t, X_ALIGN))
        x = tl.load(A + (rows[:, None] + columns[None, :]), mask=live, other=0.0).to(tl.float32)
        here = tl.where(pixel < pixels, 1.0, 0.0)
        seen += here
        step = x - mean
        mean += step * (here / tl.maximum(seen, 1.0))[:, None]
        m2 += step * (x - mean) * here[:, None]
    count = tl.sum(seen, 0)  # Welford's sums of each row of tiles, now of all rows
    center = tl.sum(mean * seen[:, None], 0) / tl.maximum(count, 1.0)
    off = mean - center[None, :]
    spread = tl.sum(m2 + off * off * seen[:, None], 0)
    at = PARTS + tl.program_id(0).to(tl.int64) * 3 * C + channel
    tl.store(at, tl.zeros((BLOCK_C,), dtype=tl.float32) + count, mask=channel < C)
    tl.store(at + C, center, mask=channel < C)
    tl.store(at + 2 * C, spread, mask=channel < C)


@kernel(kind="small")
def group_combine(
    STATS, PARTS, parts: tl.int32, eps: tl.float32, C: tl.constexpr, RUN: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """STATS (B, 2, C): mean and rstd of each channel's group of RUN channels. Grid: B * groups."""
    b = (tl.program_id(0) // (C // RUN)).to(tl.int64)
    channel = tl.program_id(0) % (C // RUN) * RUN + tl.arange(0, BLOCK_C)
    known = tl.arange(0, BLOCK_C) < RUN
    total = 0.0
    seen = 0.0
    for first in range(0, parts, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        live = (r < parts)[:, None] & known[None, :]
        at = PARTS + ((b * parts + r) * (3 * C))[:, None] + channel[None, :]
        n = tl.load(at, mask=live, other=0.0)
        total += tl.sum(tl.sum(n * tl.load(at + C, mask=live, other=0.0), 1), 0)
        seen += tl.sum(tl.sum(n, 1), 0)
    mean = total / seen
    m2 = 0.0
    for first in range(0, parts, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        live = (r < parts)[:, None] & known[None, :]
        at = PARTS + ((b * parts + r) * (3 * C))[:, None] + channel[None, :]
        off = tl.load(at + C, mask=live, other=0.0) - mean
        part = tl.load(at + 2 * C, mask=live, other=0.0) + tl.load(at, mask=live, other=0.0) * off * off
        m2 += tl.sum(tl.sum(part, 1), 0)
    nothing = tl.zeros((BLOCK_C,), dtype=tl.float32)
    at = STATS + b * 2 * C + channel
    tl.store(at, nothing + mean, mask=known)
    tl.store(at + C, nothing + 1.0 / tl.sqrt(m2 / seen + eps), mask=known)


@kernel
def group_sums(
    PARTS, X, G, WEIGHT, BIAS, STATS, programs: tl.int32, frames: tl.int32, height: tl.int32, width: tl.int32,
    x_b: tl.int64, x_c: tl.int64, x_t: tl.int64, x_h: tl.int64, x_w: tl.int64,
    g_b: tl.int64, g_c: tl.int64, g_t: tl.int64, g_h: tl.int64, g_w: tl.int64,
    C: tl.constexpr, X_LAYOUT: tl.constexpr, X_ALIGN: tl.constexpr, G_LAYOUT: tl.constexpr, G_ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """PARTS (B, programs, 2, C): S2 and S1; without X only S1, of G itself. Grid: B * programs, channels."""
    b = (tl.program_id(0) // programs).to(tl.int64)
    pixels = pixel_count(height, width, X_LAYOUT, X_ALIGN, G_LAYOUT, G_ALIGN)
    tiles = tl.cdiv(pixels, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    along = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    plain = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for spot in range(tl.program_id(0) % programs, frames * tiles, programs):
        pixel = spot % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
        live = (pixel < pixels)[:, None] & known[None, :]
        rows = pixel_offset(pixel, width, g_h, g_w, G_LAYOUT, G_ALIGN)
        A = G + (b * multiple(g_b, G_ALIGN) + (spot // tiles) * multiple(g_t, G_ALIGN))
        columns = channel_offset(channel, g_c, G_LAYOUT, G_ALIGN)
        g = tl.load(A + (rows[:, None] + columns[None, :]), mask=live, other=0.0).to(tl.float32)
        if X is not None:
            rows = pixel_offset(pixel, width, x_h, x_w, X_LAYOUT, X_ALIGN)
            A = X + (b * multiple(x_b, X_ALIGN) + (spot // tiles) * multiple(x_t, X_ALIGN))
            columns = channel_offset(channel, x_c, X_LAYOUT, X_ALIGN)
            x = tl.load(A + (rows[:, None] + columns[None, :]), mask=live, other=0.0).to(tl.float32)
            at = STATS + b * 2 * C + channel
            center = tl.load(at, mask=known, other=0.0)
            unit = (x - center[None, :]) * tl.load(at + C, mask=known, other=0.0)[None, :]
            z = unit
            if WEIGHT is not None:
                z = z * tl.load(WEIGHT + channel, mask=known, other=0.0).to(tl.float32)[None, :]
            if BIAS is not None:
                z = z + tl.load(BIAS + channel, mask=known, other=0.0).to(tl.float32)[None, :]
            g = g * silu_slope(z)
            along += g * unit
        plain += g
    at = PARTS + tl.program_id(0).to(tl.int64) * 2 * C + channel
    tl.store(at, tl.sum(along, 0), mask=known)
    tl.store(at + C, tl.sum(plain, 0), mask=known)


@kernel(kind="small")
def group_moments(
    SUMS, MOMENTS, PARTS, WEIGHT, parts: tl.int32, values: tl.float32,
    C: tl.constexpr, RUN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """SUMS (B, 2, C): S2 and S1 of a sample; MOMENTS (B, 2, C): the means over a group of w * S2 and w * S1.

    values: pixels of a sample times RUN. Grid: B * groups.
    """
    b = (tl.program_id(0) // (C // RUN)).to(tl.int64)
    channel = tl.program_id(0) % (C // RUN) * RUN + tl.arange(0, BLOCK_C)
    known = tl.arange(0, BLOCK_C) < RUN
    weight = tl.full((BLOCK_C,), 1.0, dtype=tl.float32)
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + channel, mask=known, other=0.0).to(tl.float32)
    for which in tl.static_range(2):
        total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
        for first in range(0, parts, BLOCK_R):
            r = first + tl.arange(0, BLOCK_R)
            part = PARTS + ((b * parts + r) * (2 * C) + which * C)[:, None] + channel[None, :]
            total += tl.load(part, mask=(r < parts)[:, None] & known[None, :], other=0.0)
        sums = tl.sum(total, 0)
        moment = tl.sum(tl.where(known, weight * sums, 0.0), 0) / values
        at = b * 2 * C + which * C + channel
        tl.store(SUMS + at, sums, mask=known)
        tl.store(MOMENTS + at, tl.zeros((BLOCK_C,), dtype=tl.float32) + moment, mask=known)


@kernel
def group_backward(
    DX, X, G, WEIGHT, BIAS, STATS, MOMENTS, frames: tl.int32, height: tl.int32, width: tl.int32,
    x_b: tl.int64, x_c: tl.int64, x_t: tl.int64, x_h: tl.int64, x_w: tl.int64,
    g_b: tl.int64, g_c: tl.int64, g_t: tl.int64, g_h: tl.int64, g_w: tl.int64,
    d_b: tl.int64, d_c: tl.int64, d_t: tl.int64, d_h: tl.int64, d_w: tl.int64,
    C: tl.constexpr, X_LAYOUT: tl.constexpr, X_ALIGN: tl.constexpr, G_LAYOUT: tl.constexpr, G_ALIGN: tl.constexpr,
    D_LAYOUT: tl.constexpr, D_ALIGN: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """DX from the moments. Grid: B * frames * tiles of H * W, blocks of channels."""
    pixels = pixel_count(height, width, X_LAYOUT, X_ALIGN, G_LAYOUT, G_ALIGN)
    tiles = tl.cdiv(pixels, BLOCK_P)
    spot = tl.program_id(0)
    t = spot // tiles % frames
    b = (spot // tiles // frames).to(tl.int64)
    pixel = spot % tiles * BLOCK_P + tl.arange(0, BLOCK_P)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < C
    live = (pixel < pixels)[:, None] & known[None, :]
    rows = pixel_offset(pixel, width, x_h, x_w, X_LAYOUT, X_ALIGN)
    A = X + (b * multiple(x_b, X_ALIGN) + t * multiple(x_t, X_ALIGN))
    columns = channel_offset(channel, x_c, X_LAYOUT, X_ALIGN)
    x = tl.load(A + (rows[:, None] + columns[None, :]), mask=live, other=0.0).to(tl.float32)
    rows = pixel_offset(pixel, width, g_h, g_w, G_LAYOUT, G_ALIGN)
    A = G + (b * multiple(g_b, G_ALIGN) + t * multiple(g_t, G_ALIGN))
    columns = channel_offset(channel, g_c, G_LAYOUT, G_ALIGN)
    g = tl.load(A + (rows[:, None] + columns[None, :]), mask=live, other=0.0).to(tl.float32)
    at = STATS + b * 2 * C + channel
    rstd = tl.load(at + C, mask=known, other=0.0)[None, :]
    unit = (x - tl.load(at, mask=known, other=0.0)[None, :]) * rstd
    z = unit
    weight = tl.full((BLOCK_C,), 1.0, dtype=tl.float32)
    if WEIGHT is not None:
        weight = tl.load(WEIGHT + channel, mask=known, other=0.0).to(tl.float32)
        z = z * weight[None, :]
    if BIAS is not None:
        z = z + tl.load(BIAS + channel, mask=known, other=0.0).to(tl.float32)[None, :]
    g = g * silu_slope(z) * weight[None, :]
    at = MOMENTS + b * 2 * C + channel
    along = tl.load(at, mask=known, other=0.0)[None, :]
    plain = tl.load(at + C, mask=known, other=0.0)[None, :]
    g = rstd * (g - plain - unit * along)
    rows = pixel_offset(pixel, width, d_h, d_w, D_LAYOUT, D_ALIGN)
    columns = channel_offset(channel, d_c, D_LAYOUT, D_ALIGN)
    DX += b * multiple(d_b, D_ALIGN) + t * multiple(d_t, D_ALIGN)
    tl.store(DX + (rows[:, None] + columns[None, :]), g.to(DX.dtype.element_ty), mask=live)
