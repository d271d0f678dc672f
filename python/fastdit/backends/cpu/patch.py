"""patch on the CPU kernels (csrc/cpu/patch.cpp, patch_unpatchify.cpp): each video of a call is one run of ints."""

from __future__ import annotations

import math

import torch

from ... import _cpu
from ..reference import patch as reference
from ..registry import Impl, register as _register
from ._abi import DTYPE, on_cpu


def patch_embed3d(x, weight, bias, pos, grids):
    (D, C), patch = weight.shape[:2], weight.shape[2:]
    if x.dim() == 1:
        y = torch.empty((sum(math.prod(grids[i : i + 3]) for i in range(0, len(grids), 3)), D), dtype=x.dtype)
    else:
        grid = [s // p for s, p in zip(x.shape[2:], patch, strict=True)]
        y = torch.empty((x.shape[0], math.prod(grid), D), dtype=x.dtype)
    if y.numel() == 0:
        return y
    if x.dtype == torch.float64:  # the kernel knows f32 parameters beside half types only
        weight, bias, pos = (None if t is None else t.double() for t in (weight, bias, pos))
    if bias is not None:
        bias = bias.contiguous()
    pos_at, pos_b, pos_n = 0, 0, 0
    if pos is not None:
        pos_at, pos_b, pos_n = pos.data_ptr(), pos.stride(0) if pos.dim() == 3 else 0, pos.stride(-2)
    if x.dim() == 1:
        items: list[int] = []
        x_at, size, px = x.data_ptr(), x.element_size(), math.prod(patch)
        for i in range(0, len(grids), 3):
            t, h, w = grids[i : i + 3]
            T, H, W = t * patch[0], h * patch[1], w * patch[2]
            items += (x_at, 1, t, h, w, 0, T * H * W, H * W, W, 1, pos_at, 0, pos_n)
            x_at += C * t * h * w * px * size
            if pos is not None:
                pos_at += t * h * w * pos_n * pos.element_size()
    else:
        items = [x.data_ptr(), x.shape[0], *grid, *x.stride(), pos_at, pos_b, pos_n]
    _cpu.patch_embed3d_forward(
        items, weight.data_ptr(), weight.stride(), 0 if bias is None else bias.data_ptr(), y.data_ptr(), D, C,
        tuple(patch), DTYPE[x.dtype], DTYPE[weight.dtype], DTYPE[x.dtype if bias is None else bias.dtype],
        DTYPE[x.dtype if pos is None else pos.dtype], torch.get_num_threads(),
    )  # fmt: skip
    return y


def unpatchify3d(tokens, grid, patch, channels, order):
    size = {"c": channels, "t": patch[0], "h": patch[1], "w": patch[2]}
    if tokens.dim() == 2:
        y = torch.empty(tokens.numel(), dtype=tokens.dtype)
    else:
        y = torch.empty(
            (tokens.shape[0], channels, *(g * p for g, p in zip(grid, patch, strict=True))), dtype=tokens.dtype
        )
    if y.numel() == 0:
        return y
    offset, inner = {}, 1
    for letter in reversed(order):
        offset[letter] = inner
        inner *= size[letter]
    batch, stride_b = (1, 0) if tokens.dim() == 2 else (tokens.shape[0], tokens.stride(0))
    stride_n, itemsize = tokens.stride(-2), tokens.element_size()
    items: list[int] = []
    tokens_at, y_at = tokens.data_ptr(), y.data_ptr()
    for i in range(0, len(grid), 3):
        t, h, w = grid[i : i + 3]
        items += (tokens_at, y_at, batch, t, h, w, stride_b, stride_n)
        tokens_at += t * h * w * stride_n * itemsize
        y_at += t * h * w * inner * itemsize
    _cpu.unpatchify3d_forward(
        items, channels, tuple(patch), [offset[letter] for letter in "cthw"], itemsize, torch.get_num_threads()
    )
    return y


def register() -> None:
    for name in ("patch_embed3d", "unpatchify3d"):
        _register(
            Impl(
                name,
                "cpu",
                lambda x, *_: on_cpu(x),
                globals()[name],
                getattr(reference, f"{name}_backward"),
                backward_backend="reference",
            )
        )
