"""attention on the CPU kernels (csrc/cpu/attention.cpp)."""

from __future__ import annotations

import torch

from ... import _cpu
from ..reference import attention as reference
from ..registry import Impl, register as _register
from ._abi import DTYPE, on_cpu, pointer

_NO_WINDOW = (0, 0, 0)


def _strides(t):
    """(batch, token, head) of (B, N, H, D), or of packed (N, H, D)."""
    return (t.stride(0), t.stride(1), t.stride(2)) if t.dim() == 4 else (0, t.stride(0), t.stride(1))


def _dense_index(t):
    return None if t is None else t.contiguous()


def attention(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic):
    batch, tokens, heads, dim = q.shape
    o = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((batch, heads, tokens), dtype=torch.promote_types(q.dtype, torch.float32))
    if lse.numel():
        kv_len, frame_tokens_of = _dense_index(kv_len), _dense_index(frame_tokens_of)
        _cpu.attention_forward(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr(),
            _strides(q), _strides(k), _strides(v), _strides(o), (heads * tokens, tokens),
            batch, tokens, k.shape[1], heads, k.shape[2], dim, 0, 0, pointer(kv_len),
            pointer(frame_tokens_of), frame_tokens, 0, _NO_WINDOW, _NO_WINDOW,
            scale, DTYPE[q.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return o, lse


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic,
):  # fmt: skip
    tokens, heads, dim = q.shape
    o = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty((heads, tokens), dtype=torch.promote_types(q.dtype, torch.float32))
    if lse.numel():
        cu_q, cu_k, frame_tokens_of, grids = map(_dense_index, (cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids))
        _cpu.attention_forward(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr(),
            _strides(q), _strides(k), _strides(v), _strides(o), (0, tokens),
            cu_q.shape[0] - 1, tokens, k.shape[0], heads, k.shape[1], dim, cu_q.data_ptr(), cu_k.data_ptr(), 0,
            pointer(frame_tokens_of), frame_tokens, pointer(grids), tuple(window or _NO_WINDOW),
            tuple(window_stride), scale, DTYPE[q.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return o, lse


def _lse_strides(lse):
    return lse.stride() if lse.dim() == 3 else (0, *lse.stride())


def merge_attention(o1, lse1, o2, lse2):
    o = torch.empty(o1.shape, dtype=o1.dtype)
    lse = torch.empty(lse1.shape, dtype=lse1.dtype)
    if lse.numel():
        batch, tokens = (1, o1.shape[0]) if o1.dim() == 3 else o1.shape[:2]
        _cpu.merge_attention_forward(
            o1.data_ptr(), lse1.data_ptr(), o2.data_ptr(), lse2.data_ptr(), o.data_ptr(), lse.data_ptr(),
            _strides(o1), _lse_strides(lse1), _strides(o2), _lse_strides(lse2), _strides(o), _lse_strides(lse),
            batch, tokens, *o1.shape[-2:], DTYPE[o1.dtype], torch.get_num_threads(),
        )  # fmt: skip
    return o, lse


def register() -> None:
    for name in ("attention", "attention_varlen", "merge_attention"):
        _register(
            Impl(
                name,
                "cpu",
                lambda x, *_: on_cpu(x),
                globals()[name],
                getattr(reference, f"{name}_backward"),
                backward_backend="reference",
            )
        )
