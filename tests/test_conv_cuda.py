"""conv's CUDA kernels: every sample, tile and layout, in the block simulator or on a GPU."""

import contextlib

import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st
from test_contract import HOT_SAMPLES
from test_conv_triton import _draw_conv

from fastdit import ops
from fastdit.backends.cuda import _launch, conv as adapter
from fastdit.backends.registry import NoBackend
from fastdit.testing import close, contract, simt
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

DEVICE = "cuda" if torch.cuda.is_available() and _launch._cuda is not None else "cpu"
if DEVICE == "cpu":
    pytest.importorskip("fastdit._cuda_sim", reason="neither the CUDA module with a GPU nor the block simulator")
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
OPS = ("causal_conv3d", "next_cache", "norm_silu")
SAMPLES = [s for op in OPS for s in samples(op) if s.id != "winograd-odd"]
HOT = [s for s in HOT_SAMPLES if s.op in OPS]
LARGE = ("two-regions", "long-chain")
EVERY_DTYPE = ("down-gaps", "time", "space")
QUICK = [s for s in HOT if s.op != "causal_conv3d" or s.id == "down-space"]
SLOW = [pytest.param(s, id=str(s), marks=() if s in QUICK else pytest.mark.full) for s in HOT]
LAST, WAN = torch.channels_last_3d, dict(norm="channel_l2", act="silu")
each_format = pytest.mark.parametrize("last", [True, False], ids=["ndhwc", "ncdhw"])


def where(schedule: str = "eager", seed: int = 1):
    return simt.simulated(schedule, seed) if DEVICE == "cpu" else contextlib.nullcontext()


@pytest.fixture(autouse=True)
def _machine():
    with where():
        yield


def both(sample: Sample, dtype: torch.dtype) -> None:
    contract.forward(sample, dtype, "cuda", DEVICE)
    contract.backward(sample, dtype, "cuda", DEVICE)


def _cases():
    for sample in SAMPLES:
        for dtype in contract.DTYPES:
            slow = sample.id in LARGE or (
                sample.op == "causal_conv3d" and dtype != torch.bfloat16 and sample.id not in EVERY_DTYPE
            )
            yield pytest.param(sample, dtype, id=f"{sample}-{dtype}", marks=pytest.mark.full if slow else ())


@pytest.mark.parametrize("sample, dtype", _cases())
def test_samples(sample, dtype):
    both(sample, dtype)


@pytest.mark.parametrize("sample", SLOW)
def test_opcheck(sample):
    assert contract.opcheck(sample, "cuda", DEVICE) == 2


@pytest.mark.parametrize("sample", SLOW)
def test_fast_path_equals_torch_ops(sample):
    contract.paths_equal(sample, torch.bfloat16, "cuda", DEVICE)


@pytest.mark.parametrize("sample", SLOW)
def test_compile(sample):
    contract.compile_dynamic(sample, "cuda", lengths=(2, 3, 4), device=DEVICE)


# shrinking a failure would take the simulator minutes
@settings(max_examples=10, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_fuzz(data):
    """Any kernel, stride, dilation, padding, cache, layout and prologue."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    made = _draw_conv(draw, Maker(dtype := draw(*contract.DTYPES), DEVICE))
    both(Sample("causal_conv3d", "fuzz", lambda _: made), dtype)


# ---- tiles ------------------------------------------------------------------------------------------------
def _tile(C, Cout, kernel, size, **kwargs) -> Sample:
    def make(m: Maker):
        x, weight = m.randn(1, C, *size).to(memory_format=LAST), m.randn(Cout, C, *kernel) * C**-0.5
        return (x, weight, m.randn(Cout)), kwargs

    return Sample("causal_conv3d", f"{C}-{Cout}", make)


TILES = {
    "192-columns": _tile(24, 384, (1, 1, 1), (1, 5, 27)),
    "128-columns": _tile(40, 136, (2, 1, 1), (2, 3, 5)),
    "96-columns": _tile(96, 96, (1, 1, 1), (1, 12, 12)),
    "tall": _tile(8, 40, (1, 3, 3), (1, 33, 3)),
    "wide": _tile(8, 40, (1, 3, 3), (1, 2, 150)),
    "halo-of-a-stride": _tile(40, 16, (1, 3, 3), (1, 19, 37), stride=(1, 2, 2)),
    "a-patch-a-tap": _tile(40, 16, (1, 3, 3), (1, 20, 29), dilation=(1, 5, 5), padding=(0, 0, 5, 5, 5, 5)),
    "three-channels": _tile(3, 96, (1, 3, 3), (2, 6, 7)),
    "to-three-channels": _tile(96, 3, (1, 3, 3), (2, 6, 7)),
}


@pytest.mark.parametrize("name", TILES)
def test_tiles(name):
    """Every width of a tile, ragged or not; both kinds of patches; several steps of the weight's gradient."""
    both(TILES[name], torch.bfloat16)


@pytest.mark.parametrize("name", ["96-columns", "a-patch-a-tap", "to-three-channels"])
def test_tiles_of_fp32(name):
    both(TILES[name], torch.float32)


@pytest.mark.parametrize("norm", ["channel_rms", "group"])
@each_format
def test_wide_norms(norm, last):
    """More channels than one block of the backward holds, and than four packs a lane."""

    def make(m: Maker):
        x = m.randn(1, 1200, 2, 3, 3).to(memory_format=LAST if last else torch.contiguous_format)
        return (x,), dict(norm=norm, groups=6, weight=m.randn(1200), bias=m.randn(1200))

    both(Sample("norm_silu", "wide", make), torch.bfloat16)


def test_wide_norm_before_a_convolution():
    """Its gradient is written over the gradient that it reads, except where several blocks share a pixel."""
    both(_tile(640, 16, (1, 1, 1), (1, 3, 3), **WAN), torch.bfloat16)


@pytest.mark.parametrize("norm", ["channel_l2", "group"])
def test_many_pixels(norm):
    """Several rounds of a program, and groups far from zero."""

    def make(m: Maker):
        x = (m.randn(2, 24, 3, 20, 31) + 20).to(memory_format=LAST)
        return (x,), dict(norm=norm, groups=3, weight=m.randn(24))

    both(Sample("norm_silu", "many", make), torch.float32)


# ---- laws -------------------------------------------------------------------------------------------------
def _wan(dtype, T, last, C=16):
    m = Maker(dtype, DEVICE)
    x = m.randn(1, C, T, 4, 5).to(memory_format=LAST if last else torch.contiguous_format)
    return x, m.randn(24, C, 3, 3, 3) * 0.05, dict(norm_weight=m.randn(C), **WAN)


@pytest.mark.skipif(DEVICE == "cuda", reason="a card has one schedule")
@pytest.mark.parametrize("schedule", ["lazy", "random"])
@pytest.mark.parametrize("name", ["causal_conv3d", "norm_silu"])
def test_schedules(name, schedule):
    """Another order of threads, blocks and copies: the same bits."""
    m = Maker(torch.bfloat16, DEVICE)
    x, weight, kwargs = _wan(torch.bfloat16, 2, last=True, C=40)
    cache, bias, residual = m.randn(1, 40, 1, 4, 5), m.randn(24), m.randn(1, 24, 2, 4, 5)

    def run():
        with poisoned():
            if name == "norm_silu":
                leaves = [t.detach().requires_grad_() for t in (x, kwargs["norm_weight"])]
                y = ops.norm_silu(leaves[0], norm="group", groups=5, weight=leaves[1], backend="cuda")
            else:
                leaves = [t.detach().requires_grad_() for t in (x, weight, bias, cache, residual)]
                y = ops.causal_conv3d(*leaves[:3], cache=leaves[3], residual=leaves[4], **kwargs, backend="cuda")
            return [y, *torch.autograd.grad(y, leaves, torch.cos(y.detach()))]

    first = run()
    for seed in range(2 if schedule == "random" else 1):
        with where(schedule, seed):
            for a, b in zip(run(), first, strict=True):
                close.assert_bitwise(a, b)


@each_format
@pytest.mark.parametrize("chunks", [(1, 1, 2), (3, 0, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunked_equals_whole(dtype, last, chunks):
    x, weight, kwargs = _wan(dtype, 4, last)
    cache, parts = None, []
    for chunk in x.split(chunks, dim=2):
        parts.append(ops.causal_conv3d(chunk, weight, cache=cache, **kwargs, backend="cuda"))
        cache = ops.next_cache(chunk, cache, 3, backend="cuda")
    close.assert_bitwise(torch.cat(parts, 2), ops.causal_conv3d(x, weight, **kwargs, backend="cuda"))


def test_missing_frames_are_not_convolved():
    """Infinite weights at taps that only ever see missing frames change nothing, forward or backward."""
    x, weight, kwargs = _wan(torch.bfloat16, 1, last=True)

    def run():
        leaf = x.detach().requires_grad_()
        y = ops.causal_conv3d(leaf, weight, **kwargs, backend="cuda")
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]

    expected = run()
    weight[:, :, :2] = float("inf")
    for a, b in zip(run(), expected, strict=True):
        close.assert_bitwise(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_in_their_window(bad, dtype):
    m = Maker(dtype, DEVICE)
    x, weight = m.randn(1, 16, 4, 4, 5).to(memory_format=LAST), m.randn(24, 16, 3, 3, 3).abs()
    x[0, 3, 1, 2, 3] = bad
    y = ops.causal_conv3d(x, weight, backend="cuda")
    hit = (y.isnan() if bad != bad else y.isposinf()).all(1)[0]
    assert hit[1:4, 1:4, 2:5].all() and int(hit.sum()) == 27 and int((~y.isfinite()).sum()) == 27 * 24


@pytest.mark.parametrize("alone", range(6))
def test_gradients_alone_equal_all_together(alone):
    m = Maker(torch.bfloat16, DEVICE)
    x, cache, residual = m.randn(1, 9, 2, 3, 4), m.randn(1, 9, 1, 3, 4), m.randn(1, 20, 2, 3, 4)
    tensors = [x, m.randn(20, 9, 3, 3, 3), m.randn(20), cache, m.randn(9), residual]

    def gradients(wanted):
        t = [v.detach().requires_grad_(i in wanted) for i, v in enumerate(tensors)]
        y = ops.causal_conv3d(
            *t[:3], cache=t[3], norm="channel_rms", norm_weight=t[4], act="silu", residual=t[5], backend="cuda"
        )
        return torch.autograd.grad(y, [t[i] for i in wanted], torch.cos(y.detach()))

    close.assert_bitwise(gradients([alone])[0], gradients(range(6))[alone])


def test_winograd_is_refused_and_auto_goes_direct():
    x, weight, _ = _wan(torch.bfloat16, 1, last=True)
    with pytest.raises(NoBackend, match="has no winograd; algo='auto' takes direct"):
        ops.causal_conv3d(x, weight, algo="winograd", backend="cuda")
    close.assert_bitwise(
        ops.causal_conv3d(x, weight, backend="cuda"), ops.causal_conv3d(x, weight, algo="direct", backend="cuda")
    )


@pytest.mark.parametrize("shape", [(0, 16, 2, 4, 5), (1, 16, 0, 4, 5)], ids=str)
def test_zero_size(shape):
    x, weight = torch.randn(shape, device=DEVICE).requires_grad_(), torch.randn(8, 16, 3, 3, 3, device=DEVICE)
    weight.requires_grad_()
    with poisoned():
        y = ops.causal_conv3d(x, weight, backend="cuda")
        n = ops.norm_silu(x, weight=None, backend="cuda")
        grads = torch.autograd.grad(y.sum() + n.sum(), (x, weight))
    assert y.shape == (shape[0], 8, *shape[2:]) and grads[0].shape == shape and (grads[1] == 0).all()


# ---- launches ---------------------------------------------------------------------------------------------
def test_launches(monkeypatch):
    """No pass over x that is not needed: one launch from channels_last_3d tensors, one more per reason."""
    names, run = [], _launch.launch
    monkeypatch.setattr(adapter, "launch", lambda entry, *rest: (names.append(entry), run(entry, *rest))[1])
    x, weight, kwargs = _wan(torch.bfloat16, 2, last=True)
    packed, three = weight.to(memory_format=LAST), x[:, :3]
    expected = {
        (x, packed, None): ["conv_forward"],
        (x[:, :, 1:], packed, None): ["conv_forward"],
        (x, weight, None): ["conv_move_weight", "conv_forward"],
        (x.contiguous(), packed, None): ["conv_normalize", "conv_forward"],
        (x, packed, "norm"): ["conv_normalize", "conv_forward"],
        (three, weight[:, :3], None): ["conv_normalize", "conv_move_weight", "conv_forward"],
    }
    for (video, w, norm), launches in expected.items():
        cache = ops.next_cache(video, None, 3, backend="cuda")
        names.clear()
        ops.causal_conv3d(video, w, cache=cache, **(kwargs if norm else {}), backend="cuda")
        assert names == launches


# ---- offsets ----------------------------------------------------------------------------------------------
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
        y = ops.causal_conv3d(*leaves, backend="cuda")
        n = ops.norm_silu(x, weight=None, norm="group", groups=2, backend="cuda")
        return y.detach(), n, *torch.autograd.grad(y, leaves, g)

    last = [t.to(memory_format=LAST) for t in (near, grad)]
    for a, b in zip(run(far(near), far(grad)), run(*last), strict=True):
        close.assert_bitwise(a, b)
