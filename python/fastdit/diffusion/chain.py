"""The noising chain of DDPM, and what a model's output says about it.

    x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps         the constants: `schedules`
    the model returns one of
        eps
        x_0 = (x_t - sqrt(1 - abar) eps) / sqrt(abar)
        v   = sqrt(abar) eps - sqrt(1 - abar) x_0         (2202.00512)
    so that x_0 = sqrt(abar) x_t - sqrt(1 - abar) v,  eps = sqrt(abar) v + sqrt(1 - abar) x_t

A learned variance (2102.09672; DiT) comes in as many channels again: w, trained to lie in [-1, 1], is its place between
the two fixed ones,

    log var = (1 + w) / 2 * log beta + (1 - w) / 2 * log btilde

Shapes: samples are a batch (S, C, ...) or a list of S tensors (C, ...) of any sizes; t is (S,) integers in [0, T).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._samples import ModelFn, Samples, each, per_sample, same_sizes, sizes, spread, wide
from .schedules import Schedule

PREDICTIONS = ("eps", "x0", "v")
VARIANCES = ("small", "large")


class Chain:
    """The part of `GaussianDiffusion` that neither trains nor samples."""

    def __init__(
        self,
        schedule: str | Schedule = "linear",
        prediction: str = "eps",
        learn_sigma: bool = False,
        *,
        num_timesteps: int = 1000,
        variance: str = "small",
    ):
        for what, got, known in (("prediction", prediction, PREDICTIONS), ("variance", variance, VARIANCES)):
            if got not in known:
                raise ValueError(f"GaussianDiffusion: unknown {what}; got {got!r}, expected one of {', '.join(known)}.")
        self.schedule = Schedule.named(schedule, num_timesteps) if isinstance(schedule, str) else schedule
        self.prediction, self.learn_sigma, self.variance = prediction, learn_sigma, variance

    def add_noise(self, x0: Samples, noise: Samples, t: Tensor) -> Samples:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise."""
        return self._weighted("add_noise", "signal", x0, 1, "noise", noise, t)

    def target(self, x0: Samples, noise: Samples, t: Tensor) -> Samples:
        """What the model should return: noise, x_0 or v."""
        if self.prediction == "v":
            return self._weighted("target", "signal", noise, -1, "noise", x0, t)
        return noise if self.prediction == "eps" else x0

    def posterior_mean(self, x0: Samples, x_t: Samples, t: Tensor) -> Samples:
        """The mean of q(x_{t-1} | x_t, x_0); its variance is `schedule.posterior_variance[t]`."""
        return self._weighted("posterior_mean", "posterior_x0", x0, 1, "posterior_xt", x_t, t)

    def predict_x0(self, x_t: Samples, output: Samples, t: Tensor) -> Samples:
        """The x_0 that a model's output, with or without its variance, says."""
        self._check("predict_x0", x_t, None, t)
        return each(lambda x, o, t: self._x0(wide(x), o, t).to(x.dtype), x_t, output, t)

    def predict_eps(self, x_t: Samples, output: Samples, t: Tensor) -> Samples:
        """The eps that a model's output, with or without its variance, says."""
        self._check("predict_eps", x_t, None, t)
        return each(lambda x, o, t: self._eps(wide(x), o, t).to(x.dtype), x_t, output, t)

    # On batches x (S, C, ...), in the dtype of math ---------------------------------------------------------------

    def _at(self, what: str, t: Tensor, x: Tensor) -> Tensor:
        """The schedule's constant of each sample, shaped to multiply x."""
        return spread(self.schedule.at(what, t, x.dtype), x)

    def _x0(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        a, s, output = self._at("signal", t, x), self._at("noise", t, x), predicted(x, output)
        if self.prediction == "eps":
            return (x - s * output) / a
        return output if self.prediction == "x0" else a * x - s * output

    def _eps(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        a, s, output = self._at("signal", t, x), self._at("noise", t, x), predicted(x, output)
        if self.prediction == "x0":
            return (x - a * output) / s
        return output if self.prediction == "eps" else a * output + s * x

    def _log_variance(self, x: Tensor, output: Tensor, t: Tensor) -> Tensor:
        """Of p(x_{t-1} | x_t): learned, or the schedule's."""
        low, high = self._at("posterior_log_variance", t, x), self._at("log_betas", t, x)
        if not self.learn_sigma:
            return high if self.variance == "large" else low
        share = (output[:, x.shape[1] :].to(x.dtype) + 1) / 2
        return share * high + (1 - share) * low

    # On samples ---------------------------------------------------------------------------------------------------

    def _weighted(self, name: str, a: str, x: Samples, sign: int, b: str, y: Samples, t: Tensor) -> Samples:
        """a_t * x + sign * b_t * y."""
        self._check(name, x, y, t)

        def batch(x: Tensor, y: Tensor, t: Tensor) -> Tensor:
            u, v = wide(x), wide(y)
            return (self._at(a, t, u) * u + sign * self._at(b, t, v) * v).to(x.dtype)

        return each(batch, x, y, t)

    def _check(self, name: str, x: Samples, y: Samples | None, t: Tensor) -> None:
        name = f"GaussianDiffusion.{name}"
        per_sample(name, t, x)
        if t.is_floating_point():
            raise TypeError(f"{name}: t must hold integer steps; got {t.dtype}, expected int64; see sample_times.")
        if t.device.type == "cpu" and not bool(((t >= 0) & (t < len(self.schedule))).all()):  # a look elsewhere waits
            raise ValueError(f"{name}: t must lie in [0, {len(self.schedule)}); got {t.tolist()}.")
        if y is not None:
            same_sizes(name, "the second argument", y, x)

    def _output(self, name: str, model_fn: ModelFn, x: Samples, t: Tensor) -> Samples:
        """model_fn's output at steps t, told as times in [0, 1000)."""
        output = model_fn(x, self.schedule.at("times", t, torch.float32))
        channels = 2 if self.learn_sigma else 1
        like = each(lambda v: v.new_empty((len(v), channels * v.shape[1], *v.shape[2:]), device="meta"), x)
        expected = sizes(like)
        if sizes(output) != expected:
            raise ValueError(
                f"{name}: the model's output has the wrong size; got {sizes(output)}, expected {expected} "
                f"(learn_sigma={self.learn_sigma})."
            )
        return output


def predicted(x: Tensor, output: Tensor) -> Tensor:
    """A batch's output without its variance, in the dtype of math."""
    return output[:, : x.shape[1]].to(x.dtype)
