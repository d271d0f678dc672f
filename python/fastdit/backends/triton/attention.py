"""attention on Triton: dense and packed forward (kernels/attention.py, attention_window.py).

Launches: 1 dense; 2 packed (the plan of tiles, then attention).
"""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kernels.attention import attention_forward, attention_varlen_forward
from ...kernels.attention_window import attention_window_forward
from .._tensors import contiguous, empty
from ..registry import Impl, register as _register
from ._launch import arch, dot_precision, launch, unfit
from ._tiles import alignment
from .attention_backward import attention_backward, attention_varlen_backward
from .attention_merge import merge_attention, merge_attention_backward
from .attention_tiles import (
    MOST_CHANNELS,
    far,
    folded_scale,
    lines_config,
    pieces,
    plan,
    plan_bricks,
    window_bricks,
    window_config,
    window_queries,
)  # fmt: skip

# Below so many (query, key) pairs the boxes of TMA cost more on the host than they bring on the card.
TMA_PAIRS = 1 << 24
# Tiles of 128 queries that fill a data-centre card; with fewer, tiles are half as tall.
FULL = 128


# ---- TMA ----------------------------------------------------------------------------------------------------
def _boxed(t):
    """t (B, N, H, D) can be read by boxes: 16-byte aligned strides, none of them 0."""
    if t.data_ptr() & 15 or not t.numel():
        return False
    size = t.element_size()
    return all(stride > 0 and stride * size % 16 == 0 for stride in t.stride()[:-1])


def _boxes(keys, block, d0, d1):
    """Descriptors of k and v, (B, N, H, D): a tile of a head is one box, zeros behind its last row and channel."""
    made = []
    for t in keys:
        batch, rows, heads, channels = t.shape
        s_batch, s_row, s_head, _ = t.stride()
        shape, strides = [batch, heads, rows, channels], [s_batch, s_head, s_row, 1]
        made.append(TensorDescriptor(t, shape, strides, [1, 1, block, d0]))
        made.append(TensorDescriptor(t, shape, strides, [1, 1, block, d1]) if d1 else None)
    return made


def _keys(q, k, v, pairs):
    """Whether tiles of keys come as TMA boxes: (k, v as (B, N, H, D)) where they do, else None."""
    if pairs < TMA_PAIRS or q.element_size() != 2 or arch(q) < 90:
        return None
    if k.dim() == 3:
        k, v = k[None], v[None]
    return (k, v) if _boxed(k) and _boxed(v) else None


# ---- forward --------------------------------------------------------------------------------------------------
def attention(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic):
    batch, tokens, heads, channels = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    o = empty(q)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    planes = batch * heads
    if not (planes and tokens):
        return o, lse
    d0, d1 = pieces(channels)
    few = planes * ((tokens + 127) // 128) < FULL
    boxed = _keys(q, k, v, planes * tokens * keys)
    sizes = lines_config(q, d0 + d1, few)
    (block_m, block_n, warps), num_warps, num_stages = sizes
    k_rest = v_rest = None
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    k_rows, v_rows = k, v
    if boxed is not None:
        k_rows, k_rest, v_rows, v_rest = _boxes(boxed, block_n, d0, d1)
    factor, negate = folded_scale(scale, q.element_size())
    tiles = (tokens + block_m - 1) // block_m
    launch(
        attention_forward,
        (tiles * planes, 1, 1),
        (q, k_rows, k_rest, v_rows, v_rest, o, lse, contiguous(kv_len), contiguous(frame_tokens_of)),
        (tokens, keys, heads, heads // kv_heads, min(frame_tokens, 2**31 - 1), tiles, *strides, factor),
        (
            channels, d0, d1, bool(frame_tokens) or frame_tokens_of is not None, negate,
            alignment(q.element_size(), *strides), block_m, block_n, far(block_n, k, v), boxed is not None,
            bool(warps) and boxed is not None and kv_len is None, dot_precision(),
        ),
        num_warps,
        num_stages,
    )  # fmt: skip
    return o, lse


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic,
):  # fmt: skip
    tokens, heads, channels = q.shape
    o = empty(q)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    if not (heads and tokens):
        return o, lse
    d0, d1 = pieces(channels)
    few = heads * ((tokens + 127) // 128) < FULL
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    align = alignment(q.element_size(), *strides)
    factor, negate = folded_scale(scale, q.element_size())
    segments = cu_seqlens_q.shape[0] - 1
    cu_q = cu_seqlens_q.contiguous()
    group = heads // k.shape[1]
    if grids is not None:
        window, window_stride = tuple(window), tuple(window_stride)
        few = few or window_queries(window, window_stride) == 64
        sizes = window_config(q, d0 + d1, few)
        (block_m, block_n), num_warps, num_stages = sizes
        brick, key_brick, bits = window_bricks(window, window_stride, block_m, block_n)
        grids = grids.contiguous()
        launch(
            attention_window_forward,
            (2 * ((tokens + block_m - 1) // block_m) + segments + 1, heads, 1),
            (q, k, v, o, lse, plan_bricks(cu_q, grids, tokens, brick, window), cu_q, grids),
            (tokens, heads, group, segments, *strides, factor),
            (
                channels,
                d0,
                d1,
                negate,
                align,
                far(tokens, k, v),
                *brick,
                *key_brick,
                *window,
                *window_stride,
                *bits,
                dot_precision(),
            ),
            num_warps,
            num_stages,
        )
        return o, lse
    cu_k = cu_seqlens_k.contiguous()
    boxed = _keys(q, k, v, heads * tokens * min(max_seqlen_k, k.shape[0]))
    sizes = lines_config(q, d0 + d1, few)
    (block_m, block_n, _), num_warps, num_stages = sizes
    k_rest = v_rest = None
    k_rows, v_rows = k, v
    if boxed is not None:
        k_rows, k_rest, v_rows, v_rest = _boxes(boxed, block_n, d0, d1)
    launch(
        attention_varlen_forward,
        ((tokens + block_m - 1) // block_m + segments + 1, heads, 1),
        (
            q, k_rows, k_rest, v_rows, v_rest, o, lse, plan(cu_q, cu_k, tokens, block_m), cu_q, cu_k,
            contiguous(frame_tokens_of),
        ),
        (tokens, heads, group, segments, min(frame_tokens, 2**31 - 1), *strides, factor),
        (
            channels, d0, d1, bool(frame_tokens) or frame_tokens_of is not None, negate, align, block_m, block_n,
            far(block_n, k, v), boxed is not None, False, dot_precision(),
        ),
        num_warps,
        num_stages,
    )  # fmt: skip
    return o, lse


# ---- the backend ----------------------------------------------------------------------------------------------
def _supports(q, *_):
    if q.shape[-1] > MOST_CHANNELS:
        return f"holds heads of at most {MOST_CHANNELS} channels; got {q.shape[-1]}"
    return unfit(q)


def register() -> None:
    _register(Impl("merge_attention", "triton", lambda o1, *_: unfit(o1), merge_attention, merge_attention_backward))
    _register(Impl("attention", "triton", _supports, attention, attention_backward))
    _register(Impl("attention_varlen", "triton", _supports, attention_varlen, attention_varlen_backward))
