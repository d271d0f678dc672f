"""What both passes of modulation on Triton share: tile sizes, strides, and how programs share the tokens."""

from __future__ import annotations

from torch import Tensor

from ._config import Config


def fitting(channels: int, itemsize: int, held: int, programs: int) -> Config:
    """Blocks (CHUNK, ROWS, programs per multiprocessor): a row in each group of lanes, and groups of the fewest lanes
    that leave a lane no more than `held` channels. Loads are 16 bytes wide, or 8 where that fits better.
    """
    lanes = 16
    while lanes < 256 and -(-channels // (4 * lanes)) * 4 > held:
        lanes *= 2
    chunk, each = 4 * lanes, -(-channels // (4 * lanes)) * 4
    if itemsize == 2 and -(-channels // (2 * chunk)) * 8 <= min(held, each * 9 / 8):
        chunk *= 2
    warps = max(4, lanes // 32)
    return Config((chunk, warps * 32 // lanes, programs), warps, 3)


def strides(t: Tensor | None) -> tuple[int, int]:
    """Between samples and between tokens of (B, N, C) or (N, C)."""
    if t is None:
        return 0, 0
    s = t.stride()
    return (s[0] if t.shape[0] > 1 else 0, s[1]) if len(s) == 3 else (0, s[0])


def table(t: Tensor | None, tokens: int, index: Tensor | None) -> tuple[int, int, int]:
    """Strides between samples and between rows of a sample, and the consecutive tokens that share a row."""
    if t is None:
        return 0, 0, 1
    s = t.stride()
    if index is not None:
        return 0, s[0] if t.shape[0] > 1 else 0, 1
    if len(s) == 3:
        return s[0], s[1] if t.shape[1] > 1 else 0, tokens // t.shape[1]
    return s[0] if t.shape[0] > 1 else 0, 0, tokens


def walk(rows: int, run: int, programs: int, least: int, together: int = 0) -> tuple[int, int, int]:
    """(span, splits, per): how about `programs` programs share runs of `run` tokens.

    A long run is split among `splits` programs, `per` >= least tokens each; of short ones a program takes several, and
    then a divisor of `together`, if that is given.
    """
    runs = rows // run
    if runs >= programs:
        several = runs // programs
        while together % several:
            several -= 1
        return several * run, 1, several * run
    splits = max(1, min(-(-programs // runs), run // least))
    per = -(-run // splits)
    per = -(-per // least) * least
    return run, -(-run // per), per
