"""Masks over keys as key lengths: a softmax does not see the order of its keys, so valid ones may stand in front."""

from __future__ import annotations

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
