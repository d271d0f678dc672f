"""What the compiled backends (cpu, cuda) are told of a modulation call: tensors as pointers, sizes and strides.

Mirrors csrc/bindings/modulation.h.
"""

from __future__ import annotations

import torch

from ._tensors import empty, rows_contiguous
from .cpu._abi import DTYPE, pointer

NORM = {None: 0, "layer": 1, "rms": 2}


def table_row(t, tokens, indexed):
    if t is None:
        return None
    strides = t.stride()
    if indexed:
        return (t.data_ptr(), DTYPE[t.dtype], 0, strides[0], 1)
    if len(strides) == 3:
        return (t.data_ptr(), DTYPE[t.dtype], strides[0], strides[1], tokens // t.shape[1] or 1)
    return (t.data_ptr(), DTYPE[t.dtype], strides[0], 0, tokens)


def vector_row(t):
    return None if t is None else (t.data_ptr(), DTYPE[t.dtype], 0, 0, 1)


def layout(t):
    """(sizes, strides) as (B, N, C) and (stride_b, stride_n); one call of each costs half of asking per dim."""
    if t.dim() == 3:
        return t.shape, t.stride()[:2]
    tokens, channels = t.shape
    return (1, tokens, channels), (0, t.stride(0))


def same_width(first, second):
    """Both row indices contiguous and of one width; the tensors are returned to keep them alive through the call."""
    if first is None and second is None:
        return None, None, 0
    dtypes = {t.dtype for t in (first, second) if t is not None}
    dtype = torch.int64 if len(dtypes) > 1 else dtypes.pop()
    first, second = (None if t is None else t.to(dtype).contiguous() for t in (first, second))
    return first, second, int(dtype == torch.int64)


def arguments(
    residual, y, gate, shift, scale, weight, bias, post_norm_weight, gate_index, index, wide,
    norm, eps, weight_offset, gate_act, post_norm, post_norm_eps, precision,
):  # fmt: skip
    (batch, tokens, channels), strides = layout(y)
    dtype, indexed = DTYPE[y.dtype], index is not None
    if residual is None:
        side = (dtype, y.data_ptr(), *strides, 0, 0, 0)
    else:
        side = (DTYPE[residual.dtype], y.data_ptr(), *strides, residual.data_ptr(), *layout(residual)[1])
    return (
        batch, tokens, channels, dtype, *side,
        None if gate is None else table_row(gate, tokens, gate_index is not None), table_row(shift, tokens, indexed),
        table_row(scale, tokens, indexed), vector_row(weight), vector_row(bias), vector_row(post_norm_weight),
        pointer(gate_index), pointer(index), wide, NORM[norm],
        gate_act == "tanh", post_norm == "rms", eps, post_norm_eps, 0.0 if weight is None else weight_offset,
        precision == "native", torch.get_num_threads(),
    )  # fmt: skip


# ---- backward -----------------------------------------------------------------------------------------
def table_grad(t, wanted):
    """An empty gradient of a table or vector, and what the kernel needs to know of it."""
    if t is None or not wanted:
        return None, None
    grad = empty(t)
    rows_b = t.shape[1] if t.dim() == 3 else 1
    return grad, (grad.data_ptr(), DTYPE[t.dtype], grad.numel() // t.shape[-1], rows_b)


def incoming(grad):
    """(address, stride_b, stride_n) of an output's gradient."""
    if grad is None:
        return None, (0, 0, 0)
    grad = rows_contiguous(grad)
    return grad, (grad.data_ptr(), *layout(grad)[1])
