"""adaln: the fused halves of a block, a sample per code path of their kernels, and the models whose sizes they serve.

A composition stands behind no single op: tests/test_adaln_triton.py runs these. Weights are pairs, so that they are
leaves like every other tensor.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F

from . import Maker, Sample, Workload


def _linear(m: Maker, out: int, into: int, bias: bool = True):
    return m.randn(out, into) / into**0.5, m.randn(out) if bias else None


def _tables(m: Maker, C: int, rows: tuple[int, ...] = (2,)) -> dict[str, Any]:
    """shift, scale, gate as the models have them: views of one projection."""
    return dict(zip(("shift", "scale", "gate"), m.randn(*rows, 3 * C).chunk(3, dim=-1), strict=True))


def _rope(m: Maker, *shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    angle = m.randn(*shape, dtype=torch.float64)
    return dict(cos=angle.cos().to(dtype), sin=angle.sin().to(dtype))


def _attention(C=40, heads=2, kv_heads=None, D=16, rope=None, qk=None, rows=(2,), bias=True, **extra):
    """rope: shape of the tables behind the tokens; qk: (norm, weights, biases)."""

    def make(m: Maker):
        H, HKV = heads, kv_heads or heads
        kwargs = dict(num_heads=H, num_kv_heads=HKV, fused=True, **_tables(m, C, rows), **extra)
        kwargs |= dict(qkv=_linear(m, (H + 2 * HKV) * D, C, bias), proj=_linear(m, C, H * D, bias))
        if rope is not None:
            length = extra.get("rope_len") or m.n - extra.get("rope_start", 0)
            shape = [length if size == "n" else size for size in rope]
            kwargs |= _rope(m, *shape, dtype=m.dtype if extra.get("precision") == "native" else torch.float32)
        if qk is not None:
            norm, weights, biases = qk
            kwargs["qk_norm"] = norm
            kwargs |= {f"{name}_weight": m.randn(D) for name in weights} | {
                f"{name}_bias": m.randn(D) for name in biases
            }
        return (m.randn(2, m.n, C),), kwargs

    return make


def _packed(m: Maker):
    C, D = 40, 16
    rows = m.index([0] * (m.n - 2) + [2, 1], torch.int64)
    kwargs = dict(num_heads=2, fused=True, row_index=rows, **_tables(m, C, (3,)), **_rope(m, m.n, D // 2))
    kwargs |= dict(qkv=_linear(m, 6 * D, C), proj=_linear(m, C, 2 * D))
    return (m.randn(m.n, C),), kwargs | dict(cu_seqlens=m.index([0, m.n - 2, m.n]), max_seqlen=m.n - 2)


def _bare(m: Maker):
    """No tables at all; an affine RMS norm with zero-centred weight; a strided x; LLaMA-like projections."""
    C, D = 37, 16
    kwargs = dict(num_heads=1, shift=None, scale=None, gate=None, norm="rms", weight=m.randn(C), weight_offset=1.0)
    kwargs |= dict(qkv=_linear(m, 3 * D, C, False), proj=_linear(m, C, D, False), fused=True)
    return (m.randn(2, m.n + 1, C + 3)[:, 1:, :C],), kwargs


def _affine(norm: str):
    def make(m: Maker):
        C = 40
        kwargs = dict(norm=norm, weight=m.randn(C), bias=m.randn(C), precision="native", gate_act="tanh", fused=True)
        kwargs |= _tables(m, C) | dict(fc1=_linear(m, 72, C), fc2=_linear(m, C, 72))
        return (m.randn(2, m.n, C),), kwargs

    return make


def _mlp(act="gelu_tanh", C=40, rows=(2,), bias=True, **extra):
    def make(m: Maker):
        kwargs: dict[str, Any] = dict(
            act=act, fused=True, fc1=_linear(m, 2 * C + 8, C, bias), fc2=_linear(m, C, 2 * C + 8, bias)
        )
        return (m.randn(2, m.n, C),), kwargs | _tables(m, C, rows) | extra

    return make


def _mlp_packed(m: Maker):
    C = 40
    rows = m.index([i % 3 for i in range(m.n)])
    kwargs = dict(row_index=rows, fused=True, fc1=_linear(m, 64, C), fc2=_linear(m, C, 64))
    return (m.randn(m.n, C),), kwargs | _tables(m, C, (3,))


def _mlp_mixed(m: Maker):
    """Tables of different row maps, of fp32 beside any x, one of them expanded; far from zero: the norm's hard case."""
    C = 40
    wide = dict(dtype=torch.float32)
    kwargs: dict[str, Any] = dict(
        shift=m.randn(1, C, **wide).expand(2, C), scale=m.randn(2, 2, C, **wide), gate=m.randn(2, 3, C)
    )
    kwargs |= dict(fc1=_linear(m, 64, C), fc2=_linear(m, C, 64), fused=True)
    return (m.randn(2, m.n, C) + 30,), kwargs


def _composed(half: str):
    """The baseline is the same backend's parts: fusing may not add to what they lose (attention's P is rounded)."""

    def call(*args, **kwargs):
        op = getattr(importlib.import_module("fastdit.ops"), half)
        return op(*args, **{**kwargs, "fused": False}, backend="triton")

    return call


def _sample(half: str, id: str, make, fixed: tuple[str, ...] = ()) -> Sample:
    return Sample(half, id, make, fixed=fixed, baseline=_composed(half))


_QK = ("rms", "qk", "")
SAMPLES = (
    _sample("adaln_attention", "dit", _attention()),
    _sample("adaln_attention", "dit-native", _attention(precision="native")),
    _sample("adaln_attention", "per-token-rows", _attention(rows=(2, 2), bias=False)),
    _sample("adaln_attention", "packed-index", _packed, fixed=("cos", "sin")),
    _sample("adaln_attention", "bare", _bare),
    _sample("adaln_attention", "rms-rope", _attention(D=64, rope=("n", 32), qk=_QK), fixed=("cos", "sin")),
    _sample("adaln_attention", "rms-native", _attention(rope=("n", 8), qk=("rms", "k", "q"), precision="native")),
    _sample("adaln_attention", "rope-only", _attention(D=24, rope=("n", 12), layout="half"), fixed=("cos", "sin")),
    _sample("adaln_attention", "tables-learned", _attention(rope=(2, "n", 2, 4))),
    _sample(
        "adaln_attention", "layer-partial-slice",
        _attention(D=24, rope=("n", 8), layout="half", qk=("layer", "q", "k"), rope_start=1, rope_len=4),
        fixed=("cos", "sin"),
    ),
    _sample(
        "adaln_attention", "gqa-axis-half",
        _attention(heads=4, kv_heads=2, D=24, rope=("n", 1, 9), layout="axis_half", qk=("layer", "qk", "qk")),
        fixed=("cos", "sin"),
    ),
    *(_sample("adaln_mlp", act, _mlp(act)) for act in ("gelu_tanh", "gelu", "silu", "relu")),
    _sample("adaln_mlp", "tail-no-bias", _mlp(C=37, bias=False)),
    _sample("adaln_mlp", "packed-index", _mlp_packed),
    _sample("adaln_mlp", "mixed-rows", _mlp_mixed),
    *(_sample("adaln_mlp", f"affine-native-{norm}", _affine(norm)) for norm in ("layer", "rms")),
)  # fmt: skip


# ---- the models' shapes -------------------------------------------------------------------------------
def _modulated(x, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _normed(x, weight, cos, sin):
    y = F.rms_norm(x, x.shape[-1:], weight, 1e-6).float()
    a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
    c, s = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.stack([a * c - b * s, b * c + a * s], dim=-1).flatten(-2).to(x.dtype)


def _eager_attention(
    x, *, shift, scale, gate, qkv, proj, num_heads, q_weight=None, k_weight=None, cos=None, sin=None, **_
):
    q, k, v = F.linear(_modulated(x, shift, scale), *qkv).unflatten(-1, (3, num_heads, -1)).unbind(-3)
    if cos is not None:
        q, k = _normed(q, q_weight, cos, sin), _normed(k, k_weight, cos, sin)
    o = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    return x + gate.unsqueeze(1) * F.linear(o.flatten(-2), *proj)


def _eager_mlp(x, *, shift, scale, gate, fc1, fc2, **_):
    hidden = F.gelu(F.linear(_modulated(x, shift, scale), *fc1), approximate="tanh")
    return x + gate.unsqueeze(1) * F.linear(hidden, *fc2)


def _parts(op: str):
    """The same half by the families' ops, one after another: what fusing has to beat."""
    return lambda *args, **kwargs: getattr(importlib.import_module("fastdit.ops"), op)(*args, **kwargs, fused=False)


def _half(half: str, model: str, C: int, D: int, N: int, heads: bool = False) -> Workload:
    """heads: queries and keys are normalised and rotated. bytes: 11 passes over the tokens, and the weights."""

    def make(m: Maker):
        kwargs = dict(precision="native", **_tables(m, C))
        if half == "adaln_mlp":
            return (m.randn(2, N, C),), kwargs | dict(fc1=_linear(m, 4 * C, C), fc2=_linear(m, C, 4 * C))
        kwargs |= dict(num_heads=C // D, qkv=_linear(m, 3 * C, C), proj=_linear(m, C, C))
        if heads:
            kwargs |= dict(qk_norm="rms", q_weight=m.randn(D), k_weight=m.randn(D), **_rope(m, N, D // 2))
        return (m.randn(2, N, C),), kwargs

    mlp = half == "adaln_mlp"
    return Workload(
        half, model, f"2x{N}x{C}", make,
        lambda dtype: (11 * 2 * N * C + (8 if mlp else 4) * C * C) * dtype.itemsize,
        flops=2 * N * C * (16 * C if mlp else 8 * C + 4 * N), dtypes=(torch.bfloat16,),
        peers={"eager": _eager_mlp if mlp else _eager_attention, "parts": _parts(half)}, fixed=("cos", "sin"),
    )  # fmt: skip


BENCH = (
    *(
        _half(half, *row)
        for half in ("adaln_attention", "adaln_mlp")
        for row in (("DiT-S/2-256", 384, 64, 256), ("DiT-XL/2-256", 1152, 72, 256), ("DiT-XL/2-512", 1152, 72, 1024))
    ),
    _half("adaln_attention", "LightningDiT-S/1-256", 384, 64, 256, True),
    _half("adaln_attention", "LightningDiT-XL/1-256", 1152, 72, 256, True),
    _half("adaln_attention", "1536-in-heads-of-128", 1536, 128, 1024, True),
)
