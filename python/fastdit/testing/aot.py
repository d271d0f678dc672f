"""Every Triton kernel that the public ops launch at the models' shapes, built for GPUs that are not here.

A driver that pretends a GPU lets the real adapters launch on CPU tensors over reserved, untouched memory; what they
launch is written down (pointer alignment and constants included, so it is the very specialisation that would run),
compiled for each architecture, and read off the machine code. Nothing runs, so nothing here is a speed.

Never in one process with Triton's interpreter. `fastdit aot` shows the report.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib
import itertools
import multiprocessing
import pickle
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils._pytree import tree_map
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.cache import get_cache_manager

from .. import ops
from ..backends import registry
from ..backends.triton import _config, _launch
from . import close, sass, workloads
from .workloads import Maker, Sample, Workload

ARCHES = (80, 90, 100, 120)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PASSES = ("fwd", "bwd")
SCALAR = 0.2  # the most of a kernel's bytes that scalar 2-byte accesses may move: a vector that is shorter than a block
# Rows whose inner dimension is no multiple of 16 bytes: no load of theirs can be wide.
ODD = {("patch_embed3d", "HunyuanVideo1.5-720p/8"): "65 channels"}


class _Pretended(DriverBase):
    """What Triton asks of a driver while it binds arguments: which device, and what that can do."""

    def __init__(self) -> None:
        self.arch = ARCHES[0]

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_device(self) -> int:
        return self.arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError(ty)

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


class Untouched(Maker):
    """Floating tensors are reserved memory that nobody writes; index tensors are real."""

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype)


@dataclasses.dataclass(frozen=True)
class Build:
    """One specialisation of one kernel for one architecture, as plain values that travel between processes."""

    module: str
    kernel: str
    kind: str
    arch: int
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[tuple[int, ...], Any], ...]
    aligned: tuple[tuple[tuple[int, ...], bool], ...]  # arguments, and whether they are multiples of 16
    options: tuple[tuple[str, int], ...]

    @property
    def facts(self) -> tuple[str, ...]:
        """The pointers of each type, then constants, warps and stages; None and False are not told."""
        values = dict(self.constants)
        types: dict[str, list[str]] = {}
        constants = []
        for i, (name, kind) in enumerate(self.signature):
            value = values.get((i,))
            if kind.startswith(("*", "tensordesc")):
                types.setdefault(kind.removeprefix("*").removeprefix("tensordesc"), []).append(name)
            elif kind == "constexpr" and value is not None and value is not False:
                constants.append(name if value is True else f"{name}={value}")
        pointers = (f"{kind}({','.join(names)})" for kind, names in types.items())
        return (*pointers, *constants, *(f"{name.removeprefix('num_')}={value}" for name, value in self.options))

    @property
    def label(self) -> str:
        return " ".join(self.facts)

    @property
    def half(self) -> bool:
        """It reads 16-bit numbers."""
        return any(
            kind.startswith(("*bf16", "*fp16", "tensordesc<bf16", "tensordesc<fp16")) for _, kind in self.signature
        )


@dataclasses.dataclass
class Report:
    """What a build turned out to be. rows: the workloads that launch it. odd: why its loads cannot be wide."""

    build: Build
    rows: list[str]
    odd: str | None = None
    usage: sass.Usage | None = None
    error: str | None = None

    @property
    def problems(self) -> list[str]:
        if self.usage is None:
            return [self.error or "was not compiled"]
        build, u, found = self.build, self.usage, []
        if u.spill or u.stack:
            found.append(f"spills {u.spill} bytes, stack {u.stack}")
        if u.shared > sass.PROCESSORS[build.arch].shared_block:
            found.append(f"{u.shared} bytes of shared memory, more than a block can have")
        elif u.warps_per_sm == 0:
            found.append("no block fits a multiprocessor")
        if build.kind == "gemm" and build.half and not (u.wgmma or (build.arch in (80, 120) and u.mma)):
            found.append("no wgmma" if build.arch in (90, 100) else "no mma")
        if build.kind == "memory" and self.odd is None:
            for name, accesses in (("loads", u.loads), ("stores", u.stores)):
                narrow = 1 - sass.share(accesses, 4)
                if build.half and narrow > SCALAR:
                    found.append(f"scalar {name} of 2 bytes, {100 * narrow:.0f} % of the bytes")
        return found

    def document(self) -> dict[str, Any]:
        build = self.build
        return {
            "kernel": build.kernel, "module": build.module, "kind": build.kind, "arch": build.arch,
            "specialisation": build.label, "rows": self.rows, "usage": self.usage and dataclasses.asdict(self.usage),
            "odd": self.odd, "problems": self.problems,
        }  # fmt: skip


# ---- what is launched ---------------------------------------------------------------------------------------
def subjects(text: str | None = None, samples: bool = False) -> Iterator[Workload | Sample]:
    """The benchmark rows of every op that has a Triton kernel; its samples if asked, or if it has no row of its own."""
    for op in registry.ops():
        if "triton" in registry.implementations(op) and (text is None or text in op):
            rows = workloads.bench(op)
            yield from rows
            if samples or not rows:
                yield from workloads.samples(op)
    for family, needed in workloads.COMPOSED.items():
        if all("triton" in registry.implementations(op) for op in needed):
            yield from (w for w in workloads.composed(family) if text is None or text in w.op)


class Collector:
    """Inside the block every launch is written down as a `Build` for `arch`, and nothing runs."""

    def __init__(self) -> None:
        self._driver = _Pretended()
        self._found: dict[Build, Report] = {}
        self._row = ""
        self._odd: str | None = None

    @property
    def reports(self) -> list[Report]:
        return list(self._found.values())

    def __enter__(self) -> Collector:
        if _launch.INTERPRET:
            raise RuntimeError("aot: the kernels were imported for the interpreter; unset TRITON_INTERPRET")
        triton.runtime.driver.set_active(self._driver)
        _launch.collecting, _launch.on_cpu = self._record, True
        return self

    def __exit__(self, *_: object) -> None:
        _launch.collecting, _launch.on_cpu = None, False
        self.pretend(None)

    def pretend(self, arch: int | None) -> None:
        self._driver.arch = arch or ARCHES[0]
        _launch.pretend(arch)
        _config.forget()

    def name(self, row: str, odd: str | None = None) -> None:
        """What the launches that follow belong to; odd: why their loads cannot be wide."""
        self._row, self._odd = row, odd

    def _record(self, kernel: Any, grid: tuple[int, int, int], args: tuple, options: dict[str, int]) -> None:
        build = self._specialised(kernel, args, options)
        report = self._found.setdefault(build, Report(build, [], self._odd))
        report.odd = report.odd and self._odd  # one row that can be wide is enough
        if self._row not in report.rows:
            report.rows.append(self._row)

    def _specialised(self, kernel: Any, args: tuple, options: dict[str, int]) -> Build:
        """What Triton itself would compile for these arguments."""
        _, _, _, backend, binder = kernel.device_caches[self._driver.arch]
        given = {**options, "debug": False}
        bound, specialisation, extra = binder(*args, **given)
        _, signature, constants, attributes = kernel._pack_args(backend, given, bound, specialisation, extra)
        aligned = tuple((path, bool(found)) for path, found in attributes.items())
        return Build(
            kernel.fn.__module__, kernel.fn.__name__, kernel.kind, self._driver.arch, tuple(signature.items()),
            tuple(constants.items()), aligned, tuple(options.items()),
        )  # fmt: skip


def collect(
    arches: Iterable[int], dtypes: Iterable[torch.dtype], passes: Iterable[str], text: str | None = None,
    quick: bool = False, samples: bool = False,
) -> tuple[list[Report], list[str]]:  # fmt: skip
    """Every distinct build, and the calls that the backend refused, with its reason."""
    refused: list[str] = []
    seen: set[str] = set()
    with Collector() as collector:
        for subject in subjects(text, samples):
            if quick and subject.op in seen:
                continue
            seen.add(subject.op)
            odd = "a sample" if isinstance(subject, Sample) else ODD.get((subject.op, subject.model))
            for dtype in dtypes:
                call = subject.make(Untouched(dtype))
                for arch, pass_ in itertools.product(arches, passes):
                    collector.pretend(arch)
                    collector.name(f"{subject} {str(dtype)[6:]} {pass_}", odd)
                    try:
                        play(subject, call, pass_)
                    except registry.NoBackend as error:
                        refused.append(f"{subject} {dtype} {pass_} sm_{arch}: {error}")
    return collector.reports, refused


def play(subject: Workload | Sample, call: tuple[tuple, dict], pass_: str) -> None:
    """One public call, or its backward with every gradient asked for."""
    args, kwargs = call
    op = getattr(ops, subject.op)
    if pass_ == "fwd":
        with torch.no_grad():
            op(*args, **kwargs, backend="triton")
        return
    leaves: list[Tensor] = []

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        leaves.append(value.detach().requires_grad_())
        return leaves[-1]

    args = tree_map(leaf, args)
    kwargs = {k: v if k in subject.fixed else tree_map(leaf, v) for k, v in kwargs.items()}
    out = [o for o in close.flat(op(*args, **kwargs, backend="triton")) if o.requires_grad]
    if out:
        torch.autograd.grad(out, leaves, [torch.empty_like(o) for o in out], allow_unused=True)


# ---- what comes out of the compiler -------------------------------------------------------------------------
def compiled(build: Build) -> sass.Usage | str:
    """Compiles, or finds in Triton's cache on disk; a string is the compiler's refusal."""
    kernel = getattr(importlib.import_module(build.module), build.kernel)
    aligned = {path: [["tt.divisibility", 16]] if yes else [] for path, yes in build.aligned}
    source = triton.compiler.ASTSource(kernel, dict(build.signature), dict(build.constants), aligned)
    try:
        made = triton.compile(source, target=GPUTarget("cuda", build.arch, 32), options=dict(build.options))
        return _usage(made, build.arch)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _usage(made: Any, arch: int) -> sass.Usage:
    """Read off the cubin once: disassembling takes longer than finding the build, so it lies beside it in the cache."""
    cache, name = get_cache_manager(made.metadata.hash), f"usage-{sass.VERSION}.pickle"
    if found := cache.get_file(name):
        return pickle.loads(Path(found).read_bytes())
    usage = sass.usage(made.asm["cubin"], made.asm["ptx"], arch, made.metadata.shared)
    cache.put(pickle.dumps(usage), name)
    return usage


def build_all(reports: list[Report], jobs: int, advance: Any = lambda: None) -> None:
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(compiled, report.build): report for report in reports}
        for future in concurrent.futures.as_completed(futures):
            result, report = future.result(), futures[future]
            if isinstance(result, str):
                report.error = result
            else:
                report.usage = result
            advance()
