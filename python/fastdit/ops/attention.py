"""Softmax attention over a dense batch or packed segments, with the masks that DiTs need and no dense mask tensor.

Layouts are the projections' own: (B, N, H, D), or packed (N, H, D) with `cu_seqlens`. k and v may have fewer heads
than q (grouped queries). Inputs may be strided views (`qkv.unbind(2)`) as long as the channel dim is contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _check, attention_check as check
from ._op import Op


def _fake_dense(q, *_):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=check.lse_dtype(q))


def _fake_varlen(q, *_):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=check.lse_dtype(q))


def _check_attention(q, k, v, kv_len, frames_of, frames, scale, return_lse, deterministic) -> tuple:
    op = "attention"
    check.qkv(op, q, k, v, 4, "(B, N, H, D)")
    if kv_len is not None:
        check.int32(op, "kv_len", kv_len, (q.shape[0],), q, "one key count per sample")
    if frames_of is not None or frames is not None:
        frames_of, frames = check.frames(op, frames_of if frames is None else frames, q.shape[0], q)
        if q.shape[1] > k.shape[1]:
            raise ValueError(
                f"{op}: frame_tokens needs the queries among the keys; got {q.shape[1]} queries over {k.shape[1]} "
                "keys, expected N <= M; pass the cached keys too."
            )
    return q, k, v, kv_len, frames_of, frames or 0, check.softmax_scale(op, q, scale), return_lse, deterministic


def _check_varlen(
    q, k, v, cu_q, cu_k, frames_of, grids, max_q, max_k, frames, window, window_stride, scale, return_lse, deterministic
) -> tuple:
    op = "attention_varlen"
    check.qkv(op, q, k, v, 3, "packed (N, H, D)")
    check.bounds(op, "cu_seqlens_q", cu_q, q)
    check.length(op, "max_seqlen_q", max_q)
    own_keys = cu_k is None
    if own_keys != (max_k is None):
        raise ValueError(
            f"{op}: cu_seqlens_k and max_seqlen_k come together; got one of them, expected both or none; pass both."
        )
    if own_keys:
        cu_k, max_k = cu_q, max_q
    else:
        check.int32(op, "cu_seqlens_k", cu_k, tuple(cu_q.shape), q, "as many segments as cu_seqlens_q")
        check.length(op, "max_seqlen_k", max_k)
    segments = cu_q.shape[0] - 1
    framed = frames_of is not None or frames is not None
    frames_of, frames = check.frames(op, frames_of if frames is None else frames, segments, q)
    if (window is None) != (grids is None):
        raise ValueError(f"{op}: window and grids come together; got one of them, expected both or none; pass both.")
    window_list = None if window is None else check.triple(op, "window", window, None)
    stride = check.triple(op, "window_stride", window_stride, window)
    if grids is not None:
        check.int32(op, "grids", grids, (segments, 3), q, "the (T, H, W) of each segment")
        if framed:
            raise ValueError(f"{op}: window and frame_tokens exclude each other; got both, expected one; drop one.")
        if not own_keys or q.shape[0] != k.shape[0]:
            raise ValueError(f"{op}: window is self-attention; got keys of their own, expected q's; drop them.")
    scale = check.softmax_scale(op, q, scale)
    return (
        q, k, v, cu_q, cu_k, frames_of, grids, max_q, max_k, frames, window_list, stride, scale,
        return_lse, deterministic,
    )  # fmt: skip


def _check_merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple:
    op = "merge_attention"
    for what, o in (("o1", o1), ("o2", o2)):
        _check.floating(op, what, o)
        _check.rank(op, what, o, (3, 4), "(B, N, H, D) or packed (N, H, D)")
        if o.shape[-1] == 0:
            raise ValueError(f"{op}: {what} has no channels; got {list(o.shape)}, expected D >= 1; check the heads.")
        _check.channels_contiguous(op, what, o)
        _check.same_device(op, what, o, o1)
        if o.shape != o1.shape:
            raise ValueError(
                f"{op}: o1 and o2 differ in shape; got {list(o1.shape)} and {list(o2.shape)}, expected the same "
                "queries; slice them alike."
            )
        if o.dtype != o1.dtype:
            raise TypeError(
                f"{op}: o1 and o2 differ in dtype; got {_check.name(o1.dtype)} and {_check.name(o2.dtype)}, "
                "expected one; cast it."
            )
    rows = (*o1.shape[:-3], o1.shape[-2], o1.shape[-3])
    for what, lse in (("lse1", lse1), ("lse2", lse2)):
        _check.floating(op, what, lse)
        if lse.dtype != check.lse_dtype(o1):
            raise TypeError(
                f"{op}: {what} has the wrong dtype; got {_check.name(lse.dtype)}, expected "
                f"{_check.name(check.lse_dtype(o1))}; pass it as attention returned it."
            )
        if lse.shape != rows:
            raise ValueError(
                f"{op}: {what} must be (B, H, N) or (H, N); got {list(lse.shape)}, expected {list(rows)} to match o1 "
                f"{list(o1.shape)}; transpose it."
            )
        _check.same_device(op, what, lse, o1)
    return o1, lse1, o2, lse2


_attention = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? kv_len, Tensor? frame_tokens_of, SymInt frame_tokens, float scale, "
    "bool return_lse, bool deterministic) -> (Tensor, Tensor)",
    differentiable=("q", "k", "v"),
    fake=_fake_dense,
    check=_check_attention,
    validate=check.validate_dense,
    saves=(0, 1),
)
_attention_varlen = Op(
    "attention_varlen",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? frame_tokens_of, Tensor? grids, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt frame_tokens, int[]? window, int[] window_stride, float scale, "
    "bool return_lse, bool deterministic) -> (Tensor, Tensor)",
    differentiable=("q", "k", "v"),
    fake=_fake_varlen,
    check=_check_varlen,
    validate=check.validate_varlen,
    saves=(0, 1),
)
_merge_attention = Op(
    "merge_attention",
    "(Tensor o1, Tensor lse1, Tensor o2, Tensor lse2) -> (Tensor, Tensor)",
    differentiable=("o1", "lse1", "o2", "lse2"),
    fake=lambda o1, lse1, *_: (o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)),
    check=_check_merge,
)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    frame_tokens: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
):
    """Softmax attention of a dense batch.

        s[i, j] = scale * q[i] . k[j] over the keys j that query i sees;   o[i] = sum_j softmax(s[i])[j] * v[j]

    Args:
        q (Tensor[B, N, H, D]; f32, bf16, f16, f64): queries. k, v (Tensor[B, M, Hkv, D]): H % Hkv == 0, head h of q
            reads head h // (H // Hkv). Under autocast all three are cast to its dtype.
        scale (float, optional): default D ** -0.5.
        kv_len (Tensor[B]; int32): valid keys of each sample; what lies behind them (NaN too) is never used.
        frame_tokens (int, or Tensor[B]; int32): frame-causal: a token sees every frame up to its own. The queries are
            the last N of the M keys, so a KV cache needs N <= M and nothing else.
        return_lse (bool): also give log sum_j exp(s[i, j]), for `merge_attention`.
        deterministic (bool): bitwise repeatable backward; implied by torch.use_deterministic_algorithms(True).
        backend (str, optional): "cuda", "triton", "cpu", "flash_attn", "sdpa", "reference". Default: best available.
    Returns:
        o (Tensor[B, N, H, D], contiguous, dtype of q), and lse (Tensor[B, H, N], f32) if asked. A query without keys
        gives o = 0 and lse = -inf. Gradients for q, k and v, through o and lse.
    Raises:
        ValueError: shapes, strides, devices, kv_len, scale.   TypeError: dtypes.   NoBackend: nothing can run it.
    Cost:   4*B*H*N*M*D FLOPs forward, 10*B*H*N*M*D backward (the visible part of them); O(B*H*N) memory is kept for the
        backward, O(N*D) per thread beside it; no N x M tensor on kernels. Bitwise repeatable on the CPU in any case.
        backend="cuda" on sm_90 may sum dq in fp32 beside it: 4 bytes a value while the backward runs.
    Source: arXiv 2205.14135 (FlashAttention); csrc/cpu/attention*.cpp. Replaces F.scaled_dot_product_attention.
    """
    if check.any_autocast():
        q, k, v = check.autocast(q, k, v)
    frames_of, frames = (frame_tokens, None) if isinstance(frame_tokens, Tensor) else (None, frame_tokens)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    o, lse = _attention(backend, q, k, v, kv_len, frames_of, frames, scale, return_lse, deterministic)
    return (o, lse) if return_lse else o


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    frame_tokens: int | Tensor | None = None,
    window: tuple[int, int, int] | None = None,
    window_stride: tuple[int, int, int] = (1, 1, 1),
    grids: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    backend: str | None = None,
):
    """Softmax attention inside each segment of a packed batch; rows behind the last segment give 0.

    Args:
        q (Tensor[N, H, D]), k, v (Tensor[M, Hkv, D]): segments back to back, as `fastdit.packing.pack` lays them.
        cu_seqlens_q, cu_seqlens_k (Tensor[S + 1]; int32): row bounds, from 0; max_seqlen_q, max_seqlen_k (int): the
            longest segment. The keys' default to the queries' (self-attention).
        frame_tokens (int, or Tensor[S]; int32): frame-causal, as in `attention`, per segment.
        window (int, int, int): 3-D window over grids (Tensor[S, 3]; int32, T*H*W tokens of each segment): a query sees
            exactly t*h*w keys, from clamp((i // s) * s + s // 2 - w // 2, 0, n - w) on each axis of length n with
            stride s of window_stride (NATTEN's shifted borders; a window longer than the axis sees all of it).
        scale, return_lse, deterministic, backend: as in `attention`.
    Returns:
        o (Tensor[N, H, D], contiguous, dtype of q), and lse (Tensor[H, N], f32) if asked.
    Raises:
        ValueError, TypeError, NoBackend: as in `attention`. cu_seqlens, grids and frame_tokens are looked into on the
        CPU; on other devices only under FASTDIT_CHECK=1.
    Cost:   4*H*D FLOPs per visible (query, key) pair, 10*H*D backward; key blocks that no query sees are not touched. A
        window costs what the tiles of 16 to 48 queries touch together: little more than it shows where window_stride
        lets a block of queries share one window, 1.3 to 3 times as much with stride 1.
    Source: NaViT arXiv 2307.06304 (packing); NATTEN arXiv 2504.16922 (window, stride); csrc/cpu/attention.cpp.
    """
    if check.any_autocast():
        q, k, v = check.autocast(q, k, v)
    frames_of, frames = (frame_tokens, None) if isinstance(frame_tokens, Tensor) else (None, frame_tokens)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    o, lse = _attention_varlen(
        backend, q, k, v, cu_seqlens_q, cu_seqlens_k, frames_of, grids, max_seqlen_q, max_seqlen_k, frames,
        window, window_stride, scale, return_lse, deterministic,
    )  # fmt: skip
    return (o, lse) if return_lse else o


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, *, backend: str | None = None):
    """Join two attentions of the same queries over disjoint keys: ring attention, or text and image keys apart.

        lse = log(exp(lse1) + exp(lse2));   o = exp(lse1 - lse) * o1 + exp(lse2 - lse) * o2

    Args:
        o1, o2 (Tensor[B, N, H, D] or packed [N, H, D]); lse1, lse2 (Tensor[B, H, N] or [H, N]; f32, f64 for f64 o):
            what `attention(..., return_lse=True)` gave.
    Returns:
        (o, lse), contiguous; two rows without keys give (0, -inf). Gradients for all four.
    Raises:
        ValueError: shapes, strides, devices.   TypeError: dtypes.   NoBackend: nothing can run it.
    Cost:   3*B*N*H*D*itemsize bytes forward, 5 backward; memory-bound.
    Source: arXiv 2310.01889 (ring attention).
    """
    return _merge_attention(backend, o1, lse1, o2, lse2)
