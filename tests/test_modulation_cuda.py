"""modulation's CUDA kernels: every sample and row map, in the block simulator or on a GPU."""

import contextlib

import pytest
import torch
from test_contract import HOT_SAMPLES
from test_modulation_triton import MAPS, alone_and_together, check_rows_that_nobody_uses, seam

from fastdit import ops
from fastdit.backends.cuda import _launch
from fastdit.testing import close, contract, simt
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

DEVICE = "cuda" if torch.cuda.is_available() and _launch._cuda is not None else "cpu"
if DEVICE == "cpu":
    pytest.importorskip("fastdit._cuda_sim", reason="neither the CUDA module with a GPU nor the block simulator")
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
OPS = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
SAMPLES = [s for op in OPS for s in samples(op)]
HOT = [s for s in HOT_SAMPLES if s.op in OPS]
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
SEVERAL = ("long-runs", "frames-in-samples", "scattered", "two-indices")


def where(schedule: str = "eager", seed: int = 1):
    return simt.simulated(schedule, seed) if DEVICE == "cpu" else contextlib.nullcontext()


@pytest.fixture(autouse=True)
def _machine():
    with where():
        yield


def both(sample: Sample, dtype: torch.dtype) -> None:
    contract.forward(sample, dtype, "cuda", DEVICE)
    contract.backward(sample, dtype, "cuda", DEVICE)


@each_dtype
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_samples(sample, dtype):
    both(sample, dtype)


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_opcheck(sample):
    assert contract.opcheck(sample, "cuda", DEVICE) == 2


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_fast_path_equals_torch_ops(sample):
    contract.paths_equal(sample, torch.bfloat16, "cuda", DEVICE)


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_compile(sample):
    contract.compile_dynamic(sample, "cuda", device=DEVICE)


@each_dtype
@pytest.mark.parametrize("name", MAPS)
def test_row_maps(name, dtype):
    both(MAPS[name], dtype)


@pytest.mark.skipif(DEVICE == "cuda", reason="a card has one schedule")
@pytest.mark.parametrize("schedule", ["lazy", "random"])
@pytest.mark.parametrize("name", SEVERAL)
def test_schedules(name, schedule):
    """Another order of threads and blocks: the same bits."""

    def run():
        args, kwargs = MAPS[name].make(Maker(torch.bfloat16, DEVICE))
        args, kwargs, leaves = contract._leaves(MAPS[name], args, kwargs)
        with poisoned():
            out = ops.gate_residual_norm_modulate(*args, **kwargs, backend="cuda")
            return [*out, *torch.autograd.grad(out, leaves, [torch.cos(o.detach()) for o in out])]

    first = run()
    for seed in range(3 if schedule == "random" else 1):
        with where(schedule, seed):
            for a, b in zip(run(), first, strict=True):
                close.assert_bitwise(a, b)


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("channels", [384, 1152, 3072, 5120])
def test_widths_of_models(channels, affine):
    """With an affine norm of 5120 channels the sums of tables and of vectors are two passes."""
    both(seam(1, 9, channels, gate=(1,), shift=(1,), scale=(1,), affine=affine), torch.bfloat16)


@pytest.mark.parametrize("strided", [False, True])
def test_wide_rows(strided):
    """More than 4096 channels: packs of 16 bytes, copied there where they are not aligned."""
    sample = seam(1, 3, 5120, gate=(1,), shift=(1,), scale=(1,))

    def make(m: Maker):
        (r, y, gate), kwargs = sample.make(m)
        wide = torch.cat([y, y], -1)
        return (r, wide[..., 1:5121] if strided else y, gate), kwargs

    both(Sample(sample.op, "wide", make), torch.bfloat16)


def test_rows_too_wide_are_refused():
    x = torch.randn(1, 2, 4097, device=DEVICE)
    with pytest.raises(
        Exception, match="holds a row in registers: C up to 6144, above 4096 a multiple of 8; got C=4097"
    ):
        ops.norm_modulate(x, backend="cuda")


def test_rows_that_nobody_uses_have_no_gradient():
    check_rows_that_nobody_uses("cuda", DEVICE)


@pytest.mark.parametrize("wanted", ["x", "shift", "weight", "gate"])
def test_one_gradient_alone(wanted):
    close.assert_bitwise(*alone_and_together(wanted, "cuda", DEVICE))


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 8)])
def test_zero_size(shape):
    x = torch.randn(shape, requires_grad=True, device=DEVICE)
    table = torch.randn(1 if len(shape) == 2 else shape[0], 8, requires_grad=True, device=DEVICE)
    with poisoned():
        r, h = ops.gate_residual_norm_modulate(x, x, table, shift=table, backend="cuda")
        grads = torch.autograd.grad((r.sum() + h.sum()), (x, table))
    assert grads[0].shape == shape and (grads[1] == 0).all()


def test_nan_stays_with_its_token_and_its_row():
    m = Maker(torch.float32, DEVICE)
    x = m.randn(40, 40)
    x[7, 3] = float("nan")
    index = torch.tensor([0] * 12 + [1] * 28, device=DEVICE)
    table = m.randn(2, 40).requires_grad_()
    x.requires_grad_()
    y = ops.norm_modulate(x, scale=table, shift=m.randn(2, 40), row_index=index, backend="cuda")
    grad, d_table = torch.autograd.grad(y, (x, table), m.randn(40, 40))
    others = [i for i in range(40) if i != 7]
    assert y[7].isnan().all() and y[others].isfinite().all() and grad[others].isfinite().all()
    assert d_table[0].isnan().all() and d_table[1].isfinite().all()
