"""What attention's adapters decide on the host: pieces of a head, bricks of a window, the plan of tiles."""

from __future__ import annotations

import functools
import itertools
import math

from torch import Tensor

from ...kernels.attention_tiles import plan_tiles
from .._facts import kept
from ._config import Config, choose, tunable
from ._launch import Launch
from ._tiles import power

LOG2E = 1.4426950408889634
MOST_CHANNELS = 512


# ---- tile sizes: (BLOCK_M, BLOCK_N, warp-specialised) ---------------------------------------------------------
# width: channels of both pieces. few: tiles of 128 queries would leave processors idle. All are free of spills.
tunable(
    "attention_forward",
    Config((128, 128, 0), 8, 2),
    Config((128, 64, 0), 8, 3),
    Config((128, 64, 0), 8, 2),
    Config((128, 32, 0), 8, 2),
    Config((64, 64, 0), 4, 2),
    Config((64, 32, 0), 4, 2),
    Config((128, 64, 1), 8, 2),
    Config((128, 128, 1), 8, 2),
)
tunable(
    "attention_window_forward",
    Config((128, 128), 8, 2),
    Config((128, 64), 8, 2),
    Config((128, 64), 8, 3),
    Config((128, 32), 8, 2),
    Config((64, 64), 8, 2),
    Config((64, 64), 4, 2),
    Config((64, 32), 4, 2),
)


def _lines(arch, itemsize, width, few):
    if itemsize == 4:
        if width <= 96:
            two = width == 80  # pieces, 64 + 16
            return Config((32 if two else 64, 32, 0), 8, 1 if two and arch >= 120 else 2)
        return Config((32, 16, 0), 8, 2 if width <= 128 else 1)
    if width > 256:
        return Config((64, 32 if 90 <= arch < 120 else 16, 0), 8, 2)
    if width > 128:
        return Config((128, 64, 0), 8, 2) if 90 <= arch < 100 else Config((64, 32, 0), 8, 2)
    if few:
        return Config((64, 64 if arch < 120 else 32, 0), 4, 2)
    if arch >= 120:
        return Config((128, 32 if width > 64 else 64, 0), 8, 2)
    if arch >= 100:
        return Config((128, 64, 1 if width > 64 else 0), 8, 3 if width == 80 else 2)
    return Config((128, 128, 0), 8, 2) if arch >= 90 else Config((128, 64, 0), 8, 3)


def _window(arch, itemsize, width, few):
    if itemsize == 4 or width > 128:
        return Config((64, 32), 8, 2) if width <= 128 else Config((32, 16), 8, 1)
    if arch >= 120:
        return Config((64, 32), 4, 2) if few else Config((128, 32), 8, 2)
    if arch >= 100:
        return Config((64, 64), 8, 2) if few or width > 64 else Config((128, 64), 8, 2)
    if arch >= 90:
        return Config((64, 64 if width <= 64 else 32), 4, 2) if few else Config((128, 64), 8, 2)
    return Config((64, 64), 4, 2) if few or width > 96 else Config((128, 64), 8, 3)


def lines_config(q: Tensor, width: int, few: bool) -> Config:
    return choose(
        "attention_forward", q, (q.dtype, width, few), lambda arch: _lines(arch, q.element_size(), width, few)
    )


def window_config(q: Tensor, width: int, few: bool) -> Config:
    size = q.element_size()
    return choose("attention_window_forward", q, (q.dtype, width, few), lambda arch: _window(arch, size, width, few))


# ---- what a kernel is told ------------------------------------------------------------------------------------
@functools.cache
def pieces(channels: int) -> tuple[int, int]:
    """A head of `channels` as two powers of two, the second 0 where one is no wider: 72 -> 64, 16; 112 -> 128, 0."""
    whole = max(power(channels), 16)
    first = whole // 2
    rest = max(power(channels - first), 16)
    return (first, rest) if first >= 16 and first + rest < whole else (whole, 0)


def far(rows: int, k: Tensor, v: Tensor) -> bool:
    """Whether so many rows of k or v may lie 2^31 elements apart."""
    return rows * max(k.stride(-3), v.stride(-3)) >= 1 << 31


def folded_scale(scale: float, itemsize: int) -> tuple[float, bool]:
    """(factor of the scores, q is negated). The factor is positive and takes log2(e) along where powers are of 2: not
    for fp32. Scale 0 becomes one that no score survives."""
    return abs(scale) * (1.0 if itemsize == 4 else LOG2E) or 1e-30, scale < 0


def plan(cu: Tensor, cu_other: Tensor, rows: int, block: int) -> Tensor:
    """Tiles of `block` rows of a packed tensor of `rows` rows, costly segments first (kernels/attention_tiles.py)."""
    return _made(cu, cu_other, None, rows, (1, 1, block), (1, 1, 1))


def plan_bricks(cu: Tensor, grids: Tensor, rows: int, brick: tuple, window: tuple) -> Tensor:
    return _made(cu, None, grids, rows, brick, window)


def _made(cu, cu_other, grids, rows, brick, window):
    made = cu.new_empty((2, cu.shape[0] + 1))
    _plan(cu, cu_other, grids, rows, brick, window)(made, cu, cu_other, grids)
    return made


@kept
def _plan(cu, cu_other, grids, rows, brick, window) -> Launch:
    segments = cu.shape[0] - 1
    return Launch(plan_tiles, (segments + 1, 1, 1), (segments, rows), (*brick, *window, 128), 1, 1)


@functools.cache
def window_queries(window: tuple, stride: tuple) -> int:
    """128 or 64 queries a brick: the smaller one reads every key twice as often, so it must save a quarter of them."""
    met = {n: math.prod(_box(window_bricks(window, stride, n, 64)[0], window, stride)) for n in (64, 128)}
    return 64 if 4 * met[64] <= 3 * met[128] else 128


@functools.cache
def window_bricks(window: tuple, stride: tuple, queries: int, keys: int) -> tuple[tuple, tuple, tuple]:
    """(BT, BH, BW) and (KT, KH, KW) with `queries` and `keys` tokens: the query brick whose windows together hold the
    fewest keys, and the key brick that covers their box with the least overhang. Bricks wider along w win ties.
    Third: bits that a coordinate inside the box takes on each axis, overhang included."""

    def overhang(brick):
        return math.prod(-(-side // b) * b for side, b in zip(met, brick, strict=True))

    own = min(_bricks(queries), key=lambda brick: math.prod(_box(brick, window, stride)))
    met = _box(own, window, stride)
    other = min(_bricks(keys), key=overhang)
    return own, other, tuple((side + b).bit_length() for side, b in zip(met, other, strict=True))


def _box(brick, window, stride):
    """Sides of the keys that a brick of queries sees together, away from the borders."""
    # an axis of b queries meets so many more stride blocks than one, each of which moves the window on by a stride
    steps = (0 if s % b == 0 else -(-b // s) - (b % s == 0) for b, s in zip(brick, stride, strict=True))
    return tuple(w + n * s for w, n, s in zip(window, steps, stride, strict=True))


def _bricks(tokens: int):
    """All bricks of powers of two with this many tokens, the widest along w first, then along h."""
    bits = tokens.bit_length() - 1
    shapes = ((t, bits - t - w, w) for w, t in itertools.product(range(bits, -1, -1), range(bits + 1)) if t + w <= bits)
    return [(1 << t, 1 << h, 1 << w) for t, h, w in shapes]
