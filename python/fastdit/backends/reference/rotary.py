"""rotary on the reference backend: schema order to keywords, nothing else."""

from __future__ import annotations

from ...reference import rotary as formula
from ..registry import Impl, register as _register
from ._vjp import vjp

_TENSORS = ("q_weight", "k_weight", "q_bias", "k_bias", "cos", "sin", "k_cos", "k_sin")
_OPTIONS = ("norm", "scope", "eps", "layout", "rope_start", "rope_len", "precision")


def _call(inplace, q, k, *args):
    axes = tuple(t for t in args[8:14] if t is not None)
    return formula.qk_norm_rope(
        q,
        k,
        **dict(zip(_TENSORS, args[:8], strict=True)),
        axes=axes or None,
        grids=args[14],
        **dict(zip(_OPTIONS, args[15:], strict=True)),
        inplace=inplace,
    )


def qk_norm_rope(*args):
    return _call(False, *args)


def qk_norm_rope_(*args):
    _call(True, *args)


qk_norm_rope_backward = vjp(qk_norm_rope, wrt=range(16), outputs=2)


def no_backward(*args):
    raise RuntimeError("qk_norm_rope: in place has no gradient; got a backward, expected none; use inplace=False")


def register() -> None:
    _register(Impl("qk_norm_rope", "reference", lambda *args: None, qk_norm_rope, qk_norm_rope_backward))
    _register(Impl("qk_norm_rope_", "reference", lambda *args: None, qk_norm_rope_, no_backward))
