"""`fastdit generate` and the judge, on a checkpoint with random weights."""

import inspect
import json
import re

import pytest
import torch
from typer.testing import CliRunner

from fastdit.cli import app
from fastdit.cli.generate import generate
from fastdit.data import Shapes, media
from fastdit.data.detect import Found
from fastdit.generation import Generator, judge, ship
from fastdit.testing import checkpoints

PROMPT = "a red circle moving right on a blue background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.untrained(tmp_path_factory.mktemp("checkpoint"))


def call(folder, *arguments):
    options = ["--checkpoint", folder, "--device", "cpu", "--steps", 2]
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, ["generate", PROMPT, *map(str, [*options, *arguments])])


@pytest.mark.parametrize("name, frames", [("clip.mp4", 5), ("clip.gif", 5), ("clip.png", 1)])
def test_writes_a_file_and_says_so(folder, tmp_path, name, frames):
    out = tmp_path / "made" / name
    done = call(folder, "--out", out, "--size", "32x48", *(["--frames", 5] if frames > 1 else []))
    assert done.exit_code == 0, done.output
    assert media.read(out).size == (frames, 32, 48)
    assert f"{frames} frames" in done.output and "expanded: " in done.output


def test_command_generator_and_judge_have_the_same_defaults():
    asked = [inspect.signature(f).parameters for f in (Generator.latents, generate, judge.main)]
    for name in ("steps", "guidance", "seed"):
        assert len({parameters[name].default for parameters in asked}) == 1, name


def test_a_seed_writes_the_same_file(folder, tmp_path):
    for name, seed in (("a.png", 1), ("b.png", 1), ("c.png", 2)):
        assert call(folder, "--out", tmp_path / name, "--seed", seed).exit_code == 0
    first, again, other = ((tmp_path / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert first == again != other


def test_starts_from_an_image(folder, tmp_path):
    image = torch.randint(0, 256, (50, 64, 3), dtype=torch.uint8)
    media.write(tmp_path / "first.png", image[None])
    options = ("--image", tmp_path / "first.png", "--frames", 5, "--size", "32x48")
    assert call(folder, "--out", tmp_path / "a.gif", *options).exit_code == 0
    clip = Generator.load(folder, device="cpu").generate(PROMPT, image=image, frames=5, size=(32, 48), steps=2)
    media.write(tmp_path / "b.gif", clip.frames, clip.fps)
    assert (tmp_path / "a.gif").read_bytes() == (tmp_path / "b.gif").read_bytes()


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (("--frames", 6), 2, "nearest 5 or 9"),
        (("--frames", 0), 2, "got 0, nearest 1"),
        (("--device", "nonsense"), 2, "no such device; got 'nonsense'"),
        (("--size", "64"), 2, "HEIGHTxWIDTH in pixels; got '64'"),
        (("--size", "60x64"), 2, "nearest: height 48 or 64, width 64"),
        (("--out", "clip.avi"), 2, "unknown suffix; got 'clip.avi'"),
        (("--method", "rk4"), 2, "expected one of euler, heun"),
        (("--backend", "nonsense"), 2, "nonsense"),
        (("--image", "nowhere.png"), 1, "no such file; got nowhere.png"),
        (("--checkpoint", "nowhere"), 1, "no config.json"),
    ],
)
def test_errors_are_one_message(folder, arguments, status, message):
    done = call(folder, *arguments)
    assert done.exit_code == status and message in done.output and "Traceback" not in done.output


def test_a_broken_image_is_named(folder, tmp_path):
    (tmp_path / "first.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    done = call(folder, "--image", tmp_path / "first.png")
    assert done.exit_code == 2 and "first.png" in done.output and "cannot be decoded" in done.output


class Truth:
    """A generator that renders what it is asked for, but for the scenes in `wrong`."""

    def __init__(self, wrong=()):
        self.wrong, self.asked = wrong, 0
        self.shapes = Shapes("held_out", length=12, seed=0)

    def generate(self, prompts, **options):
        clips = []
        for prompt in prompts:
            clip = self.shapes[self.asked]
            frames = clip.frames.flip(0) if self.asked in self.wrong else clip.frames
            clips.append(type(clip)(frames, prompt, clip.fps))
            self.asked += 1
        return clips


def test_the_judge_believes_rendered_truth():
    told = []
    verdicts = judge.following(Truth(), 12, batch=5, progress=lambda done, total: told.append((done, total)))
    assert judge.share(verdicts) == judge.share(verdicts, "background") == 1.0
    assert told == [(5, 12), (10, 12), (12, 12)]
    for v in verdicts:
        assert (
            v.asked.colour in v.prompt and v.asked.shape in v.prompt and f"{v.asked.background} background" in v.prompt
        )


def test_the_judge_sees_the_wrong_motion():
    moving = [i for i, v in enumerate(judge.following(Truth(), 12)) if v.asked.motion != "still"]
    assert len(moving) > 2
    verdicts = judge.following(Truth(wrong=moving[:2]), 12)
    assert judge.share(verdicts) == judge.share(verdicts, "motion") == 10 / 12 and judge.share(verdicts, "shape") == 1.0
    assert [i for i, v in enumerate(verdicts) if not v.right()] == moving[:2]


def test_psnr():
    a = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    assert judge.psnr(a, a) == float("inf")
    assert judge.psnr(a, a + 51) == pytest.approx(20 * torch.log10(torch.tensor(5.0)).item())


def test_the_judge_fails_an_untrained_checkpoint(folder, tmp_path):
    out = tmp_path / "verdicts.json"
    options = ["--checkpoint", folder, "--prompts", 3, "--clips", 2, "--steps", 1, "--device", "cpu", "--json", out]
    done = CliRunner(env={"COLUMNS": "200"}).invoke(judge.app, list(map(str, options)))
    assert done.exit_code == 1, done.output
    assert re.search(r"prompt following: [\d.]+ % of 3 clips right; the bar is 90 %", done.output)
    document = json.loads(out.read_text())
    assert len(document["verdicts"]) == 3 and len(document["psnr"]) == 2 and max(document["psnr"]) < judge.PSNR
    assert set(document["verdicts"][0]["found"]) == set(Found.__dataclass_fields__)


def test_shipping_halves_the_bytes(folder, tmp_path, monkeypatch):
    size = ship.ship(folder, tmp_path)
    assert (
        size
        == sum(p.stat().st_size for p in tmp_path.iterdir())
        < 0.6 * sum(p.stat().st_size for p in folder.iterdir())
    )
    large, small = Generator.load(folder, device="cpu"), Generator.load(tmp_path, device="cpu")
    for (name, a), b in zip(large.dit.named_parameters(), small.dit.parameters(), strict=True):
        assert b.dtype == torch.float32 and torch.equal(a.half().float() if a.ndim > 1 else a, b), name
    assert torch.equal(large.vae.latent_std, small.vae.latent_std)
    monkeypatch.setattr(ship, "LIMIT", size // 2)
    with pytest.raises(ValueError, match="too large"):
        ship.ship(folder, tmp_path / "more")
    assert not (tmp_path / "more").exists()


@pytest.mark.parametrize("command, arguments", [(judge.app, ("--checkpoint", "nowhere")), (ship.app, ("nowhere",))])
def test_tools_say_what_is_wrong(command, arguments):
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code in (1, 2) and "no config.json" in done.output and isinstance(done.exception, SystemExit)
