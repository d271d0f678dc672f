"""The benchmark harness behind `fastdit bench` and `pytest benchmarks/`.

A row first asserts correctness, then times fastdit and its peers interleaved in one run, together with the machine's
own ceiling at that size: a copy of the same bytes, or torch's GEMM at the same FLOPs. Regressions are judged on
`ratio` (peer_ms / time_ms of one run), never on absolute time.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._functorch import config as functorch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .. import ops
from . import close, gpu, timing, workloads
from .machine import describe
from .workloads import Maker, Workload

PASSES = ("fwd", "bwd", "fwd+bwd")
SUITES = ("smoke", "cpu", "gpu", "models")
OWN = ("cuda", "triton")  # fastdit's own backends for a GPU, where they are timed beside what it chooses
_NO_RIVALS = ("copy", "gemm", "fastdit+compile", *OWN)
_GEMM_SIZE = {"cpu": 2048, "cuda": 8192}
Row = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How rows are measured; `smoke` trades figures for speed and only proves that the harness runs."""

    device: str = "cpu"
    rounds: int = 7
    compiled: bool = True
    passes: tuple[str, ...] = ("fwd",)
    autotune: bool = False  # torch.compile's max-autotune as one more peer of the forward

    @classmethod
    def of(cls, suite: str, passes: tuple[str, ...] = ("fwd",)) -> Settings:
        if suite not in SUITES:
            raise ValueError(f"bench: unknown suite; got {suite!r}, expected one of {SUITES}; see fastdit bench --help")
        if suite == "smoke":
            return cls(rounds=3, compiled=False, passes=passes)
        on_gpu = suite == "gpu" or (suite == "models" and torch.cuda.is_available())
        return cls(device="cuda" if on_gpu else "cpu", passes=passes)


class Subject(Protocol):
    """What a row is about: an op at a model's shape (`Workload`) or a whole model (`whole.Whole`)."""

    @property
    def op(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def shape(self) -> str: ...
    @property
    def flops(self) -> int: ...
    def moved(self, dtype: torch.dtype, pass_: str) -> int: ...
    def computed(self, pass_: str) -> float: ...


@dataclass(frozen=True)
class Measured:
    """One workload in one dtype and pass: what was timed, and how far it is from the truth."""

    workload: Subject
    dtype: torch.dtype
    pass_: str
    backend: str
    ours: timing.Timing
    peers: dict[str, timing.Timing]
    err_ratio: float
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def ceiling(self) -> str:
        return "gemm" if self.workload.flops else "copy"

    @property
    def pct_ceiling(self) -> float:
        return 100 * self.peers[self.ceiling].p50 / self.ours.p50

    def ratio(self, peer: str) -> float:
        return self.peers[peer].p50 / self.ours.p50

    @property
    def best_peer(self) -> str | None:
        rivals = [name for name in self.peers if name not in _NO_RIVALS]
        return min(rivals, key=lambda name: self.peers[name].p50, default=None)

    @property
    def rate(self) -> tuple[float, str]:
        if self.workload.flops:
            return self.workload.computed(self.pass_) / self.ours.p50 / 1e9, "GFLOP/s"
        return self.workload.moved(self.dtype, self.pass_) / self.ours.p50 / 1e9, "GB/s"

    def rows(self) -> list[Row]:
        """One per peer, as `fastdit bench --json` writes them; ratio = peer_ms / time_ms, above 1 is faster."""
        return [
            {
                "op": self.workload.op,
                "model": self.workload.model,
                "shape": self.workload.shape,
                "dtype": _name(self.dtype),
                "pass": self.pass_,
                "backend": self.backend,
                "peer": peer,
                "time_ms": self.ours.ms,
                "peer_ms": timed.ms,
                "ratio": self.ratio(peer),
                "pct_ceiling": self.pct_ceiling,
                "err_ratio": self.err_ratio,
            }
            for peer, timed in self.peers.items()
        ]


def cases(op: str | None = None, suite: str = "cpu") -> list[tuple[Workload, torch.dtype]]:
    """Every row of a suite, of all ops or of one; gpu has its own, smoke the first of each op in bf16, models none."""
    if suite == "models":
        return []
    found = gpu.rows(op) if suite == "gpu" else workloads.bench(op)
    if suite == "smoke":
        first: dict[str, Workload] = {}
        for workload in found:
            first.setdefault(workload.op, workload)
        return [(w, w.dtypes[0]) for w in first.values()]
    return [(w, dtype) for w in found for dtype in w.dtypes]


def family(name: str) -> list[tuple[Workload, torch.dtype]]:
    """The rows of one family, for its benchmarks/bench_<family>.py."""
    module = importlib.import_module(f"{workloads.__name__}.{name}")
    return [(w, dtype) for w in module.BENCH for dtype in w.dtypes]


def label(value: object) -> str:
    """Test ids: norm_modulate-DiT-XL/2-256, bfloat16."""
    return _name(value) if isinstance(value, torch.dtype) else str(value)


def measure(workload: Workload, dtype: torch.dtype, settings: Settings, pass_: str = "fwd") -> Measured:
    args, kwargs = workload.make(maker(dtype, settings.device))
    op = getattr(ops, workload.op)
    peers = dict(workload.peers or {})
    if workload.judged is None:
        err_ratio = _check(workload, op, args, kwargs)
    else:
        err_ratio = judge(workload.judged, dtype, settings.device)
    backend = _backend(op, args, kwargs)
    if settings.compiled and "eager" in peers:
        torch._dynamo.reset()
        peers["compile"] = torch.compile(peers["eager"], dynamic=False)
        if settings.autotune and pass_ == "fwd":  # without its CUDA graphs: small sizes are graphed for every side
            tuned = torch.compile(peers["eager"], dynamic=False, mode="max-autotune-no-cudagraphs")
            peers["compile_max"] = tuned

    calls: dict[str, timing.Call] = {}
    skipped: dict[str, str] = {}
    for name, function in {"fastdit": op, **peers}.items():
        try:
            # a compiled forward keeps what its backward needs: the same graph is gone through again and again
            with functorch.patch(donated_buffer=False):
                calls[name] = _call(function, workload, args, kwargs, pass_, settings.device)
                calls[name]()
        except Exception as error:  # a peer that cannot run is reported, ours must run
            if name == "fastdit":
                raise
            calls.pop(name, None)
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    name, limit, share = ceiling(workload, dtype, pass_, settings.device)
    calls[name] = limit
    timings = timing.interleaved(calls, device=settings.device, rounds=settings.rounds)
    timings[name] = timings[name].scaled(share)
    ours = timings.pop("fastdit")
    return Measured(workload, dtype, pass_, backend, ours, timings, err_ratio, skipped)


def maker(dtype: torch.dtype, device: str) -> Maker:
    return Maker(dtype) if device == "cpu" else gpu.OnDevice(dtype, device)


def call(workload: Workload, dtype: torch.dtype, device: str = "cpu", pass_: str = "fwd") -> timing.Call:
    """fastdit's side of a row as a function without arguments, for a clock of somebody else."""
    args, kwargs = workload.make(Maker(dtype, device))
    return _call(getattr(ops, workload.op), workload, args, kwargs, pass_, device)


def prepared(function: Callable, workload: Workload, args: tuple, kwargs: dict, pass_: str) -> timing.Call:
    """A function without arguments that does one pass of `function` on these inputs, as it is: no CUDA graph."""
    return _call(function, workload, args, kwargs, pass_, "cpu")


def judge(workload: Workload, dtype: torch.dtype, device: str, backend: str | None = None) -> float:
    """Largest share of the allowed error on a backend; raises AssertionError where the row is wrong."""
    args, kwargs = workload.make(maker(dtype, device))
    return _check(workload, functools.partial(getattr(ops, workload.op), backend=backend), args, kwargs)


def document(measured: list[Measured], device: str, ceilings: dict[str, float]) -> dict[str, Any]:
    """What `fastdit bench --json` writes."""
    return {"machine": describe(device), "ceilings": ceilings, "rows": [row for m in measured for row in m.rows()]}


def ceilings(device: str = "cpu", *, quick: bool = False) -> dict[str, float]:
    """The machine's own limits: copy bandwidth in GB/s (read + write) and torch's GEMM rate in GFLOP/s."""
    size = 512 if quick else None
    nbytes = 2**24 if quick else 2**28
    return {
        "copy_gb_per_s": timing.copy_bandwidth(nbytes, device=device) / 1e9,
        "gemm_bfloat16_gflop_per_s": timing.gemm_rate(torch.bfloat16, size=size, device=device) / 1e9,
        "gemm_float32_gflop_per_s": timing.gemm_rate(torch.float32, size=size, device=device) / 1e9,
    }


def _check(workload: Workload, op: Callable, args: tuple, kwargs: dict) -> float:
    """Largest share of the allowed error over the outputs; raises where a row is wrong.

    The baseline is the reference and never a peer: a peer may compute another function of the same inputs (the cache of
    the VAE's own conv holds activated frames), and against its huge error nothing would ever fail.
    """
    wide = tree_map(_double, (args, kwargs))
    with torch.no_grad():
        actual = close.flat(op(*args, **kwargs))
        reference = functools.partial(getattr(ops, workload.op), backend="reference")
        baseline = close.flat(reference(*args, **kwargs))
        truth = close.flat(reference(*wide[0], **wide[1]))
    return max(
        close.assert_close(a, t, b, f"{workload} output {i}").ratio
        for i, (a, t, b) in enumerate(zip(actual, truth, baseline, strict=True))
    )


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.backends: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fastdit":
            self.backends.append(args[-1])
        return func(*args, **(kwargs or {}))


def _backend(op: Callable, args: tuple, kwargs: dict) -> str:
    """The backend that the call takes; the reference is plain PyTorch and so leaves no fastdit op behind."""
    with torch.no_grad(), _Seen() as seen:
        op(*args, **kwargs)
    return "+".join(dict.fromkeys(seen.backends)) or "reference"


def _call(function: Callable, workload: Workload, args: tuple, kwargs: dict, pass_: str, device: str) -> timing.Call:
    """A function without arguments that does one pass."""
    if pass_ == "fwd":

        def forward() -> object:
            with torch.no_grad():
                return function(*args, **kwargs)

        return timing.graphed(forward) if device == "cuda" and workload.bytes(torch.bfloat16) < 2**26 else forward

    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    args = tree_map(leaf, args)
    kwargs = {k: v if k in workload.fixed else tree_map(leaf, v) for k, v in kwargs.items()}

    def outputs() -> list[Tensor]:
        return [o for o in close.flat(function(*args, **kwargs)) if o.requires_grad]

    out = outputs()
    cotangents = [torch.randn_like(o) for o in out]
    if pass_ == "bwd":
        return lambda: torch.autograd.grad(out, leaves, cotangents, retain_graph=True, allow_unused=True)
    return lambda: torch.autograd.grad(outputs(), leaves, cotangents, allow_unused=True)


def ceiling(workload: Subject, dtype: torch.dtype, pass_: str, device: str) -> tuple[str, timing.Call, float]:
    """Name, call, and the factor that turns the call's time into the time of this row's bytes or FLOPs."""
    if workload.flops:
        n = _GEMM_SIZE[torch.device(device).type]
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return "gemm", lambda: a @ b, workload.computed(pass_) / (2 * n**3)
    size = workload.moved(dtype, pass_) // 2 // dtype.itemsize
    source = torch.zeros(max(size, 1), dtype=dtype, device=device)
    return "copy", source.clone, 1.0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
