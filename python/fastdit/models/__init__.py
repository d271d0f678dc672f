"""Models over `fastdit.ops`: references key-compatible with the originals, and the parts of a small Sora."""

from fastdit.models.dit import DIT_CONFIGS, DiT
from fastdit.models.text import PretrainedEncoder, Text, WordEncoder
from fastdit.models.vae import CausalVAE
from fastdit.models.video_config import VideoDiTConfig
from fastdit.models.video_dit import VideoDiT
from fastdit.models.video_layout import drop_tokens
from fastdit.models.video_vae import Posterior, VideoVAE, VideoVAEConfig

__all__ = [
    "DIT_CONFIGS",
    "CausalVAE",
    "DiT",
    "Posterior",
    "PretrainedEncoder",
    "Text",
    "VideoDiT",
    "VideoDiTConfig",
    "VideoVAE",
    "VideoVAEConfig",
    "WordEncoder",
    "drop_tokens",
]
