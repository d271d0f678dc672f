"""The training loop: AdamW on a task's batches, an average of the weights, log lines, checkpoints, and going on after a kill.

Every draw is seeded by (seed, step), so a step is the same in every run: after a kill the loss curve goes on as it
would have. Files under `folder`: loss.csv, loss.png and train.safetensors, from which `resume` starts.
"""

from __future__ import annotations

import csv
import math
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from fastdit.training import checkpoint, config as settings, parallel, plot
from fastdit.training.config import Loop, Optimizer
from fastdit.training.ema import EMA

STATE = "train.safetensors"
Figures = dict[str, Tensor]


class Task(Protocol):
    """What is trained: `model(part)` gives {"loss": ..., ...}, numbers that add up to the step's over its parts."""

    name: str
    model: nn.Module
    blocks: Sequence[nn.Module]  # sharded one by one
    methods: Sequence[str]  # of the model, called besides `forward`
    figures: Sequence[str]  # what the model gives
    evaluations: Sequence[str]  # what `evaluate` gives

    def draw(self, step: int, count: int) -> list[Any]:
        """The batch of a step in `count` parts."""

    def checkpoint_activations(self) -> None:
        """Compute activations again in the backward pass."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data. The model holds the averaged weights; every process calls it."""

    def prepare(self) -> None:
        """Called before an export with the averaged weights in the model, by every process."""

    def export(self, weights: Mapping[str, Tensor]) -> None:
        """Write what generation needs."""

    def facts(self) -> dict[str, Any]:
        """What must be the same when a training goes on: {name: value of JSON's types}."""


def rate(step: int, optimizer: Optimizer, steps: int) -> float:
    """The learning rate of a step, counted from 0."""
    if step < optimizer.warmup:
        return optimizer.lr * (step + 1) / optimizer.warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    done = min(1.0, (step - optimizer.warmup) / max(1, steps - optimizer.warmup))
    return optimizer.lr * (optimizer.final + (1 - optimizer.final) * 0.5 * (1 + math.cos(math.pi * done)))


def generator(seed: int, step: int) -> torch.Generator:
    """The source of all random numbers of a step."""
    return torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)


class Trainer:
    """The model, its optimiser and its average: `step(n)` trains, `state` and `load` are the whole memory."""

    def __init__(self, task: Task, optimizer: Optimizer, loop: Loop, world: parallel.World):
        self.task, self.optimizer, self.loop, self.world = task, optimizer, loop, world
        self.model = task.model.to(world.device).train()
        if loop.checkpointing:
            task.checkpoint_activations()
        self.forward = parallel.wrap(self.model, task.blocks, task.methods, world)
        self.named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self.adamw = torch.optim.AdamW(
            self.named.values(), lr=optimizer.lr, betas=optimizer.betas, eps=optimizer.eps,
            weight_decay=optimizer.weight_decay, fused=True,
        )  # fmt: skip
        self.ema = EMA(self.model, optimizer.ema)

    def step(self, step: int) -> Figures:
        """Train on the batch of a step; its figures as this process saw them, and `lr`, `grad_norm`."""
        lr = rate(step, self.optimizer, self.loop.steps)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.zero_grad(set_to_none=True)
        each = self.loop.accumulate
        parts = self.task.draw(step, self.world.size * each)[self.world.rank * each :][:each]
        sums: Figures = {}
        for i, part in enumerate(parts):
            with parallel.gather_gradients(self.forward, last=i == len(parts) - 1):
                with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.loop.bf16):
                    figures = self.forward(part)
                (figures["loss"] * self.world.size).backward()  # processes average their gradients
            for name, value in figures.items():
                sums[name] = sums.get(name, 0) + value.detach()  # type: ignore[assignment]
        largest = self.optimizer.clip or math.inf
        norm = parallel.whole(nn.utils.clip_grad_norm_(self.named.values(), largest, foreach=True))
        self.adamw.step()
        self.ema.update(step)
        # Every process sees the norm and the rate of all: their sum over the processes is to be the value.
        return sums | {"grad_norm": norm / self.world.size, "lr": torch.tensor(lr / self.world.size)}

    def state(self) -> dict[str, Tensor]:
        """Weights, averages and moments by name, whole; every process must ask."""
        found = {f"buffer.{name}": b for name, b in self.model.named_buffers()}
        for name, p in self.named.items():
            moments = self.adamw.state[p]
            kept = {"model": p, "ema": self.ema.shadow[name], **{k: moments[k] for k in ("exp_avg", "exp_avg_sq")}}
            found |= {f"{kind}.{name}": parallel.whole(t.detach()) for kind, t in kept.items()}
        return found

    def load(self, tensors: Mapping[str, Tensor], step: int, path: Path) -> None:
        """Go on from a `state` after `step` steps."""
        wanted = {f"{kind}.{name}" for name in self.named for kind in ("model", "ema", "exp_avg", "exp_avg_sq")}
        wanted |= {f"buffer.{name}" for name, _ in self.model.named_buffers()}
        shapes = {f"model.{name}": p.shape for name, p in self.named.items()}
        if wanted != tensors.keys() or any(tensors[name].shape != shape for name, shape in shapes.items()):
            raise checkpoint.CheckpointError(
                f"checkpoint: {path} is of another model; got {len(tensors)} tensors, expected {len(wanted)} of this "
                "model's names and shapes; pass the configuration it was made with, or another --out."
            )
        for name, b in self.model.named_buffers():
            parallel.assign(b, tensors[f"buffer.{name}"])
        for name, p in self.named.items():
            count = torch.tensor(float(step), device=p.device)
            moments = {k: torch.zeros_like(p) for k in ("exp_avg", "exp_avg_sq")}
            for target, kind in ((p, "model"), (self.ema.shadow[name], "ema"), *((m, k) for k, m in moments.items())):
                parallel.assign(target, tensors[f"{kind}.{name}"])
            self.adamw.state[p] = {"step": count, **moments}

    def weights(self) -> dict[str, Tensor]:
        """What is kept for generation: the averages, and the buffers; every process must ask."""
        averages = {name: parallel.whole(t) for name, t in self.ema.shadow.items()}
        return averages | dict(self.model.named_buffers())


class Log:
    """loss.csv: a row per `log_every` steps, with the means since the row before. Lives in the first process only."""

    def __init__(self, path: Path, columns: Sequence[str], step: int):
        self.path, self.columns = path, columns
        rows = []
        if step and path.exists():
            with path.open(newline="", encoding="utf-8") as file:  # a kill may have torn the last row
                rows = [row for row in csv.DictReader(file) if (row["step"] or "").isdigit() and int(row["step"]) <= step]
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
    log = Log(folder / "loss.csv", ["step", *names, "steps_per_second", *task.evaluations], step) if world.first else None
    sums = torch.tensor([window.get(name, 0.0) for name in ("steps", *names)], dtype=torch.float64)
    if world.rank:
        sums.zero_()
    row: dict[str, float] = {}
    saved = since = time.monotonic()
    since_step = step
    with ExitStack() as stack:
        stop = stack.enter_context(_Stop())
        progress = stack.enter_context(_progress(console))
        bar = progress.add_task(task.name, total=loop.steps, completed=step, figures="")
        while step < loop.steps and not stop.asked(world):
            figures = trainer.step(step)
            step += 1
            sums += torch.stack([torch.tensor(1.0 / world.size, dtype=torch.float64), *(figures[n].double().cpu() for n in names)])
            progress.update(bar, completed=step)
            logs = step == loop.steps or (loop.log_every and step % loop.log_every == 0)
            evaluates = step == loop.steps or (loop.evaluate_every and step % loop.evaluate_every == 0)
            if logs or evaluates:
                count, *totals = world.sum(sums).tolist()
                row = {name: total / count for name, total in zip(names, totals, strict=True)}
                sums.zero_()
                if not math.isfinite(row["loss"] + row["grad_norm"]):
                    raise FloatingPointError(
                        f"{task.name}: the loss is not finite; got loss {row['loss']}, gradient {row['grad_norm']} by step "
                        f"{step}, expected numbers; lower the rate or its warm-up, and go on with --resume."
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
            late = world.agree(logs and time.monotonic() - saved > 60 * loop.save_minutes > 0) if logs else False
            if late or (loop.save_every and step % loop.save_every == 0 and step < loop.steps):
                save(trainer, folder, step, names, sums)
                saved = time.monotonic()
        save(trainer, folder, step, names, sums)
        stopped = step < loop.steps
    console.print(f"{task.name} {'stopped, go on with --resume:' if stopped else 'done:'} step {step}, {path}", highlight=False)
    return row


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
        facts = {"task": task.name, "step": step, "window": dict(zip(("steps", *names), window, strict=True)), **task.facts()}
        checkpoint.write_tensors(folder / STATE, tensors, facts)
        task.export(weights)
        plot.draw(folder / "loss.csv", folder / "loss.png")
    world.wait()


def _fresh(path: Path) -> tuple[int, dict[str, float]]:
    if path.exists():
        raise checkpoint.CheckpointError(
            f"train: {path.parent} holds a training already; got no --resume, expected a new --out or --resume to go on."
        )
    return 0, {}


def _resume(trainer: Trainer, path: Path, console: Console) -> tuple[int, dict[str, float]]:
    """The step to go on from and the running means of the next row; loads the trainer."""
    tensors, facts = checkpoint.read_tensors(path)
    task = trainer.task
    for name, value in {"task": task.name, **task.facts()}.items():
        if facts.get(name) != value and name != "config":
            raise checkpoint.CheckpointError(
                f"train: {path} is of another {name}; got {facts.get(name)}, expected {value}; pass the same as before, "
                "or another --out."
            )
    trainer.load(tensors, facts["step"], path)
    for change in settings.changes(facts.get("config", {}), task.facts().get("config", {})):
        console.print(f"{task.name}: changed since the checkpoint: {change}", highlight=False)
    console.print(f"{task.name}: going on from step {facts['step']} of {path}", highlight=False)
    return facts["step"], facts["window"]


def _progress(console: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    return Progress(*columns, TextColumn("{task.fields[figures]}"), console=console, transient=True, disable=not console.is_terminal)


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

    def asked(self, world: parallel.World) -> bool:
        return self.wanted if world.size == 1 else False
