"""loss.csv as a picture."""

from __future__ import annotations

import csv
from pathlib import Path

from fastdit.training import checkpoint

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def read(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of every column but `step`; empty cells are left out."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = [name for name in (rows[0] if rows else ()) if name != "step"]
    return {name: [(int(r["step"]), float(r[name])) for r in rows if r[name]] for name in columns}


def draw(table: Path, picture: Path) -> None:
    """The losses over the steps on a logarithmic axis, and beside them what was evaluated (`eval_...` columns)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:  # an extra: the table is enough to train
        return
    columns = read(table)
    losses = [name for name in columns if name.endswith("loss") or name in ("l1", "l2", "kl")]
    others = [name for name in columns if name.startswith("eval_") and name not in losses]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    left = figure.add_subplot()
    left.set(xlabel="step", ylabel="loss", yscale="log", title=table.parent.name)
    left.grid(alpha=0.3)
    right = left.twinx() if others else left
    for colour, name in zip(COLOURS, losses + others, strict=False):
        axis = right if name in others else left
        points = [p for p in columns[name] if axis is right or p[1] > 0]
        if points:
            dots = "o" if name.startswith("eval_") else None
            axis.plot(*zip(*points, strict=True), color=colour, label=name, marker=dots, markersize=3, linewidth=1)
    if others:
        right.set_ylabel(", ".join(others))
    figure.legend(loc="outside lower center", ncols=6)
    checkpoint.write(picture, lambda part: figure.savefig(part, dpi=120, format="png"))
