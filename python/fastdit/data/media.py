"""Videos and images in and out: MP4 and whatever PyAV decodes, GIF, PNG and whatever pillow opens.

`pip install fastdit[video]` brings both. Times are seconds from the first frame; frames are RGB as they are to be seen:
turned by the camera's rotation, pixels made square, transparent parts white.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdit.data import encode
from fastdit.data.clip import Clip, check_frames
from fastdit.data.files import replacing

VIDEOS = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".ogv", ".3gp")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".apng")
WRITABLE = {".mp4": ("av", encode.mp4), ".gif": ("PIL", encode.gif), ".png": ("PIL", encode.png)}
SLACK = 0.006  # seconds by which the times that files hold are off: GIF counts in hundredths
GIF_FPS = 50.0  # players show faster ones slowly
GIF_DELAY = 0.1  # seconds that players give to frames without a time


class BrokenMedia(ValueError):
    """A file that cannot be decoded, or not as far as it should."""


class Shown(NamedTuple):
    """A decoded frame: uint8 (H, W, 3), to be seen from `begin` to `end`."""

    begin: float
    end: float
    pixels: np.ndarray


def broken(path: Path, what: str) -> BrokenMedia:
    return BrokenMedia(f"{path}: {what}; replace the file, or take it out of the folder.")


def need(module: str) -> Any:
    """Import PyAV or pillow; the ImportError says what to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"media: {module} is missing; expected fastdit[video]; pip install 'fastdit[video]'."
        ) from error


def decode(path: str | Path, start: float = 0.0) -> Iterator[Shown]:
    """The frames of a file in order, one at a time; with `start`, from a frame at or before that second.

    Raises:
        FileNotFoundError: there is no such file.   BrokenMedia: it cannot be decoded, now or later on the way.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"media: no such file; got {path}, expected a video or an image.")
    shown = None
    with _blamed(path):
        for shown in _decode_image(path) if path.suffix.lower() in IMAGES else _decode_video(path, start):
            yield shown
    if shown is None:
        raise broken(path, "holds no picture")


@contextlib.contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """What goes wrong here is the file's fault: on broken bytes decoders raise anything, MemoryError too."""
    try:
        yield
    except (BrokenMedia, ImportError):
        raise
    except Exception as error:
        raise broken(path, f"cannot be decoded ({type(error).__name__}: {error})") from error


def _decode_image(path: Path) -> Iterator[Shown]:
    with need("PIL.Image").open(path) as image:
        end = 0.0
        for frame in need("PIL.ImageSequence").Iterator(image):
            begin, end = end, end + _delay(frame)
            yield Shown(begin, end, _rgb(frame))


def _delay(image: Any) -> float:
    """Seconds that an opened picture of a file is shown."""
    alone = getattr(image, "n_frames", 1) == 1
    return image.info.get("duration", 0) / 1000 or (math.inf if alone else GIF_DELAY)


def _rgb(image: Any) -> np.ndarray:
    Image = need("PIL.Image")
    image = need("PIL.ImageOps").exif_transpose(image)
    if image.mode.startswith("I"):  # grey of 16 bits; pillow would cut it off at 255
        return np.repeat((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, -1)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))


def _decode_video(path: Path, start: float) -> Iterator[Shown]:
    av = need("av")
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise broken(path, "has no video stream")
        stream = container.streams.video[0]
        tick = float(stream.time_base)
        first = stream.start_time or 0
        if start > 0:
            container.seek(first + int(start / tick), stream=stream)
        step = 1 / float(stream.average_rate or 25)
        ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or 1
        end = 0.0
        for frame in container.decode(stream):
            begin = end if frame.pts is None else (frame.pts - first) * tick
            if frame.is_corrupt and begin >= start:  # before it, frames may lack those that the seek left out
                raise broken(path, f"is damaged {begin:.2f} seconds after its start")
            end = begin + (frame.duration * tick if frame.duration else step)
            yield Shown(begin, end, _upright(frame, float(ratio)))
        promised = _header_duration(container)
    if end + 2 * step < 0.95 * promised:
        raise broken(path, f"is cut off after {end:.2f} of {promised:.2f} seconds")


def _upright(frame: Any, ratio: float) -> np.ndarray:
    """RGB, pixels (ratio times as wide as high) made square, turned as the camera was held."""
    pixels = frame.to_ndarray(format="rgb24", width=round(frame.width * ratio), height=frame.height)
    return np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90)))


def duration(path: str | Path) -> float:
    """Seconds that a file lasts, infinite for a still picture; the header's word, where it has one."""
    path = Path(path)
    with _blamed(path):
        if path.suffix.lower() in IMAGES:
            with need("PIL.Image").open(path) as image:
                return sum(map(_delay, need("PIL.ImageSequence").Iterator(image)))
        with need("av").open(str(path)) as container:
            if container.streams.video and (known := _header_duration(container)):
                return known
    return max(shown.end for shown in decode(path))


def _header_duration(container: Any) -> float:
    """Seconds of the first video stream, or of all there is; 0 where the header does not tell."""
    stream = container.streams.video[0]
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6


def at_rate(frames: Iterable[Shown], fps: float, start: float = 0.0) -> Iterator[np.ndarray]:
    """What is to be seen at start, start + 1 / fps, ... until the last frame ends; a still picture is seen once."""
    count, last = 0, None
    for shown in frames:
        if math.isinf(shown.end):
            yield shown.pixels
            return
        while last is not None and start + count / fps + SLACK < shown.begin:
            yield last.pixels
            count += 1
        last = shown
    while last is not None and start + count / fps + SLACK < last.end:
        yield last.pixels
        count += 1


def read(path: str | Path, fps: float | None = None) -> Clip:
    """Read a whole file.

    Args:
        fps: frames per second of the clip. Default: every frame of the file, at the file's mean rate.
    Returns:
        Clip with an empty caption; a still picture is one frame (at 1 frame per second where `fps` is not given).
    Raises:
        FileNotFoundError, ImportError.   BrokenMedia: the file cannot be decoded to its end.
    """
    if fps is not None:
        pictures = list(at_rate(decode(path), fps))
    else:
        shown = list(decode(path))
        pictures, end = [s.pixels for s in shown], shown[-1].end
        fps = len(shown) / end if 0 < end < math.inf else 1.0
    if len({p.shape for p in pictures}) > 1:
        raise broken(Path(path), f"changes its size on the way, from {pictures[0].shape[:2]}")
    return Clip(torch.from_numpy(np.stack(pictures)), "", fps)


def write(path: str | Path, frames: Tensor | Iterable[Tensor], fps: float = 8.0) -> None:
    """Write a clip as what the suffix says: .mp4 (H.264), .gif, or .png (one frame). All of it, or nothing.

    Args:
        frames: uint8 (T, H, W, 3), or an iterable of such chunks: a long MP4 is encoded as they come. MP4 holds even
            heights and widths: odd ones are written with their last row or column twice.
        fps: frames per second.
    Raises:
        ValueError: unknown suffix, no frames, several in a PNG, chunks of different sizes.   TypeError: not uint8.
        ImportError: PyAV or pillow is missing.   OSError: a full disk, or a folder without permission; a file that
            was there before is as it was.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in WRITABLE:
        raise ValueError(
            f"write: unknown suffix; got {path.name!r}, expected one of {list(WRITABLE)}; rename the file."
        )
    if not (math.isfinite(fps) and fps > 0):
        raise ValueError(f"write: fps is frames per second; got {fps}, expected a positive number; use e.g. 8.")
    if suffix == ".gif" and fps > GIF_FPS:
        raise ValueError(f"write: a GIF shows {GIF_FPS:g} frames a second at most; got {fps}; write an .mp4.")
    package, encoder = WRITABLE[suffix]
    need(package)
    encoded = io.BytesIO()  # a full disk is seen by plain writing, not somewhere inside a muxer
    encoder(encoded, _pictures([frames] if isinstance(frames, Tensor) else frames), fps)
    with atomic(path) as part:
        part.write_bytes(encoded.getbuffer())


def _pictures(chunks: Iterable[Tensor]) -> Iterator[np.ndarray]:
    size = None
    for chunk in chunks:
        check_frames("write", chunk)
        size = size or chunk.shape[1:]
        if chunk.shape[1:] != size:
            raise ValueError(f"write: chunks differ in size; got {list(chunk.shape[1:3])}, expected {list(size[:2])}.")
        yield from chunk.cpu().numpy()
    if size is None:
        raise ValueError("write: no frames; got an empty iterable, expected at least one chunk (T, H, W, 3).")


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """`with atomic(path) as part:` write the file `part`; it then takes the place of `path` in one step.

    When the block raises, `part` is removed and `path` is as it was. Folders on the way are made.

    Raises:
        OSError: with the errno of the cause (ENOSPC: the disk is full), naming `path`.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with replacing(path, part):
            yield part
    except OSError as error:
        was = "the file that was there is as it was" if path.exists() else "nothing was written"
        raise OSError(
            error.errno,
            f"{path} cannot be saved: {error.strerror or error}; {was}; free space or choose another folder",
        ) from error
