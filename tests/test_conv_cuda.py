"""conv's CUDA kernels: every sample, tile and layout, in the block simulator or on a GPU."""

import conv_laws as laws
import pytest
import torch
from conv_laws import LAST, WAN, each_format
from cuda_place import DEVICE, HERE, both, machine, pytestmark, same_bits_on_every_schedule  # noqa: F401
from hypothesis import Phase, given, settings, strategies as st
from test_contract import HOT_SAMPLES

from fastdit import ops
from fastdit.backends.cuda import _launch, conv as adapter
from fastdit.testing import contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

OPS = ("causal_conv3d", "next_cache", "norm_silu")
SAMPLES = [s for op in OPS for s in samples(op) if not s.id.startswith("winograd")]
HOT = [s for s in HOT_SAMPLES if s.op in OPS]
LARGE = ("two-regions", "long-chain")
EVERY_DTYPE = ("down-gaps", "time", "space")
QUICK = [s for s in HOT if s.op != "causal_conv3d" or s.id == "down-space"]
SLOW = [pytest.param(s, id=str(s), marks=() if s in QUICK else pytest.mark.full) for s in HOT]


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
    made = laws.draw_conv(draw, Maker(dtype := draw(*contract.DTYPES), DEVICE), *laws.small_geometry(draw))
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
@pytest.mark.parametrize("name", ["causal_conv3d", "norm_silu"])
def test_schedules(name):
    m = Maker(torch.bfloat16, DEVICE)
    x, weight, kwargs = laws.wan(DEVICE, torch.bfloat16, 2, last=True, C=40)
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

    same_bits_on_every_schedule(run)


@each_format
@pytest.mark.parametrize("chunks", [(1, 1, 2), (3, 0, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunked_equals_whole(dtype, last, chunks):
    x, weight, kwargs = laws.wan(DEVICE, dtype, 4, last)
    laws.chunked_equals_whole("cuda", x, weight, chunks, **kwargs)


def test_missing_frames_are_not_convolved():
    x, weight, kwargs = laws.wan(DEVICE, torch.bfloat16, 1, last=True)
    laws.missing_frames_are_not_convolved("cuda", x, weight, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_pixel_stays_in_its_window(bad, dtype):
    laws.bad_pixel_stays_in_its_window(*HERE, dtype, bad)


@pytest.mark.parametrize("alone", range(6))
def test_gradient_alone(alone):
    laws.gradient_alone(*HERE, torch.bfloat16, alone)


def test_winograd_is_refused_and_auto_goes_direct():
    laws.winograd_is_refused_and_auto_goes_direct(*HERE, torch.bfloat16)


@laws.each_empty
def test_zero_size(shape):
    laws.zero_size(*HERE, shape)


# ---- launches ---------------------------------------------------------------------------------------------
def test_launches(monkeypatch):
    """No pass over x that is not needed: one launch from channels_last_3d tensors, one more per reason."""
    names, run = [], _launch.launch
    monkeypatch.setattr(adapter, "launch", lambda entry, *rest: (names.append(entry), run(entry, *rest))[1])
    x, weight, kwargs = laws.wan(DEVICE, torch.bfloat16, 2, last=True)
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
    laws.offsets_beyond_32_bits("cuda", torch.bfloat16)
