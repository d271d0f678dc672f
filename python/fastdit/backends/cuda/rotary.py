"""rotary on the CUDA kernels (csrc/cuda/rotary.cu): one launch for q and k, in place or not.

Bytes: 2 * N * (Hq + Hk) * D * itemsize and one reading of the table.
"""

from __future__ import annotations

import torch

from .._rotary_abi import arguments
from .._tensors import empty, rows_contiguous
from ..cpu._abi import pointer
from ..reference import rotary as reference
from ..registry import Impl, register as _register
from ._launch import ask, launch, unfit

HEAD = 512  # channels of a head at most: eight pairs in each thread of a warp
WARPS = 16  # of a block, which under scope "hidden" holds all heads of a token


def _supports(q, k, *args) -> str | None:
    refusal, D = unfit(q), q.shape[-1]
    if refusal is not None:
        return refusal
    if D > HEAD:
        return f"holds a head in the registers of a warp: D up to {HEAD}; got D={D}"
    lanes = 1
    while 16 * lanes < D:
        lanes *= 2
    most, heads = WARPS * 32 // lanes, max(q.shape[-2], k.shape[-2])
    if args[16] == "hidden" and heads > most:
        return f'holds a token in registers: up to {most} heads of D={D} under scope="hidden"; got {heads}'
    for t in args[:14]:
        if t is not None and t.dtype == torch.float64:
            return "has no kernel for parameters or tables in float64"
    return None


def _forward(q_out, k_out, q, k, *args):
    shared, kept = arguments(q_out.data_ptr(), k_out.data_ptr(), q, k, *args)
    launch("qk_norm_rope_forward", "qk_norm_rope", q, (shared,), (q, k, *args[:8], *kept), (q_out, k_out))


def qk_norm_rope(q, k, *args):
    q_out, k_out = empty(q), empty(k)
    _forward(q_out, k_out, q, k, *args)
    return q_out, k_out


def qk_norm_rope_(q, k, *args):
    _forward(q, k, q, k, *args)


# ---- backward -----------------------------------------------------------------------------------------
def qk_norm_rope_backward(grad_q, grad_k, q, k, *rest):
    *args, needs = rest
    affine = args[:4]
    used = (grad_q is not None and q.numel() > 0, grad_k is not None and k.numel() > 0)
    grads: list = [None] * 6
    for i, (t, need) in enumerate(zip((q, k, *affine), needs, strict=False)):
        if need and t is not None:
            grads[i] = empty(t) if used[i % 2] else torch.zeros_like(t, memory_format=torch.contiguous_format)
    given = [rows_contiguous(g) if u else None for g, u in zip((grad_q, grad_k), used, strict=True)]
    if any(g is not None and u for g, u in zip(grads, used * 3, strict=True)):
        _operands(given, q, k, args, grads)
    return (*grads, *[None] * 10)


def _operands(given, q, k, args, grads):
    """Fills the gradients of q, k and the parameters that are not None, of the sides that `given` names."""
    mine = [[None] * 3 if g is None else grads[i::2] for i, g in enumerate(given)]
    shared, kept = arguments(pointer(mine[0][0]), pointer(mine[1][0]), q, k, *args)
    sides = [
        None if g is None else (g.data_ptr(), g.stride(), pointer(weight), pointer(bias), None)
        for g, (_, weight, bias) in zip(given, mine, strict=True)
    ]
    partial = torch.empty(ask("qk_norm_rope_partials", q, shared, *sides), dtype=torch.float32, device=q.device)
    reads = (*given, q, k, *args[:8], *kept)
    launch(
        "qk_norm_rope_backward", "qk_norm_rope_backward", q, (partial.data_ptr(), shared, *sides),
        reads, (partial, *mine[0], *mine[1]),
    )  # fmt: skip


def register() -> None:
    _register(Impl("qk_norm_rope", "cuda", _supports, qk_norm_rope, qk_norm_rope_backward))
    _register(Impl("qk_norm_rope_", "cuda", _supports, qk_norm_rope_, reference.no_backward))
