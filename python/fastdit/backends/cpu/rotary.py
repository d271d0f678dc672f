"""rotary on the CPU kernel (csrc/cpu/rotary.cpp): tensors to pointers, sizes and strides."""

from __future__ import annotations

import torch

from ... import _cpu
from .. import _rotary_abi as abi
from .._tensors import empty, rows_contiguous
from ..reference import rotary as reference
from ..registry import Impl, register as _register
from ._abi import on_cpu, pointer


def qk_norm_rope(q, k, *args):
    q_out, k_out = empty(q), empty(k)
    shared, _kept = abi.arguments(q_out.data_ptr(), k_out.data_ptr(), q, k, *args)
    _cpu.qk_norm_rope_forward(shared)
    return q_out, k_out


def qk_norm_rope_(q, k, *args):
    shared, _kept = abi.arguments(q.data_ptr(), k.data_ptr(), q, k, *args)
    _cpu.qk_norm_rope_forward(shared)


# ---- backward -----------------------------------------------------------------------------------------
def _table_sums(tables, needs):
    """Zeroed fp64 sums for tables of which one is wanted."""
    wanted = any(t is not None and need for t, need in zip(tables, needs, strict=True))
    return [torch.zeros(t.shape, dtype=torch.float64) if wanted and t is not None else None for t in tables]


def qk_norm_rope_backward(grad_q, grad_k, q, k, *rest):
    *args, needs = rest
    affine, tables, axes, grids = args[:4], args[4:8], args[8:14], args[14]
    grads = [empty(t) if need and t is not None else None for t, need in zip((q, k, *affine), needs, strict=False)]
    own, ks, compact = (
        _table_sums(t, need) for t, need in ((tables[:2], needs[6:8]), (tables[2:], needs[8:10]), (axes, needs[10:]))
    )
    operands: list[tuple | None] = []
    for i, (x, grad) in enumerate(((q, grad_q), (k, grad_k))):
        mine = grads[i::2]  # of x, its weight, its bias
        if grad is None or x.numel() == 0:
            operands.append(None)
            for t in mine:
                if t is not None:
                    t.zero_()
            continue
        grad = rows_contiguous(grad)
        pair = ks if i == 1 and tables[2] is not None else own
        operands.append((grad, (grad.data_ptr(), grad.stride(), pointer(mine[1]), pointer(mine[2]), abi.table(*pair))))
    if operands != [None, None]:
        shared, _kept = abi.arguments(pointer(grads[0]), pointer(grads[1]), q, k, *args)
        axis_sums, _kept_sums = None, ()
        if compact[0] is not None:
            axis_sums, _kept_sums = abi.axes(compact, grids, q.dim() == 3)
        _cpu.qk_norm_rope_backward(shared, *(None if o is None else o[1] for o in operands), axis_sums)
    wanted = zip((*own, *ks, *compact), (*tables, *axes), needs[6:], strict=True)
    return (*grads, *(s.to(t.dtype) if need and s is not None else None for s, t, need in wanted))


def register() -> None:
    supports = lambda q, *_: on_cpu(q)  # noqa: E731
    _register(Impl("qk_norm_rope", "cpu", supports, qk_norm_rope, qk_norm_rope_backward))
    _register(Impl("qk_norm_rope_", "cpu", supports, qk_norm_rope_, reference.no_backward))
