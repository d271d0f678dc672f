"""patch_embed3d on the Triton kernels (kernels/patch.py), and the registration of the family.

One launch, of a list one for every eight videos. (N*K + N*D + D*K) * itemsize bytes, 2*N*D*K FLOPs.
"""

from __future__ import annotations

import math

from fastdit.kernels.patch import patch_embed

from .._facts import kept
from .._patch import without_values
from .._tensors import contiguous
from ..registry import Impl, register as _register
from ._config import Config, choose, tunable
from ._launch import Launch, processors, unfit
from .patch_backward import patch_embed3d_backward
from .patch_plan import dense as _dense, divisor, launches, layout, precision, step, wide as _wide
from .patch_unpatchify import unpatchify3d, unpatchify3d_backward

# blocks: tokens, outputs. The step along K follows from K.
tunable(
    "patch_embed",
    Config((128, 128), 4, 3), Config((128, 128), 8, 3), Config((128, 256), 8, 3), Config((64, 256), 4, 3),
    Config((64, 128), 4, 3), Config((64, 64), 4, 3), Config((256, 64), 8, 3), Config((128, 64), 4, 4),
)  # fmt: skip

# bytes of shared memory that a block may have
_SHARED = {80: 166_912, 90: 232_448, 100: 232_448, 120: 101_376}


def _embed_default(K: int, wide: bool):
    """The widest tile of outputs whose stages fit beside the patches."""

    def default(arch: int) -> Config:
        steps = -(-K // step(K, wide))
        if wide:
            return Config((64, 64), 4 if steps <= 3 else 8, 2)
        held = steps if steps <= 3 else 1
        # rows of K values that are no multiple of 16 bytes come one by one, each with an address of its own
        for columns, stages in ((128, 3), (128, 2), (64, 3))[0 if K % 8 == 0 else 2 :]:
            if 2 * held * step(K, wide) * (128 + stages * columns) <= _SHARED.get(arch, 65_536) - 4096:
                return Config((128 if arch != 100 or K % 8 == 0 else 64, columns), 8, stages)
        return Config((128, 64), 8, 2)

    return default


@kept
def _plan(x, weight, pos, grids, multiplied) -> tuple[tuple[int, ...], list[Launch] | None]:
    """The shape of the tokens and the launches; None where a token has no values."""
    D, C, pt, ph, pw = weight.shape
    many, dense = x.dim() == 1, _dense(x, weight)
    if many:
        shape: tuple[int, ...] = (sum(math.prod(grids[i : i + 3]) for i in range(0, len(grids), 3)), D)
    else:
        shape = (x.shape[0], dense[1], D)
    if math.prod(shape) == 0:
        return shape, []
    K = C * pt * ph * pw
    if K == 0:
        return shape, None
    wide = _wide(weight)
    config = choose("patch_embed", x, (x.dtype, weight.dtype, K, D), _embed_default(K, wide))
    BM, BN = config.blocks
    strides, unit, align = layout(x)
    pB, pN, palign = 0, 0, 1
    if pos is not None:
        pB, pN = pos.stride()[:2] if pos.dim() == 3 else (0, pos.stride(0))
        palign = divisor(pos.element_size(), pB, pN)
    columns = -(-D // BN)
    constants = (
        C, D, pt, ph, pw, unit, align, palign, weight.is_contiguous(), many, BM, BN, step(K, wide),
        multiplied,
    )  # fmt: skip
    found = []
    for tiles, table in launches(x, grids, dense, BM):
        if tiles == 0:
            continue
        # enough programs for the card; beyond that a program keeps its patches for several tiles of outputs
        parts = min(columns, -(-4 * processors(x) // tiles))
        per = -(-columns // parts)
        parts = -(-columns // per)
        numbers = (*dense, *strides, *weight.stride(), pB, pN, per, parts, *table)
        found.append(Launch(patch_embed, (tiles * parts, 1, 1), numbers, constants, config.warps, config.stages))
    return shape, found


def patch_embed3d(x, weight, bias, pos, grids):
    shape, launches = _plan(x, weight, pos, tuple(grids), precision(x, weight))
    y = x.new_empty(shape)
    if launches is None:
        return without_values(y, bias, pos)
    bias = contiguous(bias)
    for launch in launches:
        launch(x, weight, bias, pos, y)
    return y


def register() -> None:
    found = (patch_embed3d, patch_embed3d_backward), (unpatchify3d, unpatchify3d_backward)
    for forward, backward in found:
        _register(Impl(forward.__name__, "triton", lambda x, *_: unfit(x), forward, backward))
