"""modulation's CUDA kernels: every sample and row map, in the block simulator or on a GPU."""

import modulation_laws as laws
import pytest
import torch
from cuda_place import DEVICE, HERE, both, machine, pytestmark, same_bits_on_every_schedule  # noqa: F401
from modulation_laws import MAPS, seam
from test_contract import HOT_SAMPLES

from fastdit import ops
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample, samples

OPS = ("norm_modulate", "gate_residual", "gate_residual_norm_modulate")
SAMPLES = [s for op in OPS for s in samples(op)]
HOT = [s for s in HOT_SAMPLES if s.op in OPS]
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
SEVERAL = ("long-runs", "frames-in-samples", "scattered", "two-indices")


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


@pytest.mark.parametrize("name", SEVERAL)
def test_schedules(name):
    same_bits_on_every_schedule(lambda: laws.results(*HERE, MAPS[name], torch.bfloat16))


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


@pytest.mark.parametrize("law, arguments", laws.EVERYWHERE)
def test_law(law, arguments):
    law(*HERE, *arguments)


@pytest.mark.parametrize("wanted", ["x", "shift", "weight", "gate"])
def test_one_gradient_alone(wanted):
    close.assert_bitwise(*laws.alone_and_together(*HERE, wanted))
