"""Clips encoded once: latents.safetensors beside a training, made anew when its VAE or its data are others."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fastdit.data import Clip, to_video
from fastdit.models.video_vae import VideoVAE
from fastdit.training import checkpoint, source
from fastdit.training.config import Config
from fastdit.training.parallel import World

FILE = "latents.safetensors"
ENCODED = 8  # clips at a time through the VAE


@dataclass(frozen=True)
class Latents:
    """Normalised latents (C, T, h, w) of clips and the captions of each."""

    latents: list[Tensor]
    captions: list[list[str]]

    def __len__(self) -> int:
        return len(self.latents)


def encoded(
    vae: VideoVAE, digest: str, config: Config, data: str, folder: Path, world: World, console: Console
) -> tuple[Latents, Latents]:
    """The clips to train on and the held-out ones, from the file in `folder` where it is of this VAE and data.

    digest: of the VAE's file. The first process encodes, the others wait.
    """
    training, path = config.dit, folder / FILE
    made_of = {
        "vae": digest, "data": data, "clips": training.clips, "held_out": training.held_out,
        "sizes": [list(size) for size in training.sizes], "seed": training.loop.seed, "fps": config.fps,
    }  # fmt: skip
    if world.first and not _stands(path, made_of):
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {"made_of": made_of}
        for kind, count in (("train", training.clips), ("held_out", training.held_out)):
            clips: Iterable[Clip] = source.clips(
                data, training.sizes, count, fps=config.fps, held_out=kind == "held_out", seed=training.loop.seed
            )
            clips = track(
                clips, f"encoding {kind}", count, console=console, transient=True, disable=not console.is_terminal
            )
            facts[kind] = _encode(vae, clips, kind, tensors)
            if not facts[kind]:
                raise ValueError(f"train dit: no clips; got none from {data!r}, expected videos or images; look there.")
        checkpoint.write_tensors(path, tensors, facts)
    world.wait()
    tensors, facts = checkpoint.read_tensors(path)
    return _unstacked(tensors, facts["train"]), _unstacked(tensors, facts["held_out"])


def _unstacked(tensors: Mapping[str, Tensor], items: list[dict[str, Any]]) -> Latents:
    return Latents([tensors[item["of"]][item["row"]] for item in items], [item["captions"] for item in items])


def _stands(path: Path, made_of: Mapping[str, Any]) -> bool:
    try:
        return checkpoint.read_tensors(path)[1].get("made_of") == made_of
    except checkpoint.CheckpointError:
        return False


@torch.no_grad()
def _encode(vae: VideoVAE, clips: Iterable[Clip], kind: str, tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
    """Encode clips into `tensors`, stacked by size; the place and the captions of each."""
    waiting: dict[str, list[Tensor]] = {}
    done: dict[str, list[Tensor]] = {}
    found = []

    def encode(name: str) -> None:
        video = torch.stack([to_video(f) for f in waiting.pop(name)]).to(vae.latent_mean.device)
        done.setdefault(name, []).append(vae.normalize(vae.encode(video).mean).cpu())

    for clip in clips:
        name = f"{kind}.{'x'.join(map(str, clip.size))}"
        queue = waiting.setdefault(name, [])
        queue.append(clip.frames)
        row = sum(map(len, done.get(name, ()))) + len(queue) - 1
        found.append({"of": name, "row": row, "captions": clip.caption.splitlines() or [""]})
        if len(queue) == ENCODED:
            encode(name)
    for name in list(waiting):
        encode(name)
    tensors |= {name: torch.cat(z) for name, z in done.items()}
    return found
