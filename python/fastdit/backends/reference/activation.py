"""activation on the reference backend: schema order to keywords, gradients by autograd."""

from __future__ import annotations

from ...reference import activation as formula
from ..registry import Impl, register as _register
from ._vjp import vjp


def activation(x, up, act):
    return formula.activation(x, act, up=up)


activation_backward = vjp(activation, wrt=(0, 1))


def register() -> None:
    _register(Impl("activation", "reference", lambda *args: None, activation, activation_backward))
