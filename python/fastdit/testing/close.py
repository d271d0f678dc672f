"""The one tolerance policy. No other file holds a tolerance.

truth     the reference in fp64 on the rounded inputs
baseline  the reference of the same precision law in the tested dtype (attention: torch's SDPA)
pass iff  max_err <= 2 * max_base + floor   and   rms_err <= 1.5 * rms_base + floor,
          floor = 1/2 ulp of max|truth| in the tested dtype; NaN and Inf stand in the same places.

The maximum alone misses a `0.98 + scale`; the rms alone misses one wrong element; together they catch both. Faults
below bf16's resolution (eps, unbiased variance) are caught by the fp32 row that every op also has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..packing import Packed

MAX_FACTOR = 2.0
RMS_FACTOR = 1.5


@dataclass(frozen=True)
class Errors:
    """Errors of one tensor and of its baseline against the truth, and the floor under both bounds."""

    max: float
    rms: float
    max_base: float
    rms_base: float
    floor: float
    same_nonfinite: bool

    @property
    def ratio(self) -> float:
        """Largest error in units of what is allowed: at most 1 passes."""
        return max(
            self.max / (MAX_FACTOR * self.max_base + self.floor), self.rms / (RMS_FACTOR * self.rms_base + self.floor)
        )

    @property
    def ok(self) -> bool:
        return self.same_nonfinite and self.ratio <= 1.0

    def __str__(self) -> str:
        places = "" if self.same_nonfinite else "; NaN/Inf stand in other places"
        return (
            f"max {self.max:.3e} (baseline {self.max_base:.3e}), rms {self.rms:.3e} (baseline {self.rms_base:.3e}), "
            f"floor {self.floor:.1e}: {self.ratio:.2f} of the allowed error{places}"
        )


def floor(truth: Tensor, dtype: torch.dtype) -> float:
    """Half a unit in the last place of the largest finite |truth|, in `dtype`."""
    finite = truth[torch.isfinite(truth)]
    peak = float(finite.abs().max()) if finite.numel() else 0.0
    tiny = torch.finfo(dtype).tiny
    return 0.5 * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(peak, tiny)))


def errors(actual: Tensor, truth: Tensor, baseline: Tensor) -> Errors:
    if actual.shape != truth.shape or baseline.shape != truth.shape:
        raise AssertionError(
            f"shapes differ: actual {list(actual.shape)}, truth {list(truth.shape)}, baseline {list(baseline.shape)}"
        )
    dtype = actual.dtype
    a, t, b = (v.detach().to("cpu", torch.float64) for v in (actual, truth, baseline))
    usual = torch.isfinite(t)
    same = bool(
        torch.equal(torch.isnan(a), torch.isnan(t))
        and torch.equal(torch.isinf(a) * a.nan_to_num().sign(), torch.isinf(t) * t.nan_to_num().sign())
    )
    usual = usual & torch.isfinite(a) & torch.isfinite(b)

    def stats(v: Tensor) -> tuple[float, float]:
        d = (v - t)[usual]
        return (float(d.abs().max()), float(d.pow(2).mean().sqrt())) if d.numel() else (0.0, 0.0)

    (max_a, rms_a), (max_b, rms_b) = stats(a), stats(b)
    return Errors(max_a, rms_a, max_b, rms_b, floor(t, dtype), same)


def assert_close(actual: Tensor, truth: Tensor, baseline: Tensor, what: str = "result") -> Errors:
    found = errors(actual, truth, baseline)
    if not found.ok:
        raise AssertionError(f"{what}: {found}")
    return found


def assert_bitwise(actual: Tensor, expected: Tensor, what: str = "result") -> None:
    """Pure moves, and results that must not depend on threads, path or packing."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        raise AssertionError(
            f"{what}: got {actual.dtype} {list(actual.shape)}, expected {expected.dtype} {list(expected.shape)}"
        )
    same = (actual == expected) | (torch.isnan(actual) & torch.isnan(expected))
    if not bool(same.all()):
        where = tuple(int(i) for i in (~same).nonzero()[0])
        raise AssertionError(
            f"{what}: {int((~same).sum())} of {same.numel()} elements differ, first at {where}: "
            f"{actual[where]} != {expected[where]}"
        )


def assert_all_bitwise(actual: Iterable[Tensor], expected: Iterable[Tensor], what: str = "result") -> None:
    """As many of one as of the other, each bitwise."""
    for i, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise(a, b, f"{what} {i}")


def flat(output: Tensor | Packed | Sequence) -> list[Tensor]:
    """An op's outputs as a list of tensors; a Packed stands for its tokens."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Packed):
        return [output.tokens]
    return [t for item in output for t in flat(item)]
