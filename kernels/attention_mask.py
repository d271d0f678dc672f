"""Who sees whom: the range a tile has to visit, the part of it that needs no mask, and the masks of the rest.

i counts queries and j keys, both from the start of their segment (of their sample, when dense).

    linear masks   query i sees the keys j < key_end(i), a bound that never falls with i: all keys; or, frame-causal,
                   the frames up to its own. `shift` = keys - queries, since the queries are the last of the keys.
    3-D window     per axis of n tokens, window W and stride S:   start(i) <= j < start(i) + min(W, n),
                   start(i) = clamp(i // S * S + S // 2 - W // 2, 0, n - W)

Both are monotone, so whatever a run of queries sees together is one range between two bounds that come from its first
and its last query (and likewise the queries that see a run of keys, which the backward asks for). With windows that
holds on each axis, so tiles are bricks of BT x BH x BW tokens: the keys of a query brick are a box, walked in key
bricks from its lower corner, and nothing outside the box is loaded. A brick inside the `core` of the box is seen by
every query and takes the plain path.
"""

import triton
import triton.language as tl

# ---- linear masks -----------------------------------------------------------------------------------------


@triton.jit
def frame_length(frame, keys):
    """A usable frame length: a frame longer than the keys is as good as one that holds them, and cannot overflow."""
    return tl.maximum(tl.minimum(frame, keys), 1)


@triton.jit
def key_end(i, keys, shift, frame, FRAMES: tl.constexpr):
    """Query i sees the keys j < key_end(i). keys: how many are valid (kv_len); frame: from frame_length."""
    if FRAMES:
        return tl.maximum(tl.minimum(((i + shift) // frame + 1) * frame, keys), 0)  # more queries than keys: none
    else:
        return i * 0 + keys


@triton.jit
def key_range(i0, i1, keys, shift, frame, FRAMES: tl.constexpr, BLOCK: tl.constexpr):
    """(whole, end) for the queries i0 <= i < i1: all see the keys below `whole`, a multiple of BLOCK; none sees `end`
    or beyond. Without queries, (0, 0)."""
    end = tl.where(i1 > i0, key_end(i1 - 1, keys, shift, frame, FRAMES), 0)
    whole = tl.minimum(key_end(i0, keys, shift, frame, FRAMES), end) // BLOCK * BLOCK
    return whole, end


@triton.jit
def query_range(j0, j1, queries, keys, shift, frame, FRAMES: tl.constexpr, BLOCK: tl.constexpr):
    """(begin, whole) for the keys j0 <= j < min(j1, keys): no query before `begin` sees any of them, and from `whole`
    on (to `queries`) every query sees them all; both multiples of BLOCK, or `queries`. Without keys, both `queries`.

    A tile that reaches behind `keys` still needs the mask of its key rows.
    """
    begin = 0
    whole = 0
    if FRAMES:
        last = tl.maximum(tl.minimum(j1, keys) - 1, 0)
        begin = tl.maximum(j0 // frame * frame - shift, 0)
        whole = tl.maximum(last // frame * frame - shift, 0)
    begin = tl.minimum(begin // BLOCK * BLOCK, queries)
    whole = tl.minimum((whole + BLOCK - 1) // BLOCK * BLOCK, queries)
    some = j0 < keys
    return tl.where(some, begin, queries), tl.where(some, whole, queries)


# ---- 3-D window: one axis -----------------------------------------------------------------------------------


@triton.jit
def window_start(i, n, W: tl.constexpr, STRIDE: tl.constexpr):
    """First key that query i sees on an axis of n; it sees min(W, n) from there."""
    start = i // STRIDE * STRIDE + (STRIDE // 2 - W // 2)
    return tl.maximum(tl.minimum(start, n - W), 0)


@triton.jit
def window_end(i, n, W: tl.constexpr, STRIDE: tl.constexpr):
    return tl.minimum(window_start(i, n, W, STRIDE) + W, n)


@triton.jit
def first_viewer(j, n, W: tl.constexpr, STRIDE: tl.constexpr):
    """First query that sees key j < n: the least i with start(i) >= j - W + 1."""
    least = j - W + 1
    ahead = tl.maximum(least - (STRIDE // 2 - W // 2), 0)
    return tl.where(least <= 0, 0, (ahead + STRIDE - 1) // STRIDE * STRIDE)


@triton.jit
def viewers_end(j, n, W: tl.constexpr, STRIDE: tl.constexpr):
    """Behind the last query that sees key j < n: the queries with start(i) <= j end there."""
    behind = ((j - (STRIDE // 2 - W // 2)) // STRIDE + 1) * STRIDE
    return tl.where(j >= n - W, n, tl.minimum(behind, n))


@triton.jit
def seen_span(i0, i1, n, W: tl.constexpr, STRIDE: tl.constexpr):
    """(lo, hi, core_lo, core_hi) for the queries i0 <= i < min(i1, n) of one axis: the keys that some query sees, and
    those that all see."""
    last = tl.minimum(i1, n) - 1
    return (
        window_start(i0, n, W, STRIDE),
        window_end(last, n, W, STRIDE),
        window_start(last, n, W, STRIDE),
        window_end(i0, n, W, STRIDE),
    )


@triton.jit
def viewer_span(j0, j1, n, W: tl.constexpr, STRIDE: tl.constexpr):
    """(lo, hi, core_lo, core_hi) for the keys j0 <= j < min(j1, n): the queries that see some key, and those that see
    all."""
    last = tl.minimum(j1, n) - 1
    return (
        first_viewer(j0, n, W, STRIDE),
        viewers_end(last, n, W, STRIDE),
        first_viewer(last, n, W, STRIDE),
        viewers_end(j0, n, W, STRIDE),
    )


# ---- 3-D window: bricks -------------------------------------------------------------------------------------


@triton.jit
def brick_tokens(BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """(t, h, w) of the BT * BH * BW tokens of a brick, from its corner; powers of two."""
    token = tl.arange(0, BT * BH * BW)
    return token // (BH * BW), token // BW % BH, token % BW


@triton.jit
def brick_corner(number, nt, nh, nw, BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """(t, h, w) of brick `number` of a box of nt x nh x nw tokens, counted w fastest from the box's own corner."""
    across = (nw + BW - 1) // BW
    down = (nh + BH - 1) // BH
    return number // (across * down) * BT, number // across % down * BH, number % across * BW


@triton.jit
def bricks(nt, nh, nw, BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):
    """How many bricks cover nt x nh x nw tokens."""
    return (nt + BT - 1) // BT * ((nh + BH - 1) // BH) * ((nw + BW - 1) // BW)


@triton.jit
def within(j, start, length):
    """start <= j < start + length in one comparison; broadcasts."""
    return (j - start).to(tl.uint32, bitcast=True) < length.to(tl.uint32, bitcast=True)


# One number a token: its three coordinates from the box's corner, each in a field of B* bits under a guard bit. A field
# that goes below zero in a subtraction takes its own guard and nothing else, so two subtractions test six bounds.


@triton.jit
def guards(BITS_T: tl.constexpr, BITS_H: tl.constexpr, BITS_W: tl.constexpr):
    """The guard bits. 32 bits where the fields fit, else 64."""
    H_AT: tl.constexpr = BITS_W + 1
    T_AT: tl.constexpr = BITS_W + BITS_H + 2
    if T_AT + BITS_T < 31:
        return tl.full((), (1 << BITS_W) | (1 << (H_AT + BITS_H)) | (1 << (T_AT + BITS_T)), tl.int32)
    else:
        return tl.full((), (1 << BITS_W) | (1 << (H_AT + BITS_H)) | (1 << (T_AT + BITS_T)), tl.int64)


@triton.jit
def packed(t, h, w, guard, BITS_T: tl.constexpr, BITS_H: tl.constexpr, BITS_W: tl.constexpr):
    """(t, h, w) as one number; broadcasts. A sum of two is the sum of their coordinates while those fit."""
    t, h, w = t.to(guard.dtype), h.to(guard.dtype), w.to(guard.dtype)
    return (t << (BITS_W + BITS_H + 2)) + (h << (BITS_W + 1)) + w


@triton.jit
def sees(first, last, key, guard):
    """first <= key <= last on every axis, of packed numbers; `key` and `last` come with `guard` added; broadcasts."""
    return ((key - first) & (last - (key - guard)) & guard) == guard
