"""modulation: samples per code path, and the models' shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import Maker, Sample, Workload


def _tables(m: Maker, *shape: int, count: int = 6, dtype=None):
    """Strided rows, as `temb.chunk(6, dim=-1)` gives them."""
    return m.randn(*shape[:-1], count * shape[-1], dtype=dtype).chunk(count, dim=-1)


def _adaln(C: int, rows=(2,), B: int = 2, **extra):
    def make(m: Maker):
        shift, scale = _tables(m, *rows, C)[:2]
        return (m.randn(B, m.n, C),), dict(shift=shift, scale=scale, **extra)

    return make


def _packed(m: Maker):
    shift, scale = _tables(m, 3, 40)[:2]
    return (m.randn(m.n, 40),), dict(shift=shift, scale=scale, row_index=m.randint(0, 3, (m.n,)))


def _per_token(m: Maker):
    shift, scale = _tables(m, 2, m.n, 40)[:2]
    return (m.randn(2, m.n, 40),), dict(shift=shift, scale=scale, weight=m.randn(40))


def _indexed_batch(m: Maker):
    index = m.randint(0, 3, (2, m.n), dtype=torch.int64)
    shift, scale = _tables(m, 4, 40)[:2]  # a row that nobody uses
    return (m.randn(2, m.n, 40),), dict(shift=shift, scale=scale, row_index=index)


def _affine(norm: str, offset: float = 0.0, bias: bool = True, C: int = 40, precision: str = "fp32"):
    def make(m: Maker):
        kwargs = dict(weight=m.randn(C), norm=norm, weight_offset=offset, eps=1e-5, precision=precision)
        if bias:
            kwargs["bias"] = m.randn(C)
        return (m.randn(2, m.n, C),), kwargs | dict(scale=m.randn(2, C))

    return make


def _fp32_tables(m: Maker):
    wide = torch.promote_types(m.dtype, torch.float32)
    shift, scale = _tables(m, 2, 72, dtype=wide)[:2]
    return (m.randn(2, m.n, 72),), dict(shift=shift, scale=scale)


def _strided(m: Maker):
    x = m.randn(2, m.n, 3, 48).unbind(2)[1]
    return (x,), dict(shift=m.randn(1, 48).expand(2, 48), scale=m.randn(2, 48))


def _gate(C: int = 72, rows=(2,), **extra):
    def make(m: Maker):
        return (m.randn(2, m.n, C), m.randn(2, m.n, C), _tables(m, *rows, C)[2]), dict(extra)

    return make


def _mochi(m: Maker):
    kwargs = dict(gate_act="tanh", post_norm="rms", post_norm_weight=m.randn(40), precision="native")
    return (m.randn(2, m.n, 40), m.randn(2, m.n, 40), m.randn(2, 40)), kwargs


def _wide_residual(m: Maker):
    wide = torch.promote_types(m.dtype, torch.float32)
    return (m.randn(2, m.n, 40, dtype=wide), m.randn(2, m.n, 40), m.randn(2, 40, dtype=wide)), {}


def _seam(C: int = 72, rows=(2,), **extra):
    def make(m: Maker):
        shift, scale, gate = _tables(m, *rows, C)[:3]
        return (m.randn(2, m.n, C), m.randn(2, m.n, C), gate), dict(shift=shift, scale=scale, **extra)

    return make


def _seam_indexed(m: Maker):
    shift, scale, gate = _tables(m, 4, 40)[:3]
    kwargs = dict(shift=shift, scale=scale, row_index=m.randint(0, 4, (m.n,)), gate_row_index=m.randint(0, 4, (m.n,)))
    return (m.randn(m.n, 40), m.randn(m.n, 40), gate), kwargs


def _seam_mixed(m: Maker):
    tables = dict(shift=m.randn(2, m.n, 40), scale=m.randn(2, 2, 40), weight=m.randn(40))
    return (m.randn(2, m.n, 40), m.randn(2, m.n, 40), m.randn(2, 40)), tables


def _seam_gate_indexed(m: Maker):
    shift, scale = _tables(m, 2, 40)[:2]
    kwargs = dict(shift=shift, scale=scale, gate_row_index=m.randint(0, 3, (2, m.n)))
    return (m.randn(2, m.n, 40), m.randn(2, m.n, 40), m.randn(3, 40)), kwargs


def _wan_cross_seam(m: Maker):
    wide, C = torch.promote_types(m.dtype, torch.float32), 328  # wide enough that luck in torch's sums does not decide
    affine = dict(weight=m.randn(C, dtype=wide), bias=m.randn(C, dtype=wide))
    return (m.randn(2, m.n, C), m.randn(2, m.n, C), m.randn(2, C, dtype=wide)), affine


SAMPLES = (
    Sample("norm_modulate", "adaln", _adaln(72)),
    Sample("norm_modulate", "adaln-native", _adaln(72, precision="native")),
    Sample("norm_modulate", "tail-C", _adaln(37)),
    Sample("norm_modulate", "one-channel", _adaln(1)),
    Sample("norm_modulate", "per-frame", _adaln(40, rows=(2, 2))),
    Sample("norm_modulate", "per-token", _per_token),
    Sample("norm_modulate", "packed-index", _packed),
    Sample("norm_modulate", "batch-index", _indexed_batch),
    Sample("norm_modulate", "layer-affine", _affine("layer")),
    Sample("norm_modulate", "layer-affine-native", _affine("layer", precision="native")),
    Sample("norm_modulate", "rms-affine-offset", _affine("rms", offset=1.0, bias=False)),
    Sample("norm_modulate", "rms-affine-native", _affine("rms", bias=False, precision="native")),
    Sample("norm_modulate", "rms", _adaln(72, norm="rms")),
    Sample("norm_modulate", "fp32-tables", _fp32_tables),
    Sample("norm_modulate", "strided", _strided),
    Sample("norm_modulate", "plain-norm", lambda m: ((m.randn(2, m.n, 40),), {})),
    Sample("gate_residual", "gate", _gate()),
    Sample("gate_residual", "gate-native", _gate(precision="native")),
    Sample("gate_residual", "per-frame-tail", _gate(37, rows=(2, 2))),
    Sample("gate_residual", "no-gate", lambda m: ((m.randn(2, m.n, 40), m.randn(2, m.n, 40)), {})),
    Sample("gate_residual", "tanh", _gate(gate_act="tanh")),
    Sample("gate_residual", "mochi", _mochi),
    Sample("gate_residual", "wide-residual", _wide_residual),
    Sample("gate_residual_norm_modulate", "seam", _seam()),
    Sample("gate_residual_norm_modulate", "seam-native", _seam(precision="native")),
    Sample("gate_residual_norm_modulate", "tail-per-frame", _seam(37, rows=(2, 2))),
    Sample("gate_residual_norm_modulate", "mixed-rows", _seam_mixed),
    Sample("gate_residual_norm_modulate", "indexed", _seam_indexed),
    Sample("gate_residual_norm_modulate", "gate-indexed", _seam_gate_indexed),
    Sample("gate_residual_norm_modulate", "wan-cross", _wan_cross_seam),
    Sample("gate_residual_norm_modulate", "post-norm-rms", _seam(post_norm="rms", norm="rms")),
)


# ---- the models' shapes -------------------------------------------------------------------------------
def _bench_norm(B: int, N: int, C: int):
    def make(m: Maker):
        shift, scale = _tables(m, B, C)[:2]
        return (m.randn(B, N, C),), dict(shift=shift, scale=scale)

    return make


def _bench_seam(B: int, N: int, C: int):
    def make(m: Maker):
        shift, scale, gate = _tables(m, B, C)[:3]
        return (m.randn(B, N, C), m.randn(B, N, C), gate), dict(shift=shift, scale=scale)

    return make


def _eager_norm(x, *, shift, scale):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def _eager_seam(residual, y, gate, *, shift, scale):
    r = residual + gate.unsqueeze(1) * y
    return r, _eager_norm(r, shift=shift, scale=scale)


# name, batch, tokens, channels; N of the long videos is cut to what a CPU row can hold
_SHAPES = (
    ("DiT-XL/2-256", 8, 256, 1152),
    ("DiT-XL/2-512", 2, 1024, 1152),
    ("Wan2.1-1.3B-480p/8", 1, 4095, 1536),
    ("HunyuanVideo-720p/32", 1, 3713, 3072),
    ("Wan2.1-14B-480p/16", 1, 2047, 5120),
)


def _workload(op: str, make, eager, tensors: tuple[int, int], shape: tuple[str, int, int, int]) -> Workload:
    """tensors: how many of x's size the forward and the backward move."""
    name, B, N, C = shape
    forward, backward = (lambda dtype, count=count: count * B * N * C * dtype.itemsize for count in tensors)
    peers = {"eager": eager}
    return Workload(op, name, f"{B}x{N}x{C}", make(B, N, C), forward, peers=peers, bytes_bwd=backward)


BENCH = (
    *(_workload("norm_modulate", _bench_norm, _eager_norm, (2, 3), shape) for shape in _SHAPES),
    *(_workload("gate_residual_norm_modulate", _bench_seam, _eager_seam, (4, 6), shape) for shape in _SHAPES),
)
