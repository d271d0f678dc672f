"""The laws of attention beside the contract on its samples, for the tests of every compiled backend, and their makers.

A law takes the backend and the device of its tensors first.
"""

import itertools
import math

import pytest
import torch
from hypothesis import strategies as st

from fastdit import ops
from fastdit.testing import close
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, attention as workloads

# (40, 1, 1) and (1, 1, 45) hold far more bricks than their tokens fill: programs take several
GRIDS = ((3, 5, 7), (0, 1, 1), (2, 4, 9), (1, 1, 1), (40, 1, 1), (1, 1, 45))
WINDOWS = [((2, 3, 3), (1, 1, 1)), ((3, 4, 8), (2, 2, 4)), ((1, 30, 5), (1, 1, 3))]  # and strides
BASELINE = {"attention": workloads.sdpa, "attention_varlen": workloads.sdpa_varlen}


# ---- calls ------------------------------------------------------------------------------------------------
def bounds(make: Maker, lengths):
    return make.index([0, *itertools.accumulate(lengths)])


def dense(n, m, heads, kv_heads, d, **more):
    """make -> two samples of n queries and m keys."""

    def make(make):
        keys = make.randn(2, m, 2, kv_heads, d).unbind(2)
        return (make.randn(2, n, heads, d), *keys), dict(return_lse=True, **more)

    return make


def segments(make: Maker, lengths, heads, d, key_lengths=None):
    """Packed q, k and v, two heads of keys, and their bounds."""
    kwargs = dict(cu_seqlens_q=bounds(make, lengths), max_seqlen_q=max(lengths))
    if key_lengths is not None:
        kwargs |= dict(cu_seqlens_k=bounds(make, key_lengths), max_seqlen_k=max(key_lengths))
    q, k, v = (make.randn(sum(n), h, d) for n, h in ((lengths, heads), *[(key_lengths or lengths, 2)] * 2))
    return (q, k, v), kwargs


def framed(frames, lengths=(35, 0, 60, 1, 40), key_lengths=(50, 3, 130, 1, 40), **more):
    """make -> segments whose queries see the frames up to their own."""

    def make(make):
        args, kwargs = segments(make, lengths, 2, 24, key_lengths)
        return args, kwargs | dict(frame_tokens=frames, **more)

    return make


def windowed(window, stride, grids=GRIDS, heads=2, tail=3):
    """make -> a segment for each grid, and `tail` rows that belong to none."""

    def make(make):
        args, kwargs = segments(make, [math.prod(g) for g in grids], heads, 16)
        args = tuple(torch.cat([t, make.randn(tail, *t.shape[1:])]) for t in args)
        return args, kwargs | dict(window=window, window_stride=stride, grids=make.index(grids), return_lse=True)

    return make


def drawn(draw, d, count=3, sides=(5, 6), more=20, frames=30):
    """(name of the mask, make): any lengths, empty ones too, queries and keys apart, grouped heads, masks, tails.

    d: the strategy of head dims. The rest, the most that is drawn: segments, rows and columns of a grid, keys beyond
    the queries, tokens of a frame.
    """
    count = draw(st.integers(1, count))
    mask = draw(st.sampled_from(["none", "cross", "frames", "frames-of", "window"]))
    group, d, tail = draw(st.sampled_from([1, 2, 3])), draw(d), draw(st.integers(0, 2))
    sizes = st.tuples(st.integers(0, 3), *(st.integers(1, side) for side in sides))
    grids = [draw(sizes) for _ in range(count)]
    lengths = [math.prod(g) for g in grids]
    key_lengths = [n + draw(st.integers(0, more)) for n in lengths]
    window = tuple(draw(st.integers(1, 6)) for _ in range(3))
    stride = tuple(draw(st.integers(1, w)) for w in window)
    frame_tokens = [draw(st.integers(1, frames)) for _ in lengths]

    def make(make):
        args, kwargs = segments(make, lengths, 2 * group, d, None if mask in ("none", "window") else key_lengths)
        if mask == "frames":
            kwargs["frame_tokens"] = frame_tokens[0]
        elif mask == "frames-of":
            kwargs["frame_tokens"] = make.index(frame_tokens)
        elif mask == "window":
            kwargs |= dict(window=window, window_stride=stride, grids=make.index(grids))
        args = tuple(torch.cat([t, make.randn(tail, *t.shape[1:])]) for t in args)
        return args, kwargs | dict(return_lse=True)

    return mask, make


def gradients(backend, op, args, kwargs, wanted=None, given=lambda o: torch.cos(o.detach())):
    """The outputs and the gradients of the wanted tensors among args, all of them by default."""
    wanted = range(len(args)) if wanted is None else wanted
    leaves = [a.detach().requires_grad_(i in wanted) for i, a in enumerate(args)]
    more = {} if op == "merge_attention" else dict(return_lse=True)
    with poisoned():
        out = getattr(ops, op)(*leaves, **kwargs | more, backend=backend)
        return [*out, *torch.autograd.grad(out, [leaves[i] for i in wanted], [given(o) for o in out])]


# ---- the same bits ----------------------------------------------------------------------------------------
def packed_or_alone(backend, device, lengths) -> None:
    """Tiles begin with their segment, so nothing depends on its neighbours."""
    make, begin = Maker(torch.bfloat16, device), 0
    args, kwargs = segments(make, lengths, 4, 24)
    packed = gradients(backend, "attention_varlen", args, kwargs)
    for n in lengths:
        part = slice(begin, begin + n)
        own = dict(cu_seqlens_q=make.index([0, n]), max_seqlen_q=n)
        alone = gradients(backend, "attention_varlen", [t[part] for t in args], own)
        close.assert_all_bitwise([t[:, part] if i == 1 else t[part] for i, t in enumerate(packed)], alone)
        begin += n


def only_what_is_asked_for(backend, op, args, kwargs, wanted) -> None:
    """A gradient has the same bits whichever others are computed beside it."""
    together = gradients(backend, op, args, kwargs)
    found = gradients(backend, op, args, kwargs, wanted)
    close.assert_all_bitwise(found, [*together[:2], *(together[2 + i] for i in wanted)])


def one_output_alone(backend, device, dtype, through) -> None:
    """The other one's gradient is zero, and as if it were given as zeros."""
    make = Maker(dtype, device)
    leaves = [make.randn(1, n, 2, 24).requires_grad_() for n in (40, 70, 70)]
    o, lse = ops.attention(*leaves, return_lse=True, backend=backend)
    picked, other = (o, lse) if through == "o" else (lse, o)
    alone = torch.autograd.grad(picked.float().sum(), leaves, retain_graph=True)
    close.assert_all_bitwise(alone, torch.autograd.grad(picked.float().sum() + 0 * other.float().sum(), leaves))
    assert through == "lse" or all(g.any() for g in alone)


def layout_of_the_incoming_gradient(backend, device) -> None:
    """Tokens, heads and channels in any order; one number for all."""
    q, k, v = (t.requires_grad_() for t in Maker(torch.bfloat16, device).randn(2, 40, 3, 2, 72).unbind(2))
    o, lse = ops.attention(q, k, v, return_lse=True, backend=backend)
    make = Maker(torch.bfloat16, device, seed=1)
    g, gl = make.randn(2, 40, 2, 72), make.randn(2, 2, 40, dtype=torch.float32)

    def grads(g, gl):
        return torch.autograd.grad((o, lse), (q, k, v), (g, gl), retain_graph=True)

    expected = grads(g, gl)
    strided = gl.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (g.transpose(2, 3).contiguous().transpose(2, 3), g.transpose(1, 2).contiguous().transpose(1, 2)):
        close.assert_all_bitwise(grads(other, strided), expected)
    one = torch.ones((), dtype=torch.bfloat16, device=device)
    close.assert_all_bitwise(grads(one.expand(o.shape), gl), grads(torch.ones_like(o), gl))


# ---- what must not be read --------------------------------------------------------------------------------
def rows_without_keys_have_no_gradient(backend, device, dtype) -> None:
    """Their lse is -inf: whatever comes back through it must not reach the others."""
    make = Maker(dtype, device)
    q, k, v = (make.randn(2, n, 2, 8).requires_grad_() for n in (3, 5, 5))
    o, lse = ops.attention(q, k, v, kv_len=make.index([0, 5]), return_lse=True, backend=backend)
    spoiled, lost = torch.ones_like(lse), torch.ones_like(o)
    spoiled[0] = lost[0] = math.nan
    assert not o[0].any() and (lse[0] == -math.inf).all()
    for g in torch.autograd.grad((o, lse), (q, k, v), (lost, spoiled)):
        assert not g[0].any() and g[1].any() and g.isfinite().all()


def poisoned_neighbours_never_leak(backend, device, ends) -> None:
    """Two segments that end there, the second one NaN, and rows of none."""
    make = Maker(torch.bfloat16, device)
    one, two = ends
    qkv = make.randn(two + 10, 3, 2, 72)
    kwargs = dict(cu_seqlens_q=make.index([0, one, two]), max_seqlen_q=max(one, two - one))

    def run():
        return gradients(backend, "attention_varlen", qkv.unbind(1), kwargs, given=torch.ones_like)

    clean = run()
    qkv[one:] = math.nan
    for i, (a, b) in enumerate(zip(run(), clean, strict=True)):
        a, b = (a.t(), b.t()) if i == 1 else (a, b)
        close.assert_bitwise(a[:one], b[:one])
        assert a[one:two].isnan().all() and (a[two:] == (-math.inf if i == 1 else 0)).all()


def poisoned_keys_behind_the_valid_ones_never_leak(backend, device, keys, valid) -> None:
    make = Maker(torch.bfloat16, device)
    args = make.randn(2, 40, 2, 24), make.randn(2, keys, 2, 24), make.randn(2, keys, 2, 24)
    kwargs = dict(kv_len=make.index(valid))
    clean = gradients(backend, "attention", args, kwargs)
    for sample, count in enumerate(valid):
        args[1][sample, count:] = args[2][sample, count:] = math.nan
    close.assert_all_bitwise(gradients(backend, "attention", args, kwargs), clean)


def unseen_keys_are_not_loaded(backend, device, dtype, frame, tokens, grid, window) -> None:
    """NaN in values that no query of a tile sees would reach it through 0 * NaN, were it only masked.

    frame: tokens of one, at most half of them. window: one frame deep, its stride as long, so that it tiles the grid;
    its queries are a whole number of tiles.
    """
    make, half = Maker(dtype, device), tokens // 2
    q, k, v = make.randn(1, tokens, 3, 1, 16).unbind(2)
    v[:, half:] = math.nan
    o = ops.attention(q, k, v, frame_tokens=frame, backend=backend)
    assert o[:, :half].isfinite().all() and o[:, half:].isnan().all()
    n, (_, h, w) = math.prod(grid), window
    q, k, v = make.randn(n, 3, 1, 16).unbind(1)
    v.unflatten(0, grid)[1, h:, :w] = math.nan
    o = ops.attention_varlen(
        *(q, k, v), cu_seqlens_q=make.index([0, n]), max_seqlen_q=n, window=window, window_stride=window,
        grids=make.index([grid]), backend=backend,
    )  # fmt: skip
    bad = o.unflatten(0, grid).isnan().flatten(3).any(-1)
    assert bad[1, h:, :w].all() and bad.sum() == (grid[1] - h) * w


def offsets_beyond_32_bits(forward, backward, device, dtype) -> None:
    """Tokens 2^30 elements apart, in q, k, v and in the gradient that comes in: reserved memory, mostly untouched.

    forward, backward: a backend's adapters.
    """
    make = Maker(dtype, device)
    near, g = make.randn(1, 5, 2, 64), make.randn(1, 5, 2, 64)

    def far(t):
        return torch.empty(2**32 + 128, dtype=dtype, device=device).as_strided(t.shape, (0, 2**30, 64, 1)).copy_(t)

    def run(x, g):
        o, lse = forward(x, x, x, None, None, 0, 0.125, False, False)
        return o, lse, *backward(g, None, x, x, x, None, None, 0, 0.125, False, False, o, lse, [True] * 3)

    close.assert_all_bitwise(run(far(near), far(g)), run(near, g))


# ---- plans and merges -------------------------------------------------------------------------------------
def plan_takes_every_tile_once(first, order, lengths, keys, tail, tile) -> None:
    """The segments that meet the most keys first, the rows behind the last one at the end. keys: of each segment."""
    count = [-(-n // tile) for n in (*lengths, tail)]
    assert sorted(order[:-1]) == list(range(len(lengths) + 1)) and order[-2] == len(lengths)
    assert [keys[s] for s in order[:-2]] == sorted(keys, reverse=True)
    assert first == [0, *itertools.accumulate(count[s] for s in order[:-1])]


each_missing = pytest.mark.parametrize("missing", ["o", "lse"])
each_wanted = pytest.mark.parametrize("wanted", [(1,), (0, 3), (0, 1, 2, 3)], ids=str)


def partial_merge(backend, device, missing, wanted) -> None:
    """Only o or only lse has a gradient, and not every input wants one."""
    make = Maker(torch.float32, device)
    inputs = [make.randn(2, 5, 3, 20), make.randn(2, 3, 5), make.randn(2, 5, 3, 20), make.randn(2, 3, 5)]
    inputs[1][0, 0] = inputs[3][0, 0] = inputs[1][1, 2] = -math.inf

    def grads(backend, dtype):
        leaves = [x.to(dtype).requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        o, lse = ops.merge_attention(*leaves, backend=backend)
        out = lse[:, 1:] if missing == "o" else o
        return torch.autograd.grad(out.square().sum(), [leaves[i] for i in wanted], allow_unused=True)

    truths, base = grads("reference", torch.float64), grads("reference", torch.float32)
    for actual, truth, plain in zip(grads(backend, torch.float32), truths, base, strict=True):
        assert (truth is None) <= (actual is None or not actual.any())
        if truth is not None:
            close.assert_close(actual, truth, plain)
