"""rotary's CUDA kernels: every sample and what the samples do not hold, in the block simulator or on a GPU."""

import contextlib

import pytest
import torch
from test_contract import HOT_SAMPLES

from fastdit import ops
from fastdit.backends.cuda import _launch
from fastdit.testing import close, contract, simt
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

DEVICE = "cuda" if torch.cuda.is_available() and _launch._cuda is not None else "cpu"
if DEVICE == "cpu":
    pytest.importorskip("fastdit._cuda_sim", reason="neither the CUDA module with a GPU nor the block simulator")
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
SAMPLES = samples("qk_norm_rope")
HOT = [s for s in HOT_SAMPLES if s.op == "qk_norm_rope"]
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)


def where(schedule: str = "eager", seed: int = 1):
    return simt.simulated(schedule, seed) if DEVICE == "cpu" else contextlib.nullcontext()


@pytest.fixture(autouse=True)
def _machine():
    with where():
        yield


@each_dtype
@each_sample
def test_forward(sample, dtype):
    contract.forward(sample, dtype, "cuda", DEVICE)


@each_dtype
@each_sample
def test_backward(sample, dtype):
    contract.backward(sample, dtype, "cuda", DEVICE)
