"""Softmax attention over a dense batch or packed segments, with the masks that DiTs need and no dense mask tensor.

Layouts are the projections' own: (B, N, H, D), or packed (N, H, D) with `cu_seqlens`. k and v may have fewer heads
than q (grouped queries). Inputs may be strided views (`qkv.unbind(2)`) as long as the channel dim is contiguous.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import _check
from ._op import Op


def _lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _fake_dense(q, *_):
    return q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=_lse_dtype(q))


def _fake_varlen(q, *_):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=_lse_dtype(q))


# ---- looks into index tensors ---------------------------------------------------------------------------


def _at_least_one(op: str, what: str, t: Tensor) -> None:
    if t.numel() and int(t.min()) < 1:
        raise ValueError(f"{op}: {what} must be positive; got {t.tolist()}, expected values >= 1; drop empty frames.")


def _validate_dense(q, k, v, kv_len, frame_tokens_of, *_) -> None:
    if kv_len is not None:
        _check.index_range("attention", "kv_len", kv_len, k.shape[1] + 1)
    if frame_tokens_of is not None:
        _at_least_one("attention", "frame_tokens", frame_tokens_of)


def _validate_bounds(what: str, cu: Tensor, longest: int, rows: int) -> Tensor:
    op, lengths = "attention_varlen", cu.diff()
    if int(cu[0]) != 0:
        raise ValueError(f"{op}: {what} must start at 0; got {int(cu[0])}, expected 0; prepend it.")
    if lengths.numel() and int(lengths.min()) < 0:
        raise ValueError(f"{op}: {what} decreases; got {cu.tolist()}, expected non-decreasing row bounds; sort them.")
    if int(cu[-1]) > rows:
        raise ValueError(
            f"{op}: {what} overruns the tokens; got {int(cu[-1])} rows, expected at most {rows}; check the lengths."
        )
    if lengths.numel() and int(lengths.max()) > longest:
        name = what.replace("cu_seqlens", "max_seqlen")
        raise ValueError(
            f"{op}: {name} is too small; got {longest}, expected at least {int(lengths.max())}, "
            "the longest segment; raise it."
        )
    return lengths


def _validate_varlen(q, k, v, cu_q, cu_k, frame_tokens_of, grids, max_q, max_k, frame_tokens, window, *_) -> None:
    op = "attention_varlen"
    lengths_q = _validate_bounds("cu_seqlens_q", cu_q, max_q, q.shape[0])
    lengths_k = _validate_bounds("cu_seqlens_k", cu_k, max_k, k.shape[0])
    if frame_tokens_of is not None:
        _at_least_one(op, "frame_tokens", frame_tokens_of)
    if (frame_tokens_of is not None or frame_tokens) and bool((lengths_q > lengths_k).any()):
        raise ValueError(
            f"{op}: frame_tokens needs the queries among the keys; got segments of {lengths_q.tolist()} queries over "
            f"{lengths_k.tolist()} keys, expected no fewer keys; pass the cached keys too."
        )
    if grids is not None:
        tokens = grids.prod(1)
        if bool((grids < 0).any()) or not torch.equal(tokens.to(lengths_q.dtype), lengths_q):
            raise ValueError(
                f"{op}: grids must hold the tokens of their segments; got {grids.tolist()} for lengths "
                f"{lengths_q.tolist()}, expected T*H*W tokens each; check the patch sizes."
            )


_attention = Op(
    "attention",
    "(Tensor q, Tensor k, Tensor v, Tensor? kv_len, Tensor? frame_tokens_of, SymInt frame_tokens, float scale, "
    "bool return_lse, bool deterministic) -> (Tensor, Tensor)",
    differentiable=("q", "k", "v"),
    fake=_fake_dense,
    validate=_validate_dense,
    saves=(0, 1),
)
_attention_varlen = Op(
    "attention_varlen",
    "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? frame_tokens_of, Tensor? grids, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, SymInt frame_tokens, int[]? window, int[] window_stride, float scale, "
    "bool return_lse, bool deterministic) -> (Tensor, Tensor)",
    differentiable=("q", "k", "v"),
    fake=_fake_varlen,
    validate=_validate_varlen,
    saves=(0, 1),
)
_merge_attention = Op(
    "merge_attention",
    "(Tensor o1, Tensor lse1, Tensor o2, Tensor lse2) -> (Tensor, Tensor)",
    differentiable=("o1", "lse1", "o2", "lse2"),
    fake=lambda o1, lse1, *_: (o1.new_empty(o1.shape), lse1.new_empty(lse1.shape)),
)

# ---- checks ---------------------------------------------------------------------------------------------


def _autocast(*tensors: Tensor) -> list[Tensor]:
    device = tensors[0].device.type if isinstance(tensors[0], Tensor) else "cpu"
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors]


def _qkv(op: str, q: Tensor, k: Tensor, v: Tensor, rank: int, layout: str) -> None:
    for what, t in (("q", q), ("k", k), ("v", v)):
        _check.floating(op, what, t)
        _check.rank(op, what, t, (rank,), layout)
        _check.same_device(op, what, t, q)
        if t.dtype != q.dtype:
            raise TypeError(
                f"{op}: q, k and v must have one dtype; got {what} in {_check.name(t.dtype)} beside "
                f"{_check.name(q.dtype)}, expected {_check.name(q.dtype)}; cast it."
            )
        if t.shape[-1] == 0:
            raise ValueError(f"{op}: {what} has no channels; got {list(t.shape)}, expected D >= 1; check the heads.")
        _check.channels_contiguous(op, what, t)
    if k.shape != v.shape:
        raise ValueError(
            f"{op}: k and v differ in shape; got {list(k.shape)} and {list(v.shape)}, expected the same; "
            "every key needs its value."
        )
    if k.shape[-1] != q.shape[-1]:
        raise ValueError(
            f"{op}: q and k differ in head dim; got {q.shape[-1]} and {k.shape[-1]}, expected the same; check the split."
        )
    if rank == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(
            f"{op}: q and k differ in batch; got {q.shape[0]} and {k.shape[0]}, expected the same; expand k and v."
        )
    if q.shape[-2] % max(k.shape[-2], 1) or (k.shape[-2] == 0 and q.shape[-2]):
        raise ValueError(
            f"{op}: the heads of k must divide those of q; got {k.shape[-2]} and {q.shape[-2]}, "
            "expected H % H_kv == 0; check num_kv_heads."
        )


def _scale(op: str, q: Tensor, scale: float | None) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite; got {scale}, expected e.g. {q.shape[-1] ** -0.5:.4f}; set it.")
    return float(scale)


def _int32(op: str, what: str, t: Tensor, shape: tuple, q: Tensor, use: str) -> None:
    if not isinstance(t, Tensor) or t.dtype != torch.int32:
        got = _check.name(t.dtype) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{op}: {what} must be an int32 tensor; got {got}, expected int32; cast it with .to(torch.int32).")
    if t.shape != shape:
        raise ValueError(f"{op}: {what} has the wrong shape; got {list(t.shape)}, expected {list(shape)}; {use}.")
    _check.same_device(op, what, t, q)


def _frames(op: str, frame_tokens: int | Tensor | None, count: int, q: Tensor) -> tuple[Tensor | None, int]:
    if frame_tokens is None:
        return None, 0
    if isinstance(frame_tokens, Tensor):
        _int32(op, "frame_tokens", frame_tokens, (count,), q, "one frame length per sequence")
        return frame_tokens, 0
    if frame_tokens < 1:
        raise ValueError(f"{op}: frame_tokens must be positive; got {frame_tokens}, expected H*W >= 1; pass None for none.")
    return None, frame_tokens


def _bounds(op: str, what: str, cu: Tensor, q: Tensor) -> None:
    rows = cu.shape[0] if isinstance(cu, Tensor) and cu.dim() == 1 else 1
    _int32(op, what, cu, (max(rows, 1),), q, "segments + 1 row bounds, starting at 0")


def _length(op: str, what: str, n: int) -> None:
    if isinstance(n, Tensor):
        raise TypeError(f"{op}: {what} must be an int on the host; got a tensor, expected int; keep it beside cu_seqlens.")
    if n < 0:
        raise ValueError(f"{op}: {what} must not be negative; got {n}, expected the longest segment; pass max(lengths).")


def _triple(op: str, what: str, value: tuple[int, int, int], most: tuple[int, int, int] | None) -> list[int]:
    if len(value) != 3 or any(n < 1 for n in value) or (most and any(a > b for a, b in zip(value, most, strict=True))):
        limit = "" if most is None else f", at most the window {tuple(most)}"
        raise ValueError(f"{op}: {what} must be 3 positive ints{limit}; got {tuple(value)}, expected (t, h, w); fix it.")
    return list(value)


# ---- the public functions -------------------------------------------------------------------------------


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
    Cost:   4*B*H*N*M*D FLOPs forward (the visible part of them), O(B*H*N) extra memory; no N x M tensor on kernels.
    Source: arXiv 2205.14135 (FlashAttention); csrc/cpu/attention.cpp. Replaces F.scaled_dot_product_attention.
    """
    op = "attention"
    q, k, v = _autocast(q, k, v)
    _qkv(op, q, k, v, 4, "(B, N, H, D)")
    if kv_len is not None:
        _int32(op, "kv_len", kv_len, (q.shape[0],), q, "one key count per sample")
    frames_of, frames = _frames(op, frame_tokens, q.shape[0], q)
    if frame_tokens is not None and q.shape[1] > k.shape[1]:
        raise ValueError(
            f"{op}: frame_tokens needs the queries among the keys; got {q.shape[1]} queries over {k.shape[1]} keys, "
            "expected N <= M; pass the cached keys too."
        )
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    o, lse = _attention(backend, q, k, v, kv_len, frames_of, frames, _scale(op, q, scale), return_lse, deterministic)
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
        q (Tensor[N, H, D]), k, v (Tensor[M, Hkv, D]): segments one behind the other, as `fastdit.packing.pack` lays them.
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
    Cost:   4*H*D FLOPs per visible (query, key) pair; key blocks that no query sees are not touched.
    Source: NaViT arXiv 2307.06304 (packing); NATTEN arXiv 2504.16922 (window, stride); csrc/cpu/attention.cpp.
    """
    op = "attention_varlen"
    q, k, v = _autocast(q, k, v)
    _qkv(op, q, k, v, 3, "packed (N, H, D)")
    _bounds(op, "cu_seqlens_q", cu_seqlens_q, q)
    _length(op, "max_seqlen_q", max_seqlen_q)
    if (cu_seqlens_k is None) != (max_seqlen_k is None):
        raise ValueError(
            f"{op}: cu_seqlens_k and max_seqlen_k come together; got one of them, expected both or none; pass both."
        )
    if cu_seqlens_k is None or max_seqlen_k is None:
        cu_seqlens_k, max_seqlen_k = cu_seqlens_q, max_seqlen_q
        own_keys = True
    else:
        _int32(op, "cu_seqlens_k", cu_seqlens_k, tuple(cu_seqlens_q.shape), q, "as many segments as cu_seqlens_q")
        _length(op, "max_seqlen_k", max_seqlen_k)
        own_keys = False
    segments = cu_seqlens_q.shape[0] - 1
    frames_of, frames = _frames(op, frame_tokens, segments, q)
    if (window is None) != (grids is None):
        raise ValueError(f"{op}: window and grids come together; got one of them, expected both or none; pass both.")
    window_list = None if window is None else _triple(op, "window", window, None)
    stride = _triple(op, "window_stride", window_stride, window)
    if grids is not None:
        _int32(op, "grids", grids, (segments, 3), q, "the (T, H, W) of each segment")
        if frame_tokens is not None:
            raise ValueError(f"{op}: window and frame_tokens exclude each other; got both, expected one; drop one.")
        if not own_keys or q.shape[0] != k.shape[0]:
            raise ValueError(f"{op}: window is self-attention; got keys of their own, expected q's segments; drop them.")
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    o, lse = _attention_varlen(
        backend, q, k, v, cu_seqlens_q, cu_seqlens_k, frames_of, grids, max_seqlen_q, max_seqlen_k, frames,
        window_list, stride, _scale(op, q, scale), return_lse, deterministic,
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
    Cost:   3*B*N*H*D*itemsize bytes; memory-bound.
    Source: arXiv 2310.01889 (ring attention).
    """
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
                f"{op}: o1 and o2 differ in shape; got {list(o1.shape)} and {list(o2.shape)}, expected the same queries; "
                "slice them alike."
            )
        if o.dtype != o1.dtype:
            raise TypeError(
                f"{op}: o1 and o2 differ in dtype; got {_check.name(o1.dtype)} and {_check.name(o2.dtype)}, "
                "expected one; cast it."
            )
    rows = (*o1.shape[:-3], o1.shape[-2], o1.shape[-3])
    for what, lse in (("lse1", lse1), ("lse2", lse2)):
        _check.floating(op, what, lse)
        if lse.dtype != _lse_dtype(o1):
            raise TypeError(
                f"{op}: {what} has the wrong dtype; got {_check.name(lse.dtype)}, expected "
                f"{_check.name(_lse_dtype(o1))}; pass it as attention returned it."
            )
        if lse.shape != rows:
            raise ValueError(
                f"{op}: {what} must be (B, H, N) or (H, N); got {list(lse.shape)}, expected {list(rows)} to match o1 "
                f"{list(o1.shape)}; transpose it."
            )
        _check.same_device(op, what, lse, o1)
    return _merge_attention(backend, o1, lse1, o2, lse2)
