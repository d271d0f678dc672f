"""patch on the Triton kernels (kernels/patch.py, patch_backward.py, patch_unpatchify.py).

Launches: patch_embed3d 1; its backward 1 for x, 1 or 2 for weight and bias together, 1 for pos. unpatchify3d 1, its
backward 1. A list takes one of each (the second stages once) for every eight videos.
Bytes: forward N*K + N*D + D*K values; backward reads g once for x and once for weight and bias.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from fastdit.kernels.patch import patch_embed
from fastdit.kernels.patch_backward import patch_embed_dw, patch_embed_dx, patch_sum
from fastdit.kernels.patch_unpatchify import unpatchify

from ..registry import Impl, register as _register
from ._config import Config, choose, tunable
from ._launch import dot_precision, launch, processors, unfit

VIDEOS = 8  # that one launch can tell apart
_NO_TABLE = (0,) * (2 * VIDEOS + 1)
_SUM = 1024

# blocks: tokens, outputs. The step along K follows from K.
tunable(
    "patch_embed",
    Config((128, 128), 4, 3), Config((128, 128), 8, 3), Config((128, 256), 8, 3), Config((64, 256), 4, 3),
    Config((64, 128), 4, 3), Config((64, 64), 4, 3), Config((256, 64), 8, 3), Config((128, 64), 4, 4),
)  # fmt: skip
tunable(
    "patch_embed_dx",
    Config((128, 64), 4, 3), Config((128, 64), 8, 3), Config((64, 64), 4, 4), Config((64, 128), 4, 3),
)  # fmt: skip
tunable(
    "patch_embed_dw",
    Config((64, 128), 4, 3), Config((64, 128), 8, 3), Config((128, 128), 8, 3), Config((64, 64), 4, 4),
)  # fmt: skip
tunable("unpatchify", *(Config((q,), warps, 1) for q in (32, 64, 128, 256) for warps in (4, 8)))


def _embed_default(wide: bool):
    return lambda arch: Config((64, 64), 4, 2) if wide else Config((128, 128), 4 if arch < 90 else 8, 3)


def _dx_default(wide: bool):
    return lambda arch: Config((64, 32), 4, 2) if wide else Config((64, 64), 4, 3)


def _dw_default(wide: bool):
    return lambda arch: Config((32, 64), 4, 2) if wide else Config((64, 128), 4 if arch < 90 else 8, 3)


def power(n: int) -> int:
    """The least power of two that holds n."""
    return 1 << max(n - 1, 0).bit_length()


def step(K: int, wide: bool) -> int:
    """BK: all of K where it fits, else half of it, else 128; fp32 multiplies in steps of 32."""
    return max(16, min(power(K), 32 if wide else 128))


def divisor(itemsize: int, *strides: int) -> int:
    """ALIGN: the most elements, up to 16 bytes, that divide every stride."""
    return math.gcd(16 // itemsize, *strides)


@lru_cache(maxsize=256)
def tables(grids: tuple[int, ...], block: int, lines: int = 0) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Per launch (tiles, what `locate` reads). A tile is `block` tokens, or `block` pixels of a row of tokens where
    `lines` is the pixels of a token along w."""
    launches, row = [], 0
    for i in range(0, len(grids), 3 * VIDEOS):
        tiles, starts, sizes = 0, [], []
        for j in range(i, min(i + 3 * VIDEOS, len(grids)), 3):
            t, h, w = grids[j : j + 3]
            starts.append(tiles << 32 | row)
            sizes.append(h << 32 | w)
            tiles += t * h * -(-w * lines // block) if lines else -(-t * h * w // block)
            row += t * h * w
        rest = VIDEOS - len(sizes)
        launches.append((tiles, (*starts, *[tiles << 32 | row] * (rest + 1), *sizes, *[0] * rest)))
    return tuple(launches)


def _dense(x, weight):
    """rows, N, h, w of a batch."""
    B, _, T, H, W = x.shape
    _, _, pt, ph, pw = weight.shape
    h, w = H // ph, W // pw
    N = T // pt * h * w
    return B * N, N, h, w


def _wide(weight) -> bool:
    return weight.dtype == torch.float32


def _precision(x, weight) -> str:
    # x of a half type beside fp32 weights: the products are exact only where nothing is rounded to TF32
    return dot_precision() if x.dtype == weight.dtype else "ieee"


def _layout(x) -> tuple[tuple[int, ...], bool, int]:
    """Strides of x, whether its W axis has stride 1, and what divides the others. A list stands contiguous."""
    if x.dim() == 1:
        return (0, 0, 0, 0, 1), True, 1
    s = x.stride()
    return s, s[4] == 1, divisor(x.element_size(), *s[:4])


def patch_embed3d(x, weight, bias, pos, grids):
    D, C, pt, ph, pw = weight.shape
    many = x.dim() == 1
    if many:
        dense = (0, 0, 0, 0)
        y = x.new_empty((sum(math.prod(grids[i : i + 3]) for i in range(0, len(grids), 3)), D))
    else:
        dense = _dense(x, weight)
        y = x.new_empty((x.shape[0], dense[1], D))
    if y.numel() == 0:
        return y
    K = C * pt * ph * pw
    if K == 0:
        return _without_values(y, bias, pos)
    wide = _wide(weight)
    config = choose("patch_embed", x, (x.dtype, weight.dtype, K, D), _embed_default(wide))
    BM, BN = config.blocks
    strides, unit, align = _layout(x)
    pB, pN, palign = 0, 0, 1
    if pos is not None:
        pB, pN = pos.stride()[:2] if pos.dim() == 3 else (0, pos.stride(0))
        palign = divisor(pos.element_size(), pB, pN)
    if bias is not None:
        bias = bias.contiguous()
    columns = -(-D // BN)
    constants = (
        C, D, pt, ph, pw, unit, align, palign, weight.is_contiguous(), many, BM, BN, step(K, wide),
        _precision(x, weight),
    )  # fmt: skip
    found = tables(tuple(grids), BM) if many else ((-(-dense[0] // BM), _NO_TABLE),)
    for tiles, table in found:
        if tiles == 0:
            continue
        # enough programs for the card; beyond that a program keeps its patches for several tiles of outputs
        parts = min(columns, -(-4 * processors(x) // tiles))
        per = -(-columns // parts)
        parts = -(-columns // per)
        launch(
            patch_embed, (tiles * parts, 1, 1), (x, weight, bias, pos, y),
            (*dense, *strides, *weight.stride(), pB, pN, per, parts, *table), constants, config.warps, config.stages,
        )  # fmt: skip
    return y


def _without_values(y, bias, pos):
    """No channels: what is left is bias and pos."""
    y.zero_()
    wide = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
    for t in (bias, pos):
        if t is not None:
            wide += t
    return y.copy_(wide)


def _zeros(inputs, needs):
    return tuple(torch.zeros_like(t) if need and t is not None else None for t, need in zip(inputs, needs, strict=True))


def patch_embed3d_backward(grad, x, weight, bias, pos, grids, needs):
    if grad is None or grad.numel() == 0 or weight.numel() == 0:
        return _without_tokens(grad, (x, weight, bias, pos), needs)
    g = grad.contiguous()
    dense = (0, 0, 0, 0) if x.dim() == 1 else _dense(x, weight)
    grids = tuple(grids)
    dx = _backward_x(g, x, weight, dense, grids) if needs[0] else None
    need_b = needs[2] and bias is not None
    dw, db = (
        _backward_weight(g, x, weight, bias, dense, grids, needs[1], need_b) if needs[1] or need_b else (None, None)
    )
    dpos = None
    if needs[3] and pos is not None:
        if pos.dim() == 2 and x.dim() == 5 and x.shape[0] != 1:
            dpos = torch.empty(pos.shape, dtype=pos.dtype, device=pos.device)
            size = dpos.numel()
            _sum(g, dpos, None, x.shape[0], size)
        else:
            dpos = g.view(pos.shape).to(pos.dtype, copy=True)
    return dx, dw, db, dpos


def _without_tokens(grad, inputs, needs):
    """Nothing reaches x and weight; what reaches bias and pos needs no kernel of ours."""
    dx, dw, db, dpos = _zeros(inputs, needs)
    if grad is not None and grad.numel():
        db = None if db is None else grad.flatten(0, -2).sum(0, dtype=torch.float32).to(db.dtype)
        if dpos is not None:
            dpos = (grad.float().sum(0) if dpos.dim() < grad.dim() else grad.float()).to(dpos.dtype)
    return dx, dw, db, dpos


def _backward_x(g, x, weight, dense, grids):
    D, C, pt, ph, pw = weight.shape
    K, wide, many = C * pt * ph * pw, _wide(weight), x.dim() == 1
    config = choose("patch_embed_dx", x, (x.dtype, weight.dtype, K, D), _dx_default(wide))
    BM, BN = config.blocks
    BK = max(16, min(power(K), 64 if wide else 128))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    constants = (C, D, pt, ph, pw, weight.is_contiguous(), many, BM, BN, BK, _precision(x, weight))
    for tiles, table in tables(grids, BM) if many else ((-(-dense[0] // BM), _NO_TABLE),):
        if tiles:
            launch(
                patch_embed_dx, (tiles, -(-K // BK), 1), (g, weight, dx), (*dense, *weight.stride(), *table), constants,
                config.warps, config.stages,
            )  # fmt: skip
    return dx


def _backward_weight(g, x, weight, bias, dense, grids, need_w, need_b):
    """Gradients of weight and bias: fp32 partials of every split, then their sum in order."""
    D, C, pt, ph, pw = weight.shape
    K, wide, many = C * pt * ph * pw, x.dtype == torch.float32, x.dim() == 1
    config = choose("patch_embed_dw", x, (x.dtype, K, D), _dw_default(wide))
    BM, BN = config.blocks
    BK = max(16, min(power(K), 64 if wide else 128))
    outputs = -(-D // BN) * -(-K // BK)
    plan, splits = [], 0
    for tiles, table in tables(grids, BM) if many else ((-(-dense[0] // BM), _NO_TABLE),):
        if tiles:
            per = -(-tiles // min(tiles, -(-2 * processors(x) // outputs)))
            plan.append((tiles, per, splits, table))
            splits += -(-tiles // per)
    dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if need_w else None
    db = torch.empty(bias.shape, dtype=bias.dtype, device=x.device) if need_b else None
    size, pitch = (D * K if need_w else 0), (D * K if need_w else 0) + (D if need_b else 0)
    part_w, part_b = dw, db
    if splits > 1:
        partial = torch.empty((splits, pitch), dtype=torch.float32, device=x.device)
        part_w, part_b = (partial if need_w else None), (partial[0, size:] if need_b else None)
    strides, unit, align = _layout(x)
    constants = (C, D, pt, ph, pw, unit, align, many, BM, BN, BK, dot_precision())
    for tiles, per, split0, table in plan:
        launch(
            patch_embed_dw, (outputs, -(-tiles // per), 1), (g, x, part_w, part_b),
            (*dense, *strides, tiles, per, split0, pitch, *table), constants, config.warps, config.stages,
        )  # fmt: skip
    if splits > 1:
        _sum(partial, dw, db, splits, pitch)
    return dw, db


def _sum(partial, out, tail, count, pitch):
    size = 0 if out is None else out.numel()
    rest = 0 if tail is None else tail.numel()
    grid = (-(-(size + rest) // _SUM), 1, 1)
    launch(patch_sum, grid, (partial, out, tail), (count, size, rest, pitch), (_SUM,), 4, 1)


def _move(tokens, video, grid, patch, channels, order, back):
    """One launch of the move; video is (B, C, T, H, W), or flat for a list."""
    pt, ph, pw = patch
    offset, K = {}, 1
    size = {"c": channels, "t": pt, "h": ph, "w": pw}
    for letter in reversed(order):
        offset[letter] = K
        K *= size[letter]
    itemsize, many = tokens.element_size(), video.dim() == 1
    lines = channels * pt * ph
    turn = K & (K - 1) == 0 and K <= 1024 and pw <= 64
    config = choose("unpatchify", tokens, (tokens.dtype, channels, *patch, order), lambda _: Config((0,), 4, 1))
    Q = config.blocks[0] or min(128, max(16, 8192 // power(lines)))
    if turn:
        Q = max(Q, pw)
    block = lines if turn else min(power(lines), max(16, 8192 // Q))
    if many:
        t = h = w = 0
        nB, nN = 0, tokens.stride(0)
        strides = (0, 0, 0, 0, 1)
        align = divisor(itemsize, *(n * pw for n in grid[2::3]))  # all else is a multiple of a line
        found = tables(tuple(grid), Q, pw)
    else:
        t, h, w = grid
        nB, nN, _ = tokens.stride()
        strides = video.stride()
        align = divisor(itemsize, *strides[:4], w * pw)
        found = ((tokens.shape[0] * t * h * -(-w * pw // Q), _NO_TABLE),)
    constants = (
        channels, pt, ph, pw, *(offset[letter] for letter in "cthw"), strides[4] == 1, align,
        divisor(itemsize, nB, nN), many, back, turn, Q, block,
    )  # fmt: skip
    for tiles, table in found:
        if tiles:
            launch(
                unpatchify, (tiles, -(-lines // block), 1), (tokens, video), (t, h, w, nB, nN, *strides, *table),
                constants, config.warps, config.stages,
            )  # fmt: skip


def unpatchify3d(tokens, grid, patch, channels, order):
    if tokens.dim() == 2:
        y = tokens.new_empty((tokens.numel(),))
    else:
        y = tokens.new_empty((tokens.shape[0], channels, *(g * p for g, p in zip(grid, patch, strict=True))))
    if y.numel():
        _move(tokens, y, grid, patch, channels, order, False)
    return y


def unpatchify3d_backward(grad, tokens, grid, patch, channels, order, needs):
    if grad is None or not needs[0]:
        return _zeros((tokens,), needs)
    out = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    if out.numel():
        _move(out, grad.contiguous() if grad.dim() == 1 else grad, grid, patch, channels, order, True)
    return (out,)


def register() -> None:
    for name in ("patch_embed3d", "unpatchify3d"):
        _register(Impl(name, "triton", lambda x, *_: unfit(x), globals()[name], globals()[f"{name}_backward"]))
