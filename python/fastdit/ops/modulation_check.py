"""What the modulation family checks before anything is written."""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check

_NORMS = ("layer", "rms")
_GATE_ACTS = (None, "tanh")
_POST_NORMS = (None, "rms")


def _table(op: str, what: str, t: Tensor, x: Tensor, row_index: Tensor | None, precision: str) -> Tensor:
    """Checks one modulation table against x (B, N, C) or (N, C); a single row is expanded over the batch."""
    if row_index is None and t.dtype == x.dtype and x.dim() == 3 and t.shape == (x.shape[0], x.shape[2]):
        if t.stride(1) == 1 and t.device == x.device:
            return t  # the everyday case, in half the time
    _check.floating(op, what, t)
    if t.shape[-1] != x.shape[-1]:
        hint = " Did you forget .chunk(6, dim=-1)?" if t.shape[-1] == 6 * x.shape[-1] else ""
        raise ValueError(
            f"{op}: {what} must end in C = {x.shape[-1]}; got {list(t.shape)}, "
            f"expected [..., {x.shape[-1]}] to match x {list(x.shape)}; slice it.{hint}"
        )
    if row_index is not None:
        if t.dim() != 2:
            raise ValueError(
                f"{op}: {what} must be a table (R, C) when row_index is given; got {list(t.shape)}, "
                f"expected [R, {x.shape[-1]}]; flatten it to rows."
            )
    elif x.dim() == 2:
        if t.dim() != 2 or t.shape[0] != 1:
            raise ValueError(
                f"{op}: {what} of packed x (N, C) must be (1, C) without row_index; got {list(t.shape)}, "
                f"expected [1, {x.shape[-1]}]; pass row_index to give segments rows of their own."
            )
    else:
        if t.dim() not in (2, 3) or (t.shape[0] != 1 and t.shape[0] != x.shape[0]):
            raise ValueError(
                f"{op}: {what} must be (B, C) or (B, M, C) with B = {x.shape[0]}; got {list(t.shape)}, "
                f"expected [{x.shape[0]}, {x.shape[-1]}]; or pass row_index with a table (R, C)."
            )
        if t.dim() == 3 and (t.shape[1] == 0 or x.shape[1] % t.shape[1] != 0):
            raise ValueError(
                f"{op}: M rows of {what} must divide the N tokens; got M = {t.shape[1]}, N = {x.shape[1]}, "
                "expected N % M == 0; pad the tokens or pass row_index."
            )
        if t.shape[0] == 1 and x.shape[0] != 1:
            t = t.expand(x.shape[0], *t.shape[1:])
    _check.channels_contiguous(op, what, t)
    _check.same_device(op, what, t, x)
    if precision == "native":
        _check.native_dtype(op, what, t, x)
    return t


def _vector(op: str, what: str, t: Tensor, x: Tensor, precision: str) -> None:
    _check.floating(op, what, t)
    if t.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: {what} must be (C,); got {list(t.shape)}, expected [{x.shape[-1]}] to match x {list(x.shape)}; "
            "pass the norm's own parameter."
        )
    _check.channels_contiguous(op, what, t)
    _check.same_device(op, what, t, x)
    if precision == "native":
        _check.native_dtype(op, what, t, x)


def _rows(op: str, what: str, index: Tensor, x: Tensor) -> None:
    if index.dtype not in _check.INDEX:
        raise TypeError(
            f"{op}: {what} must be an index; got {_check.name(index.dtype)}, expected int32 or int64; cast it."
        )
    if index.shape != x.shape[:-1]:
        raise ValueError(
            f"{op}: {what} must have one entry per token; got {list(index.shape)}, "
            f"expected {list(x.shape[:-1])}; it names the table row of each token."
        )
    _check.same_device(op, what, index, x)


def tokens(op: str, what: str, x: Tensor) -> None:
    if isinstance(x, Tensor) and x.dtype in _check.FLOATS:
        shape = x.shape
        if len(shape) in (2, 3) and shape[-1] > 0 and x.stride(-1) == 1:
            return
    _check.floating(op, what, x)
    _check.rank(op, what, x, (2, 3), "(B, N, C) or packed (N, C)")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: {what} has no channels; got {list(x.shape)}, expected C >= 1; check the model width.")
    _check.channels_contiguous(op, what, x)


def validate_rows(op: str, index: Tensor | None, what: str, *tables: Tensor | None) -> None:
    if index is not None:
        for table in tables:
            if table is not None:
                _check.index_range(op, what, index, table.shape[0])


def norm_arguments(op: str, x, shift, scale, weight, bias, row_index, norm, eps, precision):
    if norm not in _NORMS:
        _check.choice(op, "norm", norm, _NORMS)
    if not 0.0 <= eps < _check.INF:
        _check.epsilon(op, "eps", eps)
    if row_index is not None:
        _rows(op, "row_index", row_index, x)
    if shift is not None:
        shift = _table(op, "shift", shift, x, row_index, precision)
    if scale is not None:
        scale = _table(op, "scale", scale, x, row_index, precision)
    if weight is not None:
        _vector(op, "weight", weight, x, precision)
    if bias is not None:
        _vector(op, "bias", bias, x, precision)
    return shift, scale


def gate_arguments(op: str, residual, y, gate, gate_act, post_norm, weight, eps, row_index, precision):
    tokens(op, "y", y)
    tokens(op, "residual", residual)
    if residual.shape != y.shape:
        raise ValueError(
            f"{op}: residual and y differ in shape; got {list(residual.shape)} and {list(y.shape)}, "
            "expected the same; they are the two sides of one addition."
        )
    _check.same_device(op, "residual", residual, y)
    if precision == "native":
        _check.native_dtype(op, "residual", residual, y)
    elif residual.dtype not in (y.dtype, torch.float32):
        raise TypeError(
            f"{op}: residual must have y's dtype or be float32; got {_check.name(residual.dtype)} "
            f"beside {_check.name(y.dtype)}, expected {_check.name(y.dtype)} or float32; cast it."
        )
    _check.choice(op, "gate_act", gate_act, _GATE_ACTS)
    _check.choice(op, "post_norm", post_norm, _POST_NORMS)
    if gate_act is not None and gate is None:
        raise ValueError(f"{op}: gate_act has nothing to act on; got gate=None, expected a table; drop gate_act.")
    if post_norm is not None:
        _check.epsilon(op, "post_norm_eps", eps)
    if weight is not None:
        if post_norm is None:
            raise ValueError(
                f"{op}: post_norm_weight without post_norm; got post_norm=None, expected 'rms'; set it or drop it."
            )
        _vector(op, "post_norm_weight", weight, y, precision)
    return gate if gate is None else _table(op, "gate", gate, y, row_index, precision)


def norm_modulate(x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision) -> tuple:
    op = "norm_modulate"
    tokens(op, "x", x)
    _check.choice(op, "precision", precision, _check.PRECISIONS)
    shift, scale = norm_arguments(op, x, shift, scale, weight, bias, row_index, norm, eps, precision)
    return x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision


def gate_residual(residual, y, gate, weight, row_index, gate_act, post_norm, eps, precision) -> tuple:
    op = "gate_residual"
    _check.choice(op, "precision", precision, _check.PRECISIONS)
    if row_index is not None:
        _rows(op, "row_index", row_index, y)
    gate = gate_arguments(op, residual, y, gate, gate_act, post_norm, weight, eps, row_index, precision)
    return residual, y, gate, weight, row_index, gate_act, post_norm, eps, precision


def seam(
    residual, y, gate, shift, scale, weight, bias, post_weight, gate_row_index, row_index,
    norm, eps, weight_offset, gate_act, post_norm, post_eps, precision,
) -> tuple:  # fmt: skip
    op = "gate_residual_norm_modulate"
    _check.choice(op, "precision", precision, _check.PRECISIONS)
    if gate_row_index is None:
        gate_row_index = row_index if gate is not None else None
    elif gate is None:
        raise ValueError(f"{op}: gate_row_index has no table; got gate=None, expected (R, C); drop the index.")
    else:
        _rows(op, "gate_row_index", gate_row_index, y)
    gate = gate_arguments(op, residual, y, gate, gate_act, post_norm, post_weight, post_eps, gate_row_index, precision)
    shift, scale = norm_arguments(op, y, shift, scale, weight, bias, row_index, norm, eps, precision)
    return (
        residual, y, gate, shift, scale, weight, bias, post_weight, gate_row_index, row_index,
        norm, eps, weight_offset, gate_act, post_norm, post_eps, precision,
    )  # fmt: skip


def validate_norm_modulate(x, shift, scale, weight, bias, row_index, *_) -> None:
    validate_rows("norm_modulate", row_index, "row_index", shift, scale)


def validate_gate_residual(residual, y, gate, weight, row_index, *_) -> None:
    validate_rows("gate_residual", row_index, "row_index", gate)


def validate_seam(r, y, gate, shift, scale, w, b, pw, gate_row_index, row_index, *_) -> None:
    op = "gate_residual_norm_modulate"
    validate_rows(op, row_index, "row_index", shift, scale)
    validate_rows(op, gate_row_index, "gate_row_index", gate)
