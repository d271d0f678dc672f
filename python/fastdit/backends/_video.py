"""What conv's adapters share: tensors in a video's memory format, and the gradient of next_cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.conv import memory_format


def empty(t: Tensor, shape=None, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, in t's memory format."""
    shape = t.shape if shape is None else shape
    return torch.empty(shape, dtype=dtype or t.dtype, device=t.device, memory_format=memory_format(t))


def zeros_or_none(tensors, needs) -> tuple:
    return tuple(empty(t).zero_() if need and t is not None else None for t, need in zip(tensors, needs, strict=True))


def next_cache_backward(grad, x, cache, k_t, needs):
    d_x, d_cache = zeros_or_none((x, cache), needs)
    if grad is not None:
        new = min(k_t - 1, x.shape[2])
        old = grad.shape[2] - new
        if d_x is not None:
            d_x[:, :, x.shape[2] - new :].copy_(grad[:, :, old:])
        if d_cache is not None and cache is not None:
            d_cache[:, :, cache.shape[2] - old :].copy_(grad[:, :, :old])
    return d_x, d_cache
