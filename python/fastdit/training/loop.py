"""The training loop: steps, log lines, checkpoints, and going on after a kill as if there had been none.

Files under `folder`: loss.csv, loss.png and train.safetensors, from which `resume` starts.
"""

from __future__ import annotations

import csv
import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fastdit.training import checkpoint, config as settings, parallel, plot
from fastdit.training.config import Loop, Optimizer
from fastdit.training.trainer import Task, Trainer

STATE = "train.safetensors"


class Log:
    """loss.csv: a row per `log_every` steps, with the means since the row before. Lives in the first process only."""

    def __init__(self, path: Path, columns: Sequence[str], step: int):
        self.path, self.columns = path, columns
        rows = []
        if step and path.exists():
            with path.open(newline="", encoding="utf-8") as file:  # a kill may have torn the last row
                every = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit()]
            rows = [row for row in every if int(row["step"]) <= step and None not in row.values()]
        checkpoint.write(path, lambda part: self._write(part, rows))

    def _write(self, path: Path, rows: list[dict[str, Any]]) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)

    def add(self, row: Mapping[str, float | int]) -> None:
        with checkpoint.writing(self.path), self.path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, self.columns).writerow(row)


def fit(
    task: Task,
    optimizer: Optimizer,
    loop: Loop,
    folder: Path,
    world: parallel.World,
    *,
    resume: bool = False,
    console: Console | None = None,
) -> dict[str, float]:
    """Train a task to `loop.steps` steps; the last row of loss.csv. SIGINT and SIGTERM save a checkpoint first.

    Raises:
        CheckpointError: nothing to go on from, or of something else; a file cannot be written.
        FloatingPointError: the loss is not finite; the last checkpoint stands.
    """
    console = console or Console(quiet=True)
    if not world.first:
        console = Console(quiet=True)
    path = folder / STATE
    trainer = Trainer(task, optimizer, loop, world)
    step, window = _resume(trainer, path, console) if resume else _fresh(path)
    names = [*task.figures, "grad_norm", "lr"]
    columns = ["step", *names, "steps_per_second", *task.evaluations]
    log = Log(folder / "loss.csv", columns, step) if world.first else None
    # Steps and figures since the last row; their sums over the processes are the step's.
    begun = [window.get(name, 0.0) * world.first for name in ("steps", *names)]
    sums = torch.tensor(begun, dtype=torch.float64, device=world.device)
    row: dict[str, float] = {}
    saved = since = time.monotonic()
    since_step = step
    with ExitStack() as stack:
        stop = stack.enter_context(_Stop())
        progress = stack.enter_context(_progress(console))
        bar = progress.add_task(task.name, total=loop.steps, completed=step, figures="")
        while step < loop.steps:
            figures = trainer.step(step)
            step += 1
            sums += torch.stack([sums.new_tensor(1 / world.size), *(figures[name].double() for name in names)])
            progress.update(bar, completed=step)
            evaluates = _due(step, loop.evaluate_every, loop)
            logs = evaluates or _due(step, loop.log_every, loop)
            if logs:
                count, *totals = world.sum(sums).tolist()
                row = {name: total / count for name, total in zip(names, totals, strict=True)}
                sums.zero_()
                if not math.isfinite(row["loss"] + row["grad_norm"]):
                    raise FloatingPointError(
                        f"{task.name}: the loss is not finite; got loss {row['loss']}, gradient {row['grad_norm']} by "
                        f"step {step}, expected numbers; lower the rate, or warm it up longer, and --resume."
                    )
                now = time.monotonic()
                row |= {"steps_per_second": (step - since_step) / (now - since)}
                if evaluates:
                    with trainer.ema.applied():
                        row |= evaluated(task)
                since, since_step = time.monotonic(), step
                text = "  ".join(f"{name} {value:.4g}" for name, value in row.items())
                progress.update(bar, figures=f"loss {row['loss']:.4g}")
                progress.console.print(f"{task.name} step {step}/{loop.steps}  {text}", highlight=False, soft_wrap=True)
                if log is not None:
                    log.add({"step": step, **row})
            if step == loop.steps or stop.asked(world, logs):
                break
            late = logs and world.any(world.first and time.monotonic() - saved > 60 * loop.save_minutes > 0)
            if late or _due(step, loop.save_every, loop):
                save(trainer, folder, step, names, sums)
                saved = time.monotonic()
        save(trainer, folder, step, names, sums)
    how = "done" if step == loop.steps else "stopped, go on with --resume"
    console.print(f"{task.name} {how}: step {step}, {path}", highlight=False, soft_wrap=True)
    return row


def _due(step: int, every: int, loop: Loop) -> bool:
    return step == loop.steps or (every > 0 and step % every == 0)


def evaluated(task: Task) -> dict[str, float]:
    """A task's figures on held-out data, its model in eval mode."""
    task.model.eval()
    with torch.no_grad():
        found = task.evaluate()
    task.model.train()
    return found


def save(trainer: Trainer, folder: Path, step: int, names: Sequence[str], sums: Tensor) -> None:
    """Write the state, the weights for generation and the plot; every process must call it."""
    task, world = trainer.task, trainer.world
    tensors, window = trainer.state(), world.sum(sums.clone()).tolist()
    with trainer.ema.applied(), torch.no_grad():
        trainer.model.eval()
        task.prepare()
        trainer.model.train()
    weights = trainer.weights()
    if world.first:
        since = dict(zip(("steps", *names), window, strict=True))
        facts = {"task": task.name, "step": step, "window": since, **task.facts()}
        checkpoint.write_tensors(folder / STATE, tensors, facts)
        task.export(weights)
        plot.draw(folder / "loss.csv", folder / "loss.png")
    world.wait()


def _fresh(path: Path) -> tuple[int, dict[str, float]]:
    if path.exists():
        raise checkpoint.CheckpointError(
            f"train: {path.parent} holds a training; got no --resume, expected it to go on; or pass another --out."
        )
    return 0, {}


def _resume(trainer: Trainer, path: Path, console: Console) -> tuple[int, dict[str, float]]:
    """The step to go on from and the running means of the next row; loads the trainer."""
    tensors, facts = checkpoint.read_tensors(path)
    task = trainer.task
    for name, value in {"task": task.name, **task.facts()}.items():
        if facts.get(name) != value and name != "config":
            raise checkpoint.CheckpointError(
                f"train: {path} is of another {name}; got {facts.get(name)}, expected {value}; pass the same as "
                "before, or another --out."
            )
    trainer.load(tensors, path)
    for change in settings.changes(facts.get("config", {}), task.facts().get("config", {})):
        console.print(f"{task.name}: changed since the checkpoint: {change}", highlight=False)
    console.print(f"{task.name}: going on from step {facts['step']} of {path}", highlight=False)
    return facts["step"], facts["window"]


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    figures = TextColumn("{task.fields[figures]}")
    return Progress(*columns, figures, console=console, transient=True, disable=not console.is_terminal)


class _Stop:
    """SIGINT and SIGTERM end the loop after the step at hand; a second one ends it at once."""

    def __init__(self) -> None:
        self.wanted = False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        try:
            self.before = {number: signal.signal(number, self._ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # signals belong to the main thread
            self.before = {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: object) -> None:
        self.wanted = True
        signal.signal(number, self.before[number])

    def asked(self, world: parallel.World, together: bool) -> bool:
        """Whether to stop; several processes look when they are `together`."""
        return world.any(self.wanted) if world.size == 1 or together else False
