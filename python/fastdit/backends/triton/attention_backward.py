"""Gradients of attention and attention_varlen on the Triton kernels: row statistics, then dK with dV, then dQ.

Three launches when dense; packed, one more for each of the two plans of tiles. Deterministic in any case: every output
tile has one owner (kernels/attention_backward.py). Beside the gradients 8 bytes a query row are allocated.
"""

from __future__ import annotations

import torch

from ...kernels.attention_backward import attention_dkdv, attention_rows, attention_varlen_dkdv
from ...kernels.attention_backward_dq import attention_dq, attention_varlen_dq
from .._attention_bricks import bricks
from .._tensors import contiguous, empty, rows_contiguous
from ._config import Config, choose, tunable
from ._launch import dot_precision, launch
from ._tiles import alignment, power
from .attention_tiles import pieces, plan, plan_bricks

_ROWS = 32  # of attention_rows


# ---- tiles: blocks = (queries, keys) ------------------------------------------------------------------------
# What fits the registers without spills, by head dim and mask ("none", "frames", "window": masks need registers too).
# Three stages on sm_90: its copies are waited for one turn later than they are issued.
def _dkdv_default(arch: int, itemsize: int, channels: int, mask: str) -> Config:
    if channels > 128:
        return Config((32, 32) if itemsize == 2 else (16, 16), 8, 1)
    if itemsize == 4:
        return Config((32, 32), 4 if mask == "window" and (channels > 64) == (arch < 90) else 8, 1)
    if 90 <= arch < 120:
        if mask == "window" and (channels > 64 or arch >= 100):
            return Config((32, 128), 8, 3) if arch < 100 else Config((32, 64 if channels > 64 else 128), 8, 2)
        wide = arch < 100 and channels <= 64 and mask == "none"
        return Config((128, 128) if wide else (64, 128), 8, 3 if arch < 100 else 2)
    if channels > 96:
        return Config((64, 64), 8, 2)
    if channels > 80:
        return Config((32, 64), 8, 2) if mask == "none" else Config((16, 64), 4, 2)
    if channels > 64:
        return Config((32, 64), 8, 2)
    return Config((64, 128), 8, 2) if mask == "none" else Config((32, 64), 4, 2)


def _dq_default(arch: int, itemsize: int, channels: int, mask: str) -> Config:
    if channels > 128:
        return Config((32, 32) if itemsize == 2 else (16, 16), 8, 1)
    if itemsize == 4:
        tight = arch < 90 and channels <= 80 and (channels > 64 or mask == "window")
        ahead = mask == "window" and channels > 80 if arch >= 120 else channels <= 64 and arch >= 100
        return Config((32, 32), 4 if tight else 8, 2 if ahead else 1)
    if 90 <= arch < 120:
        wide = arch < 100 and channels <= 64
        return Config((128, 128) if wide else (128, 64), 8, 3 if arch < 100 else 2)
    if channels > 80 or (channels > 64 and arch >= 120 and mask != "window"):
        return Config((128, 32), 8, 2)
    if channels > 64 and mask == "window":
        return Config((64, 32), 4, 2)
    return Config((128, 64), 8, 2)


tunable(
    "attention_dkdv",
    Config((64, 128), 8, 3), Config((64, 128), 8, 2), Config((32, 128), 8, 3), Config((128, 128), 8, 3),
    Config((64, 64), 8, 2), Config((32, 64), 8, 2), Config((32, 64), 4, 2), Config((16, 64), 4, 2),
)  # fmt: skip
tunable(
    "attention_dq",
    Config((128, 64), 8, 3), Config((128, 64), 8, 2), Config((128, 128), 8, 3), Config((128, 128), 8, 2),
    Config((128, 32), 8, 2), Config((64, 64), 4, 2), Config((64, 32), 4, 2), Config((64, 64), 4, 3),
)  # fmt: skip


def _tiles(q, mask: str) -> tuple[Config, Config]:
    facts = (q.element_size(), q.shape[-1], mask)
    key = (q.dtype, q.shape[-1], mask)
    return (
        choose("attention_dkdv", q, key, lambda arch: _dkdv_default(arch, *facts)),
        choose("attention_dq", q, key, lambda arch: _dq_default(arch, *facts)),
    )


# ---- what both have in common -------------------------------------------------------------------------------
def _given(do, dlse, q, k, v, o, needs):
    """Empty gradients and a usable do; do is None where the gradients are zero and done."""
    grads = [empty(t) if need else None for t, need in zip((q, k, v), needs, strict=True)]
    if q.numel() == 0 or k.numel() == 0 or (do is None and dlse is None):
        return tuple(None if g is None else g.zero_() for g in grads), None
    return tuple(grads), torch.zeros_like(o) if do is None else rows_contiguous(do)


def _rows(do, dlse, o, lse, align):
    """(2, batch, heads, tokens) fp32: lse in base 2, and delta = rowsum(do * o) - dlse."""
    *batch, tokens, heads, channels = o.shape
    rows = torch.empty((2, *lse.shape), dtype=torch.float32, device=o.device)
    of_do = do.stride()[:3] if batch else (0, *do.stride()[:2])
    of_dlse = (0, 0, 0)
    if dlse is not None:
        *far, head, token = dlse.stride()
        of_dlse = (*(far or (0,)), token, head)
    grid = -(-tokens // _ROWS) * heads * (batch[0] if batch else 1)
    launch(
        attention_rows, (grid, 1, 1), (o.contiguous(), do, lse.contiguous(), dlse, rows),
        (tokens, lse.numel(), *of_do, *of_dlse),
        (heads, channels, _ROWS, max(power(channels), 16), align), 8 if o.element_size() == 4 else 4, 1,
    )  # fmt: skip
    return rows


# ---- dense --------------------------------------------------------------------------------------------------
def attention_backward(
    do, dlse, q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic, o, lse, needs
):
    grads, do = _given(do, dlse, q, k, v, o, needs)
    if do is None:
        return grads
    dq, dk, dv = grads
    batch, n, heads, channels = q.shape
    m, kv_heads = k.shape[1:3]
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *do.stride()[:3])
    align = alignment(q.element_size(), *strides)
    rows = _rows(do, dlse, o, lse, align)
    frames = frame_tokens_of is not None or frame_tokens > 0
    of_keys, of_queries = _tiles(q, "frames" if frames else "none")
    masks = (contiguous(kv_len), contiguous(frame_tokens_of))
    static = (heads, kv_heads, channels, *pieces(channels), frames)
    rest = (min(frame_tokens, m), lse.numel(), *strides, scale)
    if dk is not None or dv is not None:
        block_m, block_n = of_keys.blocks
        tiles = -(-m // block_n)
        launch(
            attention_dkdv, (tiles * kv_heads * batch, 1, 1), (q, k, v, do, rows, dk, dv, *masks), (n, m, tiles, *rest),
            (*static, block_m, block_n, dot_precision(), align), of_keys.warps, of_keys.stages,
        )  # fmt: skip
    if dq is not None:
        block_m, block_n = of_queries.blocks
        tiles = -(-n // block_m)
        launch(
            attention_dq, (tiles * heads * batch, 1, 1), (q, k, v, do, rows, dq, *masks), (n, m, tiles, *rest),
            (*static, block_m, block_n, dot_precision(), align), of_queries.warps, of_queries.stages,
        )  # fmt: skip
    return grads


# ---- packed -------------------------------------------------------------------------------------------------
def attention_varlen_backward(
    do, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic, o, lse, needs,
):  # fmt: skip
    grads, do = _given(do, dlse, q, k, v, o, needs)
    if do is None:
        return grads
    dq, dk, dv = grads
    n, heads, channels = q.shape
    m, kv_heads = k.shape[:2]
    strides = (*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *do.stride()[:2])
    align = alignment(q.element_size(), *strides)
    rows = _rows(do, dlse, o, lse, align)
    frames = frame_tokens_of is not None or frame_tokens > 0
    of_keys, of_queries = _tiles(q, "frames" if frames else "none" if grids is None else "window")
    cu_q, cu_k, grids = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), contiguous(grids)
    segments = cu_q.shape[0] - 1
    indices = (cu_q, cu_k, contiguous(frame_tokens_of), grids)
    static = (heads, kv_heads, channels, *pieces(channels), frames)
    rest = (segments, min(frame_tokens, m), lse.numel(), *strides, scale)
    if dk is not None or dv is not None:
        block_m, block_n = of_keys.blocks
        made, bricks, programs = _plan(cu_k, cu_q, grids, m, block_n, block_m, window, window_stride, True)
        launch(
            attention_varlen_dkdv, (programs * kv_heads, 1, 1), (q, k, v, do, rows, dk, dv, made, *indices),
            (n, m, *rest), (*static, *bricks, block_m, block_n, dot_precision(), align),
            of_keys.warps, of_keys.stages,
        )  # fmt: skip
    if dq is not None:
        block_m, block_n = of_queries.blocks
        made, bricks, programs = _plan(cu_q, cu_k, grids, n, block_m, block_n, window, window_stride, False)
        launch(
            attention_varlen_dq, (programs * heads, 1, 1), (q, k, v, do, rows, dq, made, *indices),
            (n, m, *rest), (*static, *bricks, block_m, block_n, dot_precision(), align),
            of_queries.warps, of_queries.stages,
        )  # fmt: skip
    return grads


def _plan(cu, cu_other, grids, rows, own, other, window, stride, of_keys):
    """The plan of the owners' tiles, (WINDOW, STRIDE, BRICK_M, BRICK_N), and programs per head.

    A grid has few more bricks than its tokens fill, but only the device knows how many: half as many again."""
    programs = -(-rows // own) + cu.shape[0]
    if grids is None:
        return plan(cu, cu_other, rows, own), (None, None, None, None), programs
    window, stride = tuple(window), tuple(stride)
    owned, walked = bricks(window, stride, own, other, of_keys)
    made = plan_bricks(cu, grids, rows, owned, window)
    return made, (window, stride, *((walked, owned) if of_keys else (owned, walked))), programs + programs // 2
