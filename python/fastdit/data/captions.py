"""Captions of the built-in clips: short ones, rich ones, from one to the other, and back to attributes.

All of them are made of WORDS, a closed vocabulary, and read by `tokenize`: lower case, no punctuation.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch.utils.data import Dataset

from fastdit.data.clip import ATTRIBUTES, PLACES, Attributes, Clip

# Other words of rich captions for an attribute; the first is the attribute's own.
SYNONYMS = {
    "small": ("small", "little"),
    "big": ("big", "large"),
    "left": ("left", "leftwards", "to the left"),
    "right": ("right", "rightwards", "to the right"),
    "up": ("up", "upwards", "to the top"),
    "down": ("down", "downwards", "to the bottom"),
    "still": ("standing still", "resting", "keeping its place"),
}
PREFERRED = {"size": "big"}  # of what a prompt leaves open: the shape is seen best
VERBS = ("moving", "sliding", "drifting", "gliding")
OPENINGS = {
    "moving": (
        "{a} {shape} is {verb} {where} in front of a plain {background} background.",
        "the video shows {a} {shape} {verb} {where} on {on} background.",
        "on a plain {background} background, {a} {shape} is {verb} {where}.",
    ),
    "still": (
        "{a} {shape} is {where} in front of a plain {background} background.",
        "the video shows {a} {shape} {where} on {on} background.",
        "on a plain {background} background, {a} {shape} is {where}.",
    ),
    "": (
        "{a} {shape} in front of a plain {background} background.",
        "the picture shows {a} {shape} on {on} background.",
        "on a plain {background} background there is {a} {shape}.",
    ),
}
DETAILS = {
    "moving": (
        "it keeps the same speed from the first frame to the last.",
        "the motion is smooth and even, and the path is straight.",
    ),
    "still": ("it stays where it is from the first frame to the last.", "nothing in the scene changes."),
    "": ("it is a single frame.",),
}
# What a motion leaves open of the place.
WHERE = {
    "row": ("its path runs through the {row} part of the picture.", "it crosses the {row} part."),
    "column": ("its path runs through the {column} part of the picture.", "it crosses the {column} part."),
    "both": (
        "it is in the {row} part of the picture, in the {column} part.",
        "it can be seen in the {row} part, in the {column} part.",
    ),
}
ALWAYS = (
    "the camera is fixed.",
    "the light is even and the edges are sharp.",
    "nothing else can be seen.",
    "the colours are flat and clear.",
)


def tokenize(text: str) -> list[str]:
    """The words of a text: lower case, without punctuation."""
    return re.findall(r"[^\W_]+", text.lower())


def _words() -> tuple[str, ...]:
    texts = [*VERBS, *ALWAYS, "a an moving standing still on a plain background"]
    texts += [text for group in (ATTRIBUTES, PLACES, SYNONYMS) for values in group.values() for text in values]
    templates: list[str] = [text for group in (OPENINGS, DETAILS, WHERE) for part in group.values() for text in part]
    texts += [re.sub(r"{\w+}", " ", text) for text in templates]
    return tuple(sorted({word for text in texts for word in tokenize(text)}))


WORDS = _words()
_MEANS = {  # the last word of a phrase -> (attribute, value); colours and places are told apart by what follows them
    tokenize(text)[-1]: (attribute, value)
    for attribute in ("shape", "motion", "size")
    for value in ATTRIBUTES[attribute]
    for text in SYNONYMS.get(value, (value,))
}
_PLACES = {value: (name, value) for name, values in PLACES.items() for value in values}


def _noun(*words: str) -> str:
    phrase = " ".join(word for word in words if word)
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def short(scene: Attributes, rng: np.random.Generator | None = None, *, sized: bool = False) -> str:
    """E.g. "a red circle moving right on a blue background"; `sized` tells the size too, `rng` in one of two."""
    if not scene.shape:
        return f"a plain {scene.background} background"
    size = scene.size if sized or (rng is not None and rng.random() < 0.5) else ""
    motion = {"": "", "still": "standing still "}.get(scene.motion, f"moving {scene.motion} ")
    return f"{_noun(size, scene.colour)} {scene.shape} {motion}on {_noun(scene.background)} background"


def rich(scene: Attributes, rng: np.random.Generator) -> str:
    """Some sentences that tell every attribute, and the place as far as the motion leaves it open, in varied words and
    order."""
    if not scene.shape:
        return short(scene)

    def pick(texts: Sequence[str]) -> str:
        return texts[int(rng.integers(len(texts)))]

    kind = scene.motion if scene.motion in ("", "still") else "moving"
    opening = pick(OPENINGS[kind]).format(
        a=_noun(pick(SYNONYMS.get(scene.size, ("",))), scene.colour),
        shape=scene.shape,
        verb=pick(VERBS),
        where=pick(SYNONYMS.get(scene.motion, ("",))),
        background=scene.background,
        on=_noun(scene.background),
    )
    details = [pick(DETAILS[kind]), *(str(text) for text in rng.permutation(ALWAYS)[: rng.integers(0, 2)])]
    if scene.row and scene.column:
        across = {"left": "row", "right": "row", "up": "column", "down": "column"}.get(scene.motion, "both")
        details.append(pick(WHERE[across]).format(row=scene.row, column=scene.column))
    return " ".join([opening, *(details[k] for k in rng.permutation(len(details)))])


def mixed(scene: Attributes, rng: np.random.Generator) -> str:
    """A short or a rich caption, as often one as the other: a model that trains on both reads both."""
    return short(scene, rng) if rng.random() < 0.5 else rich(scene, rng)


def parse(prompt: str) -> Attributes:
    """The attributes that a prompt asks for, "" where it leaves one open.

    Raises:
        ValueError: words outside WORDS, or two values of one attribute.
    """
    words = tokenize(prompt)
    unknown = sorted(set(words) - set(WORDS))
    if unknown:
        raise ValueError(
            f"parse: unknown words; got {unknown}, expected words of {' '.join(WORDS)}; rephrase the prompt."
        )
    found = dict.fromkeys((*ATTRIBUTES, *PLACES), "")
    for word, following in zip(words, [*words, ""][1:], strict=True):
        if word in _PLACES and following == "part":
            attribute, value = _PLACES[word]
        elif word in ATTRIBUTES["colour"]:
            attribute, value = ("background" if following == "background" else "colour"), word
        elif word in _MEANS:
            attribute, value = _MEANS[word]
        else:
            continue
        if found[attribute] not in ("", value):
            raise ValueError(
                f"parse: one {attribute} can be shown; got {found[attribute]} and {value} in {prompt!r}, expected one; "
                "ask for a single shape."
            )
        found[attribute] = value
    if found["colour"] and found["colour"] == found["background"]:
        raise ValueError(f"parse: a {found['colour']} shape cannot be seen on {found['colour']}; choose two colours.")
    return Attributes(**found)


def expand(prompt: str) -> str:
    """A rich caption that asks for what `prompt` does; what it leaves open is chosen by its words (a size: big).

    The same prompt gives the same caption everywhere. The empty prompt (no condition) stays empty.

    Raises:
        ValueError: as `parse` does.
    """
    asked = parse(prompt)
    words = tokenize(prompt)
    if not words:
        return ""
    seed = hashlib.sha256(" ".join(words).encode()).digest()[:8]
    rng = np.random.default_rng(int.from_bytes(seed, "big"))
    full: dict[str, str] = {}
    for attribute, values in (*ATTRIBUTES.items(), *PLACES.items()):
        taken = {"colour": asked.background, "background": full.get("colour")}.get(attribute)
        free = [value for value in values if value != taken]
        chosen = free[rng.integers(len(free))]  # drawn always: one open attribute does not change another
        full[attribute] = getattr(asked, attribute) or PREFERRED.get(attribute, chosen)
    return rich(Attributes(**full), rng)


class Captioner(Protocol):
    """Whatever tells what a clip shows: `detect.describe`, or a vision-language model behind this call."""

    def __call__(self, clip: Clip) -> str: ...


class Recaptioned(Dataset[Clip]):
    """Re-captioning: the clips of `dataset` with captions by `captioner`, for a `share` of them chosen by (seed, i)."""

    def __init__(self, dataset: Dataset[Clip], captioner: Captioner, share: float = 0.95, seed: int = 0):
        if not 0 <= share <= 1:
            raise ValueError(f"Recaptioned: share is a part of the clips; got {share}, expected 0 to 1.")
        self.dataset, self.captioner, self.share, self.seed = dataset, captioner, share, seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  # map-style

    def __getitem__(self, i: int) -> Clip:
        clip = self.dataset[i]
        if np.random.default_rng((self.seed, i)).random() >= self.share:
            return clip
        return Clip(clip.frames, self.captioner(clip), clip.fps)
