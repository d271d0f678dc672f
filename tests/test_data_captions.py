"""data.captions: the vocabulary is closed, captions are true, and prompts are understood."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fastdit.data import WORDS, Clip, Shapes, expand, render
from fastdit.data.captions import Recaptioned, mixed, parse, rich, short, tokenize
from fastdit.data.clip import ATTRIBUTES, PLACES, Attributes
from fastdit.data.shapes import combinations

WHERE = itertools.cycle(itertools.product(*PLACES.values()))
EVERY = [
    Attributes(colour, shape, motion, size, background, **dict(zip(PLACES, next(WHERE), strict=True)))
    for (colour, shape, motion, background), size in itertools.product(combinations(), ATTRIBUTES["size"])
]
ACROSS = {"left": ["row"], "right": ["row"], "up": ["column"], "down": ["column"], "still": ["row", "column"]}
RED = Attributes("red", "circle", "right", "big", "blue")


def test_short():
    assert short(RED) == "a red circle moving right on a blue background"
    still = Attributes("orange", "star", "still", "small", "orange")
    assert short(still) == "an orange star standing still on an orange background"
    assert short(Attributes("red", "star", "", "small", "blue")) == "a red star on a blue background"
    texts = {short(RED, np.random.default_rng(k)) for k in range(20)}
    assert texts == {short(RED), "a big red circle moving right on a blue background"}


@pytest.mark.parametrize("caption", [short, rich, mixed], ids=lambda c: c.__name__)
def test_captions_are_true_and_of_known_words(caption):
    rng = np.random.default_rng(0)
    for told in EVERY:
        text = caption(told, rng)
        assert set(tokenize(text)) <= set(WORDS), text
        found = parse(text)
        for name in ATTRIBUTES:
            allowed = {getattr(told, name)} | ({""} if name == "size" and caption is not rich else set())
            assert getattr(found, name) in allowed, text
        for name in PLACES:
            told_here = caption is not short and name in ACROSS[told.motion]
            allowed = {getattr(told, name) if told_here else ""} | ({""} if caption is mixed else set())
            assert getattr(found, name) in allowed, text


def test_articles():
    rng = np.random.default_rng(1)
    for told in EVERY:
        words = tokenize(rich(told, rng) + " " + short(told, rng))
        for article, word in itertools.pairwise(words):
            assert article != "an" or word[0] in "aeiou"
            assert article != "a" or word[0] not in "aeiou"


def test_every_word_is_used():
    """A word that no caption holds would have an embedding that no step trains."""
    rng = np.random.default_rng(2)
    shown = [a for told in EVERY for a in (told, replace(told, motion=""))]
    used = {word for told in shown for word in tokenize(mixed(told, rng) + " " + rich(told, rng))}
    assert used == set(WORDS) and list(WORDS) == sorted(WORDS) and len(WORDS) < 100


def test_rich_captions_vary():
    rng = np.random.default_rng(3)
    texts = {rich(RED, rng) for _ in range(200)}
    assert len(texts) > 100 and min(len(tokenize(t)) for t in texts) > 15
    again = np.random.default_rng(3)
    assert rich(RED, again) in texts


def test_captions_of_a_picture_tell_no_motion():
    rng = np.random.default_rng(4)
    for k in range(50):
        text = rich(Attributes("red", "star", "", "small", "white"), rng)
        assert parse(text) == Attributes("red", "star", "", "small", "white"), (k, text)
    assert rich(Attributes("", "", "", "", "white"), rng) == "a plain white background"


@pytest.mark.parametrize(
    "prompt, found",
    [
        ("a red circle moving right on a blue background", ("red", "circle", "right", "", "blue")),
        ("On a plain WHITE background, a little green star is resting.", ("green", "star", "still", "small", "white")),
        ("star", ("", "star", "", "", "")),
        ("a large square to the left", ("", "square", "left", "big", "")),
        ("on a black background", ("", "", "", "", "black")),
        ("", ("", "", "", "", "")),
    ],
)
def test_parse(prompt, found):
    assert parse(prompt) == Attributes(*found)


def test_left_is_a_motion_and_a_part():
    found = parse("a red star moving to the left in the top part of the picture, in the right part.")
    assert found == Attributes("red", "star", "left", "", "", row="top", column="right")


@pytest.mark.parametrize(
    "prompt, match",
    [
        ("a pink circle jumping", r"unknown words; got \['jumping', 'pink'\], expected words of a an"),
        ("a red circle and a blue circle", "one colour can be shown; got red and blue"),
        ("a circle moving left and right", "one motion"),
        ("a red circle on a red background", "cannot be seen on red"),
        ("a circle in the top part and in the lower part", "one row can be shown; got top and lower"),
    ],
)
def test_prompts_that_cannot_be_shown(prompt, match):
    for read in (parse, expand):
        with pytest.raises(ValueError, match=match):
            read(prompt)


def test_expand_keeps_what_is_asked_for():
    for told in EVERY[::7]:
        for prompt in (
            short(told),
            f"a {told.shape}",
            f"a {told.colour} {told.shape}",
            f"on a {told.background} background",
        ):
            full = expand(prompt)
            asked, given = parse(prompt), parse(full)
            assert set(tokenize(full)) <= set(WORDS)
            assert full == expand(f"  {prompt.upper()}. ")
            for name, values in ATTRIBUTES.items():
                assert getattr(given, name) in values
                assert getattr(asked, name) in ("", getattr(given, name))
            assert given.colour != given.background
            assert asked.size or given.size == "big"
    assert expand("") == ""
    assert {parse(expand(f"a {shape}")).colour for shape in ATTRIBUTES["shape"]} != {"red"}


def test_expand_does_not_change():
    assert expand("a red circle moving right on a blue background") == PINNED


PINNED = (
    "a big red circle is gliding rightwards in front of a plain blue background. it keeps the same speed from the "
    "first frame to the last. its path runs through the top part of the picture."
)


class Fixed:
    """A captioner as users write them."""

    def __call__(self, clip: Clip) -> str:
        return f"{len(clip.frames)} frames"


def test_recaptioning():
    data = Shapes(length=200, sizes=((5, 16, 16),))
    told = Recaptioned(data, Fixed(), share=0.7, seed=1)
    new = [told[i].caption == "5 frames" for i in range(200)]
    assert len(told) == 200 and 0.6 < sum(new) / 200 < 0.8
    assert new == [told[i].caption == "5 frames" for i in range(200)]
    assert all(told[i].caption == data[i].caption for i in range(200) if not new[i])
    assert [c.caption for c in Recaptioned(data, Fixed(), share=1.0)] == ["5 frames"] * 200
    with pytest.raises(ValueError, match="share is a part"):
        Recaptioned(data, Fixed(), share=2)


def test_shapes_take_any_caption():
    data = Shapes(length=4, sizes=((5, 16, 16),), caption=rich)
    assert all(parse(data[i].caption).shape == data.scene(i).shape for i in range(4))
    assert render(data.scene(0)).shape == (17, 64, 64, 3)
