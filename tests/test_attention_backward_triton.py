"""attention's gradients on Triton beyond the samples: many tiles, every mask, fuzz, layouts, what must not leak."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

from fastdit import ops
from fastdit.backends._attention_bricks import bricks, walked
from fastdit.testing import close, contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, attention as workloads

pytest.importorskip("triton")

from fastdit.backends.triton import _config, _launch, attention as forward, attention_backward as adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
BASELINE = {"attention": workloads.sdpa, "attention_varlen": workloads.sdpa_varlen}
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture
def small():
    """Tiles of 16 and 32, so that little data makes many of them."""
    tile = _config.Config
    with _config.forced("attention_dkdv", tile((16, 32), 4, 2)), _config.forced("attention_dq", tile((32, 16), 4, 2)):
        yield


def _holds(op, dtype, make, what="case"):
    contract.backward(Sample(op, what, make, baseline=BASELINE[op]), dtype, "triton", DEVICE)


def _dense(n, m, heads, kv_heads, d, **more):
    def make(make):
        keys = make.randn(2, m, 2, kv_heads, d).unbind(2)
        return (make.randn(2, n, heads, d), *keys), dict(return_lse=True, **more)

    return make


def _segments(make, lengths, heads, d, key_lengths=None):
    cu = make.index([0, *torch.tensor(lengths).cumsum(0).tolist()])
    kwargs = dict(cu_seqlens_q=cu, max_seqlen_q=max(lengths))
    if key_lengths is not None:
        kwargs["cu_seqlens_k"] = make.index([0, *torch.tensor(key_lengths).cumsum(0).tolist()])
        kwargs["max_seqlen_k"] = max(key_lengths)
    q, k, v = (make.randn(sum(n), h, d) for n, h in ((lengths, heads), *[(key_lengths or lengths, 2)] * 2))
    return (q, k, v), kwargs


# ---- every path against the reference ---------------------------------------------------------------------------
@each_dtype
@pytest.mark.parametrize(
    "n, m, heads, kv_heads, d",
    [(49, 70, 2, 1, 72), (33, 17, 2, 2, 64), (1, 65, 4, 2, 80), (64, 32, 1, 1, 96), (20, 40, 1, 1, 112)],
)
def test_tiles(n, m, heads, kv_heads, d, dtype, small):
    _holds("attention", dtype, _dense(n, m, heads, kv_heads, d))


@pytest.mark.parametrize("capability", [80, 90, 100, 120])
@pytest.mark.parametrize("d", [40, 64, 72, 96, 128, 160])
def test_default_tiles_of_every_card(capability, d):
    _launch.pretend(capability)
    _config.forget()
    try:
        _holds("attention", torch.bfloat16, _dense(70, 133, 1, 1, d))
    finally:
        _launch.pretend(None)
        _config.forget()


@each_dtype
@pytest.mark.parametrize("frames", [1, 7, 50])
def test_frames(frames, dtype, small):
    def make(make):
        args, kwargs = _segments(make, [35, 0, 60, 1, 40], 2, 24, [50, 3, 130, 1, 40])
        return args, kwargs | dict(frame_tokens=frames)

    _holds("attention_varlen", dtype, make)


def test_frames_and_valid_keys_together(small):
    _holds(
        "attention", torch.float32,
        lambda m: _dense(40, 70, 2, 1, 16, frame_tokens=m.index([9, 33]), kv_len=m.index([37, 0]))(m),
    )  # fmt: skip


# (40, 1, 1) and (1, 1, 45) hold far more bricks than their tokens fill: programs take several
GRIDS = ((3, 5, 7), (0, 1, 1), (2, 4, 9), (1, 1, 1), (40, 1, 1), (1, 1, 45))


@each_dtype
@pytest.mark.parametrize("window, stride", [((2, 3, 3), (1, 1, 1)), ((3, 4, 8), (2, 2, 4)), ((1, 30, 5), (1, 1, 3))])
def test_windows(window, stride, dtype, small):
    def make(make):
        args, kwargs = _segments(make, [math.prod(g) for g in GRIDS], 2, 16)
        args = tuple(torch.cat([t, make.randn(3, *t.shape[1:])]) for t in args)
        return args, kwargs | dict(window=window, window_stride=stride, grids=make.index(GRIDS), return_lse=True)

    _holds("attention_varlen", dtype, make)


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(small, data):
    """Any lengths, empty ones too, queries and keys apart, grouped heads, head dims, masks, tails."""
    draw = data.draw
    count = draw(st.integers(1, 3))
    mask = draw(st.sampled_from(["none", "cross", "frames", "frames-of", "window"]))
    group, d, tail = draw(st.sampled_from([1, 2, 3])), draw(st.integers(1, 40)), draw(st.integers(0, 2))
    grids = [[draw(st.integers(0, 3)), draw(st.integers(1, 5)), draw(st.integers(1, 6))] for _ in range(count)]
    lengths = [math.prod(g) for g in grids]
    more = [draw(st.integers(0, 20)) for _ in lengths]
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


# ---- bricks -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("of_keys", [False, True])
@pytest.mark.parametrize("window, stride", [(24, 8), (18, 16), (7, 3), (5, 1), (6, 2), (13, 5)])
def test_length_that_neighbours_meet(window, stride, of_keys):
    """The formula by which bricks are chosen, against the axis itself, far from its ends."""
    query = torch.arange(2048)
    start = query // stride * stride + stride // 2 - window // 2
    for own in (1, 4, 8):
        found = []
        for x in range(1024 // own * own, 1024 // own * own + math.lcm(own, stride), own):
            if of_keys:
                found.append(int(((start <= x + own - 1) & (start + window > x)).sum()))
            else:
                found.append(int(start[x + own - 1] - start[x]) + window)
        assert walked(window, stride, own, 1, of_keys) == pytest.approx(sum(found) / len(found))


def test_bricks_of_tiled_windows_waste_nothing():
    """Sliding tiles of 8 x 8: a program's queries share one window, and bricks of keys fill it exactly."""
    own, other = bricks((16, 24, 24), (16, 8, 8), 64, 64, False)
    keys = math.prod(walked(w, s, a, b, False) for w, s, a, b in zip((16, 24, 24), (16, 8, 8), own, other, strict=True))
    assert math.prod(own) == math.prod(other) == 64 and keys == 16 * 24 * 24


# ---- laws -------------------------------------------------------------------------------------------------------
def _grads(dtype, n=40, m=70, call=lambda o, lse: o.float().sum() + lse.sum(), **kwargs):
    make = Maker(dtype, DEVICE)
    leaves = [make.randn(1, rows, 2, 24).requires_grad_() for rows in (n, m, m)]
    with poisoned():
        out = ops.attention(*leaves, return_lse=True, backend="triton", **kwargs)
        return torch.autograd.grad(call(*out), leaves)


@each_dtype
def test_same_bits_on_every_run(dtype):
    for a, b in zip(_grads(dtype, 300, 200, frame_tokens=None), _grads(dtype, 300, 200), strict=True):
        close.assert_bitwise(a, b)


def test_same_bits_packed_or_alone(small):
    """Tiles begin with their segment, so its gradients do not depend on its neighbours."""
    make = Maker(torch.bfloat16, DEVICE)
    lengths = [20, 37, 5]
    (q, k, v), kwargs = _segments(make, lengths, 4, 24)
    g = make.randn(sum(lengths), 4, 24)

    def grads(part, **kwargs):
        leaves = [t[part].detach().requires_grad_() for t in (q, k, v)]
        return torch.autograd.grad(ops.attention_varlen(*leaves, backend="triton", **kwargs), leaves, g[part])

    packed, begin = grads(slice(None), **kwargs), 0
    for n in lengths:
        part = slice(begin, begin + n)
        alone = grads(part, cu_seqlens_q=make.index([0, n]), max_seqlen_q=n)
        for a, b in zip(packed, alone, strict=True):
            close.assert_bitwise(a[part], b)
        begin += n


@pytest.mark.parametrize("wanted", range(3))
def test_only_what_is_asked_for(wanted):
    """A gradient has the same bits whichever others are computed beside it."""
    make = Maker(torch.bfloat16, DEVICE)
    args = make.randn(1, 40, 4, 72), *make.randn(1, 50, 2, 2, 72).unbind(2)

    def grads(asked):
        leaves = [a.detach().requires_grad_(i in asked) for i, a in enumerate(args)]
        with poisoned():
            o, lse = ops.attention(*leaves, return_lse=True, backend="triton")
            return torch.autograd.grad((o.float() * o.detach()).sum() + lse.sum(), [leaves[i] for i in asked])

    close.assert_bitwise(grads([wanted])[0], grads(range(3))[wanted])


@pytest.mark.parametrize("through", ["o", "lse"])
def test_one_output_alone(through):
    """The other one's gradient is zero, and as if it were given as zeros."""
    one = (lambda o, lse: o.float().sum()) if through == "o" else (lambda o, lse: lse.sum())
    with_zero = (
        (lambda o, lse: o.float().sum() + 0 * lse.sum())
        if through == "o"
        else (lambda o, lse: lse.sum() + 0 * o.float().sum())
    )
    for a, b in zip(_grads(torch.float32, call=one), _grads(torch.float32, call=with_zero), strict=True):
        close.assert_bitwise(a, b)
        assert through == "lse" or a.any()


def test_layout_of_the_incoming_gradient():
    q, k, v = (t.requires_grad_() for t in Maker(torch.bfloat16, DEVICE).randn(2, 40, 3, 2, 72).unbind(2))
    o, lse = ops.attention(q, k, v, return_lse=True, backend="triton")
    make = Maker(torch.bfloat16, DEVICE, seed=1)
    g, gl = make.randn(2, 40, 2, 72), make.randn(2, 2, 40, dtype=torch.float32)

    def grads(g, gl):
        return torch.autograd.grad((o, lse), (q, k, v), (g, gl), retain_graph=True)

    expected = grads(g, gl)
    strided = gl.transpose(1, 2).contiguous().transpose(1, 2)
    for other in (g.transpose(2, 3).contiguous().transpose(2, 3), g.transpose(1, 2).contiguous().transpose(1, 2)):
        for a, b in zip(grads(other, strided), expected, strict=True):
            close.assert_bitwise(a, b)
    one = torch.ones((), dtype=torch.bfloat16, device=DEVICE)
    for a, b in zip(grads(one.expand(o.shape), gl), grads(torch.ones_like(o), gl), strict=True):
        close.assert_bitwise(a, b)


def test_rows_without_keys_have_no_gradient():
    """Their lse is -inf: whatever comes back through it must not reach the others."""
    make = Maker(device=DEVICE)
    q, k, v = (make.randn(2, n, 2, 8).requires_grad_() for n in (3, 5, 5))
    o, lse = ops.attention(q, k, v, kv_len=make.index([0, 5]), return_lse=True, backend="triton")
    spoiled, lost = torch.ones_like(lse), torch.ones_like(o)
    spoiled[0] = lost[0] = math.nan
    for g in torch.autograd.grad((o, lse), (q, k, v), (lost, spoiled)):
        assert not g[0].any() and g[1].any() and g.isfinite().all()


def test_poisoned_neighbours_never_leak(small):
    make = Maker(torch.bfloat16, DEVICE)
    qkv = make.randn(70, 3, 2, 72)
    kwargs = dict(cu_seqlens_q=make.index([0, 21, 50]), max_seqlen_q=29, backend="triton")

    def grads(t):
        leaf = t.clone().requires_grad_()
        ops.attention_varlen(*leaf.unbind(1), **kwargs).float().sum().backward()
        return leaf.grad

    clean = grads(qkv)
    qkv[21:] = math.nan
    dirty = grads(qkv)
    close.assert_bitwise(dirty[:21], clean[:21])
    assert dirty[21:50].isnan().all() and not dirty[50:].any()


def test_poisoned_keys_behind_the_valid_ones_never_leak(small):
    make = Maker(torch.bfloat16, DEVICE)
    q, k, v = make.randn(2, 40, 2, 24), make.randn(2, 60, 2, 24), make.randn(2, 60, 2, 24)
    valid = make.index([37, 5])

    def grads():
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        ops.attention(*leaves, kv_len=valid, backend="triton").float().sum().backward()
        return [t.grad for t in leaves]

    clean = grads()
    for sample, count in enumerate(valid.tolist()):
        k[sample, count:] = v[sample, count:] = math.nan
    for a, b in zip(grads(), clean, strict=True):
        close.assert_bitwise(a, b)


@pytest.mark.big
def test_offsets_beyond_32_bits():
    """Tokens 2^30 elements apart, in q, k, v and in the gradient that comes in."""
    make = Maker(torch.float16, DEVICE)
    near, g = make.randn(1, 5, 2, 64), make.randn(1, 5, 2, 64)
    far, far_g = (
        torch.empty(2**32 + 128, dtype=near.dtype, device=DEVICE).as_strided(near.shape, (0, 2**30, 64, 1))
        for _ in range(2)
    )
    far.copy_(near), far_g.copy_(g)

    def grads(x, g):
        o, lse = forward.attention(x, x, x, None, None, 0, 0.125, False, False)
        return adapter.attention_backward(g, None, x, x, x, None, None, 0, 0.125, False, False, o, lse, [True] * 3)

    for a, b in zip(grads(far, far_g), grads(near, g), strict=True):
        close.assert_bitwise(a, b)
