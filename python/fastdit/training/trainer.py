"""One step of a training on the batch that a task draws, and an average of the weights.

Every draw is seeded by (seed, step), so a step is the same in every run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fastdit.training import checkpoint, parallel
from fastdit.training.config import Loop, Optimizer
from fastdit.training.ema import EMA
from fastdit.training.optimizer import Optimizers

Figures = dict[str, Tensor]


class Task(Protocol):
    """What is trained: `model(part)` gives {"loss": ..., ...}, numbers that add up to the step's over its parts."""

    @property
    def name(self) -> str: ...

    @property
    def model(self) -> nn.Module: ...

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Parts of the model that are sharded one by one."""

    @property
    def methods(self) -> Sequence[str]:
        """Of the model, called besides `forward`."""

    @property
    def figures(self) -> Sequence[str]:
        """What the model gives."""

    @property
    def evaluations(self) -> Sequence[str]:
        """What `evaluate` gives."""

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
        self.optimizers = Optimizers(self.named, task.blocks, optimizer)
        self.ema = EMA(self.model, optimizer.ema)

    def step(self, step: int) -> Figures:
        """Train on the batch of a step; its figures as this process saw them, and `lr`, `grad_norm`."""
        lr = rate(step, self.optimizer, self.loop.steps)
        self.optimizers.zero_grad()
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
        self.optimizers.step(lr)
        self.ema.update(step)
        # Every process sees the norm and the rate of all: their sum over the processes is to be the value.
        return sums | {"grad_norm": norm / self.world.size, "lr": norm.new_tensor(lr / self.world.size)}

    def state(self) -> dict[str, Tensor]:
        """Weights, averages and moments by name, whole; every process must ask."""
        found = {f"buffer.{name}": b for name, b in self.model.named_buffers()}
        for name in self.named:
            found |= {f"{kind}.{name}": parallel.whole(t.detach()) for kind, t in self._kept(name).items()}
        return found

    def load(self, tensors: Mapping[str, Tensor], path: Path) -> None:
        """Go on from a `state`, read from `path`."""
        wanted = {f"{kind}.{name}" for name in self.named for kind in self._kept(name)}
        wanted |= {f"buffer.{name}" for name, _ in self.model.named_buffers()}
        shapes = {f"model.{name}": p.shape for name, p in self.named.items()}
        if wanted != tensors.keys() or any(tensors[name].shape != shape for name, shape in shapes.items()):
            raise checkpoint.CheckpointError(
                f"checkpoint: {path} is of another model; got {len(tensors)} tensors, expected {len(wanted)} of this "
                "model's names and shapes; pass the configuration it was made with, or another --out."
            )
        for name, b in self.model.named_buffers():
            parallel.assign(b, tensors[f"buffer.{name}"])
        for name in self.named:
            for kind, target in self._kept(name).items():
                parallel.assign(target, tensors[f"{kind}.{name}"])

    def _kept(self, name: str) -> dict[str, Tensor]:
        """All that is known of a parameter."""
        return {"model": self.named[name], "ema": self.ema.shadow[name], **self.optimizers.kept(name)}

    def weights(self) -> dict[str, Tensor]:
        """What is kept for generation: the averages, and the buffers; every process must ask."""
        averages = {name: parallel.whole(t) for name, t in self.ema.shadow.items()}
        return averages | dict(self.model.named_buffers())
