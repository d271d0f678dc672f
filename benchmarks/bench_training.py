"""Steps of training per second: fastdit against plain PyTorch (eager, torch.compile), packed against padded.

    python benchmarks/bench_training.py [--model dit] [--config shapes] [--rounds 7] [--json FILE]
    pytest benchmarks/bench_training.py -s

Every contender repeats the same whole steps of a configuration: forward, backward, clipping, optimizer, average. Of a
VAE it is a step with each of its crops, and their mean as often as the training draws them, which the bar judges. They
take turns, and ratios of medians are read. Plain PyTorch is the reference backend. `padded` is what a model without
packing does: a batch padded to its longest, tallest and widest clip (attention sees the padding, which is cheaper than
a mask; the loss does not).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.functional import pad

import fastdit
from fastdit.testing import timing, training
from fastdit.testing.close import assert_close
from fastdit.training import config
from fastdit.training.dit import Denoising, Noised
from fastdit.training.trainer import Trainer
from fastdit.training.vae import VAETask

BARS = {"eager": 1.1, "padded": 1.5}
CASES = [("vae", False), ("vae", True), ("dit", False), ("dit", True)]
ALL = "all its crops"


@dataclass(frozen=True)
class Row:
    """One peer of one case; ratio = the peer's time over fastdit's."""

    model: str
    dtype: str
    work: str
    peer: str
    time_ms: float
    peer_ms: float
    note: str = ""
    judged: bool = True

    @property
    def ratio(self) -> float:
        return self.peer_ms / self.time_ms


class Padded(nn.Module):
    """A `Denoising` that works on one batch (S, C, T, h, w), padded to its largest sample along each axis."""

    def __init__(self, packed: Denoising):
        super().__init__()
        self.packed = packed

    def forward(self, batch: Noised) -> dict[str, Tensor]:
        box = [max(z.shape[axis] for z in batch.latents) for axis in (1, 2, 3)]

        def boxed(samples: list[Tensor]) -> Tensor:
            room = [[n for b, m in zip(box, z.shape[1:], strict=True) for n in (b - m, 0)][::-1] for z in samples]
            return torch.stack([pad(z, to_add) for z, to_add in zip(samples, room, strict=True)])

        inner, seen = self.packed, boxed([torch.ones_like(z[:1]) for z in batch.latents])
        text = None if inner.text is None else inner.text(batch.captions)
        losses = inner.diffusion.loss(
            lambda x, t: inner.dit(x, t, text, known_frames=batch.known), boxed(batch.latents), t=batch.t,
            noise=boxed(batch.noise), known_frames=batch.known, weight=seen,
        )  # fmt: skip
        return {"loss": losses.sum() / batch.total}


def repeated(trained: Trainer) -> dict[int, int]:
    """The steps to time, and how often each counts: one of a DiT, of a VAE the first with each crop."""
    task = trained.task
    if not isinstance(task, VAETask):
        return {0: 1}
    steps: dict[tuple[int, ...], int] = {}
    shares = Counter(task.training.crops)
    for step in count():
        (part,) = task.draw(step, 1)
        steps.setdefault(tuple(part.video.shape[2:]), step)
        if len(steps) == len(shares):
            return {step: shares[crop] for crop, step in steps.items()}
    raise AssertionError


def stepping(trained: Trainer, backend: str | None = None) -> Callable[[int], object]:
    def call(step: int) -> object:
        with fastdit.use_backend(backend) if backend else nullcontext():
            return trained.step(step)

    return call


def measure(
    kind: str, bf16: bool, folder: Path, *, name: str = "shapes", rounds: int = 7, compiled: bool = True
) -> list[Row]:
    """Asserts that one step gives the reference's loss, then times all contenders in turns."""
    settings = config.load(name)
    dit, vae = replace(settings.dit, clips=96, held_out=1), replace(settings.vae, clips=32, held_out=1)
    dit = replace(dit, loop=replace(dit.loop, bf16=bf16))
    settings = replace(settings, dit=dit, vae=replace(vae, loop=replace(vae.loop, bf16=bf16)))

    def made() -> Trainer:
        return training.trainer(kind, settings, folder)

    # In fp32, where two losses can tell; tests/test_training_loop.py holds more steps in bf16.
    plain = replace(vae.loop, bf16=False), replace(dit.loop, bf16=False)
    exact = replace(settings, vae=replace(vae, loop=plain[0]), dit=replace(dit, loop=plain[1]))
    truth, baseline, found = (
        training.losses(training.trainer(kind, exact, folder, dtype=dtype), 2, backend=backend)
        for dtype, backend in ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, None))
    )
    assert_close(found, truth, baseline, kind)

    calls = {"fastdit": stepping(made()), "eager": stepping(made(), "reference")}
    notes = {}
    if kind == "dit":
        padded = made()
        padded.forward = Padded(padded.model)
        calls["padded"] = stepping(padded)
    if compiled:
        trained = made()
        for block in trained.task.blocks:
            block.compile(dynamic=None if kind == "dit" else False)  # a VAE's crops are few
        calls["compile"] = stepping(trained, "reference")
        notes["compile"] = "its blocks"
    steps = repeated(made())
    for name, call in list(calls.items()):
        try:
            for step in steps:
                call(step)
        except Exception as error:
            if name != "compile":
                raise
            Console().print(f"{kind}: torch.compile does not run: {error}", highlight=False, markup=False)
            calls.pop(name)
    dtype = "bf16" if bf16 else "fp32"
    rows, total = [], dict.fromkeys(calls, 0.0)
    for step, share in steps.items():
        times = timing.interleaved({n: partial(c, step) for n, c in calls.items()}, rounds=rounds, repeats=1)
        for name, time in times.items():
            total[name] += share * time.ms / sum(steps.values())
        task = made().task
        (part,) = task.draw(step, 1)
        if kind == "dit":
            patch = math.prod(task.dit.patch_size)
            work = f"{len(part.latents)} clips, {sum(z[0].numel() // patch for z in part.latents):,} tokens"
            box = [max(z.shape[axis] for z in part.latents) for axis in (1, 2, 3)]
            notes["padded"] = f"{len(part.latents) * math.prod(box) // patch:,} tokens"
        else:
            work = "x".join(map(str, part.video.shape))
        ours = times.pop("fastdit").ms
        rows += [Row(kind, dtype, work, n, ours, x.ms, notes.get(n, ""), len(steps) == 1) for n, x in times.items()]
    if len(steps) > 1:
        ours = total.pop("fastdit")
        rows += [Row(kind, dtype, ALL, name, ours, ms, notes.get(name, "")) for name, ms in total.items()]
    return rows


def table(rows: list[Row]) -> Table:
    made = Table(title="training, whole steps; above 1 is faster than the peer", title_justify="left")
    for name in ("model", "dtype", "step", "against", "steps/s", "theirs", "ratio", "bar", ""):
        made.add_column(name, justify="right" if name in ("steps/s", "theirs", "ratio", "bar") else "left")
    for row in rows:
        bar = BARS.get(row.peer) if row.judged else None
        made.add_row(
            row.model, row.dtype, row.work, row.peer, f"{1e3 / row.time_ms:.2f}", f"{1e3 / row.peer_ms:.2f}",
            f"{row.ratio:.2f}", f"{bar:.1f}" if bar else "", row.note,
            style="red" if bar and row.ratio < bar else None,
        )  # fmt: skip
    return made


@pytest.mark.parametrize("kind, bf16", CASES)
def test_training(kind, bf16, tmp_path):
    timing.keep_freed_memory()
    rows = measure(kind, bf16, tmp_path, compiled=False)
    Console(width=140).print(table(rows))
    assert all(row.ratio >= BARS[row.peer] for row in rows if row.judged and row.peer in BARS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="shapes")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", metavar="FILE", type=Path)
    parser.add_argument("--model", choices=("vae", "dit"))
    parser.add_argument("--no-compile", action="store_true")
    chosen = parser.parse_args()
    timing.keep_freed_memory()
    rows = []
    for kind, bf16 in CASES:
        if chosen.model in (None, kind):
            with tempfile.TemporaryDirectory() as folder:
                rows += measure(
                    kind, bf16, Path(folder), name=chosen.config, rounds=chosen.rounds, compiled=not chosen.no_compile
                )
    Console(width=140).print(table(rows))
    if chosen.json:
        documents = [{**vars(row), "ratio": row.ratio} for row in rows]
        chosen.json.write_text(json.dumps({"threads": torch.get_num_threads(), "rows": documents}, indent=1) + "\n")


if __name__ == "__main__":
    main()
