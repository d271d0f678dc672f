"""Causal 3-D convolution of the video VAEs with everything around it fused: cache, padding, norm, SiLU, bias, residual.

x is (B, C, T, H, W) in any strides; NCDHW and channels_last_3d are the two layouts that outputs have. The CPU kernels
read both and are fastest in channels_last_3d, where a pixel's channels are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.conv import NORM_EPS, causal_padding, memory_format, output_shape
from . import _check
from ._op import Op

_TIME_PADS = ("zeros", "first")
_SPACE_PADS = ("zeros", "replicate", "reflect")
_NORMS = (None, "channel_l2", "channel_rms")
_ACTS = (None, "silu")
_ALGOS = ("auto", "direct", "winograd")
_SILU_NORMS = ("channel_l2", "channel_rms", "group")


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
    grad_like=_grad_like,
)
_norm_silu = Op(
    "norm_silu",
    "(Tensor x, Tensor? weight, Tensor? bias, str norm, int groups, float eps) -> Tensor",
    differentiable=("x", "weight", "bias"),
    fake=lambda x, *_: _empty(x, x.shape),
    grad_like=_grad_like,
)


def _video(op: str, what: str, x: Tensor) -> None:
    _check.floating(op, what, x)
    _check.rank(op, what, x, (5,), "(B, C, T, H, W)")


def _like_x(op: str, what: str, t: Tensor, x: Tensor) -> None:
    _check.floating(op, what, t)
    _check.same_device(op, what, t, x)
    if t.dtype != x.dtype:
        raise TypeError(
            f"{op}: {what} must have x's dtype; got {_check.name(t.dtype)} beside {_check.name(x.dtype)}, "
            f"expected {_check.name(x.dtype)}; cast it."
        )


def _vector(op: str, what: str, t: Tensor, n: int, x: Tensor) -> None:
    _check.floating(op, what, t)
    if tuple(t.shape) != (n,):
        raise ValueError(
            f"{op}: {what} must be one value per channel; got {list(t.shape)}, expected [{n}]; flatten or slice it."
        )
    _check.channels_contiguous(op, what, t)
    _check.same_device(op, what, t, x)


def _integers(op: str, what: str, value, count: int, least: int) -> tuple[int, ...]:
    if isinstance(value, int) and count == 3:
        value = (value,) * 3
    if (
        not isinstance(value, (tuple, list))
        or len(value) != count
        or not all(isinstance(v, int) and v >= least for v in value)
    ):
        one = "an int or " if count == 3 else ""
        raise ValueError(
            f"{op}: {what} is malformed; got {value!r}, expected {one}{count} ints of at least {least}; "
            f"give them in the order {'(t, h, w)' if count == 3 else '(t0, t1, h0, h1, w0, w1)'}."
        )
    return tuple(value)


def _check_cache(op: str, cache: Tensor, x: Tensor, most: int) -> None:
    _video(op, "cache", cache)
    _like_x(op, "cache", cache, x)
    if cache.shape[:2] != x.shape[:2] or cache.shape[3:] != x.shape[3:]:
        raise ValueError(
            f"{op}: cache differs from x in more than T; got {list(cache.shape)} beside x {list(x.shape)}, "
            f"expected [{x.shape[0]}, {x.shape[1]}, T_cache, {x.shape[3]}, {x.shape[4]}]; "
            "it holds earlier input frames as they were passed."
        )
    if cache.shape[2] > most:
        raise ValueError(
            f"{op}: cache is longer than the padding before the first frame; got {cache.shape[2]} frames, "
            f"expected at most t0 = {most}; keep the last ones, as next_cache(x, cache, {most + 1}) does."
        )


def _check_geometry(op: str, x: Tensor, weight: Tensor, stride, dilation, padding, space_pad: str) -> tuple:
    shape = output_shape(x.shape, weight.shape, stride, dilation, padding)
    for axis, n, out, k, before, after, d in zip(
        "THW", x.shape[2:], shape[2:], weight.shape[2:], padding[::2], padding[1::2], dilation, strict=True
    ):
        if n != 0 and out < 1:
            raise ValueError(
                f"{op}: the kernel does not fit into {axis}; got {n} + padding {before} + {after}, "
                f"expected at least {d * (k - 1) + 1}; pad more or pass more."
            )
        if n == 0 and out != 0:
            raise ValueError(
                f"{op}: x is empty along {axis} and padding alone would make output there; got {list(x.shape)}, "
                "expected at least one element; skip the call."
            )
        if axis != "T" and space_pad == "reflect" and n != 0 and max(before, after) >= n:
            raise ValueError(
                f"{op}: reflect padding needs more pixels than it adds; got padding {before}, {after} on {axis} = {n}, "
                f"expected at most {n - 1}; use space_pad='replicate'."
            )
    return shape


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
            there. "auto": winograd where its error is within 1.4 of direct's (fp32 and f16 on the CPU). In bf16 its
            error is two output roundings instead of one, and an Inf in x may come out as NaN.
        backend (str, optional): "cuda", "triton", "cpu", "reference". Default: best available.
    Returns:
        Tensor[B, Cout, T', H', W'], dtype of x, in x's memory format. Gradients for every tensor argument.
    Raises:
        ValueError: shapes, devices, geometry; a cached chunk whose length is no multiple of stride_t, which would shift
        the next chunk's windows.   TypeError: dtypes.   NoBackend: nothing can run it.
    Cost:   2*B*T'*H'*W'*Cout*C*k_t*k_h*k_w FLOPs (2/3 of it with winograd), compute-bound. The CPU backend keeps a
        packed copy of the weight while it lives (4/3 of its size with winograd), and rows in flight: 1.5 MiB a
        thread, more only where a few rows of a frame are larger. Backward: as much again for the gradient of the
        input (missing frames skipped, 2/3 with winograd), and for the weight's, which takes 6 MiB and the weight's size
        in fp32; no activation is kept: norm and SiLU are computed again from x. The Triton backend keeps nothing
        between calls: it packs the weight in each (not one in channels_last_3d and x's dtype), and writes
        act(norm(cat(cache, x))) once, 2 * itemsize bytes a value, where there is a norm or act, or x is NCDHW.
    Source: diffusers WanCausalConv3d, CogVideoXCausalConv3d, HunyuanVideoCausalConv3d, LTXVideoCausalConv3d, Mochi.
    """
    op = "causal_conv3d"
    _video(op, "x", x)
    _check.floating(op, "weight", weight)
    _check.rank(op, "weight", weight, (5,), "(Cout, C, k_t, k_h, k_w)")
    _check.same_device(op, "weight", weight, x)
    if weight.shape[1] != x.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight does not match x; got {list(weight.shape)} beside x {list(x.shape)}, "
            f"expected [Cout, {x.shape[1]}, k_t, k_h, k_w] without empty dims; grouped convolutions are not supported."
        )
    if bias is not None:
        _vector(op, "bias", bias, weight.shape[0], x)
    strides = _integers(op, "stride", stride, 3, 1)
    dilations = _integers(op, "dilation", dilation, 3, 1)
    pads = causal_padding(weight.shape[2:]) if padding is None else _integers(op, "padding", padding, 6, 0)
    _check.choice(op, "time_pad", time_pad, _TIME_PADS)
    _check.choice(op, "space_pad", space_pad, _SPACE_PADS)
    _check.choice(op, "norm", norm, _NORMS)
    _check.choice(op, "act", act, _ACTS)
    _check.choice(op, "algo", algo, _ALGOS)
    if norm is None and (norm_weight is not None or norm_eps is not None):
        raise ValueError(
            f"{op}: norm_weight or norm_eps without norm; got norm=None, expected one of {_NORMS[1:]}; "
            "set it or drop them."
        )
    if norm_weight is not None:
        _vector(op, "norm_weight", norm_weight, x.shape[1], x)
    norm_eps = NORM_EPS[norm] if norm_eps is None else norm_eps
    _check.epsilon(op, "norm_eps", norm_eps)
    if algo == "winograd" and (weight.shape[3], strides[1], dilations[1]) != (3, 1, 1):
        raise ValueError(
            f"{op}: algo='winograd' works on 3 taps along H; got k_h = {weight.shape[3]}, stride {strides[1]}, "
            f"dilation {dilations[1]} there, expected 3, 1, 1; use algo='auto'."
        )
    if cache is not None:
        _check_cache(op, cache, x, pads[0])
        if x.shape[2] % strides[0] != 0:
            raise ValueError(
                f"{op}: a chunk must be a whole number of strides; got T = {x.shape[2]} with stride_t = {strides[0]}, "
                "expected a multiple of it; cut the clip elsewhere."
            )
    shape = _check_geometry(op, x, weight, strides, dilations, pads, space_pad)
    if residual is not None:
        _like_x(op, "residual", residual, x)
        if tuple(residual.shape) != shape:
            raise ValueError(
                f"{op}: residual must have the output's shape; got {list(residual.shape)}, expected {list(shape)}; "
                "it is added to y."
            )
    return _causal_conv3d(
        backend, x, weight, bias, cache, norm_weight, residual,
        strides, dilations, pads, time_pad, space_pad, norm, norm_eps, act, algo,
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
    op = "next_cache"
    _video(op, "x", x)
    if not isinstance(k_t, int) or k_t < 1:
        raise ValueError(f"{op}: k_t must be a kernel size; got {k_t!r}, expected an int >= 1; pass weight.shape[2].")
    if cache is not None:
        _check_cache(op, cache, x, k_t - 1)
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
    op = "norm_silu"
    _check.floating(op, "x", x)
    _check.rank(op, "x", x, (2, 3, 4, 5), "(B, C, ...) of 2 to 5 dims")
    _check.choice(op, "norm", norm, _SILU_NORMS)
    if x.shape[1] == 0:
        raise ValueError(f"{op}: x has no channels; got {list(x.shape)}, expected C >= 1; check the model width.")
    if weight is not None:
        _vector(op, "weight", weight, x.shape[1], x)
    if bias is not None:
        _vector(op, "bias", bias, x.shape[1], x)
    if norm == "group" and (not isinstance(groups, int) or groups < 1 or x.shape[1] % groups != 0):
        raise ValueError(
            f"{op}: groups must divide the channels; got groups = {groups} and C = {x.shape[1]}, "
            "expected C % groups == 0; pass the norm's own num_groups."
        )
    eps = NORM_EPS[norm] if eps is None else eps
    _check.epsilon(op, "eps", eps)
    return _norm_silu(backend, x, weight, bias, norm, groups, eps)
