"""The inputs that tests, `fastdit verify` and benchmarks share: samples per code path, and the models' own shapes.

Each family has a file here with
    SAMPLES  small inputs, one per code path that they guard (tests, opcheck, `fastdit verify`)
    BENCH    rows at the models' shapes (`fastdit bench`, `pytest benchmarks/`), never round numbers
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

FAMILIES = ("modulation", "rotary", "attention", "patch", "conv", "activation")
# Compositions with fused kernels of their own, and the ops that their rows reach: no single op stands behind a row.
COMPOSED = {"adaln": ("norm_modulate_qkv", "norm_modulate_linear", "linear_gate_residual", "attention")}


class Maker:
    """Seeded inputs of one dtype on one device; `n` is the token count that a dynamic dimension varies."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu", n: int = 6, seed: int = 0) -> None:
        self.dtype, self.device, self.n = dtype, device, n
        self._generator = torch.Generator().manual_seed(seed)

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        wide = torch.randn(shape, generator=self._generator, dtype=torch.float64)
        return wide.to(dtype or self.dtype).to(self.device)

    def randint(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.randint(low, high, shape, generator=self._generator, dtype=dtype).to(self.device)

    def index(self, values: list, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


@dataclass(frozen=True)
class Sample:
    """A small input of one op. `make(m)` returns (args, kwargs) of the public function, without `backend`.

    id: names the code path that the row guards. fixed: floating arguments without a gradient. moves: bitwise result.
    baseline: (*args, **kwargs) -> outputs, where it is not the reference in the tested dtype.
    """

    op: str
    id: str
    make: Callable[[Maker], tuple[tuple, dict]]
    fixed: tuple[str, ...] = ()
    moves: bool = False
    baseline: Callable | None = None

    def __str__(self) -> str:
        return f"{self.op}-{self.id}"


@dataclass(frozen=True)
class Workload:
    """A benchmark row: one op at one model's shape. `bytes` and `flops` are the least that the op must move and do.

    bytes_bwd: likewise of its backward alone; twice `bytes` unless told. flops_bwd: in units of the forward's.
    peers: name -> function of the same (args, kwargs); "eager", "compile", "sdpa", "padded", "conv_ndhwc", ... .
    judged: the row whose result is judged, where this one is too large for an fp64 reference.
    """

    op: str
    model: str
    shape: str
    make: Callable[[Maker], tuple[tuple, dict]]
    bytes: Callable[[torch.dtype], int]
    flops: int = 0
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16, torch.float32)
    peers: dict[str, Callable] | None = None
    fixed: tuple[str, ...] = ()
    bytes_bwd: Callable[[torch.dtype], int] | None = None
    flops_bwd: float = 2.0
    judged: Workload | None = None

    def moved(self, dtype: torch.dtype, pass_: str) -> int:
        """Bytes of a pass: fwd, bwd or fwd+bwd."""
        forward = self.bytes(dtype)
        backward = 2 * forward if self.bytes_bwd is None else self.bytes_bwd(dtype)
        return {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[pass_]

    def computed(self, pass_: str) -> float:
        """FLOPs of a pass."""
        return self.flops * {"fwd": 1.0, "bwd": self.flops_bwd, "fwd+bwd": 1.0 + self.flops_bwd}[pass_]

    def __str__(self) -> str:
        return f"{self.op}-{self.model}"


def samples(op: str | None = None) -> list[Sample]:
    found = [s for family in FAMILIES for s in _module(family).SAMPLES]
    return [s for s in found if op is None or s.op == op]


def bench(op: str | None = None) -> list[Workload]:
    found = [w for family in FAMILIES for w in _module(family).BENCH]
    return [w for w in found if op is None or w.op == op]


def composed(family: str) -> tuple[Workload, ...]:
    return _module(family).BENCH


def _module(family: str):
    return importlib.import_module(f"{__name__}.{family}")
