"""attention's one-pass backward of sm_90: dq is summed over the tiles of keys, in their order."""

import math
import re
from functools import partial

import attention_laws as laws
import pytest
import torch
from attention_laws import BASELINE, dense, segments
from cuda_place import DEVICE, HERE, both, machine, on_card, pytestmark, same_bits_on_every_schedule  # noqa: F401
from hypothesis import HealthCheck, given, settings, strategies as st

import fastdit
from fastdit import ops
from fastdit.backends.cuda import _launch, attention as adapter
from fastdit.testing import close
from fastdit.testing.workloads import Maker, Sample, samples

DTYPES = (torch.bfloat16, torch.float16)
SAMPLES = [s for op in BASELINE for s in samples(op) if s.id not in ("odd-head", "one-channel")]
gradients = partial(laws.gradients, "cuda")


def full(*values):
    """A path that another row proves."""
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.fixture(autouse=True)
def one_pass(monkeypatch):
    """Chosen wherever it can be; a list of how often it was taken."""
    taken, real = [], adapter._one_pass
    monkeypatch.setattr(adapter, "SAVED", math.inf)
    monkeypatch.setattr(adapter, "_one_pass", lambda *args: (taken.append(1), real(*args)))
    with on_card(90):
        yield taken


def holds(op: str, dtype: torch.dtype, make, what: str = "case") -> None:
    both(Sample(op, what, make, baseline=BASELINE[op]), dtype)


# ---- against the reference --------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)  # fp16: test_widths
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_samples(sample, dtype):
    both(sample, dtype)


@pytest.mark.parametrize("d", [64, 72, full(80), full(96), 112, 128])
def test_widths(d, one_pass):
    """Several bricks of queries and tiles of keys, the last ones ragged."""
    holds("attention", DTYPES[d % 16 == 0], dense(133, 200, 1, 1, d))
    assert one_pass


@pytest.mark.parametrize("dtype", [DTYPES[0], full(DTYPES[1])], ids=str)
@pytest.mark.parametrize("queries, keys", [(1, 1), (65, 129), (129, 65), (200, 330), (64, 128)])
def test_lengths(queries, keys, dtype, one_pass):
    holds("attention", dtype, dense(queries, keys, 1, 1, 64))
    assert one_pass


@pytest.mark.parametrize("scale", [0.4, -0.2, full(0.0)])
def test_grouped_heads_and_scales(scale, one_pass):
    holds("attention", torch.bfloat16, dense(70, 133, 4, 2, 64, scale=scale))
    assert one_pass


@pytest.mark.parametrize("frames", [full(1), 7, full(50)])
def test_frames(frames, one_pass):
    """The tiles of keys meet fewer and fewer bricks."""
    lengths, key_lengths = (35, 0, 200, 140, 40), (50, 3, 330, 140, 40)
    holds("attention_varlen", torch.bfloat16, laws.framed(frames, lengths, key_lengths, return_lse=True))
    assert one_pass


def test_frames_and_valid_keys_together():
    holds(
        "attention", torch.bfloat16,
        lambda m: dense(140, 300, 2, 1, 16, frame_tokens=m.index([9, 33]), kv_len=m.index([267, 0]))(m),
    )  # fmt: skip


def test_packed_cross_with_empty_segments_and_a_tail(one_pass):
    def make(m):
        args, kwargs = segments(m, (70, 0, 5, 129, 64), 4, 72, (200, 9, 0, 300, 128))
        args = tuple(torch.cat([t, m.randn(9, *t.shape[1:])]) for t in args)
        return args, kwargs | dict(return_lse=True)

    holds("attention_varlen", torch.bfloat16, make)
    assert one_pass


@pytest.mark.parametrize("together", [full(1), full(2), 3])
def test_heads_in_turn(together, monkeypatch):
    """Tiles are handed out for some heads at a time; what is left over is a smaller group. The bits stay."""
    make = Maker(torch.bfloat16, DEVICE)
    args, kwargs = segments(make, (70, 5, 65), 4, 64, (300, 9, 129))
    expected = gradients("attention_varlen", args, kwargs)
    monkeypatch.setattr(adapter, "_together", lambda call: together)
    close.assert_all_bitwise(gradients("attention_varlen", args, kwargs), expected)


@pytest.mark.full
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(data):
    what, make = laws.drawn(data.draw, st.integers(1, 16).map((8).__mul__), sides=(9, 9), more=90, frames=60)
    holds("attention_varlen", torch.bfloat16, make, what)


@pytest.mark.full  # test_rule
def test_windows_take_two_passes(one_pass):
    window, stride = laws.WINDOWS[0]
    holds("attention_varlen", torch.float16, laws.windowed(window, stride, ((3, 5, 7), (0, 1, 1))))
    assert not one_pass


# ---- the same bits ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("d", [64, full(96), 128])
def test_schedules(d):
    """Any order of blocks, threads and copies; several tiles and bricks, with frames and without."""
    make = Maker(torch.bfloat16, DEVICE)
    args, kwargs = segments(make, [7, 0, 100], 2, d, [140, 5, 170])
    same_bits_on_every_schedule(lambda: gradients("attention_varlen", args, kwargs | dict(frame_tokens=40)))
    args = make.randn(1, 140, 2, d), *make.randn(1, 270, 2, 1, d).unbind(2)
    same_bits_on_every_schedule(lambda: gradients("attention", args, {}))


@pytest.mark.full  # test_schedules
def test_runs():
    make = Maker(torch.bfloat16, DEVICE)
    args = make.randn(1, 200, 2, 64), *make.randn(1, 330, 2, 1, 64).unbind(2)
    close.assert_all_bitwise(gradients("attention", args, {}), gradients("attention", args, {}))


def test_packed_or_alone():
    laws.packed_or_alone(*HERE, (20, 200, 5))


@pytest.mark.parametrize("wanted", [(0,), full((1,)), full((2,)), full((0, 2)), (1, 2)], ids=str)
def test_only_what_is_asked_for(wanted, one_pass):
    make = Maker(torch.bfloat16, DEVICE)
    args = make.randn(1, 140, 4, 72), *make.randn(1, 150, 2, 2, 72).unbind(2)
    laws.only_what_is_asked_for("cuda", "attention", args, {}, wanted)
    assert len(one_pass) == 2


def test_layouts(one_pass):
    """q, k and v of one projection, heads first, rows that do not stand on 16 bytes."""
    make = Maker(torch.bfloat16, DEVICE)
    args = [make.randn(2, 150, 2, 24) for _ in range(3)]
    expected = gradients("attention", args, {})
    changes = (
        lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        lambda t: t.new_empty(2, 150, 2, 27)[..., 3:].copy_(t),
        lambda t: torch.stack([t, t], 2)[:, :, 1],
    )
    for change in changes:
        close.assert_all_bitwise(gradients("attention", [change(t) for t in args], {}), expected)
    assert len(one_pass) == 4


def test_layout_of_the_incoming_gradient():
    laws.layout_of_the_incoming_gradient(*HERE)


@pytest.mark.parametrize("through", ["o", "lse"])
def test_one_output_alone(through):
    laws.one_output_alone(*HERE, torch.bfloat16, through)


# ---- what must not be read --------------------------------------------------------------------------------------
@pytest.mark.parametrize("ends", [full((21, 90)), full((65, 90)), (129, 300)])
def test_poisoned_neighbours_never_leak(ends):
    laws.poisoned_neighbours_never_leak(*HERE, ends)


@pytest.mark.parametrize("keys, valid", [(90, (67, 5)), (300, (129, 0)), (200, (1, 128))])
def test_poisoned_keys_behind_the_valid_ones_never_leak(keys, valid):
    laws.poisoned_keys_behind_the_valid_ones_never_leak(*HERE, keys, valid)


def test_rows_without_keys_have_no_gradient():
    laws.rows_without_keys_have_no_gradient(*HERE, torch.bfloat16)


# ---- which calls it serves --------------------------------------------------------------------------------------
def path(*args, **kwargs) -> str:
    op = "attention_varlen" if "cu_seqlens_q" in kwargs else "attention"
    with fastdit.use_backend("cuda"):
        return re.search(r"cuda +chosen \((.*)\)\n", fastdit.explain(op, *args, **kwargs))[1]


def test_rule(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(_launch, "processors", lambda x: 132)
    q = torch.empty(1, 4096, 24, 128, dtype=torch.bfloat16, device=DEVICE)
    one, two = "wgmma, backward in one pass", "wgmma, backward in two passes: "
    costly = two + "turns of blocks cost more than they save; got {} x {} bricks of queries and tiles of keys"
    assert path(q, q, q) == one
    assert path(q, q[:, :512], q[:, :512]) == costly.format(64, 4)
    few = q[:, :1024, :2]
    assert path(few, few, few) == costly.format(16, 8)

    make, packed = Maker(torch.bfloat16, DEVICE), q[0]
    kwargs = dict(cu_seqlens_q=make.index([0, 4096]), max_seqlen_q=4096)
    assert path(packed, packed, packed, **kwargs) == one
    windowed = dict(window=(4, 8, 8), grids=make.index([[16, 16, 16]]))
    text = two + "tiles of keys that meet a brick of a window have no order"
    assert path(packed, packed, packed, **kwargs, **windowed) == text


def test_a_brick_without_its_turn_is_a_deadlock(monkeypatch):
    """The simulator says what a block waits for, were tiles handed out in an order that does not end."""
    if DEVICE == "cuda":
        pytest.skip("a card would hang")
    make = Maker(torch.bfloat16, DEVICE)
    args = make.randn(1, 70, 1, 64), *make.randn(1, 300, 2, 1, 64).unbind(2)
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **more: zeros(*size, **more).index_fill_(0, torch.tensor(0), 1))
    with pytest.raises(RuntimeError, match=r"deadlock: .* at ld.acquire .* another block to be 1, which is 0"):
        o = ops.attention(*(t.requires_grad_() for t in args), backend="cuda")
        o.backward(torch.ones_like(o))
