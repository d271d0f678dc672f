"""What a clip of the built-in renderer shows, read from its pixels: the judge of generated clips.

The background is the colour of COLOURS that most pixels are nearest to. The shape's centre in each frame is the centre
of mass of what differs from it. The frames, shifted to one centre, are averaged: noise goes, the shape stays. Shape and
size are those of the rendered coverage, sharp or blurred, that correlates best with this average.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from fastdit.data import captions
from fastdit.data.clip import Attributes, Clip, check_frames
from fastdit.data.shapes import COLOURS, RADII, SHAPES, SPEEDS, coverage, place, room

SCALES = np.linspace(0.10, 0.29, 20)  # radii that are tried, of the shorter side
BLURS = (0.0, 0.015, 0.03, 0.05)  # standard deviations that are tried, likewise
BOUNDARY = sum(RADII.values()) / 2  # between small and big
CONTRAST = 30.0  # distance in RGB below which nothing is seen
WORKING = 48  # pixels along the shorter side that are enough; larger pictures are averaged down


@dataclass(frozen=True)
class Found(Attributes):
    """What `detect` read; "" for what cannot be seen: a shape in an empty picture, motion in a single frame."""


def detect(frames: Tensor) -> Found:
    """Read the attributes of a clip.

    Args:
        frames: uint8 (T, H, W, 3).
    Returns:
        Found: colour and background are names of COLOURS; motion is the direction of the centre's straight line in
        time, "still" when it crosses less than a small part of the picture, "" when the centre follows no line. row
        and column are those of the path's middle; the one along the motion means nothing.
    Raises:
        TypeError, ValueError: `frames` is something else.
    """
    check_frames("detect", frames)
    pixels = _working_size(frames.cpu().numpy())
    palette = np.array(list(COLOURS.values()), np.float32)
    nearest = (np.square(palette).sum(-1) - 2 * (pixels @ palette.T)).argmin(-1)
    ground = int(np.bincount(nearest.ravel(), minlength=len(palette)).argmax())
    background = list(COLOURS)[ground]
    difference = pixels - np.median(pixels[nearest == ground], axis=0)
    front = _front(difference)
    if np.linalg.norm(front) < CONTRAST:
        return Found("", "", "", "", background)
    centres = _centres(difference @ (front / (front @ front)))
    seen = ~np.isnan(centres[:, 0])
    shape, scale, front = _fit(_average(difference[seen], centres[seen]), front, min(pixels.shape[1:3]))
    ahead = np.square(palette - (palette[ground] + front)).sum(-1)
    ahead[ground] = np.inf
    size = "small" if scale < BOUNDARY else "big"
    picture = pixels.shape[1:3]
    shares = [
        (centre - low) / max(high - low, 1e-6)
        for centre, (low, high) in zip(centres[seen].mean(0).tolist(), room(shape, size, picture), strict=True)
    ]
    column, row = (place(n, min(max(s, 0.0), 1.0)) for n, s in zip(("column", "row"), shares, strict=True))
    colour = list(COLOURS)[int(ahead.argmin())]
    return Found(colour, shape, _motion(centres, picture), size, background, row=row, column=column)


def describe(clip: Clip) -> str:
    """A rich caption of what `detect` sees: the built-in `captions.Captioner`. The same clip gives the same caption."""
    return captions.rich(detect(clip.frames), np.random.default_rng(int(clip.frames.sum())))


def _working_size(frames: np.ndarray) -> np.ndarray:
    """fp32 (T, h, w, 3), the means of k x k pixels."""
    t, height, width, _ = frames.shape
    k = max(1, min(height, width) // WORKING)
    if k == 1:
        return frames.astype(np.float32)
    h, w = height // k, width // k
    return frames[:, : h * k, : w * k].reshape(t, h, k, w, k, 3).mean((2, 4), dtype=np.float32)


def _front(difference: np.ndarray) -> np.ndarray:
    """The shape's colour less the background's: the mean of the pixels that differ most, fewer than any shape has."""
    frames, height, width, _ = difference.shape
    count = max(1, int((RADII["small"] * min(height, width)) ** 2 * frames))
    distance = np.square(difference).sum(-1).ravel()
    chosen = np.argpartition(distance, -count)[-count:]
    return difference.reshape(-1, 3)[chosen].mean(0)


def _centres(alpha: np.ndarray) -> np.ndarray:
    """fp64 (T, 2): the centre of mass of each frame as x, y, NaN where there is no shape.

    alpha (T, H, W) is 0 on the background and 1 on the shape.
    """
    mass = np.where(alpha > 0.4, np.minimum(alpha, 1), 0).astype(np.float64)  # what is noise has no weight
    total = mass.sum((1, 2))
    y, x = (np.arange(n) + 0.5 for n in mass.shape[1:])
    return np.stack([mass.sum(1) @ x, mass.sum(2) @ y], axis=1) / np.where(total > 0, total, np.nan)[:, None]


def _average(difference: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """fp32 (n, n, 3): the mean over the frames, each shifted (bilinear) so that its shape is in the middle."""
    half = int(0.38 * min(difference.shape[1:3])) + 1
    padded = np.pad(difference, ((0, 0), (half + 1, half + 1), (half + 1, half + 1), (0, 0)))
    corner = centres + 0.5  # of the window, in padded pixels: centre - half - 1/2 + half + 1
    whole = np.floor(corner).astype(int)
    total = np.zeros((2 * half + 1, 2 * half + 1, 3), np.float32)
    n = 2 * half + 2
    for frame, (left, top), (fx, fy) in zip(padded, whole.tolist(), (corner - whole).tolist(), strict=True):
        window = frame[top : top + n, left : left + n]
        rows = window[:-1] * np.float32(1 - fy) + window[1:] * np.float32(fy)
        total += rows[:, :-1] * np.float32(1 - fx) + rows[:, 1:] * np.float32(fx)
    return total / len(difference)


def _fit(average: np.ndarray, front: np.ndarray, short: int) -> tuple[str, float, np.ndarray]:
    """Shape, radius as a part of the shorter side, and the shape's colour less the background's by least squares."""
    masks = _masks(len(average), short)
    weight = np.square(masks).sum((1, 2))
    score = masks.reshape(len(masks), -1) @ (average @ front).ravel() / np.sqrt(weight)
    best = int(score.argmax())
    shape, scale, _ = _candidates()[best]
    return shape, scale, np.tensordot(masks[best], average, 2) / weight[best]


@functools.cache
def _candidates() -> list[tuple[str, float, float]]:
    return [(shape, float(scale), blur) for shape in SHAPES for scale in SCALES for blur in BLURS]


@functools.lru_cache(maxsize=8)
def _masks(n: int, short: int) -> np.ndarray:
    """fp32 (candidates, n, n): the coverage of each candidate in a window around its centre, blurred."""
    line = np.arange(n, dtype=np.float32) - n // 2
    masks = []
    for shape, scale, blur in _candidates():
        mask = coverage(shape, scale * short, line, line[:, None])
        if blur:
            kernel = np.exp(-np.square(line - line[:, None]) / (2 * (blur * short) ** 2))
            kernel /= kernel.sum(1, keepdims=True)
            mask = kernel @ mask @ kernel.T
        masks.append(mask)
    return np.stack(masks)


def _motion(centres: np.ndarray, size: tuple[int, ...]) -> str:
    """The direction of the centres' straight line in time; "" where one frame or a jumping shape shows none."""
    last = len(centres) - 1
    seen = ~np.isnan(centres[:, 0])
    if seen.sum() < 2:
        return ""
    time = np.flatnonzero(seen) - np.flatnonzero(seen).mean()
    places = (centres[seen] - centres[seen].mean(0)) / (size[1], size[0])  # parts of the picture: x, y
    slope = (time @ places) / (time @ time)
    crossed, rest = slope * last, (places - time[:, None] * slope).std(0)
    axis = int(np.abs(crossed).argmax())
    if abs(crossed[axis]) < min(0.06, 0.4 * SPEEDS[0] / 64 * last):
        return "still" if rest.max() < 0.06 else ""
    if rest[axis] > 0.25 * abs(crossed[axis]):  # a straight motion has a spread of 0.29 of its length around its mean
        return ""
    return (("left", "right"), ("up", "down"))[axis][int(crossed[axis] > 0)]
