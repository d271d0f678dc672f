"""What the adapters of several backends do to tensors before a kernel sees them."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor


def empty(t: Tensor) -> Tensor:
    """Contiguous and uninitialised, like t; half the cost of torch.empty(t.shape, dtype=t.dtype)."""
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def rows_contiguous(grad: Tensor) -> Tensor:
    """Autograd may hand over an expanded gradient: the kernels read rows whose channels lie side by side."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


@overload
def contiguous(t: Tensor) -> Tensor: ...
@overload
def contiguous(t: None) -> None: ...
def contiguous(t: Tensor | None) -> Tensor | None:
    """An optional index tensor as the kernels read it."""
    return None if t is None else t.contiguous()
