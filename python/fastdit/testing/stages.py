"""The stages of `make gpu`: each writes a file of its own, after every item, whatever becomes of the others.

    python -m fastdit.testing.stages [STAGE ...] [--budget SECONDS] [--dry]

<FASTDIT_RESULTS, or benchmarks/results>/<gpu>/<date>-<stage>.json holds the machine, the peers that import, the rows of
`fastdit bench`, the ceilings or the tests, and for each item its seconds or why it has no result. Items run in child
processes (`supervise`). Stages share the budget by their weights; what one leaves over goes to the next. --dry: on a
CPU, the smallest row of every op, to prove that the harness runs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import ops
from ..backends import registry
from . import bench, gpu, machine, pytests, timing, whole, workloads
from .supervise import Item, Outcome, supervise, work
from .workloads import Maker

LONGEST = 560.0  # seconds of a run: a lent machine stops a command after ten minutes
_COPIES = {"64 MiB": 2**26, "1 GiB": 2**30, "8 GiB": 2**33}


@dataclass(frozen=True)
class Stage:
    """items: (dry) -> what it runs. weight: its share of the budget beside the other stages of the run."""

    items: Callable[[bool], list[Item]]
    weight: float = 1.0


# ---- ceilings -----------------------------------------------------------------------------------------------
def _ceilings(dry: bool) -> list[Item]:
    device = "cpu" if dry else "cuda"
    found: list[Item] = []
    for name, nbytes in _COPIES.items():
        size = 2**20 if dry else nbytes
        found.append(
            _figure(f"copy of {name}, GB/s", functools.partial(timing.copy_bandwidth, size, device=device), 1e-9)
        )
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        size = 128 if dry else 8192
        name = f"GEMM of {size} in {bench.label(dtype)}, GFLOP/s"
        found.append(_figure(name, functools.partial(timing.gemm_rate, dtype, size=size, device=device), 1e-9))
    found.append(_figure("launch of a torch op, us", functools.partial(_tiny, device), 1e6))
    found.append(_figure("launch and wait, us", functools.partial(_tiny, device, wait=True), 1e6))
    if not dry:
        found.append(_figure("kernel of a CUDA graph, us", _graph_cost, 1e6))
    for sample in _hot(dry):
        own = [name for name in bench.OWN if name in registry.implementations(sample.op) and not dry]
        for backend in (None, *own, "reference"):
            name = f"host cost of {sample} on {backend or 'auto'}, us"
            found.append(_figure(name, functools.partial(_host_cost, sample, backend, device), 1e6))
    return found


def _figure(name: str, measure: Callable[[], float], unit: float = 1.0) -> Item:
    def run() -> dict[str, Any]:
        try:
            return {"ceilings": {name: unit * measure()}}
        except registry.NoBackend as reason:
            return {"skipped": {name: str(reason)}}

    return Item(name, run, 60.0)


def _hot(dry: bool) -> list[workloads.Sample]:
    """A small sample of each op."""
    first: dict[str, workloads.Sample] = {}
    for sample in workloads.samples():
        first.setdefault(sample.op, sample)
    return list(first.values())[: 1 if dry else None]


def _tiny(device: str, wait: bool = False) -> float:
    """Seconds of a torch op on 16 numbers: of issuing it, or of issuing it and waiting for the end."""
    x = torch.zeros(16, device=device)

    def call() -> None:
        x.add_(1.0)
        if wait:
            timing.synchronize(device)

    return _issued(call, device)


def _graph_cost(kernels: int = 200) -> float:
    """Seconds of one small kernel of a CUDA graph."""
    x = torch.zeros(16, device="cuda")

    def call() -> None:
        for _ in range(kernels):
            x.add_(1.0)

    return timing.interleaved({"graph": timing.graphed(call)}, device="cuda")["graph"].p50 / kernels


def _host_cost(sample: workloads.Sample, backend: str | None, device: str) -> float:
    """Seconds on the host for one call of the op."""
    args, kwargs = sample.make(Maker(torch.bfloat16, device))
    op = getattr(ops, sample.op)
    with torch.no_grad():
        return _issued(lambda: op(*args, **kwargs, backend=backend), device)


def _issued(call: timing.Call, device: str, calls: int = 100, rounds: int = 7) -> float:
    """Seconds on the host for one call, the device's work not waited for: few enough not to fill its queue."""
    for _ in range(3):
        call()
    samples = []
    for _ in range(rounds):
        timing.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        samples.append((time.perf_counter() - start) / calls)
    return timing.Timing.of(samples).p50


# ---- benchmarks ---------------------------------------------------------------------------------------------
def _bench(names: tuple[str, ...], dry: bool) -> list[Item]:
    """Rows of these ops, forwards before backwards: what a time limit cuts off is the backward."""
    suite = "smoke" if dry else "gpu"
    passes = ("fwd",) if dry else ("fwd", "bwd")
    settings = replace(bench.Settings.of(suite, passes), autotune=not dry)
    cases = [case for op in names for case in bench.cases(op, suite)]
    return [
        Item(f"{row} {bench.label(dtype)} {pass_}", functools.partial(_row, row, dtype, settings, pass_), 200.0)
        for pass_ in passes for row, dtype in cases
    ]  # fmt: skip


def _row(row: workloads.Workload, dtype: torch.dtype, settings: bench.Settings, pass_: str) -> dict[str, Any]:
    """fastdit as it chooses, each of its own GPU backends by name, and the peers."""
    if settings.device == "cuda":
        op, built = getattr(ops, row.op), registry.implementations(row.op)
        own = {name: functools.partial(op, backend=name) for name in bench.OWN if name in built}
        row = replace(row, peers={**(row.peers or {}), **own})
    return _told(bench.measure(row, dtype, settings, pass_))


def _models(dry: bool) -> list[Item]:
    settings = bench.Settings.of("smoke" if dry else "gpu")
    return [
        Item(f"{row} {bench.label(dtype)}", functools.partial(_model, row, dtype, settings), 240.0)
        for row, dtype in whole.cases(suite="smoke" if dry else "gpu")
    ]


def _model(row: whole.Whole, dtype: torch.dtype, settings: bench.Settings) -> dict[str, Any]:
    return _told(whole.measure(row, dtype, settings))


def _told(m: bench.Measured) -> dict[str, Any]:
    return {"rows": m.rows(), "skipped": m.skipped}


def _family(*names: str, weight: float) -> Stage:
    return Stage(functools.partial(_bench, names), weight)


STAGES = {
    "ceilings": Stage(_ceilings),
    "correct": Stage(pytests.correct, 6.0),
    "sanitize": Stage(pytests.sanitize, 3.0),
    "bench-modulation": _family("norm_modulate", "gate_residual_norm_modulate", "activation", weight=3.0),
    "bench-rotary": _family("qk_norm_rope", weight=2.0),
    "bench-patch": _family("patch_embed3d", "unpatchify3d", weight=2.0),
    "bench-conv": _family("causal_conv3d", "norm_silu", weight=3.0),
    "bench-attention": _family("attention", "attention_varlen", weight=4.0),
    "models": Stage(_models, 5.0),
}


# ---- a run --------------------------------------------------------------------------------------------------
class Results:
    """The file of one stage, written anew after every item."""

    def __init__(self, stage: str, items: list[Item], device: str) -> None:
        self.path = machine.results(device) / f"{time.strftime('%Y-%m-%d')}-{stage}.json"
        self._items, self._began = items, time.monotonic()
        self.document: dict[str, Any] = {
            "stage": stage, "complete": False, "machine": machine.describe(device), "peers": gpu.present(),
            "seconds": 0.0, "ceilings": {}, "rows": [], "tests": {}, "items": [],
        }  # fmt: skip
        self._write()

    def keep(self, i: int, found: Outcome) -> None:
        d = self.document
        d["rows"] += found.pop("rows", [])
        d["ceilings"] |= found.pop("ceilings", {})
        if "tests" in found:
            d["tests"][self._items[i].name] = found.pop("tests")
        d["items"].append({"name": self._items[i].name, **found})
        d["complete"] = len(d["items"]) == len(self._items)
        self._write()
        print(f"  {found['seconds']:7.1f} s  {self._items[i].name}  {found.get('error', '')[:200]}", flush=True)

    @property
    def failed(self) -> list[str]:
        return [item["name"] for item in self.document["items"] if "error" in item]

    def _write(self) -> None:
        self.document["seconds"] = round(time.monotonic() - self._began, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.path.with_suffix(".part")
        scratch.write_text(json.dumps(self.document, indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.path)


def run(names: list[str], budget: float, dry: bool) -> int:
    """0 where every item of every stage has a result."""
    device = "cpu" if dry else "cuda"
    end, ledger = time.monotonic() + budget, []
    for i, name in enumerate(names):
        weights = [STAGES[n].weight for n in names[i:]]
        share = (end - time.monotonic()) * weights[0] / sum(weights)
        print(f"::: {name}: at most {share:.0f} s", flush=True)
        items = STAGES[name].items(dry)
        results = Results(name, items, device)
        command = [sys.executable, "-m", __spec__.name, name, *(["--dry"] if dry else []), "--work"]
        supervise(command, items, time.monotonic() + share, results.keep)
        ledger.append((results, len(items)))
    print(f"\nWhere the time went (budget {budget:.0f} s):")
    for results, count in ledger:
        done, d = count - len(results.failed), results.document
        print(f"{d['seconds']:7.0f} s  {done:4d} of {count:4d}  {d['stage']:18s} {results.path}")
    return int(any(results.failed for results, _ in ledger))


def _alive(device: str) -> str | None:
    """Frees what the item held; why the CUDA context is lost, or None."""
    torch._dynamo.reset()
    gc.collect()
    if device == "cuda":
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            return f"the CUDA context was lost: {str(error).splitlines()[0]}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="fastdit.testing.stages", description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; all of them unless told")
    parser.add_argument("--budget", type=float, default=float(os.environ.get("FASTDIT_BUDGET", LONGEST)))
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--work", type=int, metavar="FIRST", help=argparse.SUPPRESS)  # as a child of supervise
    given = parser.parse_args()
    unknown = [name for name in given.stages if name not in STAGES]
    if unknown:
        print(f"stages: unknown stage; got {' '.join(unknown)}, expected some of {' '.join(STAGES)}")
        return 2
    if not given.dry and not torch.cuda.is_available():
        print("stages: torch sees no NVIDIA GPU on this machine; nothing was run (--dry proves the harness on a CPU)")
        return 2
    if given.work is None:
        return run(given.stages or list(STAGES), given.budget, given.dry)
    device = "cpu" if given.dry else "cuda"
    torch.backends.cudnn.benchmark = True  # the peers' convolutions by their fastest algorithm
    return work(STAGES[given.stages[0]].items(given.dry), given.work, functools.partial(_alive, device))


if __name__ == "__main__":
    sys.exit(main())
