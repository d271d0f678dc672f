"""`fastdit aot`: the report of the ahead-of-time builds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import triton
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fastdit.testing import aot, sass

COLUMNS = ("kernel", "specialisation", "sm", "regs", "spill", "stack", "shared", "warps/SM", "wgmma", "mma", "TMA",
           "loads B x n", "stores B x n", ">=16 B")  # fmt: skip
WORDS = 2  # the first columns hold words


def show(
    console: Console,
    *,
    text: str | None,
    arches: tuple[int, ...],
    dtypes: tuple[str, ...],
    passes: tuple[str, ...],
    quick: bool,
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
    reports, refused = aot.collect(arches, [aot.DTYPES[name] for name in dtypes], passes, text, quick)
    if not reports:
        console.print(f"aot: no op with {text or 'any name'} in its name launches a Triton kernel.", highlight=False)
        return 2
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task(f"compiling {len(reports)} builds", total=len(reports))
        aot.build_all(reports, jobs or len(os.sched_getaffinity(0)), lambda: progress.advance(task))
    reports.sort(key=lambda r: (r.build.module, r.build.kernel, r.build.label, r.build.arch))
    console.print(table(reports))
    for line in refused:
        console.print(f"refused: {line}", style="dim", highlight=False)
    bad = [r for r in reports if r.problems]
    for r in bad:
        where = f"{r.build.kernel} sm_{r.build.arch} of {r.rows[0]}"
        console.print(f"[red]{where}[/red]: {'; '.join(r.problems)}", highlight=False, soft_wrap=True)
    kernels = len({(r.build.module, r.build.kernel) for r in reports})
    console.print(f"{len(reports)} builds of {kernels} kernels, {len(bad)} with a problem", highlight=False)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        document = {"triton": triton.__version__, "builds": [r.document() for r in reports], "refused": refused}
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {json_file}", highlight=False)
    return 1 if bad else 0


def table(reports: list[aot.Report]) -> Table:
    made = Table(title=f"triton {triton.__version__}; built, never run: no figure here is a speed")
    for i, name in enumerate(COLUMNS):
        made.add_column(name, justify="left" if i < WORDS else "right", overflow="fold", no_wrap=i == 0)
    for r in reports:
        made.add_row(r.build.kernel, r.build.label, *_cells(r), style="red" if r.problems else None)
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
