"""patch on the CPU kernels (csrc/cpu/patch.cpp, patch_unpatchify.cpp): each video of a call is one run of ints."""

from __future__ import annotations

import math

import torch

from ... import _cpu
from .._patch import summed
from .._patch_abi import embed_arguments, embed_shape, inside
from .._tensors import contiguous
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
    """The two GEMMs by torch, the patches of x and the fold of its gradient by the unpatchify kernels."""
    if grad is None:
        return _zeros((x, weight, bias, pos), needs)
    D, C, *patch = weight.shape
    g = grad.reshape(grad.shape[:-1].numel(), D)
    # bf16 GEMMs accumulate in fp32 and round once; f16 ones do not on every CPU, and mixed operands need one type
    own = weight.dtype == x.dtype and x.dtype != torch.float16
    math_dtype = x.dtype if own else torch.promote_types(x.dtype, torch.float32)
    wide = g.to(math_dtype)
    grad_x = grad_weight = grad_bias = grad_pos = None
    K = weight.shape[1:].numel()
    if x.dim() == 1:
        shape: tuple[int, ...] = (g.shape[0], K)
    else:
        grids = [size // p for size, p in zip(x.shape[2:], patch, strict=True)]
        shape = (x.shape[0], math.prod(grids), K)
    if needs[0]:
        folded = (wide @ weight.to(math_dtype).flatten(1)).to(x.dtype)
        grad_x = unpatchify3d(folded.view(shape), grids, patch, C, "cthw")
    with_bias = needs[2] and bias is not None
    if needs[1]:
        # a column of ones beside the patches sums the bias's gradient in the same GEMM; fp32 ones lose by it
        one = int(with_bias and math_dtype == bias.dtype == torch.bfloat16)
        patches = torch.empty((*shape[:-1], K + one), dtype=x.dtype)
        patches[..., K:] = 1
        _move(_cpu.unpatchify3d_backward, patches[..., :K], x.contiguous(), grids, patch, C, "cthw")
        patches = patches.flatten(0, -2).to(math_dtype)
        both = patches.t() @ wide if one else (wide.t() @ patches).t()
        grad_weight = both[:K].t().to(weight.dtype, memory_format=torch.contiguous_format).view(weight.shape)
        if one:
            grad_bias, with_bias = both[K].clone(), False
    if with_bias:  # of `wide`: from bf16 to fp32 torch's sum takes 5 to 10 times as long
        grad_bias = wide.sum(0, dtype=bias.dtype)
    if needs[3] and pos is not None:
        whole = wide.view(grad.shape)
        grad_pos = (
            whole.sum(0, dtype=pos.dtype) if summed(pos, x) else whole.reshape(pos.shape).to(pos.dtype, copy=True)
        )
    return grad_x, grad_weight, grad_bias, grad_pos


def _move(kernel, tokens, y, grid, patch, channels, order):
    """Values between tokens (B, N, K) or (N, K), whose rows are contiguous, and the contiguous y."""
    if y.numel() == 0:
        return
    batch, stride_b = (1, 0) if tokens.dim() == 2 else (tokens.shape[0], tokens.stride(0))
    stride_n, itemsize, K = tokens.stride(-2), tokens.element_size(), tokens.shape[-1]
    tokens_at, y_at = tokens.data_ptr(), y.data_ptr()
    items: tuple[int, ...] = ()
    for i in range(0, len(grid), 3):
        t, h, w = grid[i : i + 3]
        items += (tokens_at, y_at, batch, t, h, w, stride_b, stride_n)
        tokens_at += t * h * w * stride_n * itemsize
        y_at += t * h * w * K * itemsize
    kernel(items, channels, tuple(patch), inside(channels, *patch, order), itemsize, torch.get_num_threads())


def unpatchify3d(tokens, grid, patch, channels, order):
    shape: tuple[int, ...] = (tokens.numel(),)
    if tokens.dim() == 3:
        (t, h, w), (pt, ph, pw) = grid, patch
        shape = (tokens.shape[0], channels, t * pt, h * ph, w * pw)
    y = torch.empty(shape, dtype=tokens.dtype)
    _move(_cpu.unpatchify3d_forward, tokens, y, grid, patch, channels, order)
    return y


def unpatchify3d_backward(grad, tokens, grid, patch, channels, order, needs):
    if grad is None or not needs[0]:
        return _zeros((tokens,), needs)
    out = torch.empty(tokens.shape, dtype=tokens.dtype)
    _move(_cpu.unpatchify3d_backward, out, grad.contiguous(), grid, patch, channels, order)
    return (out,)


def register() -> None:
    for name in ("patch_embed3d", "unpatchify3d"):
        _register(Impl(name, "cpu", lambda x, *_: on_cpu(x), globals()[name], globals()[f"{name}_backward"]))
