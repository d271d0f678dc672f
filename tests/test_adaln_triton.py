"""The fused halves of an adaLN block on the Triton kernels: against the composition in fp64, and the laws of fusing."""

import pytest
import torch

from fastdit import ops
from fastdit.backends import registry
from fastdit.backends.triton._config import Config, forced
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker
from fastdit.testing.workloads.adaln import SAMPLES

KERNELS = ("norm_modulate_linear", "linear_gate_residual")
OURS = ("norm_modulate_qkv", *KERNELS)
PARTS = ("norm_modulate", "gate_residual", "activation", "qk_norm_rope", "attention", "attention_varlen")


@pytest.fixture(autouse=True)
def parts(monkeypatch):
    """Where a family has no Triton kernel yet, its formula stands between the fused ones."""
    for op in PARTS:
        table = registry._impls[op]
        if "triton" not in table:
            other = table["reference"]
            impl = registry.Impl(op, "triton", other.supports, other.forward, other.backward)
            monkeypatch.setitem(table, "triton", impl)


@pytest.fixture
def small():
    """Tiles that tiny inputs fill: several of them, whole groups of rows, more than one head in each."""
    with forced(KERNELS[0], Config((16, 32, 16), 4, 2)), forced(KERNELS[1], Config((16, 32, 16), 4, 2)):
        yield


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_forward(sample, dtype, small):
    contract.forward(sample, dtype, "triton")


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_backward(sample, dtype, small):
    contract.backward(sample, dtype, "triton")


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_reference_is_the_composition(sample):
    """The oracle of the internal ops against the parts one by one, with gradients."""
    args, kwargs = sample.make(Maker(torch.float64))

    def run(fused):
        a, k, leaves = contract._leaves(sample, args, kwargs)
        y = getattr(ops, sample.op)(*a, **{**k, "fused": fused}, backend="reference")
        return y, torch.autograd.grad(y.pow(2).sum(), leaves)

    (y, grads), (expected, others) = run(True), run(False)
    close.assert_close(y.float(), expected, expected.float())
    for a, e in zip(grads, others, strict=True):
        close.assert_close(a.float(), e, e.float())
