"""activation on the Triton kernels (kernels/activation.py). One launch; bytes: 2 tensors, 3 gated; backward 3 and 5."""

from __future__ import annotations

import torch

from fastdit.kernels.activation import GELU, GELU_TANH, RELU, SILU, activation_backward, activation_forward

from .._facts import kept
from .._tensors import empty, rows_contiguous
from ..registry import Impl, register as _register
from ._config import Config, choose, tunable
from ._launch import Launch, unfit
from ._tiles import alignment

_ACT = {"gelu": GELU, "gelu_tanh": GELU_TANH, "silu": SILU, "relu": RELU}
_KERNELS = {kernel.fn.__name__: kernel for kernel in (activation_forward, activation_backward)}
for _kernel in _KERNELS:
    tunable(_kernel, Config((1024,), 4), Config((2048,), 8), Config((2048,), 4), Config((4096,), 8), Config((512,), 4))


def _rows(t):
    """t as rows that are one stride apart; a copy where its leading dims do not collapse."""
    if t is None or t.is_contiguous():
        return t
    return rows_contiguous(t).reshape(-1, t.shape[-1])


@kept
def _plan(x, act, name, *tensors) -> Launch:
    """x and tensors as `_rows` gives them: x's own rows, or one where none has a gap."""
    channels, elements = x.shape[-1], x.numel()
    if all(t is None or t.is_contiguous() for t in (x, *tensors)):
        channels, steps = elements, (elements,) * (1 + len(tensors))
    else:
        steps = tuple(0 if t is None else channels if t.is_contiguous() else t.stride(0) for t in (x, *tensors))
    config = choose(name, x, (x.dtype,), lambda arch: Config((1024 if x.dtype == torch.float32 else 2048,), 4))
    blocks = -(-channels // config.blocks[0])
    align = alignment(x.element_size(), channels, *steps)
    return Launch(
        _KERNELS[name], (blocks * (elements // channels), 1, 1), (channels, *steps, blocks),
        (_ACT[act], align, config.blocks[0]), config.warps, config.stages,
    )  # fmt: skip


def activation(x, up, act):
    y = empty(x)
    if y.numel():
        x, up = _rows(x), _rows(up)
        _plan(x, act, "activation_forward", up)(x, up, y)
    return y


def activation_grads(grad, x, up, act, needs):
    d_x, d_up = (empty(x) if need and t is not None else None for t, need in zip((x, up), needs, strict=True))
    if grad is None:
        return tuple(None if d is None else d.zero_() for d in (d_x, d_up))
    if x.numel() and not (d_x is None and d_up is None):
        x, up, grad = _rows(x), _rows(up), _rows(grad)
        _plan(x, act, "activation_backward", up, grad)(x, up, grad, d_x, d_up)
    return d_x, d_up


def register() -> None:
    _register(Impl("activation", "triton", lambda x, *_: unfit(x), activation, activation_grads))
