"""attention on Triton: dense and packed forward (kernels/attention.py, attention_window.py), and the merge.

Launches: 1 dense; 2 packed (the plan of tiles, then attention); 1 for a merge, 1 for its backward.
"""

from __future__ import annotations

import importlib
import importlib.util

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ...kernels.attention import attention_forward, attention_varlen_forward
from ...kernels.attention_merge import merge_backward, merge_forward
from ...kernels.attention_window import attention_window_forward
from ..reference import attention as reference
from ..registry import Impl, register as _register
from ._config import Config, choose, tunable
from ._launch import arch, dot_precision, launch, unfit
from .attention_tiles import (
    MOST_CHANNELS,
    alignment,
    folded_scale,
    pieces,
    plan,
    plan_bricks,
    window_bricks,
    window_queries,
)  # fmt: skip

# Below so many (query, key) pairs the boxes of TMA cost more on the host than they bring on the card.
TMA_PAIRS = 1 << 24
# Tiles of 128 queries that fill a data-centre card; with fewer, tiles are half as tall.
FULL = 128


def _empty(t):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def _index(t):
    return None if t is None else t.contiguous()


# ---- tile sizes: (BLOCK_M, BLOCK_N, warp-specialised) ---------------------------------------------------------
tunable(
    "attention_forward",
    Config((128, 128, 0), 8, 2),
    Config((128, 64, 0), 8, 3),
    Config((128, 64, 0), 8, 2),
    Config((128, 64, 0), 4, 3),
    Config((128, 32, 0), 8, 3),
    Config((64, 64, 0), 4, 2),
    Config((64, 128, 0), 4, 2),
    Config((128, 128, 1), 8, 2),
)
tunable(
    "attention_window_forward",
    Config((128, 128, 0), 8, 2),
    Config((128, 64, 0), 8, 2),
    Config((128, 64, 0), 8, 3),
    Config((64, 64, 0), 4, 2),
    Config((64, 128, 0), 4, 2),
)


def _config(name, q, width, few, tma):
    """width: channels of both pieces."""
    itemsize = q.element_size()

    def default(arch):
        if itemsize == 4 or width > 256:
            return Config((64, 32 if width <= 128 else 16, 0), 8 if width > 64 else 4, 2)
        if width > 128:
            return Config((64, 32 if arch < 90 or arch >= 120 else 64, 0), 4 if width <= 192 else 8, 2)
        if few:
            return Config((64, 64 if arch < 120 else 32, 0), 4, 2)
        if arch >= 120:
            return Config((128, 32 if width > 64 else 64, 0), 8, 2)
        if arch >= 100:
            return Config((128, 128, 0), 8, 2)
        if arch >= 90:
            return Config((128, 128, 0), 8, 2)
        return Config((128, 64, 0), 8, 3 if width <= 64 else 2)

    return choose(name, q, (q.dtype, width, few, tma), default)


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
    o = _empty(q)
    lse = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    planes = batch * heads
    if not (planes and tokens):
        return o, lse
    d0, d1 = pieces(channels)
    few = planes * ((tokens + 127) // 128) < FULL
    boxed = _keys(q, k, v, planes * tokens * keys)
    (block_m, block_n, warps), num_warps, num_stages = _config("attention_forward", q, d0 + d1, few, boxed is not None)
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
        (q, k_rows, k_rest, v_rows, v_rest, o, lse, _index(kv_len), _index(frame_tokens_of)),
        (tokens, keys, heads, heads // kv_heads, min(frame_tokens, 2**31 - 1), tiles, *strides, factor),
        (
            channels, d0, d1, bool(frame_tokens) or frame_tokens_of is not None, negate,
            alignment(q.element_size(), *strides), block_m, block_n, boxed is not None,
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
    o = _empty(q)
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
        (block_m, block_n, _), num_warps, num_stages = _config("attention_window_forward", q, d0 + d1, few, False)
        brick, key_brick = window_bricks(window, window_stride, block_m, block_n)
        grids = grids.contiguous()
        launch(
            attention_window_forward,
            (2 * ((tokens + block_m - 1) // block_m) + segments + 1, heads, 1),
            (q, k, v, o, lse, plan_bricks(cu_q, grids, tokens, brick, window), cu_q, grids),
            (tokens, heads, group, segments, *strides, factor),
            (channels, d0, d1, negate, align, *brick, *key_brick, *window, *window_stride, dot_precision()),
            num_warps,
            num_stages,
        )
        return o, lse
    cu_k = cu_seqlens_k.contiguous()
    boxed = _keys(q, k, v, heads * tokens * min(max_seqlen_k, k.shape[0]))
    (block_m, block_n, _), num_warps, num_stages = _config("attention_forward", q, d0 + d1, few, boxed is not None)
    k_rest = v_rest = None
    k_rows, v_rows = k, v
    if boxed is not None:
        k_rows, k_rest, v_rows, v_rest = _boxes(boxed, block_n, d0, d1)
    launch(
        attention_varlen_forward,
        ((tokens + block_m - 1) // block_m + segments + 1, heads, 1),
        (
            q, k_rows, k_rest, v_rows, v_rest, o, lse, plan(cu_q, cu_k, tokens, block_m), cu_q, cu_k,
            _index(frame_tokens_of),
        ),
        (tokens, heads, group, segments, min(frame_tokens, 2**31 - 1), *strides, factor),
        (
            channels, d0, d1, bool(frame_tokens) or frame_tokens_of is not None, negate, align, block_m, block_n,
            boxed is not None, False, dot_precision(),
        ),
        num_warps,
        num_stages,
    )  # fmt: skip
    return o, lse


# ---- merge ----------------------------------------------------------------------------------------------------
def _of_o(t):
    """(batch, token, head) strides."""
    strides = t.stride()
    return strides[:3] if len(strides) == 4 else (0, *strides[:2])


def _of_lse(t):
    """(batch, head, token) strides."""
    strides = t.stride()
    return strides if len(strides) == 3 else (0, *strides)


def _rows(o):
    """Rows in all, tokens of a sample, heads; constants: channels, padded, rows of a program; the grid."""
    tokens, heads, channels = o.shape[-3:]
    total = o.numel() // channels
    width = max(1 << (channels - 1).bit_length(), 16)
    block = max(2048 // width, 1)
    return (total, tokens, heads), (channels, width, block), ((total + block - 1) // block, 1, 1)


def merge_attention(o1, lse1, o2, lse2):
    o, lse = _empty(o1), _empty(lse1)
    if o1.numel():
        numbers, (channels, width, block), grid = _rows(o1)
        strides = (*_of_o(o1), *_of_o(o2))
        launch(
            merge_forward, grid, (o1, lse1, o2, lse2, o, lse),
            (*numbers, *strides, *_of_lse(lse1), *_of_lse(lse2)),
            (channels, alignment(o1.element_size(), *strides), width, block), 4, 1,
        )  # fmt: skip
    return o, lse


def merge_attention_backward(do, dlse, o1, lse1, o2, lse2, needs):
    grads = [_empty(t) if need else None for t, need in zip((o1, lse1, o2, lse2), needs, strict=True)]
    if o1.numel() == 0 or (do is None and dlse is None) or not any(needs):
        return tuple(None if g is None else g.zero_() for g in grads)
    if do is not None and do.stride(-1) != 1:  # autograd may hand over an expanded one
        do = do.contiguous()
    numbers, (channels, width, block), grid = _rows(o1)
    strides = (*_of_o(o1), *_of_o(o2))
    of_do = _of_o(o1 if do is None else do)
    of_dlse = _of_lse(lse1 if dlse is None else dlse)
    launch(
        merge_backward, grid, (o1, lse1, o2, lse2, do, dlse, *grads),
        (*numbers, *strides, *_of_lse(lse1), *_of_lse(lse2), *of_do, *of_dlse),
        (channels, alignment(o1.element_size(), *strides, *of_do), width, block), 4, 1,
    )  # fmt: skip
    return tuple(grads)


def _supports(q, *_):
    if q.shape[-1] > MOST_CHANNELS:
        return f"holds heads of at most {MOST_CHANNELS} channels; got {q.shape[-1]}"
    return unfit(q)


def register() -> None:
    _register(Impl("merge_attention", "triton", lambda o1, *_: unfit(o1), merge_attention, merge_attention_backward))
    name = f"{__package__}.attention_backward"
    own = importlib.util.find_spec(name) is not None
    gradients = importlib.import_module(name) if own else reference
    for op, forward in (("attention", attention), ("attention_varlen", attention_varlen)):
        backward = getattr(gradients, f"{op}_backward")
        where = None if own else "reference"
        _register(Impl(op, "triton", _supports, forward, backward, backward_backend=where))
