"""conv: the laws that are its own, and every check of its input."""

import gc

import conv_laws as laws
import pytest
import torch
from conv_laws import LAST, each_format
from hypothesis import HealthCheck, given, settings, strategies as st

from fastdit import ops
from fastdit.backends.cpu import conv as adapter
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample

each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
each_algo = pytest.mark.parametrize("algo", ["direct", "winograd", "winograd2d"])


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(data, isa):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    m = Maker(dtype := draw(*contract.DTYPES))
    geometry = (tuple(draw(*values) for _ in range(3)) for values in ((1, 2, 3), (1, 1, 2, 3), (1, 1, 2)))
    made = laws.draw_conv(draw, m, *geometry, extents=((1, 2, 3, 5), (1, 2, 4, 7), (1, 3, 6, 11)), fewest=3)
    kernel, stride, dilation = made[0][1].shape[2:], made[1]["stride"], made[1]["dilation"]
    along_h, along_w = ((kernel[i], stride[i], dilation[i]) == (3, 1, 1) for i in (1, 2))
    sample = Sample("causal_conv3d", "fuzz", lambda _: made)
    contract.backward(sample, dtype, "cpu")
    if along_h and dtype != torch.bfloat16:  # there it rounds more than once
        made[1]["algo"] = draw("auto", "winograd", "winograd2d" if along_w else "direct")
    contract.forward(sample, dtype, "cpu")


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_norm_silu(data, isa):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    m = Maker(dtype := draw(*contract.DTYPES))
    norm, groups = draw("channel_l2", "channel_rms", "group"), draw(1, 2, 3)
    C = groups * draw(4, 8, 21)  # enough values for their rms to mean something
    x = m.randn(*draw((33, C), (1, C, 40), (2, C, 9, 5), (1, C, 33, 2, 1), (2, C, 3, 1, 35), (1, C, 2, 7, 16)))
    x = x.transpose(1, -1).contiguous().transpose(1, -1) if draw(True, False) else x
    kwargs = dict(norm=norm, groups=groups, weight=draw(None, m.randn(C)), bias=draw(None, m.randn(C)))
    sample = Sample("norm_silu", "fuzz", lambda _: ((x,), kwargs))
    contract.forward(sample, dtype, "cpu")
    contract.backward(sample, dtype, "cpu")


def _gradients(threads, call, leaves, seed=0):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        y = call()
        return torch.autograd.grad(y, leaves, Maker(y.dtype, seed=seed).randn(*y.shape))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
@each_format
def test_backward_threads(dtype, last):
    """Bitwise the same for any thread count, over several strips."""
    m = Maker(dtype)
    x = m.randn(1, 40, 5, 90, 96).to(memory_format=LAST if last else torch.contiguous_format).requires_grad_()
    cache = m.randn(1, 40, 2, 90, 96).requires_grad_()
    weight, bias, norm_weight = (m.randn(*s).requires_grad_() for s in ((33, 40, 3, 3, 3), (33,), (40,)))
    kwargs = dict(norm="channel_l2", norm_weight=norm_weight, act="silu", backend="cpu")
    call = lambda: ops.causal_conv3d(x, weight, bias, cache=cache, **kwargs)  # noqa: E731
    leaves = [x, cache, weight, bias, norm_weight]
    first = _gradients(1, call, leaves)
    for count in (2, 3):
        for a, b in zip(_gradients(count, call, leaves), first, strict=True):
            close.assert_bitwise(a, b)
    for norm in ("channel_rms", "group"):
        scale, shift = m.randn(40).requires_grad_(), m.randn(40).requires_grad_()
        call = lambda: ops.norm_silu(x, norm=norm, groups=8, weight=scale, bias=shift, backend="cpu")  # noqa: B023, E731
        first = _gradients(1, call, [x, scale, shift])
        for count in (2, 3):
            for a, b in zip(_gradients(count, call, [x, scale, shift]), first, strict=True):
                close.assert_bitwise(a, b)


@pytest.mark.parametrize("alone", range(6))
def test_gradient_alone(alone):
    laws.gradient_alone("cpu", "cpu", torch.float32, alone)


def test_gradient_of_a_frame_does_not_see_the_past():
    """Causal: what a frame's gradient gets comes from itself and later outputs, NaN or not."""
    x, weight, kwargs = _wan(torch.float32, 4, last=True)
    x.requires_grad_()
    y = ops.causal_conv3d(x, weight, **kwargs, backend="cpu")
    grad = torch.randn_like(y)
    grad[:, :, 1] = float("nan")
    bad = torch.isnan(torch.autograd.grad(y, x, grad)[0]).flatten(3).any(3).any(1)[0]
    assert bad.tolist() == [True, True, False, False]


def _wan(dtype, T, last):
    """Several steps of channels and of pixels, with rests."""
    return laws.wan("cpu", dtype, T, last, C=40, size=(9, 11))


@each_dtype
@each_format
@each_algo
@pytest.mark.parametrize("chunks", [(1, 1, 1, 4), (3, 4), (1, 2, 4), (5, 0, 2)], ids=str)
def test_chunked_equals_whole(dtype, last, algo, chunks, isa):
    x, weight, kwargs = _wan(dtype, sum(chunks), last)
    laws.chunked_equals_whole("cpu", x, weight, chunks, algo=algo, **kwargs)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", laws.GEOMETRIES)
def test_chunked_equals_whole_geometries(name, backend):
    m = Maker(torch.float32)
    x, weight = m.randn(2, 6, 8, 4, 5), m.randn(7, 6, 3, 3, 3)
    kwargs, k_t = laws.GEOMETRIES[name]
    if backend == "cpu":
        laws.chunked_equals_whole(backend, x, weight, (2, 4, 2), k_t, **kwargs)
    else:  # torch picks its kernel by shape
        parts = laws.chunked(backend, x, weight, (2, 4, 2), k_t, **kwargs)
        torch.testing.assert_close(parts, ops.causal_conv3d(x, weight, **kwargs, backend=backend))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@each_format
def test_output_has_the_inputs_memory_format(last, backend):
    x, weight, kwargs = _wan(torch.float32, 3, last)
    for view in (x, x[:, :, 1:]):
        y = ops.causal_conv3d(view, weight, **kwargs, backend=backend)
        c = ops.next_cache(view, None, 3, backend=backend)
        n = ops.norm_silu(view, weight=None, backend=backend)
        for out in (y, c, n):
            assert out.is_contiguous(memory_format=LAST if last else torch.contiguous_format)
            assert last == (not out.is_contiguous())


def test_layouts_agree():
    """The rows that enter the products are the same bits from either layout, and so is the result."""
    for algo in ("direct", "winograd", "winograd2d"):
        x, weight, kwargs = _wan(torch.float32, 3, last=False)
        kwargs = dict(act="silu", algo=algo, backend="cpu")
        close.assert_bitwise(
            ops.causal_conv3d(x, weight, **kwargs), ops.causal_conv3d(x.to(memory_format=LAST), weight, **kwargs)
        )


def test_next_cache_owns_its_memory():
    x = torch.randn(1, 4, 3, 2, 2)
    for backend in ("cpu", "reference"):
        c = ops.next_cache(x, None, 3, backend=backend)
        assert c.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
        assert c.untyped_storage().nbytes() == c.numel() * 4
        assert ops.next_cache(x, None, 1, backend=backend).shape[2] == 0


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@laws.each_empty
def test_zero_size(shape, backend):
    laws.zero_size(backend, "cpu", shape)


@pytest.mark.parametrize("kind", ["random", "offset", "outlier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_winograd_error(dtype, kind, isa):
    """rms error against fp64 in units of the rms output: close to direct's in fp32, where auto takes it, and as near to
    torch's as any kernel has to be; in bf16 (opt-in) two or three roundings."""
    m = Maker(dtype)
    x, weight = m.randn(1, 96, 3, 12, 14), m.randn(48, 96, 3, 3, 3) * (96 * 27) ** -0.5
    if kind == "offset":
        x = x + 10
    if kind == "outlier":
        x[:, 5] *= 50
    truth = ops.causal_conv3d(x.double(), weight.double(), backend="reference")
    size = truth.square().mean().sqrt()

    made = {
        algo: ops.causal_conv3d(x, weight, algo=algo, backend="cpu") for algo in ("direct", "winograd", "winograd2d")
    }
    made["torch"] = ops.causal_conv3d(x, weight, backend="reference")
    error = {name: float((y.double() - truth).square().mean().sqrt() / size) for name, y in made.items()}
    print(f"\n{isa} {dtype} {kind}:", *(f"{name} {value:.1e}" for name, value in error.items()))
    for algo, rounds in (("winograd", 2.5), ("winograd2d", 3.0)):
        assert error[algo] <= (1.5 if dtype == torch.float32 else rounds) * error["direct"]
        if dtype == torch.float32:
            close.assert_close(made[algo], truth, made["torch"], algo)


@each_format
@each_algo
def test_missing_frames_are_not_convolved(last, algo, isa):
    x, weight, kwargs = _wan(torch.float32, 1, last)
    laws.missing_frames_are_not_convolved("cpu", x, weight, algo=algo, **kwargs)


@each_algo
def test_nan_stays_in_its_window(algo, isa):
    laws.bad_pixel_stays_in_its_window("cpu", "cpu", torch.float32, float("nan"), algo=algo)


# ---- packed weights -----------------------------------------------------------------------------------
def _edits():
    def swap(p):
        p.data = p.data * 2

    def data_inplace(p):
        p.data.mul_(2)

    def no_grad(p):
        with torch.no_grad():
            p.mul_(2)

    def numpy(p):
        p.detach().numpy()[...] *= 2

    def optimizer(p):
        p.grad = -p.detach().clone()
        torch.optim.SGD([p], lr=1.0).step()

    def one_element(p):
        p.data[-1, -1, -1, -1, -1] += 1e-6

    return [swap, data_inplace, no_grad, numpy, optimizer, one_element]


@pytest.mark.parametrize("edit", _edits(), ids=lambda f: f.__name__)
def test_packed_weights_see_every_edit(edit):
    x, weight, _ = _wan(torch.float32, 2, last=True)
    p = torch.nn.Parameter(weight)
    with torch.no_grad():
        before = ops.causal_conv3d(x, p, backend="cpu")
        close.assert_bitwise(ops.causal_conv3d(x, p, backend="cpu"), before)
    edit(p)
    with torch.no_grad():
        after = ops.causal_conv3d(x, p, backend="cpu")
        close.assert_bitwise(after, ops.causal_conv3d(x, p.detach().clone(), backend="cpu"))
    assert not torch.equal(after, before)


def test_packed_weights_are_kept_and_freed():
    cache = adapter.PackedWeights(limit=1 << 20)
    weight = torch.randn(32, 32, 3, 3, 3)
    first = cache.get(weight, torch.float32, True)
    assert cache.get(weight, torch.float32, True) is first
    assert cache.get(weight.view(32, 32, 3, 3, 3), torch.float32, True) is first  # by memory, not by object
    second = cache.get(weight, torch.float32, False)
    assert second is not first and len(cache) == 2 and cache.bytes == first.numel() + second.numel()
    del weight
    gc.collect()
    assert len(cache) == 0 and cache.bytes == 0


def _go_round(cache, weights, monkeypatch):
    """One use of each weight, in turn: how many were packed."""
    packed = []
    with monkeypatch.context() as patch:
        pack = adapter.pack
        patch.setattr(adapter, "pack", lambda *args: packed.append(args) or pack(*args))
        for weight in weights:
            close.assert_bitwise(cache.get(weight, torch.float32, False), pack(weight, torch.float32, False))
            assert cache.bytes == 110_592 * len(cache) <= cache.limit
    return len(packed)


def test_a_model_of_more_than_the_limit_finds_what_fits(monkeypatch):
    """The least recently used would go just before its next use, and no round would find anything."""
    cache = adapter.PackedWeights(limit=450_000)  # four of 110,592 bytes
    model = [torch.randn(32, 32, 3, 3, 3) for _ in range(5)]
    assert [_go_round(cache, model, monkeypatch) for _ in range(3)] == [5, 1, 1]
    for weight in model:
        weight.mul_(2)
    assert [_go_round(cache, model, monkeypatch) for _ in range(2)] == [5, 1]


def test_a_model_that_is_no_longer_called_gives_way(monkeypatch):
    cache = adapter.PackedWeights(limit=450_000)
    first, second = ([torch.randn(32, 32, 3, 3, 3) for _ in range(n)] for n in (4, 3))
    assert [_go_round(cache, first, monkeypatch) for _ in range(2)] == [4, 0]
    assert [_go_round(cache, second, monkeypatch) for _ in range(3)] == [3, 3, 0]
    assert [_go_round(cache, first, monkeypatch) for _ in range(3)] == [3, 3, 0]
    del first
    gc.collect()
    assert _go_round(cache, second, monkeypatch) == 3 == len(cache)  # there is room at once


def test_packed_weights_of_more_than_the_limit_are_not_kept():
    huge = adapter.PackedWeights(limit=10)
    assert huge.get(torch.randn(32, 32, 3, 3, 3), torch.float32, False).numel() > 10 and len(huge) == 0 == huge.bytes


def test_hash_sees_order_and_length():
    data = torch.arange(300_000, dtype=torch.int32)
    hashed = lambda t: adapter._cpu.conv_hash(t.data_ptr(), t.numel() * 4, torch.get_num_threads())  # noqa: E731
    seen = {hashed(data), hashed(data[:-1]), hashed(data.flip(0)), hashed(data.roll(64)), hashed(data.roll(65536))}
    for i in (0, 63, 65535, 65536, 299_999):
        other = data.clone()
        other[i] ^= 1
        seen.add(hashed(other))
    assert len(seen) == 10


# ---- bad input ----------------------------------------------------------------------------------------
X, WEIGHT = torch.randn(1, 8, 4, 5, 6), torch.randn(16, 8, 3, 3, 3)
BAD = {
    "rank": (dict(x=X[0]), ValueError, "wrong rank"),
    "integer": (dict(x=X.int()), TypeError, "int32"),
    "not-a-tensor": (dict(weight=[1.0]), TypeError, "must be a tensor"),
    "weight-rank": (dict(weight=WEIGHT[0]), ValueError, "wrong rank"),
    "weight-C": (dict(weight=WEIGHT[:, :4]), ValueError, "grouped"),
    "weight-empty": (dict(weight=WEIGHT[:0]), ValueError, "empty"),
    "weight-dtype": (dict(weight=WEIGHT.int()), TypeError, "int32"),
    "weight-device": (dict(weight=WEIGHT.to("meta")), ValueError, "another device"),
    "bias": (dict(bias=torch.randn(8)), ValueError, r"bias must be one value per channel; got \[8\], expected \[16\]"),
    "bias-strided": (dict(bias=torch.randn(32)[::2]), ValueError, "contiguous"),
    "stride": (dict(stride=0), ValueError, "stride is malformed"),
    "stride-pair": (dict(stride=(1, 2)), ValueError, "stride is malformed"),
    "dilation": (dict(dilation=(1, 0, 1)), ValueError, "dilation is malformed"),
    "padding-three": (dict(padding=(2, 1, 1)), ValueError, "padding is malformed"),
    "padding-negative": (dict(padding=(2, 0, -1, 1, 1, 1)), ValueError, "padding is malformed"),
    "padding-int": (dict(padding=1), ValueError, "padding is malformed"),
    "time-pad": (dict(time_pad="reflect"), ValueError, "time_pad"),
    "space-pad": (dict(space_pad="same"), ValueError, "space_pad"),
    "norm": (dict(norm="group"), ValueError, "norm is unknown"),
    "act": (dict(act="relu"), ValueError, "act"),
    "algo": (dict(algo="fft"), ValueError, "algo"),
    "weight-without-norm": (dict(norm_weight=torch.randn(8)), ValueError, "without norm"),
    "eps-without-norm": (dict(norm_eps=1e-6), ValueError, "without norm"),
    "norm-weight": (dict(norm="channel_l2", norm_weight=torch.randn(16)), ValueError, "one value per channel"),
    "eps": (dict(norm="channel_rms", norm_eps=float("nan")), ValueError, "norm_eps"),
    "winograd-taps": (dict(weight=WEIGHT[:, :, :, :1], algo="winograd"), ValueError, "3 taps along H"),
    "winograd-stride": (dict(stride=(1, 2, 1), algo="winograd"), ValueError, "3 taps along H"),
    "winograd-dilation": (dict(dilation=(1, 2, 1), algo="winograd"), ValueError, "3 taps along H"),
    "winograd2d-taps": (dict(weight=WEIGHT[..., :1], algo="winograd2d"), ValueError, "3 taps along W"),
    "winograd2d-rows": (dict(stride=(1, 2, 1), algo="winograd2d"), ValueError, "3 taps along H"),
    "winograd2d-stride": (dict(stride=(1, 1, 2), algo="winograd2d"), ValueError, "3 taps along W"),
    "winograd2d-dilation": (dict(dilation=(1, 1, 2), algo="winograd2d"), ValueError, "3 taps along W"),
    "cache-rank": (dict(cache=X[0]), ValueError, "wrong rank"),
    "cache-dtype": (dict(cache=X[:, :, :2].bfloat16()), TypeError, "cache must have x's dtype"),
    "cache-device": (dict(cache=X[:, :, :2].to("meta")), ValueError, "another device"),
    "cache-space": (dict(cache=X[:, :, :2, 1:]), ValueError, "more than T"),
    "cache-batch": (dict(cache=X[:, :, :2].expand(2, -1, -1, -1, -1)), ValueError, "more than T"),
    "cache-long": (dict(cache=X[:, :, :3]), ValueError, "at most t0 = 2"),
    "chunk-stride": (dict(x=X[:, :, :3], cache=X[:, :, :2], stride=(2, 1, 1)), ValueError, "whole number of strides"),
    "first-chunk-stride": (dict(x=X[:, :, :3], cache=X[:, :, :0], stride=(2, 1, 1)), ValueError, "whole number"),
    "kernel-T": (dict(x=X[:, :, :2], padding=(0, 0, 1, 1, 1, 1)), ValueError, "does not fit into T"),
    "kernel-H": (dict(x=X[:, :, :, :2], padding=(2, 0, 0, 0, 1, 1)), ValueError, "does not fit into H"),
    "kernel-W": (dict(x=X[..., :1], dilation=(1, 1, 2)), ValueError, "does not fit into W"),
    "empty-H": (dict(x=X[:, :, :, :0], padding=(2, 0, 2, 2, 1, 1)), ValueError, "empty along H"),
    "empty-T": (dict(x=X[:, :, :0], padding=(2, 1, 1, 1, 1, 1)), ValueError, "empty along T"),
    "reflect": (dict(x=X[..., :1], space_pad="reflect"), ValueError, "reflect padding"),
    "residual-shape": (dict(residual=X), ValueError, "output's shape"),
    "residual-dtype": (dict(residual=torch.randn(1, 16, 4, 5, 6).half()), TypeError, "residual must have x's dtype"),
    "residual-device": (dict(residual=torch.randn(1, 16, 4, 5, 6, device="meta")), ValueError, "another device"),
}  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input_causal_conv3d(case, backend):
    kwargs, error, match = BAD[case]
    with pytest.raises(error, match=match) as caught:
        ops.causal_conv3d(**{"x": X, "weight": WEIGHT, **kwargs}, backend=backend)
    assert str(caught.value).startswith("causal_conv3d: ") and "got" in str(caught.value)


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        (dict(x=X[0]), ValueError, "wrong rank"),
        (dict(k_t=0), ValueError, "k_t"),
        (dict(k_t=2.0), ValueError, "k_t"),
        (dict(cache=X[:, :, :3]), ValueError, "at most t0 = 2"),
        (dict(cache=X[:, :4]), ValueError, "more than T"),
        (dict(cache=X[:, :, :2].half()), TypeError, "x's dtype"),
    ],
)
def test_bad_input_next_cache(kwargs, error, match):
    with pytest.raises(error, match=match):
        ops.next_cache(**{"x": X, "cache": None, "k_t": 3, **kwargs})


@pytest.mark.parametrize(
    "kwargs, error, match",
    [
        (dict(x=X[0, :, 0, 0, 0]), ValueError, "wrong rank"),
        (dict(x=X.int()), TypeError, "int32"),
        (dict(x=X[:, :0]), ValueError, "no channels"),
        (dict(norm="layer"), ValueError, "norm"),
        (dict(norm=None), ValueError, "norm"),
        (dict(weight=torch.randn(4)), ValueError, "weight must be one value"),
        (dict(bias=torch.randn(8, 1)), ValueError, "bias must be one value"),
        (dict(norm="group"), ValueError, "groups must divide"),
        (dict(norm="group", groups=0), ValueError, "groups must divide"),
        (dict(eps=float("inf")), ValueError, "eps"),
    ],
)
def test_bad_input_norm_silu(kwargs, error, match):
    with pytest.raises(error, match=match):
        ops.norm_silu(**{"x": X, "weight": None, **kwargs})


@pytest.mark.big
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@each_algo
def test_offsets_beyond_32_bits(algo, dtype):
    laws.offsets_beyond_32_bits("cpu", dtype, algo)
