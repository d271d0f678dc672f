"""The built-in renderer: one coloured shape moving over a plain background, with its caption.

Coverage of a pixel is clip(1/2 - d, 0, 1), d the signed distance of its centre to the outline in pixels; the pixel is
background + coverage * (colour - background). All geometry follows the picture: any height, width and duration shows
the same scene.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastdit.data import captions
from fastdit.data.clip import ATTRIBUTES, PLACES, Attributes, Clip

COLOURS = {
    "red": (220, 30, 30),
    "green": (40, 170, 60),
    "blue": (30, 80, 225),
    "yellow": (250, 230, 40),
    "purple": (145, 45, 185),
    "orange": (250, 130, 20),
    "white": (245, 245, 245),
    "black": (12, 12, 12),
}
SHAPES, MOTIONS, SIZES = ATTRIBUTES["shape"], ATTRIBUTES["motion"], ATTRIBUTES["size"]
SPLITS = ("train", "held_out", "all")
RADII = {"small": 0.14, "big": 0.24}  # of the shorter side of the picture
STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}  # x, y of a motion
SPEEDS = (1.7, 2.3)  # what is drawn at random
HARDER = 0.4  # of training clips show a small shape whatever else would be drawn: it takes longer to learn
FPS = 8.0
SMALLEST = 16  # height and width below which the shapes cannot be told apart
MARGIN = 2.0  # pixels between a corner and the border; antialiasing takes less than 1.5 of them
# Outlines in radii around the centre of mass, of about the same area.
SQUARE, TRIANGLE, STAR, NOTCH = 0.89, 1.25, 1.2, 0.54  # half side, corner, outer and inner corner
REACH = {  # to the sides, up, down
    "circle": (1.0, 1.0, 1.0),
    "square": (SQUARE, SQUARE, SQUARE),
    "triangle": (TRIANGLE * math.cos(math.pi / 6), TRIANGLE, TRIANGLE / 2),
    "star": (STAR * math.sin(math.radians(72)), STAR, STAR * math.cos(math.radians(36))),
}


@dataclass(frozen=True)
class Scene(Attributes):
    """What is to be rendered.

    x, y in [0, 1]: where the path lies in the room that the shape has, from left to right and from top to bottom.
    speed: pixels per frame at 8 fps in a picture 64 pixels long, in proportion in others; where the clip is too long
    for it, the path is all the room there is and the shape slower, so that the motion lasts from first to last frame.
    row, column: x and y in words.
    """

    x: float = 0.5
    y: float = 0.5
    speed: float = 2.0

    def __post_init__(self) -> None:
        for name, values in ATTRIBUTES.items():
            if getattr(self, name) not in values:
                raise ValueError(f"Scene: unknown {name}; got {getattr(self, name)!r}, expected one of {list(values)}.")
        if self.colour == self.background:
            raise ValueError(f"Scene: a {self.colour} shape cannot be seen on {self.background}; choose two colours.")
        if not (0 <= self.x <= 1 and 0 <= self.y <= 1):
            raise ValueError(f"Scene: x and y are parts of the room; got {self.x}, {self.y}, expected [0, 1].")
        if not (math.isfinite(self.speed) and self.speed > 0):
            raise ValueError(f"Scene: speed is pixels per frame; got {self.speed}, expected a positive number.")
        object.__setattr__(self, "row", place("row", self.y))
        object.__setattr__(self, "column", place("column", self.x))


def place(name: str, share: float) -> str:
    """The "row" or "column" at a share of the room in [0, 1]."""
    return PLACES[name][min(int(share * len(PLACES[name])), len(PLACES[name]) - 1)]


def room(shape: str, size: str, picture: tuple[int, int]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Where the centre of a shape can be in a picture (height, width): (lowest x, highest x), (lowest y, highest y)."""
    height, width = picture
    side, up, down = (reach * RADII[size] * min(picture) for reach in REACH[shape])
    return (side + MARGIN, width - side - MARGIN), (up + MARGIN, height - down - MARGIN)


def centres(scene: Scene, size: tuple[int, int] = (64, 64), frames: int = 17) -> np.ndarray:
    """The centre of the shape in each frame: fp64 (T, 2) as x, y in pixels from the top left corner."""
    path = np.empty((frames, 2))
    for axis, (low, high) in enumerate(room(scene.shape, scene.size, size)):
        step, share = STEPS[scene.motion][axis], (scene.x, scene.y)[axis]
        wanted = scene.speed * (frames - 1) * size[1 - axis] / 64
        travel = min(wanted, high - low) if step else 0.0
        start = low + share * (high - low - travel)
        ramp = np.linspace(0, travel, frames)
        path[:, axis] = start + (ramp[::-1] if step < 0 else ramp)
    return path


def coverage(shape: str, radius: float, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The covered part of each pixel, in [0, 1]; u, v (broadcast): pixels to the right of and below the centre."""
    if shape == "circle":
        distance = np.sqrt(u * u + v * v) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(u), np.abs(v)) - SQUARE * radius
    elif shape == "triangle":
        half = TRIANGLE * radius / 2  # of the inscribed circle
        distance = np.maximum(v, math.sqrt(0.75) * np.abs(u) - 0.5 * v) - half
    else:
        distance = _star(u, v, radius)
    return np.clip(0.5 - distance, 0, 1)


def _star(u: np.ndarray, v: np.ndarray, radius: float) -> np.ndarray:
    """Distance to a five-pointed star: mirrors fold the plane onto one half of one arm, whose edge is a line."""
    x, y = np.broadcast_arrays(np.abs(u), -v)  # y up, along an arm
    for angle in (math.radians(108), math.radians(36)):
        beyond = np.maximum(x * math.cos(angle) - y * math.sin(angle), 0)
        x, y = x - 2 * math.cos(angle) * beyond, y + 2 * math.sin(angle) * beyond
    nx, ny = STAR - NOTCH * math.cos(math.radians(36)), NOTCH * math.sin(math.radians(36))
    length = math.hypot(nx, ny)
    return np.abs(x) * (nx / length) + (y - STAR * radius) * (ny / length)


def check_size(name: str, size: Sequence[int]) -> None:
    """Raises ValueError unless `size` is (frames, height, width) that a scene can be rendered in."""
    if len(size) != 3 or any(int(n) != n for n in size) or size[0] < 1 or min(size[1:]) < SMALLEST:
        raise ValueError(
            f"{name}: a clip is (frames, height, width); got {tuple(size)}, expected integers, at least one frame of "
            f"{SMALLEST}x{SMALLEST} pixels; choose a larger picture."
        )


def render(scene: Scene, size: tuple[int, int] = (64, 64), frames: int = 17) -> Tensor:
    """Draw a scene.

    Args:
        size: (height, width), each at least 16.   frames: T, at least 1; one frame is a picture.
    Returns:
        uint8 Tensor (T, H, W, 3), to be shown at 8 frames per second; the whole path is inside the picture.
    Raises:
        ValueError: the picture is too small, or there is no frame.
    """
    check_size("render", (frames, *size))
    height, width = size
    radius = RADII[scene.size] * min(size)
    path = centres(scene, size, frames)
    window = math.ceil(2 * radius * max(max(reach) for reach in REACH.values())) + 2
    h, w = min(window, height), min(window, width)
    corner = np.clip(np.floor(path - window / 2), 0, (width - w, height - h)).astype(np.int64)
    offset = (corner + 0.5 - path).astype(np.float32)
    u = offset[:, 0, None, None] + np.arange(w, dtype=np.float32)
    v = offset[:, 1, None, None] + np.arange(h, dtype=np.float32)[:, None]
    alpha = np.rint(coverage(scene.shape, radius, u, v) * 255).astype(np.uint8)  # (T, h, w)
    patches = _blends(scene.colour, scene.background)[alpha]
    out = np.empty((frames, height, width, 3), np.uint8)
    out[:] = COLOURS[scene.background]
    for frame, patch, (left, top) in zip(out, patches, corner.tolist(), strict=True):
        frame[top : top + h, left : left + w] = patch
    return torch.from_numpy(out)


@functools.cache
def _blends(colour: str, background: str) -> np.ndarray:
    """uint8 (256, 3): the pixel of each coverage in 255ths."""
    front, back = np.array(COLOURS[colour], np.float64), np.array(COLOURS[background], np.float64)
    return np.rint(back + np.linspace(0, 1, 256)[:, None] * (front - back)).astype(np.uint8)


def held_out(colour: str, shape: str, motion: str, background: str) -> bool:
    """Whether no training clip shows this combination: about one in ten, the same in every process and version."""
    digest = hashlib.sha256(f"{colour} {shape} {motion} {background}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % 10 == 0


@functools.cache
def combinations(split: str = "all") -> tuple[tuple[str, str, str, str], ...]:
    """Every (colour, shape, motion, background) of "train", "held_out" or "all"."""
    if split not in SPLITS:
        raise ValueError(f"combinations: unknown split; got {split!r}, expected one of {list(SPLITS)}.")
    every = itertools.product(COLOURS, SHAPES, MOTIONS, COLOURS)
    return tuple(c for c in every if c[0] != c[3] and split in ("all", "held_out" if held_out(*c) else "train"))


def random_scene(rng: np.random.Generator, split: str = "all") -> Scene:
    """A scene whose combination is of `split`; the rest is drawn evenly, but for the size in "train" (HARDER)."""
    among = combinations(split)
    colour, shape, motion, background = among[rng.integers(len(among))]
    size = "small" if split == "train" and rng.random() >= 1 - HARDER else SIZES[rng.integers(len(SIZES))]
    x, y, speed = rng.random(), rng.random(), rng.uniform(*SPEEDS)
    return Scene(colour, shape, motion, size, background, x, y, speed)


class Shapes(Dataset[Clip]):
    """Captioned clips of moving shapes, rendered when asked for; item i depends on (seed, i) and the settings alone.

    Args:
        split: "train", "held_out" (combinations that "train" never shows) or "all".
        sizes: (frames, height, width) to choose from; one frame is a picture, half of whose captions tell no motion.
        length: number of clips.   seed: at least 0.
        caption: `captions.short`, `rich`, `mixed`, or a function (Attributes, Generator) -> str.
    Raises:
        ValueError: unknown split, a size too small, no clips, a negative seed.
    """

    def __init__(
        self,
        split: str = "train",
        sizes: Sequence[tuple[int, int, int]] = ((17, 64, 64),),
        length: int = 10_000,
        seed: int = 0,
        caption: Callable[[Attributes, np.random.Generator], str] = captions.short,
    ):
        combinations(split)
        if not sizes:
            raise ValueError("Shapes: no sizes to choose from; got an empty list, expected (frames, height, width).")
        for size in sizes:
            check_size("Shapes", size)
        if length < 1 or seed < 0:
            raise ValueError(f"Shapes: got length={length}, seed={seed}, expected length >= 1 and seed >= 0.")
        self.split, self.sizes, self.length, self.seed = split, tuple(sizes), length, seed
        self.caption = caption

    def __len__(self) -> int:
        return self.length

    def _draw(self, i: int) -> tuple[Scene, tuple[int, int, int], np.random.Generator]:
        i = operator.index(i)
        if not -self.length <= i < self.length:
            raise IndexError(f"Shapes: there is no clip {i}; expected 0 to {self.length - 1}.")
        rng = np.random.default_rng((self.seed, i % self.length))
        return random_scene(rng, self.split), self.sizes[rng.integers(len(self.sizes))], rng

    def scene(self, i: int) -> Scene:
        """What clip i shows."""
        return self._draw(i)[0]

    def __getitem__(self, i: int) -> Clip:
        scene, (frames, height, width), rng = self._draw(i)
        told: Attributes = scene
        if frames == 1 and rng.random() < 0.5:
            told = Attributes(
                scene.colour, scene.shape, "", scene.size, scene.background, row=scene.row, column=scene.column
            )
        return Clip(render(scene, (height, width), frames), self.caption(told, rng), FPS)
