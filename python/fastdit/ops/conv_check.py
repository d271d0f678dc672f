"""What the conv family checks before anything is written."""

from __future__ import annotations

from torch import Tensor

from ..reference.conv import NORM_EPS, causal_padding, misfit, output_shape
from . import _check

_TIME_PADS = ("zeros", "first")
_SPACE_PADS = ("zeros", "replicate", "reflect")
_NORMS = (None, "channel_l2", "channel_rms")
_SILU_NORMS = ("channel_l2", "channel_rms", "group")
_ACTS = (None, "silu")
ALGOS = ("auto", "direct", "winograd", "winograd2d")


def video(op: str, what: str, x: Tensor) -> None:
    _check.floating(op, what, x)
    _check.rank(op, what, x, (5,), "(B, C, T, H, W)")


def like_x(op: str, what: str, t: Tensor, x: Tensor) -> None:
    _check.floating(op, what, t)
    _check.same_device(op, what, t, x)
    if t.dtype != x.dtype:
        raise TypeError(
            f"{op}: {what} must have x's dtype; got {_check.name(t.dtype)} beside {_check.name(x.dtype)}, "
            f"expected {_check.name(x.dtype)}; cast it."
        )


def vector(op: str, what: str, t: Tensor, n: int, x: Tensor) -> None:
    _check.floating(op, what, t)
    if tuple(t.shape) != (n,):
        raise ValueError(
            f"{op}: {what} must be one value per channel; got {list(t.shape)}, expected [{n}]; flatten or slice it."
        )
    _check.channels_contiguous(op, what, t)
    _check.same_device(op, what, t, x)


def integers(op: str, what: str, value, count: int, least: int) -> tuple[int, ...]:
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


def cache_frames(op: str, cache: Tensor, x: Tensor, most: int) -> None:
    video(op, "cache", cache)
    like_x(op, "cache", cache, x)
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


def geometry(op: str, x: Tensor, weight: Tensor, stride, dilation, padding, space_pad: str) -> tuple:
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


def convolution(
    x, weight, bias, cache, norm_weight, residual, stride, dilation, padding, time_pad, space_pad, norm, norm_eps,
    act, algo,
) -> tuple:  # fmt: skip
    op = "causal_conv3d"
    strides = integers(op, "stride", stride, 3, 1)
    dilations = integers(op, "dilation", dilation, 3, 1)
    pads = None if padding is None else integers(op, "padding", padding, 6, 0)
    video(op, "x", x)
    _check.floating(op, "weight", weight)
    _check.rank(op, "weight", weight, (5,), "(Cout, C, k_t, k_h, k_w)")
    _check.same_device(op, "weight", weight, x)
    if weight.shape[1] != x.shape[1] or 0 in weight.shape:
        raise ValueError(
            f"{op}: weight does not match x; got {list(weight.shape)} beside x {list(x.shape)}, "
            f"expected [Cout, {x.shape[1]}, k_t, k_h, k_w] without empty dims; grouped convolutions are not supported."
        )
    if bias is not None:
        vector(op, "bias", bias, weight.shape[0], x)
    pads = causal_padding(weight.shape[2:]) if pads is None else pads
    _check.choice(op, "time_pad", time_pad, _TIME_PADS)
    _check.choice(op, "space_pad", space_pad, _SPACE_PADS)
    _check.choice(op, "norm", norm, _NORMS)
    _check.choice(op, "act", act, _ACTS)
    _check.choice(op, "algo", algo, ALGOS)
    if norm is None and (norm_weight is not None or norm_eps is not None):
        raise ValueError(
            f"{op}: norm_weight or norm_eps without norm; got norm=None, expected one of {_NORMS[1:]}; "
            "set it or drop them."
        )
    if norm_weight is not None:
        vector(op, "norm_weight", norm_weight, x.shape[1], x)
    norm_eps = NORM_EPS[norm] if norm_eps is None else norm_eps
    _check.epsilon(op, "norm_eps", norm_eps)
    i = misfit(algo, weight.shape, strides, dilations)
    if i:
        side = "THW"[i]
        raise ValueError(
            f"{op}: algo={algo!r} works on 3 taps along {side}; got k_{side.lower()} = {weight.shape[i + 2]}, "
            f"stride {strides[i]}, dilation {dilations[i]} there, expected 3, 1, 1; use algo='auto'."
        )
    if cache is not None:
        cache_frames(op, cache, x, pads[0])
        if x.shape[2] % strides[0] != 0:
            raise ValueError(
                f"{op}: a chunk must be a whole number of strides; got T = {x.shape[2]} with stride_t = {strides[0]}, "
                "expected a multiple of it; cut the clip elsewhere."
            )
    shape = geometry(op, x, weight, strides, dilations, pads, space_pad)
    if residual is not None:
        like_x(op, "residual", residual, x)
        if tuple(residual.shape) != shape:
            raise ValueError(
                f"{op}: residual must have the output's shape; got {list(residual.shape)}, expected {list(shape)}; "
                "it is added to y."
            )
    return (
        x, weight, bias, cache, norm_weight, residual,
        strides, dilations, pads, time_pad, space_pad, norm, norm_eps, act, algo,
    )  # fmt: skip


def next_frames(x, cache, k_t) -> tuple:
    op = "next_cache"
    video(op, "x", x)
    if not isinstance(k_t, int) or k_t < 1:
        raise ValueError(f"{op}: k_t must be a kernel size; got {k_t!r}, expected an int >= 1; pass weight.shape[2].")
    if cache is not None:
        cache_frames(op, cache, x, k_t - 1)
    return x, cache, k_t


def norm_and_silu(x, weight, bias, norm, groups, eps) -> tuple:
    op = "norm_silu"
    _check.floating(op, "x", x)
    _check.rank(op, "x", x, (2, 3, 4, 5), "(B, C, ...) of 2 to 5 dims")
    _check.choice(op, "norm", norm, _SILU_NORMS)
    if x.shape[1] == 0:
        raise ValueError(f"{op}: x has no channels; got {list(x.shape)}, expected C >= 1; check the model width.")
    if weight is not None:
        vector(op, "weight", weight, x.shape[1], x)
    if bias is not None:
        vector(op, "bias", bias, x.shape[1], x)
    if norm == "group" and (not isinstance(groups, int) or groups < 1 or x.shape[1] % groups != 0):
        raise ValueError(
            f"{op}: groups must divide the channels; got groups = {groups} and C = {x.shape[1]}, "
            "expected C % groups == 0; pass the norm's own num_groups."
        )
    eps = NORM_EPS[norm] if eps is None else eps
    _check.epsilon(op, "eps", eps)
    return x, weight, bias, norm, groups, eps
