"""What the compiled backends (cpu, cuda) are told of an attention call: tensors as pointers, sizes and strides.

Mirrors csrc/bindings/attention.h. o and lse are contiguous. merge_attention is the same on both but for the kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._tensors import empty, rows_contiguous
from .cpu._abi import DTYPE, pointer


def of_o(t):
    """(batch, token, head) strides of (B, N, H, D), or of packed (N, H, D)."""
    strides = t.stride()
    return strides[:3] if len(strides) == 4 else (0, *strides[:2])


def of_lse(t):
    """(batch, head, token) strides."""
    strides = t.stride()
    return strides if len(strides) == 3 else (0, *strides)


def given_o(t):
    return None if t is None else (t.data_ptr(), of_o(t))


def given_lse(t):
    return None if t is None else (t.data_ptr(), of_lse(t))


def dense(q, k, v, o, lse, kv_len, frame_tokens_of, frame_tokens, scale):
    return (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr(),
        q.shape, k.shape, q.stride(), k.stride(), v.stride(),
        0, 0, 0, pointer(kv_len), pointer(frame_tokens_of), frame_tokens, None,
        scale, DTYPE[q.dtype], torch.get_num_threads(),
    )  # fmt: skip


def packed(q, k, v, o, lse, cu_q, cu_k, frame_tokens_of, grids, frame_tokens, window, window_stride, scale):
    windowed = None if grids is None else (grids.data_ptr(), tuple(window), tuple(window_stride))
    return (
        q.data_ptr(), k.data_ptr(), v.data_ptr(), o.data_ptr(), lse.data_ptr(),
        q.shape, k.shape, q.stride(), k.stride(), v.stride(),
        cu_q.numel() - 1, cu_q.data_ptr(), cu_k.data_ptr(), 0, pointer(frame_tokens_of), frame_tokens, windowed,
        scale, DTYPE[q.dtype], torch.get_num_threads(),
    )  # fmt: skip


def _two(o1, lse1, o2, lse2):
    """Of merge_attention: the inputs, in any strides."""
    batch, tokens = (1, o1.shape[0]) if o1.dim() == 3 else o1.shape[:2]
    return (
        o1.data_ptr(), lse1.data_ptr(), o2.data_ptr(), lse2.data_ptr(),
        of_o(o1), of_lse(lse1), of_o(o2), of_lse(lse2),
        batch, tokens, *o1.shape[-2:], DTYPE[o1.dtype], torch.get_num_threads(),
    )  # fmt: skip


def merges(run: Callable) -> tuple[Callable, Callable]:
    """merge_attention and its gradient in the order of their schemas; run: as cuda's `launch`."""

    def merge_attention(o1, lse1, o2, lse2):
        o, lse = empty(o1), empty(lse1)
        if lse.numel():
            reads = (o1, lse1, o2, lse2)
            arguments = (_two(*reads), given_o(o), given_lse(lse))
            run("merge_attention_forward", "merge_attention", o1, arguments, reads, (o, lse))
        return o, lse

    def merge_attention_backward(do, dlse, o1, lse1, o2, lse2, needs):
        reads = (o1, lse1, o2, lse2)
        grads = d_o1, d_lse1, d_o2, d_lse2 = tuple(
            empty(t) if need else None for t, need in zip(reads, needs, strict=True)
        )
        if lse1.numel() == 0 or (do is None and dlse is None):
            return tuple(None if g is None else g.zero_() for g in grads)
        do = torch.zeros_like(o1) if do is None else rows_contiguous(do)
        made = (given_o(d_o1), given_lse(d_lse1), given_o(d_o2), given_lse(d_lse2))
        arguments = (_two(*reads), given_o(do), given_lse(dlse), *made)
        run("merge_attention_backward", "merge_attention_backward", o1, arguments, (*reads, do, dlse), grads)
        return grads

    return merge_attention, merge_attention_backward
