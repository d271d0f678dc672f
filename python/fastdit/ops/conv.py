"""Causal 3-D convolution of the video VAEs with everything around it fused: cache, padding, norm, SiLU, bias, residual.

x is (B, C, T, H, W) in any strides; NCDHW and channels_last_3d are the two layouts that outputs have. The CPU kernels
read both and are fastest in channels_last_3d, where a pixel's channels are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.conv import memory_format, output_shape
from . import conv_check as check
from ._op import Op


def _empty(x: Tensor, shape) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _grad_like(t: Tensor) -> Tensor:
    return _empty(t, t.shape)


_causal_conv3d = Op(
    "causal_conv3d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? cache, Tensor? norm_weight, Tensor? residual, "
    "int[] stride, int[] dilation, int[] padding, str time_pad, str space_pad, "
    "str? norm, float norm_eps, str? act, str algo) -> Tensor",
    differentiable=("x", "weight", "bias", "cache", "norm_weight", "residual"),
    fake=lambda x, weight, b, c, n, r, stride, dilation, padding, *_: _empty(
        x, output_shape(x.shape, weight.shape, stride, dilation, padding)
    ),
    check=check.convolution,
    grad_like=_grad_like,
)


def _fake_next_cache(x: Tensor, cache: Tensor | None, k_t: int) -> Tensor:
    frames = x.shape[2] + (0 if cache is None else cache.shape[2])
    return _empty(x, (*x.shape[:2], min(k_t - 1, frames), *x.shape[3:]))


_next_cache = Op(
    "next_cache",
    "(Tensor x, Tensor? cache, int k_t) -> Tensor",
    differentiable=("x", "cache"),
    fake=_fake_next_cache,
    check=check.next_frames,
    grad_like=_grad_like,
)
_norm_silu = Op(
    "norm_silu",
    "(Tensor x, Tensor? weight, Tensor? bias, str norm, int groups, float eps) -> Tensor",
    differentiable=("x", "weight", "bias"),
    fake=lambda x, *_: _empty(x, x.shape),
    check=check.norm_and_silu,
    grad_like=_grad_like,
)


def causal_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    dilation: int | tuple[int, ...] = 1,
    padding: tuple[int, int, int, int, int, int] | None = None,
    time_pad: str = "zeros",
    space_pad: str = "zeros",
    cache: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    act: str | None = None,
    residual: Tensor | None = None,
    algo: str = "auto",
    backend: str | None = None,
) -> Tensor:
    """3-D convolution that is causal in time, over cached frames and the new ones, with norm, SiLU and residual fused.

        y = conv3d(pad(act(norm(cat(cache, x))))) + bias + residual

    Neither the concatenation nor the padding is materialised; zero frames and rows are skipped, not convolved. A clip
    cut into chunks gives bitwise the frames of the whole clip (within a backend and algo):

        y, cache = causal_conv3d(x, w, cache=cache), next_cache(x, cache, w.shape[2])

    Args:
        x (Tensor[B, C, T, H, W]; f32, bf16, f16, f64): input frames, any strides.
        weight (Tensor[Cout, C, k_t, k_h, k_w]), bias (Tensor[Cout]): any float dtype; the weight is used in x's.
        stride, dilation (int or three ints): along (T, H, W).
        padding (six ints): (t0, t1, h0, h1, w0, w1), before and after each axis. Default: (k_t - 1, 0) along T and
            k // 2 on each side of H and W.
        time_pad (str): "zeros", or "first": the frames still missing before repeat the first frame of cat(cache, x)
            (those after, if t1 > 0, the last). space_pad (str): "zeros", "replicate" or "reflect".
        cache (Tensor[B, C, 0..t0, H, W]; dtype of x): the frames before x as they were passed, before norm and act;
            it takes the place of that many padding frames.
        norm (str, optional): "channel_l2": h / max(||h||, eps) * sqrt(C) * norm_weight over a pixel's channels, eps
            1e-12 (Wan); "channel_rms": h * rsqrt(mean(h^2) + eps) * norm_weight, eps 1e-8 (LTX). norm_weight
            (Tensor[C], optional). norm_eps (float, optional): instead of those.
        act (str, optional): "silu". Norm and act act on the input; padding zeros stay zeros.
        residual (Tensor, shape of y; dtype of x): added last.
        algo (str): "direct"; "winograd": F(2,3) along H, 2/3 of the products, needs k_h = 3 with stride and dilation 1
            there; "winograd2d": F(2x2,3x3) over H and W, 4/9 of the products, needs that along both. "auto": where the
            CPU forms products in fp32 (not of bf16 by AVX-512 BF16), the latter for 32 channels and 36 pixels and more,
            else the former: their errors are within 1.5 of direct's. By AVX-512 BF16 they are two and three output
            roundings instead of one. An Inf in x may come out as NaN.
        backend (str, optional): "cuda", "triton", "cpu", "reference". Default: best available.
    Returns:
        Tensor[B, Cout, T', H', W'], dtype of x, in x's memory format. Gradients for every tensor argument.
    Raises:
        ValueError: shapes, devices, geometry; a cached chunk whose length is no multiple of stride_t, which would shift
        the next chunk's windows.   TypeError: dtypes.   NoBackend: nothing can run it.
    Cost:   2*B*T'*H'*W'*Cout*C*k_t*k_h*k_w FLOPs (2/3 or 4/9 of it with Winograd), compute-bound. The CPU backend keeps
        a packed copy of the weight while it lives (4/3 or 16/9 of its size with Winograd), and rows in flight: 1.5 MiB
        a thread, more only of many channels. Backward: as much again for the gradient of the input (missing frames
        skipped, 2/3 or 4/9 with Winograd), and for the weight's, which takes 6 MiB and the weight's size in fp32; no
        activation is kept: norm and SiLU are computed again from x. The Triton backend keeps nothing between calls: it
        packs the weight in each (not one in channels_last_3d and x's dtype), and writes act(norm(cat(cache, x))) once,
        2 * itemsize bytes a value, where there is a norm or act, or x is NCDHW.
    Source: diffusers WanCausalConv3d, CogVideoXCausalConv3d, HunyuanVideoCausalConv3d, LTXVideoCausalConv3d, Mochi.
    """
    return _causal_conv3d(
        backend, x, weight, bias, cache, norm_weight, residual,
        stride, dilation, padding, time_pad, space_pad, norm, norm_eps, act, algo,
    )  # fmt: skip


def next_cache(x: Tensor, cache: Tensor | None, k_t: int, *, backend: str | None = None) -> Tensor:
    """The frames that the next chunk's `causal_conv3d` wants as its cache.

        c = cat(cache, x)[:, :, -(k_t - 1):]

    Args:
        x (Tensor[B, C, T, H, W]): the chunk just convolved, before norm and act.
        cache (Tensor[B, C, T_cache, H, W], optional; dtype of x): what was its cache.
        k_t (int): frames of the kernel (dilated: dilation * (k_t - 1) + 1; other paddings: t0 + 1).
    Returns:
        Tensor[B, C, min(k_t - 1, T_cache + T), H, W] that owns its memory, in x's memory format; bitwise.
    Raises:
        ValueError: shapes, devices, k_t.   TypeError: dtypes.   NoBackend: nothing can run it.
    Cost:   2*B*C*(k_t-1)*H*W*itemsize bytes; memory-bound.
    Source: diffusers autoencoder_kl_wan.py `feat_cache`, CACHE_T = 2; it keeps frames after norm and act.
    """
    return _next_cache(backend, x, cache, k_t)


def norm_silu(
    x: Tensor,
    *,
    norm: str = "channel_l2",
    weight: Tensor | None,
    bias: Tensor | None = None,
    groups: int = 32,
    eps: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Norm of a VAE block and the SiLU that follows it, in one pass; for where the next layer is not a convolution.

        y = silu(n(x) * weight + bias)

    Args:
        x (Tensor[B, C, ...], 2 to 5 dims; f32, bf16, f16, f64): any strides.
        norm (str): "channel_l2" and "channel_rms" over a pixel's channels, as in `causal_conv3d`; "group": GroupNorm,
            statistics over each of `groups` runs of channels and all pixels of a sample (frames into the batch for
            per-frame statistics, as Mochi does).
        weight, bias (Tensor[C]; any float dtype): weight None is all ones.
        groups (int): of "group"; C % groups == 0. eps (float, optional): default 1e-12, 1e-8 and 1e-6 (group).
        backend (str, optional): "cuda", "triton", "cpu", "reference". Default: best available.
    Returns:
        Tensor like x, dtype of x, in x's memory format. Gradients for x, weight and bias.
    Raises:
        ValueError: shapes, devices, eps, groups.   TypeError: dtypes.   NoBackend: nothing can run it.
    Cost:   2*numel*itemsize bytes (group: 3); memory-bound. Backward: 3 (group: 6), about 45 flops a value.
    Source: diffusers WanRMS_norm, PerChannelRMSNorm (LTX-2), GroupNorm of CogVideoX, HunyuanVideo and Mochi.
    """
    return _norm_silu(backend, x, weight, bias, norm, groups, eps)
