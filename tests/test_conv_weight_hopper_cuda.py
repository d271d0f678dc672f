"""The gradient of conv's weight on Hopper (csrc/cuda/conv_weight_hopper.cu), in the block simulator or on sm_90."""

import re

import conv_laws as laws
import pytest
import torch
from conv_laws import LAST
from cuda_place import DEVICE, HERE, machine, on_card, pytestmark, same_bits_on_every_schedule  # noqa: F401
from hypothesis import Phase, given, settings, strategies as st

import fastdit
from fastdit import ops
from fastdit.backends.cuda import _launch, conv as adapter
from fastdit.testing import close, contract, simt
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample

BF16, F16 = torch.bfloat16, torch.float16
FULL = pytest.mark.full  # a path that another row proves


@pytest.fixture(autouse=True)
def _hopper(machine):  # noqa: F811
    with on_card(90):
        yield


@pytest.fixture
def tiles(monkeypatch):
    """Of each weight's gradient: None on mma.sync, else (C, taps, lines, columns, stages, blocks, parts)."""
    found = []

    def launch(entry, op, x, arguments, *rest):
        if entry == "conv_weight_grad_hopper":
            found.append(_launch.ask("conv_weight_hopper_tile", x, *arguments[:2]))
        elif entry == "conv_weight_grad":
            found.append(None)
        _launch.launch(entry, op, x, arguments, *rest)

    monkeypatch.setattr(adapter, "launch", launch)
    return found


def _sample(C, Cout, kernel, size, cache=0, batch=1, last=True, **kwargs) -> Sample:
    """The weight's gradient alone."""

    def make(m: Maker):
        layout = LAST if last else torch.contiguous_format
        x = m.randn(batch, C, *size).to(memory_format=layout)
        given = dict(kwargs)
        if cache:
            given["cache"] = m.randn(batch, C, cache, *size[1:]).to(memory_format=layout)
        return (x, m.randn(Cout, C, *kernel)), given

    return Sample("causal_conv3d", f"{C}-{Cout}", make, ("x", "cache"))


def _spread(lines: int, columns: int) -> dict:
    return dict(dilation=(1, lines, columns), padding=(0, 0, lines, lines, columns, columns))


_HALF = dict(stride=(2, 1, 1), padding=(1, 0, 1, 1, 1, 1))
_BARE = dict(padding=(0, 0, 0, 0, 0, 0))
# name: ((C, taps, lines, columns) of a tile on a device of four processors, sample)
CASES = {
    "96": ((96, 3, 5, 16), _sample(96, 96, (1, 3, 3), (2, 5, 13))),
    "128": ((128, 3, 4, 16), _sample(192, 136, (1, 3, 1), (1, 4, 13))),
    "128-rings": ((128, 3, 8, 16), _sample(128, 72, (1, 3, 3), (1, 29, 30))),
    "merged": ((64, 3, 6, 16), _sample(64, 192, (1, 3, 3), (1, 6, 5))),
    "merged-256": ((64, 3, 3, 16), _sample(40, 264, (1, 3, 1), (15, 3, 16))),
    "cache": ((64, 3, 4, 16), _sample(16, 24, (3, 3, 3), (2, 4, 13), cache=2, batch=2)),
    "short-cache": ((64, 3, 5, 16), _sample(8, 40, (3, 3, 3), (3, 5, 5), cache=1)),
    "first": ((64, 3, 5, 16), _sample(24, 8, (3, 3, 3), (2, 5, 7), time_pad="first")),
    "last": ((64, 3, 5, 16), _sample(24, 8, (3, 3, 1), (2, 5, 7), time_pad="first", padding=(2, 2, 1, 1, 0, 0))),
    "first-cache": ((64, 1, 5, 16), _sample(24, 8, (3, 1, 3), (3, 5, 7), cache=1, time_pad="first")),
    "time": ((64, 1, 1, 32), _sample(56, 200, (3, 1, 1), (3, 5, 6), cache=2)),
    "time-192": ((192, 1, 1, 16), _sample(192, 64, (3, 1, 1), (2, 3, 4))),
    "pointwise": ((96, 1, 1, 80), _sample(88, 96, (1, 1, 1), (2, 12, 13), batch=2)),
    "pointwise-128": ((128, 1, 1, 96), _sample(200, 32, (1, 1, 1), (1, 16, 30))),
    "rings": ((96, 1, 1, 144), _sample(72, 64, (1, 1, 1), (2, 60, 60))),
    "parts": ((64, 3, 13, 16), _sample(16, 24, (1, 3, 1), (4, 37, 17), batch=2)),
    "dilated": ((64, 3, 9, 16), _sample(16, 24, (2, 3, 3), (2, 9, 21), **_spread(2, 3))),
    "far-lines": ((64, 3, 9, 16), _sample(16, 24, (1, 3, 2), (1, 9, 21), **_spread(9, 30))),
    "lines-too-far": ((64, 1, 9, 32), _sample(16, 24, (1, 3, 1), (1, 9, 21), **_spread(130, 1))),
    "stride-in-time": ((64, 3, 5, 16), _sample(16, 24, (3, 3, 3), (5, 5, 6), **_HALF)),
    "no-padding": ((64, 3, 7, 32), _sample(16, 24, (1, 3, 3), (1, 9, 20), **_BARE)),
    "five-lines": ((64, 1, 5, 32), _sample(16, 24, (1, 5, 2), (1, 5, 17))),
    "six-lines": ((64, 3, 9, 16), _sample(16, 24, (1, 6, 1), (1, 8, 17))),
    "wide": ((64, 3, 3, 48), _sample(16, 24, (1, 3, 3), (1, 3, 327))),
    "column": ((64, 3, 10, 16), _sample(16, 24, (1, 3, 3), (1, 19, 1))),
    "ncdhw": ((64, 3, 5, 16), _sample(16, 24, (2, 3, 3), (2, 5, 9), cache=1, last=False)),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(n, marks=FULL if n == "128-rings" else ()) for n in CASES])
def test_tiles(name, tiles):
    """Every kernel, ragged in every dimension."""
    expected, sample = CASES[name]
    contract.backward(sample, F16 if name in ("96", "time", "first") else BF16, *HERE)
    assert len(tiles) == 1
    if DEVICE == "cpu":
        assert tiles[0][:4] == expected, tiles


@settings(max_examples=12, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate))
@given(data=st.data())
def test_fuzz(data):
    """Any geometry that wgmma serves."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    kernel, stride, dilation = laws.small_geometry(draw)
    m = Maker(draw(BF16, F16), DEVICE)
    extents = (1, 2, 3), (2, 5), (1, 9, 19)
    (x, _), kwargs = laws.draw_conv(draw, m, kernel, (stride[0], 1, 1), dilation, extents)
    C, Cout = draw(8, 16, 72), draw(8, 40, 136)
    for key in {"norm", "norm_weight", "act", "bias", "residual", "space_pad"} & kwargs.keys():
        del kwargs[key]
    if "cache" in kwargs:
        kwargs["cache"] = m.randn(x.shape[0], C, *kwargs["cache"].shape[2:])
    made = (m.randn(x.shape[0], C, *x.shape[2:]), m.randn(Cout, C, *kernel)), kwargs
    contract.backward(Sample("causal_conv3d", "fuzz", lambda _: made, ("cache",)), m.dtype, *HERE)


def _gradient(x, weight, grad, **kwargs) -> torch.Tensor:
    weight = weight.detach().requires_grad_()
    with poisoned():
        y = ops.causal_conv3d(x, weight, **kwargs)
        return torch.autograd.grad(y, weight, grad)[0]


def _made(name: str, dtype: torch.dtype = BF16):
    """The arguments of `_gradient`."""
    (x, weight), kwargs = CASES[name][1].make(Maker(dtype, DEVICE))
    y = ops.causal_conv3d(x, weight, **kwargs, backend="reference")
    return (x, weight, Maker(dtype, DEVICE, seed=1).randn(*y.shape).to(memory_format=LAST)), kwargs


@pytest.mark.parametrize(
    "name", ["rings", "parts", "96", "short-cache", *(pytest.param(n, marks=FULL) for n in ("128-rings", "merged-256"))]
)
def test_schedules(name):
    """More stages than the ring holds, several parts, both kinds of products, a warpgroup without rows."""
    made, kwargs = _made(name)
    same_bits_on_every_schedule(lambda: [_gradient(*made, **kwargs, backend="cuda")])


def test_reads_slices():
    """x, cache and the gradient between other channels, pixels and frames, all of them NaN."""
    m = Maker(BF16, DEVICE)

    def slice_of(C, T, H, W):
        memory = torch.full((2, C + 16, T + 1, H + 2, W + 3), float("nan"), dtype=BF16, device=DEVICE)
        inside = memory.to(memory_format=LAST)[:, 8 : C + 8, :T, 1 : H + 1, 2 : W + 2]
        return inside.copy_(m.randn(2, C, T, H, W))

    x, cache, grad, weight = (
        slice_of(24, 3, 5, 13),
        slice_of(24, 2, 5, 13),
        slice_of(40, 3, 5, 13),
        m.randn(40, 24, 3, 3, 3),
    )
    found = _gradient(x, weight, grad, cache=cache, backend="cuda")
    whole = [t.contiguous(memory_format=LAST) for t in (x, weight, grad, cache)]
    close.assert_bitwise(found, _gradient(*whole[:3], cache=whole[3], backend="cuda"))


@pytest.mark.parametrize("bad", [float("nan"), pytest.param(float("inf"), marks=FULL)])
@pytest.mark.parametrize(
    "name", ["cache", "short-cache", "no-padding", "column", "pointwise", "far-lines", "six-lines"]
)
def test_bad_pixels_reach_their_products_alone(name, bad):
    """At the edges of a frame, where tiles end behind it: the products of mma.sync, which forms those that exist."""
    (x, weight, grad), kwargs = _made(name)
    for t in (x, kwargs.get("cache", x), grad):
        t[0, 1, -1, :, -1] = t[0, 2, 0, -1] = t[0, 3, 0, 0, 0] = t[0, 4, -1, -1, 0] = t[-1, 5, 0, 0, -1] = bad
    for reads, made in {"x": (x, weight, grad.nan_to_num(0, 0)), "grad": (x.nan_to_num(0, 0), weight, grad)}.items():
        called = dict(kwargs)
        if reads == "grad" and "cache" in kwargs:
            called["cache"] = kwargs["cache"].nan_to_num(0, 0)
        found = _gradient(*made, **called, backend="cuda")
        with simt.as_card(80):
            expected = _gradient(*made, **called, backend="cuda")
        assert 0 < int(expected.isfinite().sum()) < expected.numel()
        assert torch.equal(found.isfinite(), expected.isfinite()), reads


def test_missing_frames_are_not_multiplied():
    """One frame meets one frame of the kernel: nothing of the others, even under an infinite gradient."""
    m = Maker(BF16, DEVICE)
    x, weight, grad = m.randn(1, 16, 1, 5, 6), m.randn(24, 16, 3, 3, 3), m.randn(1, 24, 1, 5, 6)
    grad[0, 3, 0, 2, 2] = float("inf")
    found = _gradient(x, weight, grad, backend="cuda")
    assert not found[:, :, :2].any() and not found[3, :, 2].isfinite().all() and found[4].isfinite().all()


@pytest.mark.big
@pytest.mark.skipif(DEVICE == "cuda", reason="reserved, untouched memory is the CPU's")
def test_offsets_beyond_32_bits():
    laws.offsets_beyond_32_bits("cuda", BF16)


# ---- what it serves ---------------------------------------------------------------------------------------
REFUSED = {
    "needs sm_90": {},
    "16-bit": dict(dtype=torch.float32),
    "multiples of 8 channels; got 36 of 16": dict(Cout=36),
    "multiples of 8 channels; got 40 of 12": dict(C=12),
    "at most 8 columns": dict(kernel=(1, 1, 9), padding=(0, 0, 0, 0, 4, 4)),
    "no stride": dict(stride=(1, 2, 2)),
    "pads with zeros": dict(space_pad="replicate"),
    "pixels are all there": dict(expand=True),
    "": dict(Cout=8),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_wgmma_serves(reason, tiles):
    """Everything else is left to mma.sync, and `explain` says why."""
    kwargs = dict(REFUSED[reason])
    m = Maker(kwargs.pop("dtype", BF16), DEVICE)
    C = kwargs.pop("C", 16)
    weight = m.randn(kwargs.pop("Cout", 40), C, *kwargs.pop("kernel", (3, 3, 3))).requires_grad_()
    x = m.randn(1, C, 2, 6, 6).to(memory_format=LAST)
    if kwargs.pop("expand", False):
        x = x[:, :, :1].expand(-1, -1, 2, -1, -1)
    with simt.as_card(80 if reason == "needs sm_90" else 90):
        y = ops.causal_conv3d(x, weight, **kwargs, backend="cuda")
        y.backward(torch.ones_like(y))
        said = fastdit.explain("causal_conv3d", x, weight, **kwargs, backend="cuda")
    assert (tiles == [None]) == bool(reason)
    assert re.search(f"mma.sync: wgmma.*{reason}" if reason else "the weight's gradient on wgmma", said)


def test_a_gradient_of_one_value(tiles):
    """An expanded gradient has no pixels of its own: mma.sync."""
    x, weight = (
        torch.ones(1, 8, 2, 4, 4, dtype=BF16, device=DEVICE),
        torch.ones(8, 8, 1, 3, 3, dtype=BF16, device=DEVICE),
    )
    grad = torch.ones(1, 8, 1, 1, 1, dtype=BF16, device=DEVICE).to(memory_format=LAST).expand(-1, -1, 2, 4, 4)
    close.assert_bitwise(
        _gradient(x, weight, grad, backend="cuda"), _gradient(x, weight, grad.contiguous(), backend="cuda")
    )
    assert tiles[0] is None and tiles[1] is not None
