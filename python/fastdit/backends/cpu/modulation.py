"""modulation on the CPU kernels (csrc/cpu/modulation.cpp): three ops, one entry point."""

from __future__ import annotations

import torch

from ... import _cpu
from ..reference import modulation as reference
from ..registry import Impl, register as _register
from ._abi import DTYPE, on_cpu

_NORM = {None: 0, "layer": 1, "rms": 2}


def _table(t, tokens, indexed):
    if t is None:
        return None
    if indexed:
        return (t.data_ptr(), DTYPE[t.dtype], 0, t.stride(0), 1)
    if t.dim() == 3:
        return (t.data_ptr(), DTYPE[t.dtype], t.stride(0), t.stride(1), tokens // t.shape[1] or 1)
    return (t.data_ptr(), DTYPE[t.dtype], t.stride(0), 0, 1)


def _vector(t):
    return None if t is None else (t.data_ptr(), DTYPE[t.dtype], 0, 0, 1)


def _strides(t):
    return (0, t.stride(0)) if t.dim() == 2 else (t.stride(0), t.stride(1))


def _indices(first, second):
    """Both row indices contiguous and of one width; the tensors are returned to keep them alive through the call."""
    if first is None and second is None:
        return None, None, 0
    dtypes = {t.dtype for t in (first, second) if t is not None}
    dtype = torch.int64 if len(dtypes) > 1 else dtypes.pop()
    first, second = (None if t is None else t.to(dtype).contiguous() for t in (first, second))
    return first, second, int(dtype == torch.int64)


def _pointer(t):
    return 0 if t is None else t.data_ptr()


def norm_modulate(x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision):
    h = torch.empty(x.shape, dtype=x.dtype)
    if h.numel():
        batch, tokens = (1, x.shape[0]) if x.dim() == 2 else x.shape[:2]
        dtype = DTYPE[x.dtype]
        indexed = row_index is not None
        _, index, wide = _indices(None, row_index) if indexed else (None, None, 0)
        _cpu.modulation_forward(
            batch, tokens, x.shape[-1], dtype, dtype, x.data_ptr(), *_strides(x), 0, 0, 0, 0, h.data_ptr(),
            None, _table(shift, tokens, indexed), _table(scale, tokens, indexed), _vector(weight), _vector(bias), None,
            0, _pointer(index), wide, _NORM[norm], 0, 0, eps, 0.0, weight_offset,
            precision == "native", torch.get_num_threads(),
        )  # fmt: skip
    return h


def gate_residual(residual, y, gate, post_norm_weight, row_index, gate_act, post_norm, post_norm_eps, precision):
    r, _ = _seam(
        residual, y, gate, None, None, None, None, post_norm_weight, row_index, None, None, 0.0, 0.0,
        gate_act, post_norm, post_norm_eps, precision,
    )  # fmt: skip
    return r


def gate_residual_norm_modulate(*args):
    return _seam(*args)


def _seam(
    residual, y, gate, shift, scale, weight, bias, post_norm_weight, gate_row_index, row_index,
    norm, eps, weight_offset, gate_act, post_norm, post_norm_eps, precision,
):  # fmt: skip
    r = torch.empty(residual.shape, dtype=residual.dtype)
    h = torch.empty(y.shape, dtype=y.dtype) if norm is not None else None
    if r.numel():
        batch, tokens = (1, y.shape[0]) if y.dim() == 2 else y.shape[:2]
        gate_index, index, wide = _indices(gate_row_index, row_index)
        indexed = index is not None
        _cpu.modulation_forward(
            batch, tokens, y.shape[-1], DTYPE[y.dtype], DTYPE[residual.dtype], y.data_ptr(), *_strides(y),
            residual.data_ptr(), *_strides(residual), r.data_ptr(), _pointer(h),
            _table(gate, tokens, gate_index is not None), _table(shift, tokens, indexed),
            _table(scale, tokens, indexed), _vector(weight), _vector(bias), _vector(post_norm_weight),
            _pointer(gate_index), _pointer(index), wide, _NORM[norm], gate_act == "tanh", post_norm == "rms",
            eps, post_norm_eps, weight_offset, precision == "native", torch.get_num_threads(),
        )  # fmt: skip
    return r, h


def register() -> None:
    for name in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        _register(
            Impl(
                name,
                "cpu",
                lambda x, *_: on_cpu(x),
                globals()[name],
                getattr(reference, f"{name}_backward"),
                backward_backend="reference",
            )
        )
