"""The fused form of adaLN's two halves: which calls take it, and the ops that stand behind it.

    norm_modulate_qkv     norm, modulation, projection; norm and rotation of the query and key heads
    norm_modulate_linear  norm, modulation, projection; activation
    linear_gate_residual  projection; gate and residual

Three ops of the family `adaln`, internal: schemas may change. They read the weights of a layer, so they serve plain
weights only; a layer that is more than its weight (LoRA, quantised, hooked) is called by the composition. Which of the
two is faster is a fact of the device: each implementation says so (`Impl.pays`), from tokens, channels and dtype. Under
torch.compile that is one comparison of the token count: two graphs at most.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..backends import registry
from . import _check, _explain, modulation_check, rotary, rotary_check
from ._op import Op

_TABLES = "Tensor? shift, Tensor? scale, Tensor? norm_weight, Tensor? norm_bias, Tensor? row_index"
_VECTORS = ("q_weight", "k_weight", "q_bias", "k_bias", "cos", "sin")
_WRT = ("x", "shift", "scale", "norm_weight", "norm_bias", "weight", "bias")


def _rows_of(x: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


def _kept(x: Tensor, width: int, keep: bool) -> Tensor:
    return _rows_of(x, width) if keep else x.new_empty(0)


def _fake_qkv(x, *args):
    width, heads, kv_heads, keep = args[5].shape[0], args[13], args[14], args[-1]
    return _rows_of(x, width), _kept(x, width // (heads + 2 * kv_heads) * (heads + kv_heads), keep)


def _validate(x, shift, scale, norm_weight, norm_bias, row_index, *_) -> None:
    modulation_check.validate_rows("norm_modulate", row_index, "row_index", shift, scale)


_linear = Op(
    "norm_modulate_linear",
    f"(Tensor x, {_TABLES}, Tensor weight, Tensor? bias, str norm, float eps, float weight_offset, str? act, "
    "str precision, bool keep) -> (Tensor, Tensor)",
    differentiable=_WRT,
    fake=lambda x, *args: (_rows_of(x, args[5].shape[0]), _kept(x, args[5].shape[0], args[-1])),
    validate=_validate,
    saves=(1,),
)
_qkv = Op(
    "norm_modulate_qkv",
    f"(Tensor x, {_TABLES}, Tensor weight, Tensor? bias, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, "
    "Tensor? k_bias, Tensor? cos, Tensor? sin, int num_heads, int num_kv_heads, str norm, float eps, "
    "float weight_offset, str? qk_norm, float qk_eps, str layout, SymInt rope_start, SymInt? rope_len, "
    "str precision, bool keep) -> (Tensor, Tensor)",
    differentiable=(*_WRT, *_VECTORS),
    fake=_fake_qkv,
    validate=_validate,
    saves=(1,),
)
_gate = Op(
    "linear_gate_residual",
    "(Tensor residual, Tensor y, Tensor weight, Tensor? bias, Tensor? gate, Tensor? row_index, str? gate_act, "
    "str precision, bool keep) -> (Tensor, Tensor)",
    differentiable=("residual", "y", "weight", "bias", "gate"),
    fake=lambda residual, y, *args: (residual.new_empty(residual.shape), _kept(y, residual.shape[-1], args[-1])),
    validate=lambda residual, y, weight, bias, gate, index, *_: modulation_check.validate_rows(
        "gate_residual", index, "row_index", gate
    ),
    saves=(1,),
)

_PLAIN = (Tensor, nn.Parameter)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _weights(what: str, layer) -> tuple[Any, Any, str | None]:
    """(weight, bias, None) of a layer that is nothing but them, else the reason why it has to be called."""
    if isinstance(layer, (tuple, list)):
        weight, bias = layer
    elif type(layer) is not nn.Linear:
        return None, None, f"{what} is a {type(layer).__name__}: it is called, never read"
    elif any(getattr(layer, hooks) for hooks in _HOOKS) or "forward" in vars(layer):
        return None, None, f"{what} has hooks or a forward of its own: it is called, never read"
    else:
        weight, bias = layer.weight, layer.bias
    if type(weight) not in _PLAIN or (bias is not None and type(bias) not in _PLAIN):
        return None, None, f"{what} has weights of a tensor subclass"
    return weight, bias, None


def _refusal(name: str, calls: Sequence[tuple[Op, tuple]], by_itself: bool) -> str | None:
    """Why backend `name` does not run these ops. The first op of a half speaks for both where speed is asked."""
    for op, args in calls:
        impl = registry.find(op.name, name)
        if impl is None:
            return registry.unavailable().get(name, f"has no {op.name}")
        reason = impl.supports(*args)
        if reason is None and by_itself:
            reason, by_itself = "never taken by itself" if impl.pays is None else impl.pays(*args), False
        if reason is not None:
            return reason
    return None


def _choose(half: str, calls: Sequence[tuple[Op, tuple]], fused: bool | None, backend: str | None) -> str | None:
    """The backend whose kernels run this half fused, or None: the composition does."""
    x = calls[0][1][0]
    requested = registry.requested(backend)
    names = (
        (requested,)
        if requested
        else tuple(name for name in registry.order(calls[0][0].name, x) if name != "reference")
    )
    reasons = []
    for name in names:
        reason = _refusal(name, calls, fused is None)
        if reason is None:
            _explained(half, f"chosen: {name}")
            return name
        reasons.append(f"{name}: {reason}")
    refuse(half, "; ".join(reasons) or f"no kernels for {x.device}", fused)
    return None


def refuse(half: str, reason: str, fused: bool | None) -> None:
    """Notes why a half is composed, which is an error where the caller asked for the fused form."""
    if fused:
        raise registry.NoBackend(f"{half}: fused=True cannot run: {reason}; pass fused=None for the best way")
    _explained(half, f"no: {reason}")


def _explained(half: str, verdict: str) -> None:
    if _explain.probe.calls is not None:
        _explain.probe.calls.append(f"{half}\n  {'fused':<11} {verdict}")


def _common(x: Tensor, act, post_norm) -> str | None:
    if type(x) not in _PLAIN:
        return f"x is a {type(x).__name__}"
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return "autocast casts at the projections"
    if post_norm is not None:
        return "post_norm needs whole rows of the projection"
    return "act is a function: it is called" if act is not None and not isinstance(act, str) else None


def _needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def attention_half(
    x: Tensor, qkv, proj, attend: Callable[[Tensor, Tensor, Tensor], Tensor], heads: int, kv_heads: int,
    shift, scale, gate, row_index, norm: tuple, qk_norm: tuple, vectors: tuple, rope: tuple, gate_act, post_norm,
    precision: str, fused: bool | None, backend: str | None,
) -> Tensor | None:  # fmt: skip
    """adaln_attention in three kernels; None where it has to be composed, or has an error that the parts will name.

    norm: (norm, eps, weight, bias, weight_offset); qk_norm: (norm, eps, scope); vectors: q_weight, k_weight, q_bias,
    k_bias, cos, sin; rope: (layout, start, length). attend: (q, k, v) -> o.
    """
    half = "adaln_attention"
    w_in, b_in, reason = _weights("qkv", qkv)
    w_out, b_out, reason_out = _weights("proj", proj)
    reason = reason or reason_out or _common(x, None, post_norm)
    kind, eps, weight, bias, offset = norm
    q_norm, q_eps, scope = qk_norm
    if reason is None and q_norm is not None and scope == "hidden":
        reason = "a norm over all heads needs whole rows of the projection"
    if reason is not None:
        refuse(half, reason, fused)
        return None
    total = heads + 2 * kv_heads
    if not _fits(x, w_in, b_in) or w_in.shape[0] == 0 or w_in.shape[0] % total:
        return None
    D = w_in.shape[0] // total
    if w_out.dim() != 2 or tuple(w_out.shape) != (x.shape[-1], heads * D) or not _bias_fits(w_out, b_out):
        return None
    keep = (q_norm is not None or _needs_grad(*vectors[4:])) and _needs_grad(
        x, shift, scale, weight, bias, w_in, b_in, *vectors
    )
    args = (
        x, shift, scale, weight, bias, row_index, w_in, b_in, *vectors, heads, kv_heads, kind, eps, offset,
        q_norm, q_eps, *rope, precision, keep,
    )  # fmt: skip
    rows = row_index if gate is not None else None
    rest = (w_out, b_out, gate, rows, gate_act, precision, _needs_grad(gate))
    name = _choose(half, ((_qkv, args), (_gate, (x, x, *rest))), fused, backend)
    if name is None:
        return None
    shift, scale, gate = _check_tables(x, shift, scale, gate, norm, gate_act, row_index, precision)
    _check_heads(x, heads, kv_heads, D, qk_norm, vectors, rope, precision)
    y, _ = _qkv(name, x, shift, scale, *args[3:])
    q, k, v = y.unflatten(-1, (total, D)).split([heads, kv_heads, kv_heads], dim=-2)
    out, _ = _gate(name, x, attend(q, k, v).flatten(-2), w_out, b_out, gate, *rest[3:])
    return out


def mlp_half(
    x: Tensor, fc1, fc2, act, shift, scale, gate, row_index, norm: tuple, gate_act, post_norm, precision: str,
    fused: bool | None, backend: str | None,
) -> Tensor | None:  # fmt: skip
    """adaln_mlp in two kernels; None as above."""
    half = "adaln_mlp"
    w_in, b_in, reason = _weights("fc1", fc1)
    w_out, b_out, reason_out = _weights("fc2", fc2)
    reason = reason or reason_out or _common(x, act, post_norm)
    if reason is not None:
        refuse(half, reason, fused)
        return None
    if not _fits(x, w_in, b_in) or w_out.dim() != 2 or tuple(w_out.shape) != (x.shape[-1], w_in.shape[0]):
        return None
    if not _bias_fits(w_out, b_out):
        return None
    kind, eps, weight, bias, offset = norm
    keep = _needs_grad(x, shift, scale, weight, bias, w_in, b_in)
    args = (x, shift, scale, weight, bias, row_index, w_in, b_in, kind, eps, offset, act, precision, keep)
    rows = row_index if gate is not None else None
    rest = (w_out, b_out, gate, rows, gate_act, precision, _needs_grad(gate))
    name = _choose(half, ((_linear, args), (_gate, (x, x, *rest))), fused, backend)
    if name is None:
        return None
    shift, scale, gate = _check_tables(x, shift, scale, gate, norm, gate_act, row_index, precision)
    y, _ = _linear(name, x, shift, scale, *args[3:])
    out, _ = _gate(name, x, y, w_out, b_out, gate, *rest[3:])
    return out


def _fits(x, weight: Tensor, bias: Tensor | None) -> bool:
    if x.dim() not in (2, 3) or weight.dim() != 2 or weight.shape[1] != x.shape[-1] or weight.shape[0] == 0:
        return False
    return _bias_fits(weight, bias)


def _bias_fits(weight: Tensor, bias: Tensor | None) -> bool:
    return bias is None or tuple(bias.shape) == (weight.shape[0],)


def _check_tables(x, shift, scale, gate, norm, gate_act, row_index, precision):
    """What norm_modulate and gate_residual check, under their names."""
    kind, eps, weight, bias, _ = norm
    modulation_check.tokens("norm_modulate", "x", x)
    _check.choice("norm_modulate", "precision", precision, _check.PRECISIONS)
    shift, scale = modulation_check.norm_arguments(
        "norm_modulate", x, shift, scale, weight, bias, row_index, kind, eps, precision
    )
    gate = modulation_check.gate_arguments(
        "gate_residual", x, x, gate, gate_act, None, None, 0.0, row_index if gate is not None else None, precision
    )
    return shift, scale, gate


def _check_heads(x, heads, kv_heads, D, qk_norm, vectors, rope, precision) -> None:
    """What qk_norm_rope checks, on q and k that own no memory."""
    kind, eps, scope = qk_norm
    cos, sin = vectors[4:]
    if kind is None and cos is None:
        return
    one = x.new_empty(D)
    q, k = (one.expand(*x.shape[:-1], h, D) for h in (heads, kv_heads))
    layout, start, length = rope
    rotary_check.options(kind, scope, eps, layout, precision)
    for name, t, like in zip(_VECTORS, vectors[:4], (q, k, q, k), strict=False):
        if t is not None:
            rotary_check.affine(name, t, like, kind, scope, precision)
    rotary._check_tables(q, k, cos, sin, None, None, None, None, layout, start, length, precision)
