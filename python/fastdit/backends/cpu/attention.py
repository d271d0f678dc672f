"""attention on the CPU kernels (csrc/cpu/attention.cpp)."""

from __future__ import annotations

import torch

from ... import _cpu
from .._attention_abi import dense, given_lse, given_o, merges, packed
from .._tensors import contiguous, empty, rows_contiguous
from ..registry import Impl, register as _register
from ._abi import on_cpu


# ---- dense and packed -------------------------------------------------------------------------------------
def attention(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic):
    batch, tokens, heads, _ = q.shape
    o = empty(q)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float64 if q.dtype is torch.float64 else torch.float32)
    if batch and tokens and heads:
        kv_len, frame_tokens_of = contiguous(kv_len), contiguous(frame_tokens_of)
        _cpu.attention_forward(dense(q, k, v, o, lse, kv_len, frame_tokens_of, frame_tokens, scale))
    return o, lse


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic,
):  # fmt: skip
    tokens, heads, _ = q.shape
    o = empty(q)
    lse = torch.empty((heads, tokens), dtype=torch.float64 if q.dtype is torch.float64 else torch.float32)
    if tokens and heads:
        cu_q = cu_k = cu_seqlens_q.contiguous()
        if cu_seqlens_k is not cu_seqlens_q:
            cu_k = cu_seqlens_k.contiguous()
        if frame_tokens_of is not None:
            frame_tokens_of = frame_tokens_of.contiguous()
        if grids is not None:
            grids = grids.contiguous()
        _cpu.attention_forward(
            packed(q, k, v, o, lse, cu_q, cu_k, frame_tokens_of, grids, frame_tokens, window, window_stride, scale)
        )
    return o, lse


def _gradients(do, dlse, q, k, v, o, lse, needs, tell):
    """tell(o, lse) gives the shared parameters; a gradient that nobody asked for is not computed."""
    grads = [empty(t) if need else None for t, need in zip((q, k, v), needs, strict=True)]
    if q.numel() == 0 or k.numel() == 0 or (do is None and dlse is None):
        return tuple(None if g is None else g.zero_() for g in grads)
    do = torch.zeros_like(o) if do is None else rows_contiguous(do)
    o, lse = o.contiguous(), lse.contiguous()
    _cpu.attention_backward(tell(o, lse), given_o(do), given_lse(dlse), *(given_o(g) for g in grads))
    return tuple(grads)


def attention_backward(
    do, dlse, q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic, o, lse, needs
):
    indices = contiguous(kv_len), contiguous(frame_tokens_of)
    return _gradients(
        *(do, dlse, q, k, v, o, lse, needs),
        lambda o, lse: dense(q, k, v, o, lse, *indices, frame_tokens, scale),
    )


def attention_varlen_backward(
    do, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic, o, lse, needs,
):  # fmt: skip
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    frames, grids = contiguous(frame_tokens_of), contiguous(grids)
    return _gradients(
        *(do, dlse, q, k, v, o, lse, needs),
        lambda o, lse: packed(q, k, v, o, lse, cu_q, cu_k, frames, grids, frame_tokens, window, window_stride, scale),
    )


# ---- merge ----------------------------------------------------------------------------------------------
def _run(entry, op, like, arguments, reads, writes):
    getattr(_cpu, entry)(*arguments)


merge_attention, merge_attention_backward = merges(_run)


def register() -> None:
    for name in ("attention", "attention_varlen", "merge_attention"):
        _register(Impl(name, "cpu", lambda x, *_: on_cpu(x), globals()[name], globals()[f"{name}_backward"]))
