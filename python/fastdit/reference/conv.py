"""The conv family in plain PyTorch: the formula is the documentation.

Source: diffusers autoencoder_kl_{wan,cogvideox,hunyuan_video,hunyuanvideo15,ltx,ltx2,mochi}.py
"""

import torch
import torch.nn.functional as F

NORM_EPS = {"channel_l2": 1e-12, "channel_rms": 1e-8, "group": 1e-6}


def _triple(value):
    return (value,) * 3 if isinstance(value, int) else tuple(value)


def _channels(vector, like):
    """(C,) -> (C, 1, ..., 1) in like's dtype, to broadcast over (B, C, ...)."""
    return vector.to(like.dtype).reshape(-1, *[1] * (like.dim() - 2))


def _norm(x, norm, weight, bias, groups, eps):
    """x (B, C, ...) in compute precision."""
    eps = NORM_EPS[norm] if eps is None else eps
    if norm == "channel_l2":
        y = x / torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(eps) * x.shape[1] ** 0.5
    elif norm == "channel_rms":
        y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + eps)
    else:
        g = x.reshape(x.shape[0], groups, -1)
        g = (g - g.mean(-1, keepdim=True)) * torch.rsqrt(g.var(-1, correction=0, keepdim=True) + eps)
        y = g.reshape(x.shape)
    if weight is not None:
        y = y * _channels(weight, y)
    return y if bias is None else y + _channels(bias, y)


def _memory_format(x):
    """Channels last is told by the strides, so that frame slices of a channels_last_3d tensor keep it."""
    last = x.shape[1] > 1 and x.stride(1) == 1 and x.stride(-1) >= x.shape[1]
    if not last:
        return torch.contiguous_format
    return torch.channels_last_3d if x.dim() == 5 else torch.channels_last


def _pad_index(n, before, after, mode, device):
    """Positions of the padded axis in [0, n): edge repeats the border, reflect mirrors at it."""
    i = torch.arange(-before, n + after, device=device)
    if mode == "edge":
        return i.clamp(0, n - 1)
    return (n - 1) - ((n - 1) - i.abs()).abs()


def _pad(x, padding, time_pad, space_pad):
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
    x,
    weight,
    bias=None,
    *,
    stride=1,
    dilation=1,
    padding=None,
    time_pad="zeros",
    space_pad="zeros",
    cache=None,
    norm=None,
    norm_weight=None,
    norm_eps=None,
    act=None,
    residual=None,
    algo="auto",
):
    """y = conv3d(pad(act(norm(cat(cache, x))))) + bias + residual; see `fastdit.ops.causal_conv3d`.

    Sums are in promote(x.dtype, fp32) and rounded once. What enters the products has x.dtype, as everywhere a matrix
    product is: the activated input is rounded to it once, a weight of another dtype is too.
    """
    kernel = weight.shape[2:]
    t0, t1, h0, h1, w0, w1 = padding or (kernel[0] - 1, 0, *[k // 2 for k in kernel[1:] for _ in range(2)])
    memory_format = _memory_format(x)
    compute = torch.promote_types(x.dtype, torch.float32)
    h = (x if cache is None else torch.cat([cache, x], 2)).to(compute)
    if norm is not None:
        h = _norm(h, norm, norm_weight, None, None, norm_eps)
    if act == "silu":
        h = F.silu(h)
    h = h.to(x.dtype).to(compute)
    t0 -= 0 if cache is None else cache.shape[2]
    h = _pad(h, (t0, t1, h0, h1, w0, w1), time_pad, space_pad)
    w = weight.to(x.dtype).to(compute)
    y = F.conv3d(h, w, None if bias is None else bias.to(compute), _triple(stride), 0, _triple(dilation))
    if residual is not None:
        y = y + residual.to(compute)
    return y.to(x.dtype).contiguous(memory_format=memory_format)


def next_cache(x, cache, k_t):
    """The last min(k_t - 1, all) frames of cat(cache, x), in memory of their own."""
    keep = k_t - 1
    missing = max(keep - x.shape[2], 0)
    tail = x[:, :, x.shape[2] - min(keep, x.shape[2]) :]
    if cache is not None and missing:
        tail = torch.cat([cache[:, :, max(cache.shape[2] - missing, 0) :], tail], 2)
    return tail.clone(memory_format=_memory_format(x))


def norm_silu(x, *, norm="channel_l2", weight, bias=None, groups=32, eps=None):
    """y = silu(norm(x) * weight + bias); x (B, C, ...)."""
    h = x.to(torch.promote_types(x.dtype, torch.float32))
    return F.silu(_norm(h, norm, weight, bias, groups, eps)).to(x.dtype).contiguous(memory_format=_memory_format(x))
