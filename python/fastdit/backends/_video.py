"""What conv's adapters share: tensors in a video's memory format, the gradients of cat(cache, x) and of next_cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference.conv import memory_format


def empty(t: Tensor, shape=None, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised, in t's memory format."""
    shape = t.shape if shape is None else shape
    return torch.empty(shape, dtype=dtype or t.dtype, device=t.device, memory_format=memory_format(t))


def asked(tensors, needs) -> list[bool]:
    """Of each tensor, whether there is a gradient to compute."""
    return [need and t is not None for t, need in zip(tensors, needs, strict=True)]


def zeros_or_none(tensors, needs) -> tuple:
    return tuple(empty(t).zero_() if need else None for t, need in zip(tensors, asked(tensors, needs), strict=True))


def input_gradients(
    grad, x, cache, weight, needs, stride, dilation, padding, time_pad, space_pad,
    into: Callable, prologue: Callable | None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """(d_x, d_cache) of a causal_conv3d. needs: of x, of cache and of the norm's weight.

    into: (out, offset) writes the gradient of the padded input from `offset` (t, h, w) on, where `out` stands.
    prologue: (t, given, out) turns `given`, the gradient of act(norm(t)), into t's, in place too; out may be None: then
    only the norm's weight is wanted. None: there is no norm and no act.
    """
    need_x, need_cache, need_norm = needs
    cached = 0 if cache is None else cache.shape[2]
    extent = (x.shape[2] + cached, *x.shape[3:])
    before = (padding[0] - cached, padding[2], padding[4])
    reach = [  # of the padded input that any output sees
        (n - 1) * s + (taps - 1) * d + 1
        for n, s, taps, d in zip(grad.shape[2:], stride, weight.shape[2:], dilation, strict=True)
    ]
    modes = (time_pad, space_pad, space_pad)
    folds = [
        _fold(modes[i], extent[i], before[i], reach[i])
        if modes[i] != "zeros" and (before[i] or padding[2 * i + 1]) else None
        for i in range(3)
    ]  # fmt: skip
    whole = None if folds == [None] * 3 else _folded(x, extent, before, reach, folds, into)

    def finish(t, first: int, wanted: bool) -> Tensor | None:
        """Gradient of `t`, frames `first`... of cat(cache, x)."""
        if not (wanted or need_norm):
            return None
        out = empty(t)
        if whole is None:
            into(out, (before[0] + first, *before[1:]))
        given = out if whole is None else whole[:, :, first : first + t.shape[2]]
        if prologue is not None:
            prologue(t, given, out if wanted else None)
        elif given is not out:
            out.copy_(given)
        return out if wanted else None

    d_cache = finish(cache, 0, need_cache) if cached else None
    if need_cache and d_cache is None:
        d_cache = torch.zeros_like(cache)
    return finish(x, cached, need_x), d_cache


def _fold(mode: str, n: int, before: int, reach: int) -> list[tuple[int, int]]:
    """(position of the padded input, the position whose pixel it repeats) along an axis of n."""
    pairs = []
    for i in range(-before, reach - before):
        target = (n - 1) - abs((n - 1) - abs(i)) if mode == "reflect" else min(max(i, 0), n - 1)
        if target != i:
            pairs.append((i + before, target + before))
    return pairs


def _folded(x, extent, before, reach, folds, into: Callable) -> Tensor:
    """Gradient of act(norm(cat(cache, x))), in fp32 at least: repeats of a frame or row are added to it."""
    # a folded axis is computed over all of its padded extent, which may end before the input does
    shape = [n if f is None else max(r, b + n) for n, f, r, b in zip(extent, folds, reach, before, strict=True)]
    wide = empty(x, (*x.shape[:2], *shape), torch.promote_types(x.dtype, torch.float32))
    into(wide, [b if f is None else 0 for b, f in zip(before, folds, strict=True)])
    for dim, fold in enumerate(folds, 2):
        if fold is not None:
            for position, target in fold:
                wide.select(dim, target).add_(wide.select(dim, position))
            wide = wide.narrow(dim, before[dim - 2], extent[dim - 2])
    return wide


def next_cache_backward(grad, x, cache, k_t, needs):
    d_x, d_cache = zeros_or_none((x, cache), needs)
    if grad is not None:
        new = min(k_t - 1, x.shape[2])
        old = grad.shape[2] - new
        if d_x is not None:
            d_x[:, :, x.shape[2] - new :].copy_(grad[:, :, old:])
        if d_cache is not None and cache is not None:
            d_cache[:, :, cache.shape[2] - old :].copy_(grad[:, :, :old])
    return d_x, d_cache
