"""`fastdit train vae`: the causal video VAE on random crops of clips."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.data import to_video
from fastdit.models.video_vae import FRAMES, Posterior, VideoVAE
from fastdit.training import checkpoint, config as settings, source
from fastdit.training.config import Config, Size, VAETraining
from fastdit.training.trainer import generator

TRIES = 4  # places for a crop, to find one that shows more than background
STATISTICS = 64  # clips that the mean and deviation of the latents are taken over


@dataclass(frozen=True)
class Crops:
    """A part of a step's batch: video (B, 3, T, H, W), noise of its latent, and the videos of the whole step."""

    video: Tensor
    noise: Tensor
    total: int


class Reconstruction(nn.Module):
    """loss = l1 * |x - y| + l2 * (x - y)^2 + kl * KL, y decoded from a sample of x's posterior."""

    def __init__(self, vae: VideoVAE, training: VAETraining):
        super().__init__()
        self.vae, self.scales = vae, {"l1": training.l1, "l2": training.l2, "kl": training.kl}

    def forward(self, crops: Crops) -> dict[str, Tensor]:
        kind = crops.video.device.type
        low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else crops.video.dtype
        posterior = self.vae.encode(crops.video.to(low))  # convolutions take the dtype of what they are given
        posterior = Posterior(posterior.mean.to(crops.noise), posterior.logvar.to(crops.noise))
        sample = posterior.mean + (0.5 * posterior.logvar).exp() * crops.noise
        error = self.vae.decode(sample.to(low)).to(crops.video) - crops.video
        share = len(crops.video) / crops.total
        terms = {"l1": error.abs().mean(), "l2": error.square().mean(), "kl": posterior.kl()}
        terms = {name: share * value for name, value in terms.items()}
        return {"loss": torch.stack([self.scales[name] * value for name, value in terms.items()]).sum(), **terms}

    def reconstruct(self, video: Tensor) -> Tensor:
        return self.vae(video)

    def latent(self, video: Tensor) -> Tensor:
        return self.vae.encode(video).mean


class VAETask:
    """What `loop.fit` trains; see `trainer.Task`. With `start`, the folder of a trained VAE, its decoder alone: the
    latents, and a DiT trained on them, stay valid."""

    figures = ("loss", "l1", "l2", "kl")
    evaluations = ("eval_psnr",)
    methods = ("reconstruct", "latent")

    def __init__(self, config: Config, data: str, out: Path, start: Path | None = None):
        self.config, self.training, self.out = config, config.vae, out
        self.name = "decoder" if start else "vae"
        torch.manual_seed(self.training.loop.seed)
        self.vae = checkpoint.load_vae(start) if start else VideoVAE(self.training.model)
        self.frozen = {n: t.detach().clone() for n, t in self.vae.state_dict().items() if start and "decoder" not in n}
        self.vae.encoder.requires_grad_(start is None)
        self.model = Reconstruction(self.vae, self.training)
        self.blocks = [*self.vae.encoder.blocks, *self.vae.decoder.blocks]
        training, seed = self.training, self.training.loop.seed
        self.pool = [c.frames for c in source.clips(data, training.sizes, training.clips, fps=config.fps, seed=seed)]
        if not self.pool:
            raise ValueError(f"train vae: no clips; got none from {data!r}, expected videos or images; look into it.")
        held_out = source.clips(data, training.sizes, training.held_out, fps=config.fps, held_out=True, seed=seed)
        self.held_out = [c.frames for c in held_out]
        self.fitting = {crop: [i for i, f in enumerate(self.pool) if _fits(crop, f)] for crop in training.crops}
        empty = [crop for crop, items in self.fitting.items() if not items]
        if empty:
            largest = max((tuple(f.shape[:3]) for f in self.pool), key=math.prod)
            raise ValueError(
                f"train vae: crops larger than every clip; got {empty}, expected at most {largest} frames, height and "
                "width; correct vae.crops or vae.sizes."
            )

    def draw(self, step: int, count: int) -> list[Crops]:
        """Crops of one size at random places of random clips, most of which show something, in `count` parts."""
        source, training = generator(self.training.loop.seed, step), self.training
        crop = training.crops[int(torch.randint(len(training.crops), (), generator=source))]
        batch = max(count, training.pixels // math.prod(crop))
        items = self.fitting[crop]
        chosen = [items[i] for i in torch.randint(len(items), (batch,), generator=source).tolist()]
        corners = torch.rand(batch, TRIES, 3, generator=source).tolist()
        video = torch.stack([to_video(_cut(self.pool[i], crop, at)) for i, at in zip(chosen, corners, strict=True)])
        noise = torch.randn(batch, *latent_size(self.vae, crop), generator=source)
        like = next(self.model.parameters())
        pieces = (t.to(like.device, like.dtype).tensor_split(count) for t in (video, noise))
        return [Crops(v, n, batch) for v, n in zip(*pieces, strict=True)]

    def checkpoint_activations(self) -> None:
        self.vae.encoder.gradient_checkpointing = self.vae.decoder.gradient_checkpointing = True

    def evaluate(self) -> dict[str, float]:
        """PSNR in dB of held-out clips, decoded from the mean: the mean over the clips."""
        found = []
        for frames in self.held_out:
            video = self._whole(frames)
            error = (self.model.reconstruct(video).float() - video).square().mean()
            found.append(10 * math.log10(4 / max(float(error), 1e-12)))
        return {"eval_psnr": sum(found) / len(found)}

    def prepare(self) -> None:
        """Mean and deviation of the latents, per channel."""
        if self.frozen:
            return
        latents = [self.model.latent(self._whole(f)) for f in self.pool[:STATISTICS]]
        values = torch.cat([z.transpose(0, 1).flatten(1) for z in latents], dim=1).double()
        self.vae.latent_mean.copy_(values.mean(1))
        self.vae.latent_std.copy_(values.std(1).clamp(min=1e-6))  # a channel may be unused

    def export(self, weights: Mapping[str, Tensor]) -> None:
        document = {"format": checkpoint.FORMAT, "fps": self.config.fps, "vae": settings.table(self.vae.config)}
        if self.frozen and (self.out / "config.json").exists():  # a DiT may stand there
            document = {**checkpoint.read_config(self.out), **document}
        tensors = {n.removeprefix("vae."): t for n, t in weights.items()} | self.frozen
        checkpoint.write_tensors(self.out / checkpoint.VAE, tensors)
        checkpoint.write_json(self.out / "config.json", document)

    def facts(self) -> dict[str, Any]:
        return {"config": {"vae": settings.table(self.training)}, "model": settings.table(self.vae.config)}

    def _whole(self, frames: Tensor) -> Tensor:
        """A clip as a batch, cut to what the VAE takes."""
        t, h, w, _ = frames.shape
        multiple = self.vae.config.side
        like = next(self.model.parameters())
        t, h, w = (t - 1) // FRAMES * FRAMES + 1, h // multiple * multiple, w // multiple * multiple
        return to_video(frames[:t, :h, :w])[None].to(like.device, like.dtype)


def latent_size(vae: VideoVAE, size: Sequence[int]) -> tuple[int, int, int, int]:
    """(channels, frames, height, width) of the latent of a video (frames, height, width)."""
    frames, height, width = size
    factor = vae.config.side
    return vae.config.latent_channels, 1 + (frames - 1) // FRAMES, height // factor, width // factor


def _fits(crop: Size, frames: Tensor) -> bool:
    return all(n <= m for n, m in zip(crop, frames.shape, strict=False))


def _cut(frames: Tensor, crop: Size, corners: list[list[float]]) -> Tensor:
    """The first crop that is not of one colour; each corner lies at shares of the room that the crop has."""
    for corner in corners:
        starts = [int(share * (m - n + 1)) for share, n, m in zip(corner, crop, frames.shape, strict=False)]
        t, h, w = (slice(start, start + n) for start, n in zip(starts, crop, strict=True))
        cut = frames[t, h, w]
        if bool((cut != cut[0, 0, 0]).any()):
            break
    return cut
