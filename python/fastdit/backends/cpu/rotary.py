"""rotary on the CPU kernel (csrc/cpu/rotary.cpp): tensors to pointers, sizes and strides."""

from __future__ import annotations

import torch

from ... import _cpu
from ..reference import rotary as reference
from ..registry import Impl, register as _register
from ._abi import DTYPE, on_cpu

_NORM = {None: 0, "rms": 1, "layer": 2}
_LAYOUT = {"interleaved": 0, "half": 1, "axis_half": 2}


def _vector(t):
    return (0, 0) if t is None else (t.data_ptr(), DTYPE[t.dtype])


def _table_strides(t):
    """Strides over (B, N, H, R/2) of a table (N, R/2), (N, H, R/2) or (B, N, H, R/2), 0 where it broadcasts."""
    strides = [0 if size == 1 else stride for size, stride in zip(t.shape[:-1], t.stride(), strict=False)]
    if len(strides) == 1:
        return (0, strides[0], 0, t.stride(-1))
    return (*(0,) * (3 - len(strides)), *strides, t.stride(-1))


def _operand(x, out, weight, bias, cos, sin, axes):
    if x.dim() == 4:
        strides, out_strides = x.stride()[:3], out.stride()[:3]
    else:
        strides, out_strides = (0, *x.stride()[:2]), (0, *out.stride()[:2])
    if cos is None:
        table = (0,) * 11
    else:
        table = (cos.data_ptr(), sin.data_ptr(), *_table_strides(cos), *_table_strides(sin), DTYPE[cos.dtype])
    return (
        x.data_ptr(), out.data_ptr(), x.shape[-3], x.shape[-2], *strides, *out_strides,
        *_vector(weight), *_vector(bias), *table, axes,
    )  # fmt: skip


def _run(
    q_out, k_out, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, k_cos, k_sin,
    cos_t, sin_t, cos_h, sin_h, cos_w, sin_w, grids, norm, scope, eps, layout, rope_start, rope_len, precision,
):  # fmt: skip
    if k_cos is None:
        k_cos, k_sin = cos, sin
    pairs = 0
    axes = ()
    if cos_t is not None:
        axes = [t.contiguous() for t in (cos_t, sin_t, cos_h, sin_h, cos_w, sin_w) if t is not None]
        grids = grids.to(torch.int32).contiguous()
        pairs = sum(t.shape[1] for t in axes[::2])
    elif k_cos is not None:
        pairs = k_cos.shape[-1]
    _cpu.qk_norm_rope_forward(
        eps, torch.get_num_threads(), DTYPE[q.dtype], q.shape[0] if q.dim() == 4 else 1, q.shape[-1],
        _NORM[norm], scope == "hidden", _LAYOUT[layout], 2 * pairs,
        rope_start, max(q.shape[-3], k.shape[-3]) if rope_len is None else rope_len, precision == "native",
        *_operand(q, q_out, q_weight, q_bias, cos, sin, bool(axes)),
        *_operand(k, k_out, k_weight, k_bias, k_cos, k_sin, bool(axes) and k_cos is None),
        *_axes(axes, grids, q.dim() == 3),
    )  # fmt: skip


def _axes(axes, grids, packed):
    if not axes:
        return (0,)
    tables = [v for c, s in zip(axes[::2], axes[1::2], strict=True) for v in (c.data_ptr(), s.data_ptr(), c.shape[1])]
    return (len(axes) // 2, *tables, DTYPE[axes[0].dtype], grids.data_ptr(), grids.shape[0], packed)


def qk_norm_rope(q, k, *args):
    q_out = torch.empty(q.shape, dtype=q.dtype)
    k_out = torch.empty(k.shape, dtype=k.dtype)
    _run(q_out, k_out, q, k, *args)
    return q_out, k_out


def qk_norm_rope_(q, k, *args):
    _run(q, k, q, k, *args)


def register() -> None:
    supports = lambda q, *_: on_cpu(q)  # noqa: E731
    backward = reference.qk_norm_rope_backward
    _register(Impl("qk_norm_rope", "cpu", supports, qk_norm_rope, backward, backward_backend="reference"))
    _register(Impl("qk_norm_rope_", "cpu", supports, qk_norm_rope_, reference.no_backward))
