"""modulation on the CPU kernels (csrc/cpu/modulation.cpp): three ops, one entry point each way."""

from __future__ import annotations

import torch

from ... import _cpu
from .._modulation import backwards
from .._tensors import empty, rows_contiguous
from ..registry import Impl, register as _register
from ._abi import DTYPE, on_cpu, pointer

_NORM = {None: 0, "layer": 1, "rms": 2}


def _table(t, tokens, indexed):
    if t is None:
        return None
    strides = t.stride()
    if indexed:
        return (t.data_ptr(), DTYPE[t.dtype], 0, strides[0], 1)
    if len(strides) == 3:
        return (t.data_ptr(), DTYPE[t.dtype], strides[0], strides[1], tokens // t.shape[1] or 1)
    return (t.data_ptr(), DTYPE[t.dtype], strides[0], 0, tokens)


def _vector(t):
    return None if t is None else (t.data_ptr(), DTYPE[t.dtype], 0, 0, 1)


def _layout(t):
    """(sizes, strides) as (B, N, C) and (stride_b, stride_n); one call of each costs half of asking per dim."""
    if t.dim() == 3:
        return t.shape, t.stride()[:2]
    tokens, channels = t.shape
    return (1, tokens, channels), (0, t.stride(0))


def _indices(first, second):
    """Both row indices contiguous and of one width; the tensors are returned to keep them alive through the call."""
    if first is None and second is None:
        return None, None, 0
    dtypes = {t.dtype for t in (first, second) if t is not None}
    dtype = torch.int64 if len(dtypes) > 1 else dtypes.pop()
    first, second = (None if t is None else t.to(dtype).contiguous() for t in (first, second))
    return first, second, int(dtype == torch.int64)


def _shared(
    residual, y, gate, shift, scale, weight, bias, post_norm_weight, gate_index, index, wide,
    norm, eps, weight_offset, gate_act, post_norm, post_norm_eps, precision,
):  # fmt: skip
    (batch, tokens, channels), strides = _layout(y)
    dtype, indexed = DTYPE[y.dtype], index is not None
    if residual is None:
        side = (dtype, y.data_ptr(), *strides, 0, 0, 0)
    else:
        side = (DTYPE[residual.dtype], y.data_ptr(), *strides, residual.data_ptr(), *_layout(residual)[1])
    return (
        batch, tokens, channels, dtype, *side,
        None if gate is None else _table(gate, tokens, gate_index is not None), _table(shift, tokens, indexed),
        _table(scale, tokens, indexed), _vector(weight), _vector(bias), _vector(post_norm_weight),
        pointer(gate_index), pointer(index), wide, _NORM[norm],
        gate_act == "tanh", post_norm == "rms", eps, post_norm_eps, 0.0 if weight is None else weight_offset,
        precision == "native", torch.get_num_threads(),
    )  # fmt: skip


def norm_modulate(x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision):
    h = empty(x)
    (batch, tokens, channels), strides = _layout(x)
    if batch and tokens:
        indexed, dtype = row_index is not None, DTYPE[x.dtype]
        _, index, wide = _indices(None, row_index) if indexed else (None, None, 0)
        shared = (  # _shared, written out: 1 us less in the op that is called most
            batch, tokens, channels, dtype, dtype, x.data_ptr(), *strides, 0, 0, 0,
            None, _table(shift, tokens, indexed), _table(scale, tokens, indexed), _vector(weight), _vector(bias), None,
            0, pointer(index), wide, _NORM[norm], 0, 0, eps, 0.0, 0.0 if weight is None else weight_offset,
            precision == "native", torch.get_num_threads(),
        )  # fmt: skip
        _cpu.modulation_forward(shared, 0, h.data_ptr())
    return h


def gate_residual(residual, y, gate, post_norm_weight, row_index, gate_act, post_norm, post_norm_eps, precision):
    r, _ = gate_residual_norm_modulate(
        residual, y, gate, None, None, None, None, post_norm_weight, row_index, None, None, 0.0, 0.0,
        gate_act, post_norm, post_norm_eps, precision,
    )  # fmt: skip
    return r


def gate_residual_norm_modulate(
    residual, y, gate, shift, scale, weight, bias, post_norm_weight, gate_row_index, row_index, norm, *rest
):
    r = empty(residual)
    h = empty(y) if norm is not None else None
    if r.numel():
        gate_index, index, wide = _indices(gate_row_index, row_index)
        shared = _shared(
            residual, y, gate, shift, scale, weight, bias, post_norm_weight, gate_index, index, wide, norm, *rest
        )
        _cpu.modulation_forward(shared, r.data_ptr(), pointer(h))
    return r, h


# ---- backward -----------------------------------------------------------------------------------------
def _table_grad(t, wanted):
    """An empty gradient of a table or vector, and what the kernel needs to know of it."""
    if t is None or not wanted:
        return None, None
    grad = empty(t)
    rows_b = t.shape[1] if t.dim() == 3 else 1
    return grad, (grad.data_ptr(), DTYPE[t.dtype], grad.numel() // t.shape[-1], rows_b)


def _incoming(grad):
    """(address, stride_b, stride_n) of an output's gradient."""
    if grad is None:
        return None, (0, 0, 0)
    grad = rows_contiguous(grad)
    return grad, (grad.data_ptr(), *_layout(grad)[1])


def _gradients(grad_r, grad_h, residual, y, tables, indices, rest, needs):
    """tables: gate, shift, scale, weight, bias, post_norm_weight; needs: for residual, y and each of them."""
    d_residual = empty(residual) if residual is not None and needs[0] else None
    d_y = empty(y) if needs[1] else None
    made = [_table_grad(t, need) for t, need in zip(tables, needs[2:], strict=True)]
    if y.numel() == 0 or (grad_r is None and grad_h is None):
        return [None if g is None else g.zero_() for g in (d_residual, d_y, *(g for g, _ in made))]
    gate_index, index, wide = _indices(*indices)
    shared = _shared(*(residual, y, *tables, gate_index, index, wide, *rest))
    grad_r, r_layout = _incoming(grad_r)
    grad_h, h_layout = _incoming(grad_h)
    _cpu.modulation_backward(
        shared, *r_layout, *h_layout, pointer(d_residual), pointer(d_y), *(info for _, info in made),
    )  # fmt: skip
    return [d_residual, d_y, *(g for g, _ in made)]


norm_modulate_backward, gate_residual_backward, gate_residual_norm_modulate_backward = backwards(_gradients)


def register() -> None:
    for name in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        _register(Impl(name, "cpu", lambda x, *_: on_cpu(x), globals()[name], globals()[f"{name}_backward"]))
