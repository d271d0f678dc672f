"""attention's CUDA kernels: every sample, many tiles under every mask, in the block simulator or on a GPU."""

import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from test_attention_backward_triton import BASELINE, GRIDS, _dense as dense, _segments as segments
from test_attention_triton import MISSING, WANTED, check_partial_merge
from test_contract import HOT_SAMPLES

import fastdit
from fastdit import ops
from fastdit.backends.cuda import _launch, attention as adapter
from fastdit.testing import close, contract, simt
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

DEVICE = "cuda" if torch.cuda.is_available() and _launch._cuda is not None else "cpu"
if DEVICE == "cpu":
    pytest.importorskip("fastdit._cuda_sim", reason="neither the CUDA module with a GPU nor the block simulator")
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
SAMPLES = [s for op in BASELINE for s in samples(op) if s.id not in ("odd-head", "one-channel")]
HOT = [s for s in HOT_SAMPLES if s in SAMPLES]
DTYPES = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def where(schedule: str = "eager", seed: int = 1):
    return simt.simulated(schedule, seed) if DEVICE == "cpu" else contextlib.nullcontext()


@pytest.fixture(autouse=True)
def _machine():
    with where():
        yield


def both(sample: Sample, dtype: torch.dtype) -> None:
    contract.forward(sample, dtype, "cuda", DEVICE)
    contract.backward(sample, dtype, "cuda", DEVICE)


def holds(op: str, dtype: torch.dtype, make, what: str = "case") -> None:
    both(Sample(op, what, make, baseline=BASELINE[op]), dtype)


# ---- every path against the reference ---------------------------------------------------------------------------
@each_dtype
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_samples(sample, dtype):
    both(sample, dtype)


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_opcheck(sample):
    assert contract.opcheck(sample, "cuda", DEVICE, torch.bfloat16) == 2


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_compile(sample):
    contract.compile_dynamic(sample, "cuda", device=DEVICE, dtype=torch.bfloat16)


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_fast_path_equals_torch_ops(sample):
    contract.paths_equal(sample, torch.bfloat16, "cuda", DEVICE)


@pytest.mark.parametrize("d", [64, 72, 80, 96, 112, 128])
def test_tiles(d):
    """Several tiles of queries and of keys, the last ones ragged, in every width that a kernel is made for."""
    holds("attention", DTYPES[d % 16 == 0], dense(133, 70, 1, 1, d))


@each_dtype
@pytest.mark.parametrize("scale", [0.4, -0.2, 0.0])
def test_grouped_heads_and_scales(scale, dtype):
    holds("attention", dtype, dense(70, 133, 4, 2, 64, scale=scale))


@pytest.mark.parametrize("frames", [1, 7, 50])
def test_frames(frames):
    def make(make):
        args, kwargs = segments(make, [35, 0, 60, 1, 40], 2, 24, [50, 3, 130, 1, 40])
        return args, kwargs | dict(frame_tokens=frames, return_lse=True)

    holds("attention_varlen", torch.bfloat16, make)


def test_frames_and_valid_keys_together():
    holds(
        "attention", torch.bfloat16,
        lambda m: dense(140, 170, 2, 1, 16, frame_tokens=m.index([9, 33]), kv_len=m.index([137, 0]))(m),
    )  # fmt: skip


WINDOWS = [((2, 3, 3), (1, 1, 1)), ((3, 4, 8), (2, 2, 4)), ((1, 30, 5), (1, 1, 3))]


@pytest.mark.parametrize("window, stride", WINDOWS)
def test_windows(window, stride):
    def make(make):
        args, kwargs = segments(make, [math.prod(g) for g in GRIDS], 2, 16)
        args = tuple(torch.cat([t, make.randn(3, *t.shape[1:])]) for t in args)
        return args, kwargs | dict(window=window, window_stride=stride, grids=make.index(GRIDS), return_lse=True)

    holds("attention_varlen", torch.float16, make)


@pytest.mark.full
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(data):
    """Any lengths, empty ones too, queries and keys apart, grouped heads, head dims, masks, tails."""
    draw = data.draw
    count, d = draw(st.integers(1, 3)), 8 * draw(st.integers(1, 16))
    mask = draw(st.sampled_from(["none", "cross", "frames", "frames-of", "window"]))
    group, tail = draw(st.sampled_from([1, 2, 3])), draw(st.integers(0, 2))
    grids = [[draw(st.integers(0, 3)), draw(st.integers(1, 9)), draw(st.integers(1, 9))] for _ in range(count)]
    lengths = [math.prod(g) for g in grids]
    more = [draw(st.integers(0, 90)) for _ in lengths]
    window = tuple(draw(st.integers(1, 6)) for _ in range(3))
    stride = tuple(draw(st.integers(1, w)) for w in window)
    frames = [draw(st.integers(1, 60)) for _ in lengths]

    def make(make):
        key_lengths = [n + x for n, x in zip(lengths, more, strict=True)]
        args, kwargs = segments(make, lengths, 2 * group, d, None if mask in ("none", "window") else key_lengths)
        if mask == "frames":
            kwargs["frame_tokens"] = frames[0]
        elif mask == "frames-of":
            kwargs["frame_tokens"] = make.index(frames)
        elif mask == "window":
            kwargs |= dict(window=window, window_stride=stride, grids=make.index(grids))
        if tail:
            args = tuple(torch.cat([t, make.randn(tail, *t.shape[1:])]) for t in args)
        return args, kwargs | dict(return_lse=True)

    holds("attention_varlen", torch.bfloat16, make, mask)


# ---- the order of threads, blocks and copies ----------------------------------------------------------------------
def gradients(op, args, kwargs, wanted=range(3), g=lambda o: torch.cos(o.detach())):
    """o, lse and the gradients of the wanted among q, k and v."""
    leaves = [a.detach().requires_grad_(i in wanted) for i, a in enumerate(args)]
    with poisoned():
        out = getattr(ops, op)(*leaves, **kwargs | dict(return_lse=True), backend="cuda")
        return [*out, *torch.autograd.grad(out, [leaves[i] for i in wanted], [g(o) for o in out])]


@pytest.mark.skipif(DEVICE == "cuda", reason="a card has one schedule")
@pytest.mark.parametrize("mask", ["frames", "window"])
def test_schedules(mask):
    """Whatever comes first and whenever copies land: the same bits."""
    make = Maker(torch.bfloat16, DEVICE)
    args, kwargs = segments(make, [72, 0, 8], 2, 72)
    if mask == "frames":
        kwargs |= dict(frame_tokens=20)
    else:
        kwargs |= dict(window=(2, 3, 3), grids=make.index([[2, 4, 9], [0, 1, 1], [2, 2, 2]]))
    first = gradients("attention_varlen", args, kwargs)
    for schedule, seed in (("lazy", 1), ("random", 1), ("random", 2)):
        with where(schedule, seed):
            for a, b in zip(gradients("attention_varlen", args, kwargs), first, strict=True):
                close.assert_bitwise(a, b)


def test_same_bits_packed_or_alone():
    """Tiles begin with their segment, so nothing depends on its neighbours."""
    make = Maker(torch.bfloat16, DEVICE)
    lengths, begin = [20, 70, 5], 0
    args, kwargs = segments(make, lengths, 4, 24)
    packed = gradients("attention_varlen", args, kwargs)
    for n in lengths:
        part = slice(begin, begin + n)
        alone = dict(cu_seqlens_q=make.index([0, n]), max_seqlen_q=n)
        found = gradients("attention_varlen", [t[part] for t in args], alone)
        for i, (a, b) in enumerate(zip(packed, found, strict=True)):
            close.assert_bitwise(a[:, part] if i == 1 else a[part], b)
        begin += n


def test_dense_is_packed():
    make = Maker(torch.float16, DEVICE)
    args = make.randn(1, 140, 2, 40), *make.randn(1, 90, 2, 1, 40).unbind(2)
    keys = dict(cu_seqlens_k=make.index([0, 90]), max_seqlen_k=90)
    packed = dict(cu_seqlens_q=make.index([0, 140]), max_seqlen_q=140) | keys
    one = gradients("attention_varlen", [t[0] for t in args], packed)
    for a, b in zip(gradients("attention", args, {}), one, strict=True):
        close.assert_bitwise(a[0], b)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_what_is_asked_for(wanted):
    """A gradient has the same bits whichever others are computed beside it."""
    make = Maker(torch.bfloat16, DEVICE)
    args = make.randn(1, 40, 4, 72), *make.randn(1, 70, 2, 2, 72).unbind(2)
    together = gradients("attention", args, {})
    for i, found in zip(wanted, gradients("attention", args, {}, wanted)[2:], strict=True):
        close.assert_bitwise(found, together[2 + i])


# ---- layouts ----------------------------------------------------------------------------------------------------
def test_layouts():
    """Strides, rows that do not stand on 16 bytes, tokens and heads in any order, one row for all: the same bits."""
    make = Maker(torch.bfloat16, DEVICE)
    args = [make.randn(2, 70, 2, 24) for _ in range(3)]
    expected = gradients("attention", args, {})

    def heads_first(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def odd(t):
        wide = t.new_empty(2, 70, 2, 27)[..., 3:]
        return wide.copy_(t)

    for change in (heads_first, odd, lambda t: torch.stack([t, t], 2)[:, :, 1]):
        changed = gradients("attention", [change(t) for t in args], {})
        for a, b in zip(changed, expected, strict=True):
            close.assert_bitwise(a, b)
    one = args[1][:1, :1]
    far = one.expand(2, 70, 2, 24)
    for a, b in zip(
        gradients("attention", (args[0], far, far), {}),
        gradients("attention", (args[0], far.contiguous(), far.contiguous()), {}),
        strict=True,
    ):
        close.assert_bitwise(a, b)


def test_layout_of_the_incoming_gradient():
    q, k, v = (t.requires_grad_() for t in Maker(torch.bfloat16, DEVICE).randn(2, 40, 3, 2, 72).unbind(2))
    o, lse = ops.attention(q, k, v, return_lse=True, backend="cuda")
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


@pytest.mark.parametrize("through", ["o", "lse"])
def test_one_output_alone(through):
    make = Maker(torch.bfloat16, DEVICE)
    leaves = [t.requires_grad_() for t in make.randn(1, 40, 3, 2, 24).unbind(2)]
    o, lse = ops.attention(*leaves, return_lse=True, backend="cuda")
    picked, zero = (o.float().sum(), 0 * lse.sum()) if through == "o" else (lse.sum(), 0 * o.float().sum())
    alone = torch.autograd.grad(picked, leaves, retain_graph=True)
    for a, b in zip(alone, torch.autograd.grad(picked + zero, leaves), strict=True):
        close.assert_bitwise(a, b)
        assert through == "lse" or a.any()


# ---- what must not be read ----------------------------------------------------------------------------------------
def test_poisoned_neighbours_never_leak():
    make = Maker(torch.bfloat16, DEVICE)
    qkv = make.randn(100, 3, 2, 72)
    kwargs = dict(cu_seqlens_q=make.index([0, 21, 90]), max_seqlen_q=69)
    clean = gradients("attention_varlen", qkv.unbind(1), kwargs, g=torch.ones_like)
    qkv[21:] = math.nan
    dirty = gradients("attention_varlen", qkv.unbind(1), kwargs, g=torch.ones_like)
    for i, (a, b) in enumerate(zip(dirty, clean, strict=True)):
        a, b = (a.t(), b.t()) if i == 1 else (a, b)
        close.assert_bitwise(a[:21], b[:21])
        assert a[21:90].isnan().all() and (a[90:] == (-math.inf if i == 1 else 0)).all()


def test_poisoned_keys_behind_the_valid_ones_never_leak():
    make = Maker(torch.bfloat16, DEVICE)
    args = make.randn(2, 40, 2, 24), make.randn(2, 90, 2, 24), make.randn(2, 90, 2, 24)
    kwargs = dict(kv_len=make.index([67, 5]))
    clean = gradients("attention", args, kwargs)
    for sample, count in enumerate((67, 5)):
        args[1][sample, count:] = args[2][sample, count:] = math.nan
    for a, b in zip(gradients("attention", args, kwargs), clean, strict=True):
        close.assert_bitwise(a, b)


def test_unseen_bricks_are_not_loaded():
    """NaN that no query of a tile sees would reach it through 0 * NaN, were it only masked."""
    make = Maker(torch.float16, DEVICE)
    q, k, v = make.randn(1, 256, 3, 1, 16).unbind(2)
    v[:, 128:] = math.nan
    o = ops.attention(q, k, v, frame_tokens=128, backend="cuda")
    assert o[:, :128].isfinite().all() and o[:, 128:].isnan().all()
    # windows of 1 x 8 x 16 in strides of as much: the queries of a brick share one of them
    q, k, v = make.randn(512, 3, 1, 16).unbind(1)
    v.view(2, 16, 16, 1, 16)[1, 8:] = math.nan
    o = ops.attention_varlen(
        *(q, k, v), cu_seqlens_q=make.index([0, 512]), max_seqlen_q=512, window=(1, 8, 16), window_stride=(1, 8, 16),
        grids=make.index([[2, 16, 16]]), backend="cuda",
    )  # fmt: skip
    bad = o.view(2, 16, 16, 16).isnan().any(-1)
    assert bad[1, 8:].all() and bad.sum() == 128


def test_rows_without_keys_have_no_gradient():
    """Their lse is -inf: whatever comes back through it must not reach the others."""
    make = Maker(torch.bfloat16, DEVICE)
    q, k, v = (make.randn(2, n, 2, 8).requires_grad_() for n in (3, 5, 5))
    o, lse = ops.attention(q, k, v, kv_len=make.index([0, 5]), return_lse=True, backend="cuda")
    spoiled, lost = torch.ones_like(lse), torch.ones_like(o)
    spoiled[0] = lost[0] = math.nan
    assert not o[0].any() and (lse[0] == -math.inf).all()
    for g in torch.autograd.grad((o, lse), (q, k, v), (lost, spoiled)):
        assert not g[0].any() and g[1].any() and g.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8)])
@pytest.mark.parametrize("keys", [0, 5])
def test_zero_size(shape, keys):
    make = Maker(torch.bfloat16, DEVICE)
    out = gradients("attention", (make.randn(*shape), *make.randn(shape[0], keys, 2, 2, 8).unbind(2)), {})
    assert out[0].shape == shape and not any(t.any() for t in out[2:])
    o, lse = ops.attention(
        make.randn(1, 3, 2, 8), *make.randn(1, 0, 2, 2, 8).unbind(2), return_lse=True, backend="cuda"
    )
    assert not o.any() and (lse == -math.inf).all()


# ---- the plan of tiles ----------------------------------------------------------------------------------------------
LENGTHS = st.lists(st.sampled_from([0, 0, 1, 2, 15, 64, 65, 300]), min_size=0, max_size=5)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LENGTHS, st.integers(0, 90), st.data())
def test_plan(lengths, tail, data):
    """Every tile once, the segments that meet the most keys first, the rows behind the last one at the end."""
    make = Maker(torch.bfloat16, DEVICE)
    keys = data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    q, k = make.randn(sum(lengths) + tail, 1, 8), make.randn(sum(keys), 1, 8)
    cu_q, cu_k = (make.index([0, *itertools.accumulate(n)]) for n in (lengths, keys))
    call = adapter._Packed(q, k, k, cu_q, cu_k, None, None, 0, 0, 0, None, (1, 1, 1), 1.0)
    first, order = call.cut(64, 64)[1].tolist()
    count = [-(-n // 64) for n in (*lengths, tail)]
    assert sorted(order[:-1]) == list(range(len(lengths) + 1)) and order[-2] == len(lengths)
    assert [keys[s] for s in order[:-2]] == sorted(keys, reverse=True)
    assert first == [0, *itertools.accumulate(count[s] for s in order[:-1])]


# ---- merge ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("sample", samples("merge_attention"), ids=str)
def test_merge(sample, dtype):
    both(sample, dtype)


@MISSING
@WANTED
def test_merge_partial_gradients(missing, wanted):
    check_partial_merge(missing, wanted, "cuda", DEVICE)


# ---- what is not served ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "dtype, d, reason",
    [
        (torch.float32, 64, "multiplies 16-bit values; got torch.float32"),
        (torch.bfloat16, 13, "holds heads of 8 to 128 channels, a multiple of 8; got 13"),
        (torch.bfloat16, 136, "holds heads of 8 to 128 channels, a multiple of 8; got 136"),
    ],
)
def test_refusals(dtype, d, reason):
    q = torch.zeros(1, 2, 1, d, dtype=dtype, device=DEVICE)
    with pytest.raises(fastdit.NoBackend, match=reason):
        ops.attention(q, q, q, backend="cuda")
    assert reason in fastdit.explain("attention", q, q, q)


def test_explain():
    q = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    with fastdit.use_backend("cuda"):
        assert "cuda        chosen\n" in fastdit.explain("attention", q, q, q)
