"""modulation on the reference backend: schema order to keywords, nothing else."""

from __future__ import annotations

from ...reference import modulation as formula
from ..registry import Impl, register as _register
from ._vjp import vjp


def norm_modulate(x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision):
    return formula.norm_modulate(
        x,
        shift=shift,
        scale=scale,
        weight=weight,
        bias=bias,
        weight_offset=weight_offset,
        norm=norm,
        eps=eps,
        row_index=row_index,
        precision=precision,
    )


def gate_residual(residual, y, gate, post_norm_weight, row_index, gate_act, post_norm, post_norm_eps, precision):
    return formula.gate_residual(
        residual,
        y,
        gate,
        gate_act=gate_act,
        post_norm=post_norm,
        post_norm_weight=post_norm_weight,
        post_norm_eps=post_norm_eps,
        row_index=row_index,
        precision=precision,
    )


def gate_residual_norm_modulate(
    residual, y, gate, shift, scale, weight, bias, post_norm_weight, gate_row_index, row_index,
    norm, eps, weight_offset, gate_act, post_norm, post_norm_eps, precision,
):  # fmt: skip
    return formula.gate_residual_norm_modulate(
        residual,
        y,
        gate,
        shift=shift,
        scale=scale,
        weight=weight,
        bias=bias,
        weight_offset=weight_offset,
        norm=norm,
        eps=eps,
        gate_act=gate_act,
        post_norm=post_norm,
        post_norm_weight=post_norm_weight,
        post_norm_eps=post_norm_eps,
        gate_row_index=gate_row_index,
        row_index=row_index,
        precision=precision,
    )


norm_modulate_backward = vjp(norm_modulate, wrt=range(5))
gate_residual_backward = vjp(gate_residual, wrt=range(4))
gate_residual_norm_modulate_backward = vjp(gate_residual_norm_modulate, wrt=range(8), outputs=2)


def register() -> None:
    for name in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        _register(Impl(name, "reference", lambda *args: None, globals()[name], globals()[f"{name}_backward"]))
