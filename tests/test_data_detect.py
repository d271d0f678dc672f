"""data.detect: right on rendered truth in 98 of 100, also when it is noisy or blurred; nothing is seen in nothing."""

import numpy as np
import pytest
import torch

from fastdit.data import Clip, Scene, Shapes, detect, render, shapes
from fastdit.data.captions import parse
from fastdit.data.clip import ATTRIBUTES, Attributes
from fastdit.data.detect import describe

SIZES = [(17, 64, 64), (9, 32, 32), (33, 48, 80), (5, 128, 96), (2, 64, 64), (1, 64, 64), (17, 24, 24)]


def psnr(a, b):
    return 10 * np.log10(255**2 / (a.float() - b.float()).square().mean().item())


def noisy(frames, generator):
    noise = torch.randn(frames.shape, generator=generator) * 10.15  # 28 dB
    return (frames.float() + noise).round().clamp(0, 255).to(torch.uint8)


def blurred(frames, generator):
    """The blur that takes a clip to 29 dB: several pixels where the colours are close."""
    x = frames.permute(0, 3, 1, 2).float()
    for sigma in np.arange(0.5, 0.05 * min(x.shape[2:]), 0.25):
        line = torch.exp(-torch.arange(-8, 9).float().square() / (2 * sigma**2))
        kernel = (line / line.sum()).expand(3, 1, 1, -1)
        y = torch.nn.functional.pad(x, (8, 8, 8, 8), mode="replicate")
        y = torch.nn.functional.conv2d(y, kernel, groups=3)
        y = torch.nn.functional.conv2d(y, kernel.transpose(2, 3), groups=3)
        if psnr(x, y) < 29:
            break
    return y.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def clean(frames, generator):
    return frames


def rates(size, spoil, clips):
    """The share of clips for which each attribute is right."""
    generator = torch.Generator().manual_seed(0)
    data = Shapes("all", (size,), clips, seed=11)
    right = dict.fromkeys(ATTRIBUTES, 0)
    for i in range(clips):
        scene = data.scene(i)
        found = detect(spoil(render(scene, size[1:], size[0]), generator))
        for name in ATTRIBUTES:
            expected = "" if name == "motion" and size[0] == 1 else getattr(scene, name)
            right[name] += getattr(found, name) == expected
    return {name: n / clips for name, n in right.items()}


@pytest.mark.parametrize("spoil", [clean, noisy, blurred], ids=lambda f: f.__name__)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_rendered_truth(size, spoil):
    found = rates(size, spoil, 50)
    assert min(found.values()) >= 0.98, found


@pytest.mark.parametrize("spoil", [clean, noisy, blurred], ids=lambda f: f.__name__)
def test_places(spoil):
    """Where the path lies across its direction; nearer than a fiftieth of the room to the next part, either may do."""
    generator = torch.Generator().manual_seed(2)
    data, right = Shapes("all", length=60, seed=5), []
    for i in range(60):
        scene = data.scene(i)
        found = detect(spoil(render(scene), generator))
        for name, share, along in (("row", scene.y, ("up", "down")), ("column", scene.x, ("left", "right"))):
            if scene.motion not in along and 0.1 <= (5 * share) % 1 <= 0.9:
                right.append(getattr(found, name) == getattr(scene, name))
    assert len(right) > 40 and sum(right) / len(right) >= 0.98


@pytest.mark.full
@pytest.mark.parametrize("spoil", [clean, noisy, blurred], ids=lambda f: f.__name__)
def test_every_combination(spoil):
    generator = torch.Generator().manual_seed(1)
    wrong = dict.fromkeys(ATTRIBUTES, 0)
    for k, (colour, shape, motion, background) in enumerate(shapes.combinations()):
        scene = Scene(colour, shape, motion, shapes.SIZES[k % 2], background, (k % 7) / 6, (k % 11) / 10)
        found = detect(spoil(render(scene), generator))
        for name in ATTRIBUTES:
            wrong[name] += getattr(found, name) != getattr(scene, name)
    assert max(wrong.values()) <= 0.02 * len(shapes.combinations()), wrong


def test_spoilt_clips_have_the_psnr_that_is_claimed():
    frames = render(Scene("red", "star", "left", "big", "blue"))
    for spoil in (noisy, blurred):
        assert 27.5 < psnr(spoil(frames, torch.Generator().manual_seed(0)), frames) < 30.5


def test_wrong_clips_are_seen_as_wrong():
    """A judge that always agreed would be of no use: played backwards, upside down, in another colour, stopped."""
    scene = Scene("red", "triangle", "right", "big", "blue", 0.4, 0.4)
    frames = render(scene)
    assert detect(frames.flip(0)).motion == "left"
    assert detect(frames.transpose(1, 2)).motion == "down"
    assert detect(frames[:1].expand_as(frames)).motion == "still"
    assert detect(frames.flip(3)).colour == "blue" and detect(frames.flip(3)).background == "red"
    assert (
        detect(frames).size == "big" and detect(render(Scene("red", "circle", "up", "small", "blue"))).size == "small"
    )


def test_a_jumping_shape_does_not_move_on():
    """Frames in random order have no direction."""
    frames = render(Scene("red", "square", "up", "small", "white"), frames=33)
    for seed in range(5):
        order = torch.randperm(33, generator=torch.Generator().manual_seed(seed))
        assert detect(frames[order]).motion == ""


@pytest.mark.parametrize("frames", [1, 9])
def test_nothing_to_be_seen(frames):
    empty = torch.full((frames, 32, 48, 3), 245, dtype=torch.uint8)
    assert detect(empty) == detect(noisy(empty, None)) == type(detect(empty))("", "", "", "", "white")
    assert describe(Clip(empty, "", 8)) == "a plain white background"


def test_frames_without_the_shape():
    frames = render(Scene("red", "square", "down", "big", "white"))
    frames[8] = frames[8, 0, 0]
    found = detect(frames)
    assert (found.colour, found.shape, found.motion) == ("red", "square", "down")
    frames[1:] = frames[0, 0, 0]
    found = detect(frames)
    assert (found.colour, found.shape, found.motion) == ("red", "square", "")


def test_describe_tells_what_is_seen():
    scene = Scene("yellow", "star", "up", "small", "purple")
    text = describe(Clip(render(scene), "", 8))
    assert parse(text) == Attributes("yellow", "star", "up", "small", "purple", column="central")
    assert text == describe(Clip(render(scene), "other", 8))
    still = describe(Clip(render(scene, frames=1), "", 8))
    assert parse(still) == Attributes("yellow", "star", "", "small", "purple", row=parse(still).row, column="central")


@pytest.mark.parametrize("frames", [torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(0, 4, 4, 3).byte()])
def test_bad_frames(frames):
    with pytest.raises(ValueError, match=r"detect: frames are \(T, H, W, 3\)"):
        detect(frames)
    with pytest.raises(TypeError, match="detect: frames are bytes"):
        detect(frames.float())
