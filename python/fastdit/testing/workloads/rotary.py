"""rotary: samples per code path, and the models' shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import Maker, Sample, Workload


def _wide(m: Maker) -> torch.dtype:
    return torch.promote_types(m.dtype, torch.float32)


def _table(m: Maker, *shape: int, dtype: torch.dtype | None = None, prefix: str = "") -> dict:
    angle = m.randn(*shape, dtype=torch.float64) * 3
    dtype = dtype or _wide(m)
    return {f"{prefix}cos": angle.cos().to(dtype), f"{prefix}sin": angle.sin().to(dtype)}


def _affine(m: Maker, C: int, bias: bool = False, k: int | None = None) -> dict:
    found = {"q_weight": m.randn(C) + 1, "k_weight": m.randn(k or C) + 1}
    return found | ({"q_bias": m.randn(C), "k_bias": m.randn(k or C)} if bias else {})


def _fused(m: Maker, B: int, N: int, H: int, D: int):
    """q and k as views of one projection."""
    return m.randn(B, N, 3, H, D).unbind(2)[:2]


def _head_rms(**extra):
    def make(m: Maker):
        return _fused(m, 2, m.n, 3, 32), dict(norm="rms", **_affine(m, 32), **_table(m, m.n, 16), **extra)

    return make


def _cogvideox(**extra):
    def make(m: Maker):
        kwargs = dict(norm="layer", rope_start=2, **_affine(m, 24, bias=True), **_table(m, m.n - 2, 12), **extra)
        return _fused(m, 2, m.n, 3, 24), kwargs

    return make


def _video_first(m: Maker):
    return _fused(m, 1, m.n, 2, 32), dict(rope_len=m.n - 2, norm="rms", **_table(m, m.n - 2, 16))


def _wan(**extra):
    def make(m: Maker):
        kwargs = dict(norm="rms", scope="hidden", **_affine(m, 3 * 32), **extra)
        doubled = _table(m, 1, m.n, 1, 32)
        return _fused(m, 2, m.n, 3, 32), kwargs | {name: t[..., 0::2] for name, t in doubled.items()}

    return make


def _ltx(m: Maker):
    kwargs = dict(norm="rms", scope="hidden", eps=1e-5, **_affine(m, 4 * 16), **_table(m, 2, m.n, 4, 8))
    return _fused(m, 2, m.n, 4, 16), kwargs


def _ltx2(m: Maker):
    """Cross-modal: k has fewer tokens and a table of its own, both (B, H, N, D/2) seen as (B, N, H, D/2)."""
    q, k = m.randn(2, m.n, 2, 32), m.randn(2, m.n // 2, 2, 32)
    tables = _table(m, 2, 2, m.n, 16) | _table(m, 2, 2, m.n // 2, 16, prefix="k_")
    tables = {name: t.transpose(1, 2) for name, t in tables.items()}
    return (q, k), dict(norm="rms", scope="hidden", layout="half", **_affine(m, 64), **tables)


def _mochi(m: Maker):
    return _fused(m, 2, m.n, 3, 32), dict(norm="rms", eps=1e-5, **_affine(m, 32), **_table(m, m.n, 3, 16))


def _minimax_h3(m: Maker):
    kwargs = dict(norm="rms", layout="half", precision="native", **_affine(m, 32))
    return _fused(m, 1, m.n, 2, 32), kwargs | _table(m, m.n, 12, dtype=m.dtype)


def _axes(m: Maker, *widths: int) -> tuple:
    return tuple(t for width in widths for t in _table(m, 64, width).values())


def _allegro_axes(m: Maker):
    grids = m.index([[m.n // 2, 2, 1]])
    return _fused(m, 2, m.n, 2, 48), dict(layout="axis_half", axes=_axes(m, 8, 8, 8), grids=grids)


def _allegro(m: Maker):
    return _fused(m, 2, m.n, 2, 48), dict(layout="axis_half", **_table(m, m.n, 24))


def _uneven_axes(m: Maker):
    grids = m.index([[m.n // 2, 1, 2], [1, 2, m.n // 2]])
    return _fused(m, 2, m.n, 2, 44), dict(layout="axis_half", norm="rms", axes=_axes(m, 8, 5, 7), grids=grids)


def _packed_axes(m: Maker):
    q, k = m.randn(m.n, 3, 32), m.randn(m.n, 1, 32)
    grids = m.index([[1, 2, 1], [0, 3, 2], [(m.n - 2) // 2, 1, 2]])
    return (q, k), dict(norm="rms", **_affine(m, 32), axes=_axes(m, 4, 6, 6), grids=grids)


def _two_axes(m: Maker):
    return _fused(m, 1, m.n, 2, 16), dict(layout="half", axes=_axes(m, 4, 4), grids=m.index([[2, m.n // 2]]))


def _packed(m: Maker):
    return (m.randn(m.n, 4, 32), m.randn(m.n, 2, 32)), dict(norm="rms", **_affine(m, 32), **_table(m, m.n, 16))


def _tails(layout: str, scope: str, precision: str = "fp32"):
    def make(m: Maker):
        C = 42 if scope == "head" else 3 * 42
        kwargs = dict(norm="layer", scope=scope, layout=layout, precision=precision, **_affine(m, C, bias=True))
        return _fused(m, 2, m.n, 3, 42), kwargs | _table(m, m.n, 9)

    return make


def _cross(m: Maker):
    q, k = m.randn(2, m.n, 3, 16), m.randn(2, 5, 2, 16)
    return (q, k), dict(norm="rms", scope="hidden", **_affine(m, 48, k=32))


def _bias_only(m: Maker):
    return _fused(m, 1, m.n, 2, 16), dict(norm="layer", q_bias=m.randn(16), k_bias=m.randn(16), **_table(m, 1, 8))


def _only_k(m: Maker):
    return _fused(m, 2, m.n, 2, 16), dict(norm="rms", **_table(m, m.n, 8, prefix="k_"))


SAMPLES = (
    Sample("qk_norm_rope", "hunyuan", _head_rms()),
    Sample("qk_norm_rope", "hunyuan-native", _head_rms(precision="native")),
    Sample("qk_norm_rope", "cosmos-half", _head_rms(layout="half")),
    Sample("qk_norm_rope", "cogvideox", _cogvideox()),
    Sample("qk_norm_rope", "cogvideox-native", _cogvideox(precision="native")),
    Sample("qk_norm_rope", "video-first", _video_first),
    Sample("qk_norm_rope", "wan", _wan()),
    Sample("qk_norm_rope", "wan-native", _wan(precision="native")),
    Sample("qk_norm_rope", "ltx-per-head", _ltx),
    Sample("qk_norm_rope", "ltx2-split", _ltx2),
    Sample("qk_norm_rope", "mochi", _mochi),
    Sample("qk_norm_rope", "minimax-h3", _minimax_h3),
    Sample("qk_norm_rope", "allegro-axes", _allegro_axes),
    Sample("qk_norm_rope", "allegro-thirds", _allegro),
    Sample("qk_norm_rope", "uneven-axes", _uneven_axes),
    Sample("qk_norm_rope", "packed-axes", _packed_axes),
    Sample("qk_norm_rope", "two-axes", _two_axes),
    Sample("qk_norm_rope", "packed", _packed),
    Sample("qk_norm_rope", "tail-D", _tails("interleaved", "head")),
    Sample("qk_norm_rope", "tail-D-half", _tails("half", "hidden")),
    Sample("qk_norm_rope", "tail-D-native", _tails("interleaved", "hidden", "native")),
    Sample("qk_norm_rope", "cross-norm-only", _cross),
    Sample("qk_norm_rope", "bias-only", _bias_only),
    Sample("qk_norm_rope", "only-k", _only_k),
    Sample("qk_norm_rope", "nothing", lambda m: (_fused(m, 2, m.n, 2, 16), {}), moves=True),
)


# ---- the models' shapes -------------------------------------------------------------------------------
def _apply_rotary_emb(x, cos, sin, half):
    """diffusers' embeddings.apply_rotary_emb on (B, N, H, D)."""
    cos, sin = cos[None, :, None], sin[None, :, None]
    if half:
        real, imaginary = x.reshape(*x.shape[:-1], 2, -1).unbind(-2)
        rotated = torch.cat([-imaginary, real], dim=-1)
    else:
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        rotated = torch.stack([-imaginary, real], dim=-1).flatten(3)
    return (x.float() * cos + rotated.float() * sin).to(x.dtype)


def _norm(x, weight, bias, norm, scope, eps):
    if scope == "hidden":
        return F.rms_norm(x.flatten(2), (weight.shape[0],), weight, eps).view(x.shape)
    if norm == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return (x * torch.rsqrt(variance + eps)).to(weight.dtype) * weight


def _eager(
    q, k, *, q_weight, k_weight, cos, sin, norm, q_bias=None, k_bias=None, scope="head", eps=1e-6,
    layout="interleaved", rope_start=0, rope_len=None,
):  # fmt: skip
    """The processors of diffusers: norm modules, then apply_rotary_emb with doubled tables."""
    half = layout == "half"
    cos, sin = (torch.cat([t, t], -1) if half else t.repeat_interleave(2, -1) for t in (cos, sin))
    out = []
    for x, weight, bias in ((q, q_weight, q_bias), (k, k_weight, k_bias)):
        x = _norm(x, weight, bias, norm, scope, eps)
        end = x.shape[1] if rope_len is None else rope_start + rope_len
        middle = _apply_rotary_emb(x[:, rope_start:end], cos, sin, half)
        parts = [x[:, :rope_start], middle, x[:, end:]]
        out.append(middle if end - rope_start == x.shape[1] else torch.cat(parts, dim=1))
    return tuple(out)


def _workload(model: str, B: int, N: int, H: int, D: int, text: int = 0, fused: bool = False, **options) -> Workload:
    def make(m: Maker):
        qk = _fused(m, B, N, H, D) if fused else (m.randn(B, N, H, D), m.randn(B, N, H, D))
        affine = _affine(m, H * D if options.get("scope") == "hidden" else D, bias=options["norm"] == "layer")
        return qk, options | affine | _table(m, N - text, D // 2, dtype=torch.float32)

    def moved(tensors: int):  # of q's size, and one reading of the table
        return lambda dtype: tensors * B * N * H * D * dtype.itemsize + 4 * (N - text) * D

    return Workload(
        "qk_norm_rope", model, f"{B}x{N}x{H}x{D}", make, moved(4),
        peers={"eager": _eager}, fixed=("cos", "sin"), bytes_bwd=moved(6),
    )  # fmt: skip


# N of the long videos is cut to what a CPU row can hold; "fused" reads q and k from one projection
BENCH = (
    _workload("Wan2.1-1.3B-480p/8", 1, 4095, 12, 128, norm="rms", scope="hidden"),
    _workload("Wan2.1-14B-720p/32", 1, 2362, 40, 128, norm="rms", scope="hidden"),
    _workload("HunyuanVideo-720p/32", 1, 3968, 24, 128, text=256, norm="rms", rope_len=3712),
    _workload("HunyuanVideo-720p/32-fused", 1, 3968, 24, 128, text=256, fused=True, norm="rms", rope_len=3712),
    _workload("CogVideoX-5B/4", 1, 4613, 48, 64, text=226, norm="layer", rope_start=226),
    _workload("HunyuanDiT-1024", 2, 4096, 16, 88, norm="layer"),
    _workload("Cosmos2-14B/32", 1, 2640, 40, 128, norm="rms", layout="half"),
)
