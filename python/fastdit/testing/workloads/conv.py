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
_DOWN_SPACE = dict(kernel=(1, 3, 3), stride=(1, 2, 2), padding=(0, 0, 0, 1, 0, 1))
_DOWN_DILATED = dict(stride=(1, 3, 3), dilation=(1, 2, 2), padding=(2, 0, 2, 1, 4, 4))


def _fp32_weights(m: Maker):
    (x, weight), kwargs = _conv(**_WAN)(m)
    wide = torch.promote_types(m.dtype, torch.float32)
    return (x, weight.to(wide)), {k: v.to(wide) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def _strided(m: Maker):
    """Frame and channel slices of a larger tensor; a weight with holes."""
    x = m.randn(2, 2 * 24, m.n + 1, 6, 9)[:, 5:29, 1:, :, ::2]
    return (x, m.randn(40, 24, 3, 3, 6)[..., ::2]), dict(bias=m.randn(40), **_WAN)


def _norm(norm: str, C=48, shape=(3, 5), last=False, B=2, **extra):
    def make(m: Maker):
        x = m.randn(B, C, m.n, *shape)
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
    Sample("causal_conv3d", "winograd2d-odd", _conv(C=37, Cout=70, H=5, W=7, B=2, algo="winograd2d", **_WAN)),
    Sample("causal_conv3d", "direct-odd", _conv(C=13, Cout=37, H=7, W=3, B=2, last=False, algo="direct", **_WAN)),
    Sample("causal_conv3d", "one-channel", _conv(C=1, Cout=1, bias=False, act="silu")),
    Sample("causal_conv3d", "long-chain", _conv(C=352, Cout=16, H=3, W=4, algo="direct")),
    Sample("causal_conv3d", "two-regions", _conv(C=4, Cout=20, H=3, W=270)),
    Sample("causal_conv3d", "down-space", _conv(H=6, **_DOWN_SPACE)),
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
    Sample("causal_conv3d", "down-dilated", _conv(C=9, W=9, **_DOWN_DILATED)),
    Sample("causal_conv3d", "down-gaps", _conv(C=9, W=9, kernel=(1, 2, 2), stride=(1, 3, 3), padding=(0,) * 6)),
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
_PREPARED: dict[int, dict] = {}  # of the row at hand, by the address of its x


def _activate(h, norm_weight):
    return F.silu(F.normalize(h, dim=1) * h.shape[1] ** 0.5 * norm_weight[:, None, None, None])


def _prepare(layout, x, weight, residual, cache, norm_weight):
    """What a model has at hand: tensors in its layout, and cached frames after norm and act, as Wan keeps them."""
    cache = cache if cache is None or norm_weight is None else _activate(cache, norm_weight)
    return [None if t is None else t.contiguous(memory_format=layout) for t in (x, weight, residual, cache)]


class _StandIn(torch.autograd.Function):
    """A prepared tensor in the place of a leaf: its gradient passes on as it is."""

    @staticmethod
    def forward(ctx, leaf, prepared):
        return prepared.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


@torch.compiler.disable
def _inputs(layout, x, *rest):
    prepared = _PREPARED.get(x.data_ptr())
    if prepared is None:
        return _prepare(layout, x, *rest)
    leaves = (x, *rest[:3])
    return [None if t is None else _StandIn.apply(t, p) for t, p in zip(leaves, prepared[layout], strict=True)]


def _bench_conv(**shape):
    make = _conv(**shape)

    def made(m: Maker):
        (x, weight), kwargs = make(Maker(m.dtype, m.device, n=1))
        rest = (weight, kwargs.get("residual"), kwargs.get("cache"), kwargs.get("norm_weight"))
        _PREPARED.clear()
        _PREPARED[x.data_ptr()] = {layout: _prepare(layout, x, *rest) for layout in (torch.contiguous_format, LAST)}
        return (x, weight), kwargs

    return made


def _wan_chain(layout):
    """The second half of a WanResidualBlock with its feat_cache, or a WanResample; its inputs stand ready."""

    def chain(
        x, weight, *, bias, norm_weight=None, residual=None, cache=None, stride=1, padding=_CAUSAL, norm=None, act=None,
        algo=None,
    ):  # fmt: skip
        x, weight, residual, cache = _inputs(layout, x, weight, residual, cache, norm_weight)
        h = x if norm_weight is None else _activate(x, norm_weight)
        missing = padding[0] if cache is None else padding[0] - cache.shape[2]
        h = h if cache is None else torch.cat([cache, h], 2)
        y = F.conv3d(F.pad(h, (*padding[4:], *padding[2:4], missing, padding[1])), weight, bias, stride)
        return y if residual is None else y + residual

    return chain


def _workload(name: str, C: int, T: int, cache: int, H: int, W: int, dtypes=None, **extra) -> Workload:
    kernel, stride = extra.get("kernel", (3, 3, 3)), extra.get("stride", (1, 1, 1))
    block = {} if "kernel" in extra else dict(residual=True, **_WAN)
    taps = C * C * kernel[0] * kernel[1] * kernel[2]
    pixels, written = T * H * W, T * H * W // (stride[0] * stride[1] * stride[2])

    def moved(dtype: torch.dtype) -> int:
        read = pixels + cache * H * W + (written if block else 0)
        return (C * (read + written) + taps) * dtype.itemsize

    return Workload(
        "causal_conv3d",
        name,
        f"{C}x({T}+{cache})x{H}x{W}",
        _bench_conv(C=C, Cout=C, H=H, W=W, cache=cache, frames=T, **block, **extra),
        moved,
        flops=2 * taps * written,
        dtypes=dtypes or (torch.bfloat16, torch.float32),
        peers={"eager": _wan_chain(torch.contiguous_format), "conv_ndhwc": _wan_chain(LAST)},
        fixed=("cache",),  # earlier chunks are done
    )


_OTHER_ALGO = (  # what auto does not take
    (torch.bfloat16, "winograd"), (torch.bfloat16, "winograd2d"), (torch.float32, "direct"), (torch.float32, "winograd")
)  # fmt: skip


def _norm_workload(name: str, norm: str, C: int, T: int, H: int, W: int, last: bool) -> Workload:
    def eager(x, *, norm, weight, bias=None):
        return _activate(x, weight) if norm == "channel_l2" else F.silu(F.group_norm(x, 32, weight, bias, 1e-6))

    make = _norm(norm, C=C, shape=(H, W), last=last, B=1)
    return Workload(
        "norm_silu",
        name,
        f"{C}x{T}x{H}x{W} {'ndhwc' if last else 'ncdhw'}",
        lambda m: make(Maker(m.dtype, m.device, n=T)),
        lambda dtype: 2 * C * T * H * W * dtype.itemsize,
        peers={"eager": eager},
    )


BENCH = (
    _workload("Wan2.1-C384-first/16", 384, 1, 0, 16, 16),
    _workload("Wan2.1-C384/16", 384, 1, 2, 16, 16),
    _workload("Wan2.1-C384x2/32", 384, 2, 2, 32, 32),
    _workload("Wan2.1-C192/64", 192, 4, 2, 64, 64),
    _workload("Wan2.1-C192-first4/64", 192, 4, 0, 64, 64),
    _workload("Wan2.1-C96/128", 96, 4, 2, 128, 128),
    *(_workload(f"Wan2.1-C384x2/32-{algo}", 384, 2, 2, 32, 32, (dtype,), algo=algo) for dtype, algo in _OTHER_ALGO),
    *(_workload(f"Wan2.1-C192/64-{algo}", 192, 4, 2, 64, 64, (dtype,), algo=algo) for dtype, algo in _OTHER_ALGO),
    *(_workload(f"Wan2.1-C96/128-{algo}", 96, 4, 2, 128, 128, (dtype,), algo=algo) for dtype, algo in _OTHER_ALGO),
    _workload("Wan2.1-down-space-C96/128", 96, 4, 0, 128, 128, **_DOWN_SPACE),
    _workload("Wan2.1-down-time-C192/64", 192, 4, 1, 64, 64, **_DOWN_TIME),
    _workload("Wan2.1-C96-480p", 96, 2, 2, 240, 416),
    _norm_workload("Wan2.1-C96/128", "channel_l2", 96, 4, 128, 128, last=True),
    _norm_workload("Wan2.1-C96/128-ncdhw", "channel_l2", 96, 4, 128, 128, last=False),
    _norm_workload("HunyuanVideo-C256/64", "group", 256, 5, 64, 64, last=False),
)
