"""Generation with random weights: the right sizes, the same clip for the same seed, errors that say what to do."""

import json
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch

import fastdit
from fastdit.data import captions, to_frames, to_video
from fastdit.generation import Generator
from fastdit.testing import checkpoints, close
from fastdit.training import CheckpointError

PROMPT = "a red circle moving right on a blue background"
OTHER = "a big white star standing still on a black background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return checkpoints.untrained(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def generator(folder):
    return Generator.load(folder, device="cpu")


def latents(generator, prompt=PROMPT, **options):
    return generator.latents(prompt, **{"frames": 5, "size": (32, 48), "steps": 3, "seed": 1, **options})


@pytest.mark.parametrize("frames, height, width", [(1, 64, 64), (5, 16, 48), (17, 64, 32), (9, 80, 48)])
def test_any_length_and_size(generator, frames, height, width):
    clip = generator.generate(PROMPT, frames=frames, size=(height, width), steps=1)
    assert clip.size == (frames, height, width) and clip.caption == PROMPT and clip.fps == 8.0
    assert clip.frames.dtype == torch.uint8 and clip.frames.unique().numel() > 8


def test_a_seed_reproduces_the_clip_bit_by_bit(generator, folder):
    first = latents(generator)
    close.assert_bitwise(latents(Generator.load(folder, device="cpu")), first)
    for other in (latents(generator, seed=2), latents(generator, OTHER), latents(generator, guidance=1.0)):
        assert (other - first).abs().max() > 0.01


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_backends_and_batches_agree(folder, method, backend):
    """A prompt of a batch gives what it gives alone; truth is fp64, and what PyTorch makes of fp32 the measure."""
    options = dict(method=method, frames=9)
    with fastdit.use_backend("reference"):
        truth = latents(Generator.load(folder, device="cpu").to(torch.float64), seed=2, **options)
        baseline = latents(Generator.load(folder, device="cpu"), seed=2, **options)
    with fastdit.use_backend(backend) if backend else nullcontext():
        both = latents(Generator.load(folder, device="cpu"), [OTHER, PROMPT], seed=1, **options)
    assert len(both) == 2
    close.assert_close(both[1:], truth, baseline)


@pytest.mark.parametrize("method", [None, "ddim", "ddpm"])
def test_a_model_trained_as_ddpm(tmp_path, method):
    generator = Generator.load(checkpoints.untrained(tmp_path, diffusion={"kind": "ddpm"}), device="cpu")
    image = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)
    first = latents(generator, method=method, image=image)
    close.assert_bitwise(latents(generator, method=method, image=image), first)
    with torch.no_grad():
        coded = generator.vae(to_video(image[None])[None])
    assert torch.equal(next(generator.decode(first))[0], to_frames(coded[0]))
    with pytest.raises(ValueError, match="unknown method; got 'heun', expected one of ddim, ddpm"):
        latents(generator, method="heun")


@pytest.mark.parametrize("method", ["ddim", "ddpm"])
def test_ddpm_draws_for_each_prompt_alone(tmp_path, method):
    generator = Generator.load(checkpoints.untrained(tmp_path, diffusion={"kind": "ddpm"}), device="cpu")
    generator.to(torch.float64)  # in which packing makes no pixel another one
    options = dict(method=method, frames=5, size=(32, 48), steps=3)
    both = generator.generate([OTHER, PROMPT], seed=1, **options)
    alone = generator.generate(PROMPT, seed=2, **options)
    assert torch.equal(both[1].frames, alone.frames) and not torch.equal(both[0].frames, alone.frames)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_that_is_not_there(folder):
    with pytest.raises(ValueError, match="expected cpu: torch sees no GPU"):
        Generator.load(folder, device="cuda")


@pytest.mark.gpu
def test_devices_agree(folder):
    with fastdit.use_backend("reference"):
        truth = latents(Generator.load(folder, device="cpu").to(torch.float64))
        baseline = latents(Generator.load(folder, device="cuda")).cpu()
    close.assert_close(latents(Generator.load(folder)).cpu(), truth, baseline)


def test_a_batch_is_as_many_clips(generator):
    clips = generator.generate([PROMPT, OTHER], frames=5, steps=1)
    assert [clip.caption for clip in clips] == [PROMPT, OTHER] and all(clip.size == (5, 64, 64) for clip in clips)


def test_steps_are_told(generator):
    told = []
    latents(generator, steps=4, progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_the_first_frame_is_the_given_image(generator):
    image = torch.randint(0, 256, (32, 48, 3), dtype=torch.uint8)
    clip = generator.generate(PROMPT, frames=9, steps=2, image=image)
    assert clip.size == (9, 32, 48)
    with torch.no_grad():
        coded = generator.vae(to_video(image[None])[None])[0]
    assert torch.equal(clip.frames[:1], to_frames(coded))
    other = generator.generate(PROMPT, frames=9, steps=2, image=255 - image)
    assert not torch.equal(other.frames[4:], clip.frames[4:])


def test_the_model_is_told_that_a_frame_is_given(generator, monkeypatch):
    seen = []
    forward = type(generator.dit).forward

    def spy(self, x, t, text=None, *, known_frames=0, keep=None):
        seen.append((known_frames, x[0, :, 0].clone()))
        return forward(self, x, t, text, known_frames=known_frames, keep=keep)

    monkeypatch.setattr(type(generator.dit), "forward", spy)
    latents(generator)
    assert {known for known, _ in seen} == {0}
    seen.clear()
    latents(generator, image=torch.zeros(32, 48, 3, dtype=torch.uint8))
    assert {known for known, _ in seen} == {1} and all(torch.equal(frame, seen[0][1]) for _, frame in seen)


def test_the_stream_is_the_clip(generator):
    parts = list(generator.stream(PROMPT, seed=3, frames=13, steps=2))
    assert [tuple(part.shape) for part in parts] == [(1, 1, 64, 64, 3)] + 3 * [(1, 4, 64, 64, 3)]
    whole = generator.generate(PROMPT, seed=3, frames=13, steps=2)
    assert torch.equal(torch.cat(parts, dim=1)[0], whole.frames)


MINUTE = """
import resource, sys, torch
from fastdit.data import media
from fastdit.generation import Generator

generator = Generator.load(sys.argv[1], device="cpu")
peaks = []
for frames in (121, 481):
    latents = torch.zeros(1, 4, 1 + frames // 4, 16, 24)  # a still picture makes a small file
    media.write(sys.argv[2], (part[0] for part in generator.decode(latents)), 8.0)
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(len(media.read(sys.argv[2]).frames), peaks[1] - peaks[0])
"""


def test_a_minute_takes_no_more_memory_than_a_quarter(folder, tmp_path):
    """The 360 frames more, of 128 x 192, are 25 MiB as bytes and 101 MiB as the decoder gives them."""
    program = [sys.executable, "-c", MINUTE, str(folder), str(tmp_path / "minute.mp4")]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, growth = done.stdout.split()
    assert int(count) == 481 and float(growth) < 16


def test_short_prompts_are_expanded(generator):
    assert generator.expanded(PROMPT) == captions.expand(PROMPT) != PROMPT
    assert generator.expanded("") == ""
    long = captions.expand(PROMPT)
    assert generator.expanded(long) == long
    close.assert_bitwise(latents(generator, PROMPT), latents(generator, long, expand=False))
    assert not torch.equal(latents(generator, PROMPT, expand=False), latents(generator, PROMPT))
    image = torch.zeros(32, 48, 3, dtype=torch.uint8)
    close.assert_bitwise(latents(generator, image=image, expand=False), latents(generator, image=image))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(frames=18), r"frames must be 1 \+ a multiple of 4; got 18, nearest 17 or 21"),
        (dict(frames=0), r"got 0, nearest 1"),
        (dict(size=(70, 64)), r"multiples of 16 and 16; got \(70, 64\), nearest: height 64 or 80, width 64"),
        (dict(size=(8, 0)), r"got \(8, 0\), nearest: height 16, width 16"),
        (dict(size=(64,)), r"size must be \(height, width\)"),
        (dict(steps=0), r"steps"),
        (dict(method="rk4"), r"unknown method; got 'rk4', expected one of euler, heun"),
        (dict(prompt="a rde circle on a blue background"), r"unknown words.*'rde' \(did you mean 'red'\?\)"),
        (dict(prompt="a red and blue circle moving up"), r"one colour can be shown"),
        (dict(prompt=[]), r"prompt must be a string or a list of at least one"),
        (dict(prompt=[PROMPT, 3]), r"prompt must be a string or a list"),
        (dict(image=torch.zeros(40, 48, 3, dtype=torch.uint8)), r"multiples of 16 .* got \(40, 48\)"),
        (dict(image=torch.zeros(32, 48, 3)), r"bytes"),
        (dict(image=torch.zeros(32, 48, 3, dtype=torch.uint8), frames=1), r"got frames=1, expected 5 or more"),
    ],
)
def test_errors(generator, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        generator.generate(**{"prompt": PROMPT, "steps": 1, **options})


def test_a_checkpoint_without_a_denoiser(folder, tmp_path):
    document = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({k: document[k] for k in ("format", "fps", "vae")}))
    (tmp_path / "vae.safetensors").write_bytes((folder / "vae.safetensors").read_bytes())
    with pytest.raises(ValueError, match="fastdit train dit"):
        Generator.load(tmp_path)


def test_bad_checkpoints_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config.json"):
        Generator.load(tmp_path / "nowhere")
