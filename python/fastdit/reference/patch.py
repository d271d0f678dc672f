"""Patch embedding and its inverse move: the formulas of every DiT and video DiT.

A patch is (pt, ph, pw) pixels of all C channels. Tokens run along t, then h, then w. The values of a patch enter the
embedding in the order of nn.Conv3d's weight, (c, t, h, w); what the last layer predicts comes in any order of the four.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def patch_embed3d(
    x: Tensor | list[Tensor] | tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos: Tensor | list[Tensor] | tuple[Tensor, ...] | None = None,
) -> Tensor:
    """tokens[n] = weight . patch[n] + bias + pos[n], rounded once.

    x (B, C, T, H, W) -> (B, N, D), with pos (N, D) or (B, N, D); a list of (C, T, H, W) of any sizes -> packed
    (sum N, D), with pos packed likewise or a list of (N, D).
    """
    if isinstance(x, (list, tuple)):
        lengths = [patches(video[None], weight.shape[2:]).shape[1] for video in x]
        rows: Any = pos.split(lengths) if isinstance(pos, Tensor) else pos or [None] * len(x)
        parts = zip(x, rows, strict=True)
        return torch.cat([patch_embed3d(video[None], weight, bias, pos=row)[0] for video, row in parts])
    math = torch.promote_types(x.dtype, torch.float32)
    y = F.linear(patches(x, weight.shape[2:]).to(math), weight.to(math).flatten(1))
    if bias is not None:
        y = y + bias.to(math)
    if isinstance(pos, Tensor):
        y = y + pos.to(math)
    return y.to(x.dtype)


def patches(x: Tensor, patch: Sequence[int]) -> Tensor:
    """(B, C, T, H, W) -> (B, N, C * pt * ph * pw), the values of a patch in the order c, t, h, w."""
    B, C, T, H, W = x.shape
    pt, ph, pw = patch
    t, h, w = T // pt, H // ph, W // pw
    x = x.reshape(B, C, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)  # (B, t, h, w, C, pt, ph, pw)
    return x.reshape(B, t * h * w, C * pt * ph * pw)


def unpatchify3d(
    tokens: Tensor,
    *,
    grid: Sequence[Any],
    patch: Sequence[int],
    channels: int,
    order: str = "thwc",
) -> Tensor | list[Tensor]:
    """y[b, c, t * pt + dt, h * ph + dh, w * pw + dw] = tokens[b, (t, h, w)][(dt, dh, dw, c) in `order`].

    tokens (B, N, K) with grid (T, H, W) in tokens -> (B, C, T * pt, H * ph, W * pw); packed (sum N, K) with a list of
    grids -> a list of (C, T * pt, H * ph, W * pw).
    """
    if tokens.dim() == 2:
        grids = [tuple(g) for g in grid]
        parts = tokens.split([t * h * w for t, h, w in grids])
        return [
            unpatchify3d(part[None], grid=g, patch=patch, channels=channels, order=order)[0]
            for part, g in zip(parts, grids, strict=True)
        ]
    B = tokens.shape[0]
    (t, h, w), (pt, ph, pw) = grid, patch
    size = {"c": channels, "t": pt, "h": ph, "w": pw}
    dim = {letter: 4 + i for i, letter in enumerate(order)}
    video = tokens.reshape(B, t, h, w, *(size[letter] for letter in order))
    video = video.permute(0, dim["c"], 1, dim["t"], 2, dim["h"], 3, dim["w"])  # (B, C, t, pt, h, ph, w, pw)
    return video.clone(memory_format=torch.contiguous_format).view(B, channels, t * pt, h * ph, w * pw)
