"""What the compiled backends (cpu, cuda) are told of a rotary call: tensors as pointers, sizes and strides.

Mirrors csrc/bindings/rotary.h.
"""

from __future__ import annotations

import torch

from .cpu._abi import DTYPE

NORM = {None: 0, "rms": 1, "layer": 2}
LAYOUT = {"interleaved": 0, "half": 1, "axis_half": 2}
ALL = 1 << 62  # rope_len of "every token from rope_start on"


def vector(t):
    return None if t is None else (t.data_ptr(), DTYPE[t.dtype])


def table(cos, sin):
    if cos is None:
        return None
    return (cos.data_ptr(), sin.data_ptr(), cos.shape, cos.stride(), sin.stride(), DTYPE[cos.dtype])


def axes(tables, grids, packed):
    """The description, and the tensors that it points into."""
    tables = [t.contiguous() for t in tables if t is not None]
    grids = grids.to(torch.int32).contiguous()
    pairs = zip(tables[::2], tables[1::2], strict=True)
    columns = [(cos.data_ptr(), sin.data_ptr(), cos.shape[1], cos.shape[0]) for cos, sin in pairs]
    return (DTYPE[tables[0].dtype], grids.data_ptr(), grids.shape[0], packed, *columns), (*tables, grids)


def arguments(
    q_out, k_out, q, k, q_weight, k_weight, q_bias, k_bias, cos, sin, k_cos, k_sin,
    cos_t, sin_t, cos_h, sin_h, cos_w, sin_w, grids, norm, scope, eps, layout, rope_start, rope_len, precision,
):  # fmt: skip
    """What the kernels of both directions take, and the tensors of the axes that it points into."""
    compact, kept, pairs = None, (), 0
    if grids is not None:
        compact, kept = axes((cos_t, sin_t, cos_h, sin_h, cos_w, sin_w), grids, q.dim() == 3)
        pairs = sum(width for _, _, width, _ in compact[4:])
    elif cos is not None:
        pairs = cos.shape[-1]
    elif k_cos is not None:
        pairs = k_cos.shape[-1]
    shared = (
        DTYPE[q.dtype],
        (q.data_ptr(), q.shape, q.stride(), q_out),
        (k.data_ptr(), k.shape, k.stride(), k_out),
        vector(q_weight), vector(k_weight), vector(q_bias), vector(k_bias),
        table(cos, sin), table(k_cos, k_sin), compact,
        NORM[norm], scope == "hidden", eps, LAYOUT[layout], pairs,
        rope_start, ALL if rope_len is None else rope_len, precision == "native", torch.get_num_threads(),
    )  # fmt: skip
    return shared, kept
