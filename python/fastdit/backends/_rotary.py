"""The backward of rotary that two backends share: what is wanted of it, and the gradients of tables."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ._tensors import empty, rows_contiguous


def backward(operands: Callable, tables: Callable) -> Callable:
    """The backward of qk_norm_rope.

    operands: (given, q, k, args, grads) fills those gradients of q, k and their parameters that are not None.
    tables: (given, q, k, args, needs) -> those of the ten tables.
    given: the gradients of both outputs, None where nothing depends on one.
    """

    def qk_norm_rope_backward(grad_q, grad_k, q, k, *rest):
        *args, needs = rest
        used = (grad_q is not None and q.numel() > 0, grad_k is not None and k.numel() > 0)
        given = [rows_contiguous(g) if u else None for g, u in zip((grad_q, grad_k), used, strict=True)]
        grads: list = [None] * 6
        for i, (t, need) in enumerate(zip((q, k, *args[:4]), needs, strict=False)):
            if need and t is not None:
                grads[i] = empty(t) if used[i % 2] else torch.zeros_like(t, memory_format=torch.contiguous_format)
        if any(g is not None and u for g, u in zip(grads, used * 3, strict=True)):
            operands(given, q, k, args, grads)
        return (*grads, *(tables(given, q, k, args, needs[6:]) if any(needs[6:]) else [None] * 10))

    return qk_norm_rope_backward


def table_gradients(given, tables, grids, needs, rows: Callable, axis_sums: Callable) -> list:
    """Gradients of cos, sin, k_cos, k_sin and the six of the axes: zeros, and what q and k add, in fp64.

    rows: (side, per_head) -> (B, length, H or 1, R/2) fp32 twice, what every rotated token of q (0) or k (1) adds.
    axis_sums: (side) -> cos and sin of every axis, one after the other.
    """
    found = [torch.zeros(t.shape, dtype=torch.float64, device=t.device) if need and t is not None else None
             for t, need in zip(tables, needs, strict=True)]  # fmt: skip
    for side, grad in enumerate(given):
        pair = 2 if side == 1 and tables[2] is not None else 0
        compact = pair == 0 and grids is not None
        places = range(4, 10) if compact else (pair, pair + 1)
        if grad is None or all(found[p] is None for p in places):
            continue
        added = axis_sums(side) if compact else _dense(tables[pair], side, rows)
        for p, a in zip(places, added, strict=False):
            if found[p] is not None:
                found[p] += a
    return [None if f is None else f.to(t.dtype) for f, t in zip(found, tables, strict=True)]


def rotated_tokens(x, options) -> tuple[int, int]:
    """(samples, rotated tokens of each); options: norm, scope, eps, layout, rope_start, rope_len, precision."""
    start, length = options[4:6]
    return 1 if x.dim() == 3 else x.shape[0], x.shape[-3] - start if length is None else length


def _dense(cos, side: int, rows: Callable):
    shape = list(cos.shape)
    if len(shape) == 2:
        shape.insert(1, 1)
    if len(shape) == 3:
        shape.insert(0, 1)
    shared = [d for d in range(3) if shape[d] == 1]
    return [r.sum(shared, keepdim=True, dtype=torch.float64).view(cos.shape) if shared else r.view(cos.shape)
            for r in rows(side, shape[2] > 1)]  # fmt: skip
