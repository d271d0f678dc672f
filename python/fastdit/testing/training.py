"""Small trainings that tests and benchmarks run step by step."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdit.backends import use_backend
from fastdit.training import config as settings
from fastdit.training.config import Config
from fastdit.training.dit import DiTTask
from fastdit.training.parallel import World
from fastdit.training.trainer import Trainer
from fastdit.training.vae import VAETask

HERE = World(torch.device("cpu"))


def smoke(**loop: Any) -> Config:
    """The configuration "smoke" with other settings of both loops."""
    config = settings.load("smoke")
    vae = replace(config.vae, loop=replace(config.vae.loop, **loop))
    return replace(config, vae=vae, dit=replace(config.dit, loop=replace(config.dit.loop, **loop)))


def untrained_vae(config: Config, out: Path) -> Path:
    """A checkpoint folder whose VAE has its initial weights and the statistics of its latents."""
    task = VAETask(config, "shapes", out)
    task.model.eval()
    with torch.no_grad():
        task.prepare()
    task.export(task.model.state_dict())
    return out


def make(kind: str, config: Config, out: Path, vae: Path) -> VAETask | DiTTask:
    """The task "vae" or "dit" on the built-in shapes; the VAE of the latter comes from the folder `vae`."""
    return VAETask(config, "shapes", out) if kind == "vae" else DiTTask(config, "shapes", out, vae, HERE)


def trainer(kind: str, config: Config, folder: Path, *, dtype: torch.dtype = torch.float32) -> Trainer:
    """A trainer in this process; of a DiT, `folder` holds the VAE, an untrained one if there is none."""
    if kind == "dit" and not (folder / "config.json").exists():
        untrained_vae(config, folder)
    task = make(kind, config, folder, folder)
    task.model.to(dtype)
    part = config.vae if kind == "vae" else config.dit
    return Trainer(task, part.optimizer, part.loop, HERE)


def losses(trained: Trainer, steps: int, *, start: int = 0, backend: str | None = None) -> Tensor:
    """The loss of each step."""
    with use_backend(backend) if backend else nullcontext():
        return torch.stack([trained.step(n)["loss"] for n in range(start, start + steps)])
