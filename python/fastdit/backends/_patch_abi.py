"""What the compiled backends (cpu, cuda) are told of a patch call: each video of it is one run of ints.

Mirrors csrc/bindings/patch.h.
"""

from __future__ import annotations

import functools
import math

from .cpu._abi import DTYPE, pointer


def token_strides(t):
    """Of (N, D) or (B, N, D), along B and N."""
    return t.stride()[:2] if t.dim() == 3 else (0, t.stride(0))


def items(video, channels, patch, grids, rows):
    """(video, batch, t, h, w, its 5 strides, rows, its 2 strides) per video. video: (B, C, T, H, W), or flat for a list
    whose grids stand in `grids`; rows: what stands per token, or None."""
    pt, ph, pw = patch
    at, rows_at = video.data_ptr(), pointer(rows)
    stride_b, stride_n = (0, 0) if rows is None else token_strides(rows)
    if video.dim() == 5:
        B, _, T, H, W = video.shape
        return (at, B, T // pt, H // ph, W // pw, *video.stride(), rows_at, stride_b, stride_n)
    found: tuple[int, ...] = ()
    for i in range(0, len(grids), 3):
        t, h, w = grids[i : i + 3]
        T, H, W = t * pt, h * ph, w * pw
        found += (at, 1, t, h, w, 0, T * H * W, H * W, W, 1, rows_at, 0, stride_n)
        at += channels * T * H * W * video.element_size()
        if rows is not None:
            rows_at += t * h * w * stride_n * rows.element_size()
    return found


def embed_shape(x, weight, grids):
    """Of the tokens."""
    D, _, pt, ph, pw = weight.shape
    if x.dim() == 1:
        return sum(math.prod(grids[i : i + 3]) for i in range(0, len(grids), 3)), D
    B, _, T, H, W = x.shape
    return B, T // pt * (H // ph) * (W // pw), D


def embed_arguments(x, weight, bias, pos, y, grids, threads=1):
    """bias and y contiguous."""
    D, C, *patch = weight.shape
    dtype = DTYPE[x.dtype]
    return (
        items(x, C, patch, grids, pos), weight.data_ptr(), weight.stride(), pointer(bias), y.data_ptr(), D, C,
        tuple(patch), dtype, DTYPE[weight.dtype], dtype if bias is None else DTYPE[bias.dtype],
        dtype if pos is None else DTYPE[pos.dtype], threads,
    )  # fmt: skip


@functools.cache
def inside(channels, pt, ph, pw, order):
    """Strides of c, t, h, w inside a token whose values lie in this order."""
    size, stride, K = dict(zip("cthw", (channels, pt, ph, pw), strict=True)), {}, 1
    for letter in reversed(order):
        stride[letter] = K
        K *= size[letter]
    return tuple(stride[letter] for letter in "cthw")
