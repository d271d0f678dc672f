"""rotary on the CPU kernel (csrc/cpu/rotary.cpp): tensors to pointers, sizes and strides."""

from __future__ import annotations

import torch

from ... import _cpu
from ..reference import rotary as reference
from ..registry import Impl, register as _register
from ._abi import DTYPE, on_cpu

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


def _run(
    q_out, k_out, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, k_cos, k_sin,
    cos_t, sin_t, cos_h, sin_h, cos_w, sin_w, grids, norm, scope, eps, layout, rope_start, rope_len, precision,
):  # fmt: skip
    axes, kept, pairs = None, (), 0
    if grids is not None:
        axes, kept = _axes((cos_t, sin_t, cos_h, sin_h, cos_w, sin_w), grids, q.dim() == 3)
        pairs = sum(width for _, _, width in axes[4:])
    elif cos is not None:
        pairs = cos.shape[-1]
    elif k_cos is not None:
        pairs = k_cos.shape[-1]
    _cpu.qk_norm_rope_forward(
        DTYPE[q.dtype],
        (q.data_ptr(), q.shape, q.stride(), q_out.data_ptr()),
        (k.data_ptr(), k.shape, k.stride(), k_out.data_ptr()),
        _vector(q_weight), _vector(k_weight), _vector(q_bias), _vector(k_bias),
        _table(cos, sin), _table(k_cos, k_sin), axes,
        _NORM[norm], scope == "hidden", eps, _LAYOUT[layout], pairs,
        rope_start, _ALL if rope_len is None else rope_len, precision == "native", torch.get_num_threads(),
    )  # fmt: skip
    del kept


def qk_norm_rope(q, k, *args):
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format)
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format)
    _run(q_out, k_out, q, k, *args)
    return q_out, k_out


def qk_norm_rope_(q, k, *args):
    _run(q, k, q, k, *args)


def register() -> None:
    supports = lambda q, *_: on_cpu(q)  # noqa: E731
    backward = reference.qk_norm_rope_backward
    _register(Impl("qk_norm_rope", "cpu", supports, qk_norm_rope, backward, backward_backend="reference"))
    _register(Impl("qk_norm_rope_", "cpu", supports, qk_norm_rope_, reference.no_backward))
