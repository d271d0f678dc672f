"""adaLN modulation and gated residuals: the formulas of every DiT, under both precision laws.

"fp32": all math in promote(x.dtype, fp32), one rounding at the end (Wan, Kandinsky).
"native": rounded to x.dtype after each elementary operation, exactly as eager code does (DiT, Flux, HunyuanVideo, ...).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rows(table: Tensor, x: Tensor, row_index: Tensor | None) -> Tensor:
    """The row of a modulation table that each token of x uses, broadcastable to x.

    table (R, C) with row_index of x's row shape; (B, M, C), one row per N / M tokens; (B, C); packed x: (1, C).
    """
    if row_index is not None:
        return table[row_index]
    if table.dim() == 3:
        B, M, C = table.shape
        if M == 1:
            return table
        return table.unsqueeze(2).expand(B, M, x.shape[1] // M, C).reshape(B, x.shape[1], C)
    return table if x.dim() == 2 else table.unsqueeze(1)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, norm: str, eps: float, weight_offset: float = 0.0
) -> Tensor:
    """LayerNorm or RMSNorm over the last dim in the dtype of x, statistics in at least fp32.

    layer: one rounding, as F.layer_norm. rms: rounded before the affine part, as diffusers' RMSNorm.
    """
    if weight is not None and weight_offset != 0.0:
        weight = weight + weight_offset
    if norm == "layer":
        if bias is not None and weight is None:
            weight = torch.ones_like(bias)
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = (x * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)
    if weight is not None:
        n = n * weight
    return n if bias is None else n + bias


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
) -> Tensor:
    """n(x) * (1 + scale) + shift, n = LayerNorm | RMSNorm with affine (weight_offset + weight, bias)."""
    math = _math_dtype(x, precision)
    y = normalise(x.to(math), _to(weight, math), _to(bias, math), norm=norm, eps=eps, weight_offset=weight_offset)
    if scale is not None:
        y = y * (1 + rows(scale.to(math), x, row_index))
    if shift is not None:
        y = y + rows(shift.to(math), x, row_index)
    return y.to(x.dtype)


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
) -> Tensor:
    """residual + act(gate) * [rms](y), in residual's dtype."""
    math = _math_dtype(y, precision, residual)
    branch = y.to(math)
    if post_norm is not None:
        branch = normalise(branch, _to(post_norm_weight, math), None, norm=post_norm, eps=post_norm_eps)
    if gate is not None:
        g = rows(gate.to(math), y, row_index)
        branch = (torch.tanh(g) if gate_act == "tanh" else g) * branch
    return (residual.to(math) + branch).to(residual.dtype)


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
) -> tuple[Tensor, Tensor]:
    """(r, h): r = gate_residual(residual, y, gate), h = norm_modulate(r as stored) in y's dtype."""
    r = gate_residual(
        residual,
        y,
        gate,
        gate_act=gate_act,
        post_norm=post_norm,
        post_norm_weight=post_norm_weight,
        post_norm_eps=post_norm_eps,
        row_index=row_index if gate_row_index is None else gate_row_index,
        precision=precision,
    )
    math = _math_dtype(y, precision, residual)
    h = norm_modulate(
        r.to(math),
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
    return r, h.to(y.dtype)


def _math_dtype(x: Tensor, precision: str, other: Tensor | None = None) -> torch.dtype:
    dtype = x.dtype if other is None else torch.promote_types(x.dtype, other.dtype)
    return dtype if precision == "native" else torch.promote_types(dtype, torch.float32)


def _to(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if t is None else t.to(dtype)
