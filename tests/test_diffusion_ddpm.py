"""GaussianDiffusion: closed forms, exact sampling of a Gaussian, and the step-by-step numbers of diffusers."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fastdit.diffusion import GaussianDiffusion, Schedule, ddpm, gaussian_noise
from fastdit.testing.close import assert_bitwise, assert_close

PREDICTIONS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}  # ours -> diffusers'
SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
MEAN, STD = 0.7, 0.3
each_prediction = pytest.mark.parametrize("prediction", PREDICTIONS)
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixed(seed, dtype=torch.float64):
    return gaussian_noise([(2, 1, 4, 6), (2, 3, 2, 2), (2, 2, 8, 3)], generator=seeded(seed), dtype=dtype)


T_MIXED = torch.tensor([0, 400, 999])


def column(values, x):
    return values.view(-1, *(1,) * (x.dim() - 1))


# The chain --------------------------------------------------------------------------------------------------------


@each_schedule
def test_noise_is_that_of_every_step_in_turn(schedule):
    """Mean and variance of t + 1 steps x -> sqrt(1 - beta) x + sqrt(beta) eps, from a point."""
    diffusion, mean, variance = GaussianDiffusion(schedule), 1.0, 0.0
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    for t, beta in enumerate(diffusion.schedule.betas.tolist()):
        mean, variance = math.sqrt(1 - beta) * mean, (1 - beta) * variance + beta
        if t in (0, 1, 500, 999):
            step = torch.tensor([t])
            for x0, noise, truth in ((one, zero, mean), (zero, one, math.sqrt(variance))):
                truth = torch.tensor([[truth]], dtype=torch.float64)
                assert_close(diffusion.add_noise(x0, noise, step).float(), truth, truth.float())


@each_schedule
@each_prediction
def test_predictions_convert_into_each_other(prediction, schedule):
    """What the target says of x_0 and eps is x_0 and eps, for lists of mixed sizes and for batches."""
    diffusion, x0, eps = GaussianDiffusion(schedule, prediction), mixed(0), mixed(1)
    t = T_MIXED
    x_t, target = diffusion.add_noise(x0, eps, t), diffusion.target(x0, eps, t)
    for i, (a, s) in enumerate(zip(*(getattr(diffusion.schedule, c)[t] for c in ("signal", "noise")), strict=True)):
        assert_bitwise(target[i], {"eps": eps[i], "x0": x0[i], "v": a * eps[i] - s * x0[i]}[prediction])
    for found, truth in (
        (diffusion.predict_x0(x_t, target, t), x0),
        (diffusion.predict_eps(x_t, target, t), eps),
    ):
        for f, v in zip(found, truth, strict=True):
            assert_close(f.float(), v, v.float())
    batch = torch.randn(3, 2, 2, 2)
    for f in (diffusion.predict_x0, diffusion.predict_eps, diffusion.target, diffusion.posterior_mean):
        assert_bitwise(f(batch, batch.flip(0), t), torch.stack(f(list(batch), list(batch.flip(0)), t)))


def test_posterior_mean_is_the_best_guess_of_the_step_before():
    """The mean and the variance of x_{t-1} given x_t and x_0, from their joint covariance."""
    diffusion, t = GaussianDiffusion("cosine"), torch.tensor([700])
    s = diffusion.schedule
    alpha, before = 1 - s.betas[700], 1 - s.alphas_bar[699]  # Var(x_{t-1} | x_0)
    x0, x_t = torch.randn(1, 5, dtype=torch.float64), torch.randn(1, 5, dtype=torch.float64)
    gain = alpha.sqrt() * before / (alpha * before + s.betas[700])  # Cov(x_{t-1}, x_t) / Var(x_t)
    truth = s.alphas_bar[699].sqrt() * x0 + gain * (x_t - s.alphas_bar[700].sqrt() * x0)
    assert_close(diffusion.posterior_mean(x0, x_t, t).float(), truth, truth.float())
    variance = before - gain * alpha.sqrt() * before
    assert_close(s.posterior_variance[700].float(), variance, variance.float())


def test_models_are_told_times_up_to_1000():
    told = []
    model = lambda x, t: (told.append(t), x)[1]  # noqa: E731
    GaussianDiffusion(num_timesteps=100).sample(model, torch.zeros(2, 3), 4)
    assert [t.tolist() for t in told] == [[990.0] * 2, [660.0] * 2, [330.0] * 2, [0.0] * 2]
    assert all(t.dtype == torch.float32 for t in told)
    times = GaussianDiffusion().sample_times(5000, generator=seeded())
    assert times.dtype == torch.int64 and times.min() == 0 and times.max() == 999


# Losses -----------------------------------------------------------------------------------------------------------


@each_prediction
def test_simple_loss(prediction):
    diffusion, x0, eps, out = GaussianDiffusion("cosine", prediction), mixed(0), mixed(1), mixed(2)
    loss = diffusion.loss(lambda x, t: out, x0, t=T_MIXED, noise=eps)
    target = diffusion.target(x0, eps, T_MIXED)
    assert_bitwise(loss, torch.stack([(v - o).square().mean() for v, o in zip(target, out, strict=True)]))


@each_schedule
@each_prediction
def test_vlb_is_a_divergence_of_normals(prediction, schedule):
    diffusion = GaussianDiffusion(schedule, prediction, learn_sigma=True)
    s, t = diffusion.schedule, torch.tensor([1, 400, 999])
    x0, eps = (torch.randn(3, 2, 4, 4, dtype=torch.float64) for _ in range(2))
    out = torch.randn(3, 4, 4, 4, dtype=torch.float64)
    x_t = diffusion.add_noise(x0, eps, t)
    low, high = (column(c[t].log(), x0) for c in (s.posterior_variance, s.betas))
    own = (low + high) / 2 + out[:, 2:] * (high - low) / 2
    p = Normal(diffusion.posterior_mean(diffusion.predict_x0(x_t, out, t), x_t, t), (own / 2).exp())
    q = Normal(diffusion.posterior_mean(x0, x_t, t), column(s.posterior_variance[t].sqrt(), x0))
    truth = kl_divergence(q, p).flatten(1).mean(1) / math.log(2)
    simple, vlb = diffusion.losses(lambda x, t: out, x0, t=t, noise=eps)
    for found, expected in zip(vlb, truth, strict=True):
        assert_close(found.float(), expected, expected.float())
    assert_bitwise(diffusion.loss(lambda x, t: out, x0, t=t, noise=eps), simple + vlb)
    parts = diffusion.losses(lambda x, t: list(out), list(x0), t=t, noise=list(eps))
    assert_bitwise(parts.simple, simple)
    assert_bitwise(parts.vlb, vlb)


def test_pixels_have_a_probability():
    """The 256 levels share out the whole normal, whatever its mean and width."""
    levels = torch.linspace(-1, 1, 256, dtype=torch.float64)
    for mean in (-1.2, 0.0, 0.4, 1.0):
        for std in (0.03, 0.5, 3.0):
            log_variance = torch.full_like(levels, 2 * math.log(std))
            total = ddpm.pixel_log_likelihood(levels, torch.full_like(levels, mean), log_variance).exp().sum()
            assert_close(total.float(), torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0))


def wave(*shape, frequency, phase=0.0, scale=1.0):
    n = math.prod(shape)
    return (scale * torch.sin(frequency * torch.arange(n, dtype=torch.float64) + phase)).view(shape)


# training_losses of facebookresearch/DiT (ed81ce2) for these waves: mse and vb at t = 0, 1, 500, 999
DIT_MSE = {
    "eps": [1.34385154, 1.31575628, 1.37895797, 1.58016885],
    "x0": [0.898877906, 0.949300802, 1.03227938, 1.15086495],
}
DIT_VB = {
    ("linear", "eps"): [2.71429843, 0.733337483, 0.0109667897, 0.0232632146],
    ("linear", "x0"): [36.6584257, 2586.09396, 0.00069271637, 6.83818775e-07],
    ("cosine", "eps"): [2.0430584, 0.6976682, 0.00621445997, 1138.71287],
    ("cosine", "x0"): [38.7287003, 6160.20356, 0.00451281667, 2.01428627e-06],
}


@pytest.mark.parametrize("schedule, prediction", DIT_VB)
def test_losses_are_those_of_dit(schedule, prediction):
    x0, noise = wave(4, 2, 2, 3, frequency=1.3), wave(4, 2, 2, 3, frequency=2.9, phase=1.0, scale=1.4)
    out, t = wave(4, 4, 2, 3, frequency=0.7, phase=0.5), torch.tensor([0, 1, 500, 999])
    found = GaussianDiffusion(schedule, prediction, learn_sigma=True).losses(lambda x, t: out, x0, t=t, noise=noise)
    rounded = 8 * torch.finfo(torch.float32).eps  # DiT's constants are fp32
    assert found.simple.tolist() == pytest.approx(DIT_MSE[prediction], rel=rounded)
    assert found.vlb.tolist() == pytest.approx(DIT_VB[schedule, prediction], rel=rounded)


def test_the_bound_trains_the_variance_alone():
    diffusion, x0 = GaussianDiffusion(learn_sigma=True), torch.randn(3, 2, 4, 4)
    out = torch.randn(3, 4, 4, 4, requires_grad=True)
    losses = diffusion.losses(lambda x, t: out, x0, t=torch.tensor([0, 1, 500]))
    (by_vlb,) = torch.autograd.grad(losses.vlb.sum(), out, retain_graph=True)
    (by_simple,) = torch.autograd.grad(losses.simple.sum(), out)
    assert not by_vlb[:, :2].any() and by_vlb[:, 2:].flatten(1).any(1).all()
    assert by_simple[:, :2].flatten(1).any(1).all() and not by_simple[:, 2:].any()


def test_known_frames_come_clean_and_do_not_count():
    diffusion = GaussianDiffusion(prediction="v", learn_sigma=True)
    x0, eps = torch.randn(2, 2, 4, 2, 2, dtype=torch.float64), torch.randn(2, 2, 4, 2, 2, dtype=torch.float64)
    out, t, seen = torch.randn(2, 4, 4, 2, 2, dtype=torch.float64), torch.tensor([300, 900]), []
    found = diffusion.losses(lambda x, t: (seen.append(x), out)[1], x0, t=t, noise=eps, known_frames=[1, 3])
    for i, k in enumerate((1, 3)):
        assert_bitwise(seen[0][i, :, :k], x0[i, :, :k])
        rest = (slice(i, i + 1), slice(None), slice(k, None))
        alone = diffusion.losses(lambda x, t, rest=rest: out[rest], x0[rest], t=t[i : i + 1], noise=eps[rest])
        for a, b in zip(found, alone, strict=True):
            assert_close(a[i].float(), b[0], b[0].float())


# Sampling ---------------------------------------------------------------------------------------------------------


def exact_model(diffusion):
    """E[prediction | x_t] for data of N(MEAN, STD^2): what a perfect model returns."""

    def model(x, t):
        i = (t.double() * diffusion.schedule.num_original / 1000).round().long()
        a, s = column(diffusion.schedule.signal[i], x), column(diffusion.schedule.noise[i], x)
        x0 = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)
        eps = (x - a * x0) / s
        return {"eps": eps, "x0": x0, "v": a * eps - s * x0}[diffusion.prediction]

    return model


def start(diffusion, q):
    """x_T of the data's quantiles q (in standard deviations)."""
    a, s = diffusion.schedule.signal[-1], diffusion.schedule.noise[-1]
    return a * MEAN + (a**2 * STD**2 + s**2).sqrt() * q


def law(diffusion, model, steps, monkeypatch):
    """Mean and variance (fp64) of what `sample` makes of x_T ~ N: exactly, not from statistics.

    With a linear model the result is linear in x_T and every z: pushing on each by itself tells its share.
    """
    pushes = iter(range(steps - 1))

    def one_at_a_time(x, generator):
        z = torch.zeros_like(x)
        z[next(pushes)] = 1
        return z

    monkeypatch.setattr(ddpm, "noise_like", one_at_a_time)
    q = torch.zeros(steps + 1, 1, dtype=torch.float64)  # rows: each z, then x_T one deviation off, then none
    q[steps - 1] = 1
    out = diffusion.sample(model, start(diffusion, q), steps).flatten()
    return out[-1], (out[:-1] - out[-1]).square().sum()


def last_variance(schedule):
    """The data's variance without Var(x_0 | x_1): the last step returns E[x_0 | x_1]."""
    a, s = schedule.signal[0], schedule.noise[0]
    return STD**2 * (1 - s**2 / (a**2 * STD**2 + s**2))


@pytest.mark.parametrize("steps", [2, 10, 100])
@each_schedule
@each_prediction
def test_a_perfect_model_with_its_variance_is_sampled_exactly(prediction, schedule, steps, monkeypatch):
    """p(x_{t-1} | x_t) of Gaussian data is Gaussian: with its mean and variance any number of steps is exact."""
    diffusion = GaussianDiffusion(schedule, prediction, learn_sigma=True)
    short = diffusion.schedule.respaced(steps)
    order = iter(reversed(range(steps)))
    mean_of = exact_model(diffusion)

    def model(x, t):
        i = next(order)
        a, s = short.signal[i], short.noise[i]
        guess = STD**2 * s**2 / (a**2 * STD**2 + s**2)  # Var(x_0 | x_t)
        variance = short.posterior_variance[i] + short.posterior_x0[i] ** 2 * guess
        low, high = short.posterior_log_variance[i], short.log_betas[i]
        place = 2 * (variance.log() - low) / (high - low) - 1 if i else torch.tensor(0.0)
        return torch.cat([mean_of(x, t), torch.full_like(x, float(place))], dim=1)

    found = torch.stack(law(diffusion, model, steps, monkeypatch))
    truth = torch.stack([torch.tensor(MEAN, dtype=torch.float64), last_variance(short)])
    assert_close(found.float(), truth, truth.float())


@each_schedule
def test_fixed_variances_close_in_on_the_distribution(schedule, monkeypatch):
    """btilde is too small and beta too large, both by an error that falls with the number of steps."""
    for variance, sign in (("small", -1), ("large", 1)):
        errors = []
        for steps in (125, 250, 500):
            diffusion = GaussianDiffusion(schedule, variance=variance)
            mean, found = law(diffusion, exact_model(diffusion), steps, monkeypatch)
            assert_close(mean.float(), torch.tensor(MEAN, dtype=torch.float64), torch.tensor(MEAN))
            errors.append(sign * float(found - last_variance(diffusion.schedule)))
        assert all(1.7 < a / b < 2.3 for a, b in pairwise(errors)), errors


@each_schedule
@each_prediction
def test_ddim_converges_to_the_distribution(prediction, schedule):
    """eta = 0 follows the probability flow, which takes a quantile of x_T to that of the data; first order in steps."""
    diffusion = GaussianDiffusion(schedule, prediction)
    q = torch.linspace(-3, 3, 13, dtype=torch.float64).view(1, 13)
    a, s = diffusion.schedule.signal[0], diffusion.schedule.noise[0]
    truth = MEAN + STD * q * a * STD / (a**2 * STD**2 + s**2).sqrt()
    errors = []
    for steps in (30, 60, 120, 240):
        found = diffusion.ddim(exact_model(diffusion), start(diffusion, q), steps)
        errors.append(float((found - truth).abs().max()))
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(0.75 < order < 1.25 for order in orders), (orders, errors)


def test_one_point_is_found_in_one_step():
    """All data one picture: any step count returns it."""
    x0 = torch.randn(2, 3, 4, dtype=torch.float64)
    for schedule in SCHEDULES:
        diffusion = GaussianDiffusion(schedule, "x0")
        for steps in (1, 9):
            for f in (diffusion.sample, diffusion.ddim):
                assert_bitwise(f(lambda x, t: x0, torch.randn_like(x0), steps), x0)


def test_ddim_with_eta_one_is_ancestral_sampling():
    diffusion = GaussianDiffusion("cosine", "v")
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    truth = diffusion.sample(smooth_model, x, 20, generator=seeded(3))
    assert_close(diffusion.ddim(smooth_model, x, 20, eta=1.0, generator=seeded(3)).float(), truth, truth.float())


def smooth_model(x, t):
    """Any smooth function of x and t, in the dtype of x."""
    return torch.sin(x + 2 * column((t / 1000).to(x.dtype), x)) * 0.9


def with_variance(x, t):
    return torch.cat([smooth_model(x, t), torch.cos(3 * x)], dim=1)


def states(sample, f, x, steps, **options):
    """x at every call of the model, and the result."""
    seen = []
    last = sample(lambda x, t: (seen.append(x), f(x, t))[1], x, steps, **options)
    return [*seen, last]


def assert_steps(found, scheduler, f, draws, monkeypatch, **options):
    """Every step is diffusers' from the same x and noise; its own step, with x and constants in fp64, is the truth."""
    constants = {torch.float32: scheduler.alphas_cumprod}
    name = next(k for k, v in SCHEDULES.items() if v == scheduler.config.beta_schedule)
    constants[torch.float64] = Schedule.named(name).alphas_bar
    assert len(found) == len(scheduler.timesteps) + 1
    for (x, after), t, z in zip(pairwise(found), scheduler.timesteps, draws, strict=True):
        for module in (scheduling_ddpm, scheduling_ddim):
            monkeypatch.setattr(module, "randn_tensor", lambda shape, dtype, z=z, **_: z.to(dtype))
        by_dtype = {}
        for dtype, constant in constants.items():
            scheduler.alphas_cumprod = constant
            out = f(x, t.expand(len(x))).to(dtype)
            by_dtype[dtype] = scheduler.step(out, t, x.to(dtype), **options).prev_sample
        assert_close(after, by_dtype[torch.float64], by_dtype[torch.float32], f"step {int(t)}")


ROWS = [
    pytest.param("linear", "eps", "small", "linspace", 20, id="eps-small"),
    pytest.param("linear", "eps", "large", "leading", 20, id="eps-large"),
    pytest.param("linear", "eps", "learned", "linspace", 20, id="eps-learned"),
    pytest.param("linear", "x0", "small", "leading", 25, id="x0-small"),
    pytest.param("cosine", "v", "large", "linspace", 10, id="v-large"),
    pytest.param("cosine", "v", "learned", "linspace", 40, id="v-learned"),
]


@pytest.mark.parametrize("schedule, prediction, variance, spacing, steps", ROWS)
def test_steps_are_diffusers_ddpm(schedule, prediction, variance, spacing, steps, monkeypatch):
    learned = variance == "learned"
    diffusion = GaussianDiffusion(schedule, prediction, learned, variance="small" if learned else variance)
    f = with_variance if learned else smooth_model
    x, g = torch.randn(2, 3, 4, 4), seeded(5)
    draws = [torch.randn(x.shape, generator=g) for _ in range(steps)]
    scheduler = diffusers.DDPMScheduler(
        beta_schedule=SCHEDULES[schedule],
        prediction_type=PREDICTIONS[prediction],
        variance_type="learned_range" if learned else f"fixed_{variance}",
        clip_sample=False,
        timestep_spacing=spacing,
    )
    scheduler.set_timesteps(steps)
    found = states(diffusion.sample, f, x, steps, spacing=spacing, generator=seeded(5))
    assert_steps(found, scheduler, f, draws, monkeypatch)


@pytest.mark.parametrize("eta", [0.0, 0.6])
@pytest.mark.parametrize("clip", [None, 1.0], ids=["", "clip"])
@pytest.mark.parametrize("schedule, prediction", [("linear", "eps"), ("linear", "x0"), ("cosine", "v")])
def test_steps_are_diffusers_ddim(schedule, prediction, clip, eta, monkeypatch):
    diffusion, steps = GaussianDiffusion(schedule, prediction), 20
    x, g = torch.randn(2, 3, 4, 4), seeded(5)
    draws = [torch.randn(x.shape, generator=g) for _ in range(steps)]
    scheduler = diffusers.DDIMScheduler(
        beta_schedule=SCHEDULES[schedule],
        prediction_type=PREDICTIONS[prediction],
        clip_sample=clip is not None,
        timestep_spacing="trailing",
    )
    scheduler.set_timesteps(steps)
    options = dict(eta=eta, use_clipped_model_output=clip is not None)
    found = states(diffusion.ddim, smooth_model, x, steps, spacing="trailing", eta=eta, clip=clip, generator=seeded(5))
    assert_steps(found, scheduler, smooth_model, draws, monkeypatch, **options)


@pytest.mark.parametrize("method", ["sample", "ddim"])
def test_known_frames_stay_and_lists_equal_batches(method):
    sample, noise, known = getattr(GaussianDiffusion(), method), torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 1, 2, 2)
    seen, told = [], []

    def model(x, t):
        seen.append([v[:, :1] for v in x])
        return smooth_model(x, t) if isinstance(x, Tensor) else [smooth_model(v[None], t[:1])[0] for v in x]

    both = [seeded(1), seeded(2)]
    whole = sample(model, noise, 5, known=known, generator=both, progress=lambda *n: told.append(n))
    both = [seeded(1), seeded(2)]
    parts = sample(model, list(noise), 5, known=list(known), generator=both)
    assert_bitwise(whole, torch.stack(parts))
    assert_bitwise(whole[:, :, :1], known)
    assert all(torch.equal(frame, known[i]) for frames in seen for i, frame in enumerate(frames))
    assert told == [(i, 5) for i in range(1, 6)]


def test_seeds_decide():
    diffusion, x = GaussianDiffusion(), torch.randn(2, 3, 4)
    a, b, c = (diffusion.sample(smooth_model, x, 5, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(diffusion.ddim(smooth_model, x, 5), diffusion.ddim(smooth_model, x, 5))


# Errors -----------------------------------------------------------------------------------------------------------

X, T = torch.zeros(2, 3, 4, 2, 2), torch.tensor([0, 999])


def same(x, t):
    return x


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda d: GaussianDiffusion("sigmoid"), "got 'sigmoid', expected one of linear, cosine"),
        (
            lambda d: GaussianDiffusion(prediction="score"),
            "unknown prediction; got 'score', expected one of eps, x0, v",
        ),
        (
            lambda d: GaussianDiffusion(variance="medium"),
            "unknown variance; got 'medium', expected one of small, large",
        ),
        (lambda d: d.add_noise(X, X, T[:1]), r"add_noise: t must be one time per sample; got \[1\], expected \[2\]"),
        (lambda d: d.add_noise(X, X, T + 1), r"t must lie in \[0, 1000\); got \[1, 1000\]"),
        (lambda d: d.add_noise(X, X, T - 1), r"t must lie in \[0, 1000\); got \[-1, 998\]"),
        (lambda d: d.add_noise(X, X[:, :1], T), "has the wrong size"),
        (lambda d: d.sample(same, X, 1001), "whole number from 1 to 1000"),
        (lambda d: d.sample(same, X, 10, spacing="even"), "got 'even', expected one of linspace"),
        (lambda d: d.ddim(same, X, 10, eta=1.5), r"eta must lie in \[0, 1\]; got 1.5"),
        (lambda d: d.sample(same, X, 10, known=X), "known must be the first frames"),
        (lambda d: d.loss(same, X, known_frames=4), "known_frames must be from 0 to T - 1"),
        (lambda d: d.loss(lambda x, t: x[:, :1], X), r"got \[2, 1, 4, 2, 2\], expected \[2, 3, 4, 2, 2\]"),
        (
            lambda d: GaussianDiffusion(learn_sigma=True).loss(same, X),
            r"expected \[2, 6, 4, 2, 2\] \(learn_sigma=True\)",
        ),
        (
            lambda d: GaussianDiffusion(learn_sigma=True).loss(same, list(X)),
            r"expected \[\[6, 4, 2, 2\], \[6, 4, 2, 2\]\]",
        ),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(GaussianDiffusion())


def test_times_are_integers():
    with pytest.raises(TypeError, match=r"t must hold integer steps; got torch.float32"):
        GaussianDiffusion().add_noise(X, X, T.float())
