"""causal_conv3d on the Triton kernels (kernels/conv.py).

Launches: 1 for the convolution; 1 to pack the weight unless it lies in channels_last_3d, (Cout, taps, C) in memory, in
x's dtype; 1 for norm and SiLU, or for a layout whose channels are not adjacent (NCDHW): it writes act(norm(cat(cache,
x))) in channels_last_3d, 2 * itemsize bytes a value, once for all taps. Strided 2-byte loads would move as much per tap
and fill no cp.async; x itself is read in place where it is channels_last_3d and has neither norm nor act.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

from fastdit.kernels import conv as kernels, conv_weight

from .._conv import NORM, Kernels, backward, forward, norms
from .._facts import kept
from .._video import next_cache_backward
from ..registry import Impl, register as _register
from . import conv_norm
from ._config import Config, choose, tunable
from ._launch import INTERPRET, Launch, dot_precision, unfit
from ._tiles import power
from .conv_norm import WIDEST, laid

tunable(
    "conv",  # BLOCK_M, N0, N1, K
    Config((256, 64, 32, 32), 8, 4), Config((128, 64, 32, 32), 4, 4), Config((128, 128, 0, 32), 8, 4),
    Config((128, 128, 64, 64), 8, 3), Config((128, 64, 0, 64), 4, 4), Config((128, 128, 0, 64), 8, 4),
    Config((128, 128, 64, 32), 8, 4), Config((64, 64, 0, 32), 4, 4),
)  # fmt: skip


def split(width: int, most: int = 192) -> tuple[int, int]:
    """N0 + N1 <= most that covers `width` best: a tile costs its lanes, and about 32 for reading the other operand."""
    sums = [(n, 0) for n in (16, 32, 64, 128)] + [(32, 16), (64, 32), (128, 32), (128, 64)]
    fits = [p for p in sums if sum(p) <= most]
    return min(fits, key=lambda p: (-(-width // sum(p)) * (sum(p) + 32), -sum(p)))


def _default(dtype: torch.dtype, C: int, N: int, arch: int) -> Config:
    if INTERPRET:  # pays by the step, not by the lane
        return Config((64, *split(N), max(16, min(power(C), 128))))
    if dtype == torch.float32:
        n0, n1 = split(N, 96)
        return Config((64, n0, n1, 16), 4, 3)
    n0, n1 = split(N)
    k = 64 if C % 64 == 0 and arch >= 90 else 32 if C > 16 else 16
    if n0 + n1 > 96:
        return Config((128, n0, n1, k), 8, 3)
    if arch >= 90 and n0 + n1 >= 64:
        return Config((256, n0, n1, k), 8, 4)
    return Config((128, n0, n1, k), 4, 4)  # 8 warps spill on sm_80: the compiler wants two blocks there


def video_ready(x: Tensor, cache, norm_weight, norm, norm_eps: float, act) -> tuple[Tensor, Tensor | None]:
    """(x, cache) with adjacent channels, norm and act applied: as they are, or act(norm(cat of both)) written once."""
    if cache is not None and cache.shape[2] == 0:
        cache = None
    if norm is None and act is None and laid(x)[0] in (1, 2) and (cache is None or laid(cache)[0] in (1, 2)):
        return x, cache
    B, C, T, H, W = x.shape
    T += 0 if cache is None else cache.shape[2]
    h = torch.empty((B, C, T, H, W), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    conv_norm.normalize(h, x, cache, norm_weight, None, None, NORM[norm], norm_eps, act == "silu")
    return h, None


def pack(weight: Tensor, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    """(N, taps, C) in memory, seen as (N, C, taps) like the weight; transposed: (C, taps, N), seen as (C, N, taps)."""
    given = weight.transpose(0, 1) if transposed else weight
    if weight.dtype == dtype and given.stride(1) == 1:
        return given
    N, C = given.shape[:2]
    out = torch.empty((N, *given.shape[2:], C), dtype=dtype, device=weight.device).permute(0, 4, 1, 2, 3)
    move_weight(out, given)
    return out


def move_weight(out: Tensor, given: Tensor, parts: int = 1, distance: int = 0, reads: Tensor | None = None) -> None:
    """out[n, c, tap] = given's, or the sum of `parts` of them `distance` elements apart, which `reads` holds."""
    _move(out, given, parts, distance)(out, given if reads is None else reads)


@kept
def _move(out: Tensor, given: Tensor, parts: int, distance: int) -> Launch:
    N, C, KT, KH, KW = out.shape
    taps = power(KT * KH * KW)
    block = min(power(C), max(16, 2048 // taps))
    return Launch(
        conv_weight.move_weight,
        (N, -(-C // block), 1),
        (parts, C, distance, *given.stride(), *out.stride()),
        (KT, KH, KW, given.stride(1) == 1, out.stride(1) == 1, taps, block),
    )


def convolve(
    y, x, cache, weight, kernel, w_stride, bias, residual, stride, dilation, start, time_first: bool, space: int
) -> None:
    """y over cat(cache, x), channels adjacent; start: input index of tap 0 for output 0, per axis.

    weight: channels adjacent; w_stride: element of tap 0, then strides of (N, KT, KH, KW), which may be negative.
    """
    plan = _plan(
        x, y, cache, residual, kernel, w_stride, stride, dilation, start, time_first, space, dot_precision()
    )  # fmt: skip
    plan(y, x, cache, weight, bias, residual)


@kept
def _plan(
    x, y, cache, residual, kernel, w_stride, stride, dilation, start, time_first: bool, space: int, precision: str
) -> Launch:
    B, N, T, H, W = y.shape
    C, frames, cached = x.shape[1], x.shape[2], 0 if cache is None else cache.shape[2]
    config = choose("conv", x, (x.dtype, C, N), lambda arch: _default(x.dtype, C, N, arch))
    block_m, n0, n1, k = config.blocks
    _, x_align, x_stride = laid(x)
    _, c_align, c_stride = laid(cache)
    low = gcd(16 // x.element_size(), *w_stride)
    y_layout, y_align, y_stride = laid(y)
    r_layout, r_align, r_stride = laid(residual)
    return Launch(
        kernels.conv,
        (B * T * -(-(H * W) // block_m) * -(-N // (n0 + n1)), 1, 1),
        (
            T, H, W, frames, cached, *x.shape[3:], *start,
            x_stride[0], *x_stride[2:], c_stride[0], *c_stride[2:], *w_stride, *y_stride, *r_stride,
        ),
        (
            C, N, *kernel, *stride, *dilation, time_first, space, x_align if cache is None else min(x_align, c_align),
            low, y_layout, y_align, r_layout, r_align, precision, block_m, n0, n1, k,
        ),
        config.warps,
        config.stages,
    )  # fmt: skip


def register() -> None:
    from . import conv_backward  # which needs what is defined here

    k = Kernels(
        video_ready, pack, convolve, conv_backward.weight_gradient, conv_norm.normalize, conv_norm.normalize_backward,
        conv_norm.statistics, conv_norm.group_backward, conv_norm.sum_rows, conv_norm.pixel_sums,
    )  # fmt: skip
    norm_silu, norm_silu_backward, next_cache = norms(k)
    _register(Impl("causal_conv3d", "triton", _supports, forward(k), backward(k)))
    _register(Impl("next_cache", "triton", _moves, next_cache, next_cache_backward))
    _register(Impl("norm_silu", "triton", _supports_norm, norm_silu, norm_silu_backward))


def _moves(x, *_):
    return unfit(x)


def _supports_norm(x, weight, bias, norm, *_):
    if norm != "group" and x.shape[1] > WIDEST:
        return f"norm='{norm}' wants a pixel's channels in one tile; got {x.shape[1]}, at most {WIDEST}"
    return unfit(x)


def _supports(x, weight, bias, cache, norm_weight, residual, *rest):
    if rest[-1].startswith("winograd"):
        return "has no winograd; algo='auto' takes direct"
    if rest[5] is not None and x.shape[1] > WIDEST:
        return f"norm='{rest[5]}' wants a pixel's channels in one tile; got {x.shape[1]}, at most {WIDEST}"
    return unfit(x)
