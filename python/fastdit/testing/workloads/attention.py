"""attention: samples per code path, and the models' shapes. Baseline of the tolerance: torch's SDPA."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...reference import attention as reference
from . import Maker, Sample, Workload


def _sdpa(q, k, v, visible, scale):
    """F.scaled_dot_product_attention on (B, N, H, D) with a bool mask; rows without keys give 0, as the op's do."""
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    if visible is None:
        return F.scaled_dot_product_attention(qt, kt, vt, scale=scale, enable_gqa=True).transpose(1, 2)
    visible = visible.expand(q.shape[0], 1, q.shape[1], k.shape[1])
    o = F.scaled_dot_product_attention(qt, kt, vt, attn_mask=visible, scale=scale, enable_gqa=True)
    return torch.where(visible.any(-1, keepdim=True), o, 0).transpose(1, 2)


def sdpa(q, k, v, *, scale=None, kv_len=None, frame_tokens=None, return_lse=False) -> Tensor | tuple[Tensor, Tensor]:
    visible = reference.visible_dense(q.shape[1], k.shape[1], kv_len, frame_tokens, q.device)
    o = _sdpa(q, k, v, visible, scale)
    lse = dict(scale=scale, kv_len=kv_len, frame_tokens=frame_tokens, return_lse=True)
    return (o, reference.attention(q, k, v, **lse)[1]) if return_lse else o


def sdpa_varlen(q, k, v, *, cu_seqlens_q, max_seqlen_q, cu_seqlens_k=None, scale=None, return_lse=False, **masks):
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    bounds_q, bounds_k, parts = cu_seqlens_q.tolist(), cu_k.tolist(), []
    shown: dict[str, Any] = dict(frame_tokens=None, window=None, window_stride=(1, 1, 1), grids=None) | masks
    shown.pop("max_seqlen_k", None)
    for s in range(len(bounds_q) - 1):
        iq, ik = slice(*bounds_q[s : s + 2]), slice(*bounds_k[s : s + 2])
        one: dict[str, Any] = {key: t[s : s + 1] if isinstance(t, Tensor) else t for key, t in shown.items()}
        lengths = (cu_seqlens_q[s : s + 2].diff(), cu_k[s : s + 2].diff())
        visible = reference.visible_varlen(*lengths, iq.stop - iq.start, ik.stop - ik.start, **one)
        parts.append(_sdpa(q[None, iq], k[None, ik], v[None, ik], visible[:, None], scale)[0])
    o = torch.cat([*parts, q.new_zeros(q.shape[0] - bounds_q[-1], *q.shape[1:])])
    if not return_lse:
        return o
    args = dict(cu_seqlens_q=cu_seqlens_q, max_seqlen_q=max_seqlen_q, cu_seqlens_k=cu_seqlens_k, scale=scale)
    return o, reference.attention_varlen(q, k, v, **args, return_lse=True, **masks)[1]


# ---- dense ----------------------------------------------------------------------------------------------
def _self(H: int = 3, D: int = 72, B: int = 2, **extra):
    def make(m: Maker):
        return tuple(m.randn(B, m.n, 3, H, D).unbind(2)), dict(extra)

    return make


def _cross(M: int, H: int = 2, Hkv: int = 2, D: int = 64, more=lambda m: {}):
    def make(m: Maker):
        return (m.randn(2, m.n, H, D), m.randn(2, M, Hkv, D), m.randn(2, M, Hkv, D)), more(m)

    return make


def _cached(frames, D: int = 16):
    def make(m: Maker):
        tokens = frames if isinstance(frames, int) else m.index(frames)
        q, k, v = m.randn(2, m.n, 2, D), m.randn(2, m.n + 4, 2, D), m.randn(2, m.n + 4, 2, D)
        return (q, k, v), dict(frame_tokens=tokens)

    return make


# ---- packed ---------------------------------------------------------------------------------------------
def _packed(H: int = 2, Hkv: int = 2, D: int = 24, tail: int = 0, more=lambda m: {}):
    """Segments of 2, 0 and n - 2 - tail tokens."""

    def make(m: Maker):
        cu = m.index([0, 2, 2, m.n - tail])
        q, k, v = m.randn(m.n, H, D), m.randn(m.n, Hkv, D), m.randn(m.n, Hkv, D)
        return (q, k, v), dict(cu_seqlens_q=cu, max_seqlen_q=max(2, m.n - 2 - tail)) | more(m)

    return make


def _packed_cross(frames: int | None, lse: bool):
    def make(m: Maker):
        keys = dict(cu_seqlens_k=m.index([0, 5, m.n + 10, m.n + 10]), max_seqlen_k=m.n + 5, return_lse=lse)
        cu, total = m.index([0, 2, m.n, m.n]), m.n + 10
        kwargs = dict(cu_seqlens_q=cu, max_seqlen_q=max(2, m.n - 2), frame_tokens=frames) | keys
        return (m.randn(m.n, 2, 16), m.randn(total, 2, 16), m.randn(total, 2, 16)), kwargs

    return make


def _grids(m: Maker) -> Tensor:
    return m.index([[1, 1, 2], [0, 3, 3], [1, 2, (m.n - 2) // 2]])


def _merge(m: Maker):
    wide = torch.promote_types(m.dtype, torch.float32)
    o1, o2 = m.randn(2, m.n, 3, 20), m.randn(2, m.n, 3, 20)
    return (o1, m.randn(2, 3, m.n, dtype=wide), o2, m.randn(2, 3, m.n, dtype=wide)), {}


def _merge_packed(m: Maker):
    wide = torch.promote_types(m.dtype, torch.float32)
    lse = 30 * m.randn(m.n, 2, 2, dtype=wide)
    return (m.randn(m.n, 2, 7), lse[..., 0].t(), m.randn(m.n, 2, 7), lse[..., 1].t()), {}


def _dense(id: str, make) -> Sample:
    return Sample("attention", id, make, baseline=sdpa)


def _ragged(id: str, make) -> Sample:
    return Sample("attention_varlen", id, make, baseline=sdpa_varlen)


SAMPLES = (
    _dense("self", _self()),
    _dense("self-128", _self(D=128)),
    _dense("lse", _self(D=64, return_lse=True)),
    _dense("odd-head", _self(D=13)),
    _dense("one-channel", _self(D=1)),
    _dense("negative-scale", _self(D=40, scale=-0.3)),
    _dense("cross", _cross(13)),
    _dense("two-blocks", _cross(300, D=16, more=lambda m: dict(return_lse=True))),
    _dense("gqa", _cross(9, H=6, Hkv=2, D=80)),
    _dense("kv-len", _cross(9, more=lambda m: dict(kv_len=m.index([3, 9])))),
    _dense("no-keys", _cross(9, more=lambda m: dict(kv_len=m.index([0, 7])))),
    _dense("frame-causal", _cached(3)),
    _dense("frame-per-sample", _cached([2, 5])),
    _ragged("packed", _packed()),
    _ragged("lse", _packed(D=72, more=lambda m: dict(return_lse=True))),
    _ragged("gqa-tail", _packed(H=4, tail=1)),
    _ragged("cross", _packed_cross(None, lse=True)),
    _ragged("frame-causal", _packed_cross(2, lse=False)),
    _ragged("frame-per-segment", _packed(more=lambda m: dict(frame_tokens=m.index([1, 1, 2])))),
    _ragged("window", _packed(more=lambda m: dict(window=(1, 2, 2), grids=_grids(m)))),
    _ragged("window-stride", _packed(more=lambda m: dict(window=(1, 1, 3), window_stride=(1, 1, 2), grids=_grids(m)))),
    Sample("merge_attention", "dense", _merge),
    Sample("merge_attention", "packed-strided", _merge_packed),
)


# ---- the models' shapes -----------------------------------------------------------------------------------
def _bench_self(B: int, N: int, H: int, D: int):
    def make(m: Maker):
        return tuple(m.randn(B, N, 3, H, D, dtype=m.dtype).unbind(2)), {}

    return make


def _plain_sdpa(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


# name, batch, tokens, heads, head dim; long videos keep their head shape and lose tokens and heads
_SHAPES = (
    ("DiT-XL/2-256", 2, 256, 16, 72),
    ("DiT-XL/2-512", 2, 1024, 16, 72),
    ("SD3.5-L-1024", 1, 4429, 2, 64),
    ("Wan2.1-1.3B-480p/8", 1, 4095, 2, 128),
)


def _workload(shape: tuple[str, int, int, int, int]) -> Workload:
    name, B, N, H, D = shape
    return Workload(
        "attention",
        name,
        f"{B}x{N}x{H}x{D}",
        _bench_self(B, N, H, D),
        lambda dtype: 4 * B * N * H * D * dtype.itemsize,
        flops=4 * B * H * N * N * D,
        peers={"sdpa": _plain_sdpa},
    )


_LENGTHS = (1024, 256, 640, 96, 900, 400, 333, 512)  # ragged 8-way


def _bench_ragged(m: Maker):
    q, k, v = m.randn(sum(_LENGTHS), 3, 4, 72).unbind(1)
    cu = m.index([0, *torch.tensor(_LENGTHS).cumsum(0).tolist()])
    return (q, k, v), dict(cu_seqlens_q=cu, max_seqlen_q=max(_LENGTHS))


def _padded(q, k, v, *, cu_seqlens_q, max_seqlen_q):
    """What code without packing does: pad every segment, mask the padding."""
    rows = reference.padded_rows(cu_seqlens_q, max_seqlen_q, q.shape[0])
    qp, kp, vp = (F.pad(x, (0, 0, 0, 0, 0, 1))[rows].transpose(1, 2) for x in (q, k, v))
    valid = (rows < q.shape[0])[:, None, None]
    return F.scaled_dot_product_attention(qp, kp, vp, attn_mask=valid).transpose(1, 2)[rows < q.shape[0]]


BENCH = (
    *map(_workload, _SHAPES),
    Workload(
        "attention_varlen",
        "DiT-XL/2-ragged",
        f"{sum(_LENGTHS)}x4x72",
        _bench_ragged,
        lambda dtype: 4 * sum(_LENGTHS) * 4 * 72 * dtype.itemsize,
        flops=sum(4 * 4 * n * n * 72 for n in _LENGTHS),
        peers={"padded": _padded},
    ),
)
