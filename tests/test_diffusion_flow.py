"""RectifiedFlow: the path, its loss, and the samplers against closed forms and diffusers' schedulers."""

import math
from itertools import pairwise

import diffusers
import pytest
import torch
from torch import Tensor

from fastdit.diffusion import RectifiedFlow, gaussian_noise
from fastdit.testing.close import assert_bitwise, assert_close

MIXED = [(3, 1, 4, 6), (3, 5, 2, 2), (3, 2, 8, 3)]
MEAN, STD = 0.7, 0.3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixed(seed, dtype=torch.float32, shapes=MIXED):
    return gaussian_noise(shapes, generator=seeded(seed), dtype=dtype)


def exact_velocity(x, t):
    """E[eps - x_0 | x_t] for data of N(MEAN, STD^2): what a perfect model returns."""
    if not isinstance(x, Tensor):
        return [exact_velocity(v[None], t[i : i + 1])[0] for i, v in enumerate(x)]
    s = (t / 1000).view(-1, *(1,) * (x.dim() - 1))
    variance = (1 - s) ** 2 * STD**2 + s**2
    return (s - (1 - s) * STD**2) * (x - (1 - s) * MEAN) / variance - MEAN


def test_path_and_target():
    flow, x0, eps = RectifiedFlow(), mixed(0), mixed(1)
    t = torch.tensor([0.0, 250.0, 1000.0])
    x_t, v = flow.add_noise(x0, eps, t), flow.target(x0, eps)
    for i, s in enumerate((0.0, 0.25, 1.0)):
        truth = (1 - s) * x0[i].double() + s * eps[i].double()
        assert_close(x_t[i], truth, (1 - s) * x0[i] + s * eps[i], "x_t")
        assert_bitwise(v[i], eps[i] - x0[i], "v")
    for found, truth, s in zip(flow.predict_x0(x_t, v, t), x0, (0, 0.25, 1), strict=True):
        i = (0, 0.25, 1).index(s)
        assert_close(found, truth.double(), x_t[i] - s * (eps[i] - x0[i]), "x0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_a_batch_is_its_samples_and_keeps_its_dtype(dtype):
    flow = RectifiedFlow()
    x0, eps = (gaussian_noise((2, 3, 2, 4, 4), generator=seeded(i), dtype=dtype) for i in range(2))
    t = torch.tensor([100.0, 700.0])
    for f in (lambda a, b: flow.add_noise(a, b, t), flow.target, lambda a, b: flow.predict_x0(a, b, t)):
        whole, parts = f(x0, eps), f(list(x0), list(eps))
        assert whole.dtype == dtype
        assert_bitwise(whole, torch.stack(parts))


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_training_times_have_their_distribution(times, shift):
    """Kolmogorov and Smirnov: the largest distance of the two distributions stays below 1.95 / sqrt(n) in 99.9 %."""
    n = 20_000
    t = RectifiedFlow(shift=shift, times=times).sample_times(n, generator=seeded()).double()
    assert t.shape == (n,) and t.min() >= 0 and t.max() <= 1000
    s, _ = (t / 1000).sort()
    u = s / (shift - (shift - 1) * s)  # before the shift
    expected = u if times == "uniform" else torch.special.ndtr(torch.log(u / (1 - u)))
    assert (expected - (torch.arange(n) + 0.5) / n).abs().max() < 1.95 / math.sqrt(n)


def test_loss_is_the_mean_square_of_each_sample():
    flow, x0, eps = RectifiedFlow(), mixed(0, torch.float64), mixed(1, torch.float64)
    t = torch.tensor([10.0, 400.0, 990.0], dtype=torch.float64)
    out = mixed(2, torch.float64)
    seen = []
    loss = flow.loss(lambda x, t: (seen.append((x, t)), out)[1], x0, t=t, noise=eps)
    for i in range(3):
        s = t[i] / 1000
        assert_bitwise(seen[0][0][i], (1 - s) * x0[i] + s * eps[i])
        assert_bitwise(loss[i], (out[i] - (eps[i] - x0[i])).square().mean())
    assert_bitwise(seen[0][1], t)


def test_loss_of_a_list_and_its_gradients_are_those_of_each_sample():
    """Samples of mixed sizes together and one by one: the same bits."""
    flow, x0, eps = RectifiedFlow(), mixed(0), mixed(1)
    t, w = torch.tensor([10.0, 400.0, 990.0]), torch.randn(3, 3, requires_grad=True)

    def model(x, t):
        return [torch.einsum("dc,cthw->dthw", w, v) * s for v, s in zip(x, t / 1000, strict=True)]

    together = flow.loss(model, x0, t=t, noise=eps)
    alone = torch.cat([flow.loss(model, [x0[i]], t=t[i : i + 1], noise=[eps[i]]) for i in range(3)])
    assert_bitwise(together, alone)
    grads = [torch.autograd.grad(loss.sum(), w)[0] for loss in (together, alone)]
    assert_bitwise(*grads)


def test_known_frames_come_clean_and_do_not_count():
    flow = RectifiedFlow()
    x0, eps = (gaussian_noise((2, 3, 4, 2, 2), generator=seeded(i), dtype=torch.float64) for i in range(2))
    t = torch.tensor([500.0, 800.0], dtype=torch.float64)
    out = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)
    for cut in (lambda v: v, list):  # a batch and a list
        seen = []
        options = dict(t=t, noise=cut(eps), known_frames=[1, 3])
        loss = flow.loss(lambda x, t, seen=seen, cut=cut: (seen.append(x), cut(out))[1], cut(x0), **options)
        for i, k in enumerate((1, 3)):
            assert_bitwise(seen[0][i][:, :k], x0[i][:, :k])
            assert_bitwise(seen[0][i][:, k:], flow.add_noise(x0, eps, t)[i][:, k:])
            truth = (out - (eps - x0))[i][:, k:].square().mean()
            assert_close(loss[i].float(), truth, truth.float(), "loss")


def test_weights_leave_out_what_was_dropped():
    flow, x0 = RectifiedFlow(), torch.zeros(1, 1, 1, 2, 2)
    out, noise = torch.tensor([[[[[1.0, 2.0], [3.0, 1e9]]]]]), torch.zeros(1, 1, 1, 2, 2)
    weight = torch.tensor([[[[[1.0, 1.0], [2.0, 0.0]]]]])
    loss = flow.loss(lambda x, t: out, x0, noise=noise, t=torch.tensor([1.0]), weight=weight)
    assert loss.tolist() == [(1 + 4 + 2 * 9) / 4]
    nothing = flow.loss(lambda x, t: out, x0, noise=noise, t=torch.tensor([1.0]), weight=torch.zeros(1, 1, 1, 1, 1))
    assert nothing.tolist() == [0]


def test_draws_are_those_of_the_generator():
    flow, x0 = RectifiedFlow(), torch.zeros(3, 2, 2, 2)

    def seen(generator):
        got = []
        flow.loss(lambda x, t: (got.append((x, t)), x)[1], x0, generator=generator)
        return got[0]

    for a, b in zip(seen(seeded(1)), seen(seeded(1)), strict=True):
        assert_bitwise(a, b)
    assert not torch.equal(seen(seeded(1))[0], seen(seeded(2))[0])
    one = gaussian_noise((2, 4), generator=[seeded(5), seeded(6)])
    assert_bitwise(one[1], gaussian_noise([(3,), (4,)], generator=[seeded(7), seeded(6)])[1])


# Sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_a_perfect_model_is_sampled_to_its_distribution(method, order, shift):
    """N(MEAN, STD^2): the flow takes noise eps to MEAN + STD * eps. Errors fall with the step's power `order`."""
    flow = RectifiedFlow(shift=shift)
    eps = torch.linspace(-3, 3, 24, dtype=torch.float64).view(2, 3, 4)
    errors = [
        float((flow.sample(exact_velocity, eps, steps, method=method) - (MEAN + STD * eps)).abs().max())
        for steps in (32, 64, 128, 256)
    ]
    orders = [math.log2(a / b) for a, b in pairwise(errors)]
    assert all(abs(found - order) < 0.2 for found in orders), orders


def test_straight_paths_need_one_step():
    """One picture as all data: v = (x - x_0) / s, whose paths are straight lines."""
    x0, eps = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    model = lambda x, t: (x - x0) / (t / 1000).view(-1, 1, 1)  # noqa: E731
    for method in ("euler", "heun"):
        for steps in (1, 7):
            found = RectifiedFlow().sample(model, eps, steps, method=method)
            assert_close(found.float(), x0, x0.float())


def smooth_model(x, t):
    """Any smooth function of x and t, in the dtype of x."""
    s = (t / 1000).to(x.dtype).view(-1, *(1,) * (x.dim() - 1))
    return torch.sin(3 * x + 5 * s) - 0.5 * x * s


def diffusers_loop(scheduler, x):
    for t in scheduler.timesteps:
        x = scheduler.step(smooth_model(x, t.expand(len(x))), t, x).prev_sample
    return x


def plain_loop(sigmas, x, heun=False):
    """The same solver in fp64, written out."""
    x = x.double()
    for now, then in pairwise([float(s) for s in sigmas]):
        v = smooth_model(x, torch.full((len(x),), 1000 * now, dtype=torch.float64))
        if heun and then > 0:
            end = x + (then - now) * v
            v = (v + smooth_model(end, torch.full((len(x),), 1000 * then, dtype=torch.float64))) / 2
        x = x + (then - now) * v
    return x


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_is_diffusers_flow_match_euler(shift):
    flow, x, n = RectifiedFlow(shift=shift), torch.randn(2, 4, 3, 5, 5), 12
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - i / n for i in range(n)])  # as the pipelines of Flux and Wan set them
    levels = torch.tensor(flow.levels(n), dtype=torch.float64)
    assert_close(levels.float(), levels, scheduler.sigmas, "noise levels")
    assert_close(flow.sample(smooth_model, x, n), plain_loop(levels, x), diffusers_loop(scheduler, x), "samples")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_heun_is_diffusers_flow_match_heun(shift):
    flow, x = RectifiedFlow(shift=shift), torch.randn(2, 4, 3, 5, 5)
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(9)
    levels = scheduler.sigmas.unique().flip(0).tolist()  # its own grid, whose last level is 1 / 1000
    assert len(levels) == 10 and levels[-1] == 0
    found = flow.sample(smooth_model, x, levels, method="heun")
    assert_close(found, plain_loop(levels, x, heun=True), diffusers_loop(scheduler, x), "samples")


def test_heun_calls_the_model_twice_a_step_but_in_the_last():
    calls, told = [], []
    model = lambda x, t: (calls.append(float(t[0])), x)[1]  # noqa: E731
    progress = lambda *args: told.append(args)  # noqa: E731
    RectifiedFlow().sample(model, torch.randn(1, 2), 4, method="heun", progress=progress)
    assert calls == [1000, 750, 750, 500, 500, 250, 250] and told == [(1, 4), (2, 4), (3, 4), (4, 4)]


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_known_frames_stay_and_lists_equal_batches(method):
    flow, noise = RectifiedFlow(), torch.randn(2, 3, 4, 2, 2)
    known = torch.randn(2, 3, 1, 2, 2)
    seen = []

    def model(x, t):
        seen.append([v[:, :1] for v in x])
        parts = [exact_velocity(v[None], t[i : i + 1])[0] + v[:, :1] for i, v in enumerate(x)]  # frames see the first
        return torch.stack(parts) if isinstance(x, Tensor) else parts

    whole = flow.sample(model, noise, 5, method=method, known=known)
    parts = flow.sample(model, list(noise), 5, method=method, known=list(known))
    assert_bitwise(whole, torch.stack(parts))
    assert_bitwise(whole[:, :, :1], known)
    assert all(torch.equal(frame, known[i]) for frames in seen for i, frame in enumerate(frames))
    assert not torch.equal(whole[:, :, 1:], flow.sample(model, noise, 5, method=method)[:, :, 1:])


def test_levels_may_start_between_data_and_noise():
    """From x_s on (video to video), the rest of the path is the rest of the path."""
    flow, eps = RectifiedFlow(), torch.randn(1, 3, 8, dtype=torch.float64)
    levels = flow.levels(8)
    middle = eps
    for now, then in pairwise(levels[:4]):
        middle = middle + (then - now) * exact_velocity(middle, torch.tensor([1000 * now], dtype=torch.float64))
    assert_bitwise(flow.sample(exact_velocity, middle, levels[3:]), flow.sample(exact_velocity, eps, 8))


def test_sampling_keeps_the_state_while_the_model_rounds():
    """A bf16 model, an fp32 state: the state is not rounded to bf16 between steps."""
    model = lambda x, t: exact_velocity(x, t).bfloat16()  # noqa: E731
    x = torch.randn(1, 4, 16)
    found = RectifiedFlow().sample(model, x, 50)
    assert found.dtype == torch.float32 and not torch.equal(found, found.bfloat16().float())


# Errors -----------------------------------------------------------------------------------------------------------

VIDEO = torch.zeros(2, 3, 4, 2, 2)
SAME = staticmethod(lambda x, t: x).__func__


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda f: RectifiedFlow(shift=0), "shift must be positive; got 0"),
        (lambda f: RectifiedFlow(times="cosine"), "got 'cosine', expected one of logit_normal, uniform"),
        (lambda f: RectifiedFlow(std=-1), "std must be positive"),
        (lambda f: f.sample(SAME, VIDEO, 0), "steps must be a whole number, at least 1; got 0"),
        (lambda f: f.sample(SAME, VIDEO, 2.5), "whole number, at least 1; got 2.5"),
        (lambda f: f.sample(SAME, VIDEO, [1.0, 0.5, 0.7]), "must fall from at most 1 to 0"),
        (lambda f: f.sample(SAME, VIDEO, [20.0, 10.0]), "must fall from at most 1 to 0"),
        (lambda f: f.sample(SAME, VIDEO, []), "must fall from at most 1 to 0"),
        (lambda f: f.sample(SAME, VIDEO, 5, method="rk4"), "got 'rk4', expected one of euler, heun"),
        (
            lambda f: f.sample(lambda x, t: x[:1], VIDEO, 5),
            r"the model's output has the wrong size; got \[1, 3, 4, 2, 2\]",
        ),
        (lambda f: f.sample(SAME, VIDEO, 5, known=VIDEO), "known must be the first frames"),
        (lambda f: f.sample(SAME, VIDEO, 5, known=VIDEO[:1, :, :1]), "known must be the first frames"),
        (lambda f: f.sample(SAME, VIDEO, 5, known=list(VIDEO[:, :, :1])), "known must be the first frames"),
        (lambda f: f.sample(SAME, VIDEO[:, :, 0], 5, known=VIDEO[:, :, 0]), "known must be the first frames"),
        (lambda f: f.add_noise(VIDEO, VIDEO, torch.zeros(3)), r"one time per sample; got \[3\], expected \[2\]"),
        (lambda f: f.add_noise(VIDEO, VIDEO, torch.tensor([0.0, 1001.0])), r"must lie in \[0, 1000\]"),
        (lambda f: f.add_noise(VIDEO, VIDEO[:, :1], torch.zeros(2)), "noise has the wrong size"),
        (lambda f: f.loss(SAME, VIDEO, known_frames=4), "known_frames must be from 0 to T - 1"),
        (lambda f: f.loss(SAME, VIDEO, known_frames=[1, 1, 1]), "known_frames must be from 0 to T - 1"),
        (lambda f: f.loss(SAME, VIDEO[:, :, 0], known_frames=1), "known_frames must be from 0 to T - 1"),
        (lambda f: f.loss(lambda x, t: x[..., :1], VIDEO), "the model's output has the wrong size"),
        (lambda f: f.loss(SAME, torch.zeros(3)), r"x0 must be a batch \(S, C, ...\); got \[3\]"),
        (lambda f: gaussian_noise([(2, 3), (4,)], generator=[seeded()]), "one per sample; got 1, expected 2"),
        (lambda f: gaussian_noise([]), "empty shape"),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError, match=words):
        call(RectifiedFlow())


@pytest.mark.parametrize("x0", [[], "video", torch.zeros(2, 3, dtype=torch.uint8)], ids=["empty", "text", "uint8"])
def test_types(x0):
    with pytest.raises(TypeError, match=r"RectifiedFlow.loss: x0 must"):
        RectifiedFlow().loss(SAME, x0)
