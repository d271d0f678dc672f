"""Spacetime patches: video to tokens through the patch embedding, and what the last layer predicts back to video."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from ..packing import Packed, packed
from . import _check
from ._op import Op


def _embed_fake(x: Tensor, weight: Tensor, bias, pos, grids: Sequence[int]) -> Tensor:
    D, _, pt, ph, pw = weight.shape
    if x.dim() == 1:
        return x.new_empty((sum(math.prod(grids[i : i + 3]) for i in range(0, len(grids), 3)), D))
    B, _, T, H, W = x.shape
    return x.new_empty((B, (T // pt) * (H // ph) * (W // pw), D))


def _unpatchify_fake(tokens: Tensor, grid, patch, channels, order) -> Tensor:
    if tokens.dim() == 2:
        return tokens.new_empty((tokens.numel(),))
    return tokens.new_empty((tokens.shape[0], channels, *(g * p for g, p in zip(grid, patch, strict=True))))


def _parameter(op: str, what: str, t: Tensor, x: Tensor) -> None:
    if isinstance(t, Tensor) and t.dtype == x.dtype and t.device == x.device:
        return  # the everyday case, in half the time
    _check.floating(op, what, t)
    if t.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{op}: {what} must have x's dtype or be float32; got {_check.name(t.dtype)} beside "
            f"{_check.name(x.dtype)}, expected {_check.name(x.dtype)} or float32; cast it."
        )
    _check.same_device(op, what, t, x)


def _check_weight(op: str, weight: Tensor, bias: Tensor | None, x: Tensor) -> None:
    _parameter(op, "weight", weight, x)
    if weight.dim() != 5 or 0 in weight.shape[2:]:
        hint = " A Conv2d's is weight.unsqueeze(2)." if weight.dim() == 4 else ""
        raise ValueError(
            f"{op}: weight must be (D, C, pt, ph, pw) as nn.Conv3d's; got {list(weight.shape)}, "
            f"expected 5 dims and a patch of at least one pixel; reshape it.{hint}"
        )
    if bias is not None:
        _parameter(op, "bias", bias, x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{op}: bias must be (D,); got {list(bias.shape)}, expected [{weight.shape[0]}]; "
                "pass the projection's own bias."
            )


def _check_video(op: str, what: str, x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """The grid of tokens of one video (..., C, T, H, W)."""
    *_, C, T, H, W = x.shape
    _, channels, pt, ph, pw = weight.shape
    if C != channels:
        raise ValueError(
            f"{op}: {what} and weight differ in channels; got {list(x.shape)} beside weight {list(weight.shape)}, "
            f"expected C = {channels}; check the layout, channels come before T, H, W."
        )
    if T % pt or H % ph or W % pw:
        axis, size, p = next(a for a in (("T", T, pt), ("H", H, ph), ("W", W, pw)) if a[1] % a[2])
        raise ValueError(
            f"{op}: {axis} of {what} is no multiple of the patch; got {axis} = {size}, "
            f"expected a multiple of {p}; pad or crop the video."
        )
    return T // pt, H // ph, W // pw


def _check_pos(op: str, pos: Any, x: Tensor, expected: tuple[Sequence[int], ...], layout: str) -> Tensor:
    _parameter(op, "pos", pos, x)
    if pos.shape not in expected:
        raise ValueError(
            f"{op}: pos must be {layout}; got {list(pos.shape)}, expected "
            f"{' or '.join(str(list(shape)) for shape in expected)}; make it for this grid."
        )
    _check.channels_contiguous(op, "pos", pos)
    return pos


def _check_embed(x, weight, bias, pos, grids) -> tuple:
    """Of one batch; a list is checked where it is flattened."""
    if grids:
        return x, weight, bias, pos, grids
    op = "patch_embed3d"
    _check.floating(op, "x", x)
    if x.dim() != 5:
        hint = " An image is x.unsqueeze(2)." if x.dim() == 4 else ""
        raise ValueError(
            f"{op}: x has the wrong rank; got {list(x.shape)}, expected (B, C, T, H, W) or a list of (C, T, H, W); "
            f"reshape it.{hint}"
        )
    _check_weight(op, weight, bias, x)
    t, h, w = _check_video(op, "x", x, weight)
    if pos is not None:
        N, D = t * h * w, weight.shape[0]
        _check_pos(op, pos, x, ((N, D), (1, N, D), (x.shape[0], N, D)), "(N, D) or (B, N, D)")
    return x, weight, bias, pos, grids


def _check_grids(tokens, grid, patch, channels, order) -> list:
    """Of one batch with its grid, or a pack with a list of grids; returns the list."""
    op = "unpatchify3d"
    _check.floating(op, "tokens", tokens)
    if not isinstance(order, str) or sorted(order) != sorted("cthw"):
        raise ValueError(
            f"{op}: order is no permutation of the letters c, t, h, w; got {order!r}, expected e.g. 'thwc'; "
            "name each letter once."
        )
    if len(patch) != 3 or min(patch) < 1:
        raise ValueError(f"{op}: patch must be three sizes; got {tuple(patch)}, expected (pt, ph, pw) >= 1; set it.")
    if channels < 1:
        raise ValueError(f"{op}: channels must be positive; got {channels}, expected C >= 1; set it.")
    many = len(grid) > 0 and isinstance(grid[0], (list, tuple))
    grids: list[Any] = list(grid) if many else [grid]
    if len(grid) == 0 or any(len(g) != 3 or min(g) < 0 for g in grids):
        raise ValueError(f"{op}: grid must be (t, h, w) or a list of them; got {grid}, expected sizes >= 0; set it.")
    if tokens.dim() != (2 if many else 3):
        raise ValueError(
            f"{op}: tokens have the wrong rank for the grid; got {list(tokens.shape)} with "
            f"{'a list of grids' if many else 'one grid'}, expected "
            f"{'packed (N, K)' if many else '(B, N, K)'}; (B, N, K) goes with one grid, packed (N, K) with a list."
        )
    K, N = channels * math.prod(patch), sum(math.prod(g) for g in grids)
    if tokens.shape[-1] != K:
        raise ValueError(
            f"{op}: a token must hold C*pt*ph*pw values; got {tokens.shape[-1]}, expected {K} for "
            f"channels = {channels} and patch = {tuple(patch)}; check both."
        )
    if tokens.shape[-2] != N:
        raise ValueError(
            f"{op}: grid and tokens differ; got {tokens.shape[-2]} tokens for grid {grid}, expected t*h*w = {N}; "
            "grid counts tokens, not pixels."
        )
    _check.channels_contiguous(op, "tokens", tokens)
    return grids


def _check_unpatchify(tokens, grid, patch, channels, order) -> tuple:
    """Of one batch; a list of grids is checked where it is flattened."""
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        _check_grids(tokens, grid, patch, channels, order)
    return tokens, grid, patch, channels, order


# x (B, C, T, H, W) with grids = []; or every video of a list flattened, (C, T, H, W), one after the other, with the
# token grids of all of them in one run of ints.
_patch_embed3d = Op(
    "patch_embed3d",
    "(Tensor x, Tensor weight, Tensor? bias, Tensor? pos, SymInt[] grids) -> Tensor",
    differentiable=("x", "weight", "bias", "pos"),
    fake=_embed_fake,
    check=_check_embed,
)
# tokens (B, N, K) with one grid -> (B, C, T, H, W); or packed (N, K) with several in one run -> the videos flattened.
_unpatchify3d = Op(
    "unpatchify3d",
    "(Tensor tokens, SymInt[] grid, SymInt[] patch, SymInt channels, str order) -> Tensor",
    differentiable=("tokens",),
    fake=_unpatchify_fake,
    check=_check_unpatchify,
)


@overload
def patch_embed3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos: Tensor | None = None,
    backend: str | None = None,
) -> Tensor: ...
@overload
def patch_embed3d(
    x: list[Tensor] | tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos: Tensor | list[Tensor] | tuple[Tensor, ...] | None = None,
    backend: str | None = None,
) -> Packed: ...


def patch_embed3d(
    x: Tensor | list[Tensor] | tuple[Tensor, ...],
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    pos: Tensor | list[Tensor] | tuple[Tensor, ...] | None = None,
    backend: str | None = None,
) -> Tensor | Packed:
    """Embed each patch of a video as a token; videos of different sizes go into one packed sequence.

        tokens[b, n] = sum_k weight[:, k] * patch(b, n)[k] + bias + pos[n],   k = (c, dt, dh, dw), n = (t, h, w)

    Equivalent to `F.conv3d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2) + pos`.

    Args:
        x (Tensor[B, C, T, H, W], or a list of Tensor[C, T, H, W] of any sizes; f32, bf16, f16, f64): any strides. An
            image is T = 1. T, H, W are multiples of the patch.
        weight (Tensor[D, C, pt, ph, pw]; dtype of x or f32): as nn.Conv3d's; a Linear over (c, pt, ph, pw) is
            `weight.view(D, C, pt, ph, pw)`, over (pt, ph, pw, c) the same permuted. Any strides.
        bias (Tensor[D]). pos (Tensor[N, D], [1, N, D] or [B, N, D]; for a list packed [sum N, D], or a list of
            Tensor[N, D], which costs a copy). Both of x's dtype or f32.
        backend (str, optional): "cuda", "triton", "cpu", "reference". Default: best available.
    Returns:
        Tensor[B, N, D], or for a list a Packed of [sum N, D]; dtype of x, contiguous; products and sums in f32, one
        rounding. Gradients for x, weight, bias and pos. Packed or alone, a video gets the same bits.
    Raises:
        ValueError: shapes, sizes that the patch does not divide, devices, empty list.   TypeError: dtypes.
        NoBackend: nothing can run it.
    Cost:   2*N*D*K FLOPs and (N*K + N*D + D*K) * itemsize bytes a video, K = C*pt*ph*pw; no patch matrix is stored.
    Source: DiT PatchEmbed, Wan patch_embedding, HunyuanVideoPatchEmbed, CogVideoXPatchEmbed; NaViT arXiv 2307.06304.
    """
    if isinstance(x, (list, tuple)):
        return _embed_list(x, weight, bias, pos, backend)
    if isinstance(pos, Tensor) and pos.dim() == 3 and pos.shape[0] == 1:
        pos = pos[0]
    return _patch_embed3d(backend, x, weight, bias, pos, ())


def _embed_list(x, weight, bias, pos, backend) -> Packed:
    op = "patch_embed3d"
    if len(x) == 0:
        raise ValueError(f"{op}: x has no videos; got an empty list, expected at least one; skip the call.")
    for i, v in enumerate(x):
        _check.floating(op, f"x[{i}]", v)
        if v.dim() != 4:
            raise ValueError(
                f"{op}: x[{i}] has the wrong rank; got {list(v.shape)}, expected (C, T, H, W); drop the batch dim."
            )
        if v.dtype != x[0].dtype:
            raise TypeError(
                f"{op}: the videos differ in dtype; got {_check.name(v.dtype)} at {i}, "
                f"expected {_check.name(x[0].dtype)}; cast them to one."
            )
        _check.same_device(op, f"x[{i}]", v, x[0])
    _check_weight(op, weight, bias, x[0])
    grids = [_check_video(op, f"x[{i}]", v, weight) for i, v in enumerate(x)]
    D, lengths = weight.shape[0], [t * h * w for t, h, w in grids]
    if isinstance(pos, (list, tuple)):
        if len(pos) != len(x):
            raise ValueError(f"{op}: one pos per video; got {len(pos)} for {len(x)}, expected as many; add the rest.")
        for p, n in zip(pos, lengths, strict=True):
            _check_pos(op, p, x[0], ((n, D),), "(N, D) for each video")
        pos = torch.cat(list(pos))
    elif pos is not None:
        _check_pos(op, pos, x[0], ((sum(lengths), D),), "packed (sum N, D)")
    flat = torch.cat([v.reshape(-1) for v in x])
    flat_grids = tuple(n for grid in grids for n in grid)
    return packed(_patch_embed3d(backend, flat, weight, bias, pos, flat_grids), grids)


@overload
def unpatchify3d(
    tokens: Tensor,
    *,
    grid: tuple[int, int, int],
    patch: Sequence[int],
    channels: int,
    order: str = "thwc",
    backend: str | None = None,
) -> Tensor: ...
@overload
def unpatchify3d(
    tokens: Tensor,
    *,
    grid: Sequence[Sequence[int]],
    patch: Sequence[int],
    channels: int,
    order: str = "thwc",
    backend: str | None = None,
) -> list[Tensor]: ...


def unpatchify3d(
    tokens: Tensor,
    *,
    grid: Sequence[int] | Sequence[Sequence[int]],
    patch: Sequence[int],
    channels: int,
    order: str = "thwc",
    backend: str | None = None,
) -> Tensor | list[Tensor]:
    """Lay predicted patches out as a video: a move, bit for bit.

        y[b, c, t*pt + dt, h*ph + dh, w*pw + dw] = tokens[b, (t, h, w)][(dt, dh, dw, c) in `order`]

    Args:
        tokens (Tensor[B, N, K], or packed [sum N, K] with a list of grids; f32, bf16, f16, f64): K = C*pt*ph*pw
            values each, contiguous.
        grid ((t, h, w), or a list of them): tokens along T, H, W. patch ((pt, ph, pw)). channels (int): C.
        order (str): letters of "cthw", slowest first: how the values lie inside a token. "thwc": DiT, Wan, Mochi,
            Allegro; "cthw": HunyuanVideo, CogVideoX; "hwtc": Cosmos.
        backend (str, optional): "cuda", "triton", "cpu", "reference". Default: best available.
    Returns:
        Tensor[B, C, T, H, W], or a list of Tensor[C, T, H, W] over one buffer; dtype of tokens, contiguous. Gradient
        for tokens.
    Raises:
        ValueError: shapes, a grid that is not the tokens', an order that is no permutation.   TypeError: dtype.
        NoBackend: nothing can run it.
    Cost:   2*N*K*itemsize bytes a video; memory-bound.
    Source: diffusers transformer_wan, transformer_hunyuan_video, transformer_cosmos, dit_transformer_2d (unpatchify).
    """
    if not isinstance(tokens, Tensor) or tokens.dim() != 2:
        return _unpatchify3d(backend, tokens, tuple(grid), tuple(patch), channels, order)
    grids = _check_grids(tokens, grid, patch, channels, order)
    flat = _unpatchify3d(backend, tokens, tuple(n for g in grids for n in g), tuple(patch), channels, order)
    shapes = [(channels, *(g * p for g, p in zip(sizes, patch, strict=True))) for sizes in grids]
    return [v.view(shape) for v, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]
