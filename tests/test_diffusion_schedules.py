"""Schedules of DDPM: the papers' numbers, Bayes' rule for the posterior, and the steps that shorter chains keep."""

import math

import diffusers
import pytest
import torch

from fastdit.diffusion import Schedule
from fastdit.diffusion.schedules import cosine_betas, linear_betas, spaced
from fastdit.testing.close import assert_bitwise, assert_close

ORIGINALS = {"linear": "linear", "cosine": "squaredcos_cap_v2"}  # diffusers' names


@pytest.mark.parametrize("name", ORIGINALS)
def test_constants_are_diffusers(name):
    """Both against the formulas in Python's own numbers; diffusers has its constants in fp32."""
    theirs = diffusers.DDPMScheduler(beta_schedule=ORIGINALS[name])
    ours, bar, betas, bars = Schedule.named(name), 1.0, [], []
    for t in range(1000):
        if name == "linear":
            beta = 1e-4 + (0.02 - 1e-4) * t / 999
        else:
            low, high = (math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in (t, t + 1))
            beta = min(1 - high / low, 0.999)
        bar *= 1 - beta
        betas.append(beta)
        bars.append(bar)
    for found, truth, baseline in ((ours.betas, betas, theirs.betas), (ours.alphas_bar, bars, theirs.alphas_cumprod)):
        assert found.dtype == torch.float64
        assert_close(found.float(), torch.tensor(truth, dtype=torch.float64), baseline)


def test_other_lengths_end_as_noisy():
    """Scaled by 1000 / T, the linear schedule ends at the same noise; the cosine one passes the same levels."""
    for steps in (250, 4000):
        last = Schedule.named("linear", steps).alphas_bar[-1].log() / Schedule.named("linear").alphas_bar[-1].log()
        assert 0.97 < last < 1.03
    assert linear_betas(250)[0] == 4e-4
    short, long = Schedule.named("cosine", 100).alphas_bar, Schedule.named("cosine", 1000).alphas_bar
    assert_close(short[:-1].float(), long[9:-10:10], long[9:-10:10].float())
    assert cosine_betas(1000)[-1] == 0.999


@pytest.mark.parametrize("name", ORIGINALS)
def test_posterior_is_bayes_rule(name):
    """N(x_{t-1}; sqrt(abar') x_0, 1 - abar') times N(x_t; sqrt(1 - beta) x_{t-1}, beta), normalised."""
    s = Schedule.named(name)
    prior, beta = 1 - s.alphas_bar_prev[1:], s.betas[1:]
    variance = 1 / (1 / prior + (1 - beta) / beta)
    by_x0, by_xt = variance * s.alphas_bar_prev[1:].sqrt() / prior, variance * (1 - beta).sqrt() / beta
    for found, truth in ((s.posterior_variance, variance), (s.posterior_x0, by_x0), (s.posterior_xt, by_xt)):
        assert_close(found[1:].float(), truth, truth.float())
    first = [float(c[0].float()) for c in (s.posterior_variance, s.posterior_x0, s.posterior_xt)]
    assert first == [0, 1, 0]  # x_0 itself
    assert_bitwise(s.posterior_log_variance[0], s.posterior_variance[1].log())


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("steps", [1, 7, 50, 250, 999, 1000])
def test_kept_steps_are_diffusers(spacing, steps):
    scheduler = diffusers.DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    expected = scheduler.timesteps.flip(0).tolist()
    if (spacing, steps) == ("linspace", 1):
        assert (spaced(1000, 1), expected) == ([999], [0])  # one step from no noise at all would do nothing
    else:
        assert spaced(1000, steps, spacing) == expected


@pytest.mark.parametrize("steps", [2, 10, 25, 50, 100, 250, 500])
def test_kept_steps_are_improved_diffusions(steps):
    """Its space_timesteps takes a stride of (T - 1) / (steps - 1), summed, and rounds."""
    at, kept = 0.0, []
    for _ in range(steps):
        kept.append(round(at))
        at += 999 / (steps - 1)
    assert spaced(1000, steps) == kept


def test_a_shorter_chain_passes_the_same_levels():
    whole = Schedule.named("cosine")
    short = whole.respaced(20)
    assert len(short) == 20 and short.timesteps[-1] == 999
    kept = whole.alphas_bar[short.timesteps]
    assert_close(short.alphas_bar.float(), kept, kept.float())
    assert short.times.tolist() == short.timesteps  # T = 1000: the step is the time
    again = short.respaced(5)
    assert again.timesteps == [short.timesteps[i] for i in spaced(20, 5)]
    assert Schedule.named("linear", 250).respaced(5).times.tolist() == [4 * i for i in spaced(250, 5)]
    one = whole.respaced(1)
    assert one.posterior_log_variance.isfinite().all()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: Schedule.named("quadratic"), "got 'quadratic', expected one of linear, cosine"),
        (lambda: Schedule.named("linear", 0), "num_timesteps must be at least 1; got 0"),
        (lambda: Schedule(torch.tensor([0.1, 1.5])), "betas must be T numbers between 0 and 1"),
        (lambda: Schedule(torch.tensor([])), "betas must be T numbers"),
        (lambda: Schedule(torch.ones(2, 2) / 2), r"got \[2, 2\]"),
        (lambda: spaced(1000, 0), "steps must be a whole number from 1 to 1000, the schedule's; got 0"),
        (lambda: spaced(100, 101), "got 101"),
        (lambda: spaced(100, 2.5), "whole number .* got 2.5"),
        (lambda: spaced(100, 10, "random"), "got 'random', expected one of linspace, leading, trailing"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call()
