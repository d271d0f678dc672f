"""modulation on the CPU kernels (csrc/cpu/modulation.cpp): three ops, one entry point each way."""

from __future__ import annotations

import torch

from ... import _cpu
from .._modulation import backwards, forwards
from .._modulation_abi import NORM, arguments, incoming, layout, same_width, table_grad, table_row, vector_row
from .._tensors import empty
from ..registry import Impl, register as _register
from ._abi import DTYPE, on_cpu, pointer


def norm_modulate(x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision):
    h = empty(x)
    (batch, tokens, channels), strides = layout(x)
    if batch and tokens:
        indexed, dtype = row_index is not None, DTYPE[x.dtype]
        _, index, wide = same_width(None, row_index) if indexed else (None, None, 0)
        shared = (  # `arguments`, written out: 1 us less in the op that is called most
            batch, tokens, channels, dtype, dtype, x.data_ptr(), *strides, 0, 0, 0,
            None, table_row(shift, tokens, indexed), table_row(scale, tokens, indexed), vector_row(weight),
            vector_row(bias), None,
            0, pointer(index), wide, NORM[norm], 0, 0, eps, 0.0, 0.0 if weight is None else weight_offset,
            precision == "native", torch.get_num_threads(),
        )  # fmt: skip
        _cpu.modulation_forward(shared, 0, h.data_ptr())
    return h


def gate_residual_norm_modulate(
    residual, y, gate, shift, scale, weight, bias, post_norm_weight, gate_row_index, row_index, norm, *rest
):
    r = empty(residual)
    h = empty(y) if norm is not None else None
    if r.numel():
        gate_index, index, wide = same_width(gate_row_index, row_index)
        shared = arguments(
            residual, y, gate, shift, scale, weight, bias, post_norm_weight, gate_index, index, wide, norm, *rest
        )
        _cpu.modulation_forward(shared, r.data_ptr(), pointer(h))
    return r, h


_, gate_residual = forwards(gate_residual_norm_modulate)


# ---- backward -----------------------------------------------------------------------------------------
def _gradients(grad_r, grad_h, residual, y, tables, indices, rest, needs):
    """tables: gate, shift, scale, weight, bias, post_norm_weight; needs: for residual, y and each of them."""
    d_residual = empty(residual) if residual is not None and needs[0] else None
    d_y = empty(y) if needs[1] else None
    made = [table_grad(t, need) for t, need in zip(tables, needs[2:], strict=True)]
    if y.numel() == 0 or (grad_r is None and grad_h is None):
        return [None if g is None else g.zero_() for g in (d_residual, d_y, *(g for g, _ in made))]
    gate_index, index, wide = same_width(*indices)
    shared = arguments(*(residual, y, *tables, gate_index, index, wide, *rest))
    grad_r, r_layout = incoming(grad_r)
    grad_h, h_layout = incoming(grad_h)
    _cpu.modulation_backward(
        shared, *r_layout, *h_layout, pointer(d_residual), pointer(d_y), *(info for _, info in made),
    )  # fmt: skip
    return [d_residual, d_y, *(g for g, _ in made)]


norm_modulate_backward, gate_residual_backward, gate_residual_norm_modulate_backward = backwards(_gradients)


def register() -> None:
    for name in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        _register(Impl(name, "cpu", lambda x, *_: on_cpu(x), globals()[name], globals()[f"{name}_backward"]))
