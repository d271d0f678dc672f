"""`fastdit train`: help that teaches, exit statuses, and a training from pixels to a checkpoint, also on a folder."""

import pytest
import torch
from typer.testing import CliRunner

from fastdit.cli import app
from fastdit.data import Shapes
from fastdit.data.media import write
from fastdit.training import load, plot

SMALL = """
[vae]
clips = 12
held_out = 2
sizes = [[5, 32, 32], [1, 32, 48]]
crops = [[5, 24, 24], [1, 32, 32]]
pixels = 5760
[vae.model]
widths = [8, 8]
[vae.loop]
steps = 4
log_every = 2
[dit]
clips = 12
held_out = 2
sizes = [[5, 32, 32], [1, 32, 48]]
tokens = 48
[dit.model]
hidden_size = 32
depth = 1
num_heads = 2
text_size = 16
[dit.text]
depth = 1
[dit.loop]
steps = 4
log_every = 2
"""


def call(*arguments):
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["train", *map(str, arguments)])


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("command", ["vae", "dit", "decoder"])
def test_help_teaches(command):
    done = call(command, "--help")
    assert done.exit_code == 0 and f"fastdit train {command} " in done.output and "--resume" in done.output


@pytest.fixture
def folder(tmp_path):
    """Eight clips and four pictures, one file that is none, and captions."""
    clips = tmp_path / "clips"
    clips.mkdir()
    shapes = Shapes("train", ((9, 40, 48),), 12)
    for i in range(12):
        clip = shapes[i]
        name, frames = (f"{i:02}.mp4", clip.frames) if i % 3 else (f"{i:02}.png", clip.frames[:1])
        write(clips / name, frames, 8.0)
        (clips / f"{i:02}.txt").write_text(f"{clip.caption}, rendered")
    (clips / "broken.mp4").write_bytes(b"no video")
    (clips / "broken.txt").write_text("broken")
    return clips


@pytest.mark.parametrize("data", ["shapes", "folder"])
def test_from_pixels_to_a_checkpoint(data, small, tmp_path, request):
    source = data if data == "shapes" else request.getfixturevalue("folder")
    out = tmp_path / "out"
    done = call("vae", "--data", source, "--config", small, "--out", out)
    assert done.exit_code == 0, done.output
    done = call("dit", "--data", source, "--config", small, "--vae", out, "--out", out, "--steps", 2)
    assert done.exit_code == 0 and "dit step 2/2" in done.output, done.output
    again = call("dit", "--data", source, "--config", small, "--vae", out, "--out", out, "--resume")
    assert again.exit_code == 0 and "going on from step 2" in again.output and "dit step 4/4" in again.output
    models = load(out)
    assert [n for n, _ in plot.read(out / "state" / "dit" / "loss.csv")["loss"]] == [2, 4]
    text = models.text(["a red circle" if data == "shapes" else "rendered circle"])
    with torch.no_grad():
        v = models.dit(torch.randn(1, 8, 2, 4, 4), torch.tensor([500.0]), text)
    assert v.shape == (1, 8, 2, 4, 4) and bool(v.isfinite().all())


def test_a_decoder_trained_on_keeps_latents_and_dit(small, tmp_path):
    out = tmp_path / "out"
    assert call("vae", "--config", small, "--out", out).exit_code == 0
    assert call("dit", "--config", small, "--vae", out, "--out", out, "--steps", 1).exit_code == 0
    before, document = load(out), (out / "config.json").read_text()
    same = ("--config", small, "--vae", out, "--out", out)
    done = call("decoder", *same, "--steps", 2)
    assert done.exit_code == 0 and "decoder step 2/2" in done.output, done.output
    done = call("decoder", *same, "--resume")
    assert done.exit_code == 0 and "going on from step 2" in done.output, done.output
    after = load(out)
    assert (out / "config.json").read_text() == document
    changed = {n for n, t in after.vae.state_dict().items() if not torch.equal(t, before.vae.state_dict()[n])}
    assert changed == {n for n, _ in after.vae.named_parameters() if n.startswith("decoder.")}
    assert all(torch.equal(t, before.dit.state_dict()[n]) for n, t in after.dit.state_dict().items())


def test_ddpm(small, tmp_path):
    learned = SMALL.replace("[dit.model]", "[dit.model]\nlearn_sigma = true")
    small.write_text(learned + '[dit.diffusion]\nkind = "ddpm"\nprediction = "eps"\nlearn_sigma = true\n')
    out = tmp_path / "out"
    assert call("vae", "--config", small, "--out", out).exit_code == 0
    done = call("dit", "--config", small, "--vae", out, "--out", out)
    assert done.exit_code == 0, done.output
    assert type(load(out).diffusion).__name__ == "GaussianDiffusion"


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (("vae", "--config", "nonsense"), 2, "no such configuration; got 'nonsense', expected one of shapes, smoke"),
        (("vae", "--config", "smoke", "--data", "nowhere"), 2, "no such data; got 'nowhere', expected 'shapes' or a"),
        (("vae", "--config", "smoke", "--backend", "magic"), 2, "magic"),
        (("vae", "--config", "smoke", "--parallel", "tp"), 2, "unknown mode; got 'tp', expected ddp or fsdp"),
        (("dit", "--config", "smoke", "--vae", "nowhere"), 1, "nowhere holds none; got no config.json"),
    ],
)
def test_requests_that_cannot_be_served(arguments, status, message, tmp_path):
    done = call(*arguments, "--out", tmp_path / "out")
    assert done.exit_code == status and message in done.output.replace("\n", " "), done.output


def test_crops_larger_than_the_clips(small, tmp_path):
    small.write_text(SMALL.replace("[5, 24, 24]", "[9, 24, 24]"))
    done = call("vae", "--config", small, "--out", tmp_path / "out")
    assert done.exit_code == 2 and "crops larger than every clip; got [(9, 24, 24)]" in done.output


def test_an_empty_folder(small, tmp_path):
    (tmp_path / "empty").mkdir()
    done = call("vae", "--config", small, "--data", tmp_path / "empty", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "empty" in done.output
