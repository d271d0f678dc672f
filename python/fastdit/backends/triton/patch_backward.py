"""Gradients of patch_embed3d on the Triton kernels (kernels/patch_backward.py).

Launches: 1 for x, 1 or 2 for weight and bias together, 1 for pos; of a list, the first stages once for every eight
videos. g is read once for x (twice from L2 where K > 128) and once for weight and bias.
"""

from __future__ import annotations

import math

import torch

from fastdit.kernels.patch_backward import patch_embed_dw, patch_embed_dx, patch_sum

from .._patch import summed, without_tokens
from ._config import Config, choose, tunable
from ._launch import dot_precision, launch, processors
from ._tiles import power
from .patch_plan import dense as _dense, launches, layout, precision, wide as _wide

_SUM = 1024

tunable(
    "patch_embed_dx",
    Config((128, 64), 4, 3), Config((128, 64), 8, 3), Config((64, 64), 4, 4), Config((64, 128), 4, 3),
)  # fmt: skip
tunable(
    "patch_embed_dw",
    Config((64, 128), 4, 3), Config((64, 128), 8, 3), Config((128, 128), 8, 3), Config((64, 64), 4, 4),
)  # fmt: skip


def _dx_default(K: int, wide: bool):
    # values of a token that are no multiple of 16 bytes move one by one, each with an address of its own
    if wide:
        return lambda arch: Config((64, 32), 4 if K % 4 == 0 else 8, 2)
    return lambda arch: Config((64, 64 if K % 8 == 0 else 32), 4 if K <= 64 else 8, 3)


def _dw_default(wide: bool):
    return lambda arch: Config((32, 64), 4, 2) if wide else Config((64, 128 if arch < 100 else 64), 8, 3)


def patch_embed3d_backward(grad, x, weight, bias, pos, grids, needs):
    if grad is None or grad.numel() == 0 or weight.numel() == 0:
        return without_tokens(grad, (x, weight, bias, pos), needs)
    g = grad.contiguous()
    dense = _dense(x, weight)
    grids = tuple(grids)
    dx = _backward_x(g, x, weight, dense, grids) if needs[0] else None
    need_b = needs[2] and bias is not None
    dw, db = (
        _backward_weight(g, x, weight, bias, dense, grids, needs[1], need_b) if needs[1] or need_b else (None, None)
    )
    dpos = None
    if needs[3] and pos is not None:
        if summed(pos, x):
            dpos = torch.empty(pos.shape, dtype=pos.dtype, device=pos.device)
            _sum(g, dpos, None, x.shape[0])
        else:
            dpos = g.view(pos.shape).to(pos.dtype, copy=True)
    return dx, dw, db, dpos


def _backward_x(g, x, weight, dense, grids):
    D, C, pt, ph, pw = weight.shape
    K, wide, many = C * pt * ph * pw, _wide(weight), x.dim() == 1
    config = choose("patch_embed_dx", x, (x.dtype, weight.dtype, K, D), _dx_default(K, wide))
    BM, BN = config.blocks
    BK = max(16, min(power(K), 64 if wide or K % 8 else 128))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    constants = (C, D, pt, ph, pw, weight.is_contiguous(), many, BM, BN, BK, precision(x, weight))
    for tiles, table in launches(x, grids, dense, BM):
        if tiles:
            launch(
                patch_embed_dx, (tiles * -(-K // BK), 1, 1), (g, weight, dx), (*dense, *weight.stride(), *table),
                constants, config.warps, config.stages,
            )  # fmt: skip
    return dx


def _backward_weight(g, x, weight, bias, dense, grids, need_w, need_b):
    """Gradients of weight and bias: fp32 partials of every split, then their sum in order."""
    D, C, pt, ph, pw = weight.shape
    K, wide, many = C * pt * ph * pw, x.dtype == torch.float32, x.dim() == 1
    config = choose("patch_embed_dw", x, (x.dtype, K, D), _dw_default(wide))
    BM, BN = config.blocks
    BK = max(16, min(power(K), 64 if wide else 128))
    outputs = -(-D // BN) * -(-K // BK)
    plan, splits = [], 0
    for tiles, table in launches(x, grids, dense, BM):
        if tiles:
            per = -(-tiles // min(tiles, -(-2 * processors(x) // outputs)))
            plan.append((tiles, per, splits, table))
            splits += -(-tiles // per)
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if need_w else None
    db = torch.empty(bias.shape, dtype=bias.dtype, device=x.device) if need_b else None
    size, pitch = (D * K if need_w else 0), (D * K if need_w else 0) + (D if need_b else 0)
    part_w, part_b = dw, db
    if splits > 1:
        partial = torch.empty((splits, pitch), dtype=torch.float32, device=x.device)
        part_w, part_b = (partial if need_w else None), (partial[0, size:] if need_b else None)
    strides, unit, align = layout(x)
    constants = (C, D, pt, ph, pw, unit, align, math.gcd(8, pitch), many, BM, BN, BK, dot_precision())
    for tiles, per, split0, table in plan:
        launch(
            patch_embed_dw, (outputs, -(-tiles // per), 1), (g, x, part_w, part_b),
            (*dense, *strides, tiles, per, split0, pitch, *table), constants, config.warps, config.stages,
        )  # fmt: skip
    if splits > 1:
        _sum(partial, dw, db, splits)
    return dw, db


def _sum(partial, out, tail, count):
    size = 0 if out is None else out.numel()
    rest = 0 if tail is None else tail.numel()
    grid = (-(-(size + rest) // _SUM), 1, 1)
    constants = (math.gcd(8, size, rest), _SUM)
    launch(patch_sum, grid, (partial, out, tail), (count, size, rest), constants, 4, 1)
