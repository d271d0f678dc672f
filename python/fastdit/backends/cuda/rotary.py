"""rotary on the CUDA kernels (csrc/cuda/rotary.cu, rotary_backward.cu, rotary_table.cu).

Launches: one for q and k, in place or not; backward: one for dq, dk and weights, one over dy for biases, one that adds
the partial rows. Gradients of tables: one per side, then torch's sums in fp64 or a launch for the tables of the axes.
Bytes: 2 * N * (Hq + Hk) * D * itemsize and one reading of the table; backward 3 for 2, and a row of fp32 per block.
"""

from __future__ import annotations

import torch

from .. import _rotary_abi as abi
from .._rotary import backward, rotated_tokens, table_gradients
from .._tensors import empty
from ..cpu._abi import pointer
from ..reference import rotary as reference
from ..registry import Impl, register as _register
from ._launch import ask, launch, unfit

HEAD = 512  # channels of a head at most: eight pairs in each thread of a warp
_BACKWARD = "qk_norm_rope_backward"
WARPS = 12  # of a block, which under scope "hidden" holds all heads of a token


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
    shared, kept = abi.arguments(q_out.data_ptr(), k_out.data_ptr(), q, k, *args)
    launch("qk_norm_rope_forward", "qk_norm_rope", q, (shared,), (q, k, *args[:8], *kept), (q_out, k_out))


def qk_norm_rope(q, k, *args):
    q_out, k_out = empty(q), empty(k)
    _forward(q_out, k_out, q, k, *args)
    return q_out, k_out


def qk_norm_rope_(q, k, *args):
    _forward(q, k, q, k, *args)


# ---- backward -----------------------------------------------------------------------------------------
def _side(grad, weight=None, bias=None):
    return None if grad is None else (grad.data_ptr(), grad.stride(), pointer(weight), pointer(bias), None)


def _operands(given, q, k, args, grads):
    """Fills the gradients of q, k and the parameters that are not None, of the sides that `given` names."""
    mine = [[None] * 3 if g is None else grads[i::2] for i, g in enumerate(given)]
    shared, kept = abi.arguments(pointer(mine[0][0]), pointer(mine[1][0]), q, k, *args)
    sides = [_side(g, *of[1:]) for g, of in zip(given, mine, strict=True)]
    partial = torch.empty(ask("qk_norm_rope_partials", q, shared, *sides), dtype=torch.float32, device=q.device)
    launch(
        "qk_norm_rope_backward", _BACKWARD, q, (partial.data_ptr(), shared, *sides),
        (*given, q, k, *args[:8], *kept), (partial, *mine[0], *mine[1]),
    )  # fmt: skip


def _tables(given, q, k, args, needs):
    """Gradients of the tables, in fp64: a launch for the rows of each side, then torch's sums or those of the axes."""
    axes, grids, options = args[8:14], args[14], args[15:]
    shared, kept = abi.arguments(0, 0, q, k, *args)
    tensors = (*given, q, k, *args[:8], *kept)

    def rows(side, per_head):
        x = (q, k)[side]
        batch, length = rotated_tokens(x, options)
        shape = (batch, length, x.shape[-2] if per_head else 1, shared[14])
        cos, sin = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in "cs")
        sides = [_side(g) if i == side else None for i, g in enumerate(given)]
        arguments = (shared, *sides, cos.data_ptr(), sin.data_ptr(), length, per_head)
        launch("rotary_table_rows", _BACKWARD, x, arguments, tensors, (cos, sin))
        return cos, sin

    def axis_sums(side):
        found = rows(side, False)
        sums = [None if t is None else torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in axes]
        compact, index = abi.axes(sums, grids, q.dim() == 3)
        arguments = (shared, compact, *(t.data_ptr() for t in found), found[0].shape[1])
        launch("rotary_axes_sums", _BACKWARD, q, arguments, (*found, *kept, index[-1]), sums)
        return sums

    return table_gradients(given, args[4:14], grids, needs, rows, axis_sums)


qk_norm_rope_backward = backward(_operands, _tables)


def register() -> None:
    _register(Impl("qk_norm_rope", "cuda", _supports, qk_norm_rope, qk_norm_rope_backward))
    _register(Impl("qk_norm_rope_", "cuda", _supports, qk_norm_rope_, reference.no_backward))
