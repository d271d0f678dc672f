"""Every op's samples on the Triton kernels: in the interpreter on CPU tensors, or on the GPU where there is one."""

import pytest
import torch

from fastdit.backends import registry
from fastdit.testing import contract
from fastdit.testing.workloads import samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SAMPLES = [s for s in samples() if "triton" in registry.implementations(s.op)]
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_forward(sample, dtype):
    contract.forward(sample, dtype, "triton", DEVICE)


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("sample", [s for s in SAMPLES if not s.moves], ids=str)
def test_backward(sample, dtype):
    contract.backward(sample, dtype, "triton", DEVICE)
