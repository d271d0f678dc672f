"""norm_silu, next_cache and the layout pass on the Triton kernels (kernels/conv_norm.py, kernels/conv_group.py).

Launches: 1 (GroupNorm 3), backward 2 (GroupNorm 5, and one for each of d_weight and d_bias).
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.kernels import conv_group, conv_norm as kernels

from .._facts import kept
from ._config import Config, choose, tunable
from ._launch import Launch, launch, processors
from ._tiles import power

WIDEST = 8192  # channels of a pixel in one tile

# values a thread; the backward holds two tensors
_VALUES = tuple(Config((values,), warps) for values, warps in ((32, 4), (16, 4), (64, 4), (32, 8), (16, 8)))
tunable("conv_normalize", *_VALUES)
tunable("conv_normalize_backward", *_VALUES)


@kept
def _laid(t: Tensor) -> tuple[int, int, tuple[int, ...]]:
    shape = t.shape
    s_b, s_c, s_t, s_h, s_w = (0 if n == 1 else s for n, s in zip(shape, t.stride(), strict=True))
    s_w = s_h if shape[4] == 1 else s_w
    s_h = s_w * shape[4] if shape[3] == 1 else s_h
    flat = s_h == s_w * shape[4]
    if flat and s_w == 1 and s_c != 1 and shape[1] > 1:
        layout, low = 3, s_b | s_c | s_t | s_h * shape[3]
    elif s_c == 1 or shape[1] == 1:
        layout, low = (1 if flat else 2), s_b | s_t | s_h | s_w
    else:
        layout, low = 0, 1
    most = 16 // t.element_size()
    return layout, min(low & -low, most) if low else most, (s_b, s_c, s_t, s_h, s_w)


NOTHING = (0, 1, (0, 0, 0, 0, 0))


def laid(t: Tensor | None) -> tuple[int, int, tuple[int, ...]]:
    """(LAYOUT, ALIGN, strides with 0 for dims of size 1): see kernels/conv_index.py."""
    return NOTHING if t is None else _laid(t)


def choice(name: str, x: Tensor) -> Config:
    C = x.shape[1]
    key = (x.dtype, C, x.stride(1) == 1)
    if not name.endswith("backward"):
        return choose(name, x, key, lambda arch: _VALUES[0])
    return choose(name, x, key, lambda arch: Config((8,), 4) if (arch, x.dtype) == (100, torch.float32) else _VALUES[1])


def tile(config: Config, shape: tuple, itemsize: int, layouts: tuple[int, ...], whole: bool) -> tuple[int, int, int]:
    """(BLOCK_P, BLOCK_C, warps). whole: all channels of a pixel in one tile."""
    C, pixels = shape[1], shape[3] * shape[4]
    if 3 in layouts:  # runs of 64 pixels
        block_c, block_p, warps = power(C) if whole else min(power(C), 64), 64, config.warps
        warps = min(max(warps, block_p * block_c // (32 * config.blocks[0])), 16)
    else:  # block_c values of a weight are 4 bytes a thread, or more
        block_c = power(C) if whole else min(power(C), 256)
        warps = max(1, min(config.warps, block_c * itemsize // 128))
        block_p = max(1, 32 * warps * config.blocks[0] // block_c)
    return min(block_p, power(pixels)), block_c, warps


@kept
def _plan(y, x, cache, norm: int, eps: float, act: bool) -> Launch:
    x_layout, x_align, x_stride = laid(x)
    c_layout, c_align, c_stride = laid(cache)
    y_layout, y_align, y_stride = laid(y)
    config = choice("conv_normalize", y)
    block_p, block_c, warps = tile(config, y.shape, y.element_size(), (x_layout, y_layout), norm in (1, 2))
    B, C, T, H, W = y.shape
    return Launch(
        kernels.normalize,
        (B * T * -(-(H * W) // block_p), -(-C // block_c), 1),
        (T, T - x.shape[2], H, W, *x_stride, *c_stride, *y_stride, eps),
        (C, norm, act, x_layout, x_align, c_layout, c_align, y_layout, y_align, block_p, block_c),
        warps,
    )


def normalize(y: Tensor, x: Tensor, cache, weight, bias, stats, norm: int, eps: float, act: bool) -> None:
    """y (B, C, T, H, W) = act(norm(the last T frames of cat(cache, x))); all of x is among them."""
    cached = y.shape[2] - x.shape[2]
    if cached == 0:
        cache = None
    elif cache.shape[2] != cached:
        cache = cache[:, :, cache.shape[2] - cached :]
    _plan(y, x, cache, norm, eps, act)(y, x, cache, weight, bias, stats)


def normalize_backward(dx, x: Tensor, g: Tensor, weight, bias, norm: int, eps: float, act: bool, sums: bool):
    """Writes dx (or None); returns the parts (programs, 2, C) of the sums for weight and bias where wanted."""
    x_layout, x_align, x_stride = laid(x)
    g_layout, g_align, g_stride = laid(g)
    d_layout, d_align, d_stride = laid(dx)
    config = choice("conv_normalize_backward", x)
    block_p, block_c, warps = tile(config, x.shape, x.element_size(), (x_layout, g_layout), True)
    B, C, T, H, W = x.shape
    count = B * T * -(-(H * W) // block_p)
    programs = min(count, 4 * processors(x))
    parts = torch.empty((programs, 2, C), dtype=torch.float32, device=x.device) if sums else None
    launch(
        kernels.normalize_backward,
        (programs, 1, 1),
        (x, g, dx, weight, bias, parts),
        (count, T, H, W, *x_stride, *g_stride, *d_stride, eps),
        (C, norm, act, x_layout, x_align, g_layout, g_align, d_layout, d_align, block_p, block_c),
        warps,
    )
    return parts


def sum_rows(parts: Tensor, which: int, like: Tensor) -> Tensor:
    """Sum over parts[:, which] (rows, C), in like's dtype."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    rows, C = parts.shape[0], parts.shape[-1]
    block = min(power(C), 64)
    launch(kernels.sum_rows, (-(-C // block), 1, 1), (out, parts[:, which]), (rows, C, parts.stride(0)), (32, block))
    return out


def pixel_sums(g: Tensor, like: Tensor) -> Tensor:
    """Sum of g (B, C, T, H, W) over all but the channels, in like's dtype: 1 * itemsize bytes a value."""
    parts = _group_parts(g, 2)
    layout, align, stride = laid(g)
    _group_launch(
        conv_group.group_sums, (parts, None, g, None, None, None), g, (*laid(None)[2], *stride), (0, 1, layout, align)
    )
    return sum_rows(parts.view(-1, 2, g.shape[1]), 1, like)


def _group_parts(x: Tensor, kinds: int) -> Tensor:
    B, C, T, H, W = x.shape
    block_p, block_c, _ = _group_tile(x)
    most = -(-8 * processors(x) // (B * -(-C // block_c)))
    programs = max(1, min(T * -(-(H * W) // block_p), most))
    return torch.empty((B, programs, kinds, C), dtype=torch.float32, device=x.device)


def _group_tile(x: Tensor) -> tuple[int, int, int]:
    return tile(choice("conv_normalize_backward", x), x.shape, x.element_size(), (laid(x)[0],), False)


def _group_launch(kernel, tensors: tuple, x: Tensor, strides: tuple, layouts: tuple) -> None:
    block_p, block_c, warps = _group_tile(x)
    B, C, T, H, W = x.shape
    programs = tensors[0].shape[1]
    grid = (B * programs, -(-C // block_c), 1)
    launch(kernel, grid, tensors, (programs, T, H, W, *strides), (C, *layouts, block_p, block_c), warps)


def statistics(x: Tensor, groups: int, eps: float) -> Tensor:
    """(B, 2, C): mean and rstd of each channel's group."""
    B, C = x.shape[:2]
    layout, align, stride = laid(x)
    parts = _group_parts(x, 3)
    _group_launch(conv_group.group_statistics, (parts, x), x, stride, (layout, align))
    stats = torch.empty((B, 2, C), dtype=torch.float32, device=x.device)
    block = power(C // groups)
    launch(
        conv_group.group_combine, (groups * B, 1, 1), (stats, parts), (parts.shape[1], eps),
        (C, C // groups, max(1, min(power(parts.shape[1]), 2048 // block)), block),
    )  # fmt: skip
    return stats


def group_backward(dx, x: Tensor, g: Tensor, weight, bias, groups: int, eps: float) -> Tensor:
    """Writes dx (or None); returns (B, 2, C): each sample's sums for weight and bias."""
    B, C, T, H, W = x.shape
    x_layout, x_align, x_stride = laid(x)
    g_layout, g_align, g_stride = laid(g)
    stats = statistics(x, groups, eps)
    parts = _group_parts(x, 2)
    _group_launch(
        conv_group.group_sums, (parts, x, g, weight, bias, stats), x, (*x_stride, *g_stride),
        (x_layout, x_align, g_layout, g_align),
    )  # fmt: skip
    sums, moments = torch.empty((2, B, 2, C), dtype=torch.float32, device=x.device)
    block = power(C // groups)
    launch(
        conv_group.group_moments, (groups * B, 1, 1), (sums, moments, parts, weight),
        (parts.shape[1], float(T * H * W * (C // groups))),
        (C, C // groups, max(1, min(power(parts.shape[1]), 2048 // block)), block),
    )  # fmt: skip
    if dx is not None:
        d_layout, d_align, d_stride = laid(dx)
        block_p, block_c, warps = _group_tile(x)
        launch(
            conv_group.group_backward,
            (B * T * -(-(H * W) // block_p), -(-C // block_c), 1),
            (dx, x, g, weight, bias, stats, moments),
            (T, H, W, *x_stride, *g_stride, *d_stride),
            (C, x_layout, x_align, g_layout, g_align, d_layout, d_align, block_p, block_c),
            warps,
        )
    return sums
