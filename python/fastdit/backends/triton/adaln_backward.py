"""Gradients of the fused GEMMs: the vendor's GEMMs between the backward kernels of the families.

h = norm_modulate(x) is made again where the weight's gradient asks for it (2E bytes for E less kept memory, beside
2 * rows * C * F FLOPs); what the epilogues need (`kept`) was stored by the forward. With d the gradient of h @ W^T:

    epilogue's backward -> d;   dW = d^T @ h;   dbias = sum of d's rows;   dh = d @ W -> backward of norm_modulate

Launches: 1 + 1 + 1 + 1 + 2 and the norm's; no atomics, the same bits every time.
"""

from __future__ import annotations

import torch

from .. import registry
from ._launch import matmul


def _part(op, args):
    """This backend's implementation of another family's op, or else the best one."""
    own = registry.find(op, "triton")
    return own if own is not None and own.supports(*args) is None else registry.select(op, args, None)


def _absent(tensors, needs):
    return tuple(
        torch.zeros_like(t, memory_format=torch.contiguous_format) if need and t is not None else None
        for t, need in zip(tensors, needs, strict=True)
    )


def _linear(d, weight, bias, needs, input_):
    """(dbias, dW, dh): d (rows, F); input_ () -> (rows, K), called only for the weight's gradient."""
    need_input, need_weight, need_bias = needs
    d_bias = d.sum(0) if need_bias and bias is not None else None
    d_weight = matmul(d.t(), input_()) if need_weight else None
    return matmul(d, weight) if need_input else None, d_weight, d_bias


def _through_norm(d, x, shift, scale, norm_weight, norm_bias, row_index, weight, bias, options, needs):
    """From the gradient d of the projection to those of x, shift, scale, norm_weight, norm_bias, weight and bias."""
    args = (x, shift, scale, norm_weight, norm_bias, row_index, *options)
    part = _part("norm_modulate", args)
    d = d.reshape(-1, weight.shape[0])
    d_h, d_weight, d_bias = _linear(
        d, weight, bias, (any(needs[:5]), *needs[5:7]), lambda: part.forward(*args).view(-1, weight.shape[1])
    )
    tables = (None,) * 5
    if d_h is not None:
        tables = part.backward(d_h.view(x.shape), *args, list(needs[:5]))
    return (*tables, d_weight, d_bias)


def norm_modulate_linear(
    grad, _, x, shift, scale, norm_weight, norm_bias, row_index, weight, bias, norm, eps, weight_offset, act,
    precision, keep, kept, needs,
):  # fmt: skip
    if grad is None or grad.numel() == 0:
        return _absent((x, shift, scale, norm_weight, norm_bias, weight, bias), needs)
    if act is not None:
        if not keep:
            raise RuntimeError("norm_modulate_linear: no gradient without keep; got keep=False, expected True")
        grad = _part("activation", (kept, None, act)).backward(grad, kept, None, act, [True, False])[0]
    options = (norm, eps, weight_offset, precision)
    return _through_norm(
        grad, x, shift, scale, norm_weight, norm_bias, row_index, weight, bias, options, needs
    )  # fmt: skip


def norm_modulate_qkv(
    grad, _, x, shift, scale, norm_weight, norm_bias, row_index, weight, bias, q_weight, k_weight, q_bias, k_bias,
    cos, sin, heads, kv_heads, norm, eps, weight_offset, qk_norm, qk_eps, layout, rope_start, rope_len, precision,
    keep, kept, needs,
):  # fmt: skip
    vectors = (q_weight, k_weight, q_bias, k_bias, cos, sin)
    if grad is None or grad.numel() == 0:
        return _absent((x, shift, scale, norm_weight, norm_bias, weight, bias, *vectors), needs)
    given: tuple = (None,) * 6
    if qk_norm is not None or cos is not None:
        total = heads + 2 * kv_heads
        d_q, d_k, d_v = grad.unflatten(-1, (total, -1)).split([heads, kv_heads, kv_heads], dim=-2)
        # without kept nothing reads their values: a rotation's gradient needs the angles alone
        q, k = (d_q, d_k) if not keep else kept.unflatten(-1, (heads + kv_heads, -1)).split([heads, kv_heads], dim=-2)
        args = (
            q, k, *vectors, *(None,) * 9, qk_norm, "head", qk_eps, layout, rope_start, rope_len, precision,
        )  # fmt: skip
        wanted = [True, True, *needs[7:13], *(False,) * 8]
        d_q, d_k, *rest = _part("qk_norm_rope", args).backward(d_q, d_k, *args, wanted)
        given = tuple(rest[:6])
        grad = torch.cat([d_q, d_k, d_v], dim=-2).flatten(-2)
    options = (norm, eps, weight_offset, precision)
    return (
        *_through_norm(grad, x, shift, scale, norm_weight, norm_bias, row_index, weight, bias, options, needs[:7]),
        *given,
    )


def linear_gate_residual(
    grad, _, residual, y, weight, bias, gate, row_index, gate_act, precision, keep, kept, needs
):  # fmt: skip
    if grad is None or grad.numel() == 0:
        return _absent((residual, y, weight, bias, gate), needs)
    need_branch = any(needs[1:4])
    branch = kept if keep else grad.to(y.dtype)  # its values are read for the gate's gradient only
    args = (residual, branch, gate, None, row_index, gate_act, None, 0.0, precision)
    d_residual, d, d_gate, _ = _part("gate_residual", args).backward(
        grad, *args, [needs[0], need_branch, needs[4], False]
    )
    d_y = d_weight = d_bias = None
    if need_branch:
        d = d.reshape(-1, weight.shape[0])
        d_y, d_weight, d_bias = _linear(d, weight, bias, needs[1:4], lambda: y.reshape(-1, weight.shape[1]))
        d_y = None if d_y is None else d_y.view(y.shape)
    return d_residual, d_y, d_weight, d_bias, d_gate
