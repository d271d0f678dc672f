"""Backward of attention: the row statistics, and dK with dV. dQ is in attention_backward_dq.py. No atomics anywhere.

    p = exp(scale * q . k - lse);   delta = rowsum(do * o) - dlse;   dp = do . v;   ds = p * (dp - delta)
    dv = p^T do;                    dk = scale * ds^T q;             dq = scale * ds k

Every output tile has one owner that sums in one order: bitwise the same on every run. The price is that scores and dp
are made twice: 14 * D FLOPs a visible pair where a fused loop with atomics needs 10.

A program of the dK/dV kernels owns BLOCK_N keys of one kv head and walks, for each query head of its group, the tiles
of queries that see one of them (the inverse ranges in attention_mask.py). Rows are keys: p^T and ds^T leave the tensor
cores in the registers from which they enter the next product as its left side, so only Q and dO pass through shared
memory. Both products that need no exponential come first, so that their results and the bf16 copies of p and ds never
live at once: 128 keys x 64 queries of D = 128 fit 8 warps (64 + 64 + 32 + 32 accumulator registers a thread) unspilled.
Head dims that are no power of two are two pieces, D0 + D1 channels, as in attention.py.

Masks: a key that is not there gives a row that is not stored; a query that is not there has q = do = lse = delta = 0,
hence ds = 0 and p^T do = 0: the plain path has no mask. Frames and windows mask the tiles on their border.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.attention_mask import (
    brick_corner,
    brick_tokens,
    bricks,
    first_viewer,
    frame_length,
    query_range,
    viewer_span,
    viewers_end,
)  # fmt: skip
from fastdit.kernels.attention_tiles import find_tile

LOG2E = tl.constexpr(1.4426950408889634)


# ---- what both passes share -----------------------------------------------------------------------------------


@triton.jit
def piece(X, at, ok, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Channels FROM .. FROM + WIDTH of the rows at X + at, 0 where a row is not ok and behind D; (1,) if WIDTH is 0."""
    if WIDTH == 0:
        return tl.zeros((1,), X.dtype.element_ty)  # Triton 3.6 cannot return None
    else:
        d = FROM + tl.arange(0, WIDTH)
        here = ok[:, None]
        if FROM + WIDTH > D:
            here = here & (d < D)[None, :]
        return tl.load(X + at[:, None] + d[None, :], mask=here, other=0.0)


@triton.jit
def put(X, x, at, ok, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    d = FROM + tl.arange(0, WIDTH)
    here = ok[:, None]
    if FROM + WIDTH > D:
        here = here & (d < D)[None, :]
    tl.store(X + at[:, None] + d[None, :], x.to(X.dtype.element_ty), mask=here)


@triton.jit
def products(a0, a1, b0, b1, PRECISION: tl.constexpr):
    """a b^T over both pieces of the channels."""
    x = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if len(a1.shape) == 2:
        x = tl.dot(a1, tl.trans(b1), x, input_precision=PRECISION)
    return x


@triton.jit
def weights(s, lse, scale, EXACT: tl.constexpr):
    """exp(scale * s - lse), lse as in ROWS. EXACT: the difference is rounded once, before it meets log2(e), so that
    p's error does not grow with the scores; fp32 inputs want that, in 16 bits nobody would see it."""
    if EXACT:
        return tl.exp2(tl.fma(s, tl.full(s.shape, 0.0, tl.float32) + scale, -lse) * LOG2E)
    else:
        return tl.exp2(s * (scale * LOG2E) - lse)


@triton.jit
def axis_seen(first, end, at, B: tl.constexpr):
    """bool (rows, B): first <= at + place < end."""
    place = tl.arange(0, B)[None, :]
    return (place >= (first - at)[:, None]) & (place < (end - at)[:, None])


@triton.jit
def show(p, t, h, w):
    """p where a row sees a token on all three axes, else 0. p: (rows, BT * BH * BW); t, h, w: axis_seen."""
    grid = tl.reshape(p, (p.shape[0], t.shape[1], h.shape[1], w.shape[1]))
    grid = tl.where(t[:, :, None, None] & h[:, None, :, None] & w[:, None, None, :], grid, 0.0)
    return tl.reshape(grid, p.shape)


# ---- row statistics -------------------------------------------------------------------------------------------


@kernel
def attention_rows(
    O, DO, LSE, DLSE, ROWS,
    tokens: tl.int32, plane: tl.int64, do_b: tl.int64, do_n: tl.int64, do_h: tl.int64,
    dlse_b: tl.int64, dlse_n: tl.int64, dlse_h: tl.int64,
    H: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """ROWS[0] = lse, in base 2 for 16-bit inputs, +inf for a query without keys (p = 0); ROWS[1] = delta, there 0.

    Grid: tiles of `tokens` * H * B. Bytes: 2 * D * itemsize + 12 a row. LSE, ROWS (B, H, tokens) and O are contiguous.
    """
    tiles = (tokens + BLOCK - 1) // BLOCK
    head = tl.program_id(0) % H
    tile = tl.program_id(0) // H
    batch = (tile // tiles).to(tl.int64)
    i = tile % tiles * BLOCK + tl.arange(0, BLOCK)
    ok = i < tokens
    row = (batch * H + head) * tokens + i
    lse = tl.load(LSE + row, mask=ok, other=0.0)
    delta = tl.zeros([BLOCK], tl.float32)
    if DO is not None:
        o = piece(O + (batch * tokens * H + head) * D, i.to(tl.int64) * (H * D), ok, 0, BLOCK_D, D)
        DO += batch * multiple(do_b, ALIGN) + head * multiple(do_h, ALIGN)
        do = piece(DO, i * multiple(do_n, ALIGN), ok, 0, BLOCK_D, D)
        delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + batch * dlse_b + head * dlse_h + i * dlse_n, mask=ok, other=0.0)
    blind = lse == float("-inf")
    if O.dtype.element_ty != tl.float32:
        lse *= LOG2E
    tl.store(ROWS + row, tl.where(blind, float("inf"), lse), mask=ok)
    tl.store(ROWS + plane + row, tl.where(blind, 0.0, delta), mask=ok)


# ---- dK and dV ------------------------------------------------------------------------------------------------


@triton.jit
def _keys(
    Q, K, V, DO, ROWS, DK, DV, index, n, m, valid, frame, T, H, W,
    q_n, q_h, k_n, v_n, do_n, do_h, rows_h, plane, scale,
    GROUP: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    CUT: tl.constexpr, FRAMES: tl.constexpr, WINDOW: tl.constexpr, STRIDE: tl.constexpr,
    BRICK_M: tl.constexpr, BRICK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile `index` of a segment of n queries and m keys, the first `valid` of which may be seen.

    Pointers stand at the segment's first row, of this kv head or of its group's first query head. DK or DV may be None;
    their rows are STEP apart. CUT: valid < m is possible. T, H, W: the segment's grid, if there is a WINDOW.
    """
    if WINDOW is not None:
        ct, ch, cw = brick_corner(index, T, H, W, BRICK_N[0], BRICK_N[1], BRICK_N[2])
        t, h, w = brick_tokens(BRICK_N[0], BRICK_N[1], BRICK_N[2])
        t, h, w = t + ct, h + ch, w + cw
        there = (t < T) & (h < H) & (w < W)
        j = (t * H + h) * W + w
        t_lo, t_hi, t_core, t_past = viewer_span(ct, ct + BRICK_N[0], T, WINDOW[0], STRIDE[0])
        h_lo, h_hi, h_core, h_past = viewer_span(ch, ch + BRICK_N[1], H, WINDOW[1], STRIDE[1])
        w_lo, w_hi, w_core, w_past = viewer_span(cw, cw + BRICK_N[2], W, WINDOW[2], STRIDE[2])
        t_first, t_end = first_viewer(t, T, WINDOW[0], STRIDE[0]), viewers_end(t, T, WINDOW[0], STRIDE[0])
        h_first, h_end = first_viewer(h, H, WINDOW[1], STRIDE[1]), viewers_end(h, H, WINDOW[1], STRIDE[1])
        w_first, w_end = first_viewer(w, W, WINDOW[2], STRIDE[2]), viewers_end(w, W, WINDOW[2], STRIDE[2])
        count = bricks(t_hi - t_lo, h_hi - h_lo, w_hi - w_lo, BRICK_M[0], BRICK_M[1], BRICK_M[2])
        count = tl.where(n > 0, count, 0)
        it, ih, iw = brick_tokens(BRICK_M[0], BRICK_M[1], BRICK_M[2])
        token = (it * H + ih) * W + iw
    else:
        j = index * BLOCK_N + tl.arange(0, BLOCK_N)
        there = j < m
        begin, whole = query_range(index * BLOCK_N, index * BLOCK_N + BLOCK_N, n, valid, m - n, frame, FRAMES, BLOCK_M)
        first = j // frame * frame - (m - n)  # the first query that sees key j
        count = (n - begin + BLOCK_M - 1) // BLOCK_M
        place = tl.arange(0, BLOCK_M)
    usable = there
    if CUT:
        usable = there & (j < valid)

    own = j.to(tl.int64)
    k0, k1 = piece(K, own * k_n, usable, 0, D0, D), piece(K, own * k_n, usable, D0, D1, D)
    v0, v1 = piece(V, own * v_n, usable, 0, D0, D), piece(V, own * v_n, usable, D0, D1, D)
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    if D1:
        dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
        dv1 = tl.zeros([BLOCK_N, D1], tl.float32)

    for turn in range(GROUP * count):  # one loop over all heads of the group: its copies never run dry between two
        c = turn
        head = 0
        if GROUP > 1:
            head = turn // count
            c = turn % count
        q_from, do_from, rows = Q + head * q_h, DO + head * do_h, ROWS + head * rows_h
        if WINDOW is not None:
            at, ah, aw = brick_corner(c, t_hi - t_lo, h_hi - h_lo, w_hi - w_lo, BRICK_M[0], BRICK_M[1], BRICK_M[2])
            at, ah, aw = at + t_lo, ah + h_lo, aw + w_lo
            i = token + ((at * H + ah) * W + aw)
            ok = (at + it < T) & (ah + ih < H) & (aw + iw < W)
            plain = (at >= t_core) & (ah >= h_core) & (aw >= w_core)
            plain &= (at + BRICK_M[0] <= t_past) & (ah + BRICK_M[1] <= h_past) & (aw + BRICK_M[2] <= w_past)
        else:
            i = begin + c * BLOCK_M + tl.arange(0, BLOCK_M)
            ok = i < n
            plain = begin + c * BLOCK_M >= whole
        far = i.to(tl.int64)
        q0, q1 = piece(q_from, far * q_n, ok, 0, D0, D), piece(q_from, far * q_n, ok, D0, D1, D)
        do0, do1 = piece(do_from, far * do_n, ok, 0, D0, D), piece(do_from, far * do_n, ok, D0, D1, D)
        s = products(k0, k1, q0, q1, PRECISION)
        if DK is not None:
            dp = products(v0, v1, do0, do1, PRECISION)
        lse = tl.load(rows + i, mask=ok, other=0.0)
        p = weights(s, lse[None, :], scale, q0.dtype == tl.float32)
        if WINDOW is not None:
            if not plain:
                p = show(
                    p,
                    axis_seen(t_first, t_end, at, BRICK_M[0]),
                    axis_seen(h_first, h_end, ah, BRICK_M[1]),
                    axis_seen(w_first, w_end, aw, BRICK_M[2]),
                )
        elif FRAMES:
            if not plain:
                p = tl.where(place[None, :] >= (first - (begin + c * BLOCK_M))[:, None], p, 0.0)
        if DK is not None:
            delta = tl.load(rows + plane + i, mask=ok, other=0.0)
            ds = (p * (dp - delta[None, :])).to(q0.dtype)
        if DV is not None:
            dv0 = tl.dot(p.to(do0.dtype), do0, dv0, input_precision=PRECISION)
            if D1:
                dv1 = tl.dot(p.to(do0.dtype), do1, dv1, input_precision=PRECISION)
        if DK is not None:
            dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
            if D1:
                dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)

    to = j.to(tl.int64) * STEP
    if CUT:  # what may not be seen gets zeros
        keep = usable[:, None]
        dk0, dv0 = tl.where(keep, dk0, 0.0), tl.where(keep, dv0, 0.0)
        if D1:
            dk1, dv1 = tl.where(keep, dk1, 0.0), tl.where(keep, dv1, 0.0)
    if DV is not None:
        put(DV, dv0, to, there, 0, D0, D)
        if D1:
            put(DV, dv1, to, there, D0, D1, D)
    if DK is not None:
        put(DK, dk0 * scale, to, there, 0, D0, D)
        if D1:
            put(DK, dk1 * scale, to, there, D0, D1, D)


@kernel(kind="gemm")
def attention_dkdv(
    Q, K, V, DO, ROWS, DK, DV, KV_LEN, FRAME_OF,
    N: tl.int32, M: tl.int32, tiles: tl.int32, frame: tl.int32, plane: tl.int64,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64, k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_n: tl.int64, v_h: tl.int64, do_b: tl.int64, do_n: tl.int64, do_h: tl.int64,
    scale: tl.float32,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FRAMES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Dense. Grid: tiles of keys * HKV * B, those of one head side by side; with frames the first see the most."""
    index = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % HKV
    batch = (tl.program_id(0) // tiles // HKV).to(tl.int64)
    GROUP: tl.constexpr = H // HKV
    valid = M
    if KV_LEN is not None:
        valid = tl.minimum(tl.load(KV_LEN + batch), M)
    if FRAME_OF is not None:
        frame = tl.load(FRAME_OF + batch)
    k_n, v_n, q_n, do_n = multiple(k_n, ALIGN), multiple(v_n, ALIGN), multiple(q_n, ALIGN), multiple(do_n, ALIGN)
    q_h, do_h = multiple(q_h, ALIGN), multiple(do_h, ALIGN)
    out = (batch * M * HKV + head) * D
    _keys(
        Q + batch * multiple(q_b, ALIGN) + head * GROUP * q_h,
        K + batch * multiple(k_b, ALIGN) + head * multiple(k_h, ALIGN),
        V + batch * multiple(v_b, ALIGN) + head * multiple(v_h, ALIGN),
        DO + batch * multiple(do_b, ALIGN) + head * GROUP * do_h,
        ROWS + (batch * H + head * GROUP) * N,
        None if DK is None else DK + out, None if DV is None else DV + out,
        index, N, M, valid, frame_length(frame, M), 1, 1, 1, q_n, q_h, k_n, v_n, do_n, do_h, N, plane, scale,
        GROUP, HKV * D, D, D0, D1, KV_LEN is not None, FRAMES, None, None, None, None, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip


@triton.jit
def segment_rows(CU_Q, CU_K, FRAME_OF, GRIDS, segment, segments, N, M, frame):
    """First query and key row of a segment (int64), how many there are of each, frame length and grid. Segment S are
    the rows behind the last one: queries without keys, keys without queries, a line of tokens."""
    real = segment < segments
    i0 = tl.load(CU_Q + segment).to(tl.int64)
    j0 = tl.load(CU_K + segment).to(tl.int64)
    n = (tl.load(CU_Q + segment + 1, mask=real, other=N) - i0).to(tl.int32)
    m = (tl.load(CU_K + segment + 1, mask=real, other=M) - j0).to(tl.int32)
    if FRAME_OF is not None:
        frame = tl.load(FRAME_OF + segment, mask=real, other=1)
    T, H = 1, 1
    W = tl.maximum(n, m)
    if GRIDS is not None:
        T = tl.load(GRIDS + 3 * segment, mask=real, other=1)
        H = tl.load(GRIDS + 3 * segment + 1, mask=real, other=1)
        W = tl.load(GRIDS + 3 * segment + 2, mask=real, other=W)
    return i0, j0, n, m, frame, T, H, W


@triton.jit
def _packed_keys(
    Q, K, V, DO, ROWS, DK, DV, PLAN, CU_Q, CU_K, FRAME_OF, GRIDS, tile, head, N, M, segments, frame, plane,
    q_n, q_h, k_n, k_h, v_n, v_h, do_n, do_h, scale,
    GROUP: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FRAMES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, BRICK_M: tl.constexpr, BRICK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    segment, index = find_tile(PLAN, tile, segments)
    i0, j0, n, m, frame, T, H, W = segment_rows(CU_Q, CU_K, FRAME_OF, GRIDS, segment, segments, N, M, frame)
    n = tl.where(segment < segments, n, 0)
    k_n, v_n, q_n, do_n = multiple(k_n, ALIGN), multiple(v_n, ALIGN), multiple(q_n, ALIGN), multiple(do_n, ALIGN)
    q_h, do_h = multiple(q_h, ALIGN), multiple(do_h, ALIGN)
    out = (j0 * HKV + head) * D
    _keys(
        Q + i0 * q_n + head * GROUP * q_h, K + j0 * k_n + head * multiple(k_h, ALIGN),
        V + j0 * v_n + head * multiple(v_h, ALIGN), DO + i0 * do_n + head * GROUP * do_h,
        ROWS + i0 + (head * GROUP).to(tl.int64) * N,
        None if DK is None else DK + out, None if DV is None else DV + out,
        index, n, m, m, frame_length(frame, m), T, H, W, q_n, q_h, k_n, v_n, do_n, do_h, N, plane, scale,
        GROUP, HKV * D, D, D0, D1, False, FRAMES, WINDOW, STRIDE, BRICK_M, BRICK_N, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip


@kernel(kind="gemm")
def attention_varlen_dkdv(
    Q, K, V, DO, ROWS, DK, DV, PLAN, CU_Q, CU_K, FRAME_OF, GRIDS,
    N: tl.int32, M: tl.int32, segments: tl.int32, frame: tl.int32, plane: tl.int64,
    q_n: tl.int64, q_h: tl.int64, k_n: tl.int64, k_h: tl.int64, v_n: tl.int64, v_h: tl.int64,
    do_n: tl.int64, do_h: tl.int64, scale: tl.float32,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FRAMES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, BRICK_M: tl.constexpr, BRICK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Packed. PLAN is that of the keys; work is numbered head by head. Without a window the grid is a bound on it; how
    many bricks a grid has only the device knows, so there every program takes each so many-th piece."""
    tiles = tl.load(PLAN + segments + 1)
    work = tl.program_id(0)
    GROUP: tl.constexpr = H // HKV
    if WINDOW is not None:
        for w in range(work, tiles * HKV, tl.num_programs(0)):
            _packed_keys(
                Q, K, V, DO, ROWS, DK, DV, PLAN, CU_Q, CU_K, FRAME_OF, GRIDS, w % tiles, w // tiles, N, M, segments,
                frame, plane, q_n, q_h, k_n, k_h, v_n, v_h, do_n, do_h, scale, GROUP, HKV, D, D0, D1, FRAMES,
                WINDOW, STRIDE, BRICK_M, BRICK_N, BLOCK_M, BLOCK_N, PRECISION, ALIGN,
            )  # fmt: skip
    elif work < tiles * HKV:
        _packed_keys(
            Q, K, V, DO, ROWS, DK, DV, PLAN, CU_Q, CU_K, FRAME_OF, GRIDS, work % tiles, work // tiles, N, M, segments,
            frame, plane, q_n, q_h, k_n, k_h, v_n, v_h, do_n, do_h, scale, GROUP, HKV, D, D0, D1, FRAMES,
            None, None, None, None, BLOCK_M, BLOCK_N, PRECISION, ALIGN,
        )  # fmt: skip
