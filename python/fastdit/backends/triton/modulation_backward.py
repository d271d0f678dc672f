"""modulation's gradients on the Triton kernels (kernels/modulation_backward.py).

Bytes: every token tensor once (norm_modulate 3, gate_residual 4, the seam 6), tables and their gradients once, and fp32
partial rows: one per program and table, nothing for tables that change from token to token. Launches: one, one more
for sums that programs share; gate and norm tables with different row indices are walked one after the other.
"""

from __future__ import annotations

import math

import torch

from fastdit.kernels.modulation_backward import PER_TOKEN, UNWANTED, modulation_backward, modulation_sums

from ...packing import row_order
from .._modulation import backwards
from .._tensors import contiguous, empty, rows_contiguous
from ._config import Config, choose, tunable
from ._launch import launch, processors
from ._tiles import alignment
from .modulation_walk import fitting, strides, table, walk

# blocks: CHUNK, ROWS, programs per multiprocessor
tunable(
    "modulation_backward",
    Config((128, 8, 2), 4, 3), Config((256, 4, 2), 4, 3), Config((512, 2, 2), 4, 3), Config((512, 1, 3), 4, 3),
    Config((512, 1, 4), 2, 3), Config((1024, 1, 2), 4, 3), Config((1024, 2, 2), 8, 3), Config((2048, 1, 2), 8, 3),
)  # fmt: skip
_LEAST = 8  # tokens of a program: fewer, and its partial rows would be a traffic of their own
_BLOCK_C = 32  # channels of a program of modulation_sums: a line of memory
_TABLES = ("gate", "shift", "scale")


def _default(channels: int, itemsize: int, held: int, arch: int) -> Config:
    """held: rows that a lane keeps in registers; loads on their way take the rest of them."""
    config = fitting(channels, itemsize, (240 if itemsize == 2 else 200) // held, 2)
    if itemsize == 4 and arch >= 120:  # 99 KB of shared memory hold no third stage of 5,120 channels
        if config.blocks[:2] == (256, 2) and channels % 512 == 0:
            config = config._replace(blocks=(512, 1, 2))
        return config._replace(stages=2)
    if itemsize == 4 and arch == 100 and held > 7 and config.blocks[:2] == (512, 1):
        return Config((1024, 1, 2), 8, 2)  # ptxas gives 4 warps of such a row 128 registers, and spills
    return config


def _incoming(grad):
    return None if grad is None else rows_contiguous(grad)


def _same(a, b) -> bool:
    return a is b or (a is not None and b is not None and a.data_ptr() == b.data_ptr() and a.dtype == b.dtype)


def _gradients(grad_r, grad_h, residual, y, tables, indices, options, needs):
    """See `backwards`."""
    new = [empty(t) if need and t is not None else None for t, need in zip((residual, y, *tables), needs, strict=True)]
    if y.numel() == 0 or (grad_r is None and grad_h is None):
        return [None if g is None else g.zero_() for g in new]
    d_residual, d_y, *sums = new
    if grad_h is None:
        sums = [sums[0], *(None if g is None else g.zero_() for g in sums[1:5]), sums[5]]
        wanted = [sums[0], None, None, None, None, sums[5]]
    else:
        wanted = sums
    gate_index, index = contiguous(indices[0]), contiguous(indices[1])
    args = (_incoming(grad_r), _incoming(grad_h), residual, y, tables)
    by_norm, by_gate = wanted[1] is not None or wanted[2] is not None, wanted[0] is not None
    order = index if by_norm else gate_index if by_gate else None
    later = by_gate and not _same(order, gate_index)
    if later:  # its tokens come in another order
        _walk(args, (gate_index, index), gate_index, options, (None, None), [wanted[0], None, None, None, None, None])
        wanted = [None, *wanted[1:]]
    if not later or d_residual is not None or d_y is not None or any(g is not None for g in wanted):
        _walk(args, (gate_index, index), order, options, (d_residual, d_y), wanted)
    return [d_residual, d_y, *sums]


def _walk(args, indices, order, options, outputs, wanted) -> None:
    """One pass over the tokens, in their own order or in the one that sorts them by `order`, and its sums."""
    grad_r, grad_h, residual, y, (gate, shift, scale, weight, bias, post_weight) = args
    gate_index, index = indices
    norm, eps, weight_offset, gate_act, post_norm, post_eps, _ = options
    channels, tokens = y.shape[-1], y.shape[-2]
    rows, itemsize = y.numel() // channels, y.element_size()
    ways = [table(gate, tokens, gate_index), table(shift, tokens, index), table(scale, tokens, index)]
    sums = sum(g is not None for g in wanted)
    tables = sum(t is not None for t in (gate, scale, weight, post_weight))
    held = sums + tables + (3 if residual is None else 5 if post_norm is None else 7)  # rows that a lane keeps
    config = choose(
        "modulation_backward", y, (y.dtype, channels, held), lambda arch: _default(channels, itemsize, held, arch)
    )
    chunk, at_once, per_processor = config.blocks
    warps = config.warps

    # runs of tokens that have one row of every table, unless that changes with every token
    by = (gate_index, index, index)
    natural = [
        t is not None and i is None and way[2] > 1 and (t is not shift or wanted[1] is not None)
        for t, i, way in zip((gate, shift, scale), by, ways, strict=True)
    ]
    run, together = rows, 0
    if order is None:
        run = math.gcd(*(way[2] for way, of in zip(ways, natural, strict=True) if of)) or (
            tokens if tokens > 64 else rows
        )
        for way, of, grad in zip(ways, natural, wanted, strict=False):
            if of and grad is not None and way[2] != run:
                together = math.gcd(together, way[2] // run)
        if run < 4 * at_once:  # no lanes for rows that the run does not have
            warps, at_once = max(1, warps // at_once), 1
    programs = processors(y) * per_processor
    span, splits, per = walk(rows, run, programs, max(at_once, _LEAST), together)
    programs = -(-rows // span) * splits

    # where each gradient goes: (rows, partial rows of each) -> the gradients that are summed alike
    to, direct = [UNWANTED] * 6, [None] * 3
    shared: dict[tuple[int, int], list[int]] = {}
    for i, grad in enumerate(wanted):
        if grad is None:
            continue
        if i > 2:
            shared.setdefault((1, programs), []).append(i)
        elif order is not None:
            direct[i] = grad
            shared.setdefault((grad.shape[0], 0), []).append(i)
        elif not natural[i]:
            direct[i], to[i] = grad, PER_TOKEN
        elif splits == 1 and ways[i][2] == run:
            direct[i], to[i] = grad, 0
        else:
            shared.setdefault((grad.numel() // channels, ways[i][2] // span * splits), []).append(i)
    blocks = [i for group in shared.values() for i in group]
    for block, i in enumerate(blocks):
        to[i] = block
    slots = programs if order is None else 2 * programs
    part = None
    if blocks:
        part = torch.empty((len(blocks) * slots, channels), dtype=torch.float32, device=y.device)
    sorted_, offsets = None, None
    if order is not None:
        sorted_, offsets = row_order(order, max(t.shape[0] for t, i in zip((gate, shift, scale), by, strict=True)
                                                if t is not None and _same(i, order)))  # fmt: skip

    steps = (*strides(y), *strides(residual), *strides(grad_r), *strides(grad_h))
    launch(
        modulation_backward,
        (programs, 1, 1),
        (
            y, residual, grad_r, grad_h, gate, scale, weight, bias, post_weight, gate_index, index, order, sorted_,
            offsets, *outputs, *direct, part,
        ),
        (rows, tokens, span, splits, per, run, slots, *steps, *ways[0], *ways[2], eps, post_eps),
        (
            float(weight_offset), channels, chunk, at_once, norm == "rms", gate_act == "tanh", post_norm is not None,
            order is not None or tokens % run != 0, natural[0] if order is None else _same(gate_index, order),
            natural[2] if order is None else _same(index, order),
            *to, alignment(itemsize, *steps, *ways[0][:2], *ways[2][:2]), config.stages,
        ),
        warps,
        config.stages,
    )  # fmt: skip
    first = 0
    for (table_rows, partials), group in shared.items():
        longest = partials or programs
        block_k = 8 if longest <= 8 else 32 if longest <= 32 else 128
        outs = [wanted[i] for i in group] + [None] * (6 - len(group))
        launch(
            modulation_sums,
            (table_rows * -(-channels // _BLOCK_C), len(group), 1),
            (part, *outs, None if partials else offsets),
            (first, slots, per, partials),
            (channels, block_k, _BLOCK_C, 2),
            4,
            2,
        )
        first += len(group)


norm_modulate_backward, gate_residual_backward, gate_residual_norm_modulate_backward = backwards(_gradients)
