"""The weight's gradient on the Triton kernels; the rest of the backward is ../_conv.py.

Launches: transposed weight 1, d_x 1 (d_cache 1), their norm and act 1 each; d_weight 2 and norm or layout 1; d_bias 2;
d_norm_weight 1. FLOPs: twice the forward's. Workspace: act(norm(x)) for d_weight; its parts, see kernels/conv_weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastdit.kernels import conv_weight

from .._video import empty
from . import conv
from ._config import Config, choose, tunable
from ._launch import INTERPRET, dot_precision, launch, processors
from .conv_norm import laid

tunable(
    "conv_weight_grad",  # BLOCK_P, M, N0, N1
    Config((64, 128, 64, 32), 8, 3), Config((64, 64, 64, 32), 4, 3), Config((64, 128, 128, 0), 8, 3),
    Config((64, 128, 128, 64), 8, 3), Config((32, 64, 64, 32), 4, 4), Config((32, 128, 128, 0), 8, 4),
    Config((64, 64, 128, 64), 8, 3), Config((32, 128, 64, 32), 8, 4),
)  # fmt: skip


def _default(dtype: torch.dtype, C: int, N: int, arch: int) -> Config:
    if INTERPRET:  # pays by the step, not by the lane
        return Config((64, 64, *conv.split(C)))
    if dtype == torch.float32:
        n0, n1 = conv.split(C, 64)
        return Config((32, 64 if N > 32 else 32, n0, n1), 4, 2)
    n0, n1 = conv.split(C)
    m = 32 if N <= 32 and arch < 90 else 128 if -(-N // 128) * 128 == -(-N // 64) * 64 else 64
    positions = 32 if arch < 90 or (arch >= 120 and m == 128) else 64
    return Config((positions, m, n0, n1), 8 if m * (n0 + n1) > 64 * 96 else 4, 3)


def weight_gradient(grad, x, cache, weight, stride, dilation, start, time_first: bool, space: int) -> Tensor:
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
    conv.move_weight(out, first, splits, parts.stride(0), parts)
    return out
