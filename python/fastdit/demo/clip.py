"""Renders a short captioned clip of moving shapes: numpy for the motion, pillow for the pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CAPTION = "a red ball circles a blue square while a green triangle drifts by"


@dataclass(frozen=True)
class Clip:
    """frames: uint8 (T, H, W, 3)."""

    frames: np.ndarray
    fps: int
    caption: str


def render(frames: int = 49, size: int = 256, fps: int = 24, caption: str = CAPTION) -> Clip:
    """A loop of `frames` pictures of size x size; the same call gives the same bytes."""
    return Clip(np.stack([_frame(t / frames, size, caption) for t in range(frames)]), fps, caption)


def _frame(phase: float, size: int, caption: str) -> np.ndarray:
    scale = 2  # drawn twice as large, then averaged: soft edges
    s = size * scale
    picture = Image.fromarray(_background(phase, s))
    draw = ImageDraw.Draw(picture)

    centre, angle = 0.5 * s, 2 * math.pi * phase
    half = 0.12 * s
    _polygon(draw, (centre, 0.45 * s), half * 1.3, 4, angle / 2 + math.pi / 4, (58, 110, 220))
    x, y = centre + 0.3 * s * math.cos(angle), 0.45 * s + 0.3 * s * math.sin(angle)
    draw.ellipse((x - half / 1.5, y - half / 1.5, x + half / 1.5, y + half / 1.5), fill=(222, 60, 50))
    _polygon(draw, ((phase * 1.4 - 0.2) * s, 0.18 * s), half, 3, -angle, (70, 180, 90))

    band = int(0.86 * s)
    draw.rectangle((0, band, s, s), fill=(18, 18, 22))
    _caption(draw, caption, s, band)
    small = picture.resize((size, size), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.uint8)


def _background(phase: float, s: int) -> np.ndarray:
    v, u = np.meshgrid(np.linspace(0, 1, s), np.linspace(0, 1, s), indexing="ij")
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * (u + 0.5 * v + phase))
    channels = (225 + 20 * wave, 228 - 18 * v, 235 - 25 * wave * v)
    return np.stack(channels, axis=-1).astype(np.uint8)


def _polygon(
    draw: ImageDraw.ImageDraw,
    centre: tuple[float, float],
    radius: float,
    corners: int,
    turn: float,
    colour: tuple[int, int, int],
) -> None:
    angles = [turn + 2 * math.pi * k / corners for k in range(corners)]
    draw.polygon([(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in angles], fill=colour)


def _caption(draw: ImageDraw.ImageDraw, caption: str, s: int, top: int) -> None:
    points = s // 24
    font = ImageFont.load_default(points)
    while points > 6 and draw.textlength(caption, font=font) > 0.96 * s:
        points -= 1
        font = ImageFont.load_default(points)
    draw.text((s / 2, (top + s) / 2), caption, font=font, fill=(240, 240, 240), anchor="mm")
