"""`fastdit aot`: the report of the ahead-of-time builds."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import triton
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastdit.testing import aot, sass

COLUMNS = ("specialisation", "sm", "regs", "spill", "stack", "shared", "warps", "wgmma", "mma", "TMA", "loads",
           "stores", ">=16 B")  # fmt: skip


def show(
    console: Console,
    *,
    text: str | None,
    arches: tuple[int, ...],
    dtypes: tuple[str, ...],
    passes: tuple[str, ...],
    quick: bool,
    samples: bool,
    jobs: int | None,
    json_file: Path | None,
) -> int:
    """0 when no build has a problem; 1 when one has; 2 for a request that cannot be served."""
    arches, dtypes, passes = arches or aot.ARCHES, dtypes or tuple(aot.DTYPES), passes or aot.PASSES
    if set(arches) - set(aot.ARCHES) or set(dtypes) - set(aot.DTYPES) or set(passes) - set(aot.PASSES):
        console.print(
            f"aot: got --arch {arches} --dtype {dtypes} --pass {passes}, expected some of {aot.ARCHES}, "
            f"{tuple(aot.DTYPES)}, {aot.PASSES}.",
            highlight=False,
        )
        return 2
    reports, refused = aot.collect(arches, [aot.DTYPES[name] for name in dtypes], passes, text, quick, samples)
    if not reports:
        console.print(f"aot: no op with {text or 'any name'} in its name launches a Triton kernel.", highlight=False)
        return 2
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"compiling {len(reports)} builds", total=len(reports))
        aot.build_all(reports, jobs or len(os.sched_getaffinity(0)), lambda: progress.advance(task))
    reports.sort(key=lambda r: (r.build.module, r.build.kernel, r.build.label, r.build.arch))
    console.print(f"triton {triton.__version__}; built, never run: no figure here is a speed", highlight=False)
    for _, group in itertools.groupby(reports, lambda r: (r.build.module, r.build.kernel)):
        console.print(table(list(group)))
    for line in refused:
        console.print(f"refused: {line}", style="dim", highlight=False)
    bad = [r for r in reports if r.problems]
    alike: dict[str, list[aot.Report]] = {}
    for r in bad:
        alike.setdefault(f"[red]{r.build.kernel} sm_{r.build.arch}[/red]: {'; '.join(r.problems)}", []).append(r)
    for line, those in alike.items():
        rows = list(dict.fromkeys(row for r in those for row in r.rows))
        more = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        console.print(f"{line}; launched by {rows[0]}{more}", highlight=False, soft_wrap=True)
    kernels = len({(r.build.module, r.build.kernel) for r in reports})
    console.print(f"{len(reports)} builds of {kernels} kernels, {len(bad)} with a problem", highlight=False)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        document = {"triton": triton.__version__, "builds": [r.document() for r in reports], "refused": refused}
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {json_file}", highlight=False)
    return 1 if bad else 0


def table(reports: list[aot.Report]) -> Table:
    """The builds of one kernel; what all of them share stands in the title."""
    first = reports[0].build
    shared = set.intersection(*(set(r.build.facts) for r in reports))
    title = f"{first.kernel} ({first.kind}) {' '.join(fact for fact in first.facts if fact in shared)}"
    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, name in enumerate(COLUMNS):
        made.add_column(name, justify="right" if i else "left", overflow="fold", no_wrap=i > 0)
    told = ""
    for r in reports:
        label = " ".join(fact for fact in r.build.facts if fact not in shared)
        made.add_row("" if label == told else label, *_cells(r), style="red" if r.problems else None)
        told = label
    return made


def _cells(r: aot.Report) -> list[str]:
    u = r.usage
    if u is None:
        return [str(r.build.arch)]
    wide = min(sass.share(u.loads), sass.share(u.stores))
    numbers = (r.build.arch, u.registers, u.spill, u.stack, u.shared, u.warps_per_sm, u.wgmma, u.mma, u.tma)
    return [*map(str, numbers), _widths(u.loads), _widths(u.stores), f"{100 * wide:.0f} %"]


def _widths(accesses: dict[int, int]) -> str:
    return " ".join(f"{size}x{count}" for size, count in sorted(accesses.items(), reverse=True))
