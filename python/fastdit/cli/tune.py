"""`fastdit bench --tune`: every candidate beside the default, and the table of what won."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastdit.backends.triton import _config
from fastdit.testing import bench, tune


def show(console: Console, *, op: str | None, model: str | None, json_file: Path | None) -> int:
    """0 when the table was written and every row is right with it; 1 when one is wrong; 2 without a GPU."""
    if not torch.cuda.is_available():
        console.print("bench: --tune measures on a GPU; torch sees none here; nothing was measured.")
        return 2
    cases = [(w, d) for w, d in bench.cases(op, "gpu") if model is None or model.lower() in w.model.lower()]
    return run(
        console, cases, "cuda", tune.clock("cuda"), _config.device_name(torch.empty(1, device="cuda")), json_file
    )


def run(console: Console, cases: list, device: str, clock: tune.Clock, name: str, json_file: Path | None) -> int:
    found: list[tune.Trial] = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("tuning", total=len(cases))
        for case in cases:
            progress.update(task, description=f"{case[0]} {str(case[1])[6:]}")
            found += tune.trials([case], device, clock)
            progress.advance(task)
    rows = tune.best(found)
    console.print(table(found, rows))
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({"device": name, "trials": [_document(t) for t in found]}, indent=1) + "\n")
        console.print(f"wrote {json_file}", highlight=False)
    if not rows:
        console.print(f"{len(found)} trials: no candidate beats a default; nothing was written")
        return 0
    file = _config.save(name, rows)
    console.print(f"wrote {len(rows)} rows to {file}", highlight=False)
    bad = tune.wrong(cases, device)
    for line in bad:
        console.print(f"[red]wrong result with this table:[/red] {line}", highlight=False)
    return 1 if bad else 0


def table(found: list[tune.Trial], rows: dict[str, _config.Config]) -> Table:
    made = Table(title="time over the default's; below 1 is faster")
    for i, head in enumerate(("kernel", "row", "default", "fastest", "share", "written", "cannot run")):
        made.add_column(head, justify="right" if i in (4, 6) else "left", overflow="fold")
    for t in found:
        fastest = min(t.shares, key=lambda c: t.shares[c])
        written = next((rows[name] for name in t.names if name in rows), None)
        made.add_row(
            t.kernel, t.row, _short(t.default), _short(fastest), f"{t.shares[fastest]:.2f}",
            _short(written) if written else "", str(len(t.failed) or ""),
        )  # fmt: skip
    return made


def _short(config: _config.Config) -> str:
    return f"{'x'.join(map(str, config.blocks))} w{config.warps} s{config.stages}"


def _document(t: tune.Trial) -> dict:
    return {
        "row": t.row, "kernel": t.kernel, "names": t.names, "default": _short(t.default),
        "ms": {_short(c): 1e3 * s for c, s in t.seconds.items()}, "failed": {_short(c): e for c, e in t.failed.items()},
    }  # fmt: skip
