"""attention on the reference backend: schema order to keywords; gradients of one head at a time."""

from __future__ import annotations

import contextlib

import torch

from ...reference import attention as formula
from ..registry import Impl, register as _register
from ._vjp import vjp


def _full_precision(q):
    """Autocast has cast q, k, v by now; the products inside the formula stay as written."""
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        return torch.autocast(q.device.type, enabled=False)
    return contextlib.nullcontext()


def _frames(frame_tokens, frame_tokens_of):
    return frame_tokens_of if frame_tokens_of is not None else None if frame_tokens == 0 else frame_tokens


def attention(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic):
    frames = _frames(frame_tokens, frame_tokens_of)
    with _full_precision(q):
        return formula.attention(q, k, v, scale=scale, kv_len=kv_len, frame_tokens=frames, return_lse=True)


def attention_backward(
    do, dlse, q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic, o, lse, needs
):
    do = torch.zeros_like(o) if do is None else do
    frames = _frames(frame_tokens, frame_tokens_of)
    with _full_precision(q):
        grads = formula.attention_backward(do, q, k, v, dlse=dlse, scale=scale, kv_len=kv_len, frame_tokens=frames)
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic,
):  # fmt: skip
    with _full_precision(q):
        return formula.attention_varlen(
            q,
            k,
            v,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            scale=scale,
            frame_tokens=_frames(frame_tokens, frame_tokens_of),
            window=window,
            window_stride=window_stride,
            grids=grids,
            return_lse=True,
        )


def attention_varlen_backward(
    do, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic, o, lse, needs,
):  # fmt: skip
    do = torch.zeros_like(o) if do is None else do
    with _full_precision(q):
        grads = formula.attention_varlen_backward(
            do,
            q,
            k,
            v,
            dlse=dlse,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            scale=scale,
            frame_tokens=_frames(frame_tokens, frame_tokens_of),
            window=window,
            window_stride=window_stride,
            grids=grids,
        )
    return tuple(g if need else None for g, need in zip(grads, needs, strict=True))


def merge_attention(o1, lse1, o2, lse2):
    return formula.merge_attention(o1, lse1, o2, lse2)


merge_attention_backward = vjp(merge_attention, wrt=range(4), outputs=2)


def register() -> None:
    for name in ("attention", "attention_varlen", "merge_attention"):
        _register(Impl(name, "reference", lambda *args: None, globals()[name], globals()[f"{name}_backward"]))
