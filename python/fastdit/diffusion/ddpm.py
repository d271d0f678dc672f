"""Denoising diffusion over T discrete steps: DDPM (2006.11239), improved DDPM (2102.09672), DDIM (2010.02502).

The formulas of the chain, of predictions and of a learned variance stand in `chain`, the constants in `schedules`.

Shapes: samples are a batch (S, C, ...) or a list of S tensors (C, ...) of any sizes; t is (S,) integers in [0, T). The
model is told t * 1000 / T in fp32 and returns what x_t is, sized as x_t; with learn_sigma it has twice the channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._samples import (
    Generators,
    ModelFn,
    Progress,
    Samples,
    as_samples,
    each,
    first,
    known_frames_of,
    mean_square,
    noise_like,
    noised,
    put_known,
    spread,
    weighted_mean,
    wide,
)
from .chain import Chain, predicted

Step = Callable[[Chain, Tensor, Tensor, Tensor, Tensor], Tensor]  # chain, x, output, z, t of batches -> next x


class Losses(NamedTuple):
    """Of each sample, (S,): the mean squared error, and the term of the variational bound in bits per element."""

    simple: Tensor
    vlb: Tensor | None


class GaussianDiffusion(Chain):
    """The noising chain, its losses and its samplers.

    >>> diffusion = GaussianDiffusion(learn_sigma=True)                       # DiT's
    >>> loss = diffusion.loss(lambda x, t: dit(x, t, labels), latents).mean()
    >>> latents = diffusion.ddim(lambda x, t: dit(x, t, labels), gaussian_noise((4, 4, 32, 32)), steps=50)

    Args:
        schedule ("linear" | "cosine" | Schedule).
        prediction ("eps" | "x0" | "v"): what the model returns.
        learn_sigma (bool): its output has twice the channels: the prediction, then the variance's place.
        num_timesteps (int): T of a named schedule.
        variance ("small" | "large"): of the ancestral steps without learn_sigma: btilde_t or beta_t.
    """

    def respaced(self, steps: int, spacing: str = "linspace") -> GaussianDiffusion:
        """The same diffusion in fewer steps (`schedules.spaced`); the model is told the original times."""
        schedule = self.schedule.respaced(steps, spacing)
        return GaussianDiffusion(schedule, self.prediction, self.learn_sigma, variance=self.variance)

    # Training ---------------------------------------------------------------------------------------------------

    def sample_times(
        self, count: int, *, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> Tensor:
        """Training steps (count,), int64, uniform in [0, T)."""
        where = generator.device if generator else device
        return torch.randint(len(self.schedule), (count,), generator=generator, device=where).to(device=device)

    def loss(self, model_fn: ModelFn, x0: Samples, **options: Any) -> Tensor:
        """simple + T / 1000 * vlb of each sample, (S,): L_hybrid of improved DDPM. Arguments: those of `losses`."""
        simple, vlb = self.losses(model_fn, x0, **options)
        return simple if vlb is None else simple + vlb * (len(self.schedule) / 1000)

    def losses(
        self,
        model_fn: ModelFn,
        x0: Samples,
        *,
        t: Tensor | None = None,
        noise: Samples | None = None,
        known_frames: int | Sequence[int] = 0,
        weight: Samples | None = None,
        generator: Generators = None,
    ) -> Losses:
        """The two losses of each sample; vlb is None without learn_sigma.

            simple = mean (target - prediction)^2
            vlb    = mean KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) / ln 2   for t > 0
                     mean -log2 p(x_0 | x_1)                                     for t = 0: `pixel_log_likelihood`

        vlb trains the variance alone: the prediction in it carries no gradient.

        Args:
            model_fn: (x_t, times (S,)) -> output.
            x0: clean samples.
            t (Tensor[S], int64), noise: drawn when not given.
            known_frames (int, or one per sample): that many first frames reach the model clean and do not count: it
                learns image to video. Tell the model their number as well.
            weight: broadcastable to x0, e.g. 0 on dropped tokens; the means are over the rest.
            generator: of the draws; when one per sample, the first draws t.
        """
        name = "GaussianDiffusion.loss"
        x0, noise, t, x_t, weights = noised(name, self, x0, t, noise, known_frames, weight, generator)
        output = self._output(name, model_fn, x_t, t)
        found = each(lambda x, o: predicted(wide(x), o), x_t, output)
        simple = mean_square(found, self.target(x0, noise, t), *weights)
        if not self.learn_sigma:
            return Losses(simple, None)
        return Losses(simple, weighted_mean(each(self._vlb, x0, x_t, output, t), *weights))

    def _vlb(self, x0: Tensor, x_t: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """The bound's term of every element of a batch, in bits."""
        x0, x = wide(x0), wide(x_t)
        x0_hat = self._x0(x, output.detach(), t)
        c0, ct = self._at("posterior_x0", t, x), self._at("posterior_xt", t, x)
        true, own = self._at("posterior_log_variance", t, x), self._log_variance(x, output, t)
        square = (c0 * (x0 - x0_hat)).square()
        kl = 0.5 * (own - true - 1 + (true - own).exp() + square * (-own).exp())
        nll = -pixel_log_likelihood(x0, c0 * x0_hat + ct * x, own)
        return torch.where(spread(t, x) == 0, nll, kl) / math.log(2)

    # Sampling ---------------------------------------------------------------------------------------------------

    def sample(
        self,
        model_fn: ModelFn,
        noise: Samples,
        steps: int | None = None,
        *,
        spacing: str = "linspace",
        clip: float | None = None,
        known: Samples | None = None,
        generator: Generators = None,
        progress: Progress | None = None,
    ) -> Samples:
        """Ancestral sampling: x_{t-1} ~ p(x_{t-1} | x_t), from noise down to the data.

        Args:
            model_fn: (x_t, times (S,)) -> output; `guided(...)` makes one with classifier-free guidance.
            noise: of the size, dtype and device of the result, e.g. `gaussian_noise(...)`. The state keeps its dtype.
            steps (int): from 1 to T. Default: T.
            spacing ("linspace" | "leading" | "trailing"): which steps of the schedule: `schedules.spaced`.
            clip (float): x_0 is held in [-clip, clip] at every step; for pixels, not for latents.
            known: clean first frames (S, C, k, H, W) or a list of (C, k, H, W), which stay as they are.
            generator (torch.Generator, or one per sample): of the noise that each step but the last adds.
            progress: called with (steps done, steps in all).
        """

        def step(chain: Chain, x: Tensor, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
            x0 = _clip(chain._x0(x, output, t), clip)
            mean = chain._at("posterior_x0", t, x) * x0 + chain._at("posterior_xt", t, x) * x
            return mean + (0.5 * chain._log_variance(x, output, t)).exp() * z

        return self._walk(
            "sample", step, model_fn, noise, steps, spacing, known, lambda x: noise_like(x, generator), progress
        )

    def ddim(
        self,
        model_fn: ModelFn,
        noise: Samples,
        steps: int | None = 50,
        *,
        eta: float = 0.0,
        spacing: str = "linspace",
        clip: float | None = None,
        known: Samples | None = None,
        generator: Generators = None,
        progress: Progress | None = None,
    ) -> Samples:
        """DDIM: x' = sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps + sigma z,  sigma = eta sqrt(btilde).

        eta 0 (default) adds no noise: the same start gives the same sample. eta 1 is ancestral sampling with the small
        variance. A learned variance is not used. Other arguments: those of `sample`.
        """
        if not 0 <= eta <= 1:
            raise ValueError(f"GaussianDiffusion.ddim: eta must lie in [0, 1]; got {eta}; 0 is DDIM, 1 is DDPM.")

        def step(chain: Chain, x: Tensor, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
            x0, eps = _clip(chain._x0(x, output, t), clip), chain._eps(x, output, t)
            if clip is not None:  # the eps of the clipped x_0
                eps = (x - chain._at("signal", t, x) * x0) / chain._at("noise", t, x)
            bar, variance = chain._at("alphas_bar_prev", t, x), eta**2 * chain._at("posterior_variance", t, x)
            return bar.sqrt() * x0 + (1 - bar - variance).clamp(min=0).sqrt() * eps + variance.sqrt() * z

        draws = (lambda x: noise_like(x, generator)) if eta > 0 else _no_noise
        return self._walk("ddim", step, model_fn, noise, steps, spacing, known, draws, progress)

    @torch.no_grad()
    def _walk(
        self,
        name: str,
        step: Step,
        model_fn: ModelFn,
        noise: Samples,
        steps: int | None,
        spacing: str,
        known: Samples | None,
        draws: Callable[[Samples], Samples],
        progress: Progress | None,
    ) -> Samples:
        """From x_{T-1} down to x_0; the last step adds no noise."""
        name = f"GaussianDiffusion.{name}"
        chain = self if steps is None else self.respaced(steps, spacing)
        total = len(chain.schedule)
        x = as_samples(name, "noise", noise)
        known = known_frames_of(name, known, x)
        x = put_known(x, known)
        for i in reversed(range(total)):
            t = torch.full((len(x),), i, device=first(x).device)
            output = chain._output(name, model_fn, x, t)
            z = draws(x) if i else _no_noise(x)
            x = each(lambda x, o, z, t: step(chain, wide(x), o, wide(z), t).to(x.dtype), x, output, z, t)
            x = put_known(x, known)
            if progress is not None:
                progress(total - i, total)
        return x


def _clip(x: Tensor, bound: float | None) -> Tensor:
    return x if bound is None else x.clamp(-bound, bound)


def _no_noise(x: Samples) -> Samples:
    return each(torch.zeros_like, x)


def pixel_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """log p of pixels in [-1, 1] under a normal cut into 256 levels, elementwise; the outermost levels have open ends.

    The normal's distribution function is improved DDPM's: (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3))) / 2,
    so that losses compare with those of its descendants; DiT takes them for latents too.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    scale = (-0.5 * log_variance).exp()
    above, below = cdf(scale * (x - mean + 1 / 255)), cdf(scale * (x - mean - 1 / 255))
    p = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return p.clamp(min=1e-12).log()
