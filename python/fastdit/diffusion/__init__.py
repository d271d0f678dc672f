"""Diffusion: noising, losses and samplers, on a batch or on a list of samples of different sizes. Plain PyTorch.

`RectifiedFlow` (Euler, Heun); `GaussianDiffusion` (DDPM, DDIM; linear and cosine schedules; eps, x0 and v prediction;
learned sigma); `guided` (classifier-free guidance); `gaussian_noise`.
"""

from fastdit.diffusion._samples import gaussian_noise
from fastdit.diffusion.ddpm import GaussianDiffusion
from fastdit.diffusion.flow import RectifiedFlow
from fastdit.diffusion.guidance import guided
from fastdit.diffusion.schedules import Schedule

__all__ = ["GaussianDiffusion", "RectifiedFlow", "Schedule", "gaussian_noise", "guided"]
