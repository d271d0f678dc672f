"""The two GEMMs that frame a sublayer of an adaLN block, with everything that stands between them folded in.

norm_modulate_linear   y   = epilogue(h @ W^T + bias),   h = n(x) * (1 + scale) + shift, rounded to x.dtype
                       epilogue: nothing, an activation, or norm and rotation of the query and key heads
linear_gate_residual   out = residual + act(gate) * (a @ W^T + bias)

x (rows, C), W (F, C), tiles BM x BN of y, steps of BK along C. h is never stored: a program takes the row statistics of
its BM rows first (BM * C elements, which the GEMM's loop then finds in L2), and modulates each BM x BK tile of x in
registers on its way to the dot. That repeats F / BN times the few operations an element that the norm costs, against
2 * BN FLOPs an element in the dot: at BN = 128 an eighth of them would be felt, fewer are not.

Statistics: one pass over d = x - about, where about is the mean of the row's first block. By Cauchy-Schwarz about lies
within sqrt(C / BK) standard deviations of the mean, so the difference E[d^2] - E[d]^2 loses C / BK ulps at the worst.

Heads. Where queries and keys are normalised or rotated, a tile holds as many whole heads as fit: 2 of 64, 3 of 72 in
256 columns, 1 of 128. It may hold the channels of a head in any order, for it gathers rows of W: column 2p + s holds
side s of rotary pair p, whatever the layout, so that tl.split hands out both sides in the registers of one thread.
"interleaved" is the identity; the other layouts store the two sides apart, each a run of channels.

Rows. UNIFORM: every table has one row for `group` consecutive tokens, tiles do not straddle groups, and a tile reads a
vector of BK table entries. Otherwise each token of a tile has a row of its own (gathered: L1 and L2 hits).
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple, tanh


@triton.jit
def rounded(value, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """fp32, rounded to DTYPE on the way where the law is native."""
    if NATIVE:
        value = value.to(DTYPE).to(tl.float32)
    return value


@triton.jit
def activated(x, ACT: tl.constexpr):
    if ACT == "gelu_tanh":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACT == "relu":
        x = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return x


@triton.jit
def table_row(at, INDEX, tokens, stride_b, stride_m, per, ALIGN: tl.constexpr):
    """Offset of the table row of token `at` (a number, or one per row): by index, or per sample and `per` tokens."""
    if INDEX is not None:
        row = tl.load(INDEX + at).to(tl.int64) * multiple(stride_b, ALIGN)
    else:
        row = (at // tokens).to(tl.int64) * multiple(stride_b, ALIGN)
        row += (at % tokens // per).to(tl.int64) * multiple(stride_m, ALIGN)
    return row


@triton.jit
def tile_rows(pid, rows, group, BM: tl.constexpr):
    """(first, rows of the tile, which of them exist). Rows behind the end repeat the last one."""
    tiles = tl.cdiv(group, BM)
    start = pid // tiles * group
    first = start + pid % tiles * BM
    at = first + tl.arange(0, BM)
    last = tl.minimum(start + group, rows)
    return first, tl.minimum(at, last - 1), at < last


@triton.jit
def row_offsets(at, tokens, stride_b, stride_n, ALIGN: tl.constexpr):
    b = (at // tokens).to(tl.int64) * multiple(stride_b, ALIGN)
    return b + (at % tokens).to(tl.int64) * multiple(stride_n, ALIGN)


@triton.jit
def load_k(pointers, k0, k, C: tl.constexpr, BK: tl.constexpr):
    """A step of BK along the contiguous channels; what lies behind them is 0."""
    if C % BK == 0:
        values = tl.load(pointers + k0)
    else:
        values = tl.load(pointers + k0, mask=k < C - k0, other=0.0)
    return values


@triton.jit
def statistics(pointers, k, eps, C: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr, STAGES: tl.constexpr):
    """mean (0 for rms) and 1 / sqrt(var + eps) of rows whose tile pointers are given."""
    block = load_k(pointers, 0, k, C, BK).to(tl.float32)
    about = tl.sum(block, 1) / min(C, BK)
    if not LAYER:
        about = tl.zeros_like(about)
    first = tl.zeros_like(about)
    second = tl.zeros_like(about)
    for k0 in tl.range(0, C, BK, num_stages=STAGES):
        d = load_k(pointers, k0, k, C, BK).to(tl.float32) - about[:, None]
        if C % BK != 0:
            d = tl.where(k < C - k0, d, 0.0)
        first += tl.sum(d, 1)
        second += tl.sum(d * d, 1)
    if LAYER:
        first = first / C
        mean = about + first
        variance = tl.maximum(second / C - first * first, 0.0, propagate_nan=tl.PropagateNan.ALL)
    else:
        mean = about
        variance = second / C
    return mean, 1.0 / tl.sqrt(variance + eps)


@triton.jit
def table_values(T, row, k, k0, C: tl.constexpr, BK: tl.constexpr, UNIFORM: tl.constexpr):
    if UNIFORM:
        values = load_k(T + row + k, k0, k, C, BK)[None, :]
    else:
        values = load_k(T + row[:, None] + k[None, :], k0, k[None, :], C, BK)
    return values.to(tl.float32)


@triton.jit
def modulated(
    x, mean, rstd, k, k0, NORM_WEIGHT, NORM_BIAS, SHIFT, SCALE, shift_row, scale_row, weight_offset,
    C: tl.constexpr, BK: tl.constexpr, LAYER: tl.constexpr, UNIFORM: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """A BM x BK tile of h from one of x. Native: layer norm rounds once, rms before its weight too, then every step."""
    T: tl.constexpr = x.dtype
    y = (x.to(tl.float32) - mean[:, None]) * rstd[:, None]
    EACH: tl.constexpr = NATIVE and not LAYER
    y = rounded(y, T, EACH)
    if NORM_WEIGHT is not None:
        w = load_k(NORM_WEIGHT + k, k0, k, C, BK).to(tl.float32) + weight_offset
        y = rounded(y * rounded(w, T, NATIVE)[None, :], T, EACH)
    if NORM_BIAS is not None:
        y = rounded(y + load_k(NORM_BIAS + k, k0, k, C, BK).to(tl.float32)[None, :], T, EACH)
    y = rounded(y, T, NATIVE)
    if SCALE is not None:
        s = 1.0 + table_values(SCALE, scale_row, k, k0, C, BK, UNIFORM)
        y = rounded(y * rounded(s, T, NATIVE), T, NATIVE)
    if SHIFT is not None:
        y = y + table_values(SHIFT, shift_row, k, k0, C, BK, UNIFORM)
    return y.to(T)


@triton.jit
def channel_of(pair, side, D: tl.constexpr, R: tl.constexpr, LAYOUT: tl.constexpr):
    """Channel of one side of a rotary pair. The channels behind R go in pairs too, as two halves of what is left."""
    if LAYOUT == "interleaved":
        channel = 2 * pair + side
    else:
        if LAYOUT == "half":
            channel = pair + side * (R // 2)
        else:
            S: tl.constexpr = R // 6
            channel = pair // S * (2 * S) + pair % S + side * S
        if R != D:
            channel = tl.where(pair < R // 2, channel, pair + R // 2 + side * ((D - R) // 2))
    return channel


@triton.jit
def head_norm(
    y, place, real, is_q, is_k, channel, QW, KW, QB, KB, eps,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, NORM: tl.constexpr, T: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Query and key heads of a tile, normalised over their D channels; values pass. place: of a column's head."""
    mean = tl.zeros((BM, BN), tl.float32)
    rstd = tl.zeros((BM, BN), tl.float32)
    for g in tl.static_range(BN // D):
        mine = (place == g)[None, :]
        z = tl.where(mine, y, 0.0)
        m = tl.sum(z, 1) / D if NORM == "layer" else tl.zeros((BM,), tl.float32)
        if NORM == "layer":
            z = tl.where(mine, z - m[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(z * z, 1) / D + eps)
        mean = tl.where(mine, m[:, None], mean)
        rstd = tl.where(mine, r[:, None], rstd)
    EACH: tl.constexpr = NATIVE and NORM == "rms"
    n = rounded((y - mean) * rstd, T, EACH)
    if QW is not None or KW is not None:
        w = tl.full((BN,), 1.0, tl.float32)
        if QW is not None:
            w = tl.load(QW + channel, mask=real & is_q, other=1.0).to(tl.float32)
        if KW is not None:
            w = tl.where(is_k, tl.load(KW + channel, mask=real & is_k, other=1.0).to(tl.float32), w)
        n = rounded(n * w[None, :], T, EACH)
    if QB is not None or KB is not None:
        b = tl.zeros((BN,), tl.float32)
        if QB is not None:
            b = tl.load(QB + channel, mask=real & is_q, other=0.0).to(tl.float32)
        if KB is not None:
            b = tl.where(is_k, tl.load(KB + channel, mask=real & is_k, other=0.0).to(tl.float32), b)
        n = n + b[None, :]
    return tl.where((is_q | is_k)[None, :], rounded(n, T, NATIVE), y)


@triton.jit
def rotated(
    y, at, head, pair, COS, SIN, tokens, cos_b, cos_n, cos_h, rope_start, rope_len, ALIGN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr,
    T: tl.constexpr, ROUND: tl.constexpr,
):  # fmt: skip
    """(y1, y2) -> (y1 cos - y2 sin, y2 cos + y1 sin) for the slice's tokens and the heads before H + HKV."""
    y1, y2 = tl.split(tl.reshape(y, (BM, BN // 2, 2)))
    t = at % tokens - rope_start
    row = (at // tokens).to(tl.int64) * multiple(cos_b, ALIGN) + t.to(tl.int64) * multiple(cos_n, ALIGN)
    column = tl.where(head < H, head, head - H).to(tl.int64) * multiple(cos_h, ALIGN) + pair * STEP
    active = ((t >= 0) & (t < rope_len))[:, None] & ((head < H + HKV) & (pair < R // 2))[None, :]
    spot = row[:, None] + column[None, :]
    c = tl.load(COS + spot, mask=active, other=1.0).to(tl.float32)
    s = tl.load(SIN + spot, mask=active, other=0.0).to(tl.float32)
    o1 = rounded(y1 * c, T, ROUND) - rounded(y2 * s, T, ROUND)
    o2 = rounded(y2 * c, T, ROUND) + rounded(y1 * s, T, ROUND)
    return tl.reshape(tl.join(tl.where(active, o1, y1), tl.where(active, o2, y2)), (BM, BN))


@triton.jit
def store_heads(
    OUT, y, at, exists, tile, width, LAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, R: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Heads before LAST of a tile, to rows of `width` columns; where pairs are apart, each side is a run of its own."""
    G: tl.constexpr = BN // D
    rows = OUT + at.to(tl.int64)[:, None] * width + tile * G * D
    if LAYOUT == "interleaved":
        c = tl.arange(0, BN)
        fits = exists[:, None] & ((c < G * D) & (tile * G * D + c < LAST * D))[None, :]
        tl.store(rows + c[None, :], y.to(OUT.dtype.element_ty), mask=fits)
    else:
        c = tl.arange(0, BN // 2)
        head, pair = c // (D // 2), c % (D // 2)
        fits = exists[:, None] & ((head < G) & (tile * G + head < LAST))[None, :]
        y1, y2 = tl.split(tl.reshape(y.to(OUT.dtype.element_ty), (BM, BN // 2, 2)))
        tl.store(rows + (head * D + channel_of(pair, 0, D, R, LAYOUT))[None, :], y1, mask=fits)
        tl.store(rows + (head * D + channel_of(pair, 1, D, R, LAYOUT))[None, :], y2, mask=fits)


@kernel(kind="gemm")
def norm_modulate_linear(
    OUT, KEPT, X, W, BIAS, SHIFT, SCALE, NORM_WEIGHT, NORM_BIAS, INDEX, QW, KW, QB, KB, COS, SIN,
    rows: tl.int32, tokens: tl.int32, group: tl.int32, x_b: tl.int64, x_n: tl.int64, w_n: tl.int64,
    shift_b: tl.int64, shift_m: tl.int64, shift_per: tl.int32, scale_b: tl.int64, scale_m: tl.int64,
    scale_per: tl.int32, cos_b: tl.int64, cos_n: tl.int64, cos_h: tl.int64, rope_start: tl.int32, rope_len: tl.int32,
    eps: tl.float32, weight_offset: tl.float32, qk_eps: tl.float32,
    C: tl.constexpr, F: tl.constexpr, LAYER: tl.constexpr, NATIVE: tl.constexpr, UNIFORM: tl.constexpr,
    ACT: tl.constexpr, H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, QK_NORM: tl.constexpr,
    LAYOUT: tl.constexpr, R: tl.constexpr, STEP: tl.constexpr, ROUND: tl.constexpr,
    ALIGN: tl.constexpr, COS_ALIGN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One BM x BN tile of the output. D = 0: F columns as they come, then ACT; D > 0: G = BN // D whole heads.

    KEPT: the rounded result before ACT, or before norm and rotation (query and key heads only), for the backward.
    """
    T: tl.constexpr = X.dtype.element_ty
    ALL: tl.constexpr = H + 2 * HKV
    G: tl.constexpr = 1 if D == 0 else BN // D
    TILES: tl.constexpr = tl.cdiv(F, BN) if D == 0 else tl.cdiv(ALL, G)
    tile = tl.program_id(0) % TILES
    first, at, exists = tile_rows(tl.program_id(0) // TILES, rows, group, BM)
    column = tl.arange(0, BN)
    if D == 0:
        feature = tile * BN + column
        if F % BN != 0:
            feature = tl.minimum(feature, F - 1)
    else:
        place = column // D
        head = tl.where(place < G, tile * G + place, ALL)
        channel = channel_of(column % D // 2, column % 2, D, R, LAYOUT)
        real = head < ALL
        feature = tl.where(real, head * D + channel, 0)

    k = tl.arange(0, BK)
    x = X + row_offsets(at, tokens, x_b, x_n, ALIGN)[:, None] + k[None, :]
    w = W + (feature.to(tl.int64) * multiple(w_n, ALIGN))[None, :] + k[:, None]
    mean, rstd = statistics(x, k[None, :], eps, C, BK, LAYER, STAGES)
    shift_row = table_row(first if UNIFORM else at, INDEX, tokens, shift_b, shift_m, shift_per, ALIGN)
    scale_row = table_row(first if UNIFORM else at, INDEX, tokens, scale_b, scale_m, scale_per, ALIGN)
    y = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, C, BK):
        a = modulated(
            load_k(x, k0, k[None, :], C, BK), mean, rstd, k, k0, NORM_WEIGHT, NORM_BIAS, SHIFT, SCALE, shift_row,
            scale_row, weight_offset, C, BK, LAYER, UNIFORM, NATIVE,
        )  # fmt: skip
        y = tl.dot(a, load_k(w, k0, k[:, None], C, BK), y, input_precision=PRECISION)
    if BIAS is not None:
        y += tl.load(BIAS + feature).to(tl.float32)[None, :]
    y = rounded(y, T, NATIVE)

    if D == 0:
        spot = at.to(tl.int64)[:, None] * F + (tile * BN + column)[None, :]
        fits = exists[:, None] & (tile * BN + column < F)[None, :]
        if KEPT is not None:
            tl.store(KEPT + spot, y.to(T), mask=fits)
        tl.store(OUT + spot, activated(y, ACT).to(T), mask=fits)
    else:
        if KEPT is not None:
            store_heads(KEPT, y, at, exists, tile, (H + HKV) * D, H + HKV, BM, BN, D, R, LAYOUT)
        if tile * G < H + HKV:
            if QK_NORM is not None:
                is_q, is_k = head < H, (head >= H) & (head < H + HKV)
                y = head_norm(
                    y, place, real, is_q, is_k, channel, QW, KW, QB, KB, qk_eps, BM, BN, D, QK_NORM, T, NATIVE
                )  # fmt: skip
            if COS is not None:
                half = tl.arange(0, BN // 2)
                turned = tl.where(half < G * D // 2, tile * G + half // (D // 2), ALL)
                y = rotated(
                    y, at, turned, half % (D // 2), COS, SIN, tokens, cos_b, cos_n, cos_h, rope_start, rope_len,
                    COS_ALIGN, BM, BN, H, HKV, R, STEP, T, ROUND,
                )  # fmt: skip
        store_heads(OUT, y, at, exists, tile, F, ALL, BM, BN, D, R, LAYOUT)


@kernel(kind="gemm")
def linear_gate_residual(
    OUT, KEPT, RESIDUAL, A, W, BIAS, GATE, INDEX,
    rows: tl.int32, tokens: tl.int32, group: tl.int32, r_b: tl.int64, r_n: tl.int64, a_b: tl.int64, a_n: tl.int64,
    w_n: tl.int64, gate_b: tl.int64, gate_m: tl.int64, gate_per: tl.int32,
    K: tl.constexpr, C: tl.constexpr, GATE_ACT: tl.constexpr, NATIVE: tl.constexpr, UNIFORM: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """One BM x BN tile of the new residual stream. KEPT: a @ W^T + bias, which the gate's gradient reads."""
    T: tl.constexpr = A.dtype.element_ty
    TILES: tl.constexpr = tl.cdiv(C, BN)
    tile = tl.program_id(0) % TILES
    first, at, exists = tile_rows(tl.program_id(0) // TILES, rows, group, BM)
    column = tile * BN + tl.arange(0, BN)
    feature = column
    if C % BN != 0:
        feature = tl.minimum(column, C - 1)
    k = tl.arange(0, BK)
    a = A + row_offsets(at, tokens, a_b, a_n, ALIGN)[:, None] + k[None, :]
    w = W + (feature.to(tl.int64) * multiple(w_n, ALIGN))[None, :] + k[:, None]
    y = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        y = tl.dot(
            load_k(a, k0, k[None, :], K, BK), load_k(w, k0, k[:, None], K, BK), y, input_precision=PRECISION
        )  # fmt: skip
    if BIAS is not None:
        y += tl.load(BIAS + feature).to(tl.float32)[None, :]
    y = rounded(y, T, NATIVE)

    spot = at.to(tl.int64)[:, None] * C + column[None, :]
    fits = exists[:, None] & (column < C)[None, :]
    if KEPT is not None:
        tl.store(KEPT + spot, y.to(T), mask=fits)
    if GATE is not None:
        row = table_row(first if UNIFORM else at, INDEX, tokens, gate_b, gate_m, gate_per, ALIGN)
        if UNIFORM:
            g = tl.load(GATE + row + column, mask=column < C, other=0.0)[None, :]
        else:
            g = tl.load(GATE + row[:, None] + column[None, :], mask=fits, other=0.0)
        g = g.to(tl.float32)
        if GATE_ACT == "tanh":
            g = rounded(tanh(g), T, NATIVE)
        y = rounded(y * g, T, NATIVE)
    r = row_offsets(at, tokens, r_b, r_n, ALIGN)[:, None] + column[None, :]
    y += tl.load(RESIDUAL + r, mask=fits, other=0.0).to(tl.float32)
    tl.store(OUT + spot, y.to(OUT.dtype.element_ty), mask=fits)
