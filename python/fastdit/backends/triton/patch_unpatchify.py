"""unpatchify3d and its gradient on the Triton kernel (kernels/patch_unpatchify.py): one launch each; of a list, one for
every eight videos. 2*N*K*itemsize bytes, no FLOPs."""

from __future__ import annotations

from functools import lru_cache

from fastdit.kernels.patch_unpatchify import unpatchify

from .._facts import kept
from .._patch import moves
from ._config import Config, choose, tunable
from ._launch import Launch
from ._tiles import power
from .patch_plan import NO_TABLE, divisor, tables

tunable("unpatchify", *(Config((q,), warps, 1) for q in (32, 64, 128, 256) for warps in (4, 8)))


def _default(arch: int) -> Config:
    return Config((0,), 4, 1)  # 0: as many pixels as the lines leave room for


@lru_cache(maxsize=256)
def _inside(channels: int, pt: int, ph: int, pw: int, order: str) -> tuple[tuple[int, ...], int, bool]:
    """Strides of c, t, h, w inside a token, the lines that a row of tokens covers, and whether tiles can be turned."""
    offset, K = {}, 1
    size = {"c": channels, "t": pt, "h": ph, "w": pw}
    for letter in reversed(order):
        offset[letter] = K
        K *= size[letter]
    turn = K & (K - 1) == 0 and K <= 1024 and pw <= 64
    return tuple(offset[letter] for letter in "cthw"), channels * pt * ph, turn


@kept
def _plan(tokens, video, grid, patch, channels, order, back) -> list[Launch]:
    """The launches of the move; video is (B, C, T, H, W), or flat for a list."""
    pt, ph, pw = patch
    itemsize, many = tokens.element_size(), video.dim() == 1
    offsets, lines, turn = _inside(channels, pt, ph, pw, order)
    config = choose("unpatchify", tokens, (tokens.dtype, channels, pt, ph, pw, order), _default)
    Q = config.blocks[0] or min(128, max(16, 8192 // power(lines)))
    if turn:
        Q = max(Q, pw)
    block = lines if turn else min(power(lines), max(16, 8192 // Q))
    if many:
        t = h = w = 0
        nB, nN = 0, tokens.stride(0)
        strides = (0, 0, 0, 0, 1)
        align = divisor(itemsize, *(n * pw for n in grid[2::3]))  # all else is a multiple of a line
        found = tables(grid, Q, pw)
    else:
        t, h, w = grid
        nB, nN, _ = tokens.stride()
        strides = video.stride()
        align = divisor(itemsize, *strides[:4], w * pw)
        found = ((tokens.shape[0] * t * h * -(-w * pw // Q), NO_TABLE),)
    constants = (
        channels, pt, ph, pw, *offsets, strides[4] == 1, align,
        divisor(itemsize, nB, nN), many, back, turn, Q, block,
    )  # fmt: skip
    return [
        Launch(
            unpatchify, (tiles, -(-lines // block), 1), (t, h, w, nB, nN, *strides, *table), constants, config.warps,
            config.stages,
        )
        for tiles, table in found if tiles
    ]  # fmt: skip


def _move(tokens, video, grid, patch, channels, order, back) -> None:
    for launch in _plan(tokens, video, tuple(grid), tuple(patch), channels, order, back):
        launch(tokens, video)


unpatchify3d, unpatchify3d_backward = moves(_move)
