"""conv on the Triton kernels: fuzz, the laws of the family, every candidate of tile sizes, launches, 64-bit offsets."""

import conv_laws as laws
import pytest
import torch
from conv_laws import LAST, WAN, each_format
from hypothesis import Phase, given, settings, strategies as st

from fastdit import ops
from fastdit.backends.triton import _config, _launch, conv as adapter
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = "triton", DEVICE
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
# shrinking a failure would take the interpreter minutes
fuzzed = settings(max_examples=16, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
BOTH = (contract.forward, contract.backward)


def _check(op, dtype, made, passes=BOTH):
    for check in passes:
        check(Sample(op, "fuzz", lambda _: made), dtype, *HERE)


@fuzzed
@given(data=st.data())
def test_fuzz(data):
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    dtype = draw(*contract.DTYPES)
    _check("causal_conv3d", dtype, laws.draw_conv(draw, Maker(dtype, DEVICE), *laws.small_geometry(draw)))


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


def test_weight_gradient_in_splits():
    """More blocks of pixels than the programs of one split: their parts are summed afterwards."""
    m = Maker(torch.bfloat16, DEVICE)
    x, weight = m.randn(1, 8, 7, 2, 3).to(memory_format=LAST), m.randn(16, 8, 3, 1, 1)
    _check("causal_conv3d", torch.bfloat16, ((x, weight), dict(padding=(4, 0, 0, 0, 0, 0))))


# ---- tile sizes -----------------------------------------------------------------------------------------
def _whole_tiles(m):
    """No dimension leaves a rest in any candidate but the widest."""
    video = lambda *shape: m.randn(*shape).to(memory_format=LAST)  # noqa: E731
    x, weight = video(1, 64, 2, 4, 8), m.randn(96, 64, 2, 1, 2) * 0.1
    return (x, weight), dict(cache=video(1, 64, 1, 4, 8), bias=m.randn(96), padding=(1, 0, 0, 0, 1, 0))


def _candidates():
    """Blocks are a matter of indices: all in bf16, one of each kernel in fp32, the other ones for test-full."""
    for name in ("conv", "conv_weight_grad"):
        for i, config in enumerate(_config.CANDIDATES[name]):
            for dtype in (torch.bfloat16, torch.float32):
                slow = i > 0 and dtype == torch.float32
                what = f"{name}-{'x'.join(map(str, config.blocks))}-{dtype}"
                yield pytest.param(name, config, dtype, id=what, marks=pytest.mark.full if slow else ())


@pytest.mark.parametrize("kernel, config, dtype", _candidates())
def test_every_candidate(kernel, config, dtype):
    passes = BOTH if kernel == "conv" else (contract.backward,)  # the input's gradient is a convolution too
    with _config.forced(kernel, config):
        _check("causal_conv3d", dtype, _whole_tiles(Maker(dtype, DEVICE)), passes)


@pytest.mark.parametrize("kernel", ["conv_normalize", "conv_normalize_backward"])
def test_every_candidate_of_norms(kernel):
    """The statistics of a group take the backward's tiles."""
    passes = (contract.forward,) if kernel == "conv_normalize" else BOTH
    for config in _config.CANDIDATES[kernel]:
        with _config.forced(kernel, config):
            for last in (True, False):
                m = Maker(torch.float32, DEVICE)
                x = m.randn(2, 48, 2, 9, 8).to(memory_format=LAST if last else torch.contiguous_format)
                for norm in ("channel_l2", "group"):
                    made = (x,), dict(norm=norm, groups=4, weight=m.randn(48))
                    _check("norm_silu", torch.float32, made, passes)


@pytest.mark.parametrize(
    "width, parts", [(3, (16, 0)), (48, (32, 16)), (96, (64, 32)), (160, (128, 32)), (192, (128, 64)), (384, (128, 64))]
)
def test_no_idle_lanes_at_the_models_widths(width, parts):
    assert adapter.split(width) == parts
    assert width < 16 or width % sum(parts) == 0


# ---- laws -----------------------------------------------------------------------------------------------
@each_format
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunks", [(1, 1, 2), (3, 0, 1)], ids=str)
def test_chunked_equals_whole(dtype, last, chunks):
    x, weight, kwargs = laws.wan(DEVICE, dtype, 4, last)
    laws.chunked_equals_whole("triton", x, weight, chunks, **kwargs)


@pytest.mark.parametrize("name", laws.GEOMETRIES)
def test_chunked_equals_whole_geometries(name):
    m = Maker(torch.float32, DEVICE)
    x, weight = m.randn(2, 8, 8, 4, 5).to(memory_format=LAST), m.randn(8, 8, 3, 3, 3)
    kwargs, k_t = laws.GEOMETRIES[name]
    laws.chunked_equals_whole("triton", x, weight, (2, 4, 2), k_t, **kwargs)


@each_format
def test_missing_frames_are_not_convolved(last):
    x, weight, kwargs = laws.wan(DEVICE, torch.float32, 1, last)
    laws.missing_frames_are_not_convolved("triton", x, weight, **kwargs)


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
    close.assert_all_bitwise(run(*map(window, tensors)), run(*plain))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_pixel_stays_in_its_window(bad):
    laws.bad_pixel_stays_in_its_window(*HERE, torch.float32, bad)


@pytest.mark.parametrize("alone", range(6))
def test_gradient_alone(alone):
    laws.gradient_alone(*HERE, torch.float32, alone)


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
        close.assert_all_bitwise(other, runs[0])


def test_winograd_is_refused_and_auto_goes_direct():
    laws.winograd_is_refused_and_auto_goes_direct(*HERE, torch.float32)


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
    x, weight, kwargs = laws.wan(DEVICE, torch.float32, 2, last=True)
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
    laws.offsets_beyond_32_bits("triton", torch.bfloat16)
