"""Which tile sizes are fastest on the device at hand: what `fastdit bench --tune` measures and writes.

Every candidate of a kernel runs the calls of the benchmark rows that launch it, beside the default, in one run. A key
of the table (kernel, dtype, channels, ...) may serve several rows: the best candidate by the geometric mean of its
times over the default's wins, if it is worth a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from .. import ops
from ..backends import registry
from ..backends.triton import _config
from ..backends.triton._config import Config
from . import bench, timing
from .workloads import Workload

WORTH = 0.98  # of the default's time
Clock = Callable[[dict[Config, timing.Call]], dict[Config, float]]


@dataclass
class Trial:
    """The candidates of one kernel in one row and pass: seconds, or why a candidate cannot run."""

    row: str
    kernel: str
    default: Config
    names: tuple[str, ...]
    seconds: dict[Config, float]
    failed: dict[Config, str] = field(default_factory=dict)

    @property
    def shares(self) -> dict[Config, float]:
        return {config: s / self.seconds[self.default] for config, s in self.seconds.items()}


def trials(cases: Iterable[tuple[Workload, torch.dtype]], device: str, clock: Clock) -> Iterable[Trial]:
    for workload, dtype in cases:
        if "triton" not in registry.implementations(workload.op):
            continue
        done: set[str] = set()
        for pass_ in ("fwd", "fwd+bwd"):  # of the two together, so that a CUDA graph can hold it
            yield from _row(workload, dtype, pass_, device, clock, done)


def _row(
    workload: Workload, dtype: torch.dtype, pass_: str, device: str, clock: Clock, done: set[str]
) -> Iterable[Trial]:
    args, kwargs = workload.make(bench.maker(dtype, device))
    op = getattr(ops, workload.op)

    def call() -> timing.Call:
        return bench.prepared(lambda *a, **k: op(*a, **k, backend="triton"), workload, args, kwargs, pass_)

    _config.forget()
    try:
        call()()
    except registry.NoBackend:
        return
    used: dict[str, dict[str, Config]] = {}
    for name, config in _config.chosen().items():
        used.setdefault(name.split("|")[0], {})[name] = config
    for kernel, spots in used.items():
        if kernel not in _config.CANDIDATES or kernel in done or len(set(spots.values())) > 1:
            continue
        done.add(kernel)
        default = next(iter(spots.values()))
        calls, failed = {}, {}
        for config in dict.fromkeys((default, *_config.CANDIDATES[kernel])):
            with _config.forced(kernel, config):
                try:
                    calls[config] = _fixed(call(), kernel, config, device)
                except Exception as error:  # out of shared memory, or no shape for these inputs
                    failed[config] = f"{type(error).__name__}: {error}"
        if default in calls and len(calls) > 1:
            yield Trial(f"{workload} {str(dtype)[6:]} {pass_}", kernel, default, tuple(spots), clock(calls), failed)


def _fixed(call: timing.Call, kernel: str, config: Config, device: str) -> timing.Call:
    """The call with its choice made: a CUDA graph has it inside, anything else is forced again at every call."""
    call()
    if device == "cuda":
        return timing.graphed(call)

    def forced() -> object:
        with _config.forced(kernel, config):
            return call()

    return forced


def clock(device: str, rounds: int = 5) -> Clock:
    def measured(calls: dict[Config, timing.Call]) -> dict[Config, float]:
        named = {str(i): call for i, call in enumerate(calls.values())}
        timings = timing.interleaved(named, device=device, rounds=rounds, shortest=1e-3)
        return {config: timings[str(i)].p50 for i, config in enumerate(calls)}

    return measured


def best(found: Iterable[Trial]) -> dict[str, Config]:
    """The rows of the table: for each name the candidate with the least mean share, where it beats the default."""
    shares: dict[str, list[dict[Config, float]]] = {}
    for trial in found:
        for name in trial.names:
            shares.setdefault(name, []).append(trial.shares)
    rows = {}
    for name, rounds in shares.items():
        everywhere = set.intersection(*(set(each) for each in rounds))
        means = {c: math.prod(each[c] for each in rounds) ** (1 / len(rounds)) for c in everywhere}
        winner = min(means, key=lambda c: means[c])
        if means[winner] <= WORTH:
            rows[name] = winner
    return rows


def wrong(cases: Iterable[tuple[Workload, torch.dtype]], device: str) -> list[str]:
    """Rows that the tables at hand make wrong, judged like any benchmark row."""
    lines = []
    for workload, dtype in cases:
        try:
            bench.judge(workload.judged or workload, dtype, device, "triton")
        except registry.NoBackend:
            continue
        except AssertionError as error:
            lines.append(f"{workload} {dtype}: {error}")
    return lines
