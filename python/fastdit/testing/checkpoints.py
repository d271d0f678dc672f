"""A checkpoint folder with random weights: everything that generation needs but sense."""

from __future__ import annotations

from pathlib import Path

import torch

from fastdit.data import WORDS
from fastdit.models import VideoDiT, VideoDiTConfig, VideoVAE, VideoVAEConfig, WordEncoder
from fastdit.training import checkpoint, config as settings

VAE_CONFIG = VideoVAEConfig(latent_channels=4, widths=(8, 8))
DIT_CONFIG = VideoDiTConfig(in_channels=4, hidden_size=32, depth=2, num_heads=2, text_size=16, cond_size=8)


def untrained(folder: Path, *, diffusion: dict | None = None) -> Path:
    """Writes the folder. No weight is zero: as initialised for training, a DiT says nothing whatever it is told."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae, dit, text = VideoVAE(VAE_CONFIG), VideoDiT(DIT_CONFIG), WordEncoder(WORDS, DIT_CONFIG.text_size, 1)
    for weight in dit.parameters():
        if not weight.any():
            weight.data.normal_(std=0.1, generator=generator)
    vae.latent_mean.fill_(0.1)
    vae.latent_std.fill_(0.5)
    named = {f"{prefix}.{k}": v for prefix, m in (("dit", dit), ("text", text)) for k, v in m.state_dict().items()}
    checkpoint.write_tensors(folder / checkpoint.VAE, vae.state_dict())
    checkpoint.write_tensors(folder / checkpoint.DIT, named)
    document = {
        "format": checkpoint.FORMAT, "fps": 8.0, "vae": settings.table(VAE_CONFIG), "dit": settings.table(DIT_CONFIG),
        "text": {"words": list(text.words), "depth": 1}, "diffusion": diffusion or {},
    }  # fmt: skip
    checkpoint.write_json(folder / "config.json", document)
    return folder
