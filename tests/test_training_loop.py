"""Schedules, averages, batches and losses of a training; the small one learns."""

import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from torch import nn

from fastdit.data import to_video
from fastdit.testing import training
from fastdit.testing.close import assert_bitwise, assert_close
from fastdit.training import latents, load, load_vae, loop, parallel, plot, source
from fastdit.training.config import Optimizer
from fastdit.training.ema import EMA
from fastdit.training.trainer import rate

KINDS = ("vae", "dit")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VAE to encode with, and the latents of the smoke configuration beside it."""
    return training.untrained_vae(training.smoke(), tmp_path_factory.mktemp("train"))


def test_rate():
    cosine = Optimizer(lr=2.0, warmup=4, schedule="cosine", final=0.1)
    assert [rate(n, cosine, 24) for n in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert rate(4, cosine, 24) == 2.0 and rate(24, cosine, 24) == pytest.approx(0.2)
    assert rate(14, cosine, 24) == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    assert rate(100, replace(cosine, schedule="constant"), 24) == 2.0


def test_average():
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    average, weights = EMA(layer, 0.9), [layer.weight.detach().clone()]
    for step in range(60):
        with torch.no_grad():
            layer.weight += torch.randn(2, 3)
        average.update(step)
        weights.append(layer.weight.detach().clone())
    expected = weights[0]
    for step, w in enumerate(weights[1:]):
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * w
    assert average.shadow["weight"].tolist() == [pytest.approx(row) for row in expected.tolist()]
    with average.applied():
        assert layer.weight.tolist() == [pytest.approx(row) for row in expected.tolist()]
    assert_bitwise(layer.weight.detach(), weights[-1])


def test_parts_are_alike_and_whole():
    weights = [80, 16, 16, 48, 80, 5, 5, 5]
    for count in (1, 2, 3, 8):
        found = parallel.parts(weights, count)
        assert sorted(i for part in found for i in part) == list(range(8)) and all(found)
        sums = [sum(weights[i] for i in part) for part in found]
        assert max(sums) - min(sums) <= max(weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_draws_the_same_in_every_run(kind, folder):
    first, second = (training.trainer(kind, training.smoke(), folder).task for _ in range(2))
    other = training.trainer(kind, training.smoke(seed=1), folder).task

    def video(task, step):
        part = task.draw(step, 1)[0]
        return part.video if kind == "vae" else torch.cat([z.flatten() for z in part.noise])

    assert_bitwise(video(first, 7), video(second, 7))
    for different in (video(first, 8), video(other, 7)):
        assert different.shape != video(first, 7).shape or not torch.equal(different, video(first, 7))


def test_packs_fill_the_tokens_and_show_everything(folder):
    config = training.smoke()
    task = training.trainer("dit", config, folder).task
    sizes, captions, known, total = set(), [], [], 0
    for step in range(60):
        (part,) = task.draw(step, 1)
        tokens = [z.shape[1] * z.shape[2] * z.shape[3] // 4 for z in part.latents]
        assert config.dit.tokens - max(task.tokens) < sum(tokens) <= config.dit.tokens
        assert part.total == len(tokens) == len(part.captions) == len(part.known) and part.t.dtype == torch.float32
        sizes |= {tuple(z.shape) for z in part.latents}
        captions += part.captions
        known += [k for k, z in zip(part.known, part.latents, strict=True) if z.shape[1] > 1]
        assert not any(k for k, z in zip(part.known, part.latents, strict=True) if z.shape[1] == 1)
        total += part.total
    assert sizes == {(8, 2, 4, 4), (8, 3, 4, 6), (8, 1, 6, 4)}
    shorts = {c[0] for c in task.train.captions}
    assert 0.05 < captions.count("") / total < 0.2 and 0.1 < sum(known) / len(known) < 0.35
    assert 0.3 < sum(c in shorts for c in captions) / total < 0.6  # the others are rich, or dropped


def test_long_clips_do_not_dominate(folder):
    """A step's loss is the mean of its samples' own, each alone in a pack of one."""
    model = training.trainer("dit", training.smoke(), folder, dtype=torch.float64).model
    nn.init.normal_(model.dit.final_layer.linear.weight)  # zero at the start
    part = training.trainer("dit", training.smoke(), folder).task.draw(3, 1)[0].to(torch.zeros((), dtype=torch.float64))
    assert len({z.shape for z in part.latents}) > 1
    singles = [replace(part.part([i]), total=1) for i in range(part.total)]
    losses = [model(single)["loss"].item() for single in singles]
    assert model(part)["loss"].item() == pytest.approx(sum(losses) / len(losses)) and len(set(losses)) == len(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_and_recomputation_change_nothing(kind, folder):
    plain = training.smoke()
    truth = training.losses(training.trainer(kind, plain, folder, dtype=torch.float64), 6)
    baseline = training.losses(training.trainer(kind, plain, folder), 6)
    for settings in ({"accumulate": 2}, {"checkpointing": True}):
        found = training.losses(training.trainer(kind, training.smoke(**settings), folder), 6)
        assert_close(found, truth, baseline, str(settings))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_trains_near_fp32(kind, folder):
    low = training.smoke(bf16=True)
    truth = training.losses(training.trainer(kind, training.smoke(), folder, dtype=torch.float64), 5)
    baseline = training.losses(training.trainer(kind, low, folder), 5, backend="reference")
    found = training.losses(training.trainer(kind, low, folder), 5)
    exact = training.losses(training.trainer(kind, training.smoke(), folder), 5)
    assert found.dtype == torch.float32 and not torch.equal(found, exact)
    assert_close(found, truth, baseline)


@torch.no_grad()
def statistics(vae, pool):
    """Mean and deviation of the latents of clips, in the dtype of the VAE."""
    videos = [to_video(f)[None].to(vae.latent_mean.dtype) for f in pool]
    values = torch.cat([vae.encode(v).mean.transpose(0, 1).flatten(1) for v in videos], 1)
    return {"latent_mean": values.mean(1), "latent_std": values.std(1)}


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns_and_leaves_a_checkpoint(kind, folder, tmp_path):
    """Files, columns, and the averaged weights in them; the evaluation gets better."""
    config = training.smoke(steps=40, log_every=10, evaluate_every=10)
    task, part = training.make(kind, config, tmp_path, folder), getattr(config, kind)
    state = tmp_path / "state" / kind
    with open(tmp_path / "log.txt", "w") as file:
        row = loop.fit(task, part.optimizer, part.loop, state, training.HERE, console=Console(file=file, width=300))
    rows = plot.read(state / "loss.csv")
    assert [n for n, _ in rows["loss"]] == [10, 20, 30, 40] and rows["loss"][-1][1] < 0.95 * rows["loss"][0][1]
    evaluation = rows["eval_psnr" if kind == "vae" else "eval_loss"]
    assert [n for n, _ in evaluation] == [10, 20, 30, 40]
    better = evaluation[-1][1] - evaluation[0][1]
    assert better > 0 if kind == "vae" else better < 0
    assert (state / "loss.png").read_bytes().startswith(b"\x89PNG")
    log = (tmp_path / "log.txt").read_text()
    assert f"{kind} step 40/40" in log and f"loss {row['loss']:.4g}" in log
    if kind == "vae":
        vae = load_vae(tmp_path)
        baseline, truth = statistics(vae, task.pool), statistics(vae.double(), task.pool)
        for name in ("latent_mean", "latent_std"):
            assert_close(getattr(vae, name).float(), truth[name], baseline[name], name)
    else:
        loaded = load(tmp_path)
        assert loaded.dit is not None and loaded.text is not None and loaded.fps == config.fps
        task.dit, task.text = loaded.dit, loaded.text
        task.model.dit, task.model.text = loaded.dit, loaded.text
        with torch.no_grad():
            assert task.evaluate()["eval_loss"] == row["eval_loss"]  # the weights that were evaluated are those kept
        assert (tmp_path / "vae.safetensors").read_bytes() == (folder / "vae.safetensors").read_bytes()


def test_latents_are_encoded_once(folder, tmp_path, monkeypatch):
    config = training.smoke()
    first = training.make("dit", config, tmp_path, folder)
    monkeypatch.setattr(source, "clips", lambda *_, **__: pytest.fail("encoded again"))
    again = training.make("dit", config, tmp_path, folder)
    assert again.train.captions == first.train.captions
    for a, b in zip(again.train.latents, first.train.latents, strict=True):
        assert_bitwise(a, b)
    monkeypatch.undo()
    others = training.make("dit", replace(config, dit=replace(config.dit, clips=5)), tmp_path, folder)
    assert len(others.train) == 5 and (tmp_path / "state" / "dit" / latents.FILE).exists()


def test_encoding_is_the_vaes(folder):
    """Each latent is the normalised mean of its own clip, whatever was encoded beside it."""
    config = training.smoke()
    task, vae = training.make("dit", config, folder, folder), load_vae(folder)
    exact = load_vae(folder).double()
    for i, clip in enumerate(source.clips("shapes", config.dit.sizes, config.dit.clips, fps=config.fps)):
        video = to_video(clip.frames)[None]
        with torch.no_grad():
            truth = exact.normalize(exact.encode(video.double()).mean)[0]
            alone = vae.normalize(vae.encode(video).mean)[0]
        assert task.train.captions[i] == clip.caption.splitlines() and len(task.train.captions[i]) == 4
        assert_close(task.train.latents[i], truth, alone)


def test_not_finite(folder, tmp_path):
    config = training.smoke(steps=4, log_every=2)
    task = training.make("dit", config, tmp_path, folder)
    next(task.dit.parameters()).data.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"dit: the loss is not finite; .* by step 2, expected numbers"):
        loop.fit(task, config.dit.optimizer, config.dit.loop, tmp_path / "state" / "dit", training.HERE)
    assert not (tmp_path / "state" / "dit" / loop.STATE).exists()
