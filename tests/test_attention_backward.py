"""attention's native backward beyond the samples: many tiles and key blocks, every mask, fuzz, layouts, determinism."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import fastdit
from fastdit import ops
from fastdit.backends.cpu import attention as adapter
from fastdit.testing import close, contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, attention as workloads

each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES[:2], ids=lambda d: str(d)[6:])
BASELINE = {"attention": workloads.sdpa, "attention_varlen": workloads.sdpa_varlen}


def _holds(op, dtype, make, what="case"):
    contract.backward(Sample(op, what, make, baseline=BASELINE[op]), dtype, "cpu")


# The rows from 600 keys on split a head's keys into parts (1,024 in bf16), whose dq meet afterwards.
@each_dtype
@pytest.mark.parametrize(
    "n, m, heads, kv_heads, d",
    [(49, 257, 2, 2, 72), (113, 600, 1, 1, 80), (61, 1100, 2, 1, 64), (17, 130, 4, 2, 112), (1, 96, 1, 1, 128)],
)
def test_tiles(n, m, heads, kv_heads, d, dtype, isa):
    def make(make):
        keys = make.randn(1, m, 2, kv_heads, d).unbind(2)
        return (make.randn(1, n, heads, d), *keys), dict(return_lse=True)

    _holds("attention", dtype, make)


def _segments(make, lengths, heads, d, key_lengths=None):
    cu = make.index([0, *torch.tensor(lengths).cumsum(0).tolist()])
    kwargs = dict(cu_seqlens_q=cu, max_seqlen_q=max(lengths))
    if key_lengths is not None:
        kwargs["cu_seqlens_k"] = make.index([0, *torch.tensor(key_lengths).cumsum(0).tolist()])
        kwargs["max_seqlen_k"] = max(key_lengths)
    q, k, v = (make.randn(sum(n), h, d) for n, h in ((lengths, heads), *[(key_lengths or lengths, 2)] * 2))
    return (q, k, v), kwargs


GRIDS = ((3, 5, 7), (0, 1, 1), (2, 8, 16), (1, 1, 1), (4, 9, 10))


@each_dtype
@pytest.mark.parametrize("window, stride", [((2, 3, 3), (1, 1, 1)), ((3, 4, 8), (1, 2, 4)), ((1, 30, 5), (1, 1, 3))])
def test_windows(window, stride, dtype, isa):
    def make(make):
        args, kwargs = _segments(make, [math.prod(g) for g in GRIDS], 4, 16)
        return args, kwargs | dict(window=window, window_stride=stride, grids=make.index(GRIDS), return_lse=True)

    _holds("attention_varlen", dtype, make)


@each_dtype
@pytest.mark.parametrize("frames", [1, 9, 50, 1000])
def test_frames(frames, dtype, isa):
    def make(make):
        args, kwargs = _segments(make, [105, 0, 130, 1, 200], 2, 24, [125, 3, 330, 1, 200])
        return args, kwargs | dict(frame_tokens=frames)

    _holds("attention_varlen", dtype, make)


# bf16: its rounding stands far above that of SDPA's own sums, which differ from ours; every ISA runs its own code on it
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(isa, data):
    """Any lengths, empty ones too, queries and keys apart, grouped heads, head dims, masks, tails."""
    draw = data.draw
    count = draw(st.integers(1, 4))
    mask = draw(st.sampled_from(["none", "cross", "frames", "frames-of", "window"]))
    group, d, tail = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 40)), draw(st.integers(0, 2))
    grids = [[draw(st.integers(0, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 9))] for _ in range(count)]
    lengths = [math.prod(g) for g in grids]
    more = [draw(st.integers(0, 40)) for _ in lengths]
    window = [draw(st.integers(1, 6)) for _ in range(3)]
    stride = [draw(st.integers(1, w)) for w in window]
    frames = [draw(st.integers(1, 30)) for _ in lengths]

    def make(make):
        key_lengths = [n + x for n, x in zip(lengths, more, strict=True)]
        args, kwargs = _segments(make, lengths, 2 * group, d, None if mask in ("none", "window") else key_lengths)
        if mask == "frames":
            kwargs["frame_tokens"] = frames[0]
        elif mask == "frames-of":
            kwargs["frame_tokens"] = make.index(frames)
        elif mask == "window":
            kwargs |= dict(window=tuple(window), window_stride=tuple(stride), grids=make.index(grids))
        if tail:
            args = tuple(torch.cat([t, make.randn(tail, *t.shape[1:])]) for t in args)
        return args, kwargs | dict(return_lse=True)

    _holds("attention_varlen", torch.bfloat16, make, mask)


# ---- laws -------------------------------------------------------------------------------------------------
def _grads(dtype, n=300, m=1100, heads=2, call=lambda o, lse: o.double().sum() + lse.sum(), **kwargs):
    make = Maker(dtype)
    leaves = [make.randn(1, rows, heads, 72).requires_grad_() for rows in (n, m, m)]
    with poisoned():
        out = ops.attention(*leaves, return_lse=True, backend="cpu", **kwargs)
        return torch.autograd.grad(call(*out), leaves)


@each_dtype
@pytest.mark.parametrize("heads", [1, 2, 7])
def test_same_bits_for_any_thread_count(heads, dtype):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_grads(dtype, heads=heads, frame_tokens=60))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            close.assert_bitwise(a, b)


@pytest.mark.parametrize("op", ["attention", "merge_attention"])
def test_only_what_is_asked_for(op):
    """A gradient has the same bits whichever others are computed beside it."""
    sample = next(s for s in workloads.SAMPLES if s.op == op and s.id in ("lse", "dense"))
    args, kwargs = sample.make(Maker(torch.bfloat16, n=60))

    def grads(wanted):
        leaves = [a.detach().requires_grad_(i in wanted) for i, a in enumerate(args)]
        with poisoned():
            o, lse = getattr(ops, op)(*leaves, **kwargs, backend="cpu")
            return torch.autograd.grad((o.double() * o.detach()).sum() + lse.sum(), [leaves[i] for i in wanted])

    whole = grads(range(len(args)))
    for i in range(len(args)):
        close.assert_bitwise(grads([i])[0], whole[i])


@pytest.mark.parametrize("through", ["o", "lse"])
def test_one_output_alone(through):
    """The other one's gradient is zero, and as if it were given as zeros."""
    alone = (lambda o, lse: o.double().sum()) if through == "o" else (lambda o, lse: lse.sum())
    both = (
        (lambda o, lse: o.double().sum() + 0 * lse.sum())
        if through == "o"
        else (lambda o, lse: lse.sum() + 0 * o.sum())
    )
    for a, b in zip(_grads(torch.float32, 50, 70, call=alone), _grads(torch.float32, 50, 70, call=both), strict=True):
        close.assert_bitwise(a, b)


def test_layout_of_the_incoming_gradient():
    q, k, v = (t.requires_grad_() for t in Maker(torch.bfloat16).randn(2, 70, 3, 2, 72).unbind(2))
    o = ops.attention(q, k, v, backend="cpu")
    g = torch.randn(2, 70, 2, 72).bfloat16()
    expected = torch.autograd.grad(o, (q, k, v), g, retain_graph=True)
    for other in (g.transpose(2, 3).contiguous().transpose(2, 3), g.transpose(1, 2).contiguous().transpose(1, 2)):
        for a, b in zip(torch.autograd.grad(o, (q, k, v), other, retain_graph=True), expected, strict=True):
            close.assert_bitwise(a, b)
    one = torch.ones((), dtype=torch.bfloat16)
    expanded = torch.autograd.grad(o, (q, k, v), one.expand(o.shape), retain_graph=True)
    for a, b in zip(expanded, torch.autograd.grad(o, (q, k, v), torch.ones_like(o)), strict=True):
        close.assert_bitwise(a, b)


def test_rows_without_keys_have_no_gradient():
    """Their lse is -inf: whatever comes back through it must not reach the others."""
    make = Maker()
    q, k, v = (make.randn(2, n, 2, 8).requires_grad_() for n in (3, 5, 5))
    o, lse = ops.attention(q, k, v, kv_len=make.index([0, 5]), return_lse=True, backend="cpu")
    spoiled = torch.ones_like(lse)
    spoiled[0] = math.nan
    grads = torch.autograd.grad((o, lse), (q, k, v), (torch.ones_like(o), spoiled))
    for g in grads:
        assert not g[0].any() and g[1].any() and g.isfinite().all()


def test_poisoned_neighbours_never_leak():
    make = Maker(torch.bfloat16)
    qkv = make.randn(70, 3, 2, 72)
    kwargs = dict(cu_seqlens_q=make.index([0, 21, 50]), max_seqlen_q=29, backend="cpu")

    def grads(t):
        leaf = t.clone().requires_grad_()
        ops.attention_varlen(*leaf.unbind(1), **kwargs).float().sum().backward()
        return leaf.grad

    clean = grads(qkv)
    qkv[21:] = math.nan
    dirty = grads(qkv)
    close.assert_bitwise(dirty[:21], clean[:21])
    assert dirty[21:50].isnan().all() and not dirty[50:].any()


def test_explain_names_no_other_backend():
    q = torch.randn(1, 4, 2, 8)
    assert "backward" not in fastdit.explain("attention", q, q, q, backend="cpu")


@pytest.mark.big
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_beyond_32_bits(dtype):
    """Tokens 2^30 elements apart, in q, k, v and in the gradient that comes in."""
    make = Maker(dtype)
    near, g = make.randn(1, 5, 2, 64), make.randn(1, 5, 2, 64)
    far, far_g = (torch.empty(2**32 + 128, dtype=dtype).as_strided(near.shape, (0, 2**30, 64, 1)) for _ in range(2))
    far.copy_(near), far_g.copy_(g)

    def grads(x, g):
        o, lse = adapter.attention(x, x, x, None, None, 0, 0.125, False, False)
        return adapter.attention_backward(g, None, x, x, x, None, None, 0, 0.125, False, False, o, lse, [True] * 3)

    for a, b in zip(grads(far, far_g), grads(near, g), strict=True):
        close.assert_bitwise(a, b)
