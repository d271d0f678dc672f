"""A captioned clip, what it can show, and the two layouts of its pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

# What can be said of a clip of the built-in renderer: the attributes and their values, as the words of its captions.
ATTRIBUTES = {
    "colour": ("red", "green", "blue", "yellow", "purple", "orange", "white", "black"),
    "shape": ("circle", "square", "triangle", "star"),
    "motion": ("left", "right", "up", "down", "still"),
    "size": ("small", "big"),
    "background": ("red", "green", "blue", "yellow", "purple", "orange", "white", "black"),
}
# Where a path lies: from the top to the bottom of the room that the shape has, and from its left to its right.
PLACES = {
    "row": ("top", "upper", "middle", "lower", "bottom"),
    "column": ("leftmost", "left", "central", "right", "rightmost"),
}


@dataclass(frozen=True)
class Attributes:
    """A value of each of ATTRIBUTES and PLACES; "" where it is not known (a picture shows no motion)."""

    colour: str
    shape: str
    motion: str
    size: str
    background: str
    row: str = field(default="", kw_only=True)
    column: str = field(default="", kw_only=True)


@dataclass(frozen=True, eq=False)
class Clip:
    """frames: uint8 (T, H, W, 3), RGB, an image is T = 1; caption; fps: frames per second."""

    frames: Tensor
    caption: str
    fps: float

    def __post_init__(self) -> None:
        check_frames("Clip", self.frames)
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(
                f"Clip: fps is frames per second; got {self.fps}, expected a positive number; use e.g. 8.0."
            )

    @property
    def size(self) -> tuple[int, int, int]:
        """(frames, height, width)."""
        t, h, w, _ = self.frames.shape
        return t, h, w


def check_frames(name: str, frames: Tensor) -> None:
    """Raises TypeError or ValueError unless `frames` is a uint8 (T, H, W, 3) tensor with no empty dimension."""
    if not isinstance(frames, Tensor) or frames.dtype != torch.uint8:
        got = frames.dtype if isinstance(frames, Tensor) else type(frames).__name__
        raise TypeError(f"{name}: frames are bytes; got {got}, expected a uint8 Tensor; use to_frames on a video.")
    if frames.dim() != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(
            f"{name}: frames are (T, H, W, 3) with T, H, W >= 1; got {list(frames.shape)}; "
            "give one clip, channels last (to_frames makes it from a video)."
        )


def to_video(frames: Tensor) -> Tensor:
    """uint8 frames (T, H, W, 3) -> fp32 video (3, T, H, W) in [-1, 1]: x / 127.5 - 1."""
    check_frames("to_video", frames)
    return frames.permute(3, 0, 1, 2).contiguous().float().div_(127.5).sub_(1)


def to_frames(video: Tensor) -> Tensor:
    """Floating video (3, T, H, W) -> uint8 frames (T, H, W, 3) on the CPU; values outside [-1, 1] are clamped.

    Raises:
        ValueError: the shape is another, or a value is NaN or infinite.   TypeError: integers.
    """
    if not video.is_floating_point():
        raise TypeError(f"to_frames: a video is floating; got {video.dtype}, expected values in [-1, 1]; use to_video.")
    if video.dim() != 4 or video.shape[0] != 3:
        raise ValueError(
            f"to_frames: a video is (3, T, H, W); got {list(video.shape)}; give one clip of a batch at a time."
        )
    if not video.isfinite().all():
        raise ValueError(
            "to_frames: the video holds NaN or infinite values; got no picture, expected values in [-1, 1]; "
            "look for the layer that overflows (a smaller step size, fp32 instead of f16)."
        )
    values = video.detach().float().clamp(-1, 1).add_(1).mul_(127.5).round_().to(torch.uint8)
    return values.permute(1, 2, 3, 0).contiguous().cpu()


def collate(clips: Sequence[Clip]) -> tuple[Tensor | list[Tensor], list[str]]:
    """`collate_fn` of a DataLoader: videos, stacked to (B, 3, T, H, W) when of one size, else a list; captions."""
    videos = [to_video(clip.frames) for clip in clips]
    captions = [clip.caption for clip in clips]
    return (torch.stack(videos) if len({v.shape for v in videos}) == 1 else videos), captions
