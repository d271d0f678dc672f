"""The clips that a training sees: the built-in renderer's, or those of a folder of videos and images.

The renderer's captions have several lines here, each a caption of its own: a short one, then rich ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastdit.data import Clip, Shapes
from fastdit.data.captions import rich, short
from fastdit.data.clip import Attributes
from fastdit.training.config import Size

SHAPES = "shapes"
HELD_OUT = 10  # of a folder's files, every tenth


def captions(told: Attributes, rng: np.random.Generator) -> str:
    """A short caption and three rich ones, in lines."""
    return "\n".join([short(told, rng), *(rich(told, rng) for _ in range(3))])


def clips(
    data: str, sizes: Sequence[Size], count: int, *, fps: float, held_out: bool = False, seed: int = 0
) -> Iterator[Clip]:
    """`count` clips of the given sizes (frames, height, width), each size as often as the next.

    Of "shapes", the held-out ones show combinations of attributes that the others never do. Of a folder, every tenth
    file is held out (none of fewer than ten: both see all); files that are broken or too short for a size are left out
    with a warning, and the clips may be fewer.
    """
    if data == SHAPES:
        shapes = Shapes("held_out" if held_out else "train", sizes, count, seed, captions)
        yield from (shapes[i] for i in range(count))
        return
    if not Path(data).is_dir():
        raise ValueError(f"train: no such data; got {data!r}, expected {SHAPES!r} or a folder of videos and images.")
    from fastdit.data.folder import VideoFolder  # PyAV, which the renderer does without

    share = math.ceil(count / len(sizes))
    found = []
    for frames, height, width in sizes:
        folder = VideoFolder(data, size=(height, width), frames=frames, fps=fps, on_error="skip")
        every = range(len(folder))
        mine = [i for i in every if (folder.windows[i][0] % HELD_OUT == HELD_OUT - 1) == held_out] or every
        order = np.random.default_rng(seed).permutation(len(mine))[:share]
        found.append([(folder, mine[k]) for k in order])
    turns = (pair for turn in itertools.zip_longest(*found) for pair in turn if pair is not None)
    yield from (folder[i] for folder, i in itertools.islice(turns, count))
