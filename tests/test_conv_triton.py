"""conv on the Triton kernels: fuzz, the laws of the family, every candidate of tile sizes, launches, 64-bit offsets."""

import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st

from fastdit import ops
from fastdit.backends.registry import NoBackend
from fastdit.backends.triton import _config, _launch, conv as adapter
from fastdit.reference.conv import output_shape
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = torch.channels_last_3d
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
each_format = pytest.mark.parametrize("last", [True, False], ids=["ndhwc", "ncdhw"])
WAN = dict(norm="channel_l2", act="silu")
# shrinking a failure would take the interpreter minutes
fuzzed = settings(max_examples=16, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))


def _check(op, dtype, made):
    sample = Sample(op, "fuzz", lambda _: made)
    contract.forward(sample, dtype, "triton", DEVICE)
    contract.backward(sample, dtype, "triton", DEVICE)


def _draw_conv(draw, m):
    """Any kernel, stride, dilation, padding, cache, layout and prologue whose windows fit, small."""
    kernel = draw((3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1), (2, 3, 1), (1, 2, 2), (2, 1, 3))
    stride, dilation = (
        draw((1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 3, 2)),
        draw((1, 1, 1), (1, 1, 1), (2, 1, 2), (1, 2, 1)),
    )
    time_pad, space_pad = draw("zeros", "first"), draw("zeros", "replicate", "reflect")
    sizes, padding = [draw(1, 2, 3), draw(1, 2, 5), draw(1, 3, 7)], []
    for i in range(3):
        reach = dilation[i] * (kernel[i] - 1)
        most = sizes[i] - 1 if i and space_pad == "reflect" else 3
        before, after = min(draw(0, 1, 2, reach), most), min(draw(0, 0, 1, 3), most)
        sizes[i] = max(sizes[i], reach + 1 - before - after)
        padding += [before, after]
    cached = min(draw(0, 0, 1, 2), padding[0])
    if cached:
        sizes[0] = -(-sizes[0] // stride[0]) * stride[0]
    B, C, Cout = draw(1, 2), draw(1, 3, 8, 16, 34), draw(1, 7, 16, 50)

    def video(channels, *size):
        cut, last = draw(0, 0, 1), draw(True, False)  # a slice of something larger, in either layout
        t = m.randn(B, channels + cut, *size[:2], size[2] + cut)
        t = t.to(memory_format=LAST) if last else t
        return t[:, cut:, :, :, : size[2]]

    norm = draw(None, "channel_l2", "channel_rms") if C >= 8 else None  # of few channels all that is left is rounding
    kwargs = dict(stride=stride, dilation=dilation, padding=tuple(padding), time_pad=time_pad, space_pad=space_pad)
    kwargs |= dict(norm=norm, act=draw(None, "silu"), cache=video(C, cached, *sizes[1:]) if cached else None)
    kwargs |= dict(norm_weight=m.randn(C) if norm and draw(True, False) else None, bias=draw(None, m.randn(Cout)))
    x, weight = video(C, *sizes), m.randn(Cout, C, *kernel) * (C * kernel[0] * kernel[1] * kernel[2]) ** -0.5
    weight = weight.to(memory_format=LAST) if draw(True, False) else weight
    if draw(True, False):
        kwargs["residual"] = video(Cout, *output_shape(x.shape, weight.shape, stride, dilation, padding)[2:])
    return (x, weight), {k: v for k, v in kwargs.items() if v is not None}


@fuzzed
@given(data=st.data())
def test_fuzz(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    dtype = draw(*contract.DTYPES)
    _check("causal_conv3d", dtype, _draw_conv(draw, Maker(dtype, DEVICE)))


@fuzzed
@given(data=st.data())
def test_fuzz_norm_silu(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    m = Maker(dtype := draw(*contract.DTYPES), DEVICE)
    norm, groups = draw("channel_l2", "channel_rms", "group"), draw(1, 2, 3)
    C = groups * draw(16, 18, 21)  # enough values for their rms to mean something
    x = m.randn(*draw((33, C), (1, C, 40), (2, C, 9, 5), (1, C, 3, 2, 1), (2, C, 3, 1, 11), (1, C, 2, 3, 16)))
    x = x.transpose(1, -1).contiguous().transpose(1, -1) if draw(True, False) else x
    _check("norm_silu", dtype, ((x,), dict(norm=norm, groups=groups, weight=draw(None, m.randn(C)), bias=m.randn(C))))


# ---- tile sizes -----------------------------------------------------------------------------------------
def _whole_tiles(m):
    """No dimension leaves a rest in any candidate but the widest."""
    video = lambda *shape: m.randn(*shape).to(memory_format=LAST)  # noqa: E731
    x, weight = video(1, 64, 2, 4, 8), m.randn(96, 64, 2, 1, 2) * 0.1
    return (x, weight), dict(cache=video(1, 64, 1, 4, 8), bias=m.randn(96), padding=(1, 0, 0, 0, 1, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kernel, config",
    [(name, c) for name in ("conv", "conv_weight_grad") for c in _config.CANDIDATES[name]],
    ids=lambda v: v if isinstance(v, str) else "x".join(map(str, v.blocks)),
)
def test_every_candidate(kernel, config, dtype):
    with _config.forced(kernel, config):
        _check("causal_conv3d", dtype, _whole_tiles(Maker(dtype, DEVICE)))


@pytest.mark.parametrize("kernel", ["conv_normalize", "conv_normalize_backward"])
def test_every_candidate_of_norms(kernel):
    for config in _config.CANDIDATES[kernel]:
        with _config.forced(kernel, config):
            for last in (True, False):
                m = Maker(torch.float32, DEVICE)
                x = m.randn(2, 48, 2, 9, 8).to(memory_format=LAST if last else torch.contiguous_format)
                for norm in ("channel_l2", "group"):
                    _check("norm_silu", torch.float32, ((x,), dict(norm=norm, groups=4, weight=m.randn(48))))


@pytest.mark.parametrize(
    "width, parts", [(3, (16, 0)), (48, (32, 16)), (96, (64, 32)), (160, (128, 32)), (192, (128, 64)), (384, (128, 64))]
)
def test_no_idle_lanes_at_the_models_widths(width, parts):
    assert adapter.split(width) == parts
    assert width < 16 or width % sum(parts) == 0


# ---- laws -----------------------------------------------------------------------------------------------
def _wan(dtype, T, last, C=16):
    m = Maker(dtype, DEVICE)
    x = m.randn(1, C, T, 4, 5).to(memory_format=LAST if last else torch.contiguous_format)
    return x, m.randn(24, C, 3, 3, 3) * 0.05, dict(norm_weight=m.randn(C), **WAN)


def _chunked(x, weight, chunks, k_t, **kwargs):
    cache, parts = None, []
    for chunk in x.split(chunks, dim=2):
        parts.append(ops.causal_conv3d(chunk, weight, cache=cache, **kwargs, backend="triton"))
        cache = ops.next_cache(chunk, cache, k_t, backend="triton")
    return torch.cat(parts, 2)


@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunks", [(1, 1, 2), (3, 0, 1)], ids=str)
def test_chunked_equals_whole(dtype, last, chunks):
    x, weight, kwargs = _wan(dtype, 4, last)
    close.assert_bitwise(
        _chunked(x, weight, chunks, 3, **kwargs), ops.causal_conv3d(x, weight, **kwargs, backend="triton")
    )


@pytest.mark.parametrize(
    "kwargs, k_t",
    [
        (dict(stride=(2, 1, 1)), 3),
        (dict(time_pad="first", space_pad="reflect"), 3),
        (dict(dilation=(2, 1, 1), padding=(4, 0, 1, 1, 1, 1)), 5),
    ],
    ids=["stride", "first", "dilation"],
)
def test_chunked_equals_whole_geometries(kwargs, k_t):
    m = Maker(torch.float32, DEVICE)
    x, weight = m.randn(2, 8, 8, 4, 5).to(memory_format=LAST), m.randn(8, 8, 3, 3, 3)
    close.assert_bitwise(
        _chunked(x, weight, (2, 4, 2), k_t, **kwargs), ops.causal_conv3d(x, weight, **kwargs, backend="triton")
    )


@each_format
def test_missing_frames_are_not_convolved(last):
    """Infinite weights at taps that only ever see missing frames change nothing, forward or backward."""
    x, weight, kwargs = _wan(torch.float32, 1, last)

    def run():
        leaf = x.detach().requires_grad_()
        y = ops.causal_conv3d(leaf, weight, **kwargs, backend="triton")
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]

    expected = run()
    weight[:, :, :2] = float("inf")
    for a, b in zip(run(), expected, strict=True):
        close.assert_bitwise(a, b)


@pytest.mark.parametrize("space_pad", ["zeros", "replicate"])
def test_neighbours_do_not_leak(space_pad):
    """x, cache, residual and the gradient are windows into memory full of NaN."""
    m = Maker(torch.float32, DEVICE)

    def window(t):
        large = torch.full([n + 2 for n in t.shape], float("nan"), device=DEVICE).to(memory_format=LAST)
        view = large[tuple(slice(1, 1 + n) for n in t.shape)]
        return view.copy_(t)

    tensors = [m.randn(2, 8, 2, 3, 5), m.randn(2, 8, 1, 3, 5), m.randn(2, 12, 2, 3, 5), m.randn(2, 12, 2, 3, 5)]
    weight = m.randn(12, 8, 3, 3, 3)

    def run(x, cache, residual, grad):
        leaves = [t.detach().requires_grad_() for t in (x, weight, cache)]
        y = ops.causal_conv3d(
            leaves[0], leaves[1], cache=leaves[2], residual=residual, space_pad=space_pad, **WAN, backend="triton"
        )
        return y.detach(), *torch.autograd.grad(y, leaves, grad)

    plain = [t.to(memory_format=LAST) for t in tensors]
    for a, b in zip(run(*map(window, tensors)), run(*plain), strict=True):
        close.assert_bitwise(a, b)


def test_nan_stays_in_its_window():
    x, weight, _ = _wan(torch.float32, 4, last=True)
    x[0, 3, 1, 2, 3] = float("nan")
    bad = torch.isnan(ops.causal_conv3d(x, weight, backend="triton")).any(1)[0]
    assert bad[1:4, 1:4, 2:5].all() and int(bad.sum()) == 27


@pytest.mark.parametrize("alone", range(6))
def test_gradients_alone_equal_all_together(alone):
    m = Maker(torch.float32, DEVICE)
    x, cache, residual = m.randn(1, 9, 2, 3, 4), m.randn(1, 9, 1, 3, 4), m.randn(1, 20, 2, 3, 4)
    tensors = [x, m.randn(20, 9, 3, 3, 3), m.randn(20), cache, m.randn(9), residual]
    cotangent = m.randn(*residual.shape)

    def gradients(wanted):
        t = [v.detach().requires_grad_(i in wanted) for i, v in enumerate(tensors)]
        y = ops.causal_conv3d(
            *t[:3], cache=t[3], norm="channel_rms", norm_weight=t[4], act="silu", residual=t[5], backend="triton"
        )
        return torch.autograd.grad(y, [t[i] for i in wanted], cotangent)

    close.assert_bitwise(gradients([alone])[0], gradients(range(6))[alone])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has one order of programs")
def test_backward_is_bitwise_reproducible():
    m = Maker(torch.bfloat16, DEVICE)
    leaves = [m.randn(1, 96, 4, 64, 64).to(memory_format=LAST), m.randn(96, 96, 3, 3, 3) * 0.02, m.randn(96)]
    grad = m.randn(1, 96, 4, 64, 64)
    runs = []
    for _ in range(3):
        t = [v.detach().requires_grad_() for v in leaves]
        y = ops.causal_conv3d(t[0], t[1], norm_weight=t[2], **WAN, backend="triton")
        runs.append(torch.autograd.grad(y, t, grad))
    for other in runs[1:]:
        for a, b in zip(other, runs[0], strict=True):
            close.assert_bitwise(a, b)


def test_winograd_is_refused_and_auto_goes_direct():
    x, weight, _ = _wan(torch.float32, 1, last=True)
    with pytest.raises(NoBackend, match="has no winograd; algo='auto' takes direct"):
        ops.causal_conv3d(x, weight, algo="winograd", backend="triton")
    close.assert_bitwise(
        ops.causal_conv3d(x, weight, backend="triton"), ops.causal_conv3d(x, weight, algo="direct", backend="triton")
    )


# ---- launches -------------------------------------------------------------------------------------------
@pytest.fixture
def launched(monkeypatch):
    names, run = [], _launch.Launch.__call__

    def counted(self, *tensors):
        names.append(self.kernel.fn.__name__)
        run(self, *tensors)

    monkeypatch.setattr(_launch.Launch, "__call__", counted)
    return names


def test_launches(launched):
    """No pass over x that is not needed: one launch from channels_last_3d tensors, one more per reason."""
    x, weight, kwargs = _wan(torch.float32, 2, last=True)
    packed = weight.to(memory_format=LAST)
    expected = {
        (x, packed, None): ["conv"],
        (x[:, :, 1:], packed, None): ["conv"],
        (x, weight, None): ["move_weight", "conv"],
        (x.contiguous(), packed, None): ["normalize", "conv"],
        (x, packed, "norm"): ["normalize", "conv"],
        (x.contiguous(), packed, "norm"): ["normalize", "conv"],
    }
    for (video, w, norm), names in expected.items():
        launched.clear()
        cache = ops.next_cache(video, None, 3, backend="triton")
        ops.causal_conv3d(video, w, cache=cache, **(kwargs if norm else {}), backend="triton")
        assert launched == ["normalize", *names]


# ---- offsets --------------------------------------------------------------------------------------------
@pytest.mark.big
@pytest.mark.skipif(DEVICE == "cuda", reason="reserved, untouched memory is the CPU's")
def test_offsets_beyond_32_bits():
    """Frames 2^31 elements apart: reserved memory, of which only the frames themselves are ever touched."""
    m = Maker(torch.bfloat16)
    near, weight, grad = m.randn(1, 16, 3, 2, 4), m.randn(24, 16, 3, 3, 3), m.randn(1, 24, 3, 2, 4)

    def far(t):
        big = torch.empty(2**32 + 512, dtype=t.dtype)
        return big.as_strided(t.shape, (0, 1, 2**31, 4 * t.shape[1], t.shape[1])).copy_(t)

    def run(x, g):
        leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
        y = ops.causal_conv3d(*leaves, backend="triton")
        n = ops.norm_silu(x, weight=None, norm="group", groups=2, backend="triton")
        return y.detach(), n, *torch.autograd.grad(y, leaves, g)

    last = [t.to(memory_format=LAST) for t in (near, grad)]
    for a, b in zip(run(far(near), far(grad)), run(*last), strict=True):
        close.assert_bitwise(a, b)
