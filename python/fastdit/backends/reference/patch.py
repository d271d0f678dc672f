"""patch on the reference backend: schema order to keywords, lists out of their flat form and back."""

from __future__ import annotations

import math

import torch

from ...reference import patch as formula
from ..registry import Impl, register as _register
from ._vjp import vjp


def _triples(grids):
    return [tuple(grids[i : i + 3]) for i in range(0, len(grids), 3)]


def videos(x, weight, grids):
    """The videos (C, T, H, W) of a flat list."""
    C, patch = weight.shape[1], weight.shape[2:]
    shapes = [(C, *(g * p for g, p in zip(grid, patch, strict=True))) for grid in _triples(grids)]
    return [v.view(s) for v, s in zip(x.split([math.prod(s) for s in shapes]), shapes, strict=True)]


def patch_embed3d(x, weight, bias, pos, grids):
    return formula.patch_embed3d(videos(x, weight, grids) if x.dim() == 1 else x, weight, bias, pos=pos)


def unpatchify3d(tokens, grid, patch, channels, order):
    if tokens.dim() == 3:
        return formula.unpatchify3d(tokens, grid=grid, patch=patch, channels=channels, order=order)
    videos = formula.unpatchify3d(tokens, grid=_triples(grid), patch=patch, channels=channels, order=order)
    return torch.cat([v.reshape(-1) for v in videos])


patch_embed3d_backward = vjp(patch_embed3d, wrt=range(4))
unpatchify3d_backward = vjp(unpatchify3d, wrt=range(1))


def register() -> None:
    for name in ("patch_embed3d", "unpatchify3d"):
        _register(Impl(name, "reference", lambda *args: None, globals()[name], globals()[f"{name}_backward"]))
