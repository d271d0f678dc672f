"""modulation on the Triton kernels (kernels/modulation.py): three ops, one kernel, one launch.

Bytes: every token tensor once, tables once a run of tokens. norm_modulate 2 tensors, gate_residual 3, the seam 4.
"""

from __future__ import annotations

import math

from fastdit.kernels.modulation import modulation_forward

from .._facts import kept
from .._modulation import forwards
from .._tensors import contiguous, empty
from ..registry import Impl, register as _register
from ._config import Config, choose, tunable
from ._launch import Launch, processors, unfit
from ._tiles import alignment
from .modulation_backward import gate_residual_backward, gate_residual_norm_modulate_backward, norm_modulate_backward
from .modulation_walk import fitting, strides, table, walk

# blocks: CHUNK, ROWS, programs per multiprocessor
tunable(
    "modulation_forward",
    Config((128, 8, 4), 4, 3), Config((256, 4, 4), 4, 3), Config((256, 4, 8), 4, 1), Config((512, 2, 4), 4, 3),
    Config((512, 2, 8), 4, 1), Config((1024, 1, 4), 4, 3), Config((1024, 1, 8), 4, 1), Config((2048, 1, 4), 8, 3),
)  # fmt: skip


def _default(arch: int, channels: int, itemsize: int, alone: bool) -> Config:
    config = fitting(channels, itemsize, 40 if alone else 32, 4)
    if arch == 100 and alone and itemsize == 2 and config.blocks[:2] == (512, 2):  # 8 bytes spilled at 72 registers
        return Config((1024, 1, 4), 4, 3)
    return config


@kept
def _plan(
    y, residual, gate, shift, scale, weight, bias, post_weight, gate_index, index,
    norm, eps, weight_offset, gate_act, post_norm, post_eps, precision,
) -> Launch | None:  # fmt: skip
    channels = y.shape[-1]
    tokens = y.shape[-2]
    rows = y.numel() // channels
    if rows == 0:
        return None
    itemsize = y.element_size()
    config = choose(
        "modulation_forward", y, (y.dtype, channels, residual is not None),
        lambda arch: _default(arch, channels, itemsize, residual is None),
    )  # fmt: skip
    chunk, at_once, per_processor = config.blocks
    gates, shifts, scales = table(gate, tokens, gate_index), table(shift, tokens, index), table(scale, tokens, index)
    steps = (*strides(y), *strides(residual))
    run = rows
    gather = gate_index is not None or index is not None
    if not gather:
        run = (
            math.gcd(*(of[2] for t, of in ((gate, gates), (shift, shifts), (scale, scales)) if t is not None)) or tokens
        )
        if run < 4 * at_once:
            run, gather = rows, True
    span, splits, per = walk(rows, run, processors(y) * per_processor, at_once)
    return Launch(
        modulation_forward,
        (-(-rows // span) * splits, 1, 1),
        (rows, tokens, span, splits, per, run, *steps, *gates, *shifts, *scales, eps, post_eps),
        (
            float(weight_offset), channels, chunk, at_once, norm == "rms", gate_act == "tanh", post_norm is not None,
            precision == "native", gather, alignment(itemsize, *steps, *gates[:2], *shifts[:2], *scales[:2]),
            config.stages,
        ),
        config.warps,
        config.stages,
    )  # fmt: skip


def _forward(
    residual, y, gate, shift, scale, weight, bias, post_weight, gate_index, index,
    norm, eps, weight_offset, gate_act, post_norm, post_eps, precision,
):  # fmt: skip
    r = None if residual is None else empty(residual)
    h = None if norm is None else empty(y)
    plan = _plan(
        y, residual, gate, shift, scale, weight, bias, post_weight, gate_index, index,
        norm, eps, weight_offset, gate_act, post_norm, post_eps, precision,
    )  # fmt: skip
    if plan is not None:
        index = contiguous(index)
        plan(y, residual, r, h, gate, shift, scale, weight, bias, post_weight, contiguous(gate_index), index)
    return r, h


gate_residual_norm_modulate = _forward
norm_modulate, gate_residual = forwards(_forward)


def register() -> None:
    for op, forward, backward in (
        ("norm_modulate", norm_modulate, norm_modulate_backward),
        ("gate_residual", gate_residual, gate_residual_backward),
        ("gate_residual_norm_modulate", gate_residual_norm_modulate, gate_residual_norm_modulate_backward),
    ):
        _register(Impl(op, "triton", lambda x, *_: unfit(x), forward, backward))
