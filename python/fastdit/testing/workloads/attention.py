"""attention: samples per code path, and the models' shapes. Baseline of the tolerance: torch's SDPA."""

from __future__ import annotations

import math
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
def _plain_sdpa(q, k, v):
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(qt, kt, vt, enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)


class _Prepared:
    """A peer that needs a mask: made at the first call, outside the clock, as a model would keep it."""

    def __init__(self, prepare, run) -> None:
        self._prepare, self._run, self._made = prepare, run, None

    def __call__(self, *args, **kwargs):
        if self._made is None:
            self._made = self._prepare(*args, **kwargs)
        return self._run(self._made, *args)


def _mask(q, k, v, *, kv_len=None, frame_tokens=None, window=None, window_stride=(1, 1, 1), grids=None, **_):
    """bool (B or 1, 1, N or 1, M), or None."""
    n, m = q.shape[-3], k.shape[-3]
    if window is None:
        visible = reference.visible_dense(n, m, kv_len, frame_tokens, q.device)
        return visible if visible is None or visible.dim() == 4 else visible[None, None]
    one = torch.tensor([n], device=q.device)
    return reference.visible_varlen(one, one, n, m, None, window, window_stride, grids)[:, None]


def _masked_sdpa(mask, q, k, v):
    packed = q.dim() == 3
    q, k, v = ((x[None] if packed else x).transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    return o[0] if packed else o


def _prepare_flex(q, k, v, **masks):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask, block = _mask(q, k, v, **masks), None
    if mask is not None:
        batch = mask.shape[0] if mask.shape[0] > 1 else None
        mask = mask.expand(-1, 1, q.shape[-3], k.shape[-3]).contiguous()

        def visible(b, h, i, j):
            return mask[b, 0, i, j]

        block = create_block_mask(visible, batch, None, q.shape[-3], k.shape[-3], device=q.device.type)
    return torch.compile(flex_attention, dynamic=False), block


def _flex(prepared, q, k, v):
    call, block = prepared
    packed = q.dim() == 3
    q, k, v = ((x[None] if packed else x).transpose(1, 2) for x in (q, k, v))
    o = call(q, k, v, block_mask=block, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
    return o[0] if packed else o


def _self_inputs(B: int, N: int, H: int, D: int, **extra):
    def make(m: Maker):
        return tuple(m.randn(B, N, 3, H, D, dtype=m.dtype).unbind(2)), dict(extra)

    return make


def _cross_inputs(N: int, M: int, H: int, Hkv: int, D: int):
    def make(m: Maker):
        return (m.randn(1, N, H, D), *m.randn(1, M, 2, Hkv, D).unbind(2)), {}

    return make


def _row(
    model: str, shape: str, make, tokens: int, flops: int, *, op="attention", flex=False, masked=False
) -> Workload:
    """tokens: elements of q, k, v and o. flops: of the visible pairs, forward."""
    peers: dict[str, Any] = {"sdpa": _Prepared(_mask, _masked_sdpa) if masked else _plain_sdpa}
    if flex:
        peers["flex"] = _Prepared(_prepare_flex, _flex)
    return Workload(op, model, shape, make, lambda dtype: tokens * dtype.itemsize, flops, peers=peers, flops_bwd=2.5)


# name, batch, tokens, heads, head dim; long videos keep their head shape and lose tokens and heads
_SHAPES = (
    ("DiT-XL/2-256", 2, 256, 16, 72),
    ("DiT-XL/2-512", 2, 1024, 16, 72),
    ("SD3.5-L-1024", 1, 4429, 2, 64),
    ("Wan2.1-1.3B-480p/8", 1, 4095, 2, 128),
)


def _dense_row(name: str, B: int, N: int, H: int, D: int) -> Workload:
    make, flops = _self_inputs(B, N, H, D), 4 * B * H * N * N * D
    return _row(name, f"{B}x{N}x{H}x{D}", make, 4 * B * N * H * D, flops, flex=N == 4429)


def _cross_row(name: str, N: int, M: int, H: int, Hkv: int, D: int) -> Workload:
    shape = f"{N}x{M}x{H}x{D}" if H == Hkv else f"{N}x{M}x{H}/{Hkv}x{D}"
    return _row(name, shape, _cross_inputs(N, M, H, Hkv, D), 2 * D * (N * H + M * Hkv), 4 * H * N * M * D)


def _text_padded():
    """Video and text in one sequence, the text padded to its longest: 77 of 256 keys are there."""
    N, H, D, keys = 3600 + 256, 2, 128, 3600 + 77

    def make(m: Maker):
        q, k, v = m.randn(1, N, 3, H, D).unbind(2)
        return (q, k, v), dict(kv_len=m.index([keys]))

    return _row("HunyuanVideo-joint/8", f"{N}x{H}x{D}", make, 4 * N * H * D, 4 * H * N * keys * D, masked=True)


def _frame_causal(frames: int = 4, tokens: int = 1560, H: int = 2, D: int = 128) -> Workload:
    N, pairs = frames * tokens, tokens * tokens * frames * (frames + 1) // 2
    make = _self_inputs(1, N, H, D, frame_tokens=tokens)
    name = f"{frames}x{tokens}x{H}x{D}"
    return _row("Wan2.1-480p-frame-causal", name, make, 4 * N * H * D, 4 * H * D * pairs, masked=True, flex=True)


def _windowed(name: str, grid, window, stride, H: int, D: int) -> Workload:
    N, seen = math.prod(grid), math.prod(window)

    def make(m: Maker):
        kwargs = dict(cu_seqlens_q=m.index([0, N]), max_seqlen_q=N, grids=m.index([grid]))
        return m.randn(N, 3, H, D).unbind(1), kwargs | dict(window=window, window_stride=stride)

    shape = f"{'x'.join(map(str, grid))}x{H}x{D} w{'x'.join(map(str, window))}"
    flops = 4 * H * D * N * seen
    return _row(name, shape, make, 4 * N * H * D, flops, op="attention_varlen", masked=True, flex=True)


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
    _dense_row(*_SHAPES[0]),
    _cross_row("Wan2.1-1.3B-text", 4095, 512, 4, 4, 128),
    _cross_row("Cosmos3-gqa", 2048, 2048, 8, 2, 128),
    _text_padded(),
    _frame_causal(),
    *(_dense_row(*shape) for shape in _SHAPES[1:]),
    Workload(
        "attention_varlen",
        "DiT-XL/2-ragged",
        f"{sum(_LENGTHS)}x4x72",
        _bench_ragged,
        lambda dtype: 4 * sum(_LENGTHS) * 4 * 72 * dtype.itemsize,
        flops=sum(4 * 4 * n * n * 72 for n in _LENGTHS),
        flops_bwd=2.5,
        peers={"padded": _padded},
    ),
    # sliding tiles: all queries of a tile share three tiles of keys along h and w; and NATTEN's own window
    _windowed("window-stride-1", (4, 30, 40), (3, 15, 15), (1, 1, 1), 2, 64),
    _windowed("HunyuanVideo-tiles/20", (6, 32, 32), (3, 24, 24), (3, 8, 8), 2, 128),
)
