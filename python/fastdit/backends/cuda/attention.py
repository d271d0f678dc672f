"""attention on the CUDA kernels (csrc/cuda/attention*.cu): dense and packed, fp16 and bf16.

Launches: 1 dense; 2 packed (the plan of tiles, then attention). k and v are read where they lie; rows that do not stand
on 16 bytes are copied first.
"""

from __future__ import annotations

import torch

from .._attention_abi import dense, packed
from .._attention_bricks import bricks
from .._tensors import contiguous, empty
from ..cpu._abi import pointer
from ..registry import Impl, register as _register
from ._launch import launch, unfit

QUERIES, KEYS = 128, 64  # of a tile: kAttentionQueries, kAttentionKeys
CHANNELS = 128


def _supports(q, *_) -> str | None:
    refusal, channels = unfit(q), q.shape[-1]
    if refusal is None and q.dtype == torch.float32:
        refusal = "multiplies 16-bit values; got torch.float32"
    if refusal is None and (channels > CHANNELS or channels % 8):
        refusal = f"holds heads of 8 to {CHANNELS} channels, a multiple of 8; got {channels}"
    return refusal


def _fit(t):
    """Rows as the kernels copy them: 16-byte packs, less than 2^32 bytes apart."""
    strides = t.stride()[:-1]
    if t.data_ptr() % 16 == 0 and all(s % 8 == 0 for s in strides) and strides[-2] < 1 << 31:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _line(tokens: int) -> tuple[int, int, int]:
    return (1, 1, tokens)


def _plan(op, q, cu, cu_other, grids, rows, own, window):
    """(2, S + 2) int32: see csrc/cuda/attention.h."""
    made = cu.new_empty((2, cu.shape[0] + 1))
    arguments = (pointer(made), pointer(cu), pointer(cu_other), pointer(grids), cu.shape[0] - 1, rows, window, own)
    launch("attention_plan", op, q, arguments, (cu, cu_other, grids), (made,))
    return made


def attention(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic):
    batch, tokens, heads, _ = q.shape
    o = empty(q)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if o.numel():
        q, k, v = _fit(q), _fit(k), _fit(v)
        kv_len, frames = contiguous(kv_len), contiguous(frame_tokens_of)
        shared = dense(q, k, v, o, lse, kv_len, frames, frame_tokens, scale)
        cut = (0, -(-tokens // QUERIES), _line(QUERIES), _line(KEYS))
        launch("attention_forward", "attention", q, (shared, cut), (q, k, v, kv_len, frames), (o, lse))
    return o, lse


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic,
):  # fmt: skip
    tokens, heads, _ = q.shape
    o = empty(q)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if o.numel():
        op = "attention_varlen"
        q, k, v = _fit(q), _fit(k), _fit(v)
        cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
        frames, grids = contiguous(frame_tokens_of), contiguous(grids)
        own, other, sides = _line(QUERIES), _line(KEYS), (0, 0, 0)
        programs = -(-tokens // QUERIES) + cu_q.shape[0]
        if grids is not None:
            sides = tuple(window)
            own, other = bricks(sides, tuple(window_stride), QUERIES, KEYS, False)
            programs += -(-tokens // QUERIES)  # only the device knows how many bricks there are
        plan = _plan(op, q, cu_q, cu_k, grids, tokens, own, sides)
        shared = packed(q, k, v, o, lse, cu_q, cu_k, frames, grids, frame_tokens, window, window_stride, scale)
        cut = (pointer(plan), programs, own, other)
        launch("attention_forward", op, q, (shared, cut), (q, k, v, cu_q, cu_k, frames, grids, plan), (o, lse))
    return o, lse


def register() -> None:
    for name in ("attention", "attention_varlen"):
        _register(Impl(name, "cuda", _supports, globals()[name], globals().get(f"{name}_backward")))
