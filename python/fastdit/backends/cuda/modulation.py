"""modulation on the CUDA kernels (csrc/cuda/modulation.cu, modulation_backward.cu): three ops, one launch forward.

Bytes: every token tensor once, tables from L1 until their row changes; backward: fp32 partial rows, two per program and
wanted table. Gate and norm tables with different row indices are walked one after the other.
"""

from __future__ import annotations

from typing import Any

import torch

from ...packing import row_order
from .._modulation import backwards, forwards
from .._modulation_abi import arguments, incoming, same_width, table_grad
from .._tensors import empty
from ..cpu._abi import pointer
from ..registry import Impl, register as _register
from ._launch import ask, launch, unfit

CHANNELS, ANY_CHANNELS = 6144, 4096  # the most: in packs of 16 bytes, and one by one


def _supports(x, *_) -> str | None:
    refusal, C = unfit(x), x.shape[-1]
    if refusal is None and (C > CHANNELS or (C > ANY_CHANNELS and C % 8)):
        refusal = f"holds a row in registers: C up to {CHANNELS}, above {ANY_CHANNELS} a multiple of 8; got C={C}"
    return refusal


def _fit(t):
    """A wide row whose packs do not lie on 16 bytes is copied: single values hold no more than ANY_CHANNELS."""
    if t is None or t.shape[-1] <= ANY_CHANNELS:
        return t
    size = t.element_size()
    aligned = t.data_ptr() % 16 == 0 and all(s * size % 16 == 0 for s in t.stride()[:-1])
    return t if aligned else t.clone(memory_format=torch.contiguous_format)


def _forward(
    residual, y, gate, shift, scale, weight, bias, post_weight, gate_row_index, row_index, norm, *rest
):  # fmt: skip
    r = None if residual is None else empty(residual)
    h = None if norm is None else empty(y)
    if y.numel():
        tensors = [_fit(t) for t in (residual, y, gate, shift, scale, weight, bias, post_weight)]
        gate_index, index, wide = same_width(gate_row_index, row_index)
        given: list[Any] = [*tensors, gate_index, index, wide, norm, *rest]
        shared = arguments(*given)
        op = _name(residual, norm)
        launch("modulation_forward", op, y, (shared, pointer(r), pointer(h)), (*tensors, gate_index, index), (r, h))
    return r, h


def _name(residual, norm) -> str:
    return "norm_modulate" if residual is None else "gate_residual" if norm is None else "gate_residual_norm_modulate"


gate_residual_norm_modulate = _forward
norm_modulate, gate_residual = forwards(_forward)


# ---- backward -----------------------------------------------------------------------------------------
def _gradients(grad_r, grad_h, residual, y, tables, indices, rest, needs):
    """See `backwards`."""
    d_residual = empty(residual) if residual is not None and needs[0] else None
    d_y = empty(y) if needs[1] else None
    made = [table_grad(t, need) for t, need in zip(tables, needs[2:], strict=True)]
    grads = [g for g, _ in made]
    if y.numel() == 0 or (grad_r is None and grad_h is None):
        return [None if g is None else g.zero_() for g in (d_residual, d_y, *grads)]
    wanted = [info for _, info in made]
    if grad_h is None:  # the norm and its tables took no part
        for i in range(1, 5):
            wanted[i] = None
            if grads[i] is not None:
                grads[i].zero_()
    gate_index, index, wide = same_width(*indices)
    grad_r, grad_h, residual, y, *tables = (_fit(t) for t in (grad_r, grad_h, residual, y, *tables))
    grad_r, r_layout = incoming(grad_r)
    grad_h, h_layout = incoming(grad_h)
    given: list[Any] = [residual, y, *tables, gate_index, index, wide, *rest]
    shared = arguments(*given)
    reads = (grad_r, grad_h, residual, y, *tables, gate_index, index)
    op = f"{_name(residual, rest[0])}_backward"
    # gate_index and index as they came: an order is remembered by its tensor
    by_norm = indices[1] if wanted[1] or wanted[2] else None
    by_gate = indices[0] if wanted[0] else None
    order = by_norm if wanted[1] or wanted[2] else by_gate
    later = wanted[0] is not None and by_gate is not order  # its tokens come in another order

    by = (indices[0], indices[1], indices[1])

    def walk(order, d_residual, d_y, wanted):
        args = (*r_layout, *h_layout, pointer(d_residual), pointer(d_y), *wanted)
        tokens = offsets = None
        writes = [g for g, info in zip(grads, wanted, strict=True) if info is not None]
        if order is not None:
            pairs = [(t, i) for t, i in zip(tables, by, strict=False) if t is not None]
            tokens, offsets = row_order(order, max(t.shape[0] for t, i in pairs if i is order))
            for g, i in zip(grads, by, strict=False):
                if i is order and g is not None:
                    g.zero_()  # rows that nobody uses
        programs = ask("modulation_programs", y, shared, *args)
        partial = torch.empty((len(writes), 2 * programs, y.shape[-1]), dtype=torch.float32, device=y.device)
        launch(
            "modulation_backward", op, y, (pointer(tokens), pointer(offsets), pointer(partial), shared, *args),
            (*reads, tokens, offsets), (d_residual, d_y, partial, *writes),
        )  # fmt: skip

    if later:
        walk(by_gate, None, None, [wanted[0], *[None] * 5])
        wanted[0] = None
    if not later or d_residual is not None or d_y is not None or any(wanted):
        walk(order, d_residual, d_y, wanted)
    return [d_residual, d_y, *grads]


norm_modulate_backward, gate_residual_backward, gate_residual_norm_modulate_backward = backwards(_gradients)


def register() -> None:
    for name in ("norm_modulate", "gate_residual", "gate_residual_norm_modulate"):
        _register(Impl(name, "cuda", _supports, globals()[name], globals()[f"{name}_backward"]))
