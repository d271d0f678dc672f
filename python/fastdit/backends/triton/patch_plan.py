"""How the patch kernels share a batch or a list: tiles, tables of videos, layouts, steps along K."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from ._launch import dot_precision
from ._tiles import power

VIDEOS = 8  # that one launch can tell apart
NO_TABLE = (0,) * (2 * VIDEOS + 1)


def step(K: int, wide: bool) -> int:
    """BK: all of K up to 64; fp32 multiplies in steps of 32."""
    return max(16, min(power(K), 32 if wide else 64))


def divisor(itemsize: int, *strides: int) -> int:
    """ALIGN: the most elements, up to 16 bytes, that divide every stride."""
    return math.gcd(16 // itemsize, *strides)


@lru_cache(maxsize=256)
def tables(grids: tuple[int, ...], block: int, lines: int = 0) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Per launch (tiles, what `locate` reads). A tile is `block` tokens, or `block` pixels of a row of tokens where
    `lines` is the pixels of a token along w."""
    launches, row = [], 0
    for i in range(0, len(grids), 3 * VIDEOS):
        tiles, starts, sizes = 0, [], []
        for j in range(i, min(i + 3 * VIDEOS, len(grids)), 3):
            t, h, w = grids[j : j + 3]
            starts.append(tiles << 32 | row)
            sizes.append(h << 32 | w)
            tiles += t * h * -(-w * lines // block) if lines else -(-t * h * w // block)
            row += t * h * w
        rest = VIDEOS - len(sizes)
        launches.append((tiles, (*starts, *[tiles << 32 | row] * (rest + 1), *sizes, *[0] * rest)))
    return tuple(launches)


def dense(x, weight):
    """rows, N, h, w of a batch; of a list they stand in the table."""
    if x.dim() == 1:
        return 0, 0, 0, 0
    B, _, T, H, W = x.shape
    _, _, pt, ph, pw = weight.shape
    h, w = H // ph, W // pw
    N = T // pt * h * w
    return B * N, N, h, w


def wide(weight) -> bool:
    return weight.dtype == torch.float32


def precision(x, weight) -> str:
    # x of a half type beside fp32 weights: the products are exact only where nothing is rounded to TF32
    return dot_precision() if x.dtype == weight.dtype else "ieee"


def layout(x) -> tuple[tuple[int, ...], bool, int]:
    """Strides of x, whether its W axis has stride 1, and what divides the others. A list stands contiguous."""
    if x.dim() == 1:
        return (0, 0, 0, 0, 1), True, 1
    s = x.stride()
    return s, s[4] == 1, divisor(x.element_size(), *s[:4])


def launches(x, grids, dense, block: int):
    """(tiles of `block` tokens, table) of every launch."""
    return tables(grids, block) if x.dim() == 1 else ((-(-dense[0] // block), NO_TABLE),)
