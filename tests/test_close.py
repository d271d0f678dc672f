"""The tolerance policy catches the faults that it exists for, and lets honest arithmetic pass."""

import pytest
import torch

from fastdit import ops
from fastdit.testing import close
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker


def _case(dtype, scale_x=1.0):
    m = Maker(dtype)
    x, shift, scale = m.randn(2, 512, 1152) * scale_x, m.randn(2, 1152), m.randn(2, 1152)

    def run(x, shift, scale, **kwargs):
        return ops.norm_modulate(x, shift=shift, scale=scale, backend="reference", **kwargs)

    truth = run(x.double(), shift.double(), scale.double())
    return run, x, shift, scale, truth, run(x, shift, scale)


def _one_wrong(y):
    y = y.clone()
    y[1, 100, 7] += 1.0
    return y


def _wrong_batch(y, other):
    y = y.clone()
    y[0, 3] = other
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_catches_faults(dtype):
    run, x, shift, scale, truth, base = _case(dtype)
    faults = {
        "0.98 + scale": run(x, shift, scale - 0.02),
        "one element": _one_wrong(base),
        "wrong batch's shift, one token": _wrong_batch(base, run(x, shift.flip(0), scale)[0, 3]),
        "NaN": torch.where(torch.arange(1152) == 5, torch.nan, base),
        "zeros": torch.zeros_like(base),
    }
    for name, y in faults.items():
        with pytest.raises(AssertionError):
            close.assert_close(y, truth, base, name)
    assert close.assert_close(base, truth, base).ratio <= 1


def test_fp32_row_catches_what_bf16_cannot():
    run, x, shift, scale, truth, base = _case(torch.float32)
    unbiased = (x - x.mean(-1, keepdim=True)) * torch.rsqrt(x.var(-1, keepdim=True) + 1e-6)
    for y in (run(x, shift, scale, eps=1e-5), unbiased * (1 + scale[:, None]) + shift[:, None]):
        with pytest.raises(AssertionError):
            close.assert_close(y, truth, base)


def test_native_law_is_honest_in_bf16():
    run, x, shift, scale, truth, _ = _case(torch.bfloat16)
    native = run(x, shift, scale, precision="native")
    close.assert_close(native, truth, native)


def test_bitwise_reports_the_place():
    a = torch.zeros(3, 4)
    b = a.clone()
    b[1, 2] = 1
    with pytest.raises(AssertionError, match=r"1 of 12 elements differ, first at \(1, 2\)"):
        close.assert_bitwise(a, b)


def test_poison_finds_forgotten_elements_and_overruns():
    with poisoned():
        assert torch.isnan(torch.empty(4)).all()
        assert torch.isnan(
            torch.empty_like(torch.ones(2, 3, 2, 2, 2).contiguous(memory_format=torch.channels_last_3d))
        ).all()
        assert torch.isnan(torch.ones(2).new_empty(3, dtype=torch.bfloat16)).all()
    with pytest.raises(AssertionError, match="outside its output"), poisoned():
        out = torch.empty(8)
        torch.as_strided(out, (1,), (1,), out.storage_offset() + 8).fill_(1.0)
