"""conv: samples per code path, and the models' shapes."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ...reference.conv import output_shape
from . import Maker, Sample, Workload

LAST = torch.channels_last_3d
_CAUSAL = (2, 0, 1, 1, 1, 1)


def _conv(
    C=32, Cout=48, H=5, W=6, kernel=(3, 3, 3), cache=0, bias=True, residual=False, B=1, frames=1, last=True, **extra
):  # fmt: skip
    """frames: T = frames * m.n, for kernels that stride over time."""

    def make(m: Maker):
        video = lambda *shape: m.randn(*shape).to(memory_format=LAST if last else torch.contiguous_format)  # noqa: E731
        x = video(B, C, frames * m.n, H, W)
        weight = m.randn(Cout, C, *kernel) * (C * kernel[0] * kernel[1] * kernel[2]) ** -0.5
        kwargs = dict(extra)
        if bias:
            kwargs["bias"] = m.randn(Cout)
        if cache:
            kwargs["cache"] = video(B, C, cache, H, W)
        if kwargs.get("norm"):
            kwargs["norm_weight"] = m.randn(C)
        if residual:
            kwargs["residual"] = video(*output_shape(x.shape, weight.shape, (1, 1, 1), (1, 1, 1), _CAUSAL))
        return (x, weight), kwargs

    return make


_WAN = dict(norm="channel_l2", act="silu")
_EDGE = dict(time_pad="first", space_pad="replicate")
_LTX2 = dict(time_pad="first", space_pad="reflect", norm="channel_rms", norm_eps=1e-6, act="silu")
_DOWN_TIME = dict(kernel=(3, 1, 1), stride=(2, 1, 1), padding=(1, 0, 0, 0, 0, 0))


def _fp32_weights(m: Maker):
    (x, weight), kwargs = _conv(**_WAN)(m)
    wide = torch.promote_types(m.dtype, torch.float32)
    return (x, weight.to(wide)), {k: v.to(wide) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def _strided(m: Maker):
    """Frame and channel slices of a larger tensor; a weight with holes."""
    x = m.randn(2, 2 * 24, m.n + 1, 6, 9)[:, 5:29, 1:, :, ::2]
    return (x, m.randn(40, 24, 3, 3, 6)[..., ::2]), dict(bias=m.randn(40), **_WAN)


def _norm(norm: str, C=48, shape=(3, 5), last=False, **extra):
    def make(m: Maker):
        x = m.randn(2, C, m.n, *shape)
        x = x.to(memory_format=LAST) if last else x
        kwargs = dict(norm=norm, weight=m.randn(C), **extra)
        return (x,), kwargs | (dict(bias=m.randn(C)) if norm == "group" else {})

    return make


def _cache(frames: int, last: bool = True):
    def make(m: Maker):
        x = m.randn(2, 5, m.n, 3, 4)
        x = x.to(memory_format=LAST) if last else x
        return (x, m.randn(2, 5, frames, 3, 4) if frames else None, 9 if frames == 8 else 3), {}

    return make


SAMPLES = (
    Sample("causal_conv3d", "wan", _conv(cache=2, residual=True, **_WAN)),
    Sample("causal_conv3d", "wan-ncdhw", _conv(cache=2, residual=True, last=False, **_WAN)),
    Sample("causal_conv3d", "first-chunk", _conv(cache=1, **_WAN)),
    Sample("causal_conv3d", "winograd-odd", _conv(C=13, Cout=37, H=7, W=3, B=2, algo="winograd")),
    Sample("causal_conv3d", "direct-odd", _conv(C=13, Cout=37, H=7, W=3, B=2, last=False, algo="direct", **_WAN)),
    Sample("causal_conv3d", "one-channel", _conv(C=1, Cout=1, bias=False, act="silu")),
    Sample("causal_conv3d", "long-chain", _conv(C=352, Cout=16, H=3, W=4, algo="direct")),
    Sample("causal_conv3d", "two-regions", _conv(C=4, Cout=20, H=3, W=270)),
    Sample("causal_conv3d", "down-space", _conv(kernel=(1, 3, 3), stride=(1, 2, 2), padding=(0, 0, 0, 1, 0, 1), H=6)),
    Sample("causal_conv3d", "down-time", _conv(cache=1, frames=2, **_DOWN_TIME)),
    Sample("causal_conv3d", "time", _conv(kernel=(3, 1, 1), Cout=64, cache=2)),
    Sample("causal_conv3d", "space", _conv(kernel=(1, 3, 3), Cout=20, **_WAN)),
    Sample("causal_conv3d", "pointwise", _conv(kernel=(1, 1, 1), Cout=100)),
    Sample("causal_conv3d", "dilated", _conv(dilation=(2, 1, 2), padding=(4, 0, 1, 1, 2, 2), C=9)),
    Sample("causal_conv3d", "hunyuan", _conv(act="silu", **_EDGE)),
    Sample("causal_conv3d", "ltx2", _conv(**_LTX2)),
    Sample("causal_conv3d", "ltx-symmetric", _conv(time_pad="first", padding=(1, 1, 1, 1, 1, 1), last=False)),
    Sample("causal_conv3d", "cogvideox", _conv(time_pad="first", cache=2)),
    Sample("causal_conv3d", "mochi-down", _conv(kernel=(1, 2, 2), stride=(1, 2, 2), H=4, **_EDGE)),
    Sample("causal_conv3d", "fp32-weights", _fp32_weights),
    Sample("causal_conv3d", "strided", _strided),
    Sample("next_cache", "roll", _cache(2), moves=True),
    Sample("next_cache", "first", _cache(0, last=False), moves=True),
    Sample("next_cache", "long", _cache(8), moves=True),
    Sample("norm_silu", "l2", _norm("channel_l2", last=True)),
    Sample("norm_silu", "l2-ncdhw-odd", _norm("channel_l2", C=37)),
    Sample("norm_silu", "rms", _norm("channel_rms", C=20, last=True, eps=1e-6)),
    Sample("norm_silu", "group", _norm("group", groups=8)),
    Sample("norm_silu", "group-last", _norm("group", C=36, groups=4, last=True)),
    Sample("norm_silu", "group-images", _norm("group", shape=(7,), groups=16, eps=1e-5)),
)  # fmt: skip


# ---- the models' shapes, cut small in H and W ---------------------------------------------------------
def _bench_conv(C: int, T: int, cache: int, H: int, W: int, last: bool):
    make = _conv(C=C, Cout=C, H=H, W=W, cache=cache, residual=True, frames=T, last=last, **_WAN)
    return lambda m: make(Maker(m.dtype, m.device, n=1))


def _eager(x, weight, *, bias, norm_weight, residual, cache=None, norm=None, act=None):
    """WanResidualBlock's second half; its cache holds frames after norm and act."""
    h = F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * norm_weight[:, None, None, None])
    missing = 2
    if cache is not None:
        h = torch.cat([cache, h], 2)
        missing -= cache.shape[2]
    return F.conv3d(F.pad(h, (1, 1, 1, 1, missing, 0)), weight, bias) + residual


def _eager_last(x, weight, **kwargs):
    return _eager(x, weight.to(memory_format=LAST), **kwargs)


def _contiguous(x, weight, *, residual, cache=None, **kwargs):
    if cache is not None:
        kwargs["cache"] = cache.contiguous()
    return _eager(x.contiguous(), weight, residual=residual.contiguous(), **kwargs)


# name, C, frames, cached frames, H, W
_SHAPES = (
    ("Wan2.1-C384-first/16", 384, 1, 0, 16, 16),
    ("Wan2.1-C384/16", 384, 1, 2, 16, 16),
    ("Wan2.1-C384x2/32", 384, 2, 2, 32, 32),
    ("Wan2.1-C192/64", 192, 4, 2, 64, 64),
    ("Wan2.1-C96/128", 96, 4, 2, 128, 128),
)


def _workload(shape: tuple[str, int, int, int, int, int]) -> Workload:
    name, C, T, cache, H, W = shape

    def moved(dtype: torch.dtype) -> int:
        return (C * (3 * T + cache) * H * W + 27 * C * C) * dtype.itemsize

    return Workload(
        "causal_conv3d",
        name,
        f"{C}x({T}+{cache})x{H}x{W}",
        _bench_conv(C, T, cache, H, W, last=True),
        moved,
        flops=2 * 27 * C * C * T * H * W,
        peers={"eager": _contiguous, "conv_ndhwc": _eager_last},
    )


BENCH = tuple(_workload(shape) for shape in _SHAPES)
