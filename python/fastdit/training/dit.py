"""`fastdit train dit`: the video diffusion transformer on packed latents of mixed sizes, and its text encoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from fastdit.data import WORDS
from fastdit.diffusion import gaussian_noise
from fastdit.models.text import WORD, PretrainedEncoder, WordEncoder
from fastdit.models.video_dit import VideoDiT
from fastdit.training import checkpoint, config as settings, latents, parallel, source
from fastdit.training.config import Config
from fastdit.training.trainer import generator

EVALUATED = 8  # samples at a time


@dataclass(frozen=True)
class Noised:
    """A part of a step's batch: latents (C, T, h, w) of any sizes, their noise and time t (S,), what they show, the
    latent frames that are given, and the samples of the whole step."""

    latents: list[Tensor]
    noise: list[Tensor]
    t: Tensor
    captions: list[str]
    known: list[int]
    total: int

    def to(self, like: Tensor) -> Noised:
        """On the device and in the dtype of a model's weights; whole timesteps stay integers."""
        latents, noise = ([x.to(like) for x in some] for some in (self.latents, self.noise))
        t = self.t.to(like if self.t.is_floating_point() else like.device)
        return replace(self, latents=latents, noise=noise, t=t)

    def part(self, items: list[int]) -> Noised:
        """Some of the samples."""
        latents, noise = ([samples[i] for i in items] for samples in (self.latents, self.noise))
        captions, known = [self.captions[i] for i in items], [self.known[i] for i in items]
        return Noised(latents, noise, self.t[items], captions, known, self.total)


class Denoising(nn.Module):
    """loss = the mean over samples, of any size, of each one's mean squared error over its values."""

    def __init__(self, dit: VideoDiT, text: nn.Module | None, diffusion: settings.Diffusion):
        super().__init__()
        self.dit, self.text, self.diffusion = dit, text, diffusion.build()

    def forward(self, batch: Noised) -> dict[str, Tensor]:
        text = None if self.text is None else self.text(batch.captions)

        def model(x: Any, t: Tensor) -> Any:
            return self.dit(x, t, text, known_frames=batch.known)

        losses = self.diffusion.loss(model, batch.latents, t=batch.t, noise=batch.noise, known_frames=batch.known)
        return {"loss": losses.sum() / batch.total}


class DiTTask:
    """What `loop.fit` trains; see `loop.Task`."""

    name = "dit"
    figures = ("loss",)
    evaluations = ("eval_loss",)
    methods = ()

    def __init__(
        self,
        config: Config,
        data: str,
        out: Path,
        vae: Path,
        world: parallel.World,
        *,
        console: Console | None = None,
    ):
        self.config, self.training, self.out = config, config.dit, out
        self.vae_document, self.vae_file = checkpoint.read_config(vae), vae / checkpoint.VAE
        self.vae_digest = checkpoint.digest(self.vae_file) if self.vae_file.exists() else ""
        encoder = checkpoint.load_vae(vae)
        channels = self.training.model.in_channels
        if channels != encoder.config.latent_channels:
            raise checkpoint.CheckpointError(
                f"train dit: the VAE in {vae} does not fit the model; got {encoder.config.latent_channels} latent "
                f"channels, expected dit.model.in_channels = {channels}; change one of them."
            )
        self.train, self.held_out = latents.encoded(
            encoder.to(world.device), self.vae_digest, config, data, out / "state" / self.name, world,
            console or Console(quiet=True),
        )  # fmt: skip
        torch.manual_seed(self.training.loop.seed)
        self.text = self._text(data)
        self.dit = VideoDiT(self.training.model)
        self.model = Denoising(self.dit, self.text, self.training.diffusion)
        self.blocks = [*self.dit.blocks, *(self.text.blocks if isinstance(self.text, WordEncoder) else ())]
        self.tokens = [math.prod(grid) for grid in self.dit.grids(self.train.latents)]

    def draw(self, step: int, count: int) -> list[Noised]:
        """Random samples until `tokens` are full, dealt out to `count` parts of about as many tokens each."""
        source, training = generator(self.training.loop.seed, step), self.training
        chosen: list[int] = []
        filled = 0
        while True:
            item = int(torch.randint(len(self.train), (), generator=source))
            filled += self.tokens[item]
            if filled > training.tokens and len(chosen) >= count:
                break
            chosen.append(item)
        drop, rich, known = torch.rand(3, len(chosen), generator=source).tolist()
        which = torch.rand(len(chosen), generator=source).tolist()
        latents = [self.train.latents[i] for i in chosen]
        captions = []
        for k, i in enumerate(chosen):
            first, *others = self.train.captions[i]
            told = others[int(which[k] * len(others))] if others and rich[k] < training.rich else first
            captions.append("" if drop[k] < training.drop_text else told)
        given = [int(z.shape[1] > 1 and known[k] < training.known_frame) for k, z in enumerate(latents)]
        t = self.model.diffusion.sample_times(len(chosen), generator=source)
        batch = self._batch(latents, captions, given, t, source)
        return [batch.part(items) for items in parallel.parts([self.tokens[i] for i in chosen], count)]

    def checkpoint_activations(self) -> None:
        self.dit.gradient_checkpointing = True

    def evaluate(self) -> dict[str, float]:
        """The loss of held-out clips with short captions, at the same times and with the same noise every time."""
        count = len(self.held_out)
        source = generator(self.training.loop.seed, -1)
        t = self.model.diffusion.sample_times(count, generator=source)
        total = 0.0
        for start in range(0, count, EVALUATED):
            some = slice(start, start + EVALUATED)
            latents, captions = self.held_out.latents[some], [c[0] for c in self.held_out.captions[some]]
            batch = self._batch(latents, captions, [0] * len(latents), t[some], source)
            total += float(self.model(replace(batch, total=count))["loss"])
        return {"eval_loss": total}

    def prepare(self) -> None:
        pass

    def export(self, weights: Mapping[str, Tensor]) -> None:
        out, training = self.out, self.training
        document = {
            **self.vae_document,
            "fps": self.config.fps,
            "dit": settings.table(training.model),
            "text": self._text_document(),
            "diffusion": settings.table(training.diffusion),
        }
        if self.vae_file.resolve() != (out / checkpoint.VAE).resolve():
            content = self.vae_file.read_bytes()
            checkpoint.write(out / checkpoint.VAE, lambda part: part.write_bytes(content))
        checkpoint.write_tensors(out / checkpoint.DIT, weights)
        checkpoint.write_json(out / "config.json", document)

    def facts(self) -> dict[str, Any]:
        training = self.training
        model = {"dit": settings.table(training.model), "text": self._text_document()}
        return {"config": {"dit": settings.table(training)}, "model": model, "VAE": self.vae_digest}

    def _batch(
        self, latents: Sequence[Tensor], captions: list[str], known: list[int], t: Tensor, source: torch.Generator
    ) -> Noised:
        like = next(self.model.parameters())
        noise = gaussian_noise([z.shape for z in latents], generator=source)
        return Noised(list(latents), list(noise), t, captions, known, len(latents)).to(like)

    def _text(self, data: str) -> nn.Module | None:
        model, text = self.training.model, self.training.text
        if model.text is None:
            return None
        if text.path:
            return PretrainedEncoder(text.path)
        words = set(WORDS) if data == source.SHAPES else set()
        told = [c for captions in (self.train.captions, self.held_out.captions) for each in captions for c in each]
        words |= {word for caption in told for word in WORD.findall(caption.lower())}
        return WordEncoder(words, model.text_size, text.depth)

    def _text_document(self) -> dict[str, Any]:
        text = settings.table(self.training.text)
        return {**text, "words": list(self.text.words)} if isinstance(self.text, WordEncoder) else text
