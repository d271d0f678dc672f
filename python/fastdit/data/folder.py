"""A folder of videos and images with captions, as clips of one size."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import operator
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from fastdit.data import media
from fastdit.data.captions import Captioner
from fastdit.data.clip import Clip

TABLES = ("captions.csv", "captions.jsonl")  # columns or keys: file (relative to the folder), caption


class VideoFolder(Dataset[Clip]):
    """The clips of a folder and of the folders in it.

    A video gives as many clips of `frames` frames as it holds, one after the other; an image gives a clip of one frame
    (`collate` keeps sizes apart). Frames are taken at `fps` by their times, so files of any and of variable rate do;
    each is scaled to cover `size` and cut to it around its middle. The caption stands in a file of the same name
    (.txt), or in captions.csv or captions.jsonl at the top, with the columns `file` and `caption`.

    Args:
        path: the folder.   size: (height, width).   frames, fps: of a clip.
        on_error: "raise" (the error names the file) or "skip": broken and too short files are left out, with a
            warning for each; an item whose file proves broken when read gives the next good one. See `skipped`.
        captioner: tells what a clip without a caption shows. Default: a missing caption is an error.
    Raises:
        FileNotFoundError: no such folder, nothing in it, captions missing.   media.BrokenMedia: as `on_error` says.
        ValueError: bad settings, a table that cannot be read.   ImportError: PyAV or pillow is missing.
    """

    def __init__(
        self,
        path: str | Path,
        size: tuple[int, int] = (64, 64),
        frames: int = 17,
        fps: float = 8.0,
        *,
        on_error: str = "raise",
        captioner: Captioner | None = None,
    ):
        if min(size) < 1 or frames < 1 or not (math.isfinite(fps) and fps > 0):
            raise ValueError(f"VideoFolder: got size={size}, frames={frames}, fps={fps}, expected positive numbers.")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"VideoFolder: unknown on_error; got {on_error!r}, expected 'raise' or 'skip'.")
        self.path, self.size, self.frames, self.fps = Path(path), size, frames, fps
        self.on_error, self.captioner = on_error, captioner
        if not self.path.is_dir():
            raise FileNotFoundError(f"VideoFolder: no such folder; got {path}, expected one with videos or images.")
        self.files = find(self.path)
        self.captions = find_captions(self.path, self.files, required=captioner is None)
        self._bad = torch.zeros(len(self.files), dtype=torch.bool).share_memory_()  # seen by every worker
        self.windows = [(k, *window) for k in range(len(self.files)) for window in self._windows(k)]
        if not self.windows:
            raise media.BrokenMedia(f"VideoFolder: none of the {len(self.files)} files in {path} can be used.")

    @property
    def skipped(self) -> int:
        """Files left out so far, by this process and its workers."""
        return int(self._bad.sum())

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> Clip:
        i = operator.index(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"VideoFolder: there is no clip {i}; expected 0 to {len(self) - 1}.")
        for k in range(len(self)):
            index, start, count = self.windows[(i + k) % len(self)]
            if self._bad[index]:
                continue
            try:
                return self._read(index, start, count)
            except media.BrokenMedia as error:
                self._leave_out(index, error)
        raise media.BrokenMedia(f"VideoFolder: none of the {len(self.files)} files in {self.path} can be used.")

    def _windows(self, index: int) -> list[tuple[float, int]]:
        """Where the clips of a file begin, in seconds, and how many frames they have."""
        file = self.files[index]
        try:
            lasts = media.duration(file)
            if math.isinf(lasts):
                return [(0.0, 1)]
            count = int(((lasts - media.SLACK) * self.fps + 1) / self.frames)
            if count < 1:
                raise media.broken(
                    file,
                    f"lasts {lasts:.2f} seconds, and a clip of {self.frames} frames at {self.fps:g} per second longer",
                )
        except media.BrokenMedia as error:
            self._leave_out(index, error)
            return []
        return [(k * self.frames / self.fps, self.frames) for k in range(count)]

    def _leave_out(self, index: int, error: media.BrokenMedia) -> None:
        if self.on_error == "raise":
            raise error
        warnings.warn(f"VideoFolder: left out: {error}", stacklevel=3)
        self._bad[index] = True

    def _read(self, index: int, start: float, count: int) -> Clip:
        file = self.files[index]
        pictures = media.at_rate(media.decode(file, start), self.fps, start)
        frames = [fit(p, self.size) for p in itertools.islice(pictures, count)]
        if len(frames) < count:
            raise media.broken(file, f"is cut off: {len(frames)} of {count} frames from second {start:.2f} on")
        clip = Clip(torch.from_numpy(np.stack(frames)), self.captions.get(file, ""), self.fps)
        return clip if clip.caption or self.captioner is None else replace(clip, caption=self.captioner(clip))


def find(folder: Path) -> list[Path]:
    """The videos and images in a folder and below, in order; hidden files are not looked at."""
    files = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in (*media.VIDEOS, *media.IMAGES) and p.is_file()]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not files:
        raise FileNotFoundError(
            f"VideoFolder: {folder} holds no videos or images; got none, expected files with one of "
            f"{' '.join((*media.VIDEOS, *media.IMAGES))}."
        )
    return files


def find_captions(folder: Path, files: Sequence[Path], required: bool = True) -> dict[Path, str]:
    """The caption of each file; a .txt beside the file goes before a table."""
    table: dict[str, str] = {}
    for name in TABLES:
        if (folder / name).is_file():
            table |= _table(folder / name)
    captions, missing = {}, []
    for file in files:
        beside = file.with_suffix(".txt")
        text = _text(beside) if beside.is_file() else table.get(file.relative_to(folder).as_posix(), "")
        if text.strip():
            captions[file] = " ".join(text.split())
        else:
            missing.append(file.relative_to(folder).as_posix())
    if missing and required:
        raise FileNotFoundError(
            f"VideoFolder: {len(missing)} of {len(files)} files in {folder} have no caption; got none for "
            f"{', '.join(missing[:5])}{', ...' if len(missing) > 5 else ''}; expected a .txt of the same "
            f"name or a row in {' or '.join(TABLES)}; write them, or pass captioner=."
        )
    return captions


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: a caption is UTF-8 text; got {error}; save it as UTF-8.") from error


def _table(path: Path) -> dict[str, str]:
    text = _text(path)
    rows: list[tuple[int, object]]
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(text, newline=""))
        rows = [(reader.line_num, row) for row in reader]
    else:
        rows = [(n, _json(path, n, line)) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    table = {}
    for n, row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("file", "caption")):
            raise ValueError(f"{path}, line {n}: a row has a file and a caption; got {row}, expected both as text.")
        table[row["file"].strip().removeprefix("./")] = row["caption"]
    return table


def _json(path: Path, number: int, line: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number}: no JSON; got {line[:60]!r} ({error}), expected an object.") from error


def fit(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scale uint8 (h, w, 3) to cover (height, width), then cut the middle out; bicubic, antialiased."""
    Image = media.need("PIL.Image")
    (h, w), (height, width) = picture.shape[:2], size
    if (h, w) == (height, width):
        return picture
    scale = min(h / height, w / width)
    top, left = (h - scale * height) / 2, (w - scale * width) / 2
    box = (left, top, left + scale * width, top + scale * height)
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC, box=box))
