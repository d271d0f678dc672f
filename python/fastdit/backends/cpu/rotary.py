"""rotary on the CPU kernel (csrc/cpu/rotary.cpp): tensors to pointers, sizes and strides."""

from __future__ import annotations

import torch

from ... import _cpu
from .._tensors import empty, rows_contiguous
from ..reference import rotary as reference
from ..registry import Impl, register as _register
from ._abi import DTYPE, on_cpu, pointer

_NORM = {None: 0, "rms": 1, "layer": 2}
_LAYOUT = {"interleaved": 0, "half": 1, "axis_half": 2}


_ALL = 1 << 62  # rope_len of "every token from rope_start on"


def _vector(t):
    return None if t is None else (t.data_ptr(), DTYPE[t.dtype])


def _table(cos, sin):
    if cos is None:
        return None
    return (cos.data_ptr(), sin.data_ptr(), cos.shape, cos.stride(), sin.stride(), DTYPE[cos.dtype])


def _axes(tables, grids, packed):
    """The description, and the tensors that it points into."""
    tables = [t.contiguous() for t in tables if t is not None]
    grids = grids.to(torch.int32).contiguous()
    pairs = zip(tables[::2], tables[1::2], strict=True)
    columns = [(cos.data_ptr(), sin.data_ptr(), cos.shape[1]) for cos, sin in pairs]
    return (DTYPE[tables[0].dtype], grids.data_ptr(), grids.shape[0], packed, *columns), (*tables, grids)


def _shared(
    q_out, k_out, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, k_cos, k_sin,
    cos_t, sin_t, cos_h, sin_h, cos_w, sin_w, grids, norm, scope, eps, layout, rope_start, rope_len, precision,
):  # fmt: skip
    """What the kernels of both directions take, and the tensors that it points into."""
    axes, kept, pairs = None, (), 0
    if grids is not None:
        axes, kept = _axes((cos_t, sin_t, cos_h, sin_h, cos_w, sin_w), grids, q.dim() == 3)
        pairs = sum(width for _, _, width in axes[4:])
    elif cos is not None:
        pairs = cos.shape[-1]
    elif k_cos is not None:
        pairs = k_cos.shape[-1]
    shared = (
        DTYPE[q.dtype],
        (q.data_ptr(), q.shape, q.stride(), q_out),
        (k.data_ptr(), k.shape, k.stride(), k_out),
        _vector(q_weight), _vector(k_weight), _vector(q_bias), _vector(k_bias),
        _table(cos, sin), _table(k_cos, k_sin), axes,
        _NORM[norm], scope == "hidden", eps, _LAYOUT[layout], pairs,
        rope_start, _ALL if rope_len is None else rope_len, precision == "native", torch.get_num_threads(),
    )  # fmt: skip
    return shared, kept


def qk_norm_rope(q, k, *args):
    q_out, k_out = empty(q), empty(k)
    shared, _kept = _shared(q_out.data_ptr(), k_out.data_ptr(), q, k, *args)
    _cpu.qk_norm_rope_forward(shared)
    return q_out, k_out


def qk_norm_rope_(q, k, *args):
    shared, _kept = _shared(q.data_ptr(), k.data_ptr(), q, k, *args)
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
        operands.append((grad, (grad.data_ptr(), grad.stride(), pointer(mine[1]), pointer(mine[2]), _table(*pair))))
    if operands != [None, None]:
        shared, _kept = _shared(pointer(grads[0]), pointer(grads[1]), q, k, *args)
        axis_sums, _kept_sums = None, ()
        if compact[0] is not None:
            axis_sums, _kept_sums = _axes(compact, grids, q.dim() == 3)
        _cpu.qk_norm_rope_backward(shared, *(None if o is None else o[1] for o in operands), axis_sums)
    wanted = zip((*own, *ks, *compact), (*tables, *axes), needs[6:], strict=True)
    return (*grads, *(s.to(t.dtype) if need and s is not None else None for s, t, need in wanted))


def register() -> None:
    supports = lambda q, *_: on_cpu(q)  # noqa: E731
    _register(Impl("qk_norm_rope", "cpu", supports, qk_norm_rope, qk_norm_rope_backward))
    _register(Impl("qk_norm_rope_", "cpu", supports, qk_norm_rope_, reference.no_backward))
