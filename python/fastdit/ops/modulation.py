"""adaLN modulation: norm + shift/scale, gated residual, and the seam of every DiT block that does both.

Tables (shift, scale, gate) are (B, C); (B, M, C) with N % M == 0, one row per N / M consecutive tokens (per sample,
frame or token); or (R, C) with `row_index` of x's row shape. Packed x (N, C) takes (1, C), or (R, C) with row_index.
Tables may be strided views (`temb.chunk(6, dim=-1)`) as long as the channel dim is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check
from ._op import Op

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


def _tokens(op: str, what: str, x: Tensor) -> None:
    if isinstance(x, Tensor) and x.dtype in _check.FLOATS:
        shape = x.shape
        if len(shape) in (2, 3) and shape[-1] > 0 and x.stride(-1) == 1:
            return
    _check.floating(op, what, x)
    _check.rank(op, what, x, (2, 3), "(B, N, C) or packed (N, C)")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: {what} has no channels; got {list(x.shape)}, expected C >= 1; check the model width.")
    _check.channels_contiguous(op, what, x)


def _validate_rows(op: str, index: Tensor | None, what: str, *tables: Tensor | None) -> None:
    if index is not None:
        for table in tables:
            if table is not None:
                _check.index_range(op, what, index, table.shape[0])


def _check_norm(op: str, x, shift, scale, weight, bias, row_index, norm, eps, precision):
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


def _check_gate(op: str, residual, y, gate, gate_act, post_norm, weight, eps, row_index, precision):
    _tokens(op, "y", y)
    _tokens(op, "residual", residual)
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


_norm_modulate = Op(
    "norm_modulate",
    "(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? row_index, "
    "str norm, float eps, float weight_offset, str precision) -> Tensor",
    differentiable=("x", "shift", "scale", "weight", "bias"),
    fake=lambda x, *_: x.new_empty(x.shape),
    validate=lambda x, shift, scale, w, b, index, *_: _validate_rows("norm_modulate", index, "row_index", shift, scale),
)
_gate_residual = Op(
    "gate_residual",
    "(Tensor residual, Tensor y, Tensor? gate, Tensor? post_norm_weight, Tensor? row_index, "
    "str? gate_act, str? post_norm, float post_norm_eps, str precision) -> Tensor",
    differentiable=("residual", "y", "gate", "post_norm_weight"),
    fake=lambda residual, *_: residual.new_empty(residual.shape),
    validate=lambda r, y, gate, w, index, *_: _validate_rows("gate_residual", index, "row_index", gate),
)


def _validate_seam(r, y, gate, shift, scale, w, b, pw, gate_row_index, row_index, *_) -> None:
    op = "gate_residual_norm_modulate"
    _validate_rows(op, row_index, "row_index", shift, scale)
    _validate_rows(op, gate_row_index, "gate_row_index", gate)


_gate_residual_norm_modulate = Op(
    "gate_residual_norm_modulate",
    "(Tensor residual, Tensor y, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
    "Tensor? post_norm_weight, Tensor? gate_row_index, Tensor? row_index, str norm, float eps, float weight_offset, "
    "str? gate_act, str? post_norm, float post_norm_eps, str precision) -> (Tensor, Tensor)",
    differentiable=("residual", "y", "gate", "shift", "scale", "weight", "bias", "post_norm_weight"),
    fake=lambda residual, y, *_: (residual.new_empty(residual.shape), y.new_empty(y.shape)),
    validate=_validate_seam,
)


def norm_modulate(
    x: Tensor,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    norm: str = "layer",
    eps: float = 1e-6,
    row_index: Tensor | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Normalise each token, then modulate it by its row of shift and scale.

        y = n(x) * (1 + scale) + shift,   n(x) = (x - mean) * rsqrt(var + eps) * (weight_offset + weight) + bias

    Args:
        x (Tensor[B, N, C] or packed [N, C]; f32, bf16, f16, f64): tokens; channel dim contiguous.
        shift, scale (Tensor[B, C], [B, M, C], or [R, C] with row_index): see the module; None leaves the term out.
        weight, bias (Tensor[C]): affine part of the norm; weight_offset (float): 1.0 for zero-centred weights (Krea).
        norm (str): "layer" (biased variance) or "rms" (no mean, no variance shift). eps (float): added to the variance.
        row_index (Tensor[B, N] or [N]; int32, int64): row of the (R, C) tables for each token.
        precision (str): "fp32" rounds once at the end (Wan's law); "native" rounds to x.dtype after each operation, as
            eager code does (DiT, Flux, HunyuanVideo), and then needs one dtype.
        backend (str, optional): "cuda", "triton", "cpu", "reference". Default: best available.
    Returns:
        Tensor like x, contiguous, dtype of x. Gradients for x, shift, scale, weight and bias.
    Raises:
        ValueError: shapes, strides, devices, indices, eps.   TypeError: dtypes.   NoBackend: nothing can run it.
    Cost:   2*N*C*itemsize bytes and about 8*N*C FLOPs a sample, backward 3*N*C*itemsize; memory-bound.
    Source: arXiv 2212.09748; facebookresearch/DiT models.py `modulate`; diffusers AdaLayerNormZero, Wan, LTX, Mochi.
    """
    _tokens("norm_modulate", "x", x)
    if precision not in _check.PRECISIONS:
        _check.choice("norm_modulate", "precision", precision, _check.PRECISIONS)
    shift, scale = _check_norm("norm_modulate", x, shift, scale, weight, bias, row_index, norm, eps, precision)
    return _norm_modulate(backend, x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision)


def gate_residual(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    gate_act: str | None = None,
    post_norm: str | None = None,
    post_norm_weight: Tensor | None = None,
    post_norm_eps: float = 1e-6,
    row_index: Tensor | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> Tensor:
    """Add a branch to the residual stream through its gate.

        r = residual + act(gate) * [rms](y)

    Args:
        residual, y (Tensor[B, N, C] or [N, C]): residual has y's dtype or is float32 (a wide residual stream).
        gate (Tensor[B, C], [B, M, C], or [R, C] with row_index): None is a plain residual add.
        gate_act (str, optional): "tanh" (Mochi, Z-Image). post_norm (str, optional): "rms" of y, with
            post_norm_weight (Tensor[C]) and post_norm_eps.
        row_index, precision, backend: as in `norm_modulate`.
    Returns:
        Tensor like residual, contiguous. Gradients for residual, y, gate and post_norm_weight.
    Raises:
        ValueError, TypeError, NoBackend: as in `norm_modulate`.
    Cost:   3*N*C*itemsize bytes a sample, backward 4; memory-bound.
    Source: DiT models.py `x + gate * attn(...)`; diffusers MochiModulatedRMSNorm and its tanh gate.
    """
    op = "gate_residual"
    _check.choice(op, "precision", precision, _check.PRECISIONS)
    if row_index is not None:
        _rows(op, "row_index", row_index, y)
    gate = _check_gate(
        op, residual, y, gate, gate_act, post_norm, post_norm_weight, post_norm_eps, row_index, precision
    )
    return _gate_residual(
        backend, residual, y, gate, post_norm_weight, row_index, gate_act, post_norm, post_norm_eps, precision
    )


def gate_residual_norm_modulate(
    residual: Tensor,
    y: Tensor,
    gate: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    norm: str = "layer",
    eps: float = 1e-6,
    gate_act: str | None = None,
    post_norm: str | None = None,
    post_norm_weight: Tensor | None = None,
    post_norm_eps: float = 1e-6,
    gate_row_index: Tensor | None = None,
    row_index: Tensor | None = None,
    precision: str = "fp32",
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The seam between two sublayers: close one with its gate, open the next with its norm, in one pass.

        r = residual + act(gate) * [rms](y)
        h = n(r) * (1 + scale) + shift           of r as stored, rounded to its dtype, as the models do

    Args:
        All of `gate_residual`'s and `norm_modulate`'s. gate_row_index: rows of the gate where they differ from
        row_index, which serves both when gate_row_index is None.
    Returns:
        (r, h): r like residual, h with y's dtype, both contiguous.
    Raises:
        ValueError, TypeError, NoBackend: as in `norm_modulate`.
    Cost:   4*N*C*itemsize bytes a sample, against 5 for the two ops, backward 6; memory-bound.
    Source: DiT block, diffusers BasicTransformerBlock (ada_norm_zero), Wan block.
    """
    op = "gate_residual_norm_modulate"
    _check.choice(op, "precision", precision, _check.PRECISIONS)
    if gate_row_index is None:
        gate_row_index = row_index if gate is not None else None
    elif gate is None:
        raise ValueError(f"{op}: gate_row_index has no table; got gate=None, expected (R, C); drop the index.")
    else:
        _rows(op, "gate_row_index", gate_row_index, y)
    gate = _check_gate(
        op, residual, y, gate, gate_act, post_norm, post_norm_weight, post_norm_eps, gate_row_index, precision
    )
    shift, scale = _check_norm(op, y, shift, scale, weight, bias, row_index, norm, eps, precision)
    return _gate_residual_norm_modulate(
        backend, residual, y, gate, shift, scale, weight, bias, post_norm_weight, gate_row_index, row_index,
        norm, eps, weight_offset, gate_act, post_norm, post_norm_eps, precision,
    )  # fmt: skip
