"""What qk_norm_rope and rope_table check before anything is written."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference.rotary import grid_list
from . import _check

OP = "qk_norm_rope"
_NORMS = (None, "rms", "layer")
_SCOPES = ("head", "hidden")
_LAYOUTS = ("interleaved", "half", "axis_half")


def _beside(t: Tensor, x: Tensor) -> bool:
    return (t.is_cpu and x.is_cpu) or t.device == x.device  # two flags cost a fifth of one comparison


# Each check opens with the everyday case: telling that all is well takes a third of finding out what is not.
def queries_and_keys(q: Tensor, k: Tensor) -> None:
    if isinstance(q, Tensor) and isinstance(k, Tensor) and q.dtype == k.dtype and q.dtype in _check.FLOATS:
        shape, other = q.shape, k.shape
        same = shape == other or (len(shape) == len(other) and shape[-1] == other[-1] and shape[:-3] == other[:-3])
        if same and 3 <= len(shape) <= 4 and shape[-1] and q.stride(-1) == k.stride(-1) == 1 and _beside(k, q):
            return
    for what, x in (("q", q), ("k", k)):
        _check.floating(OP, what, x)
        _check.rank(OP, what, x, (3, 4), "(B, N, H, D) or packed (N, H, D)")
        if x.shape[-1] == 0:
            raise ValueError(
                f"{OP}: {what} has no channels; got {list(x.shape)}, expected D >= 1; check the head size."
            )
        _check.channels_contiguous(OP, what, x)
    if k.dtype != q.dtype:
        raise TypeError(
            f"{OP}: q and k differ in dtype; got {_check.name(q.dtype)} and {_check.name(k.dtype)}, "
            "expected one; cast k to q's."
        )
    _check.same_device(OP, "k", k, q)
    if k.dim() != q.dim() or k.shape[-1] != q.shape[-1] or (q.dim() == 4 and k.shape[0] != q.shape[0]):
        raise ValueError(
            f"{OP}: q and k may differ only in N and H; got {list(q.shape)} and {list(k.shape)}, "
            "expected one batch and one head size; reshape k."
        )


def options(norm, scope: str, eps: float, layout: str, precision: str) -> None:
    if norm in _NORMS and scope in _SCOPES and layout in _LAYOUTS and precision in _check.PRECISIONS:
        if 0.0 <= eps < _check.INF:
            return
    _check.choice(OP, "norm", norm, _NORMS)
    _check.choice(OP, "scope", scope, _SCOPES)
    _check.choice(OP, "layout", layout, _LAYOUTS)
    _check.choice(OP, "precision", precision, _check.PRECISIONS)
    _check.epsilon(OP, "eps", eps)


def affine(what: str, t: Tensor, x: Tensor, norm, scope: str, precision: str) -> None:
    if norm is None:
        raise ValueError(f"{OP}: {what} without a norm; got norm=None, expected 'rms' or 'layer'; set norm.")
    size = x.shape[-1] if scope == "head" else x.shape[-2] * x.shape[-1]
    if isinstance(t, Tensor) and t.dtype == x.dtype and t.shape == (size,) and t.stride(0) == 1 and _beside(t, x):
        return
    _check.floating(OP, what, t)
    if t.dim() != 1 or t.shape[0] != size:
        expected = "(D,)" if scope == "head" else "(H * D,)"
        raise ValueError(
            f"{OP}: {what} must be {expected} for scope={scope!r}; got {list(t.shape)}, expected [{size}] to match "
            f"{list(x.shape)}; pass the norm's own parameter or the other scope."
        )
    _check.channels_contiguous(OP, what, t)
    _check.same_device(OP, what, t, x)
    if precision == "native":
        _check.native_dtype(OP, what, t, x)


def _table_dtype(what: str, t: Tensor, x: Tensor, precision: str) -> None:
    _check.floating(OP, what, t)
    if t.dtype == torch.float32 or t.dtype == torch.promote_types(x.dtype, torch.float32):
        return
    if precision == "native" and t.dtype == x.dtype:
        return
    raise TypeError(
        f"{OP}: {what} has the wrong dtype; got {_check.name(t.dtype)} beside {_check.name(x.dtype)}, expected float32 "
        f"(or, with precision='native', {_check.name(x.dtype)}); cast the tables."
    )


def rope_slice(x: Tensor, what: str, rope_start: int, rope_len: int | None) -> int:
    """Number of tokens of x that rotate."""
    N = x.shape[-3]
    if rope_start == 0 and rope_len is None:
        return N
    if rope_start < 0 or rope_start > N or (rope_len is not None and (rope_len < 0 or rope_start + rope_len > N)):
        raise ValueError(
            f"{OP}: the rotated slice must lie inside {what}; got rope_start={rope_start}, rope_len={rope_len}, "
            f"expected 0 <= rope_start and rope_start + rope_len <= N = {N}; count tokens, not channels."
        )
    return N - rope_start if rope_len is None else rope_len


def tables(names: tuple[str, str], cos: Tensor | None, sin: Tensor | None, x: Tensor, precision: str) -> None:
    """What does not depend on the tokens that the table serves."""
    if isinstance(cos, Tensor) and isinstance(sin, Tensor) and cos.dtype == sin.dtype == torch.float32:
        shape = cos.shape
        if shape == sin.shape and 2 <= len(shape) <= x.dim() and 0 < 2 * shape[-1] <= x.shape[-1]:
            if _beside(cos, x) and _beside(sin, x):
                return
    if cos is None or sin is None:
        raise ValueError(
            f"{OP}: {names[0]} and {names[1]} come together; got one of them, expected both or none; pass both."
        )
    for what, t in zip(names, (cos, sin), strict=True):
        _table_dtype(what, t, x, precision)
        _check.same_device(OP, what, t, x)
    if cos.shape != sin.shape or cos.dtype != sin.dtype:
        raise ValueError(
            f"{OP}: {names[0]} and {names[1]} must be alike; got {_check.name(cos.dtype)}{list(cos.shape)} and "
            f"{_check.name(sin.dtype)}{list(sin.shape)}, expected one shape and dtype; they come from one table."
        )
    D = x.shape[-1]
    ranks = (2, 3, 4) if x.dim() == 4 else (2, 3)
    if cos.dim() not in ranks or cos.shape[-1] == 0 or 2 * cos.shape[-1] > D:
        doubled = " It is a doubled table: pass cos[..., 0::2] (or its first half for layout='half')."
        hint = doubled if cos.dim() in ranks and cos.shape[-1] == D else ""
        raise ValueError(
            f"{OP}: {names[0]} must be (N, R/2), (N, H, R/2) or (B, N, H, R/2) with 2 <= R <= D = {D}; "
            f"got {list(cos.shape)}, expected one value per pair of channels; slice it.{hint}"
        )


def broadcasts(what: str, cos: Tensor, x: Tensor, whose: str, length: int) -> None:
    if cos.dim() == 2 and cos.shape[0] == length:
        return
    full = [length, x.shape[-2]] if x.dim() == 3 else [x.shape[0], length, x.shape[-2]]
    if cos.dim() == 2:
        pairs = [(cos.shape[0], length)]
    else:
        pairs = list(zip(reversed(cos.shape[:-1]), reversed(full), strict=False))
    for size, wanted in pairs:
        if size != wanted and size != 1:
            raise ValueError(
                f"{OP}: {what} does not broadcast to the rotated tokens of {whose}; got {list(cos.shape)}, expected "
                f"[{length}, {cos.shape[-1]}] or {[*full, cos.shape[-1]]} with any size 1; "
                "its first row belongs to token rope_start, and k_cos, k_sin are the tables of k alone."
            )


def axis_half(sections: int, rotated: int) -> None:
    if sections == 0 and rotated % 6 != 0:
        raise ValueError(
            f"{OP}: layout='axis_half' with cos and sin rotates three equal sections; got R = {rotated}, "
            "expected R % 6 == 0; pass axes= for sections of other sizes."
        )


def six_axes(axes: Sequence[Tensor], grids: Tensor | None) -> tuple[Tensor | None, ...]:
    """axes, None where there is no such axis."""
    if len(axes) not in (2, 4, 6) or not all(isinstance(t, Tensor) for t in axes):
        raise ValueError(
            f"{OP}: axes must be (cos_t, sin_t[, cos_h, sin_h[, cos_w, sin_w]]); got {len(axes)} entries, "
            "expected 2, 4 or 6 tensors; rope_table((T,), (dim_t,)) makes each pair."
        )
    if grids is None:
        raise ValueError(f"{OP}: axes without grids; got grids=None, expected int32 (S, {len(axes) // 2}); pass it.")
    return *axes, *(None,) * (6 - len(axes))


def axis_tables(axes: Sequence[Tensor], grids: Tensor, q: Tensor, k: Tensor, precision: str) -> None:
    width = 0
    for i, t in enumerate(axes):
        _table_dtype(f"axes[{i}]", t, q, precision)
        _check.same_device(OP, f"axes[{i}]", t, q)
        if t.dim() != 2 or t.shape != axes[i - i % 2].shape or t.shape[1] == 0 or t.dtype != axes[0].dtype:
            raise ValueError(
                f"{OP}: axes[{i}] must be (size, dim/2), alike for cos and sin and of one dtype; got "
                f"{_check.name(t.dtype)}{list(t.shape)}, expected {_check.name(axes[0].dtype)} like its partner; "
                "rope_table((size,), (dim,)) makes both."
            )
        width += t.shape[1] * (i % 2)
    if 2 * width > q.shape[-1]:
        raise ValueError(
            f"{OP}: axes rotate more channels than a head has; got R = {2 * width}, "
            f"expected at most D = {q.shape[-1]}; each table holds dim/2 values."
        )
    if grids.dtype not in _check.INDEX:
        raise TypeError(f"{OP}: grids must be int32 or int64; got {_check.name(grids.dtype)}, expected int32; cast it.")
    segments = "S" if q.dim() == 3 else f"1 or {q.shape[0]}"
    if grids.dim() != 2 or grids.shape[1] != len(axes) // 2 or (q.dim() == 4 and grids.shape[0] not in (1, q.shape[0])):
        raise ValueError(
            f"{OP}: grids must have a row per {'segment' if q.dim() == 3 else 'sample'} and a column per axis; got "
            f"{list(grids.shape)}, expected [{segments}, {len(axes) // 2}]; one row serves a whole batch."
        )
    _check.same_device(OP, "grids", grids, q)


def validate_grids(grids: Tensor, sizes: Sequence[int], length: int, packed: bool) -> None:
    """Looks into grids: every position has a row in its table, and every rotated token has a position."""
    for column, size in zip(grids.unbind(1), sizes, strict=True):
        if grids.shape[0] and (int(column.min()) < 0 or int(column.max()) > size):
            raise ValueError(
                f"{OP}: grids is out of range; got {int(column.min())}..{int(column.max())} for an axis table of "
                f"{size} rows, expected 0..{size}; make longer tables or check the order (T, H, W)."
            )
    tokens = grids.long().prod(1)
    totals = [int(tokens.sum())] if packed else tokens.tolist()
    for total in totals:
        if total != length:
            raise ValueError(
                f"{OP}: grids must cover the rotated tokens; got {total} tokens, expected {length}; "
                "set rope_start and rope_len where text or padding does not rotate."
            )


def table_arguments(grid, axes_dim, theta: float) -> None:
    op = "rope_table"
    if not axes_dim or any(not isinstance(d, int) or d < 2 or d % 2 for d in axes_dim):
        raise ValueError(
            f"{op}: axes_dim must be even channel counts, one per axis; got {axes_dim!r}, expected e.g. (44, 42, 42); "
            "they sum to R."
        )
    for sizes in grid_list(grid):
        if len(sizes) != len(axes_dim) or any(not isinstance(n, int) or n < 0 for n in sizes):
            raise ValueError(
                f"{op}: grid must have one size per axis; got {sizes!r} for axes_dim {tuple(axes_dim)}, "
                f"expected {len(axes_dim)} ints >= 0, e.g. (T, H, W), or a list of them; count patches, not pixels."
            )
    if not 0.0 < theta < math.inf:
        raise ValueError(f"{op}: theta must be positive and finite; got {theta}, expected e.g. 10000.0; set it.")
