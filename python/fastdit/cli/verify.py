"""`fastdit verify`: every op on every backend in every dtype, against the fp64 reference, on small shapes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastdit.backends import registry
from fastdit.testing import close, contract, workloads
from fastdit.testing.workloads import Sample

from .info import ON_GPU, interpreted, reason


@dataclass
class Line:
    """One op on one backend in one dtype: how many samples, the largest share of the allowed error, what went wrong."""

    op: str
    backend: str
    dtype: torch.dtype
    samples: int = 0
    forward: float = 0.0
    backward: float | None = None
    refused: int = 0
    failures: list[str] = field(default_factory=list)


def show(console: Console, *, op: str | None, backend: str | None, backward: bool) -> int:
    """Prints the table; 0 when everything passes, 1 on a failure, 2 when there was nothing to do."""
    if interpreted():
        from fastdit.testing import interpret

        interpret.install()
    names = list(dict.fromkeys(s.op for s in workloads.samples(op)))
    backends = [backend] if backend else [b for b in registry.BACKENDS if reason(b) is None]
    if not names or (backend and backend not in registry.BACKENDS):
        known = ", ".join(dict.fromkeys(s.op for s in workloads.samples()))
        console.print(
            f"verify: nothing to check; got --op {op} --backend {backend}, "
            f"expected one of {known} on {', '.join(registry.BACKENDS)}."
        )
        return 2
    todo = [(name, b, dtype) for name in names for b in backends for dtype in contract.DTYPES]
    lines = [verify(*item, backward) for item in track(todo, "verifying", console=console, transient=True)]
    lines = [line for line in lines if line.samples or line.failures]
    console.print(_table(lines))
    failed = [line for line in lines if line.failures]
    for line in failed:
        for what in line.failures[:3]:
            console.print(f"[red]{line.op} {line.backend}[/red] {what}", highlight=False)
    for name in registry.BACKENDS:
        if name not in backends and backend is None:
            console.print(f"not checked: {name} ({reason(name)})", style="dim", highlight=False)
    checked = sum(line.samples for line in lines)
    verdict = f"{len(failed)} of {len(lines)} lines failed" if failed else "all passed"
    console.print(f"{checked} checks, {verdict}")
    return 1 if failed or not lines else 0


def verify(op: str, backend: str, dtype: torch.dtype, backward: bool) -> Line:
    """Every sample of one op. A refusal (NoBackend) is counted, it is not a failure; anything else that raises is."""
    line = Line(op, backend, dtype)
    device = "cuda" if backend in ON_GPU and torch.cuda.is_available() else "cpu"
    for sample in workloads.samples(op):
        found = _run(line, sample, contract.forward, device)
        if found is None:
            continue
        line.samples += 1
        line.forward = max(line.forward, found)
        if backward and not sample.moves:
            gradient = _run(line, sample, contract.backward, device)
            line.backward = max(line.backward or 0.0, gradient or 0.0)
    return line


def _run(line: Line, sample: Sample, check: Callable[..., list[close.Errors]], device: str) -> float | None:
    try:
        return max((e.ratio for e in check(sample, line.dtype, line.backend, device)), default=0.0)
    except registry.NoBackend:
        line.refused += 1
    except Exception as error:
        line.failures.append(f"{sample.id} {line.dtype}: {type(error).__name__}: {error}")
    return None


def _table(lines: list[Line]) -> Table:
    table = Table(title="share of the allowed error (1 is the limit)", title_justify="left")
    for name in ("op", "backend", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("samples", "forward", "backward", "refused"):
        table.add_column(name, justify="right")
    table.add_column("")
    for line in lines:
        table.add_row(
            line.op, line.backend, str(line.dtype).removeprefix("torch."), str(line.samples), f"{line.forward:.2f}",
            "" if line.backward is None else f"{line.backward:.2f}", str(line.refused or ""),
            "[red]FAILED[/red]" if line.failures else "[green]ok[/green]",
        )  # fmt: skip
    return table
