"""activation on the CPU kernels (csrc/cpu/activation.cpp)."""

from __future__ import annotations

import torch

from ... import _cpu
from .._tensors import empty, rows_contiguous
from ..registry import Impl, register as _register
from ._abi import DTYPE, on_cpu, pointer

_ACT = {"gelu": 0, "gelu_tanh": 1, "silu": 2, "relu": 3}


def _rows(t):
    """t and the stride between its rows; the copy of one whose leading dims do not collapse is returned to keep it."""
    if t is None:
        return None, 0
    if t.is_contiguous():
        return t, t.shape[-1]
    t = t.reshape(-1, t.shape[-1])
    return t, t.stride(0)


def _shared(x, x_stride, up, up_stride, act):
    channels = x.shape[-1]
    return (
        x.numel() // channels, channels, DTYPE[x.dtype], _ACT[act], x.data_ptr(), x_stride, pointer(up), up_stride,
    )  # fmt: skip


def activation(x, up, act):
    y = empty(x)
    if y.numel():
        x, x_stride = _rows(x)
        up, up_stride = _rows(up)
        _cpu.activation_forward(*_shared(x, x_stride, up, up_stride, act), y.data_ptr(), torch.get_num_threads())
    return y


def activation_backward(grad, x, up, act, needs):
    d_x, d_up = (empty(x) if need and t is not None else None for t, need in zip((x, up), needs, strict=True))
    if grad is None:
        return tuple(None if d is None else d.zero_() for d in (d_x, d_up))
    if x.numel():
        x, x_stride = _rows(x)
        up, up_stride = _rows(up)
        grad, grad_stride = _rows(rows_contiguous(grad))
        _cpu.activation_backward(
            *_shared(x, x_stride, up, up_stride, act), grad.data_ptr(), grad_stride, pointer(d_x), pointer(d_up),
            torch.get_num_threads(),
        )  # fmt: skip
    return d_x, d_up


def register() -> None:
    _register(Impl("activation", "cpu", lambda x, *_: on_cpu(x), activation, activation_backward))
