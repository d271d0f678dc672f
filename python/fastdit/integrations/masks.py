"""Masks over keys as key lengths: a softmax does not see the order of its keys, so valid ones may stand in front.

Masks over queries and keys as runs of queries that see one stretch of keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def is_key_mask(mask: Tensor) -> bool:
    """Does it say which keys there are, to all heads and queries: (B, 1, 1, N) booleans?"""
    return mask.dtype is torch.bool and mask.ndim == 4 and mask.shape[1] == mask.shape[2] == 1


def valid_first(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(lengths, *tensors): how many a 0/1 mask (B, N) lets through, (B,) int32, and the tensors with those in front.

    Tensors are (B, N, ...): tokens, or keys and values after their rotation. Any pattern; the order among the valid
    ones and among the others stays, so masks that tokenizers make move nothing. No host sync.
    """
    hidden = mask.bool().logical_not()
    order = hidden.to(torch.uint8).argsort(dim=1, stable=True)

    def moved(t: Tensor) -> Tensor:
        return t.gather(1, order.reshape(*order.shape, *(1 for _ in t.shape[2:])).expand(t.shape))

    return hidden.logical_not().sum(1, dtype=torch.int32), *(moved(t) for t in tensors)


RUNS = 16  # of a sample, at most: each is a call


class Run(NamedTuple):
    """Queries [first, last) that see the keys [start, stop); causal: the last of them does, each before it one less."""

    first: int
    last: int
    start: int
    stop: int
    causal: bool


def key_runs(mask: Tensor, samples: int, queries: int, keys: int) -> list[list[Run]] | None:
    """Of each sample, or one for all, where a mask (B, 1, N, M) shows every query one stretch of keys; else None.

    A bias shows where it is 0 and hides where it is the least of its dtype. This looks into the mask, in a few passes
    over it: on a CPU only, and not under torch.compile.
    """
    if torch.compiler.is_compiling() or mask.device.type != "cpu" or mask.requires_grad or mask.numel() == 0:
        return None
    sizes = ((1, samples), (1,), (1, queries), (keys,))
    if mask.ndim != 4 or any(n not in fits for n, fits in zip(mask.shape, sizes, strict=True)):
        return None
    mask = mask[:, 0]
    shown = mask if mask.dtype is torch.bool else mask == 0
    counts = counted(shown)
    if mask.dtype is not torch.bool:
        hidden = counted(mask <= torch.finfo(mask.dtype).min / 2)
        if not bool((counts + hidden == keys).all()):
            return None
    stretches = counted(shown[..., 1:] > shown[..., :-1]) + shown[..., 0]
    if not bool((stretches == 1).all()):
        return None
    starts = shown.view(torch.uint8).argmax(-1)
    rows = (t.expand(-1, queries).tolist() for t in (starts, starts + counts))
    found = [runs_of(*sample) for sample in zip(*rows, strict=True)]
    if any(len(runs) > RUNS for runs in found):
        return None
    return found[:1] if all(runs == found[0] for runs in found) else found


def counted(shown: Tensor) -> Tensor:
    """How many along the last dim; by bytes, as torch sums booleans in eight."""
    return shown.view(torch.int8).sum(-1, dtype=torch.int32)


def runs_of(starts: list[int], stops: list[int]) -> list[Run]:
    """Each as long as it goes; starts, stops: of the keys of each query."""
    found, first = [], 0
    while first < len(starts):
        last, step = first + 1, 0
        if last < len(starts) and stops[last] == stops[first] + 1:
            step = 1
        while last < len(starts) and starts[last] == starts[first] and stops[last] == stops[last - 1] + step:
            last += 1
        found.append(Run(first, last, starts[first], stops[last - 1], bool(step) and last > first + 1))
        first = last
    return found
