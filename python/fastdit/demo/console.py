"""The demo on the terminal: a progress bar while it runs, tables when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import layers, report, run
from .models import Plan


def show(plan: Plan, out: Path, console: Console) -> bool:
    """Runs the demo with a progress bar, prints its tables; True when every output agrees."""
    text = TextColumn("{task.description}")
    with Progress(
        SpinnerColumn(), text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task("fastdit demo", total=run.steps(plan))
        first = True

        def step(what: str) -> None:
            nonlocal first
            progress.update(task, description=f"{what:<52}", advance=0 if first else 1)
            first = False
            if not console.is_terminal:
                console.print(f"  {what}", highlight=False)

        result = run.run(plan, out, step)
        progress.update(task, completed=progress.tasks[0].total, description=f"{'done':<52}")
    console.print(_summary(result["models"]))
    for entry in result["models"]:
        console.print(f"\n[bold]{entry['name']}, {entry['dtype']}[/bold]  {entry['detail']}", highlight=False)
        console.print(report.agreement(entry), style="dim", highlight=False)
        console.print(_groups(entry))
        console.print(_layers(entry))
    clip = result["clip"]
    console.print(
        f"clip: {clip['frames']} frames of MP4, read back at {clip['psnr_db']:.1f} dB PSNR; "
        f"{result['seconds']:.0f} s in all"
    )
    console.print(report.generation(result["generation"]), highlight=False)
    console.print(f"wrote {out / 'report.html'} and {out / 'report.json'}")
    if not result["agree"]:
        console.print("[bold red]the outputs do not agree[/bold red]")
    return bool(result["agree"])


def _summary(entries: list[dict[str, Any]]) -> Table:
    table = Table(title="the same model, as it is and after fastdit.accelerate(model)")
    for i, name in enumerate(report.HEADER):
        table.add_column(name, justify="left" if i < 2 else "right", style="bold green" if name == "speed-up" else None)
    for entry in entries:
        table.add_row(entry["name"], entry["dtype"], *report.figures(entry))
    return table


def _groups(entry: dict[str, Any]) -> Table:
    table = Table("where the time goes, ms", box=None)
    for name in ("as it is", "accelerated", "speed-up"):
        table.add_column(name, justify="right")
    for g in entry["groups"]:
        ratio = f"{g['speedup']:.2f}x" if g["speedup"] else ""
        table.add_row(g["group"], f"{g['eager_ms']:.1f}", f"{g['fastdit_ms']:.1f}", ratio)
    return table


def _layers(entry: dict[str, Any]) -> Table:
    table = Table("layer", "count", "what became of it", box=None)
    for row in layers.rows(entry["layers"]):
        table.add_row(*(str(cell) for cell in row))
    return table
