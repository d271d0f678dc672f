"""Diffusion: the noising paths, their losses, and their samplers, on batches or lists of samples of different sizes.

`RectifiedFlow` (Euler, Heun), `guided` (classifier-free guidance), `gaussian_noise`. Plain PyTorch throughout.
"""

from fastdit.diffusion._samples import gaussian_noise
from fastdit.diffusion.flow import RectifiedFlow
from fastdit.diffusion.guidance import guided

__all__ = ["RectifiedFlow", "gaussian_noise", "guided"]
