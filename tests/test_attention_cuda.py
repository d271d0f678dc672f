"""attention's CUDA kernels: every sample, many tiles under every mask, in the block simulator or on a GPU."""

import contextlib
import itertools
import math

import pytest
import torch
from test_contract import HOT_SAMPLES

from fastdit import ops
from fastdit.backends.cuda import _launch
from fastdit.testing import close, contract, simt
from fastdit.testing.workloads import Maker, Sample, attention as workloads, samples

DEVICE = "cuda" if torch.cuda.is_available() and _launch._cuda is not None else "cpu"
if DEVICE == "cpu":
    pytest.importorskip("fastdit._cuda_sim", reason="neither the CUDA module with a GPU nor the block simulator")
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
BASELINE = {"attention": workloads.sdpa, "attention_varlen": workloads.sdpa_varlen}
OPS = tuple(BASELINE)
SAMPLES = [s for op in OPS for s in samples(op) if s.id not in ("odd-head", "one-channel")]
HOT = [s for s in HOT_SAMPLES if s.op in OPS]
DTYPES = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def where(schedule: str = "eager", seed: int = 1):
    return simt.simulated(schedule, seed) if DEVICE == "cpu" else contextlib.nullcontext()


@pytest.fixture(autouse=True)
def _machine():
    with where():
        yield


def both(sample: Sample, dtype: torch.dtype) -> None:
    contract.forward(sample, dtype, "cuda", DEVICE)


def holds(op: str, dtype: torch.dtype, make, what: str = "case") -> None:
    both(Sample(op, what, make, baseline=BASELINE[op]), dtype)


@each_dtype
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_samples(sample, dtype):
    both(sample, dtype)


# ---- many tiles -------------------------------------------------------------------------------------------------
def dense(n, m, heads, kv_heads, d, **more):
    def make(make):
        keys = make.randn(1, m, 2, kv_heads, d).unbind(2)
        return (make.randn(1, n, heads, d), *keys), dict(return_lse=True, **more)

    return make


def segments(make, lengths, heads, d, key_lengths=None, tail=0):
    """Packed inputs: strided views; two heads of keys."""
    total = sum(lengths) + tail
    cu = make.index([0, *itertools.accumulate(lengths)])
    kwargs = dict(cu_seqlens_q=cu, max_seqlen_q=max(lengths), return_lse=True)
    keys = total
    if key_lengths is not None:
        keys = sum(key_lengths)
        kwargs |= dict(
            cu_seqlens_k=make.index([0, *itertools.accumulate(key_lengths)]), max_seqlen_k=max(key_lengths)
        )
    return (make.randn(total, heads, d), *make.randn(keys, 2, 2, d).unbind(1)), kwargs


@pytest.mark.parametrize("d", [64, 72, 80, 96, 112, 128])
def test_tiles(d):
    holds("attention", DTYPES[d % 16 > 0], dense(140, 150, 2, 1, d))
