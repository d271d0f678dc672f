"""The GEMMs of an adaLN block with what stands around them, as compositions of the other formulas.

`kept` is the rounded result before its epilogue, which a backward reads again; empty unless asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .activation import activation
from .modulation import gate_residual, norm_modulate
from .rotary import qk_norm_rope


def norm_modulate_linear(
    x: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    weight_offset: float = 0.0,
    norm: str = "layer",
    eps: float = 1e-6,
    row_index: Tensor | None = None,
    act: str | None = None,
    precision: str = "fp32",
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """y = act(norm_modulate(x) @ weight^T + bias); kept = y before act."""
    h = norm_modulate(
        x, shift=shift, scale=scale, weight=norm_weight, bias=norm_bias, weight_offset=weight_offset, norm=norm,
        eps=eps, row_index=row_index, precision=precision,
    )  # fmt: skip
    y = F.linear(h, weight, bias)
    return y if act is None else activation(y, act), y.clone() if keep else x.new_empty(0)


def norm_modulate_qkv(
    x: Tensor,
    *,
    weight: Tensor,
    num_heads: int,
    num_kv_heads: int,
    qk_norm: str | None = None,
    qk_eps: float = 1e-6,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    layout: str = "interleaved",
    rope_start: int = 0,
    rope_len: int | None = None,
    precision: str = "fp32",
    keep: bool = False,
    **modulation,
) -> tuple[Tensor, Tensor]:
    """(q, k, v) side by side, q and k normalised and rotated; kept = q, k before that. modulation: as above."""
    y, _ = norm_modulate_linear(x, weight=weight, precision=precision, **modulation)
    heads = y.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    q, k, v = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=-2)
    kept = torch.cat([q, k], dim=-2).flatten(-2) if keep else x.new_empty(0)
    q, k = qk_norm_rope(
        q, k, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias, norm=qk_norm, eps=qk_eps,
        cos=cos, sin=sin, layout=layout, rope_start=rope_start, rope_len=rope_len, precision=precision,
    )  # fmt: skip
    return torch.cat([q, k, v], dim=-2).flatten(-2), kept


def linear_gate_residual(
    residual: Tensor,
    y: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    row_index: Tensor | None = None,
    gate_act: str | None = None,
    precision: str = "fp32",
    keep: bool = False,
) -> tuple[Tensor, Tensor]:
    """residual + act(gate) * (y @ weight^T + bias); kept = the branch before its gate."""
    branch = F.linear(y, weight, bias)
    out = gate_residual(residual, branch, gate, gate_act=gate_act, row_index=row_index, precision=precision)
    return out, branch if keep else y.new_empty(0)
