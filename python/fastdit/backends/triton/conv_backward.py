"""Backward of causal_conv3d on the Triton kernels.

The input's gradient is `convolve` over the output's gradient with transposed weights, one launch per phase of the
stride (1 without), each with its share of the taps. Zero padding: written where it belongs. Repeated pixels: written
over the padded extent in fp32, then folded by small adds along the borders. Norm and SiLU are computed again from x.

Launches: transposed weight 1, d_x 1 (d_cache 1), their norm and act 1 each; d_weight 2 and norm or layout 1; d_bias 2;
d_norm_weight 1. FLOPs: twice the forward's. Workspace: act(norm(x)) for d_weight; its parts, see kernels/conv_weight.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from fastdit.kernels import conv_weight

from .._video import empty, zeros_or_none
from . import conv
from ._config import Config, choose, tunable
from ._launch import INTERPRET, dot_precision, launch, processors
from .conv_norm import NORM, laid, normalize_backward, pixel_sums, sum_rows

tunable(
    "conv_weight_grad",  # BLOCK_P, M, N0, N1
    Config((64, 128, 64, 32), 8, 3), Config((64, 64, 64, 32), 4, 3), Config((64, 128, 128, 0), 8, 3),
    Config((64, 128, 128, 64), 8, 3), Config((32, 64, 64, 32), 4, 4), Config((32, 128, 128, 0), 8, 4),
    Config((64, 64, 128, 64), 8, 3), Config((32, 128, 64, 32), 8, 4),
)  # fmt: skip


def causal_conv3d_backward(
    grad, x, weight, bias, cache, norm_weight, residual,
    stride, dilation, padding, time_pad, space_pad, norm, norm_eps, act, algo, needs,
):  # fmt: skip
    tensors = (x, weight, bias, cache, norm_weight, residual)
    need_x, need_weight, need_bias, need_cache, need_norm, need_residual = (
        need and t is not None for need, t in zip(needs, tensors, strict=True)
    )
    if grad is None or grad.numel() == 0:
        return zeros_or_none(tensors, needs)
    stride, dilation = tuple(stride), tuple(dilation)
    d_residual = grad if need_residual else None
    d_bias = pixel_sums(grad, bias) if need_bias else None
    if (need_weight or need_x or need_cache or need_norm) and laid(grad)[0] not in (1, 2):
        grad = conv.video_ready(grad, None, None, None, 0.0, None)[0]
    cached = 0 if cache is None else cache.shape[2]
    d_weight = None
    if need_weight:
        start = (cached - padding[0], -padding[2], -padding[4])
        h, h_cache = conv.video_ready(x, cache, norm_weight, norm, norm_eps, act)
        d_weight = _weight_gradient(
            grad, h, h_cache, weight, stride, dilation, start, time_pad == "first", conv.PAD[space_pad]
        )

    d_x = d_cache = d_norm = None
    if need_x or need_cache or need_norm:
        folds = _folds(x.shape, cached, grad, weight, stride, dilation, padding, time_pad, space_pad)
        packed = conv.pack(weight, x.dtype, transposed=True)
        whole = (
            _folded(x, cached, grad, packed, stride, dilation, padding, folds)
            if any(f is not None for f in folds)
            else None
        )
        parts: list[Tensor] = []

        def finish(t, first, wanted):
            """Gradient of `t`, frames `first`... of cat(cache, x)."""
            if not wanted and not need_norm:
                return None
            out = empty(t)
            if whole is None:
                _transposed(out, grad, packed, stride, dilation, (padding[0] - cached + first, padding[2], padding[4]))
                given = out
            else:
                given = whole[:, :, first : first + t.shape[2]]
            if norm is not None or act is not None:
                target = out if wanted else None
                part = normalize_backward(
                    target, t, given, norm_weight, None, NORM[norm], norm_eps, act == "silu", need_norm
                )
                if part is not None:
                    parts.append(part)
            elif given is not out:
                out.copy_(given)
            return out if wanted else None

        d_cache = finish(cache, 0, need_cache) if cached else None
        if need_cache and d_cache is None:
            d_cache = torch.zeros_like(cache)
        d_x = finish(x, cached, need_x)
        if need_norm:
            d_norm = sum_rows(parts[0] if len(parts) == 1 else torch.cat(parts), 0, norm_weight)
    return d_x, d_weight, d_bias, d_cache, d_norm, d_residual


# ---- towards the weight -------------------------------------------------------------------------------
def _default(dtype: torch.dtype, C: int, N: int, arch: int) -> Config:
    if INTERPRET:  # pays by the step, not by the lane
        return Config((64, 64, *conv.split(C)))
    if dtype == torch.float32:
        n0, n1 = conv.split(C, 64)
        return Config((32, 64 if N > 32 else 32, n0, n1), 4, 2)
    n0, n1 = conv.split(C)
    m = 32 if N <= 32 and arch < 90 else 128 if -(-N // 128) * 128 == -(-N // 64) * 64 else 64
    return Config((64 if arch >= 90 else 32, m, n0, n1), 8 if m * (n0 + n1) > 64 * 96 else 4, 3)


def _weight_gradient(grad, x, cache, weight, stride, dilation, start, time_first: bool, space: int) -> Tensor:
    N, C, KT, KH, KW = weight.shape
    config = choose("conv_weight_grad", x, (x.dtype, C, N), lambda arch: _default(x.dtype, C, N, arch))
    block_p, m, n0, n1 = config.blocks
    B, _, T, H, W = grad.shape
    taps = KT * KH * KW
    programs = -(-N // m) * taps * -(-C // (n0 + n1))
    blocks = B * T * -(-(H * W) // block_p)
    splits = max(1, min(2 * processors(x) // programs, blocks // 4))
    parts = torch.empty((splits, N, taps, C), dtype=torch.float32, device=x.device)
    x_align, x_stride = laid(x)[1:]
    c_align, c_stride = laid(cache)[1:]
    if cache is not None:
        x_align = min(x_align, c_align)
    _, g_align, g_stride = laid(grad)
    launch(
        conv_weight.conv_weight_grad,
        (splits * programs, 1, 1),
        (parts, x, cache, grad),
        (
            splits, B, T, H, W, x.shape[2], 0 if cache is None else cache.shape[2], x.shape[3], x.shape[4], *start,
            x_stride[0], *x_stride[2:], c_stride[0], *c_stride[2:], g_stride[0], *g_stride[2:],
        ),
        (
            C, N, KT, KH, KW, *stride, *dilation, time_first, space, x_align, g_align, dot_precision(),
            block_p, m, n0, n1,
        ),
        config.warps,
        config.stages,
    )  # fmt: skip
    out = empty(weight)
    first = parts[0].view(N, KT, KH, KW, C).permute(0, 4, 1, 2, 3)
    conv.move_weight(out, first, splits, parts.stride(0))
    return out


# ---- towards the input --------------------------------------------------------------------------------
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


def _transposed(out: Tensor, grad, packed, stride, dilation, offset) -> None:
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
                conv.convolve(
                    view, grad, None, packed, (t.taps, h.taps, w.taps),
                    (corner, s[0], *(-s[2 + i] * p.between for i, p in enumerate(phase))), None, None, (1, 1, 1),
                    tuple(p.dilation for p in phase), tuple(p.start for p in phase), False, 0,
                )  # fmt: skip


def _reach(grad, weight, stride, dilation, axis: int) -> int:
    """Extent of the padded input that any output sees."""
    return (grad.shape[2 + axis] - 1) * stride[axis] + (weight.shape[2 + axis] - 1) * dilation[axis] + 1


def _folds(shape, cached, grad, weight, stride, dilation, padding, time_pad, space_pad) -> list:
    """Per axis (position of the padded input, the position whose pixel it repeats); None: zeros, nothing to fold."""
    folds: list = []
    for axis, mode in enumerate((time_pad, space_pad, space_pad)):
        n = shape[2 + axis] + (cached if axis == 0 else 0)
        before = padding[2 * axis] - (cached if axis == 0 else 0)
        if mode == "zeros" or not (before or padding[2 * axis + 1]):
            folds.append(None)
            continue
        pairs = []
        for i in range(-before, _reach(grad, weight, stride, dilation, axis) - before):
            target = (n - 1) - abs((n - 1) - abs(i)) if mode == "reflect" else min(max(i, 0), n - 1)
            if target != i:
                pairs.append((i + before, target + before))
        folds.append(pairs)
    return folds


def _folded(x, cached, grad, packed, stride, dilation, padding, folds) -> Tensor:
    """Gradient of act(norm(cat(cache, x))) in fp32: repeats of a frame or row are added to it."""
    shape, offset, before = [], [], []
    for axis in range(3):
        frames = cached if axis == 0 else 0
        before.append(padding[2 * axis] - frames)
        extent = x.shape[2 + axis] + frames
        # a folded axis is computed over all of its padded extent, which may end before the input does
        whole = max(_reach(grad, packed, stride, dilation, axis), before[axis] + extent)
        shape.append(extent if folds[axis] is None else whole)
        offset.append(before[axis] if folds[axis] is None else 0)
    wide = empty(x, (*x.shape[:2], *shape), torch.float32)
    _transposed(wide, grad, packed, stride, dilation, offset)
    for axis, fold in enumerate(folds):
        if fold is None:
            continue
        for position, target in fold:
            wide.select(2 + axis, target).add_(wide.select(2 + axis, position))
        wide = wide.narrow(2 + axis, before[axis], x.shape[2 + axis] + (cached if axis == 0 else 0))
    return wide
