"""Noise schedules of DDPM: the constants of T discrete steps, in fp64.

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t)           abar_t = prod_{i <= t} (1 - beta_i)
    q(x_t | x_0)     = N(sqrt(abar_t) x_0, 1 - abar_t)
    q(x_{t-1} | x_t, x_0) = N(c0_t x_0 + ct_t x_t, btilde_t)          with abar' = abar_{t-1}, abar_{-1} = 1
        c0 = beta sqrt(abar') / (1 - abar)   ct = (1 - abar') sqrt(1 - beta) / (1 - abar)
        btilde = beta (1 - abar') / (1 - abar)

linear (Ho et al. 2006.11239; DiT, ADM): beta from 1e-4 to 0.02, for T = 1000; scaled by 1000 / T for other T.
cosine (Nichol and Dhariwal 2102.09672): abar(u) = cos^2((u + 0.008) / 1.008 * pi / 2), beta at most 0.999.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._samples import TIME

SCHEDULES = ("linear", "cosine")
SPACINGS = ("linspace", "leading", "trailing")


def linear_betas(num_timesteps: int) -> Tensor:
    """beta_t of DDPM's linear schedule: (T,) in fp64."""
    scale = 1000 / num_timesteps
    return torch.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=torch.float64)


def cosine_betas(num_timesteps: int, max_beta: float = 0.999) -> Tensor:
    """beta_t = 1 - abar((t + 1) / T) / abar(t / T): (T,) in fp64."""
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    alphas_bar = ((u + 0.008) / 1.008 * (math.pi / 2)).cos().square()
    return (1 - alphas_bar[1:] / alphas_bar[:-1]).clamp(max=max_beta)


class Schedule:
    """The constants of every step, (T,) fp64 tensors on the CPU; `at` looks one up on any device.

    betas, log_betas; alphas_bar, alphas_bar_prev; signal = sqrt(abar), noise = sqrt(1 - abar); posterior_x0 = c0,
    posterior_xt = ct, posterior_variance = btilde, posterior_log_variance (at 0 it is that of 1: btilde_0 = 0).
    timesteps: the steps of the original schedule that these stand for; num_original: how many that has; times: what a
    model is told of them, timesteps * 1000 / num_original.
    """

    def __init__(self, betas: Tensor, timesteps: Sequence[int] | None = None, num_original: int | None = None):
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.dim() != 1 or len(betas) == 0 or not bool(((betas > 0) & (betas < 1)).all()):
            raise ValueError(
                f"Schedule: betas must be T numbers between 0 and 1; got {list(betas.shape)} of "
                f"{betas.flatten()[:3].tolist()}...; name a schedule instead: {', '.join(SCHEDULES)}."
            )
        self.timesteps = list(range(len(betas))) if timesteps is None else list(timesteps)
        self.num_original = num_original or len(betas)
        self.times = torch.tensor(self.timesteps, dtype=torch.float64) * (TIME / self.num_original)
        bar = torch.cumprod(1 - betas, dim=0)
        bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        variance = betas * (1 - bar_prev) / (1 - bar)
        self.betas, self.alphas_bar, self.alphas_bar_prev = betas, bar, bar_prev
        self.signal, self.noise = bar.sqrt(), (1 - bar).sqrt()
        self.posterior_x0 = betas * bar_prev.sqrt() / (1 - bar)
        self.posterior_xt = (1 - bar_prev) * (1 - betas).sqrt() / (1 - bar)
        self.posterior_variance = variance
        self.log_betas = betas.log()
        clipped = torch.cat([variance[1:2], variance[1:]]) if len(betas) > 1 else betas
        self.posterior_log_variance = clipped.log()
        self._copies: dict[tuple[str, torch.device, torch.dtype], Tensor] = {}

    def __len__(self) -> int:
        return len(self.betas)

    @classmethod
    def named(cls, name: str, num_timesteps: int = 1000) -> Schedule:
        """The "linear" or "cosine" schedule of T steps."""
        if num_timesteps < 1:
            raise ValueError(f"Schedule: num_timesteps must be at least 1; got {num_timesteps}; 1000 is the papers'.")
        if name == "linear":
            return cls(linear_betas(num_timesteps))
        if name == "cosine":
            return cls(cosine_betas(num_timesteps))
        raise ValueError(f"Schedule: unknown schedule; got {name!r}, expected one of {', '.join(SCHEDULES)}.")

    def at(self, what: str, t: Tensor, dtype: torch.dtype) -> Tensor:
        """The constant `what` of each t: as t, in `dtype`, on t's device."""
        key = (what, t.device, dtype)
        if key not in self._copies:
            self._copies[key] = getattr(self, what).to(t.device, dtype)
        return self._copies[key][t]

    def respaced(self, steps: int, spacing: str = "linspace") -> Schedule:
        """The schedule of fewer steps (2102.09672, section 4): beta = 1 - abar / abar of the step kept before."""
        kept = spaced(len(self), steps, spacing)
        bar = self.alphas_bar[kept]
        before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        return Schedule(1 - bar / before, [self.timesteps[i] for i in kept], self.num_original)


def spaced(num_timesteps: int, steps: int, spacing: str = "linspace") -> list[int]:
    """Which of T steps a shorter chain takes, rising.

    linspace: first, last and evenly between, rounded (improved-diffusion, DiT). leading: multiples of T // steps from 0
    (DDIM). trailing: every T / steps back from the last (2305.08891). One step of linspace is the last.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"spaced: unknown spacing; got {spacing!r}, expected one of {', '.join(SPACINGS)}.")
    if not isinstance(steps, int) or not 1 <= steps <= num_timesteps:
        raise ValueError(
            f"spaced: steps must be a whole number from 1 to {num_timesteps}, the schedule's; got {steps}."
        )
    if spacing == "leading":
        return [i * (num_timesteps // steps) for i in range(steps)]
    if spacing == "trailing":
        return [round(num_timesteps - i * num_timesteps / steps) - 1 for i in reversed(range(steps))]
    if steps == 1:
        return [num_timesteps - 1]
    return [round(i * (num_timesteps - 1) / (steps - 1)) for i in range(steps)]
