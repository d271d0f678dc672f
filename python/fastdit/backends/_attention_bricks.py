"""Bricks of a 3-D window: which blocks of queries and of keys a kernel walks with the least waste.

A brick is (t, h, w), powers of two. What a brick of queries sees together is a box of keys, and the other way round
(kernels/attention_mask.py, csrc/cuda/attention.cuh).
"""

from __future__ import annotations

import functools
import itertools
import math


@functools.cache
def bricks(window: tuple, stride: tuple, own: int, other: int, of_keys: bool, across: int = 1) -> tuple[tuple, tuple]:
    """The brick of `own` tokens that a program keeps and the one of `other` tokens in which it walks those that it
    meets, inside a large grid: the pair that walks the fewest. across: the least that both have along w."""
    far = [
        {(a, b): walked(w, s, a, b, of_keys) for a in _powers(own) for b in _powers(other)}
        for w, s in zip(window, stride, strict=True)
    ]
    pairs = itertools.product(_shapes(own, across), _shapes(other, across))
    return min(pairs, key=lambda pair: math.prod(axis[a, b] for axis, a, b in zip(far, *pair, strict=True)))


def walked(window: int, stride: int, own: int, other: int, of_keys: bool) -> float:
    """Mean length of what `own` neighbours meet on an axis without ends, rounded up to whole bricks of `other`."""
    shift = stride // 2 - window // 2

    def met(x):
        y = x + own - 1
        if of_keys:
            return ((y - shift) // stride + 1) * stride - -((window - 1 + shift - x) // stride) * stride
        return y // stride * stride - x // stride * stride + window

    lengths = [met(x) for x in range(0, math.lcm(own, stride), own)]
    return sum(-(-n // other) * other for n in lengths) / len(lengths)


def _powers(tokens: int) -> list[int]:
    return [1 << i for i in range(tokens.bit_length())]


def _shapes(tokens: int, across: int) -> list[tuple[int, int, int]]:
    """Bricks of `tokens` tokens, widest along w first, then along h."""
    sides = _powers(tokens)
    return [
        (tokens // (h * w), h, w) for w in reversed(sides) if w >= across for h in reversed(sides) if h * w <= tokens
    ]
