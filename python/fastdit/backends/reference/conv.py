"""conv on the reference backend: schema order to keywords, nothing else."""

from __future__ import annotations

from ...reference import conv as formula
from ..registry import Impl, register as _register
from ._vjp import vjp


def causal_conv3d(
    x, weight, bias, cache, norm_weight, residual,
    stride, dilation, padding, time_pad, space_pad, norm, norm_eps, act, algo,
):  # fmt: skip
    return formula.causal_conv3d(
        x,
        weight,
        bias,
        stride=stride,
        dilation=dilation,
        padding=padding,
        time_pad=time_pad,
        space_pad=space_pad,
        cache=cache,
        norm=norm,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        act=act,
        residual=residual,
        algo=algo,
    )


def next_cache(x, cache, k_t):
    return formula.next_cache(x, cache, k_t)


def norm_silu(x, weight, bias, norm, groups, eps):
    return formula.norm_silu(x, norm=norm, weight=weight, bias=bias, groups=groups, eps=eps)


causal_conv3d_backward = vjp(causal_conv3d, wrt=range(6))
next_cache_backward = vjp(next_cache, wrt=range(2))
norm_silu_backward = vjp(norm_silu, wrt=range(3))


def register() -> None:
    for name in ("causal_conv3d", "next_cache", "norm_silu"):
        _register(Impl(name, "reference", lambda *args: None, globals()[name], globals()[f"{name}_backward"]))
