"""Rotary tables, and the norm and rotation of queries and keys, under both precision laws.

"fp32": norm and rotation in promote(x.dtype, fp32), one rounding at the end.
"native": the norm rounds to x.dtype as eager modules do, then the rotation computes in the tables' dtype: fp32 tables
give diffusers' apply_rotary_emb (one rounding), tables of x.dtype round every product (MiniMax-H3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .modulation import normalise


def grid_list(grid: Sequence) -> list[Sequence[int]]:
    """(T, H, W) or a list of such -> the list."""
    return [grid] if grid and not isinstance(grid[0], Sequence) else list(grid)


def rope_table(
    grid: Sequence[int] | Sequence[Sequence[int]],
    axes_dim: Sequence[int],
    *,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor]:
    """cos, sin (N, R/2) fp32 of position * theta^(-2i / dim), the axes side by side; angles in fp64, as Wan's."""
    tables: list[tuple[Tensor, Tensor]] = []
    for sizes in grid_list(grid):
        cos, sin = [], []
        for axis, (size, dim) in enumerate(zip(sizes, axes_dim, strict=True)):
            inverse = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim)
            angle = torch.arange(size, dtype=torch.float64, device=device)[:, None] * inverse  # (size, dim/2)
            shape = [1] * len(sizes) + [dim // 2]
            shape[axis] = size
            cos.append(angle.cos().float().view(shape).expand(*sizes, -1))
            sin.append(angle.sin().float().view(shape).expand(*sizes, -1))
        tables.append((torch.cat(cos, dim=-1).flatten(0, -2), torch.cat(sin, dim=-1).flatten(0, -2)))
    if not tables:
        return torch.empty(0, sum(axes_dim) // 2, device=device), torch.empty(0, sum(axes_dim) // 2, device=device)
    cosines, sines = zip(*tables, strict=True)
    return torch.cat(cosines), torch.cat(sines)


def axis_rows(axes: Sequence[Tensor], grids: Tensor, length: int, packed: bool) -> tuple[Tensor, Tensor]:
    """cos, sin of every token of its grid, from per-axis tables (cos_t, sin_t, cos_h, sin_h, ...), each (size, r).

    packed: the S grids of (S, A) follow one another in the `length` tokens -> (N, 1, R/2).
    Otherwise one grid per sample or one for all, (B or 1, A) -> (B or 1, N, 1, R/2).
    """
    grids = grids.long()
    token = torch.arange(length, device=grids.device)
    if packed:
        ends = grids.prod(-1).cumsum(0)
        segment = torch.searchsorted(ends, token, right=True)
        token = token - (ends - grids.prod(-1))[segment]
        sizes = grids[segment].unbind(-1)
    else:
        token = token.expand(grids.shape[0], length)
        sizes = grids.unsqueeze(1).unbind(-1)
    index = []
    for size in reversed(sizes):  # the last axis runs fastest
        index.append(token % size)
        token = token // size
    index.reverse()
    cos = torch.cat([table[i] for table, i in zip(axes[0::2], index, strict=True)], dim=-1)
    sin = torch.cat([table[i] for table, i in zip(axes[1::2], index, strict=True)], dim=-1)
    return cos.unsqueeze(-2), sin.unsqueeze(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, layout: str, sections: Sequence[int]) -> Tensor:
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) on the first R = 2 * cos.shape[-1] channels of x (..., D).

    interleaved: the pairs are channels (2i, 2i + 1). half: (i, i + R/2). axis_half: half inside each of the sections,
    whose widths (in pairs) sum to R/2.
    """
    R = 2 * cos.shape[-1]
    if layout == "axis_half":
        parts = x[..., :R].split([2 * s for s in sections], dim=-1)
        tables = zip(cos.split(list(sections), dim=-1), sin.split(list(sections), dim=-1), strict=True)
        rotated = [rotate(p, c, s, "half", ()) for p, (c, s) in zip(parts, tables, strict=True)]
        return torch.cat([*rotated, x[..., R:]], dim=-1)
    if layout == "interleaved":
        x1, x2 = x[..., :R].unflatten(-1, (R // 2, 2)).unbind(-1)
        pair = torch.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1).flatten(-2)
    else:
        x1, x2 = x[..., :R].unflatten(-1, (2, R // 2)).unbind(-2)
        pair = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    return torch.cat([pair, x[..., R:]], dim=-1)


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
) -> tuple[Tensor, Tensor]:
    """rope(n(q)), rope(n(k)); n = RMSNorm | LayerNorm over each head (scope "head") or over all of them ("hidden")."""
    sections: list[int] = []
    if axes is not None and grids is not None:
        length = q.shape[-3] - rope_start if rope_len is None else rope_len
        cos, sin = axis_rows(axes, grids, length, packed=q.dim() == 3)
        sections = [table.shape[-1] for table in axes[0::2]]
    outputs = []
    for x, weight, bias, c, s in (
        (q, q_weight, q_bias, cos, sin),
        (k, k_weight, k_bias, cos if k_cos is None else k_cos, sin if k_sin is None else k_sin),
    ):
        math = x.dtype if precision == "native" else torch.promote_types(x.dtype, torch.float32)
        y = x.to(math)
        if norm is not None:
            weight = None if weight is None else weight.to(math)
            bias = None if bias is None else bias.to(math)
            y = y.flatten(-2) if scope == "hidden" else y
            y = normalise(y, weight, bias, norm=norm, eps=eps).view(x.shape)
        if c is not None and s is not None:
            if c.dim() == 2:  # (N, R/2), one row per token, shared by the heads
                c, s = c.unsqueeze(-2), s.unsqueeze(-2)
            length = x.shape[-3] - rope_start if rope_len is None else rope_len
            before, middle, after = y.split([rope_start, length, x.shape[-3] - rope_start - length], dim=-3)
            math = torch.promote_types(math, c.dtype)
            thirds = sections or [c.shape[-1] // 3] * 3
            middle = rotate(middle.to(math), c.to(math), s.to(math), layout, thirds)
            y = torch.cat([before.to(x.dtype), middle.to(x.dtype), after.to(x.dtype)], dim=-3)
        y = y.to(x.dtype)
        if inplace:
            x.copy_(y)
        outputs.append(x if inplace else y.clone(memory_format=torch.contiguous_format) if y is x else y)
    return outputs[0], outputs[1]
