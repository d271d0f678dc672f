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
    strides = t.stride()
    if indexed:
        return (t.data_ptr(), DTYPE[t.dtype], 0, strides[0], 1)
    if len(strides) == 3:
        return (t.data_ptr(), DTYPE[t.dtype], strides[0], strides[1], tokens // t.shape[1] or 1)
    return (t.data_ptr(), DTYPE[t.dtype], strides[0], 0, 1)


def _vector(t):
    return None if t is None else (t.data_ptr(), DTYPE[t.dtype], 0, 0, 1)


def _layout(t):
    """(sizes, strides) as (B, N, C) and (stride_b, stride_n); one call of each costs half of asking per dim."""
    if t.dim() == 3:
        return t.shape, t.stride()[:2]
    tokens, channels = t.shape
    return (1, tokens, channels), (0, t.stride(0))


def _empty(t):
    # half the cost of torch.empty(t.shape, dtype=t.dtype)
    return torch.empty_like(t, memory_format=torch.contiguous_format)


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
    h = _empty(x)
    (batch, tokens, channels), strides = _layout(x)
    if batch and tokens:
        dtype = DTYPE[x.dtype]
        indexed = row_index is not None
        _, index, wide = _indices(None, row_index) if indexed else (None, None, 0)
        _cpu.modulation_forward(
            batch, tokens, channels, dtype, dtype, x.data_ptr(), *strides, 0, 0, 0, 0, h.data_ptr(),
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
    r = _empty(residual)
    h = _empty(y) if norm is not None else None
    (batch, tokens, channels), strides = _layout(y)
    if batch and tokens:
        gate_index, index, wide = _indices(gate_row_index, row_index)
        indexed = index is not None
        _cpu.modulation_forward(
            batch, tokens, channels, DTYPE[y.dtype], DTYPE[residual.dtype], y.data_ptr(), *strides,
            residual.data_ptr(), *_layout(residual)[1], r.data_ptr(), _pointer(h),
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
