"""attention: the laws that are its own, and every check of its input."""

import itertools
import math

import pytest
import torch

import fastdit
from fastdit import ops
from fastdit.ops import attention_check
from fastdit.reference import attention as reference
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, attention as workloads

each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
BOTH = pytest.mark.parametrize("backend", ["cpu", "reference"])
INF = math.inf


# ---- larger shapes: several tiles, several key blocks, ragged tails ----------------------------------------
def _check(op, baseline, args, kwargs, what):
    actual = close.flat(getattr(ops, op)(*args, **kwargs, backend="cpu"))
    wide = [a.double() for a in args]
    truth = close.flat(getattr(reference, op)(*wide, **kwargs))
    for a, t, b in zip(actual, truth, close.flat(baseline(*args, **kwargs)), strict=True):
        close.assert_close(a, t, b, what)


@each_dtype
@pytest.mark.parametrize("n, m, d", [(49, 257, 72), (64, 513, 128), (113, 96, 64), (1, 700, 72), (97, 31, 96)])
def test_tiles(n, m, d, dtype, isa):
    make = Maker(dtype)
    args = make.randn(1, n, 2, d), make.randn(1, m, 1, d), make.randn(1, m, 1, d)
    _check("attention", workloads.sdpa, args, dict(return_lse=True), f"{n} x {m} x {d}")


def _window_case(dtype):
    make = Maker(dtype)
    grids = make.index([[3, 5, 7], [0, 1, 1], [2, 8, 16], [1, 1, 1], [4, 9, 10]])
    lengths = grids.prod(1)
    cu = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    args = [make.randn(int(cu[-1]), heads, 16) for heads in (4, 2, 2)]
    return args, dict(cu_seqlens_q=cu, max_seqlen_q=int(lengths.max())), grids


@pytest.mark.parametrize("dtype", contract.DTYPES[:2], ids=str)
@pytest.mark.parametrize("window, stride", [((2, 3, 3), (1, 1, 1)), ((3, 4, 8), (1, 2, 4)), ((1, 30, 5), (1, 1, 3))])
def test_window_tiles(window, stride, dtype, isa):
    args, kwargs, grids = _window_case(dtype)
    kwargs |= dict(window=window, window_stride=stride, grids=grids, return_lse=True)
    _check("attention_varlen", workloads.sdpa_varlen, args, kwargs, f"{window} {stride}")


@pytest.mark.parametrize("frames", [1, 9, 50, 1000])
def test_frame_tiles(frames, isa):
    args, kwargs, _ = _window_case(torch.float32)
    _check("attention_varlen", workloads.sdpa_varlen, args, kwargs | dict(frame_tokens=frames), f"{frames}")


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_large_logits(spread, isa):
    make = Maker(torch.float32)
    args = spread * make.randn(1, 50, 2, 64), make.randn(1, 600, 2, 64), make.randn(1, 600, 2, 64)
    _check("attention", workloads.sdpa, args, dict(return_lse=True), f"logits x {spread}")


# ---- laws -------------------------------------------------------------------------------------------------
def _climbing(dtype, step, queries=50, keys=600, d=24):
    """One query vector, keys whose scores climb by `step` a key in units of log2 up to the middle, then fall."""
    make = Maker(dtype)
    q, k, v = make.randn(1, queries, 1, d), make.randn(1, keys, 1, d), make.randn(1, keys, 1, d)
    q[..., 0], k[..., 1:] = 1, k[..., 1:] * 0.1
    height = keys / 2 - (torch.arange(keys) - keys / 2).abs()
    k[0, :, 0, 0] = (height * step * d**0.5 * math.log(2)).to(dtype)
    return q, k, v


@each_dtype
@pytest.mark.parametrize("step", [0.01, 0.5, 2.0, 8.0])
def test_scores_that_climb(step, dtype, isa):
    """The shift of the softmax follows within a block of keys and from block to block, by little and by much."""
    _check("attention", workloads.sdpa, _climbing(dtype, step), dict(return_lse=True), f"climbing by {step}")


@each_dtype
def test_a_query_does_not_see_how_others_climb(dtype, isa):
    """Bits of a query are the same whether the rest of its tile raises its shift or not, and in tiles of any width."""
    q, k, v = _climbing(dtype, 2.0)
    calm = q.clone()
    calm[..., 0] = 0
    mixed = torch.where((torch.arange(q.shape[1]) % 3 == 0)[None, :, None, None], calm, q)
    want = close.flat(ops.attention(calm, k, v, return_lse=True, backend="cpu"))
    got = close.flat(ops.attention(mixed, k, v, return_lse=True, backend="cpu"))
    alone = close.flat(ops.attention(calm[:, :3], k, v, return_lse=True, backend="cpu"))
    for w, g, a, axis in zip(want, got, alone, (1, 2), strict=True):
        every = torch.arange(0, q.shape[1], 3)
        assert torch.equal(w.index_select(axis, every), g.index_select(axis, every))
        assert torch.equal(w.narrow(axis, 0, 3), a)


@pytest.mark.parametrize("dtype", [d for d in contract.DTYPES if d.itemsize == 2], ids=str)
@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_equal_values_come_back(spread, dtype, isa):
    """Weights that multiply V sum to one whatever they are rounded to: equal values are their own mean."""
    make = Maker(dtype)
    q, k = make.randn(1, 50, 2, 24) * spread, make.randn(1, 600, 2, 24)
    v = make.randn(1, 1, 2, 24).expand(1, 600, 2, 24)
    assert torch.equal(ops.attention(q, k, v, backend="cpu"), v[:, :1].expand_as(q))


@BOTH
@pytest.mark.parametrize("poison", [math.nan, INF])
def test_padded_keys_never_leak(backend, poison):
    make = Maker(torch.bfloat16)
    q, k, v = make.randn(2, 20, 2, 72), make.randn(2, 40, 2, 72), make.randn(2, 40, 2, 72)
    kv_len = make.index([13, 0])
    clean = ops.attention(q, k, v, kv_len=kv_len, backend=backend)
    for b, n in enumerate(kv_len.tolist()):
        k[b, n:], v[b, n:] = poison, poison
    close.assert_bitwise(ops.attention(q, k, v, kv_len=kv_len, backend=backend), clean)
    leaves = [t.float().requires_grad_() for t in (q, k, v)]
    ops.attention(*leaves, kv_len=kv_len, backend=backend).sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves) and not leaves[1].grad[0, 13:].any()


@BOTH
def test_neighbour_segments_never_leak(backend):
    make = Maker(torch.bfloat16)
    q, k, v = make.randn(70, 3, 2, 72).unbind(1)
    kwargs = dict(cu_seqlens_q=make.index([0, 21, 50]), max_seqlen_q=29, backend=backend)
    clean = ops.attention_varlen(q, k, v, **kwargs)
    for t in (q, k, v):
        t[21:] = math.nan
    dirty = ops.attention_varlen(q, k, v, **kwargs)
    close.assert_bitwise(dirty[:21], clean[:21])
    assert dirty[21:50].isnan().all() and not dirty[50:].any()


@BOTH
def test_nan_in_a_visible_key_is_not_swallowed(backend):
    q, k, v = Maker().randn(1, 20, 3, 2, 8).unbind(2)
    k[0, 3, 1] = math.nan
    o = ops.attention(q, k, v, backend=backend)
    assert o[:, :, 1].isnan().all() and o[:, :, 0].isfinite().all()


@BOTH
@pytest.mark.parametrize("keys", [0, 5])
def test_rows_without_keys(backend, keys):
    make = Maker()
    q, k, v = make.randn(2, 3, 2, 8), make.randn(2, keys, 2, 8), make.randn(2, keys, 2, 8)
    o, lse = ops.attention(q, k, v, kv_len=make.index([0, 0]), return_lse=True, backend=backend)
    assert not o.any() and (lse == -INF).all()
    o, lse = ops.merge_attention(o, lse, o, lse, backend=backend)
    assert not o.any() and (lse == -INF).all()


@BOTH
def test_merge_equals_attention_over_all_keys(backend):
    q, k, v = Maker().randn(2, 50, 3, 2, 24).unbind(2)
    kwargs = dict(return_lse=True, backend=backend)
    parts = [ops.attention(q, k[:, a:b], v[:, a:b], **kwargs) for a, b in ((0, 17), (17, 50))]
    o, lse = ops.merge_attention(*parts[0], *parts[1], backend=backend)
    wide = reference.attention(q.double(), k.double(), v.double(), return_lse=True)
    whole = ops.attention(q, k, v, **kwargs)
    close.assert_close(o, wide[0], whole[0])
    close.assert_close(lse, wide[1], whole[1])
    empty = torch.zeros_like(o), torch.full_like(lse, -INF)
    close.assert_bitwise(ops.merge_attention(o, lse, *empty, backend=backend)[0], o)


def test_packing_equals_one_by_one():
    make = Maker(torch.bfloat16)
    cu = make.index([0, 60, 61, 200])
    q, k, v = make.randn(200, 3, 2, 72).unbind(1)
    packed = ops.attention_varlen(q, k, v, cu_seqlens_q=cu, max_seqlen_q=139)
    for a, b in ((0, 60), (60, 61), (61, 200)):
        close.assert_bitwise(packed[a:b], ops.attention(q[None, a:b], k[None, a:b], v[None, a:b])[0])


def test_window_over_everything_is_plain_attention():
    q, k, v = Maker().randn(60, 3, 2, 16).unbind(1)
    kwargs = dict(cu_seqlens_q=torch.tensor([0, 60], dtype=torch.int32), max_seqlen_q=60)
    grids = torch.tensor([[3, 4, 5]], dtype=torch.int32)
    whole = ops.attention_varlen(q, k, v, **kwargs)
    close.assert_bitwise(ops.attention_varlen(q, k, v, **kwargs, window=(3, 4, 9), grids=grids), whole)


def test_lse_and_threads_do_not_change_o():
    q, k, v = Maker(torch.bfloat16).randn(1, 300, 3, 2, 72).unbind(2)
    close.assert_bitwise(ops.attention(q, k, v), ops.attention(q, k, v, return_lse=True)[0])


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8)])
@BOTH
def test_zero_size(shape, backend):
    q, k, v = (torch.randn(shape, requires_grad=True) for _ in range(3))
    o, lse = ops.attention(q, k, v, return_lse=True, backend=backend)
    assert o.shape == shape and lse.shape == (shape[0], shape[2], shape[1])
    (o.sum() + lse.sum()).backward()
    assert q.grad.shape == k.grad.shape == shape
    bounds = torch.zeros(shape[0] + 1, dtype=torch.int32)
    q = q[0] if shape[0] else q.flatten(0, 1)
    packed = ops.attention_varlen(q, q, q, cu_seqlens_q=bounds, max_seqlen_q=0, backend=backend)
    assert packed.shape == q.shape and not packed.any()


def test_autocast_casts_q_k_v():
    q, k, v = Maker().randn(2, 6, 3, 2, 16).unbind(2)
    expected = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="cpu")
    slow = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="reference")
    with torch.autocast("cpu", torch.bfloat16):
        close.assert_bitwise(ops.attention(q, k, v.bfloat16(), backend="cpu"), expected)
        close.assert_bitwise(ops.attention(q, k, v, backend="reference"), slow)


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_reference_backward_is_autograd_of_the_reference(mode):
    leaves = [t.double().requires_grad_() for t in Maker().randn(1, 12, 3, 2, 8).unbind(2)]
    if mode == "dense":
        kwargs = dict(kv_len=torch.tensor([9], dtype=torch.int32), frame_tokens=4, return_lse=True)
        call, back, inputs = reference.attention, reference.attention_backward, leaves
    else:
        kwargs = dict(cu_seqlens_q=torch.tensor([0, 5, 12], dtype=torch.int32), max_seqlen_q=7, return_lse=True)
        call, back, inputs = reference.attention_varlen, reference.attention_varlen_backward, [t[0] for t in leaves]
    o, lse = call(*inputs, **kwargs)
    do, dlse = torch.randn_like(o), torch.randn_like(lse)
    expected = torch.autograd.grad([o, lse], inputs, [do, dlse])
    for name in ("return_lse", "max_seqlen_q"):
        kwargs.pop(name, None)
    with torch.no_grad():
        given = back(do, *inputs, dlse=dlse, **kwargs)
    for a, e in zip(given, expected, strict=True):
        close.assert_close(a.float(), e, e.float())


def test_many_keys():
    """2^17 keys against the merged attention over their eighths, which is itself the reference's."""
    make = Maker()
    q, k, v = make.randn(1, 33, 2, 8), make.randn(1, 2**17, 2, 8), make.randn(1, 2**17, 2, 8)
    wide = [[t.double() for t in (k[:, i::8], v[:, i::8])] for i in range(8)]
    parts = [reference.attention(q.double(), *kv, return_lse=True) for kv in wide]
    truth = parts[0]
    for part in parts[1:]:
        truth = reference.merge_attention(*truth, *part)
    o, lse = ops.attention(q, k, v, return_lse=True, backend="cpu")
    close.assert_close(o, truth[0], workloads.sdpa(q, k, v))
    close.assert_close(lse, truth[1], reference.attention(q, k, v, return_lse=True)[1])


def test_double_backward_raises():
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    (g,) = torch.autograd.grad(ops.attention(q, q, q, backend="cpu").pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(g.sum(), q)


def test_sdpa_backend():
    q, k, v = Maker(torch.bfloat16).randn(2, 6, 3, 2, 16).unbind(2)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    o = ops.attention(*leaves, backend="sdpa")
    close.assert_bitwise(o, workloads.sdpa(q, k, v))
    o.float().sum().backward()
    assert all(t.grad is not None for t in leaves)
    assert ops.attention(q.to("meta"), k.to("meta"), v.to("meta")).shape == q.shape
    assert "chosen" in fastdit.explain("attention", q, k, v).splitlines()[3]
    for kwargs, reason in (
        (dict(kv_len=torch.tensor([3, 3], dtype=torch.int32)), "kv_len"),
        (dict(frame_tokens=2), "frame_tokens"),
        (dict(return_lse=True), "lse"),
    ):
        with pytest.raises(fastdit.NoBackend, match=reason):
            ops.attention(q, k, v, **kwargs, backend="sdpa")
    bounds = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(fastdit.NoBackend, match="needs an NVIDIA GPU"):
        ops.attention_varlen(q[0], k[0], v[0], cu_seqlens_q=bounds, max_seqlen_q=6, backend="sdpa")


# ---- bad input --------------------------------------------------------------------------------------------
B, N, H, D = 2, 6, 4, 8
Q, K = torch.randn(B, N, H, D), torch.randn(B, N, 2, D)
LEN = torch.tensor([3, 6], dtype=torch.int32)
BAD = {
    "rank": (dict(q=Q[0]), ValueError, "wrong rank"),
    "not-a-tensor": (dict(q=[1.0]), TypeError, "must be a tensor"),
    "integer": (dict(q=Q.int()), TypeError, "int32"),
    "dtypes": (dict(k=K.bfloat16()), TypeError, "one dtype"),
    "device": (dict(v=K.to("meta")), ValueError, "another device"),
    "last-dim": (dict(q=torch.randn(B, N, D, H).transpose(2, 3)), ValueError, "must be contiguous"),
    "no-channels": (dict(q=Q[..., :0]), ValueError, "no channels"),
    "k-v": (dict(k=K[:, :5]), ValueError, "k and v differ"),
    "head-dim": (dict(q=Q[..., :4]), ValueError, "head dim"),
    "batch": (dict(q=Q[:1]), ValueError, "differ in batch"),
    "heads": (dict(q=Q[:, :, :3]), ValueError, "must divide"),
    "no-kv-heads": (dict(k=K[:, :, :0], v=K[:, :, :0]), ValueError, "must divide"),
    "scale": (dict(scale=math.nan), ValueError, "scale must be finite"),
    "kv-len-dtype": (dict(kv_len=LEN.long()), TypeError, "int32"),
    "kv-len-list": (dict(kv_len=[3, 6]), TypeError, "int32 tensor; got list"),
    "kv-len-shape": (dict(kv_len=LEN[:1]), ValueError, "wrong shape"),
    "kv-len-device": (dict(kv_len=LEN.to("meta")), ValueError, "another device"),
    "kv-len-high": (dict(kv_len=LEN + 1), ValueError, "out of range"),
    "kv-len-low": (dict(kv_len=LEN - 4), ValueError, "out of range"),
    "frames-zero": (dict(frame_tokens=0), ValueError, "must be positive"),
    "frames-dtype": (dict(frame_tokens=LEN.long()), TypeError, "int32"),
    "frames-shape": (dict(frame_tokens=LEN[:1]), ValueError, "wrong shape"),
    "frames-values": (dict(frame_tokens=LEN - 3), ValueError, "must be positive"),
    "frames-queries": (dict(frame_tokens=2, k=K[:, :4], v=K[:, :4]), ValueError, "N <= M"),
    "backend": (dict(backend="fast"), ValueError, "unknown backend"),
}


@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_attention(case):
    kwargs, error, match = BAD[case]
    with pytest.raises(error, match=match) as caught:
        ops.attention(**{"q": Q, "k": K, "v": K, **kwargs})
    assert "got" in str(caught.value)


BOUNDS = torch.tensor([0, 2, 6], dtype=torch.int32)
GRIDS = torch.tensor([[1, 1, 2], [1, 2, 2]], dtype=torch.int32)
WINDOW = dict(window=(1, 1, 2), grids=GRIDS)
BAD_VARLEN = {
    "rank": (dict(q=Q), ValueError, "wrong rank"),
    "bounds-dtype": (dict(cu_seqlens_q=BOUNDS.long()), TypeError, "int32"),
    "bounds-rank": (dict(cu_seqlens_q=BOUNDS[None]), ValueError, "wrong shape"),
    "bounds-empty": (dict(cu_seqlens_q=BOUNDS[:0]), ValueError, "wrong shape"),
    "bounds-start": (dict(cu_seqlens_q=BOUNDS.clamp(min=1)), ValueError, "start at 0"),
    "bounds-decrease": (dict(cu_seqlens_q=BOUNDS[[0, 2, 1]]), ValueError, "decreases"),
    "bounds-overrun": (dict(cu_seqlens_q=BOUNDS + BOUNDS), ValueError, "overruns"),
    "bounds-device": (dict(cu_seqlens_q=BOUNDS.to("meta")), ValueError, "another device"),
    "max-short": (dict(max_seqlen_q=3), ValueError, "max_seqlen_q is too small"),
    "max-negative": (dict(max_seqlen_q=-1), ValueError, "must not be negative"),
    "max-tensor": (dict(max_seqlen_q=torch.tensor(4)), TypeError, "int on the host"),
    "one-of-two": (dict(cu_seqlens_k=BOUNDS), ValueError, "come together"),
    "keys-segments": (dict(cu_seqlens_k=BOUNDS[:2], max_seqlen_k=4), ValueError, "wrong shape"),
    "keys-overrun": (dict(cu_seqlens_k=BOUNDS + BOUNDS, max_seqlen_k=8), ValueError, "cu_seqlens_k overruns"),
    "keys-max": (dict(cu_seqlens_k=BOUNDS, max_seqlen_k=1), ValueError, "max_seqlen_k is too small"),
    "frames-shape": (dict(frame_tokens=LEN[:1]), ValueError, "wrong shape"),
    "frames-values": (dict(frame_tokens=LEN - 3), ValueError, "must be positive"),
    "frames-queries": (
        dict(frame_tokens=1, cu_seqlens_k=BOUNDS.clamp(max=5), max_seqlen_k=4),
        ValueError,
        "among the keys",
    ),
    "window-alone": (dict(window=(1, 1, 1)), ValueError, "come together"),
    "grids-alone": (dict(grids=GRIDS), ValueError, "come together"),
    "window-zero": (WINDOW | dict(window=(0, 1, 1)), ValueError, "3 positive ints"),
    "window-rank": (WINDOW | dict(window=(1, 1)), ValueError, "3 positive ints"),
    "stride-zero": (WINDOW | dict(window_stride=(1, 1, 0)), ValueError, "window_stride"),
    "stride-long": (WINDOW | dict(window_stride=(1, 1, 3)), ValueError, "at most the window"),
    "grids-dtype": (WINDOW | dict(grids=GRIDS.long()), TypeError, "int32"),
    "grids-shape": (WINDOW | dict(grids=GRIDS[:1]), ValueError, "wrong shape"),
    "grids-tokens": (WINDOW | dict(grids=GRIDS + 1), ValueError, "hold the tokens"),
    "grids-negative": (WINDOW | dict(grids=GRIDS * torch.tensor([-1, -1, 1]).int()), ValueError, "hold the tokens"),
    "window-frames": (WINDOW | dict(frame_tokens=1), ValueError, "exclude each other"),
    "window-cross": (WINDOW | dict(cu_seqlens_k=BOUNDS, max_seqlen_k=4), ValueError, "self-attention"),
    "scale": (dict(scale=INF), ValueError, "scale must be finite"),
}


@pytest.mark.parametrize("case", BAD_VARLEN, ids=str)
def test_bad_input_varlen(case):
    kwargs, error, match = BAD_VARLEN[case]
    good = dict(q=Q[0], k=K[0], v=K[0], cu_seqlens_q=BOUNDS, max_seqlen_q=4)
    with pytest.raises(error, match=match) as caught:
        ops.attention_varlen(**{**good, **kwargs})
    assert str(caught.value).startswith("attention_varlen: ") and "got" in str(caught.value)


@pytest.mark.parametrize("apart", [False, True], ids=["self", "cross"])
def test_the_quick_look_agrees_with_the_one_that_tells(apart):
    values, good = (-(2**31), -1, 0, 1, 2, 4, 2**31 - 1), torch.tensor([0, 1], dtype=torch.int32)
    for bounds in [(0,), (1,), (-1,), *itertools.product(values, repeat=3)]:
        cu = torch.tensor(bounds, dtype=torch.int32)
        for longest, rows in itertools.product((0, 1, 2, 4), (0, 2, 4)):
            try:
                attention_check._validate_bounds("cu_seqlens_q", cu, longest, rows)
            except ValueError:
                fits = False
            else:
                fits = True
            x, y = torch.empty(rows, 1, 8), torch.empty(1, 1, 8)
            given = (y, x, good, cu, 1, longest) if apart else (x, x, cu, cu, longest, longest)
            assert attention_check._hold(*given) is fits, (bounds, longest, rows)
            assert (
                not attention_check._hold(x, x, torch.stack([cu, cu], 1)[:, 0], cu, longest, longest) or cu.numel() == 1
            )


LSE = torch.randn(B, H, N)
BAD_MERGE = {
    "rank": (dict(o1=Q[0, 0]), ValueError, "wrong rank"),
    "shape": (dict(o2=Q[:, :3]), ValueError, "differ in shape"),
    "dtype": (dict(o2=Q.bfloat16()), TypeError, "differ in dtype"),
    "no-channels": (dict(o1=Q[..., :0]), ValueError, "no channels"),
    "last-dim": (dict(o2=torch.randn(B, N, D, H).transpose(2, 3)), ValueError, "must be contiguous"),
    "device": (dict(o2=Q.to("meta")), ValueError, "another device"),
    "lse-dtype": (dict(lse1=LSE.double()), TypeError, "wrong dtype"),
    "lse-shape": (dict(lse2=LSE.transpose(1, 2)), ValueError, r"must be \(B, H, N\)"),
    "lse-device": (dict(lse2=LSE.to("meta")), ValueError, "another device"),
}


@pytest.mark.parametrize("case", BAD_MERGE, ids=str)
def test_bad_input_merge(case):
    kwargs, error, match = BAD_MERGE[case]
    with pytest.raises(error, match=match) as caught:
        ops.merge_attention(**{"o1": Q, "lse1": LSE, "o2": Q, "lse2": LSE, **kwargs})
    assert str(caught.value).startswith("merge_attention: ")


def test_bad_bounds_are_caught_inside_a_compiled_graph():
    compiled = torch.compile(
        lambda q, cu: ops.attention_varlen(q, q, q, cu_seqlens_q=cu, max_seqlen_q=6, backend="cpu"),
        backend="aot_eager",
    )
    with pytest.raises(ValueError, match="overruns"):
        compiled(Q[0], BOUNDS + BOUNDS)
