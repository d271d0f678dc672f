"""One training on several processes, started by `torchrun`: DDP (a whole model each) or FSDP2 (a share of it each).

torchrun --nproc-per-node 2 -m fastdit train dit --vae DIR --out DIR --parallel fsdp

The processes draw the same batch and each works on its part, so that the losses are those of one process.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

MODES = ("ddp", "fsdp")


@dataclass(frozen=True)
class World:
    """This process among `size`; a single one has no mode."""

    device: torch.device
    rank: int = 0
    size: int = 1
    mode: str | None = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.size == 1:
            return value
        there = value.to(self.device, copy=True)
        dist.all_reduce(there)
        return there.to(value.device)

    def any(self, answer: bool) -> bool:
        """Whether a process says yes."""
        return bool(self.sum(torch.tensor(int(answer))))

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def join(mode: str = "ddp", device: str | None = None) -> Iterator[World]:
    """This process's place in the world that `torchrun` started; a world of one without it."""
    if mode not in MODES:
        raise ValueError(f"parallel: unknown mode; got {mode!r}, expected {' or '.join(MODES)}.")
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(torch.device(kind))
        return
    place = torch.device(kind, int(os.environ["LOCAL_RANK"])) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(place)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    try:
        yield World(place, dist.get_rank(), dist.get_world_size(), mode)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def leave(world: World) -> None:
    """End one of several processes once everything is written: torn down in order, gloo's threads may abort it."""
    if world.size > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def wrap(model: nn.Module, blocks: Sequence[nn.Module], methods: Sequence[str], world: World) -> nn.Module:
    """The model whose `forward` trains: itself, in DDP, or sharded block by block (FSDP2, in place).

    methods: what else of the model is called; sharded weights must be gathered for them too.
    """
    if world.mode == "ddp":
        return DistributedDataParallel(model)
    if world.mode == "fsdp":
        mesh = dist.init_device_mesh(world.device.type, (world.size,))
        for block in blocks:
            fully_shard(block, mesh=mesh)
        # Its own weights too are let go after a forward: an evaluation's averages must not stay gathered.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
        for name in methods:
            register_fsdp_forward_method(model, name)
    return model


def gather_gradients(model: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Gradients are exchanged in the last part of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        return model.no_sync()
    if isinstance(model, FSDPModule):
        cast(FSDPModule, model).set_requires_gradient_sync(last)
    return contextlib.nullcontext()


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """target = value, of which a sharded target keeps its share."""
    if isinstance(target, DTensor):
        target.copy_(distribute_tensor(value.to(target.device), target.device_mesh, target.placements))
    else:
        target.copy_(value)


def parts(weights: Sequence[int], count: int) -> list[list[int]]:
    """Items 0..n-1 in `count` parts of about the same weight, none empty when n >= count."""
    found: list[list[int]] = [[] for _ in range(count)]
    sums = [0] * count
    # Heaviest first, each to the lightest part.
    for item in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
        lightest = sums.index(min(sums))
        found[lightest].append(item)
        sums[lightest] += weights[item]
    return [sorted(part) for part in found]
