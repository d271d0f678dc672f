"""The clips that a training sees: the built-in renderer's, or those of a folder of videos and images.

A caption may have several lines, each a caption of its own: the first is the short one, the others are rich.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastdit.data import Clip, Shapes
from fastdit.data.captions import rich, short
from fastdit.data.clip import Attributes
from fastdit.training.config import Size

SHAPES = "shapes"
HELD_OUT = 10  # of a folder's clips, every tenth is held out


def captions(told: Attributes, rng: np.random.Generator) -> str:
    """A short caption and three rich ones, in lines."""
    return "\n".join([short(told, rng), *(rich(told, rng) for _ in range(3))])


def clips(
    data: str, sizes: Sequence[Size], count: int, *, fps: float, held_out: bool = False, seed: int = 0
) -> Iterator[Clip]:
    """`count` clips of the given sizes (frames, height, width), each size as often as the next.

    Of "shapes", the held-out ones show combinations of attributes that the others never do. A folder gives every video
    and image at most once per size; every tenth is held out.
    """
    if data == SHAPES:
        shapes = Shapes("held_out" if held_out else "train", sizes, count, seed, captions)
        yield from (shapes[i] for i in range(count))
        return
    if not Path(data).is_dir():
        raise ValueError(f"train: no such data; got {data!r}, expected {SHAPES!r} or a folder of videos and images.")
    from fastdit.data.folder import VideoFolder  # PyAV, which the renderer does without

    folders = [VideoFolder(data, size=(height, width), frames=frames, fps=fps) for frames, height, width in sizes]
    chosen = [i for i in range(len(folders[0])) if (i % HELD_OUT == HELD_OUT - 1) == held_out] or range(len(folders[0]))
    pairs = [(folder, i) for i in chosen for folder in folders]
    yield from (folder[i] for folder, i in pairs[:count])
