"""attention's checks: what shapes and dtypes say, and what only a look into an index tensor says."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor

from . import _check

any_autocast = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)

try:
    from .._cpu import row_bounds_hold as _hold
except ImportError:  # the CPU backend tells why

    def _hold(*_: Any) -> bool:
        return False


def lse_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


# ---- looks into index tensors ---------------------------------------------------------------------------


def _at_least_one(op: str, what: str, t: Tensor) -> None:
    if t.numel() and int(t.min()) < 1:
        raise ValueError(f"{op}: {what} must be positive; got {t.tolist()}, expected values >= 1; drop empty frames.")


def validate_dense(q, k, v, kv_len, frame_tokens_of, *_) -> None:
    if kv_len is not None:
        _check.index_range("attention", "kv_len", kv_len, k.shape[1] + 1)
    if frame_tokens_of is not None:
        _at_least_one("attention", "frame_tokens", frame_tokens_of)


def _validate_bounds(what: str, cu: Tensor, longest: int, rows: int) -> list[int]:
    op, bounds = "attention_varlen", cu.tolist()  # a list: five reductions of a tensor cost ten times as much
    lengths = list(map(operator.sub, bounds[1:], bounds))
    if bounds[0] != 0:
        raise ValueError(f"{op}: {what} must start at 0; got {bounds[0]}, expected 0; prepend it.")
    if min(lengths, default=0) < 0:
        raise ValueError(f"{op}: {what} decreases; got {bounds}, expected non-decreasing row bounds; sort them.")
    if bounds[-1] > rows:
        raise ValueError(
            f"{op}: {what} overruns the tokens; got {bounds[-1]} rows, expected at most {rows}; check the lengths."
        )
    if max(lengths, default=0) > longest:
        name = what.replace("cu_seqlens", "max_seqlen")
        raise ValueError(
            f"{op}: {name} is too small; got {longest}, expected at least {max(lengths)}, "
            "the longest segment; raise it."
        )
    return lengths


def validate_varlen(q, k, v, cu_q, cu_k, frame_tokens_of, grids, max_q, max_k, frame_tokens, window, *_) -> None:
    if grids is None and frame_tokens_of is None and not frame_tokens and _hold(q, k, cu_q, cu_k, max_q, max_k):
        return  # all that follows, in a tenth of its time; False may mean that nobody looked
    op = "attention_varlen"
    lengths_q = lengths_k = _validate_bounds("cu_seqlens_q", cu_q, max_q, q.shape[0])
    if cu_k is not cu_q or max_k != max_q or k.shape[0] != q.shape[0]:
        lengths_k = _validate_bounds("cu_seqlens_k", cu_k, max_k, k.shape[0])
    if frame_tokens_of is not None:
        _at_least_one(op, "frame_tokens", frame_tokens_of)
    if (frame_tokens_of is not None or frame_tokens) and any(map(operator.gt, lengths_q, lengths_k)):
        raise ValueError(
            f"{op}: frame_tokens needs the queries among the keys; got segments of {lengths_q} queries over "
            f"{lengths_k} keys, expected no fewer keys; pass the cached keys too."
        )
    if grids is not None:
        sides = grids.tolist()
        if any(min(side) < 0 for side in sides) or [math.prod(side) for side in sides] != lengths_q:
            raise ValueError(
                f"{op}: grids must hold the tokens of their segments; got {sides} for lengths "
                f"{lengths_q}, expected T*H*W tokens each; check the patch sizes."
            )


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # device.type costs as much as the rest
    device = "cpu" if not isinstance(q, Tensor) or q.is_cpu else q.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)
    q, k, v = (t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in (q, k, v))
    return q, k, v


def qkv(op: str, q: Tensor, k: Tensor, v: Tensor, rank: int, layout: str) -> None:
    if isinstance(q, Tensor) and isinstance(k, Tensor) and isinstance(v, Tensor):
        rows, keys, dtype, device = q.shape, k.shape, q.dtype, q.device
        if (  # the everyday call; what fails here is told below
            len(rows) == rank == len(keys)
            and keys == v.shape
            and dtype in _check.FLOATS
            and dtype == k.dtype == v.dtype
            and device == k.device == v.device
            and q.stride()[-1] == k.stride()[-1] == v.stride()[-1] == 1
            and rows[-1] == keys[-1] > 0
            and (rank == 3 or rows[0] == keys[0])
            and keys[-2] > 0
            and rows[-2] % keys[-2] == 0
        ):
            return
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
            f"{op}: q and k differ in head dim; got {q.shape[-1]} and {k.shape[-1]}, expected one; check the split."
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


def softmax_scale(op: str, q: Tensor, scale: float | None) -> float:
    if scale is None:
        return q.shape[-1] ** -0.5
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite; got {scale}, expected e.g. {q.shape[-1] ** -0.5:.4f}; set it.")
    return float(scale)


def int32(op: str, what: str, t: Tensor, shape: tuple, q: Tensor, use: str) -> None:
    if not isinstance(t, Tensor) or t.dtype != torch.int32:
        got = _check.name(t.dtype) if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(
            f"{op}: {what} must be an int32 tensor; got {got}, expected int32; cast it with .to(torch.int32)."
        )
    if t.shape != shape:
        raise ValueError(f"{op}: {what} has the wrong shape; got {list(t.shape)}, expected {list(shape)}; {use}.")
    _check.same_device(op, what, t, q)


def frames(op: str, frame_tokens: int | Tensor | None, count: int, q: Tensor) -> tuple[Tensor | None, int]:
    if frame_tokens is None:
        return None, 0
    if isinstance(frame_tokens, Tensor):
        int32(op, "frame_tokens", frame_tokens, (count,), q, "one frame length per sequence")
        return frame_tokens, 0
    if frame_tokens < 1:
        raise ValueError(
            f"{op}: frame_tokens must be positive; got {frame_tokens}, expected H*W >= 1; pass None for none."
        )
    return None, frame_tokens


def bounds(op: str, what: str, cu: Tensor, q: Tensor) -> None:
    if isinstance(cu, Tensor) and cu.dtype == torch.int32 and cu.dim() == 1 and cu.device == q.device and cu.shape[0]:
        return
    rows = cu.shape[0] if isinstance(cu, Tensor) and cu.dim() == 1 else 1
    int32(op, what, cu, (max(rows, 1),), q, "segments + 1 row bounds, starting at 0")


def length(op: str, what: str, n: int) -> None:
    if isinstance(n, Tensor):
        raise TypeError(
            f"{op}: {what} must be an int on the host; got a tensor, expected int; keep it beside cu_seqlens."
        )
    if n < 0:
        raise ValueError(
            f"{op}: {what} must not be negative; got {n}, expected the longest segment; pass max(lengths)."
        )


def triple(op: str, what: str, value: tuple[int, int, int], most: tuple[int, int, int] | None) -> list[int]:
    if most is None and tuple(value) == (1, 1, 1):
        return [1, 1, 1]
    if len(value) != 3 or any(n < 1 for n in value) or (most and any(a > b for a, b in zip(value, most, strict=True))):
        limit = "" if most is None else f", at most the window {tuple(most)}"
        raise ValueError(
            f"{op}: {what} must be 3 positive ints{limit}; got {tuple(value)}, expected (t, h, w); fix it."
        )
    return list(value)
