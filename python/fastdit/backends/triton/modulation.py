"""modulation on the Triton kernels (kernels/modulation.py): three ops, one kernel, one launch.

Bytes: every token tensor once, tables once a run of tokens. norm_modulate 2 tensors, gate_residual 3, the seam 4.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastdit.kernels.modulation import modulation_forward

from ..reference import modulation as reference
from ..registry import Impl, register as _register
from ._config import Config, choose, tunable
from ._launch import launch, processors, unfit

# blocks: lanes of a row, programs per multiprocessor
tunable(
    "modulation_forward",
    Config((16, 8), 4, 2), Config((32, 8), 4, 2), Config((32, 4), 4, 3), Config((64, 4), 4, 2),
    Config((64, 8), 4, 1), Config((128, 4), 4, 2), Config((128, 8), 4, 1), Config((256, 4), 8, 2),
)  # fmt: skip


def row_lanes(channels: int, itemsize: int, held: int) -> int:
    """The fewest lanes, of 16-byte loads, that leave a lane no more than `held` channels of a row."""
    lanes, vector = 16, 16 // itemsize
    while lanes < 1024 and -(-channels // (lanes * vector)) * vector > held:
        lanes *= 2
    return lanes


def _default(channels: int, itemsize: int, seam: bool):
    lanes = row_lanes(channels, itemsize, 32 if seam else 40)
    return lambda arch: Config((lanes, 4), max(4, lanes // 32), 3)


def tiles(config: Config, itemsize: int) -> tuple[int, int]:
    """(CHUNK, ROWS) of a configuration: a row in each group of lanes."""
    lanes = config.blocks[0]
    return lanes * 16 // itemsize, max(1, config.warps * 32 // lanes)


def strides(t: Tensor | None) -> tuple[int, int]:
    """Between samples and between tokens of (B, N, C) or (N, C)."""
    if t is None:
        return 0, 0
    s = t.stride()
    return (s[0] if t.shape[0] > 1 else 0, s[1]) if len(s) == 3 else (0, s[0])


def table(t: Tensor | None, tokens: int, index: Tensor | None) -> tuple[int, int, int]:
    """Strides between samples and between rows of a sample, and the consecutive tokens that share a row."""
    if t is None:
        return 0, 0, 1
    s = t.stride()
    if index is not None:
        return 0, s[0] if t.shape[0] > 1 else 0, 1
    if len(s) == 3:
        return s[0], s[1] if t.shape[1] > 1 else 0, tokens // t.shape[1]
    return s[0] if t.shape[0] > 1 else 0, 0, tokens


def align(x: Tensor, *steps: int) -> int:
    """ALIGN: 16 bytes' worth of channels where every stride is a multiple of it."""
    vector = 16 // x.element_size()
    return vector if math.gcd(*steps) % vector == 0 else 1


def walk(rows: int, run: int, programs: int, least: int) -> tuple[int, int, int]:
    """(span, splits, per): how `programs` share the tokens. Nobody's tokens begin in the middle of a foreign run.

    A long run is split among `splits` programs, `per` >= least tokens each; several short ones go to one program.
    """
    runs = rows // run
    if runs >= programs:
        span = runs // programs * run
        return span, 1, span
    splits = max(1, min(-(-programs // runs), run // least))
    per = -(-run // splits)
    per = -(-per // least) * least
    return run, -(-run // per), per


def _flat(index: Tensor | None) -> Tensor | None:
    return None if index is None else index.contiguous()


def _forward(
    residual, y, gate, shift, scale, weight, bias, post_weight, gate_index, index,
    norm, eps, weight_offset, gate_act, post_norm, post_eps, precision,
):  # fmt: skip
    channels = y.shape[-1]
    tokens = y.shape[-2]
    rows = y.numel() // channels
    r = None if residual is None else torch.empty_like(residual, memory_format=torch.contiguous_format)
    h = None if norm is None else torch.empty_like(y, memory_format=torch.contiguous_format)
    if rows == 0:
        return r, h
    itemsize = y.element_size()
    config = choose(
        "modulation_forward", y, (y.dtype, channels, residual is not None),
        _default(channels, itemsize, residual is not None),
    )  # fmt: skip
    chunk, at_once = tiles(config, itemsize)
    gates, shifts, scales = table(gate, tokens, gate_index), table(shift, tokens, index), table(scale, tokens, index)
    steps = (*strides(y), *strides(residual))
    run = rows
    gather = gate_index is not None or index is not None
    if not gather:
        run = math.gcd(*(of[2] for t, of in ((gate, gates), (shift, shifts), (scale, scales)) if t is not None)) or rows
        if run < 4 * at_once:
            run, gather = rows, True
    span, splits, per = walk(rows, run, processors(y) * config.blocks[1], at_once)
    launch(
        modulation_forward,
        (-(-rows // span) * splits, 1, 1),
        (y, residual, r, h, gate, shift, scale, weight, bias, post_weight, _flat(gate_index), _flat(index)),
        (rows, tokens, span, splits, per, run, *steps, *gates, *shifts, *scales, eps, post_eps),
        (
            float(weight_offset), channels, chunk, at_once, norm == "rms", gate_act == "tanh", post_norm is not None,
            precision == "native", gather, align(y, *steps, *gates[:2], *shifts[:2], *scales[:2]), config.stages,
        ),
        config.warps,
        config.stages,
    )  # fmt: skip
    return r, h


def norm_modulate(x, shift, scale, weight, bias, row_index, norm, eps, weight_offset, precision):
    return _forward(
        None, x, None, shift, scale, weight, bias, None, None, row_index,
        norm, eps, weight_offset, None, None, 0.0, precision,
    )[1]  # fmt: skip


def gate_residual(residual, y, gate, post_norm_weight, row_index, gate_act, post_norm, post_norm_eps, precision):
    return _forward(
        residual, y, gate, None, None, None, None, post_norm_weight, row_index, None,
        None, 0.0, 0.0, gate_act, post_norm, post_norm_eps, precision,
    )[0]  # fmt: skip


gate_residual_norm_modulate = _forward


def register() -> None:
    for name in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        backward = getattr(reference, f"{name}_backward")
        _register(Impl(name, "triton", lambda x, *_: unfit(x), globals()[name], backward, backward_backend="reference"))
