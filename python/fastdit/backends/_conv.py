"""The conv family around the kernels of a backend that convolves videos with adjacent channels: Triton's and CUDA's.

The input's gradient is a convolution of the output's gradient with transposed weights, one launch per phase of the
stride (1 without), each with its share of the taps. Zero padding: written where it belongs. Repeated pixels: written
over the padded extent in fp32, then folded by small adds along the borders. Norm and SiLU are computed again from x.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.conv import NORM_EPS, output_shape
from ._video import asked, empty, input_gradients, zeros_or_none

PAD = {"zeros": 0, "first": 1, "replicate": 1, "reflect": 2}
NORM = {None: 0, "channel_l2": 1, "channel_rms": 2, "group": 3}


class Kernels(NamedTuple):
    """What a backend brings. Videos are (B, C, T, H, W), weights (N, C, KT, KH, KW), by strides."""

    ready: Callable
    """(x, cache, norm_weight, norm, eps, act) -> the same two as `convolve` reads them, norm and act applied."""
    pack: Callable
    """(weight, dtype, transposed=False) -> as `convolve` reads it; transposed: (C, N, taps)."""
    convolve: Callable
    """(y, x, cache, weight, kernel, w_stride, bias, residual, stride, dilation, start, time_first, space): y over
    cat(cache, x). w_stride: element of tap 0, then strides of (N, KT, KH, KW), which may be negative. start: input
    index of tap 0 for output 0, per axis. space: of PAD."""
    weight_gradient: Callable
    """(grad, x, cache, weight, stride, dilation, start, time_first, space) -> d_weight; videos ready."""
    normalize: Callable
    """(y, x, cache, weight, bias, stats, norm, eps, act): y = act(norm(the last frames of cat(cache, x))), all x."""
    normalize_backward: Callable
    """(dx or None, x, g, weight, bias, norm, eps, act, sums) -> parts (programs, 2, C) of the sums for weight and bias,
    or None; dx may be g."""
    statistics: Callable
    """(x, groups, eps) -> (B, 2, C): mean and 1 / deviation of each channel's group."""
    group_backward: Callable
    """(dx or None, x, g, weight, bias, groups, eps) -> (B, 2, C), each sample's sums for weight and bias."""
    sum_rows: Callable
    """(parts, which, like) -> the sum of parts[:, which] (rows, C), in like's dtype."""
    pixel_sums: Callable
    """(g, like) -> the sum of g over all but the channels, in like's dtype."""


_shape = lru_cache(4096)(output_shape)


def forward(k: Kernels) -> Callable:
    """causal_conv3d in the order of its schema."""

    def causal_conv3d(
        x, weight, bias, cache, norm_weight, residual,
        stride, dilation, padding, time_pad, space_pad, norm, norm_eps, act, algo,
    ):  # fmt: skip
        stride, dilation, padding = tuple(stride), tuple(dilation), tuple(padding)
        y = empty(x, _shape(x.shape, weight.shape, stride, dilation, padding))
        if y.numel():
            start = ((0 if cache is None else cache.shape[2]) - padding[0], -padding[2], -padding[4])
            x, cache = k.ready(x, cache, norm_weight, norm, norm_eps, act)
            packed = k.pack(weight, x.dtype)
            n, _, *taps = packed.stride()
            k.convolve(
                y, x, cache, packed, packed.shape[2:], (0, n, *taps), bias, residual,
                stride, dilation, start, time_pad == "first", PAD[space_pad],
            )  # fmt: skip
        return y

    return causal_conv3d


def backward(k: Kernels) -> Callable:
    def causal_conv3d_backward(
        grad, x, weight, bias, cache, norm_weight, residual,
        stride, dilation, padding, time_pad, space_pad, norm, norm_eps, act, algo, needs,
    ):  # fmt: skip
        tensors = (x, weight, bias, cache, norm_weight, residual)
        need_x, need_weight, need_bias, need_cache, need_norm, need_residual = asked(tensors, needs)
        if grad is None or grad.numel() == 0:
            return zeros_or_none(tensors, needs)
        stride, dilation = tuple(stride), tuple(dilation)
        d_residual = grad if need_residual else None
        d_bias = k.pixel_sums(grad, bias) if need_bias else None
        if need_weight or need_x or need_cache or need_norm:
            grad = k.ready(grad, None, None, None, 0.0, None)[0]
        d_weight = None
        if need_weight:
            start = ((0 if cache is None else cache.shape[2]) - padding[0], -padding[2], -padding[4])
            h, h_cache = k.ready(x, cache, norm_weight, norm, norm_eps, act)
            d_weight = k.weight_gradient(
                grad, h, h_cache, weight, stride, dilation, start, time_pad == "first", PAD[space_pad]
            )

        d_x = d_cache = d_norm = None
        if need_x or need_cache or need_norm:
            packed = k.pack(weight, x.dtype, transposed=True)
            parts: list[Tensor] = []

            def into(out, offset):
                _transposed(k, out, grad, packed, stride, dilation, offset)

            def prologue(t, given, out):
                part = k.normalize_backward(
                    out, t, given, norm_weight, None, NORM[norm], norm_eps, act == "silu", need_norm
                )
                if part is not None:
                    parts.append(part)

            d_x, d_cache = input_gradients(
                grad, x, cache, weight, (need_x, need_cache, need_norm), stride, dilation, padding, time_pad, space_pad,
                into, None if norm is None and act is None else prologue,
            )  # fmt: skip
            if need_norm:
                d_norm = k.sum_rows(parts[0] if len(parts) == 1 else torch.cat(parts), 0, norm_weight)
        return d_x, d_weight, d_bias, d_cache, d_norm, d_residual

    return causal_conv3d_backward


class _Phase(NamedTuple):
    """Along one axis: the outputs (first, every step-th) that meet the same taps, as a convolution without stride."""

    first: int
    taps: int
    last_tap: int
    between: int  # taps of the weight from one to the next
    dilation: int
    start: int


def _phases(count: int, taps: int, step: int, dilation: int, offset: int) -> list[_Phase]:
    """Of `count` positions of the padded input, `offset` being the first of them."""
    found = []
    for phase in range(min(step, count)):
        hits = [k for k in range(taps) if (phase + offset - k * dilation) % step == 0]
        between = step // gcd(step, dilation)
        last = hits[-1] if hits else 0
        start = (phase + offset - last * dilation) // step
        found.append(_Phase(phase, len(hits), last, between, between * dilation // step, start))
    return found


def _transposed(k: Kernels, out: Tensor, grad, packed, stride, dilation, offset) -> None:
    """out (B, C, ...): gradient of the padded input from `offset` (t, h, w) on."""
    if out.numel() == 0:
        return
    axes = [_phases(out.shape[2 + i], packed.shape[2 + i], stride[i], dilation[i], offset[i]) for i in range(3)]
    for t in axes[0]:
        for h in axes[1]:
            for w in axes[2]:
                phase = (t, h, w)
                view = out[:, :, t.first :: stride[0], h.first :: stride[1], w.first :: stride[2]]
                if min(p.taps for p in phase) == 0:
                    view.zero_()
                    continue
                s = packed.stride()
                corner = sum(s[2 + i] * p.last_tap for i, p in enumerate(phase))
                k.convolve(
                    view, grad, None, packed, (t.taps, h.taps, w.taps),
                    (corner, s[0], *(-s[2 + i] * p.between for i, p in enumerate(phase))), None, None, (1, 1, 1),
                    tuple(p.dilation for p in phase), tuple(p.start for p in phase), False, 0,
                )  # fmt: skip


# ---- norms --------------------------------------------------------------------------------------------
def video(t: Tensor, group: bool = False) -> Tensor:
    """Any norm_silu input as (B, C, T, H, W); without pixels the rows are them, where no statistics forbid it."""
    if t.dim() == 5:
        return t
    if t.dim() == 4:
        return t[:, :, None]
    if t.dim() == 3:
        return t[:, :, None, None]
    return t[:, :, None, None, None] if group else t.t()[None, :, None, None]


def norms(k: Kernels) -> tuple[Callable, Callable, Callable]:
    """norm_silu, its backward and next_cache in the order of their schemas."""

    def norm_silu(x, weight, bias, norm, groups, eps):
        y = empty(x)
        if y.numel():
            group = norm == "group"
            eps = NORM_EPS[norm] if eps is None else eps
            x, out = video(x, group), video(y, group)
            stats = k.statistics(x, groups, eps) if group else None
            k.normalize(out, x, None, weight, bias, stats, NORM[norm], eps, True)
        return y

    def norm_silu_backward(grad, x, weight, bias, norm, groups, eps, needs):
        need_x, need_weight, need_bias = asked((x, weight, bias), needs)
        if grad is None or grad.numel() == 0:
            return zeros_or_none((x, weight, bias), needs)
        group = norm == "group"
        d_x = empty(x) if need_x else None
        eps = NORM_EPS[norm] if eps is None else eps
        x, g = video(x, group), video(grad, group)
        out = None if d_x is None else video(d_x, group)
        if group:
            parts = k.group_backward(out, x, g, weight, bias, groups, eps)
        else:
            parts = k.normalize_backward(out, x, g, weight, bias, NORM[norm], eps, True, need_weight or need_bias)
        d_weight = k.sum_rows(parts, 0, weight) if need_weight else None
        return d_x, d_weight, k.sum_rows(parts, 1, bias) if need_bias else None

    def next_cache(x, cache, k_t):
        new = min(k_t - 1, x.shape[2])
        old = 0 if cache is None else min(k_t - 1 - new, cache.shape[2])
        out = empty(x, (*x.shape[:2], old + new, *x.shape[3:]))
        if out.numel():
            x = x if new == x.shape[2] else x[:, :, x.shape[2] - new :]
            k.normalize(out, x, cache, None, None, None, 0, 0.0, False)
        return out

    return norm_silu, norm_silu_backward, next_cache
