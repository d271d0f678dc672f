"""3-D windows over packed grids (NATTEN's, with stride and shifted borders): attention.py's tiles as bricks.

A program takes bricks of BT x BH x BW queries of one head. The keys that a brick sees together are a box; it is walked
in bricks of KT x KH x KW keys from its lower corner, rows gathered by pointers. Bricks in the box's core are seen by
every query; the others compare each key with each query's window on the three axes. Where window_stride lets the
queries of a brick share one window (brick inside a stride block), box and core are the same and no mask is made.

Cost: 4 * D FLOPs a pair that a brick of queries touches together: with window w and brick b that is
prod((w + b - 1) / w) of the visible pairs for stride 1, and 1 where the stride is a multiple of the brick.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.attention import _add, _finish, _queries, _scores, _zeros, load_rows, offsets, store_rows
from fastdit.kernels.attention_mask import (
    brick_corner,
    brick_tokens,
    bricks,
    guards,
    packed,
    seen_span,
    sees,
    window_start,
)  # fmt: skip
from fastdit.kernels.attention_tiles import find_tile


@triton.jit
def _brick(
    Q, K, V, O, LSE, t0, h0, w0, T, H, W, q_step, k_step, v_step, o_step, c,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, NEGATE: tl.constexpr, FAR: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BITS_T: tl.constexpr, BITS_H: tl.constexpr, BITS_W: tl.constexpr,
):  # fmt: skip
    """The query brick at (t0, h0, w0) of a T x H x W grid; pointers stand at the head in the segment's first row."""
    t, h, w = brick_tokens(BT, BH, BW)
    t, h, w = t + t0, h + h0, w + w0
    inside = (t < T) & (h < H) & (w < W)
    at = ((t * H + h) * W + w).to(tl.int64)
    q0, q1 = _queries(Q, at * q_step, inside, D, D0, D1, NEGATE)
    t_lo, t_hi, t_core, t_past = seen_span(t0, t0 + BT, T, WT, ST)
    h_lo, h_hi, h_core, h_past = seen_span(h0, h0 + BH, H, WH, SH)
    w_lo, w_hi, w_core, w_past = seen_span(w0, w0 + BW, W, WW, SW)
    guard = guards(BITS_T, BITS_H, BITS_W)
    first = packed(
        window_start(t, T, WT, ST) - t_lo, window_start(h, H, WH, SH) - h_lo, window_start(w, W, WW, SW) - w_lo,
        guard, BITS_T, BITS_H, BITS_W,
    )  # fmt: skip
    length = packed(tl.minimum(T, WT) - 1, tl.minimum(H, WH) - 1, tl.minimum(W, WW) - 1, guard, BITS_T, BITS_H, BITS_W)
    last = first + length + guard
    kt, kh, kw = brick_tokens(KT, KH, KW)
    key = packed(kt, kh, kw, guard, BITS_T, BITS_H, BITS_W)
    shape = (kt * H + kh) * W + kw
    k_at, v_at = offsets(shape, k_step, FAR), offsets(shape, v_step, FAR)
    acc0, acc1, m, l = _zeros(BT * BH * BW, D0, D1)
    row = ((t_lo * H + h_lo) * W + w_lo).to(tl.int64)
    K += row * k_step
    V += row * v_step
    t_side, h_side, w_side = t_hi - t_lo, h_hi - h_lo, w_hi - w_lo
    t_core, h_core, w_core = t_core - t_lo, h_core - h_lo, w_core - w_lo
    t_past, h_past, w_past = t_past - t_lo - KT, h_past - h_lo - KH, w_past - w_lo - KW
    room = packed(t_side - 1, h_side - 1, w_side - 1, guard, BITS_T, BITS_H, BITS_W) + guard
    for b in tl.range(0, bricks(t_side, h_side, w_side, KT, KH, KW)):
        jt, jh, jw = brick_corner(b, t_side, h_side, w_side, KT, KH, KW)
        corner = packed(jt, jh, jw, guard, BITS_T, BITS_H, BITS_W)
        row = ((jt * H + jh) * W + jw).to(tl.int64)
        valid = ((room - corner - key) & guard) == guard
        k0 = load_rows(K + row * k_step, k_at, valid, 0, D0, D, True)
        v0 = load_rows(V + row * v_step, v_at, valid, 0, D0, D, True)
        k1 = 0.0
        v1 = 0.0
        if D1:
            k1 = load_rows(K + row * k_step, k_at, valid, D0, D1, D, True)
            v1 = load_rows(V + row * v_step, v_at, valid, D0, D1, D, True)
        s = _scores(q0, q1, k0, k1, D1, PRECISION)
        core = (jt >= t_core) & (jh >= h_core) & (jw >= w_core)
        core = core & (jt <= t_past) & (jh <= h_past) & (jw <= w_past)
        if not core:
            s = tl.where(
                sees(first[:, None], last[:, None], (key + (corner + guard))[None, :], guard), s, float("-inf")
            )
        acc0, acc1, m, l = _add(s, v0, v1, acc0, acc1, m, l, c, D1, True, PRECISION)
    _finish(O, LSE, at * o_step, at, inside, acc0, acc1, m, l, c, D, D0, D1)


@kernel(kind="gemm")
def attention_window_forward(
    Q, K, V, O, LSE, PLAN, CU, GRIDS,
    N: tl.int32, heads: tl.int32, group: tl.int32, segments: tl.int32,
    q_step: tl.int64, q_head: tl.int64, k_step: tl.int64, k_head: tl.int64, v_step: tl.int64, v_head: tl.int64,
    c: tl.float32,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, NEGATE: tl.constexpr, ALIGN: tl.constexpr, FAR: tl.constexpr,
    BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, KT: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    WT: tl.constexpr, WH: tl.constexpr, WW: tl.constexpr, ST: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BITS_T: tl.constexpr, BITS_H: tl.constexpr, BITS_W: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (programs, heads): only the device knows how many bricks there are; a program walks as many as it must."""
    head = tl.program_id(1)
    kv_head = head // group
    q_step, k_step, v_step = multiple(q_step, ALIGN), multiple(k_step, ALIGN), multiple(v_step, ALIGN)
    Q += head * multiple(q_head, ALIGN)
    K += kv_head * multiple(k_head, ALIGN)
    V += kv_head * multiple(v_head, ALIGN)
    O += head * D
    LSE += head.to(tl.int64) * N
    for tile in range(tl.program_id(0), tl.load(PLAN + segments + 1), tl.num_programs(0)):
        segment, number = find_tile(PLAN, tile, segments)
        first = tl.load(CU + segment).to(tl.int64)
        if segment < segments:
            T, H, W = tl.load(GRIDS + segment * 3), tl.load(GRIDS + segment * 3 + 1), tl.load(GRIDS + segment * 3 + 2)
            t0, h0, w0 = brick_corner(number, T, H, W, BT, BH, BW)
            _brick(
                Q + first * q_step, K + first * k_step, V + first * v_step, O + first * heads * D, LSE + first,
                t0, h0, w0, T, H, W, q_step, k_step, v_step, heads * D, c, D, D0, D1, NEGATE, FAR, PRECISION,
                BT, BH, BW, KT, KH, KW, WT, WH, WW, ST, SH, SW,
                BITS_T, BITS_H, BITS_W,
            )  # fmt: skip
        else:  # behind the last segment: nobody to see
            at = first + number * BW + tl.arange(0, BW)
            tl.store(LSE + at, tl.full((BW,), float("-inf"), tl.float32), mask=at < N)
            none = tl.zeros((BW, D0), tl.float32)
            store_rows(O, at * heads * D, at < N, none, 0, D0, D)
            if D1:
                store_rows(O, at * heads * D, at < N, tl.zeros((BW, D1), tl.float32), D0, D1, D)
