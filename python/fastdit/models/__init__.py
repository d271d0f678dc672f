"""Reference models over `fastdit.ops`: small enough to read, key-compatible with the originals."""

from fastdit.models.dit import DIT_CONFIGS, DiT
from fastdit.models.vae import CausalVAE
from fastdit.models.video_vae import Posterior, VideoVAE, VideoVAEConfig

__all__ = ["DIT_CONFIGS", "CausalVAE", "DiT", "Posterior", "VideoVAE", "VideoVAEConfig"]
