"""What the compiled backends (cpu, cuda) are told of an attention call: tensors as pointers, sizes and strides.

Mirrors csrc/bindings/attention.h. o and lse are contiguous.
"""

from __future__ import annotations

import torch

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
        cu_q.shape[0] - 1, cu_q.data_ptr(), cu_k.data_ptr(), 0, pointer(frame_tokens_of), frame_tokens, windowed,
        scale, DTYPE[q.dtype], torch.get_num_threads(),
    )  # fmt: skip


def two(o1, lse1, o2, lse2):
    """Of merge_attention: the inputs, in any strides."""
    batch, tokens = (1, o1.shape[0]) if o1.dim() == 3 else o1.shape[:2]
    return (
        o1.data_ptr(), lse1.data_ptr(), o2.data_ptr(), lse2.data_ptr(),
        of_o(o1), of_lse(lse1), of_o(o2), of_lse(lse2),
        batch, tokens, *o1.shape[-2:], DTYPE[o1.dtype], torch.get_num_threads(),
    )  # fmt: skip
