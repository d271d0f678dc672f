"""Where pixels, padding and channels lie: device functions of the conv kernels.

LAYOUT of a tensor (B, C, T, H, W), told by the adapter:
    0   any strides
    1   channels adjacent, the pixels of a frame one dense run of them (channels_last_3d, and its slices along B and T)
    2   channels adjacent (crops of such a tensor)
    3   pixels adjacent, a frame of a channel one dense run (NCDHW)
ALIGN: what every stride but the adjacent one is a multiple of: 16 bytes' worth of elements, or 1.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import multiple


@triton.jit
def pixel_offset(pixel, width, s_h, s_w, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    """Of pixels h * width + w of a frame, in elements."""
    if LAYOUT == 3:
        at = pixel.to(tl.int64)
    elif LAYOUT == 1:
        at = pixel * multiple(s_w, ALIGN)
    else:
        at = (pixel // width) * multiple(s_h, ALIGN) + (pixel % width) * multiple(s_w, ALIGN)
    return at


@triton.jit
def channel_offset(channel, s_c, LAYOUT: tl.constexpr, ALIGN: tl.constexpr):
    if LAYOUT == 1 or LAYOUT == 2:
        at = channel.to(tl.int64)
    elif LAYOUT == 3:
        at = channel * multiple(s_c, ALIGN)
    else:
        at = channel * s_c
    return at


@triton.jit
def pixel_count(
    height, width, A_LAYOUT: tl.constexpr, A_ALIGN: tl.constexpr, B_LAYOUT: tl.constexpr, B_ALIGN: tl.constexpr
):
    """Of a frame; where a tensor's pixels are adjacent its ALIGN divides it, and masks are known to be as wide."""
    count = height * width
    if A_LAYOUT == 3:
        count = multiple(count, A_ALIGN)
    if B_LAYOUT == 3:
        count = multiple(count, B_ALIGN)
    return count


@triton.jit
def taps_before(start, limit, DILATION: tl.constexpr, TAPS: tl.constexpr):
    """How many of start, start + DILATION, ... (TAPS of them) lie below `limit`."""
    return tl.minimum((tl.maximum(limit - start, 0) + DILATION - 1) // DILATION, TAPS)


@triton.jit
def fold(i, n, REFLECT: tl.constexpr):
    """The index of [0, n) whose value padding repeats at i."""
    if REFLECT:
        i = (n - 1) - tl.abs((n - 1) - tl.abs(i))
    else:
        i = tl.minimum(tl.maximum(i, 0), n - 1)
    return i


@triton.jit
def silu(z):
    return z / (1.0 + tl.exp(-z))


@triton.jit
def silu_slope(z):
    """d silu(z) / dz."""
    s = 1.0 / (1.0 + tl.exp(-z))
    return s * (1.0 + z * (1.0 - s))
