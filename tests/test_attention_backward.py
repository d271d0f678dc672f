"""attention's native backward beyond the samples: many tiles and key blocks, every mask, fuzz, layouts, determinism."""

from functools import partial

import attention_laws as laws
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import fastdit
from fastdit.backends.cpu import attention as adapter
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample, attention as workloads

each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES[:2], ids=lambda d: str(d)[6:])
HERE = "cpu", "cpu"
gradients = partial(laws.gradients, "cpu")


def _holds(op, dtype, make, what="case"):
    contract.backward(Sample(op, what, make, baseline=laws.BASELINE[op]), dtype, "cpu")


# The rows from 600 keys on split a head's keys into parts (1,024 in bf16), whose dq meet afterwards.
@each_dtype
@pytest.mark.parametrize(
    "n, m, heads, kv_heads, d",
    [(49, 257, 2, 2, 72), (113, 600, 1, 1, 80), (61, 1100, 2, 1, 64), (17, 130, 4, 2, 112), (1, 96, 1, 1, 128)],
)
def test_tiles(n, m, heads, kv_heads, d, dtype, isa):
    def make(make):
        keys = make.randn(1, m, 2, kv_heads, d).unbind(2)
        return (make.randn(1, n, heads, d), *keys), dict(return_lse=True)

    _holds("attention", dtype, make)


GRIDS = ((3, 5, 7), (0, 1, 1), (2, 8, 16), (1, 1, 1), (4, 9, 10))


@each_dtype
@pytest.mark.parametrize("window, stride", [((2, 3, 3), (1, 1, 1)), ((3, 4, 8), (1, 2, 4)), ((1, 30, 5), (1, 1, 3))])
def test_windows(window, stride, dtype, isa):
    _holds("attention_varlen", dtype, laws.windowed(window, stride, GRIDS, heads=4, tail=0))


@each_dtype
@pytest.mark.parametrize("frames", [1, 9, 50, 1000])
def test_frames(frames, dtype, isa):
    _holds("attention_varlen", dtype, laws.framed(frames, (105, 0, 130, 1, 200), (125, 3, 330, 1, 200)))


# bf16: its rounding stands far above that of SDPA's own sums, which differ from ours; every ISA runs its own code on it
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(isa, data):
    what, make = laws.drawn(data.draw, st.integers(1, 40), count=4, sides=(5, 9), more=40)
    _holds("attention_varlen", torch.bfloat16, make, what)


# ---- laws -------------------------------------------------------------------------------------------------
@each_dtype
@pytest.mark.parametrize("heads", [1, 2, 7])
def test_same_bits_for_any_thread_count(heads, dtype):
    make, before = Maker(dtype), torch.get_num_threads()
    args = [make.randn(1, rows, heads, 72) for rows in (300, 1100, 1100)]
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gradients("attention", args, dict(frame_tokens=60)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        close.assert_all_bitwise(other, results[0])


@pytest.mark.parametrize("op", ["attention", "merge_attention"])
def test_only_what_is_asked_for(op):
    sample = next(s for s in workloads.SAMPLES if s.op == op and s.id in ("lse", "dense"))
    args, kwargs = sample.make(Maker(torch.bfloat16, n=60))
    for i in range(len(args)):
        laws.only_what_is_asked_for("cpu", op, args, kwargs, (i,))


@pytest.mark.parametrize("through", ["o", "lse"])
def test_one_output_alone(through):
    laws.one_output_alone(*HERE, torch.float32, through)


def test_layout_of_the_incoming_gradient():
    laws.layout_of_the_incoming_gradient(*HERE)


def test_rows_without_keys_have_no_gradient():
    laws.rows_without_keys_have_no_gradient(*HERE, torch.float32)


def test_poisoned_neighbours_never_leak():
    laws.poisoned_neighbours_never_leak(*HERE, (21, 50))


def test_explain_names_no_other_backend():
    q = torch.randn(1, 4, 2, 8)
    assert "backward" not in fastdit.explain("attention", q, q, q, backend="cpu")


@pytest.mark.big
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_beyond_32_bits(dtype):
    laws.offsets_beyond_32_bits(adapter.attention, adapter.attention_backward, "cpu", dtype)
