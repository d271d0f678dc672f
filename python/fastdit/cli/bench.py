"""`fastdit bench`: rows on the terminal as they are measured, then JSON and HTML."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fastdit
from fastdit.testing import bars, bench, machine, page, timing, whole
from fastdit.testing.whole import Whole
from fastdit.testing.workloads import Workload

HEADER = ("op", "workload", "backend", "ms p50 (p20-p80)", "rate", "% ceiling", "x eager", "x compile", "x best peer",
          "error share")  # fmt: skip
WORDS = 3  # the first columns hold words


def show(
    console: Console,
    *,
    suite: str | None,
    op: str | None,
    model: str | None,
    passes: tuple[str, ...],
    rounds: int | None,
    compiled: bool,
    json_file: Path | None,
    html_file: Path | None,
    budget: float | None = None,
) -> int:
    """0 when every row was right; 1 when one was wrong; 2 for a request that cannot be served."""
    suite = suite or ("gpu" if torch.cuda.is_available() else "cpu")
    chosen = _rows(op, model, suite, passes) if suite in bench.SUITES else []
    if not chosen or any(p not in bench.PASSES for p in passes) or (suite == "gpu" and not torch.cuda.is_available()):
        gpu = "" if suite != "gpu" or torch.cuda.is_available() else "; torch sees no GPU here"
        console.print(
            f"bench: nothing to measure; got --suite {suite} --op {op} --model {model} --pass {' '.join(passes)}, "
            f"expected a suite of {', '.join(bench.SUITES)}, a pass of {', '.join(bench.PASSES)} and an op of "
            f"{', '.join(dict.fromkeys(w.op for w, _, _ in _rows(None, None, 'cpu', bench.PASSES)))}{gpu}."
        )
        return 2
    settings = bench.Settings.of(suite, passes)
    settings = replace(settings, rounds=rounds or settings.rounds, compiled=compiled and settings.compiled)
    timing.keep_freed_memory(2**26 if suite == "smoke" else 2**30)
    ceilings = bench.ceilings(settings.device, quick=suite == "smoke")
    measured, wrong, late, began = [], [], [], time.monotonic()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(chosen))
        for row, dtype, pass_ in chosen:
            progress.update(task, description=f"{row.op} {row.model} {str(dtype)[6:]} {pass_}")
            if budget is not None and time.monotonic() - began > budget:
                late.append(f"{row} {pass_}")
                continue
            try:
                if isinstance(row, whole.Whole):
                    measured.append(whole.measure(row, dtype, settings))
                else:
                    measured.append(bench.measure(row, dtype, settings, pass_))
            except Exception as error:  # wrong, out of memory, no build: the rows before and behind it are kept
                kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
                wrong.append(f"{row} {dtype} {pass_}: {kind}{error}")
            progress.advance(task)
    judged = bars.judge(measured)
    console.print(table(measured))
    if judged:
        console.print(bar_table(judged))
    console.print(f"ceilings: {', '.join(f'{k} {v:.0f}' for k, v in ceilings.items())}", highlight=False)
    for m in measured:
        for peer, why in m.skipped.items():
            console.print(f"not timed: {peer} for {m.workload} {m.dtype}: {why}", style="dim", highlight=False)
    if late:
        console.print(f"not measured within {budget:.0f} s: {', '.join(late)}", highlight=False)
    for line in wrong:
        console.print(f"[red]wrong or failed, not timed:[/red] {line}", highlight=False)
    _write(console, measured, settings.device, ceilings, json_file, html_file)
    return 1 if wrong else 0


def _rows(
    op: str | None, model: str | None, suite: str, passes: tuple[str, ...]
) -> list[tuple[Workload | Whole, torch.dtype, str]]:
    """What is measured: the ops in every pass, and each whole model in its own."""
    rows: list[tuple[Workload | Whole, torch.dtype, str]] = []
    rows += [(w, dtype, pass_) for w, dtype in bench.cases(op, suite) for pass_ in passes]
    if suite == "gpu":  # what a time limit cuts off is the backward
        rows.sort(key=lambda row: (*passes, *bench.PASSES).index(row[2]))
    rows += [(w, dtype, w.pass_) for w, dtype in whole.cases(op, suite) if w.pass_ in passes or op == whole.OP]
    return [row for row in rows if model is None or model.lower() in row[0].model.lower()]


def cells(m: bench.Measured) -> tuple[str, ...]:
    rate, unit = m.rate
    best = m.best_peer

    def times(peer: str | None) -> str:
        return f"{m.ratio(peer):.2f}" if peer in m.peers else ""

    p20, p50, p80 = (f"{1e3 * seconds:.3g}" for seconds in (m.ours.p20, m.ours.p50, m.ours.p80))
    return (
        m.workload.op,
        f"{m.workload.model} {str(m.dtype).removeprefix('torch.')} {m.pass_}",
        m.backend,
        f"{p50} ({p20}-{p80})",
        f"{rate:.0f} {unit}",
        f"{m.pct_ceiling:.0f} {m.ceiling}",
        times("eager"),
        times("compile"),
        f"{times(best)} {best}" if best else "",
        f"{m.err_ratio:.2f}",
    )


def table(measured: list[bench.Measured]) -> Table:
    result = Table(title="above 1 is faster than the peer; ceiling: copy of the same bytes, or torch's GEMM")
    for i, name in enumerate(HEADER):
        result.add_column(name, justify="left" if i < WORDS else "right", overflow="fold", no_wrap=i == 0)
    for m in measured:
        result.add_row(*cells(m))
    return result


def bar_table(judged: list[bars.Verdict]) -> Table:
    missed = sum(not v.met for v in judged)
    result = Table(title=f"bars: {len(judged) - missed} met, {missed} missed")
    for name in ("op", "pass", "against", "bar", "lowest", "median", "rows under it"):
        result.add_column(name, justify="right" if name in ("bar", "lowest", "median") else "left", overflow="fold")
    for v in judged:
        result.add_row(
            v.bar.op, f"{v.bar.pass_} {v.bar.dtype or ''}", v.bar.against, f"{v.bar.at_least:.2f}", f"{v.lowest:.2f}",
            f"{v.median:.2f}", ", ".join(f"{name} {ratio:.2f}" for name, ratio in v.under),
            style=None if v.met else "red",
        )  # fmt: skip
    return result


def _write(
    console: Console,
    measured: list[bench.Measured],
    device: str,
    ceilings: dict[str, float],
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    if json_file is not None:
        path = _results(device) if str(json_file) == "auto" else json_file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(bench.document(measured, device, ceilings), indent=1) + "\n", encoding="utf-8")
        console.print(f"wrote {path}", highlight=False)
    if html_file is not None:
        facts = ", ".join(f"{key} {value}" for key, value in machine.describe(device).items())
        page.write(
            html_file, "fastdit bench", page.tag("h1", "fastdit bench"), page.tag("p", facts, class_="note"),
            page.png(_plot(measured), "times faster than each peer"),
            page.table(HEADER, [cells(m) for m in measured], text=range(WORDS)),
        )  # fmt: skip
        console.print(f"wrote {html_file}", highlight=False)


def _results(device: str) -> Path:
    """benchmarks/results/<machine>/<date>-<version>.json, or below FASTDIT_RESULTS."""
    return machine.results(device) / f"{time.strftime('%Y-%m-%d')}-{fastdit.__version__}.json"


def _plot(measured: list[bench.Measured]):
    pyplot = page.plots()
    figure, ax = pyplot.subplots(figsize=(9, 0.8 + 0.32 * len(measured)))
    labels = [f"{m.workload.op}\n{m.workload.model}, {str(m.dtype)[6:]}, {m.pass_}" for m in measured]
    peers = sorted({peer for m in measured for peer in m.peers})
    for i, peer in enumerate(peers):
        places = [j for j, m in enumerate(measured) if peer in m.peers]
        ax.plot([measured[j].ratio(peer) for j in places], places, "o", color=f"C{i}", label=peer)
    ax.axvline(1, color="#999", lw=1)
    ax.set_xscale("log")
    ax.set_yticks(range(len(labels)), labels, fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel("peer's time / fastdit's time")
    ax.legend(fontsize=8, ncols=4)
    ax.spines[["top", "right"]].set_visible(False)
    return figure
