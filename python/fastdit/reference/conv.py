"""The conv family in plain PyTorch: causal 3-D convolution over a virtual concat, its cache, and norm + SiLU.

Sources: diffusers autoencoder_kl_{wan,cogvideox,hunyuan_video,hunyuanvideo15,ltx,ltx2,mochi}.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

NORM_EPS = {None: 0.0, "channel_l2": 1e-12, "channel_rms": 1e-8, "group": 1e-6}
TILES_CHANNELS = 32  # of input and output: fewer do not pay for the transform of Winograd's tiles
_ALONG = {"winograd": (1,), "winograd2d": (1, 2)}


def triple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) * 3 if isinstance(value, int) else tuple(value)


def causal_padding(kernel: tuple[int, ...]) -> tuple[int, ...]:
    """k_t - 1 frames before and none after; k // 2 on each side of H and W."""
    return (kernel[0] - 1, 0, kernel[1] // 2, kernel[1] // 2, kernel[2] // 2, kernel[2] // 2)


def memory_format(x: Tensor) -> torch.memory_format:
    """Of an output. Told by two strides, so that frame slices of a channels_last_3d tensor keep their format."""
    if x.dim() < 4 or x.shape[1] == 1 or x.stride(1) != 1 or x.stride(-1) < x.shape[1]:
        return torch.contiguous_format
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def output_shape(x_shape, weight_shape, stride, dilation, padding) -> tuple:
    """(B, Cout, T, H, W); an empty axis stays empty where padding does not fill a window."""
    out = [x_shape[0], weight_shape[0]]
    for i in range(3):
        n = x_shape[2 + i] + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (weight_shape[2 + i] - 1)
        n = n if stride[i] == 1 else (n - 1) // stride[i] + 1
        out.append(max(n, 0) if x_shape[2 + i] == 0 else n)
    return tuple(out)


def misfit(algo: str, weight_shape: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> int:
    """The first of the axes (T, H, W) that an algo does not work on; 0: it works."""
    for i in _ALONG.get(algo, ()):
        if (weight_shape[i + 2], stride[i], dilation[i]) != (3, 1, 1):
            return i
    return 0


def _channels(vector: Tensor, like: Tensor) -> Tensor:
    """(C,) -> (C, 1, ..., 1) in like's dtype, to broadcast over (B, C, ...)."""
    return vector.to(like.dtype).reshape(-1, *[1] * (like.dim() - 2))


def _norm(x: Tensor, norm: str, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float | None) -> Tensor:
    """x (B, C, ...) in compute precision."""
    eps = NORM_EPS[norm] if eps is None else eps
    if norm == "channel_l2":
        y = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(eps) * x.shape[1] ** 0.5
    elif norm == "channel_rms":
        y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
    else:
        g = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
        over = tuple(range(2, g.dim()))
        g = g - g.mean(over, keepdim=True)
        y = (g * torch.rsqrt(g.square().mean(over, keepdim=True) + eps)).reshape(x.shape)
    if weight is not None:
        y = y * _channels(weight, y)
    return y if bias is None else y + _channels(bias, y)


def _pad_index(n: int, before: int, after: int, mode: str, device: torch.device) -> Tensor:
    """Positions of the padded axis in [0, n): edge repeats the border, reflect mirrors at it."""
    i = torch.arange(-before, n + after, device=device)
    return i.clamp(0, n - 1) if mode == "edge" else (n - 1) - ((n - 1) - i.abs()).abs()


def _pad(x: Tensor, padding: tuple[int, ...], time_pad: str, space_pad: str) -> Tensor:
    t0, t1, h0, h1, w0, w1 = padding
    if time_pad == "first" and (t0 or t1):
        x = x.index_select(2, _pad_index(x.shape[2], t0, t1, "edge", x.device))
        t0 = t1 = 0
    if space_pad != "zeros":
        mode = "edge" if space_pad == "replicate" else "reflect"
        if h0 or h1:
            x = x.index_select(3, _pad_index(x.shape[3], h0, h1, mode, x.device))
        if w0 or w1:
            x = x.index_select(4, _pad_index(x.shape[4], w0, w1, mode, x.device))
        h0 = h1 = w0 = w1 = 0
    return F.pad(x, (w0, w1, h0, h1, t0, t1))


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    padding: tuple[int, ...] | None = None,
    time_pad: str = "zeros",
    space_pad: str = "zeros",
    cache: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    algo: str = "auto",
) -> Tensor:
    """y = conv3d(pad(act(norm(cat(cache, x))))) + bias + residual; see `fastdit.ops.causal_conv3d`.

    Sums are in promote(x.dtype, fp32) and rounded once. What enters the products has x.dtype, as in every matrix
    product: the activated input is rounded to it once, and so is a weight of another dtype. `algo` is not read here.
    """
    stride, dilation = triple(stride), triple(dilation)
    padding = tuple(padding) if padding is not None else causal_padding(tuple(weight.shape[2:]))
    compute = torch.promote_types(x.dtype, torch.float32)
    if 0 in x.shape:
        empty = x.new_empty(output_shape(x.shape, weight.shape, stride, dilation, padding))
        return (empty + 0 * (x.sum() + weight.sum())).to(x.dtype).contiguous(memory_format=memory_format(x))
    h = (x if cache is None else torch.cat([cache, x], 2)).to(compute)
    if norm is not None:
        h = _norm(h, norm, norm_weight, None, 1, norm_eps)
    if act == "silu":
        h = F.silu(h)
    h = h.to(x.dtype).to(compute)
    before = padding[0] - (0 if cache is None else cache.shape[2])
    h = _pad(h, (before, *padding[1:]), time_pad, space_pad)
    w, b = weight.to(x.dtype).to(compute), None if bias is None else bias.to(compute)
    y = F.conv3d(h, w, b, stride, 0, dilation)
    if residual is not None:
        y = y + residual.to(compute)
    return y.to(x.dtype).contiguous(memory_format=memory_format(x))


def next_cache(x: Tensor, cache: Tensor | None, k_t: int) -> Tensor:
    """The last k_t - 1 frames of cat(cache, x), or all there are, in memory of their own."""
    new = min(k_t - 1, x.shape[2])
    tail = x[:, :, x.shape[2] - new :]
    if cache is not None:
        old = min(k_t - 1 - new, cache.shape[2])
        tail = torch.cat([cache[:, :, cache.shape[2] - old :], tail], 2)
    return tail.clone(memory_format=memory_format(x))


def norm_silu(
    x: Tensor,
    *,
    norm: str = "channel_l2",
    weight: Tensor | None,
    bias: Tensor | None = None,
    groups: int = 32,
    eps: float | None = None,
) -> Tensor:
    """y = silu(norm(x) * weight + bias), one rounding; x (B, C, ...)."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.silu(_norm(h, norm, weight, bias, groups, eps)).to(x.dtype).contiguous(memory_format=memory_format(x))
