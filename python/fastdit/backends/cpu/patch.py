"""patch on the CPU kernels (csrc/cpu/patch.cpp, patch_unpatchify.cpp): each video of a call is one run of ints."""

from __future__ import annotations

import math

import torch

from ... import _cpu
from ...reference import patch as formula
from .._patch import summed
from .._patch_abi import embed_arguments, embed_shape, inside
from .._tensors import contiguous
from ..reference import patch as reference
from ..registry import Impl, register as _register
from ._abi import on_cpu


def patch_embed3d(x, weight, bias, pos, grids):
    y = x.new_empty(embed_shape(x, weight, grids))
    if y.numel() == 0:
        return y
    if x.dtype == torch.float64:  # the kernel knows f32 parameters beside half types only
        weight, bias, pos = (None if t is None else t.double() for t in (weight, bias, pos))
    bias = contiguous(bias)
    _cpu.patch_embed3d_forward(*embed_arguments(x, weight, bias, pos, y, grids, torch.get_num_threads()))
    return y


def _zeros(inputs, needs):
    return tuple(torch.zeros_like(t) if need and t is not None else None for t, need in zip(inputs, needs, strict=True))


def patch_embed3d_backward(grad, x, weight, bias, pos, grids, needs):
    """The two GEMMs by torch, the fold of x's gradient by the unpatchify kernel."""
    if grad is None:
        return _zeros((x, weight, bias, pos), needs)
    D, C, *patch = weight.shape
    g = grad.reshape(grad.shape[:-1].numel(), D)
    # bf16 GEMMs accumulate in fp32 and round once; f16 ones do not on every CPU, and mixed operands need one type
    own = weight.dtype == x.dtype and x.dtype != torch.float16
    math_dtype = x.dtype if own else torch.promote_types(x.dtype, torch.float32)
    wide = g.to(math_dtype)
    grad_x = grad_weight = grad_bias = grad_pos = None
    if needs[0]:
        folded = (wide @ weight.to(math_dtype).flatten(1)).to(x.dtype)
        if x.dim() == 1:
            grad_x = unpatchify3d(folded, grids, patch, C, "cthw")
        else:
            grid = [size // p for size, p in zip(x.shape[2:], patch, strict=True)]
            grad_x = unpatchify3d(folded.view(x.shape[0], math.prod(grid), folded.shape[1]), grid, patch, C, "cthw")
    if needs[1]:
        videos = [v[None] for v in reference.videos(x, weight, grids)] if x.dim() == 1 else [x]
        patches = torch.cat([formula.patches(v, patch).flatten(0, 1) for v in videos])
        grad_weight = (wide.t() @ patches.to(math_dtype)).view(weight.shape).to(weight.dtype)
    if needs[2] and bias is not None:
        grad_bias = g.sum(0, dtype=bias.dtype)  # accumulates in fp32 for the half types too, in half the time
    if needs[3] and pos is not None:
        grad_pos = grad.sum(0, dtype=pos.dtype) if summed(pos, x) else grad.reshape(pos.shape).to(pos.dtype, copy=True)
    return grad_x, grad_weight, grad_bias, grad_pos


def unpatchify3d(tokens, grid, patch, channels, order):
    pt, ph, pw = patch
    many = tokens.dim() == 2
    if many:
        y = torch.empty(tokens.numel(), dtype=tokens.dtype)
        batch, (stride_b, stride_n) = 1, (0, tokens.stride(0))
    else:
        batch, (stride_b, stride_n, _) = tokens.shape[0], tokens.stride()
        t, h, w = grid
        y = torch.empty((batch, channels, t * pt, h * ph, w * pw), dtype=tokens.dtype)
    if y.numel() == 0:
        return y
    K = channels * pt * ph * pw
    itemsize, tokens_at, y_at = tokens.element_size(), tokens.data_ptr(), y.data_ptr()
    items: tuple[int, ...] = ()
    for i in range(0, len(grid), 3):
        t, h, w = grid[i : i + 3]
        items += (tokens_at, y_at, batch, t, h, w, stride_b, stride_n)
        tokens_at += t * h * w * stride_n * itemsize
        y_at += t * h * w * K * itemsize
    offsets = inside(channels, patch, order)
    _cpu.unpatchify3d_forward(items, channels, (pt, ph, pw), offsets, itemsize, torch.get_num_threads())
    return y


def unpatchify3d_backward(grad, tokens, grid, patch, channels, order, needs):
    """The move back."""
    if grad is None or not needs[0]:
        return _zeros((tokens,), needs)
    pt, ph, pw = patch
    axis = {"c": 1, "t": 3, "h": 5, "w": 7}
    batch = 1 if tokens.dim() == 2 else tokens.shape[0]
    parts, start = [], 0
    for i in range(0, len(grid), 3):
        t, h, w = grid[i : i + 3]
        video = grad
        if tokens.dim() == 2:
            video = grad[start : start + t * h * w * tokens.shape[1]]
            start += video.shape[0]
        video = video.reshape(batch, channels, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, *(axis[o] for o in order))
        parts.append(video.clone(memory_format=torch.contiguous_format).view(batch, t * h * w, tokens.shape[-1]))
    return (parts[0] if tokens.dim() == 3 else torch.cat(parts, dim=1)[0],)


def register() -> None:
    for name in ("patch_embed3d", "unpatchify3d"):
        _register(Impl(name, "cpu", lambda x, *_: on_cpu(x), globals()[name], globals()[f"{name}_backward"]))
