"""Modulation forward, three ops in one kernel:

    r = residual + act(gate) * [rms](y)         Res given; otherwise r is y and not stored
    h = n(r) * (1 + scale) + shift              H given; n of r as stored

A program takes `per` consecutive tokens, ROWS of [CHUNK] x chunks at a time, and every token is read and written once.
Tokens are walked in runs that share their table rows, so tables are read once a run and stay in registers; the loop
inside a run is pipelined, the next rows arrive while these are reduced. Tables that change from token to token
(row_index, per token) are gathered inside the loop instead, and come from L1 while the row stays the same.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel
from fastdit.kernels.modulation_row import (
    add,
    affine,
    load_row,
    moments,
    multiply,
    one_plus,
    opened,
    rounded,
    standardised,
    store_row,
    table_at,
    token_at,
)  # fmt: skip


@triton.jit
def branch(y, gate, post, post_eps, POST: tl.constexpr, T: tl.constexpr, NATIVE: tl.constexpr, C: tl.constexpr,
           CHUNK: tl.constexpr):  # fmt: skip
    """act(gate) * [rms](y)."""
    if POST:
        _, square = moments(y, False, C, CHUNK)
        y = rounded(standardised(y, 0.0, tl.rsqrt(square + post_eps)), T, NATIVE)
        if len(post) > 0:
            y = rounded(multiply(y, post), T, NATIVE)
    if len(gate) > 0:
        y = rounded(multiply(y, gate), T, NATIVE)
    return y


@triton.jit
def norm_modulate(x, weight, bias, scale, shift, eps, RMS: tl.constexpr, T: tl.constexpr, NATIVE: tl.constexpr,
                  C: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    mean, square = moments(x, not RMS, C, CHUNK)
    x = standardised(x, mean, tl.rsqrt(square + eps))
    if RMS:  # eager RMSNorm rounds before its affine part, F.layer_norm only after it
        x = rounded(x, T, NATIVE)
    if len(weight) > 0:
        x = multiply(x, weight)
        if RMS:
            x = rounded(x, T, NATIVE)
    if len(bias) > 0:
        x = add(x, bias)
    x = rounded(x, T, NATIVE)
    if len(scale) > 0:
        x = rounded(multiply(x, scale), T, NATIVE)
    if len(shift) > 0:
        x = add(x, shift)
    return x


@kernel
def modulation_forward(
    Y, Res, R, H, Gate, Shift, Scale, W, Bias, Post, GateIndex, Index,
    rows: tl.int32, N: tl.int32, span: tl.int32, splits: tl.int32, per: tl.int32, run: tl.int32,
    y_b: tl.int64, y_n: tl.int64, res_b: tl.int64, res_n: tl.int64,
    gate_b: tl.int64, gate_m: tl.int64, gate_tokens: tl.int32,
    shift_b: tl.int64, shift_m: tl.int64, shift_tokens: tl.int32,
    scale_b: tl.int64, scale_m: tl.int64, scale_tokens: tl.int32,
    eps: tl.float32, post_eps: tl.float32,
    OFFSET: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
    TANH: tl.constexpr, POST: tl.constexpr, NATIVE: tl.constexpr, GATHER: tl.constexpr, ALIGN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`splits` programs share `span` tokens, `per` each; a run of tokens ends at every multiple of `run`."""
    T: tl.constexpr = Y.dtype.element_ty
    lane = tl.arange(0, ROWS)[:, None]
    weight = affine(W, OFFSET, T, NATIVE, ROWS, C, CHUNK)
    bias = affine(Bias, 0.0, T, NATIVE, ROWS, C, CHUNK)
    post = affine(Post, 0.0, T, NATIVE, ROWS, C, CHUNK)
    begin = tl.program_id(0) // splits * span
    end = tl.minimum(begin + span, rows)
    begin += tl.program_id(0) % splits * per
    end = tl.minimum(begin + per, end)
    while begin < end:
        stop = tl.minimum(end, begin - begin % run + run)
        if not GATHER:
            first = begin + tl.zeros([ROWS, 1], tl.int32)
            at = table_at(None, first, True, N, gate_b, gate_m, gate_tokens, ALIGN)
            run_gate = load_row(Gate, at, True, C, CHUNK)
            at = table_at(None, first, True, N, scale_b, scale_m, scale_tokens, ALIGN)
            run_scale = load_row(Scale, at, True, C, CHUNK)
            at = table_at(None, first, True, N, shift_b, shift_m, shift_tokens, ALIGN)
            run_shift = load_row(Shift, at, True, C, CHUNK)
            run_gate = opened(run_gate, TANH, T, NATIVE)
            run_scale = one_plus(run_scale, T, NATIVE)
        for tile in tl.range(begin, stop, ROWS, num_stages=STAGES):
            row = tile + lane
            ok = row < stop
            sample = row // N if GATHER else begin // N  # a run of gathered tables may go on into the next sample
            if GATHER:
                at = table_at(GateIndex, row, ok, N, gate_b, gate_m, gate_tokens, ALIGN)
                gate = opened(load_row(Gate, at, ok, C, CHUNK), TANH, T, NATIVE)
                at = table_at(Index, row, ok, N, scale_b, scale_m, scale_tokens, ALIGN)
                scale = one_plus(load_row(Scale, at, ok, C, CHUNK), T, NATIVE)
                at = table_at(Index, row, ok, N, shift_b, shift_m, shift_tokens, ALIGN)
                shift = load_row(Shift, at, ok, C, CHUNK)
            else:
                gate = run_gate
                scale = run_scale
                shift = run_shift
            x = load_row(Y, token_at(row, sample, N, y_b, y_n, ALIGN), ok, C, CHUNK)
            if Res is not None:
                x = branch(x, gate, post, post_eps, POST, T, NATIVE, C, CHUNK)
                x = add(load_row(Res, token_at(row, sample, N, res_b, res_n, ALIGN), ok, C, CHUNK), x)
                x = rounded(x, R.dtype.element_ty, True)
                store_row(R, row.to(tl.int64) * C, ok, x, C, CHUNK)
            if H is not None:
                x = norm_modulate(x, weight, bias, scale, shift, eps, RMS, T, NATIVE, C, CHUNK)
                store_row(H, row.to(tl.int64) * C, ok, x, C, CHUNK)
        begin = stop
