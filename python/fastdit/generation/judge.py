"""How good is a checkpoint? `python -m fastdit.generation.judge --prompts 200`

Prompt following: clips are generated for combinations of colour, shape, motion and background that training never
showed, and `fastdit.data.detect` reads from their pixels what they show. A clip is right when colour, shape and motion
are. Reconstruction: PSNR of the VAE on rendered clips of such combinations.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from fastdit.data import Shapes, captions, to_frames, to_video
from fastdit.data.detect import Found, detect
from fastdit.data.shapes import Scene
from fastdit.models import VideoVAE
from fastdit.training import CheckpointError

from .generator import GUIDANCE, STEPS, Generator

JUDGED = ("colour", "shape", "motion")  # what has to be right
FOLLOWING, PSNR = 0.90, 30.0  # the bars
Step = Callable[[int, int], None]
app = typer.Typer()


@dataclass(frozen=True)
class Verdict:
    """A prompt, what it asked for, and what its clip shows."""

    prompt: str
    asked: Scene
    found: Found

    def right(self, *attributes: str) -> bool:
        return all(getattr(self.asked, a) == getattr(self.found, a) for a in attributes or JUDGED)


def following(
    generator: Generator,
    prompts: int = 200,
    *,
    seed: int = 0,
    sized: bool = False,
    batch: int = 10,
    progress: Step | None = None,
    **options,
) -> list[Verdict]:
    """A verdict for each of the first `prompts` held-out scenes of `seed`.

    Args:
        sized: the prompts ask for a size too, half of them for a small one; else that is left to prompt expansion.
        batch: how many at a time.   progress: called with (done, all).   options: those of `Generator.latents`.
    """
    shapes = Shapes("held_out", length=prompts, seed=seed)
    scenes = [shapes.scene(i) for i in range(prompts)]
    verdicts: list[Verdict] = []
    for start in range(0, prompts, batch):
        some = scenes[start : start + batch]
        told = [captions.short(scene, sized=sized) for scene in some]
        for scene, clip in zip(some, generator.generate(told, seed=seed + start, **options), strict=True):
            verdicts.append(Verdict(clip.caption, scene, detect(clip.frames)))
        if progress is not None:
            progress(len(verdicts), prompts)
    return verdicts


def share(verdicts: list[Verdict], *attributes: str) -> float:
    """The share of clips with these attributes right; without any, colour, shape and motion."""
    return sum(v.right(*attributes) for v in verdicts) / len(verdicts)


@torch.no_grad()
def reconstruction(vae: VideoVAE, clips: int = 50, *, seed: int = 0) -> list[float]:
    """PSNR in dB of held-out clips, each after the VAE's encoder (mean) and decoder, in bytes."""
    shapes = Shapes("held_out", length=clips, seed=seed)
    found = []
    for i in range(clips):
        frames = shapes[i].frames
        video = to_video(frames)[None].to(vae.latent_mean)
        found.append(psnr(to_frames(vae(video)[0]), frames))
    return found


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures; infinite when they are equal."""
    error = float((a.double() - b.double()).square().mean())
    return 10 * math.log10(255**2 / error) if error else math.inf


def table(verdicts: list[Verdict], sized: bool = False) -> Table:
    """One row per attribute and per value of what was asked: how many were right. `sized`: a size was asked for."""
    made = Table(title="clips with the right ...", title_justify="left")
    size = ("size",) if sized else ()
    shown = (*JUDGED, "background", *size)
    for i, name in enumerate(("asked for", "clips", *shown, "all three")):
        made.add_column(name, justify="right" if i else "left")
    groups = [("anything", verdicts)]
    for attribute in (*JUDGED, *size):
        for value in dict.fromkeys(getattr(v.asked, attribute) for v in verdicts):
            groups.append((f"{attribute} {value}", [v for v in verdicts if getattr(v.asked, attribute) == value]))
    for i, (name, some) in enumerate(groups):
        shares = [*(share(some, a) for a in shown), share(some)]
        made.add_row(name, str(len(some)), *(f"{100 * s:.0f} %" for s in shares), end_section=i == 0)
    return made


@app.command()
def main(
    prompts: Annotated[int, typer.Option(min=1, help="Held-out prompts.")] = 200,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Folder of `fastdit train`. Default: the shipped one.")
    ] = None,
    clips: Annotated[int, typer.Option(min=1, help="Held-out clips for the PSNR of the VAE.")] = 50,
    seed: Annotated[int, typer.Option(help="Of the scenes and the noise.")] = 0,
    steps: Annotated[int, typer.Option(min=1, help="Of the sampler.")] = STEPS,
    guidance: Annotated[float, typer.Option(help="Strength of classifier-free guidance.")] = GUIDANCE,
    sized: Annotated[bool, typer.Option("--sized", help="Ask for a size too, half of them small.")] = False,
    expand: Annotated[bool, typer.Option("--expand/--no-expand", help="Rewrite prompts into rich ones.")] = True,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write every verdict here.")] = None,
) -> None:
    """Judge a checkpoint; exit status 1 when it misses a bar (90 % of the clips right, 30 dB), 2 when there is none."""
    console = Console(width=None if sys.stdout.isatty() else 140)  # a file has no width to fold the table to
    try:
        generator = Generator.load(checkpoint, device=device)
    except (CheckpointError, ValueError) as error:
        console.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(2) from None
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("generating", total=prompts)
        verdicts = following(
            generator, prompts, seed=seed, sized=sized, steps=steps, guidance=guidance, expand=expand,
            progress=lambda done, _: bar.update(task, completed=done),
        )  # fmt: skip
    decibels = reconstruction(generator.vae, clips, seed=seed)
    right, mean = share(verdicts), sum(decibels) / len(decibels)
    console.print(table(verdicts, sized))
    for v in [v for v in verdicts if not v.right()][:10]:
        seen = " ".join(getattr(v.found, a) or "?" for a in JUDGED)
        console.print(f"wrong: {v.prompt!r} shows {seen} on {v.found.background}", highlight=False, style="dim")
    told = f"prompt following: {100 * right:.1f} % of {len(verdicts)} clips right; the bar is {100 * FOLLOWING:.0f} %"
    console.print(told, highlight=False)
    told = f"reconstruction: {mean:.1f} dB, the worst of {clips} clips {min(decibels):.1f} dB; the bar is {PSNR:.0f} dB"
    console.print(told, highlight=False)
    if json_file is not None:
        document = {"following": right, "psnr": decibels, "verdicts": [asdict(v) for v in verdicts]}
        json_file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    raise typer.Exit(0 if right >= FOLLOWING and mean >= PSNR else 1)


if __name__ == "__main__":
    app()
