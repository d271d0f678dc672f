"""Training of the video VAE and of the video DiT: `fastdit train vae|dit`. See docs/training.md."""

from fastdit.training.checkpoint import CheckpointError, Loaded, load, load_vae
from fastdit.training.config import Config

__all__ = ["CheckpointError", "Config", "Loaded", "load", "load_vae"]
