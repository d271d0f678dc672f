"""Rectified flow: straight lines from noise to data (Liu et al. 2209.03003, Lipman et al. 2210.02747, SD3 2403.03206).

    x_t = (1 - s) * x_0 + s * eps,   s = t / 1000 in [0, 1]: 0 is data, 1 is noise
    v   = dx_t / ds = eps - x_0      what the model learns; sampling solves dx / ds = v(x, s) from s = 1 to 0

Resolution shift (SD3, eq. 23): s -> shift * s / (1 + (shift - 1) * s). More pixels need more noise for the same loss of
information, so larger pictures take shift > 1, in training and in sampling.

Shapes: samples are a batch (S, C, ...) or a list of S tensors (C, ...) of any sizes; t is (S,).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ._samples import (
    TIME,
    Generators,
    ModelFn,
    Progress,
    Samples,
    as_samples,
    combine,
    known_frames_of,
    mean_square,
    noised,
    per_sample,
    per_sample_value,
    put_known,
    same_sizes,
)

TIMES = ("logit_normal", "uniform")
METHODS = ("euler", "heun")


@dataclass(frozen=True)
class RectifiedFlow:
    """The path, the loss and the sampler.

    >>> flow = RectifiedFlow()
    >>> loss = flow.loss(model, latents).mean()
    >>> latents = flow.sample(model, gaussian_noise((1, 8, 5, 8, 8)), steps=30, method="heun")

    Args:
        shift (float > 0): resolution shift of the training times and of the sampler's steps. 1: none.
        times ("logit_normal" | "uniform"): how training times are drawn, before the shift. logit_normal is
            s = sigmoid(mean + std * n), n ~ N(0, 1): SD3's choice, most of them in the middle, where v is hardest.
        mean, std (float): of logit_normal.
    """

    shift: float = 1.0
    times: str = "logit_normal"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if not self.shift > 0:
            raise ValueError(f"RectifiedFlow: shift must be positive; got {self.shift}, expected 1 (none) or more.")
        if self.times not in TIMES:
            raise ValueError(f"RectifiedFlow: unknown times; got {self.times!r}, expected one of {', '.join(TIMES)}.")
        if not self.std > 0:
            raise ValueError(f"RectifiedFlow: std must be positive; got {self.std}; 1 is SD3's.")

    # Training ---------------------------------------------------------------------------------------------------

    def sample_times(
        self, count: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Training times t (count,) in [0, 1000], fp32, independent of each other."""
        where = generator.device if generator else device
        if self.times == "uniform":
            s = torch.rand(count, generator=generator, device=where)
        else:
            s = torch.sigmoid(self.mean + self.std * torch.randn(count, generator=generator, device=where))
        return (TIME * self.shifted(s)).clamp(max=TIME).to(device)

    def shifted(self, s: Tensor) -> Tensor:
        """The resolution shift of noise levels in [0, 1]; 0 and 1 stay."""
        return self.shift * s / (1 + (self.shift - 1) * s)

    def add_noise(self, x0: Samples, noise: Samples, t: Tensor) -> Samples:
        """x_t = (1 - s) * x_0 + s * noise, s = t / 1000."""
        s = _levels("RectifiedFlow.add_noise", x0, t)
        same_sizes("RectifiedFlow.add_noise", "noise", noise, x0)
        return combine(1 - s, x0, s, noise)

    def target(self, x0: Samples, noise: Samples) -> Samples:
        """v = noise - x_0."""
        same_sizes("RectifiedFlow.target", "noise", noise, x0)
        return combine(1.0, noise, -1.0, x0)

    def predict_x0(self, x_t: Samples, v: Samples, t: Tensor) -> Samples:
        """x_0 = x_t - s * v: the picture that a model has in mind at time t."""
        s = _levels("RectifiedFlow.predict_x0", x_t, t)
        same_sizes("RectifiedFlow.predict_x0", "v", v, x_t)
        return combine(1.0, x_t, -s, v)

    def loss(
        self,
        model_fn: ModelFn,
        x0: Samples,
        *,
        t: Tensor | None = None,
        noise: Samples | None = None,
        known_frames: int | Sequence[int] = 0,
        weight: Samples | None = None,
        generator: Generators = None,
    ) -> Tensor:
        """The mean of (model_fn(x_t, t) - v)^2 over each sample: (S,), in fp32 at least.

        Args:
            model_fn: (x_t, t (S,)) -> v, sized as x_t.
            x0: clean latents.
            t (Tensor[S]), noise: drawn when not given; t by `sample_times`.
            known_frames (int, or one per sample): that many first frames reach the model clean and do not count: it
                learns image to video. Tell the model their number as well.
            weight: broadcastable to x0, e.g. 0 on dropped tokens; the mean is over the rest.
            generator: of the draws; when one per sample, the first draws t.
        """
        name = "RectifiedFlow.loss"
        x0, noise, t, x_t, weights = noised(name, self, x0, t, noise, known_frames, weight, generator)
        v = model_fn(x_t, t)
        same_sizes(name, "the model's output", v, x0)
        return mean_square(v, self.target(x0, noise), *weights)

    # Sampling ---------------------------------------------------------------------------------------------------

    def levels(self, steps: int | Sequence[float]) -> list[float]:
        """Noise levels s from 1 to 0 for that many steps, shifted; or those given, as they are, ending in 0."""
        if not isinstance(steps, Iterable):
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(f"RectifiedFlow: steps must be a whole number, at least 1; got {steps}.")
            return self.shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
        levels = [float(s) for s in steps]
        levels += [0.0] if levels and levels[-1] != 0 else []
        if len(levels) < 2 or levels[0] > 1 or any(b >= a for a, b in pairwise(levels)):
            raise ValueError(
                f"RectifiedFlow: noise levels must fall from at most 1 to 0; got {levels}; or give a number of steps."
            )
        return levels

    @torch.no_grad()
    def sample(
        self,
        model_fn: ModelFn,
        noise: Samples,
        steps: int | Sequence[float] = 50,
        *,
        method: str = "euler",
        known: Samples | None = None,
        progress: Progress | None = None,
    ) -> Samples:
        """Samples from noise, by solving dx / ds = v from s = 1 to s = 0.

        Args:
            model_fn: (x_t, t (S,)) -> v, sized as x_t; `guided(...)` makes one with classifier-free guidance.
            noise: of the size, dtype and device of the result, e.g. `gaussian_noise(...)`. The state keeps its dtype.
            steps (int, or noise levels falling from at most 1): of the sampler. A first level below 1 starts from x_s
                instead of noise (`add_noise` of a clip: video to video).
            method: "euler" (first order, one call of the model a step) or "heun" (second order, two calls; one in the
                last step, whose second would be at s = 0, where no noise is left to learn from).
            known: clean first frames (S, C, k, H, W) or a list of (C, k, H, W), which stay as they are.
            progress: called with (steps done, steps in all).
        """
        name = "RectifiedFlow.sample"
        if method not in METHODS:
            raise ValueError(f"{name}: unknown method; got {method!r}, expected one of {', '.join(METHODS)}.")
        levels = self.levels(steps)
        x = as_samples(name, "noise", noise)
        known = known_frames_of(name, known, x)

        def velocity(x: Samples, s: float) -> Samples:
            v = model_fn(x, per_sample_value(TIME * s, x))
            same_sizes(name, "the model's output", v, x)
            return v

        x = put_known(x, known)
        for i, (now, then) in enumerate(pairwise(levels), 1):
            v = velocity(x, now)
            end = put_known(combine(1.0, x, then - now, v), known)
            if method == "heun" and then > 0:
                half = (then - now) / 2
                end = put_known(combine(1.0, combine(1.0, x, half, v), half, velocity(end, then)), known)
            x = end
            if progress is not None:
                progress(i, len(levels) - 1)
        return x


def _levels(name: str, x: Samples, t: Tensor) -> Tensor:
    """s = t / 1000 of each sample."""
    per_sample(name, t, x)
    if t.device.type == "cpu" and not bool(((t >= 0) & (t <= TIME)).all()):  # elsewhere a look would synchronise
        raise ValueError(f"{name}: t must lie in [0, 1000]; got {t.tolist()}; multiply noise levels by 1000.")
    return t / TIME
