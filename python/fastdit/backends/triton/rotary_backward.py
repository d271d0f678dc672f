"""Gradients of rotary on the Triton kernels (kernels/rotary_backward.py).

Launches: one for dq, dk and the partial sums of all parameters; one more that adds these. Gradients of tables, which
few models learn: one pass per operand, then torch's sums in fp64, or a launch for the tables of the axes.
Bytes: 3 * N * (Hq + Hk) * D * itemsize and one reading of the table for each of q and k; the partial sums, a row of
fp32 per program and parameter, stay in L2. Bitwise the same in every run.
"""

from __future__ import annotations

import torch

from fastdit.kernels import rotary_backward as kernels
from fastdit.kernels.rotary import Law
from fastdit.kernels.rotary_table import Side

from .._rotary import backward, table_gradients
from ._config import Config, tunable
from ._launch import launch, processors
from ._tiles import alignment, power
from .rotary import (
    Facts,
    axes,
    axes_tensors,
    configuration,
    constants,
    counted,
    described,
    head_of,
    strides,
    table_tensors,
    tile,
)


def _tile(arch, dtype, D, Hq, Hk, hidden, halves) -> Config:
    """The forward's; a row that stays in registers with its gradient and its sums takes more threads."""
    if not hidden:
        found = tile(dtype, D, Hq, Hk, False, halves, 32)
        tight = arch >= 90 and not halves and dtype != torch.float32  # 4 or 8 bytes spilled at 72 to 96 registers
        return found._replace(warps=min(2 * found.warps, 16)) if tight else found
    (BT, HB, most), warps, stages = tile(dtype, D, Hq, Hk, True, halves)
    heads = max(Hq, Hk)
    row = -(-heads // HB) * HB * BT * 2 * power((D + 1) // 2)
    while warps < 16 and row > 32 * warps * (16 if dtype == torch.float32 else 24):
        warps *= 2
        if heads % (2 * HB) == 0:
            HB *= 2
    return Config((BT, HB, most), warps, stages)


tunable(
    "qk_norm_rope_backward",
    *(Config((BT, HB, 12), warps, 1) for BT, HB, warps in ((1, 4, 2), (1, 8, 4), (1, 16, 8), (2, 4, 4), (2, 8, 8))),
    *(Config((BT, HB, 6), warps, 1) for BT, HB, warps in ((1, 8, 2), (1, 16, 4), (2, 8, 4))),
)


def _operands(given, q, k, args, grads):
    """Fills those gradients of q, k and the parameters that are not None."""
    affine, others = args[:4], args[4:]
    tables = table_tensors(q, *others[:11])
    k_cos = None if others[2] is None else tables[2]
    facts, q_steps, k_steps, axes_numbers, last = described(q, k, tables[0], k_cos, others[4:11], *others[11:])
    batch, q_tokens, k_tokens = counted(q, k)
    config = configuration("qk_norm_rope_backward", q, facts, _tile)
    mine = [[g for g in grads[i::2]] if grad is not None else [None] * 3 for i, grad in enumerate(given)]
    sides = [any(g is not None for g in of) for of in mine]
    widths = [H * facts.D if facts.hidden else facts.D for H in (facts.Hq, facts.Hk)]
    fixed, groups = constants(facts, config, False)
    BT = fixed[0]
    most = (2 if facts.hidden else 8) * processors(q)  # programs that sum: each leaves a row to add
    programs, begins, total = [], [], 0
    for side, tokens, (_, w, b), width in zip(sides, (q_tokens, k_tokens), mine, widths, strict=True):
        tiles = -(-batch * tokens // BT) if side else 0
        if w is not None or b is not None:
            tiles = min(tiles, most)
        programs.append(tiles)
        for t in (w, b):
            begins.append(total)
            if t is not None:
                total += -(-tiles * groups * width // 4) * 4
    sums = torch.empty(total, dtype=torch.float32, device=q.device) if total else None
    (dq, q_w, q_b), (dk, k_w, k_b) = mine
    wanted = kernels.Wanted(*(t is not None for t in (q_w, q_b, k_w, k_b)))
    grad_q, grad_k = (g if side else None for g, side in zip(given, sides, strict=True))
    steps = [
        *strides(q), *strides(k),
        *(s for t in (grad_q, grad_k, dq, dk) for s in ((0, 0, 0) if t is None else strides(t))),
    ]  # fmt: skip
    launch(
        kernels.qk_norm_rope_backward,
        (sum(programs), groups, 1),
        (q, k, grad_q, grad_k, dq, dk, *affine[:2], *tables, sums),
        (batch, q_tokens, k_tokens, *programs, *steps, *q_steps, *k_steps, *axes_numbers, *last, *begins),
        (*fixed, alignment(q.element_size(), *steps), alignment(4, *q_steps[:3], *k_steps[:3]), wanted),
        config.warps,
        config.stages,
    )
    if sums is not None:
        launch(
            kernels.sum_partials,
            (-(-max(widths) // 32), 4, 1),
            (sums, q_w, q_b, k_w, k_b),
            (*(n * groups for n in programs), *widths, *begins),
            (256, 32),
            8,
        )


# ---- tables ---------------------------------------------------------------------------------------------------
def _tables(given, q, k, args, needs):
    affine, tables, grids, options = args[:4], args[4:14], args[14], args[15:]
    sides = [(x, grad, *affine[i::2]) for i, (x, grad) in enumerate(zip((q, k), given, strict=True))]

    def rows(side: int, per_head: bool):
        cos = tables[2] if side == 1 and tables[2] is not None else tables[0]
        pairs, layout = cos.shape[-1], options[3]
        sections = (pairs // 3,) * 3 if layout == "axis_half" else (pairs,)
        x, grad, weight, bias = sides[side]
        return _rows(x, grad, weight, bias, sections, per_head, *options)[:2]

    def axis_sums(side: int):
        x, grad, weight, bias = sides[side]
        return _axes_gradients(x, grad, weight, bias, tables[4:], grids, options)

    return table_gradients(given, tables, grids, needs, rows, axis_sums)


def _rows(x, grad, weight, bias, sections, per_head: bool, norm, scope, eps, layout, rope_start, rope_len, precision):
    """(B, length, H or 1, R/2) fp32 twice: what every rotated token adds to its row of cos and of sin; and the Head."""
    x4, g4 = (x.unsqueeze(0), grad.unsqueeze(0)) if x.dim() == 3 else (x, grad)
    B, N, H, D = x4.shape
    length = N - rope_start if rope_len is None else rope_len
    facts = Facts(x.dtype, D, H, H, layout, sections, (), (), norm, scope == "hidden", False)
    head = head_of(facts)
    (BT, HB, _), warps, _ = tile(x.dtype, D, H, 0, True, head.LAYOUT != "interleaved")
    shape = (B, length, H if per_head else 1, sum(sections))
    cos, sin = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in "cs")
    steps = (*strides(x4), *strides(g4))
    if B * length:
        launch(
            kernels.table_gradients,
            (-(-B * length // BT), 1, 1),
            (x4, g4, weight, bias, cos, sin),
            (B, rope_start, length, *steps, eps),
            (BT, HB, head, Side(H, -(-H // HB), "dense", per_head, True, False), Law(norm, facts.hidden, False),
             alignment(x.element_size(), *steps)),
            warps,
            1,
        )  # fmt: skip
    return cos, sin, head


def _axes_gradients(x, grad, weight, bias, tables, grids, options):
    widths, _, (*sizes, segments, steps) = axes(tables, grids, x.dtype)
    *_, grids, ends = axes_tensors(tables, grids, x.dim() == 3)
    cos, sin, head = _rows(x, grad, weight, bias, widths, False, *options)
    cells = [size * width for size, width in zip(sizes, widths, strict=False)]
    out = torch.zeros(2 * sum(cells), dtype=torch.float64, device=x.device)
    B, length = cos.shape[:2]
    if B * length:
        launch(
            kernels.axes_gradients,
            (max(sizes), len(widths), 1),
            (cos, sin, grids, ends, out),
            (B, length, *sizes, segments, steps),
            (len(widths), head, 32, power(max(widths))),
        )
    parts = out.split([c for c in cells for _ in "cs"])
    return [part.view(t.shape) for part, t in zip(parts, tables, strict=False)]


qk_norm_rope_backward = backward(_operands, _tables)
