"""adaln on the reference backend: schema order to keywords, gradients by autograd."""

from __future__ import annotations

from ...reference import adaln as formula
from ..registry import Impl, register as _register
from ._vjp import vjp

_NORM = ("shift", "scale", "norm_weight", "norm_bias", "row_index", "weight", "bias")
_HEADS = ("q_weight", "k_weight", "q_bias", "k_bias", "cos", "sin", "num_heads", "num_kv_heads")
_LINEAR = (*_NORM, "norm", "eps", "weight_offset", "act", "precision", "keep")
_QKV = (
    *_NORM, *_HEADS, "norm", "eps", "weight_offset", "qk_norm", "qk_eps", "layout", "rope_start", "rope_len",
    "precision", "keep",
)  # fmt: skip
_GATE = ("weight", "bias", "gate", "row_index", "gate_act", "precision", "keep")


def norm_modulate_linear(x, *args):
    return formula.norm_modulate_linear(x, **dict(zip(_LINEAR, args, strict=True)))


def norm_modulate_qkv(x, *args):
    return formula.norm_modulate_qkv(x, **dict(zip(_QKV, args, strict=True)))


def linear_gate_residual(residual, y, *args):
    return formula.linear_gate_residual(residual, y, **dict(zip(_GATE, args, strict=True)))


norm_modulate_linear_backward = vjp(norm_modulate_linear, wrt=(0, 1, 2, 3, 4, 6, 7), outputs=2, saved=1)
norm_modulate_qkv_backward = vjp(norm_modulate_qkv, wrt=(0, 1, 2, 3, 4, *range(6, 14)), outputs=2, saved=1)
linear_gate_residual_backward = vjp(linear_gate_residual, wrt=range(5), outputs=2, saved=1)


def register() -> None:
    for name in ("norm_modulate_linear", "norm_modulate_qkv", "linear_gate_residual"):
        _register(Impl(name, "reference", lambda *args: None, globals()[name], globals()[f"{name}_backward"]))
