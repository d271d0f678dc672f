"""conv on the CUDA kernels (csrc/cuda/conv*.cu): implicit GEMMs on the warp's matrix unit. On sm_90 on wgmma: the
forward and the input's gradient (conv_hopper.cu) save where `_wgmma_refusal` says why not, the weight's gradient
(conv_weight_hopper.cu) save where `_weight_refusal` does.

Launches: 1 for the convolution; 1 to pack the weight unless it lies in channels_last_3d in x's dtype; 1 for norm and
SiLU, or where x's pixels do not lie on 16 bytes (NCDHW, three channels): act(norm(cat(cache, x))), written once, 2 *
itemsize bytes a value. Cache and padding are never copied for their own sake. fp32 is three bf16 each, six
products.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.conv import output_shape
from .._conv import NORM, PAD, Kernels, backward, forward, norms
from .._facts import kept
from .._video import empty, next_cache_backward
from ..cpu._abi import DTYPE, pointer
from ..registry import Impl, register as _register
from ._launch import ask, launch, unfit, unfit_for_wgmma

WIDEST = 512  # channels that one block of the norms' backward holds
NARROWEST, BROADEST = 32, 8192  # of Cout: fewer leave most of a tile idle; more biases than a block has room for
MOST_COLUMNS = 8  # of a kernel, each a tensor map of the weight's gradient


def _strides(t: Tensor) -> tuple[int, ...]:
    """As the kernels compare them: 0 along dims of size 1, where a frame of one row or column stays one run."""
    shape = t.shape
    s_b, s_c, s_t, s_h, s_w = (0 if n == 1 else s for n, s in zip(shape, t.stride(), strict=True))
    s_w = s_h if shape[4] == 1 else s_w
    return s_b, 1 if shape[1] == 1 else s_c, s_t, s_w * shape[4] if shape[3] == 1 else s_h, s_w


@kept
def _facts(t: Tensor) -> tuple:
    return DTYPE[t.dtype], tuple(t.shape), _strides(t)


def _video(t: Tensor | None):
    return None if t is None else (t.data_ptr(), *_facts(t))


def _vector(t: Tensor | None):
    return None if t is None else (t.data_ptr(), DTYPE[t.dtype])


@kept
def _adjacent(t: Tensor) -> bool:
    """Whether channels are adjacent and all else is a multiple of 16 bytes."""
    s_b, s_c, *rest = _strides(t)
    return s_c == 1 and all(s * t.element_size() % 16 == 0 for s in (s_b, *rest))


def _lies(t: Tensor | None) -> bool:
    return t is None or (_adjacent(t) and t.data_ptr() % 16 == 0)


def _padded(like: Tensor, shape: tuple, dtype: torch.dtype) -> Tensor:
    """(N, C, T, H, W) with adjacent channels, each pixel on 16 bytes."""
    N, C, *rest = shape
    unit = 16 // dtype.itemsize
    memory = torch.empty((N, *rest, -(-C // unit) * unit), dtype=dtype, device=like.device)
    return memory[..., :C].permute(0, 4, 1, 2, 3)


def _ready(x: Tensor, cache, norm_weight, norm, norm_eps: float, act) -> tuple[Tensor, Tensor | None]:
    """(x, cache) as the convolution reads them: as they are, or act(norm(cat of both)) written once."""
    if cache is not None and cache.shape[2] == 0:
        cache = None
    if norm is None and act is None and _lies(x) and _lies(cache):
        return x, cache
    B, C, T, H, W = x.shape
    h = _padded(x, (B, C, T + (0 if cache is None else cache.shape[2]), H, W), x.dtype)
    if h.numel():
        _normalize(h, x, cache, norm_weight, None, None, NORM[norm], norm_eps, act == "silu")
    return h, None


def _pack(weight: Tensor, dtype: torch.dtype, transposed: bool = False) -> Tensor:
    given = weight.transpose(0, 1) if transposed else weight
    if weight.dtype == dtype and _lies(given):
        return given
    out = _padded(weight, tuple(given.shape), dtype)
    _move(out, given)
    return out


def _move(out: Tensor, given: Tensor, parts: int = 1, distance: int = 0, reads: Tensor | None = None) -> None:
    """out[n, c, tap] = given's, or the sum of `parts` of them `distance` elements apart, which `reads` holds."""
    launch(
        "conv_move_weight", "causal_conv3d", out, (_video(given), _video(out), parts, distance),
        (given if reads is None else reads,), (out,),
    )  # fmt: skip


def _geometry(x, cache, kernel, stride, dilation, start, time_first: bool, space: int) -> tuple:
    before = tuple(-s for s in start)
    return _video(x), _video(cache), tuple(kernel), stride, dilation, before, int(time_first), space


def _misfit(x, others, kernel, stride, dilation, start, out, space: int) -> str:
    """What wgmma leaves to mma.sync in either direction. others: what it reads beside x; out: y's shape."""
    if stride[1] != 1 or stride[2] != 1:
        return f"wgmma has no stride in space; got {tuple(stride)}"
    if space and any(
        start[i] < 0 or start[i] + out[2 + i] + (kernel[i] - 1) * dilation[i] > x.shape[2 + i] for i in (1, 2)
    ):
        return "wgmma pads with zeros only"
    for t in (x, *others):
        if t is not None and any(n == 0 or (n > 1 and s == 0) for n, s in zip(t.shape, _strides(t), strict=True)):
            return f"wgmma reads tensors whose pixels are all there; got {list(t.shape)}, {t.stride()}"
    return ""


@kept
def _unserved(x, cache, cout: int, kernel, stride, dilation, start, out, space: int) -> str:
    """Never for how many frames there are: chunks of a video must take one path. out: y's shape; space: of PAD."""
    if x.dtype == torch.float32:
        return "wgmma has 16-bit products; got fp32"
    if not NARROWEST < cout <= BROADEST:
        return f"wgmma serves {NARROWEST + 1} to {BROADEST} output channels; got {cout}"
    return _misfit(x, (cache,), kernel, stride, dilation, start, out, space)


@kept
def _weight_unserved(grad, x, cache, cout: int, kernel, stride, dilation, start, out, space: int) -> str:
    """grad: None where its layout is not known yet."""
    if x.dtype == torch.float32:
        return "wgmma has 16-bit products; got fp32"
    if x.shape[1] % 8 or cout % 8:
        return f"wgmma sums a weight of multiples of 8 channels; got {cout} of {x.shape[1]}"
    if kernel[2] > MOST_COLUMNS:
        return f"wgmma sums a weight of at most {MOST_COLUMNS} columns; got {kernel[2]}"
    return _misfit(x, (cache, grad), kernel, stride, dilation, start, out, space)


def _wgmma_refusal(x, *call) -> str | None:
    """Why a convolution is left to mma.sync; None when wgmma takes it. call: as `_unserved` takes it."""
    return unfit_for_wgmma(x) or _unserved(x, *call) or None


def _weight_refusal(grad, x, *call) -> str | None:
    """The same of a weight's gradient; call: as `_weight_unserved` takes it."""
    return unfit_for_wgmma(x) or _weight_unserved(grad, x, *call) or None


def _convolve(
    y, x, cache, weight, kernel, w_stride, bias, residual, stride, dilation, start, time_first: bool, space: int
) -> None:
    shared = _geometry(x, cache, kernel, stride, dilation, start, time_first, space)
    corner, *steps = w_stride
    sizes = (weight.shape[0], *kernel)
    steps = (0 if n == 1 else s for n, s in zip(sizes, steps, strict=True))
    taps = (weight.data_ptr() + corner * weight.element_size(), *steps)
    refusal = _wgmma_refusal(x, cache, weight.shape[0], kernel, stride, dilation, start, y.shape, space)
    entry = "conv_forward_hopper" if refusal is None and y.dtype == x.dtype else "conv_forward"
    launch(
        entry, "causal_conv3d", x, (shared, taps, _vector(bias), _video(residual), _video(y)),
        (x, cache, weight, bias, residual), (y,),
    )  # fmt: skip


def _normalize(y, x, cache, weight, bias, stats, norm: int, eps: float, act: bool) -> None:
    """y (B, C, T, H, W) = act(norm(the last T frames of cat(cache, x))); all of x is among them."""
    cached = y.shape[2] - x.shape[2]
    cache = None if cached == 0 else cache[:, :, cache.shape[2] - cached :]
    shared = (_video(x), norm, 1, eps, _vector(weight), _vector(bias))
    launch(
        "conv_normalize", "norm_silu", x, (shared, _video(cache), act, pointer(stats), _video(y)),
        (x, cache, weight, bias, stats), (y,),
    )  # fmt: skip


def _normalize_backward(dx, x, g, weight, bias, norm: int, eps: float, act: bool, sums: bool, stats=None, moments=None):
    if dx is not None and dx.data_ptr() == g.data_ptr() and x.shape[1] > WIDEST:
        g = g.clone()  # a block would read what another has written
    B, C, T, H, W = x.shape
    programs = min(-(-B * T * H * W // 64), 4 * _processors(x))
    parts = torch.empty((programs, 2, C), dtype=torch.float32, device=x.device) if sums else None
    shared = (_video(x), norm, 1, eps, _vector(weight), _vector(bias))
    launch(
        "conv_normalize_backward", "norm_silu_backward", x,
        (shared, _video(g), act, _video(dx), pointer(stats), pointer(moments), pointer(parts), programs),
        (x, g, weight, bias, stats, moments), (dx, parts),
    )  # fmt: skip
    return parts


def _sum_rows(parts: Tensor, which: int, like: Tensor) -> Tensor:
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    rows, C = parts.shape[0], parts.shape[-1]
    launch(
        "conv_sum_rows", "norm_silu_backward", parts, (parts[0, which].data_ptr(), _vector(out), rows, C, 2 * C),
        (parts,), (out,),
    )  # fmt: skip
    return out


# ---- groups -------------------------------------------------------------------------------------------
def _processors(x: Tensor) -> int:
    return ask("conv_processors", x)


def _group_parts(x: Tensor, kinds: int) -> Tensor:
    """(B, programs, kinds, C): enough programs to fill the device, each with pixels to walk over."""
    B, C, T, H, W = x.shape
    programs = max(1, min(-(-T * H * W // 256), 4 * _processors(x) // B))
    return torch.empty((B, programs, kinds, C), dtype=torch.float32, device=x.device)


def _statistics(x: Tensor, groups: int, eps: float) -> Tensor:
    parts = _group_parts(x, 3)
    stats = torch.empty((x.shape[0], 2, x.shape[1]), dtype=torch.float32, device=x.device)
    shared = (_video(x), NORM["group"], groups, eps, None, None)
    launch(
        "conv_group_statistics", "norm_silu", x, (shared, parts.data_ptr(), stats.data_ptr(), parts.shape[1]),
        (x,), (parts, stats),
    )  # fmt: skip
    return stats


def _group_sums(x, g: Tensor, weight, bias, stats) -> Tensor:
    parts = _group_parts(g, 2)
    shared = (_video(x), NORM["group"], 1, 0.0, _vector(weight), _vector(bias))
    launch(
        "conv_group_sums", "norm_silu_backward", g,
        (shared, _video(g), pointer(stats), parts.data_ptr(), parts.shape[1]), (x, g, weight, bias, stats), (parts,),
    )  # fmt: skip
    return parts


def _group_backward(dx, x: Tensor, g: Tensor, weight, bias, groups: int, eps: float) -> Tensor:
    stats = _statistics(x, groups, eps)
    parts = _group_sums(x, g, weight, bias, stats)
    sums, moments = torch.empty((2, x.shape[0], 2, x.shape[1]), dtype=torch.float32, device=x.device)
    shared = (_video(x), NORM["group"], groups, eps, _vector(weight), None)
    launch(
        "conv_group_moments", "norm_silu_backward", x,
        (shared, parts.data_ptr(), sums.data_ptr(), moments.data_ptr(), parts.shape[1]),
        (x, weight, parts), (sums, moments),
    )  # fmt: skip
    if dx is not None:
        _normalize_backward(dx, x, g, weight, bias, NORM["group"], eps, True, False, stats, moments)
    return sums


def _pixel_sums(g: Tensor, like: Tensor) -> Tensor:
    return _sum_rows(_group_sums(None, g, None, None, None).view(-1, 2, g.shape[1]), 1, like)


def _weight_gradient(grad, x, cache, weight, stride, dilation, start, time_first: bool, space: int) -> Tensor:
    N, C, *taps = weight.shape
    shared = _geometry(x, cache, taps, stride, dilation, start, time_first, space)
    refusal = _weight_refusal(grad, x, cache, N, tuple(taps), stride, dilation, start, grad.shape, space)
    entry = "conv_weight_grad" if refusal else "conv_weight_grad_hopper"
    count = ask(f"{entry}_parts", x, shared, _video(grad))
    parts = torch.empty((count, N, *taps, C), dtype=torch.float32, device=x.device)
    launch(
        entry, "causal_conv3d_backward", x, (shared, _video(grad), parts.data_ptr(), count), (x, cache, grad), (parts,)
    )
    out = empty(weight)
    _move(out, parts[0].permute(0, 4, 1, 2, 3), count, parts.stride(0), parts)
    return out


def register() -> None:
    k = Kernels(
        _ready, _pack, _convolve, _weight_gradient, _normalize, _normalize_backward, _statistics, _group_backward,
        _sum_rows, _pixel_sums,
    )  # fmt: skip
    norm_silu, norm_silu_backward, next_cache = norms(k)
    _register(Impl("causal_conv3d", "cuda", _supports, forward(k), backward(k), path=_path))
    _register(Impl("next_cache", "cuda", _moves, next_cache, next_cache_backward))
    _register(Impl("norm_silu", "cuda", _moves, norm_silu, norm_silu_backward))


def _moves(x, *_) -> str | None:
    return unfit(x)


def _supports(x, *rest) -> str | None:
    return "has no winograd; algo='auto' takes direct" if rest[-1].startswith("winograd") else unfit(x)


def _path(x, weight, bias, cache, norm_weight, residual, stride, dilation, padding, time_pad, space_pad, *_) -> str:
    start, stride, dilation = (0, -padding[2], -padding[4]), tuple(stride), tuple(dilation)
    out = output_shape(x.shape, weight.shape, stride, dilation, tuple(padding))
    call = weight.shape[0], tuple(weight.shape[2:]), stride, dilation, start, out, PAD[space_pad]
    refusal, others = _wgmma_refusal(x, None, *call), _weight_refusal(None, x, None, *call)
    if refusal and others:
        return f"mma.sync: {refusal}" + ("" if others == refusal else f"; the weight's gradient: {others}")
    return (
        ("forward on wgmma" if refusal is None else f"forward on mma.sync: {refusal}")
        + ", the weight's gradient on "
        + ("wgmma" if others is None else f"mma.sync: {others}")
    )
