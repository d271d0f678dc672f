"""patch: samples per code path, and the models' shapes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from . import Maker, Sample, Workload

PATCH = (1, 2, 2)


def _embed(C: int, D: int, patch=PATCH, grid=(1, 2), B: int = 2, bias: bool = True, pos=None, wide=(), view=None):
    """Grid (*grid, n). pos: leading dims of the table. wide: what comes in fp32. view: relayout of x."""

    def make(m: Maker):
        fp32 = torch.promote_types(m.dtype, torch.float32)
        dtype = {name: fp32 if name in wide else m.dtype for name in ("weight", "bias", "pos")}
        full = (*grid, m.n)
        x = m.randn(B, C, *(g * p for g, p in zip(full, patch, strict=True)))
        weight = m.randn(D, C, *patch, dtype=dtype["weight"]) / math.sqrt(C * math.prod(patch))
        kwargs = {"bias": m.randn(D, dtype=dtype["bias"])} if bias else {}
        if pos is not None:
            kwargs["pos"] = m.randn(*pos, math.prod(full), D, dtype=dtype["pos"])
        return (view(x) if view else x, weight), kwargs

    return make


def _relaid(*dims: int):
    """The same values under other strides, as a model that keeps (B, T, C, H, W) or channels last hands them over."""
    back = sorted(range(5), key=dims.__getitem__)
    return lambda x: x.permute(dims).contiguous().permute(back)


def _linear_weight(m: Maker):
    # Kandinsky: a Linear over (pt, ph, pw, c)
    weight = m.randn(40, 2, 2, 2, 3).permute(0, 4, 1, 2, 3)
    return (m.randn(1, 3, 2, 4, 2 * m.n), weight), dict(bias=m.randn(40))


def _list(pos: str | None = None):
    def make(m: Maker):
        grids = ((1, 2, m.n), (2, 3, 5), (1, 1, 1))
        x = [m.randn(4, *(g * p for g, p in zip(grid, PATCH, strict=True))) for grid in grids]
        x[1] = x[1].transpose(2, 3).contiguous().transpose(2, 3)
        rows = [m.randn(math.prod(grid), 72) for grid in grids]
        kwargs = {} if pos is None else {"pos": rows if pos == "list" else torch.cat(rows)}
        return (x, m.randn(72, 4, *PATCH), m.randn(72)), kwargs

    return make


def _unpatchify(C: int, order: str, patch=PATCH, grid=(2, 3), B: int = 2):
    def make(m: Maker):
        full = (*grid, m.n)
        tokens = m.randn(B, math.prod(full), C * math.prod(patch))
        return (tokens,), dict(grid=full, patch=patch, channels=C, order=order)

    return make


def _unpatchify_strided(m: Maker):
    tokens = m.randn(2, 3 * m.n, 17)[..., 1:]
    return (tokens,), dict(grid=(3, 1, m.n), patch=PATCH, channels=4, order="cthw")


def _unpatchify_list(m: Maker):
    grids = [(1, 2, m.n), (2, 3, 5), (1, 1, 1)]
    tokens = m.randn(sum(math.prod(g) for g in grids), 16)
    return (tokens,), dict(grid=grids, patch=PATCH, channels=4, order="thwc")


SAMPLES = (
    Sample("patch_embed3d", "image-pos", _embed(4, 72, pos=())),
    Sample("patch_embed3d", "pos-per-sample", _embed(4, 72, pos=(2,))),
    Sample("patch_embed3d", "fp32-pos", _embed(4, 72, pos=(1,), wide=("pos",))),
    Sample("patch_embed3d", "fp32-weight", _embed(4, 72, wide=("weight", "bias"))),
    Sample("patch_embed3d", "blocks", _embed(16, 200, grid=(3, 5))),
    Sample("patch_embed3d", "tail-D", _embed(3, 37, patch=(1, 3, 3), pos=())),
    Sample("patch_embed3d", "odd-K", _embed(5, 64, patch=(1, 1, 1))),
    Sample("patch_embed3d", "temporal", _embed(3, 64, patch=(2, 2, 2), grid=(2, 1), bias=False)),
    Sample("patch_embed3d", "frames-first", _embed(4, 64, view=_relaid(0, 2, 1, 3, 4))),
    Sample("patch_embed3d", "channels-last", _embed(4, 64, view=_relaid(0, 2, 3, 4, 1))),
    Sample("patch_embed3d", "linear-weight", _linear_weight),
    Sample("patch_embed3d", "list", _list()),
    Sample("patch_embed3d", "list-pos", _list("packed")),
    Sample("patch_embed3d", "list-pos-list", _list("list")),
    Sample("unpatchify3d", "wan", _unpatchify(16, "thwc"), moves=True),
    Sample("unpatchify3d", "hunyuan", _unpatchify(16, "cthw"), moves=True),
    Sample("unpatchify3d", "cosmos", _unpatchify(9, "hwtc", patch=(2, 2, 2)), moves=True),
    Sample("unpatchify3d", "wide-run", _unpatchify(3, "tchw", patch=(1, 2, 4)), moves=True),
    Sample("unpatchify3d", "odd-run", _unpatchify(3, "cthw", patch=(1, 3, 3)), moves=True),
    Sample("unpatchify3d", "scattered", _unpatchify(3, "cwht", patch=(2, 2, 2)), moves=True),
    Sample("unpatchify3d", "patch-1", _unpatchify(17, "cthw", patch=(1, 1, 1)), moves=True),
    Sample("unpatchify3d", "strided", _unpatchify_strided, moves=True),
    Sample("unpatchify3d", "list", _unpatchify_list, moves=True),
)


# ---- the models' shapes -------------------------------------------------------------------------------
def _conv(x, weight, bias, *, pos=None):
    """What the models do."""
    y = F.conv3d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return y.contiguous() if pos is None else y + pos


def _linear_rewrite(x, weight, bias, *, pos=None):
    """What engines rewrite it to: a patch matrix, then one GEMM."""
    (B, C, T, H, W), (D, _, pt, ph, pw) = x.shape, weight.shape
    patches = x.view(B, C, T // pt, pt, H // ph, ph, W // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    y = F.linear(patches.reshape(B, -1, C * pt * ph * pw), weight.view(D, -1), bias)
    return y if pos is None else y + pos


def _each(call):
    """A list, video by video: what a model without packing does."""

    def run(x, weight, bias, *, pos=None):
        return torch.cat([call(video[None], weight, bias)[0] for video in x])

    return run


def _move(tokens, *, grid, patch, channels, order):
    size = {"c": channels, "t": patch[0], "h": patch[1], "w": patch[2]}
    dim = {letter: 4 + i for i, letter in enumerate(order)}
    video = tokens.reshape(-1, *grid, *(size[letter] for letter in order))
    video = video.permute(0, dim["c"], 1, dim["t"], 2, dim["h"], 3, dim["w"])
    return video.flatten(6, 7).flatten(4, 5).flatten(2, 3).contiguous()


def _bench_embed(name: str, B: int, C: int, grid, D: int, patch=PATCH, pos: bool = False) -> Workload:
    size = tuple(g * p for g, p in zip(grid, patch, strict=True))
    N, K = B * math.prod(grid), C * math.prod(patch)

    def make(m: Maker):
        args = (m.randn(B, C, *size), m.randn(D, C, *patch) / math.sqrt(K), m.randn(D))
        return args, {"pos": m.randn(math.prod(grid), D)} if pos else {}

    def moved(dtype: torch.dtype) -> int:
        return (N * K + N * D + D * K) * dtype.itemsize

    peers = {"eager": _conv, "linear_rewrite": _linear_rewrite}
    shape = f"{B}x{C}x{'x'.join(map(str, size))}->{D}"
    return Workload("patch_embed3d", name, shape, make, moved, flops=2 * N * K * D, peers=peers)


def _bench_list(name: str, C: int, grids, D: int, patch=PATCH) -> Workload:
    """Videos of several sizes into one sequence."""
    N, K = sum(map(math.prod, grids)), C * math.prod(patch)

    def make(m: Maker):
        x = [m.randn(C, *(g * p for g, p in zip(grid, patch, strict=True))) for grid in grids]
        return (x, m.randn(D, C, *patch) / math.sqrt(K), m.randn(D)), {}

    def moved(dtype: torch.dtype) -> int:
        return (N * K + N * D + D * K) * dtype.itemsize

    peers = {"eager": _each(_conv), "linear_rewrite": _each(_linear_rewrite)}
    return Workload(
        "patch_embed3d", name, f"{len(grids)} videos->{N}x{D}", make, moved, flops=2 * N * K * D, peers=peers
    )


def _bench_unpatchify(name: str, B: int, C: int, grid, order: str, patch=PATCH) -> Workload:
    N, K = math.prod(grid), C * math.prod(patch)

    def make(m: Maker):
        return (m.randn(B, N, K),), dict(grid=grid, patch=patch, channels=C, order=order)

    def moved(dtype: torch.dtype) -> int:
        return 2 * B * N * K * dtype.itemsize

    return Workload("unpatchify3d", name, f"{B}x{N}x{K}", make, moved, peers={"eager": _move})


# The long videos are cut in time to what a CPU row can hold.
BENCH = (
    _bench_embed("DiT-XL/2-256", 8, 4, (1, 16, 16), 1152, pos=True),
    _bench_embed("DiT-XL/2-512", 8, 4, (1, 32, 32), 1152, pos=True),
    _bench_embed("Wan2.1-1.3B-480p/5", 1, 16, (4, 30, 52), 1536),
    _bench_embed("Wan2.1-14B-720p/10", 1, 16, (2, 45, 80), 5120),
    _bench_embed("Wan2.2-5B-704p/8", 1, 48, (4, 22, 40), 3072),
    _bench_embed("HunyuanVideo-720p/16", 1, 16, (2, 45, 80), 3072),
    _bench_embed("HunyuanVideo1.5-720p/8", 1, 65, (4, 45, 80), 2048, patch=(1, 1, 1)),
    _bench_list("Wan2.1-14B-mixed", 16, ((1, 45, 80), (2, 30, 52), (1, 52, 30), (4, 16, 28)), 5120),
    _bench_unpatchify("DiT-XL/2-512", 8, 8, (1, 32, 32), "thwc"),
    _bench_unpatchify("Wan2.1-480p", 1, 16, (21, 30, 52), "thwc"),
    _bench_unpatchify("HunyuanVideo-720p/4", 1, 16, (8, 45, 80), "cthw"),
    _bench_unpatchify("Cosmos2-704p/4", 1, 16, (6, 44, 80), "hwtc"),
)
