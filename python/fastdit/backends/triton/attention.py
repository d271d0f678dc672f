"""attention on Triton: dense and packed forward (kernels/attention.py, attention_window.py).

Launches: 1 dense; 2 packed (the plan of tiles, then attention).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kernels.attention import attention_forward, attention_varlen_forward
from ...kernels.attention_window import attention_window_forward
from .._facts import kept
from .._tensors import contiguous, empty
from ..registry import Impl, register as _register
from ._launch import VERSION, Launch, arch, dot_precision, unfit
from ._tiles import alignment
from .attention_backward import attention_backward, attention_varlen_backward
from .attention_merge import merge_attention, merge_attention_backward
from .attention_tiles import (
    MOST_CHANNELS,
    far,
    folded_scale,
    lines_config,
    pieces,
    plan as plan_rows,
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
def _has_boxes(card: int) -> bool:
    """Triton 3.6 names a box's place in a cluster, which sm_120 has not: each box becomes a test and a call."""
    return 90 <= card < 120 or (card >= 120 and VERSION >= (3, 7))


def _aligned(k, v) -> bool:
    """Whether boxes may start where k and v do."""
    return (k.data_ptr() | v.data_ptr()) & 15 == 0


def _boxed(q, k, v, pairs: int) -> bool:
    """Whether tiles of keys come as TMA boxes: 16-byte aligned strides, none of them 0."""
    if pairs < TMA_PAIRS or q.element_size() != 2 or not _has_boxes(arch(q)):
        return False
    return k.numel() > 0 and all(s > 0 and s * 2 % 16 == 0 for t in (k, v) for s in t.stride()[:-1])


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


def _key_rows(k, v, boxes):
    """k, the second piece of its heads, v and its second piece, as the kernel takes them."""
    if boxes is None:
        return k, None, v, None
    return _boxes((k[None], v[None]) if k.dim() == 3 else (k, v), *boxes)


# ---- forward --------------------------------------------------------------------------------------------------
class _Plan(NamedTuple):
    launch: Launch
    boxes: tuple[int, int, int] | None = None  # keys of a tile, and the two pieces of a head, where TMA brings them
    tiles: tuple = ()  # what the plan of tiles is told, when packed


@kept
def _dense(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, aligned, precision) -> _Plan | None:
    batch, tokens, heads, channels = q.shape
    keys, kv_heads = k.shape[1], k.shape[2]
    planes = batch * heads
    if not (planes and tokens):
        return None
    d0, d1 = pieces(channels)
    few = planes * ((tokens + 127) // 128) < FULL
    boxed = aligned and _boxed(q, k, v, planes * tokens * keys)
    (block_m, block_n, warps), num_warps, num_stages = lines_config(q, d0 + d1, few)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    factor, negate = folded_scale(scale, q.element_size())
    tiles = (tokens + block_m - 1) // block_m
    launch = Launch(
        attention_forward,
        (tiles * planes, 1, 1),
        (tokens, keys, heads, heads // kv_heads, min(frame_tokens, 2**31 - 1), tiles, *strides, factor),
        (
            channels, d0, d1, bool(frame_tokens) or frame_tokens_of is not None, negate,
            alignment(q.element_size(), *strides), block_m, block_n, far(block_n, k, v), boxed,
            bool(warps) and boxed and kv_len is None, precision,
        ),
        num_warps,
        num_stages,
    )  # fmt: skip
    return _Plan(launch, (block_n, d0, d1) if boxed else None)


def attention(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic):
    batch, tokens, heads, _ = q.shape
    o = empty(q)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    plan = _dense(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, _aligned(k, v), dot_precision())
    if plan is not None:
        rows = _key_rows(k, v, plan.boxes)
        plan.launch(q, *rows, o, lse, contiguous(kv_len), contiguous(frame_tokens_of))
    return o, lse


@kept
def _packed(
    q, k, v, cu_seqlens_q, frame_tokens_of, grids, max_seqlen_k, frame_tokens, window, window_stride, scale,
    aligned, precision,
) -> _Plan | None:  # fmt: skip
    tokens, heads, channels = q.shape
    if not (heads and tokens):
        return None
    d0, d1 = pieces(channels)
    few = heads * ((tokens + 127) // 128) < FULL
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2])
    align = alignment(q.element_size(), *strides)
    factor, negate = folded_scale(scale, q.element_size())
    segments = cu_seqlens_q.shape[0] - 1
    group = heads // k.shape[1]
    if grids is not None:
        few = few or window_queries(window, window_stride) == 64
        (block_m, block_n), num_warps, num_stages = window_config(q, d0 + d1, few)
        brick, key_brick, bits = window_bricks(window, window_stride, block_m, block_n)
        launch = Launch(
            attention_window_forward,
            (2 * ((tokens + block_m - 1) // block_m) + segments + 1, heads, 1),
            (tokens, heads, group, segments, *strides, factor),
            (
                channels, d0, d1, negate, align, far(tokens, k, v), *brick, *key_brick, *window, *window_stride, *bits,
                precision,
            ),
            num_warps,
            num_stages,
        )  # fmt: skip
        return _Plan(launch, tiles=(tokens, brick, window))
    boxed = aligned and _boxed(q, k, v, heads * tokens * min(max_seqlen_k, k.shape[0]))
    (block_m, block_n, _), num_warps, num_stages = lines_config(q, d0 + d1, few)
    launch = Launch(
        attention_varlen_forward,
        ((tokens + block_m - 1) // block_m + segments + 1, heads, 1),
        (tokens, heads, group, segments, min(frame_tokens, 2**31 - 1), *strides, factor),
        (
            channels, d0, d1, bool(frame_tokens) or frame_tokens_of is not None, negate, align, block_m, block_n,
            far(block_n, k, v), boxed, False, precision,
        ),
        num_warps,
        num_stages,
    )  # fmt: skip
    return _Plan(launch, (block_n, d0, d1) if boxed else None, (tokens, block_m))


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic,
):  # fmt: skip
    tokens, heads, _ = q.shape
    o = empty(q)
    lse = torch.empty((heads, tokens), dtype=torch.float32, device=q.device)
    plan = _packed(
        q, k, v, cu_seqlens_q, frame_tokens_of, grids, max_seqlen_k, frame_tokens,
        None if window is None else tuple(window), tuple(window_stride), scale, _aligned(k, v), dot_precision(),
    )  # fmt: skip
    if plan is None:
        return o, lse
    cu_q = cu_seqlens_q.contiguous()
    if grids is not None:
        grids = grids.contiguous()
        plan.launch(q, k, v, o, lse, plan_bricks(cu_q, grids, *plan.tiles), cu_q, grids)
        return o, lse
    cu_k = cu_seqlens_k.contiguous()
    tiles = plan_rows(cu_q, cu_k, *plan.tiles)
    plan.launch(q, *_key_rows(k, v, plan.boxes), o, lse, tiles, cu_q, cu_k, contiguous(frame_tokens_of))
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
