"""Softmax attention forward, one pass over the keys with a running maximum (arXiv 2205.14135, 2307.08691).

    s[i, j] = scale * q[i] . k[j]        lse[i] = log sum_j exp(s[i, j])        o[i] = sum_j exp(s[i, j] - lse[i]) v[j]

A program owns BLOCK_M queries of one head: q, the sums o and the row facts stay on chip, and tiles of BLOCK_N keys pass
by. First come the tiles that every query sees whole, without any mask; then the boundary tiles (segment end, kv_len,
edge of a frame), where scores of unseen keys become -inf and V rows of foreign tokens become 0, so that no NaN of
theirs reaches 0 * NaN. What no query of the tile sees is never loaded. Exponentials are powers of 2 with the scale
folded in (one FMA and one exp2 a score; fp32 inputs: exp, for its rounding); the probabilities stay in registers as
the second product's A operand.

Head dims that are no power of two are two pieces, D0 + D1 channels (72 = 64 + 8 of 16, 80 = 64 + 16, 96 = 64 + 32):
products over 80 channels instead of 128, and no padded copy. Fetching keys: rows by pointers (asynchronous copies that
fill masked rows with zeros), or TMA boxes of BLOCK_N x D0 (and D1) where the adapter hands descriptors; K, V then are
those of D0 and KR, VR those of D1.

With 3-D windows tiles are bricks (attention_mask.py) and rows are gathered by pointers: a row of one head is 128 bytes
or more and stands alone in memory in any order, so bricks cost no more traffic than lines.

Cost: 4 * D FLOPs a visible pair (2 * (D0 + D1) / D of that in wgmma terms), each query tile reads its keys and values
once, from L2 while the head's tiles run side by side: heads are the outer dimension of the grid.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple
from fastdit.kernels.attention_mask import frame_length, key_end, key_range
from fastdit.kernels.attention_tiles import find_tile

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def offsets(rows, step, FAR: tl.constexpr):
    """Where rows of a tile start; 32 bits (half the registers) unless FAR, which is when they might not do."""
    if FAR:
        return rows.to(tl.int64) * step
    else:
        return rows * step.to(tl.int32)


@triton.jit
def load_rows(P, at, inside, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, MASKED: tl.constexpr):
    """Channels FROM .. FROM + WIDTH of the rows at P + at (offsets); zeros behind D and, if MASKED, outside."""
    col = FROM + tl.arange(0, WIDTH)
    at = P + at[:, None] + col[None, :]
    if MASKED:
        if FROM + WIDTH > D:
            return tl.load(at, mask=inside[:, None] & (col < D)[None, :], other=0.0)
        else:
            return tl.load(at, mask=inside[:, None], other=0.0)
    elif FROM + WIDTH > D:
        return tl.load(at, mask=(col < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_rows(P, at, inside, x, FROM: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    col = FROM + tl.arange(0, WIDTH)
    mask = inside[:, None]
    if FROM + WIDTH > D:
        mask = mask & (col < D)[None, :]
    tl.store(P + at[:, None] + col[None, :], x.to(P.dtype.element_ty), mask=mask)


@triton.jit
def _scores(q0, q1, k0, k1, D1: tl.constexpr, PRECISION: tl.constexpr):
    s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
    if D1:
        s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
    return s


@triton.jit
def _add(s, v0, v1, acc0, acc1, m, l, c, D1: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of keys into the sums. m: running maximum of s; c: factor of s, > 0; MASKED: rows may be all -inf."""
    m_new = tl.maximum(m, tl.max(s, 1))
    top = m_new
    if MASKED:
        top = tl.where(m_new == float("-inf"), 0.0, top)
    if v0.dtype == tl.float32:  # c is the scale itself: one rounding less, and of the distance to the top, not of s
        p = tl.exp((s - top[:, None]) * c)
        fade = tl.exp((m - top) * c)
    else:
        p = tl.exp2(s * c - (top * c)[:, None])
        fade = tl.exp2(m * c - top * c)
    l = l * fade + tl.sum(p, 1)
    p = p.to(v0.dtype)
    acc0 = tl.dot(p, v0, acc0 * fade[:, None], input_precision=PRECISION)
    if D1:
        acc1 = tl.dot(p, v1, acc1 * fade[:, None], input_precision=PRECISION)
    return acc0, acc1, m_new, l


@triton.jit
def _linear(
    acc0, acc1, m, l, q0, q1, K, KR, V, VR, batch, head, row, k_step, v_step, begin, end, whole, ends, keys, c,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_N: tl.constexpr,
    FAR: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys begin .. end of a segment that starts at `row`. ends: what each query sees; keys: valid keys. With WARPS one
    loop takes both kinds of tiles, those from `whole` on with a mask: a specialised loop cannot hand its sums on."""
    n = tl.arange(0, BLOCK_N)
    k_at, v_at = offsets(n, k_step, FAR), offsets(n, v_step, FAR)
    for j in tl.range(begin, end, BLOCK_N, warp_specialize=WARPS):
        valid = j + n < keys
        k1 = 0.0
        v1 = 0.0
        if TMA:
            k0 = K.load([batch, head, row + j, 0]).reshape(BLOCK_N, D0)
            v0 = V.load([batch, head, row + j, 0]).reshape(BLOCK_N, D0)
            if D1:
                k1 = KR.load([batch, head, row + j, D0]).reshape(BLOCK_N, D1)
                v1 = VR.load([batch, head, row + j, D0]).reshape(BLOCK_N, D1)
            if MASKED:
                v0 = tl.where(valid[:, None], v0, 0.0)
                if D1:
                    v1 = tl.where(valid[:, None], v1, 0.0)
        else:
            k_row, v_row = K + (row + j) * k_step, V + (row + j) * v_step
            k0 = load_rows(k_row, k_at, valid, 0, D0, D, MASKED)
            v0 = load_rows(v_row, v_at, valid, 0, D0, D, MASKED)
            if D1:
                k1 = load_rows(k_row, k_at, valid, D0, D1, D, MASKED)
                v1 = load_rows(v_row, v_at, valid, D0, D1, D, MASKED)
        s = _scores(q0, q1, k0, k1, D1, PRECISION)
        if MASKED:
            s = tl.where(j + n[None, :] < ends[:, None], s, float("-inf"))
        elif WARPS:
            if j >= whole:
                s = tl.where(j + n[None, :] < ends[:, None], s, float("-inf"))
        acc0, acc1, m, l = _add(s, v0, v1, acc0, acc1, m, l, c, D1, MASKED or WARPS, PRECISION)
    return acc0, acc1, m, l


@triton.jit
def _queries(Q, at, inside, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, NEGATE: tl.constexpr):
    q0 = load_rows(Q, at, inside, 0, D0, D, True)
    q1 = 0.0
    if D1:
        q1 = load_rows(Q, at, inside, D0, D1, D, True)
    if NEGATE:
        q0 = -q0
        q1 = -q1
    return q0, q1


@triton.jit
def _zeros(BLOCK_M: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    acc1 = 0.0
    if D1:
        acc1 = tl.zeros((BLOCK_M, D1), tl.float32)
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    return tl.zeros((BLOCK_M, D0), tl.float32), acc1, m, tl.zeros((BLOCK_M,), tl.float32)


@triton.jit
def _finish(O, LSE, o_at, lse_at, inside, acc0, acc1, m, l, c, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Divides and stores; a row without keys has l = 0 and gives 0 and -inf."""
    none = l == 0.0
    share = tl.where(none, 0.0, 1.0 / l)
    if O.dtype.element_ty == tl.float32:
        lse = m * c + tl.log(l)
    else:
        lse = (m * c + tl.log2(l)) * LN2
    tl.store(LSE + lse_at, tl.where(none, float("-inf"), lse), mask=inside)
    store_rows(O, o_at, inside, acc0 * share[:, None], 0, D0, D)
    if D1:
        store_rows(O, o_at, inside, acc1 * share[:, None], D0, D1, D)


@triton.jit
def _lines(
    Q, K, KR, V, VR, O, LSE, batch, kv_head, row, i0, queries, keys, shift, frame, q_step, k_step, v_step, o_step, c,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FRAMES: tl.constexpr, NEGATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FAR: tl.constexpr, TMA: tl.constexpr, WARPS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries i0 .. i0 + BLOCK_M of a segment whose keys start at `row`. Q, O and LSE stand at the tile's first query;
    K and V at the (sample's) head's first row, unless they are descriptors."""
    i = tl.arange(0, BLOCK_M)
    inside = i0 + i < queries
    at = i.to(tl.int64)
    q0, q1 = _queries(Q, at * q_step, inside, D, D0, D1, NEGATE)
    whole, end = key_range(i0, tl.minimum(i0 + BLOCK_M, queries), keys, shift, frame, FRAMES, BLOCK_N)
    ends = key_end(i0 + i, keys, shift, frame, FRAMES)
    acc0, acc1, m, l = _zeros(BLOCK_M, D0, D1)
    plain = end if WARPS else whole
    acc0, acc1, m, l = _linear(
        acc0, acc1, m, l, q0, q1, K, KR, V, VR, batch, kv_head, row, k_step, v_step, 0, plain, whole, ends, keys, c,
        D, D0, D1, BLOCK_N, FAR, TMA, False, WARPS, PRECISION,
    )  # fmt: skip
    if not WARPS:
        acc0, acc1, m, l = _linear(
            acc0, acc1, m, l, q0, q1, K, KR, V, VR, batch, kv_head, row, k_step, v_step,
            whole, end, whole, ends, keys, c, D, D0, D1, BLOCK_N, FAR, TMA, True, False, PRECISION,
        )  # fmt: skip
    _finish(O, LSE, at * o_step, at, inside, acc0, acc1, m, l, c, D, D0, D1)


@kernel(kind="gemm")
def attention_forward(
    Q, K, KR, V, VR, O, LSE, KV_LEN, FRAME_OF,
    N: tl.int32, M: tl.int32, H: tl.int32, group: tl.int32, frame: tl.int32, tiles: tl.int32,
    q_batch: tl.int64, q_step: tl.int64, q_head: tl.int64, k_batch: tl.int64, k_step: tl.int64, k_head: tl.int64,
    v_batch: tl.int64, v_step: tl.int64, v_head: tl.int64, c: tl.float32,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FRAMES: tl.constexpr, NEGATE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FAR: tl.constexpr, TMA: tl.constexpr,
    WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * H * B): tiles of one head side by side, the last tile first where it sees the most (frames)."""
    tile = tl.program_id(0) % tiles
    plane = tl.program_id(0) // tiles
    if FRAMES:
        tile = tiles - 1 - tile
    head = plane % H
    batch = plane // H
    kv_head = head // group
    keys = M
    if KV_LEN is not None:
        keys = tl.minimum(tl.load(KV_LEN + batch), M)
    if FRAME_OF is not None:
        frame = tl.load(FRAME_OF + batch)
    k_step = multiple(k_step, ALIGN)
    v_step = multiple(v_step, ALIGN)
    q_step = multiple(q_step, ALIGN)
    i0 = tile * BLOCK_M
    far = batch.to(tl.int64)
    Q += far * multiple(q_batch, ALIGN) + head * multiple(q_head, ALIGN) + i0 * q_step
    if not TMA:
        K += far * multiple(k_batch, ALIGN) + kv_head * multiple(k_head, ALIGN)
        V += far * multiple(v_batch, ALIGN) + kv_head * multiple(v_head, ALIGN)
    o_step = H * D
    O += ((far * N + i0) * H + head) * D
    LSE += (far * H + head) * N + i0
    _lines(
        Q, K, KR, V, VR, O, LSE, batch, kv_head, 0, i0, N, keys, M - N, frame_length(frame, M),
        q_step, k_step, v_step, o_step, c, D, D0, D1, FRAMES, NEGATE, BLOCK_M, BLOCK_N, FAR, TMA, WARPS, PRECISION,
    )  # fmt: skip


@kernel(kind="gemm")
def attention_varlen_forward(
    Q, K, KR, V, VR, O, LSE, PLAN, CU_Q, CU_K, FRAME_OF,
    N: tl.int32, H: tl.int32, group: tl.int32, segments: tl.int32, frame: tl.int32,
    q_step: tl.int64, q_head: tl.int64, k_step: tl.int64, k_head: tl.int64, v_step: tl.int64, v_head: tl.int64,
    c: tl.float32,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, FRAMES: tl.constexpr, NEGATE: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FAR: tl.constexpr, TMA: tl.constexpr,
    WARPS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid (ceil(N / BLOCK_M) + S + 1, H): a bound on the tiles; programs behind the plan's end have nothing to do."""
    tile = tl.program_id(0)
    if tile < tl.load(PLAN + segments + 1):
        head = tl.program_id(1)
        kv_head = head // group
        segment, tile = find_tile(PLAN, tile, segments)
        first = tl.load(CU_Q + segment)
        real = segment < segments
        behind = tl.minimum(segment + 1, segments)  # the tail has rows up to N and no keys
        queries = tl.where(real, tl.load(CU_Q + behind), N) - first
        row = tl.load(CU_K + segment)
        keys = tl.load(CU_K + behind) - row
        if FRAMES:
            tile = (queries + BLOCK_M - 1) // BLOCK_M - 1 - tile
        if FRAME_OF is not None:
            frame = tl.load(FRAME_OF + segment, mask=real, other=1)
        q_step = multiple(q_step, ALIGN)
        i0 = tile * BLOCK_M
        far = (first + i0).to(tl.int64)
        Q += far * q_step + head * multiple(q_head, ALIGN)
        if not TMA:
            K += kv_head * multiple(k_head, ALIGN)
            V += kv_head * multiple(v_head, ALIGN)
        O += (far * H + head) * D
        LSE += head.to(tl.int64) * N + far
        _lines(
            Q, K, KR, V, VR, O, LSE, 0, kv_head, row, i0, queries, keys, keys - queries,
            frame_length(frame, keys), q_step, multiple(k_step, ALIGN), multiple(v_step, ALIGN), H * D, c,
            D, D0, D1, FRAMES, NEGATE, BLOCK_M, BLOCK_N, FAR, TMA, WARPS, PRECISION,
        )  # fmt: skip
