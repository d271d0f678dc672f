"""activation on the Triton kernels (kernels/activation.py). One launch; bytes: 2 tensors, 3 gated; backward 3 and 5."""

from __future__ import annotations

import torch

from fastdit.kernels.activation import GELU, GELU_TANH, RELU, SILU, activation_backward, activation_forward

from .._tensors import empty, rows_contiguous
from ..registry import Impl, register as _register
from ._config import Config, choose, tunable
from ._launch import launch, unfit
from ._tiles import alignment

_ACT = {"gelu": GELU, "gelu_tanh": GELU_TANH, "silu": SILU, "relu": RELU}
for _kernel in ("activation_forward", "activation_backward"):
    tunable(_kernel, Config((1024,), 4), Config((2048,), 8), Config((2048,), 4), Config((4096,), 8), Config((512,), 4))


def _rows(t):
    """t as rows that are one stride apart; a copy where its leading dims do not collapse."""
    if t is None or t.is_contiguous():
        return t
    return rows_contiguous(t).reshape(-1, t.shape[-1])


def _plan(kernel, x, *tensors):
    """Row length, strides, blocks of a row, ALIGN, config and programs: x's own rows, or one where none has a gap."""
    channels, elements = x.shape[-1], x.numel()
    if all(t is None or t.is_contiguous() for t in (x, *tensors)):
        channels, steps = elements, (elements,) * (1 + len(tensors))
    else:
        steps = tuple(0 if t is None else channels if t.is_contiguous() else t.stride(0) for t in (x, *tensors))
    config = choose(kernel, x, (x.dtype,), lambda arch: Config((1024 if x.dtype == torch.float32 else 2048,), 4))
    blocks = -(-channels // config.blocks[0])
    align = alignment(x.element_size(), channels, *steps)
    return (channels, *steps, blocks), align, config, blocks * (elements // channels)


def activation(x, up, act):
    y = empty(x)
    if y.numel():
        x, up = _rows(x), _rows(up)
        numbers, align, config, programs = _plan("activation_forward", x, up)
        launch(
            activation_forward, (programs, 1, 1), (x, up, y), numbers, (_ACT[act], align, config.blocks[0]),
            config.warps, config.stages,
        )  # fmt: skip
    return y


def activation_grads(grad, x, up, act, needs):
    d_x, d_up = (empty(x) if need and t is not None else None for t, need in zip((x, up), needs, strict=True))
    if grad is None:
        return tuple(None if d is None else d.zero_() for d in (d_x, d_up))
    if x.numel() and not (d_x is None and d_up is None):
        x, up, grad = _rows(x), _rows(up), _rows(grad)
        numbers, align, config, programs = _plan("activation_backward", x, up, grad)
        launch(
            activation_backward, (programs, 1, 1), (x, up, grad, d_x, d_up), numbers,
            (_ACT[act], align, config.blocks[0]), config.warps, config.stages,
        )  # fmt: skip
    return d_x, d_up


def register() -> None:
    _register(Impl("activation", "triton", lambda x, *_: unfit(x), activation, activation_grads))
