"""rotary on the Triton kernels: the laws that the samples do not hold, in the interpreter or on a GPU."""

import dataclasses
from functools import partial

import pytest
import rotary_laws as laws
import torch
from hypothesis import given, settings, strategies as st
from rotary_laws import SAMPLES

import fastdit
from fastdit import ops
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker

pytest.importorskip("triton")
from fastdit.backends.triton import _config, rotary as adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = "triton", DEVICE
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
SEVERAL = ("hunyuan-native", "wan", "ltx2-split", "packed-axes", "tail-D-half", "allegro-axes")
each_hot = pytest.mark.parametrize("sample", [s for s in SAMPLES if s.id in SEVERAL], ids=str)
KERNELS = ("qk_norm_rope", "qk_norm_rope_backward")


@pytest.mark.parametrize("law, arguments", laws.EVERYWHERE)
def test_law(law, arguments):
    law(*HERE, *arguments)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data):
    contract.forward(*laws.drawn(data), *HERE)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz_backward(data):
    contract.backward(*laws.drawn(data), *HERE)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has one order of programs")
@each_hot
def test_backward_is_reproducible(sample):
    close.assert_all_bitwise(*(laws.gradients(*HERE, sample, torch.bfloat16, n=60) for _ in range(2)))


@pytest.mark.parametrize("sample", [s for s in SAMPLES if s.id in ("hunyuan-native", "tail-D-half")], ids=str)
def test_many_tokens(sample):
    """More than the programs that sum parameters hold at a time."""
    longer = dataclasses.replace(sample, make=lambda m: sample.make(Maker(m.dtype, m.device, n=60)))
    contract.backward(longer, torch.bfloat16, *HERE)


@pytest.mark.parametrize("kernel", KERNELS)
@each_hot
def test_every_tile(kernel, sample):
    """All that the tuner may choose, and tiles that split heads into groups; 12 heads of 32 channels fill none."""
    for config in (*_config.CANDIDATES[kernel][::3], _config.Config((1, 1, 2), 1, 1), _config.Config((2, 2, 1), 4, 1)):
        with _config.forced(kernel, config):
            check = contract.forward if kernel == KERNELS[0] else contract.backward
            check(sample, torch.float32, *HERE)


def test_refusals():
    m, rotate = Maker(torch.float32, DEVICE), partial(ops.qk_norm_rope, backend="triton")
    wide = torch.empty(1, 1, 2, adapter.WIDEST // 2 + 1, device=DEVICE)
    with pytest.raises(fastdit.NoBackend, match="more than 32768 channels"):
        rotate(wide, wide, norm="rms", scope="hidden")
    q, weight = m.randn(1, 2, 2, 8), m.randn(8, dtype=torch.float64)
    with pytest.raises(fastdit.NoBackend, match="float64"):
        rotate(q, q, norm="rms", q_weight=weight)
    with pytest.raises(fastdit.NoBackend, match="float64"):
        rotate(q.double(), q.double())


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_tiles_suit_every_head(dtype, halves, hidden):
    """Powers of two; all heads of a row at once under scope "hidden"; whole warps, at most 16."""
    for D in (1, 8, 42, 64, 72, 96, 128, 256):
        for heads in ((1, 1), (12, 12), (24, 1), (30, 30), (32, 8), (40, 40), (48, 48), (0, 3), (100, 100)):
            (BT, HB, most), warps, _ = adapter.tile(dtype, D, *heads, hidden, halves)
            assert BT & (BT - 1) == 0 and HB & (HB - 1) == 0 and warps in (1, 2, 4, 8, 16) and most >= 1
            padded = sum(-(-h // HB) * HB for h in heads)
            assert padded <= 1.34 * sum(heads) or sum(heads) < 4, (D, heads, HB)
            assert not hidden or sum(-(-h // HB) for h in heads) <= most
