"""Rotary tables, and the norm and rotation of queries and keys in one pass over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..reference import rotary as _formula
from . import rotary_check as _rotary_check, rotary_inplace as _inplace
from ._op import Op

_ARGUMENTS = (
    "Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, "
    "Tensor? cos, Tensor? sin, Tensor? k_cos, Tensor? k_sin, "
    "Tensor? cos_t, Tensor? sin_t, Tensor? cos_h, Tensor? sin_h, Tensor? cos_w, Tensor? sin_w, Tensor? grids, "
    "str? norm, str scope, float eps, str layout, SymInt rope_start, SymInt? rope_len, str precision"
)


def _validate(q, k, *args) -> None:
    tables, grids, rope_start, rope_len = args[8:14], args[14], args[19], args[20]
    if grids is not None:
        length = q.shape[-3] - rope_start if rope_len is None else rope_len
        sizes = [t.shape[0] for t in tables[::2] if t is not None]
        _rotary_check.validate_grids(grids, sizes, length, packed=q.dim() == 3)


def _check_tables(q, k, cos, sin, k_cos, k_sin, axes, grids, layout, rope_start, rope_len, precision) -> None:
    check, op = _rotary_check, _rotary_check.OP
    q_len = check.rope_slice(q, "q", rope_start, rope_len)
    k_len = check.rope_slice(k, "k", rope_start, rope_len)
    pairs = []
    if cos is not None or sin is not None:
        check.tables(("cos", "sin"), cos, sin, q, precision)
        check.broadcasts("cos", cos, q, "q", q_len)
        pairs.append(cos.shape[-1])
    if k_cos is not None or k_sin is not None:
        check.tables(("k_cos", "k_sin"), k_cos, k_sin, k, precision)
        check.broadcasts("k_cos", k_cos, k, "k", k_len)
        pairs.append(k_cos.shape[-1])
    elif cos is not None and k.shape != q.shape:
        check.broadcasts("cos", cos, k, "k", k_len)
    if axes is not None:
        if cos is not None:
            raise ValueError(f"{op}: two tables for q; got cos and axes, expected one of them; drop the other.")
        check.axis_tables(axes, grids, q, k, precision)
        if k_cos is None and k_len != q_len:
            raise ValueError(
                f"{op}: axes serve q and k of one length; got {q_len} and {k_len} rotated tokens, expected the same; "
                "pass k_cos and k_sin."
            )
        pairs.append(sum(t.shape[1] for t in axes[::2]))
    elif grids is not None:
        raise ValueError(f"{op}: grids without axes; got axes=None, expected the per-axis tables; pass them.")
    elif layout != "axis_half" and len(pairs) < 2:
        return
    if len(pairs) == 2 and pairs[0] != pairs[1]:
        raise ValueError(
            f"{op}: q and k rotate different numbers of channels; got R = {2 * pairs[0]} and {2 * pairs[1]}, "
            "expected one; call it once for each."
        )
    if pairs and layout == "axis_half":
        check.axis_half(0 if axes is None else len(axes), 2 * pairs[0])


def _check(
    q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, k_cos, k_sin, cos_t, sin_t, cos_h, sin_h, cos_w, sin_w, grids,
    norm, scope, eps, layout, rope_start, rope_len, precision,
) -> tuple:  # fmt: skip
    _rotary_check.queries_and_keys(q, k)
    _rotary_check.options(norm, scope, eps, layout, precision)
    if q_weight is not None:
        _rotary_check.affine("q_weight", q_weight, q, norm, scope, precision)
    if k_weight is not None:
        _rotary_check.affine("k_weight", k_weight, k, norm, scope, precision)
    if q_bias is not None:
        _rotary_check.affine("q_bias", q_bias, q, norm, scope, precision)
    if k_bias is not None:
        _rotary_check.affine("k_bias", k_bias, k, norm, scope, precision)
    compact = (cos_t, sin_t, cos_h, sin_h, cos_w, sin_w)
    axes = None if cos_t is None else compact[: 2 if cos_h is None else 4 if cos_w is None else 6]
    _check_tables(q, k, cos, sin, k_cos, k_sin, axes, grids, layout, rope_start, rope_len, precision)
    scope = "head" if norm is None else scope  # without a norm heads share nothing
    return (
        q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, k_cos, k_sin, *compact, grids,
        norm, scope, eps, layout, rope_start, rope_len, precision,
    )  # fmt: skip


_qk_norm_rope = Op(
    "qk_norm_rope",
    f"(Tensor q, Tensor k, {_ARGUMENTS}) -> (Tensor, Tensor)",
    differentiable=(
        *("q", "k", "q_weight", "k_weight", "q_bias", "k_bias", "cos", "sin", "k_cos", "k_sin"),
        *("cos_t", "sin_t", "cos_h", "sin_h", "cos_w", "sin_w"),
    ),
    fake=lambda q, k, *_: (q.new_empty(q.shape), k.new_empty(k.shape)),
    check=_check,
    validate=_validate,
)
_NO_AXES: tuple[Tensor | None, ...] = (None,) * 6
_inplace.define(_ARGUMENTS, _validate)


def rope_table(
    grid: Sequence[int] | Sequence[Sequence[int]],
    axes_dim: Sequence[int],
    *,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of every token of a grid.

        angle[n] = concat over axes a of  position_a(n) * theta ** (-2 i / axes_dim[a]),  i = 0 .. axes_dim[a] / 2 - 1

    Args:
        grid (ints, or a list of such): (T, H, W) in patches, the last axis fastest; any number of axes. A list gives
            the tables of a pack, one grid after another. A single axis, (T,) with (44,), gives a pair for `axes=`.
        axes_dim (ints): channels that each axis rotates, even; R is their sum. Wan (44, 42, 42), HunyuanVideo and Flux
            (16, 56, 56), CogVideoX (16, 24, 24), Allegro (32, 32, 32).
        theta (float): 10000.0; HunyuanVideo 256.0, Flux2 2000.0.
        device: of the result.
    Returns:
        cos, sin (Tensor[N, R/2], float32): angles and functions computed in float64, rounded once.
    Raises:
        ValueError: sizes, odd or empty axes_dim, theta.
    Cost:   4*N*R bytes written, once per shape: keep the tables.
    Source: diffusers WanRotaryPosEmbed (bitwise), HunyuanVideoRotaryPosEmbed, get_3d_rotary_pos_embed.
    """
    _rotary_check.table_arguments(grid, axes_dim, theta)
    return _formula.rope_table(grid, axes_dim, theta=theta, device=device)


def qk_norm_rope(
    q: Tensor,
    k: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    norm: str | None = None,
    scope: str = "head",
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    k_cos: Tensor | None = None,
    k_sin: Tensor | None = None,
    axes: Sequence[Tensor] | None = None,
    grids: Tensor | None = None,
    layout: str = "interleaved",
    rope_start: int = 0,
    rope_len: int | None = None,
    precision: str = "fp32",
    inplace: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Normalise queries and keys, then rotate pairs of their channels by the angles of their token.

        y = n(x),  n = RMSNorm | LayerNorm over D (scope "head") or over H * D (scope "hidden"), affine if given
        (y1, y2) -> (y1 cos - y2 sin, y2 cos + y1 sin)   for each pair of the first R <= D channels of each head

    Args:
        q, k (Tensor[B, N, H, D] or packed [N, H, D]; f32, bf16, f16, f64): may differ in N and H; views of a fused
            projection are read in place as long as the last dim is contiguous.
        q_weight, k_weight, q_bias, k_bias (Tensor[D], or [H * D] for scope "hidden"): affine part of the norm.
        norm (str, optional): "rms" or "layer". scope (str): "hidden" is the all-heads norm of Wan and LTX.
        eps (float): added to the variance.
        cos, sin (Tensor[N, R/2], [N, H, R/2] or [B, N, H, R/2], any size 1, any strides; float32): one value per pair;
            row 0 belongs to token rope_start. They serve k too, unless k_cos and k_sin are given. Per-head tables are
            LTX's and Mochi's. None leaves the rotation out.
        axes (cos_t, sin_t[, cos_h, sin_h[, cos_w, sin_w]], each Tensor[size, dim/2]): compact tables instead of cos and
            sin; a token at (t, h, w) uses row t of the first pair, h of the second, w of the third, side by side.
        grids (Tensor[S, axes]; int32): with axes, the grid of each packed segment, one after another; or of each
            sample, or one row for all, of q (B, N, H, D). They cover the rotated tokens exactly.
        layout (str): the pairs. "interleaved" (2i, 2i + 1): Wan, Flux, HunyuanVideo, CogVideoX. "half" (i, i + R/2):
            Cosmos, LTX-2 split. "axis_half": half inside the section of each axis, whose sizes come from axes, or are
            thirds of R with cos and sin: Allegro.
        rope_start, rope_len (int): only tokens rope_start .. rope_start + rope_len - 1 rotate, all by default; the
            others are normalised only (CogVideoX and HunyuanVideo leave the text as it is).
        precision (str): "fp32" rounds once at the end; "native" rounds as eager modules do: after the norm (rms: before
            its weight too) and after the rotation, whose products round as well if the tables have x's dtype.
        inplace (bool): writes into q and k, which must not overlap, and returns them; not under grad.
        backend (str, optional): "cuda", "triton", "cpu", "reference". Default: best available.
    Returns:
        q, k: contiguous, dtype of the inputs. Gradients for q, k, the affine parameters and all tables.
    Raises:
        ValueError: shapes, strides, devices, slice, grids, eps, overlap.   TypeError: dtypes.   NoBackend.
    Cost:   2*N*(Hq + Hk)*D*itemsize + 4*N*R bytes a sample, backward 3 for 2; about 8 FLOPs an element; memory-bound.
            Gradients of tables come in a pass of their own, in float64: few models learn them.
    Source: arXiv 2104.09864; diffusers apply_rotary_emb, WanAttnProcessor, CogVideoXAttnProcessor2_0, LTX, Mochi.
    """
    compact = _NO_AXES if axes is None else _rotary_check.six_axes(axes, grids)
    if inplace:
        given: tuple[Any, ...] = (
            q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, k_cos, k_sin, *compact, grids,
            norm, scope, eps, layout, rope_start, rope_len, precision,
        )  # fmt: skip
        _inplace.call(backend, _validate, *_check(*given))
        return q, k
    return _qk_norm_rope(
        backend, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, k_cos, k_sin, *compact, grids,
        norm, scope, eps, layout, rope_start, rope_len, precision,
    )  # fmt: skip
