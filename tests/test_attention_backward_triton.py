"""attention's gradients on Triton beyond the samples: many tiles, every mask, fuzz, layouts, what must not leak."""

import itertools
import math
from functools import partial

import attention_laws as laws
import pytest
import torch
from attention_laws import dense
from hypothesis import HealthCheck, given, settings, strategies as st

from fastdit.backends._attention_bricks import bricks, walked
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample

pytest.importorskip("triton")

from fastdit.backends.triton import _config, _launch, attention as forward, attention_backward as adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
HERE = "triton", DEVICE
gradients = partial(laws.gradients, "triton")
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])


@pytest.fixture
def small():
    """Tiles of 16 and 32, so that little data makes many of them."""
    tile = _config.Config
    with _config.forced("attention_dkdv", tile((16, 32), 4, 2)), _config.forced("attention_dq", tile((32, 16), 4, 2)):
        yield


def _holds(op, dtype, make, what="case"):
    contract.backward(Sample(op, what, make, baseline=laws.BASELINE[op]), dtype, *HERE)


# ---- every path against the reference ---------------------------------------------------------------------------
@each_dtype
@pytest.mark.parametrize(
    "n, m, heads, kv_heads, d",
    [(49, 70, 2, 1, 72), (33, 17, 2, 2, 64), (1, 65, 4, 2, 80), (64, 32, 1, 1, 96), (20, 40, 1, 1, 112)],
)
def test_tiles(n, m, heads, kv_heads, d, dtype, small):
    _holds("attention", dtype, dense(n, m, heads, kv_heads, d))


def _cards():
    """Each card's default tiles once: a card with the blocks of one before it is for test-full."""
    seen = set()
    for d, capability in itertools.product((40, 64, 72, 96, 128, 160), (80, 90, 100, 120)):
        defaults = (adapter._dkdv_default, adapter._dq_default)
        blocks = (d, *(default(capability, 2, d, "none").blocks for default in defaults))
        yield pytest.param(capability, d, marks=pytest.mark.full if blocks in seen else ())
        seen.add(blocks)


@pytest.mark.parametrize("capability, d", _cards())
def test_default_tiles_of_every_card(capability, d):
    _launch.pretend(capability)
    _config.forget()
    try:
        _holds("attention", torch.bfloat16, dense(70, 133, 1, 1, d))
    finally:
        _launch.pretend(None)
        _config.forget()


# a mask is a matter of indices: each in one dtype, all three in test_tiles and in the samples
@pytest.mark.parametrize("frames, dtype", zip([1, 7, 50], contract.DTYPES, strict=True))
def test_frames(frames, dtype, small):
    _holds("attention_varlen", dtype, laws.framed(frames))


def test_frames_and_valid_keys_together(small):
    _holds(
        "attention", torch.float32,
        lambda m: dense(40, 70, 2, 1, 16, frame_tokens=m.index([9, 33]), kv_len=m.index([37, 0]))(m),
    )  # fmt: skip


@pytest.mark.parametrize("window, dtype", zip(laws.WINDOWS, contract.DTYPES, strict=True), ids=str)
def test_windows(window, dtype, small):
    _holds("attention_varlen", dtype, laws.windowed(*window))


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(small, data):
    what, make = laws.drawn(data.draw, st.integers(1, 40))
    _holds("attention_varlen", torch.bfloat16, make, what)


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
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has one order of programs")
@each_dtype
def test_same_bits_on_every_run(dtype):
    make = Maker(dtype, DEVICE)
    args = [make.randn(1, n, 2, 24) for n in (300, 200, 200)]
    close.assert_all_bitwise(*(gradients("attention", args, {}) for _ in range(2)))


def test_same_bits_packed_or_alone(small):
    laws.packed_or_alone(*HERE, (20, 37, 5))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,)], ids=str)
def test_only_what_is_asked_for(wanted):
    make = Maker(torch.bfloat16, DEVICE)
    args = make.randn(1, 40, 4, 72), *make.randn(1, 50, 2, 2, 72).unbind(2)
    laws.only_what_is_asked_for("triton", "attention", args, {}, wanted)


@pytest.mark.parametrize("through", ["o", "lse"])
def test_one_output_alone(through):
    laws.one_output_alone(*HERE, torch.float32, through)


def test_layout_of_the_incoming_gradient():
    laws.layout_of_the_incoming_gradient(*HERE)


def test_rows_without_keys_have_no_gradient():
    laws.rows_without_keys_have_no_gradient(*HERE, torch.float32)


def test_poisoned_neighbours_never_leak(small):
    laws.poisoned_neighbours_never_leak(*HERE, (21, 50))


def test_poisoned_keys_behind_the_valid_ones_never_leak(small):
    laws.poisoned_keys_behind_the_valid_ones_never_leak(*HERE, 60, (37, 5))


@pytest.mark.big
def test_offsets_beyond_32_bits():
    laws.offsets_beyond_32_bits(forward.attention, adapter.attention_backward, DEVICE, torch.float16)
