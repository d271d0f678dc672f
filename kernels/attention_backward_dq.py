"""dQ of attention: a program owns BLOCK_M queries of one head and walks the keys that they see, as the forward does.

    p = exp(scale * q . k - lse);   ds = p * (do . v - delta);   dq = scale * ds k

Q and dO stay in shared memory as left sides, K and V pass by; ds goes from the accumulators into the third product
without leaving its registers. 6 * D FLOPs a visible pair. 128 queries x 64 keys, 8 warps: 64 + 32 + 32 accumulator
registers a thread at D = 128.

Keys that are not there must be masked here (their p may be infinite, and Inf * 0 is NaN), but those are only in a
segment's last tile: every tile that all queries see whole takes the plain path.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.attention_backward import axis_seen, piece, products, put, segment_rows, show, weights
from fastdit.kernels.attention_mask import (
    brick_corner,
    brick_tokens,
    bricks,
    frame_length,
    key_end,
    key_range,
    seen_span,
    window_end,
    window_start,
)  # fmt: skip
from fastdit.kernels.attention_tiles import find_tile


@triton.jit
def _queries(
    Q, K, V, DO, ROWS, DQ, index, n, m, valid, frame, T, H, W, q_n, k_n, v_n, do_n, plane, scale,
    STEP: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FRAMES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, BRICK_M: tl.constexpr, BRICK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tile `index` of a segment of n queries and m keys, the first `valid` of which may be seen; pointers stand at the
    segment's first row of the head. T, H, W: the segment's grid, if there is a WINDOW."""
    if WINDOW is not None:
        ct, ch, cw = brick_corner(index, T, H, W, BRICK_M[0], BRICK_M[1], BRICK_M[2])
        t, h, w = brick_tokens(BRICK_M[0], BRICK_M[1], BRICK_M[2])
        t, h, w = t + ct, h + ch, w + cw
        there = (t < T) & (h < H) & (w < W)
        i = ((t * H + h) * W + w).to(tl.int64)
        t_lo, t_hi, t_core, t_past = seen_span(ct, ct + BRICK_M[0], T, WINDOW[0], STRIDE[0])
        h_lo, h_hi, h_core, h_past = seen_span(ch, ch + BRICK_M[1], H, WINDOW[1], STRIDE[1])
        w_lo, w_hi, w_core, w_past = seen_span(cw, cw + BRICK_M[2], W, WINDOW[2], STRIDE[2])
        t_first, t_end = window_start(t, T, WINDOW[0], STRIDE[0]), window_end(t, T, WINDOW[0], STRIDE[0])
        h_first, h_end = window_start(h, H, WINDOW[1], STRIDE[1]), window_end(h, H, WINDOW[1], STRIDE[1])
        w_first, w_end = window_start(w, W, WINDOW[2], STRIDE[2]), window_end(w, W, WINDOW[2], STRIDE[2])
        count = bricks(t_hi - t_lo, h_hi - h_lo, w_hi - w_lo, BRICK_N[0], BRICK_N[1], BRICK_N[2])
        count = tl.where(valid > 0, count, 0)
        jt, jh, jw = brick_tokens(BRICK_N[0], BRICK_N[1], BRICK_N[2])
        token = (jt * H + jh) * W + jw
    else:
        i0 = index * BLOCK_M
        i = (i0 + tl.arange(0, BLOCK_M)).to(tl.int64)
        there = i < n
        whole, end = key_range(i0, tl.minimum(i0 + BLOCK_M, n), valid, m - n, frame, FRAMES, BLOCK_N)
        ends = key_end(i0 + tl.arange(0, BLOCK_M), valid, m - n, frame, FRAMES)
        count = (end + BLOCK_N - 1) // BLOCK_N
        place = tl.arange(0, BLOCK_N)

    q0, q1 = piece(Q, i * q_n, there, 0, D0, D), piece(Q, i * q_n, there, D0, D1, D)
    do0, do1 = piece(DO, i * do_n, there, 0, D0, D), piece(DO, i * do_n, there, D0, D1, D)
    lse = tl.load(ROWS + i, mask=there, other=float("inf"))
    delta = tl.load(ROWS + plane + i, mask=there, other=0.0)
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1:
        dq1 = tl.zeros([BLOCK_M, D1], tl.float32)

    for c in range(count):
        if WINDOW is not None:
            at, ah, aw = brick_corner(c, t_hi - t_lo, h_hi - h_lo, w_hi - w_lo, BRICK_N[0], BRICK_N[1], BRICK_N[2])
            at, ah, aw = at + t_lo, ah + h_lo, aw + w_lo
            j = token + ((at * H + ah) * W + aw)
            ok = (at + jt < T) & (ah + jh < H) & (aw + jw < W)
            plain = (at >= t_core) & (ah >= h_core) & (aw >= w_core)
            plain &= (at + BRICK_N[0] <= t_past) & (ah + BRICK_N[1] <= h_past) & (aw + BRICK_N[2] <= w_past)
        else:
            j = c * BLOCK_N + tl.arange(0, BLOCK_N)
            ok = j < valid
            plain = (c + 1) * BLOCK_N <= whole
        far = j.to(tl.int64)
        k0, k1 = piece(K, far * k_n, ok, 0, D0, D), piece(K, far * k_n, ok, D0, D1, D)
        v0, v1 = piece(V, far * v_n, ok, 0, D0, D), piece(V, far * v_n, ok, D0, D1, D)
        s = products(q0, q1, k0, k1, PRECISION)
        dp = products(do0, do1, v0, v1, PRECISION)
        p = weights(s, lse[:, None], scale, q0.dtype == tl.float32)
        if not plain:
            if WINDOW is not None:
                p = show(
                    p,
                    axis_seen(t_first, t_end, at, BRICK_N[0]),
                    axis_seen(h_first, h_end, ah, BRICK_N[1]),
                    axis_seen(w_first, w_end, aw, BRICK_N[2]),
                )
            else:
                p = tl.where(place[None, :] < (ends - c * BLOCK_N)[:, None], p, 0.0)
        ds = (p * (dp - delta[:, None])).to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if D1:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)

    put(DQ, dq0 * scale, i * STEP, there, 0, D0, D)
    if D1:
        put(DQ, dq1 * scale, i * STEP, there, D0, D1, D)


@kernel(kind="gemm")
def attention_dq(
    Q, K, V, DO, ROWS, DQ, KV_LEN, FRAME_OF,
    N: tl.int32, M: tl.int32, tiles: tl.int32, frame: tl.int32, plane: tl.int64,
    q_b: tl.int64, q_n: tl.int64, q_h: tl.int64, k_b: tl.int64, k_n: tl.int64, k_h: tl.int64,
    v_b: tl.int64, v_n: tl.int64, v_h: tl.int64, do_b: tl.int64, do_n: tl.int64, do_h: tl.int64,
    scale: tl.float32,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FRAMES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Dense. Grid: tiles of queries * H * B, those of one head side by side, the last first where it sees the most."""
    index = tl.program_id(0) % tiles
    if FRAMES:
        index = tiles - 1 - index
    head = tl.program_id(0) // tiles % H
    batch = (tl.program_id(0) // tiles // H).to(tl.int64)
    kv_head = head // (H // HKV)
    valid = M
    if KV_LEN is not None:
        valid = tl.minimum(tl.load(KV_LEN + batch), M)
    if FRAME_OF is not None:
        frame = tl.load(FRAME_OF + batch)
    _queries(
        Q + batch * multiple(q_b, ALIGN) + head * multiple(q_h, ALIGN),
        K + batch * multiple(k_b, ALIGN) + kv_head * multiple(k_h, ALIGN),
        V + batch * multiple(v_b, ALIGN) + kv_head * multiple(v_h, ALIGN),
        DO + batch * multiple(do_b, ALIGN) + head * multiple(do_h, ALIGN),
        ROWS + (batch * H + head) * N,
        DQ + (batch * N * H + head) * D,
        index, N, M, valid, frame_length(frame, M), 1, 1, 1,
        multiple(q_n, ALIGN), multiple(k_n, ALIGN), multiple(v_n, ALIGN), multiple(do_n, ALIGN), plane, scale,
        H * D, D, D0, D1, FRAMES, None, None, None, None, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip


@triton.jit
def _packed_queries(
    Q, K, V, DO, ROWS, DQ, PLAN, CU_Q, CU_K, FRAME_OF, GRIDS, tile, head, N, M, segments, frame, plane,
    q_n, q_h, k_n, k_h, v_n, v_h, do_n, do_h, scale,
    GROUP: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FRAMES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, BRICK_M: tl.constexpr, BRICK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    segment, index = find_tile(PLAN, tile, segments)
    i0, j0, n, m, frame, gt, gh, gw = segment_rows(CU_Q, CU_K, FRAME_OF, GRIDS, segment, segments, N, M, frame)
    valid = tl.where(segment < segments, m, 0)
    if FRAMES:
        index = (n + BLOCK_M - 1) // BLOCK_M - 1 - index
    k_n, v_n, q_n, do_n = multiple(k_n, ALIGN), multiple(v_n, ALIGN), multiple(q_n, ALIGN), multiple(do_n, ALIGN)
    kv_head = head // GROUP
    _queries(
        Q + i0 * q_n + head * multiple(q_h, ALIGN), K + j0 * k_n + kv_head * multiple(k_h, ALIGN),
        V + j0 * v_n + kv_head * multiple(v_h, ALIGN), DO + i0 * do_n + head * multiple(do_h, ALIGN),
        ROWS + i0 + head.to(tl.int64) * N, DQ + (i0 * H + head) * D,
        index, n, m, valid, frame_length(frame, m), gt, gh, gw, q_n, k_n, v_n, do_n, plane, scale,
        H * D, D, D0, D1, FRAMES, WINDOW, STRIDE, BRICK_M, BRICK_N, BLOCK_M, BLOCK_N, PRECISION,
    )  # fmt: skip


@kernel(kind="gemm")
def attention_varlen_dq(
    Q, K, V, DO, ROWS, DQ, PLAN, CU_Q, CU_K, FRAME_OF, GRIDS,
    N: tl.int32, M: tl.int32, segments: tl.int32, frame: tl.int32, plane: tl.int64,
    q_n: tl.int64, q_h: tl.int64, k_n: tl.int64, k_h: tl.int64, v_n: tl.int64, v_h: tl.int64,
    do_n: tl.int64, do_h: tl.int64, scale: tl.float32,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FRAMES: tl.constexpr,
    WINDOW: tl.constexpr, STRIDE: tl.constexpr, BRICK_M: tl.constexpr, BRICK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """Packed. PLAN is that of the queries; work and programs as in attention_varlen_dkdv."""
    tiles = tl.load(PLAN + segments + 1)
    work = tl.program_id(0)
    GROUP: tl.constexpr = H // HKV
    if WINDOW is not None:
        for w in range(work, tiles * H, tl.num_programs(0)):
            _packed_queries(
                Q, K, V, DO, ROWS, DQ, PLAN, CU_Q, CU_K, FRAME_OF, GRIDS, w % tiles, w // tiles, N, M, segments,
                frame, plane, q_n, q_h, k_n, k_h, v_n, v_h, do_n, do_h, scale, GROUP, H, D, D0, D1, FRAMES,
                WINDOW, STRIDE, BRICK_M, BRICK_N, BLOCK_M, BLOCK_N, PRECISION, ALIGN,
            )  # fmt: skip
    elif work < tiles * H:
        _packed_queries(
            Q, K, V, DO, ROWS, DQ, PLAN, CU_Q, CU_K, FRAME_OF, GRIDS, work % tiles, work // tiles, N, M, segments,
            frame, plane, q_n, q_h, k_n, k_h, v_n, v_h, do_n, do_h, scale, GROUP, H, D, D0, D1, FRAMES,
            None, None, None, None, BLOCK_M, BLOCK_N, PRECISION, ALIGN,
        )  # fmt: skip
