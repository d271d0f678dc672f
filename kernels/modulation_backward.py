"""Modulation backward: one pass over the tokens, then fixed-order sums for everything that tokens share.

    n = (r - mean) * root,  a = n * w + b,  h = a * (1 + scale) + shift,  r = residual + act(gate) * yn,  yn = [rms](y)
    g = dh * (1 + scale) * w,     dr = grad_r + root * (g - mean(g) - n * mean(g * n))        (rms: without mean(g))
    dshift += dh,  dscale += dh * a,  dweight += dh * (1 + scale) * n,  dbias += dh * (1 + scale)
    dresidual = dr,  dgate += dr * yn * act'(gate),  dyn = dr * act(gate),  dy likewise through the rms

Statistics are recomputed: a program holds ROWS rows of [CHUNK] x chunks from their first reading to the store of their
gradients, so every token tensor is moved once. Programs take consecutive tokens (or positions of the order that sorts
tokens by table row) and walk them in runs of one table row, summing table gradients in registers. A run that a program
holds whole is stored where it belongs; what programs share goes to fp32 partial rows, which `modulation_sums` adds in
the order of the tokens. No atomics: the bits do not depend on who ran when.
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
    total,
    totals,
    zeros,
)

# Where a gradient of a table goes: nobody wants it, a row per token, or sums (the number of its partial rows' block).
UNWANTED = -2
PER_TOKEN = -1


@triton.jit
def _through_norm(g, n, root, RMS: tl.constexpr, C: tl.constexpr):
    """root * (g - mean(g) - n * mean(g * n))."""
    slope = multiply(g, n)
    if RMS:
        level = 0.0
        slope = total(slope) / C
    else:
        level, slope = totals(g, slope)
        level = level / C
        slope = slope / C
    out = ()
    for i in tl.static_range(len(g)):
        out = out + ((g[i] - level - n[i] * slope) * root,)
    return out


@triton.jit
def _closed(d, gate, TANH: tl.constexpr):
    """d * act'(gate), from act(gate)."""
    if TANH:
        out = ()
        for i in tl.static_range(len(d)):
            out = out + (d[i] * (1.0 - gate[i] * gate[i]),)
        return out
    else:
        return d


@triton.jit
def _flush(acc, D, home, whole, Part, slot, C: tl.constexpr, CHUNK: tl.constexpr):
    """Sums of a run to row `home` of D where the run is whole, else to partial row `slot`. Part None: always whole."""
    for i in tl.static_range(len(acc)):
        channel = i * CHUNK + tl.arange(0, CHUNK)
        value = tl.sum(acc[i], 0)
        if Part is None:
            tl.store(D + home * C + channel, value.to(D.dtype.element_ty), mask=channel < C)
        elif D is None:
            tl.store(Part + slot * C + channel, value, mask=channel < C)
        else:
            tl.store(D + home * C + channel, value.to(D.dtype.element_ty), mask=(channel < C) & whole)
            tl.store(Part + slot * C + channel, value, mask=(channel < C) & (whole == 0))


@kernel
def modulation_backward(
    Y, Res, GradR, GradH, Gate, Scale, W, Bias, Post, GateIndex, Index, Walk, Order, Offsets,
    DRes, DY, DGate, DShift, DScale, Part,
    rows: tl.int32, N: tl.int32, span: tl.int32, splits: tl.int32, per: tl.int32, run: tl.int32, slots: tl.int64,
    y_b: tl.int64, y_n: tl.int64, res_b: tl.int64, res_n: tl.int64,
    grad_r_b: tl.int64, grad_r_n: tl.int64, grad_h_b: tl.int64, grad_h_n: tl.int64,
    gate_b: tl.int64, gate_m: tl.int64, gate_tokens: tl.int32,
    scale_b: tl.int64, scale_m: tl.int64, scale_tokens: tl.int32,
    eps: tl.float32, post_eps: tl.float32,
    OFFSET: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, RMS: tl.constexpr,
    TANH: tl.constexpr, POST: tl.constexpr, ACROSS: tl.constexpr, RUN_GATE: tl.constexpr,
    RUN_SCALE: tl.constexpr,
    TO_GATE: tl.constexpr, TO_SHIFT: tl.constexpr, TO_SCALE: tl.constexpr,
    TO_W: tl.constexpr, TO_BIAS: tl.constexpr, TO_POST: tl.constexpr,
    ALIGN: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Programs share the tokens as in `modulation_forward`; with Walk they share the positions of Order instead, and
    Offsets says where the tokens of each table row begin. ACROSS: a run may have tokens of several samples.
    RUN_GATE, RUN_SCALE: it has one row of that table.
    """
    F: tl.constexpr = tl.float32
    lane = tl.arange(0, ROWS)[:, None]
    weight = affine(W, OFFSET, F, False, ROWS, C, CHUNK)
    bias = affine(Bias, 0.0, F, False, ROWS, C, CHUNK)
    post = affine(Post, 0.0, F, False, ROWS, C, CHUNK)
    d_gate = zeros(ROWS, C, CHUNK)
    d_shift = zeros(ROWS, C, CHUNK)
    d_scale = zeros(ROWS, C, CHUNK)
    d_weight = zeros(ROWS, C, CHUNK)
    d_bias = zeros(ROWS, C, CHUNK)
    d_post = zeros(ROWS, C, CHUNK)
    program = tl.program_id(0)
    start = program // splits * span + program % splits * per
    end = tl.minimum(start + per, tl.minimum(program // splits * span + span, rows))
    Runs = None if Walk is None else Part  # only the positions of an order may cut a run that is stored whole
    at = start
    while at < end:
        if Walk is None:
            token = at
            home = (at // run).to(tl.int64)
            stop = tl.minimum(end, at - at % run + run)
            whole = True
            slot = program.to(tl.int64)
        else:
            token = at
            if Order is not None:
                token = tl.load(Order + at)
            home = tl.load(Walk + token).to(tl.int64)
            head = tl.load(Offsets + home)
            tail = tl.load(Offsets + home + 1)
            stop = tl.maximum(tl.minimum(end, tail), at + 1)
            whole = (head >= start) & (tail <= end)
            slot = 2 * program.to(tl.int64) + (head >= start)
        first = token + tl.zeros([ROWS, 1], tl.int32)
        if RUN_GATE:
            place = table_at(GateIndex, first, True, N, gate_b, gate_m, gate_tokens, ALIGN)
            run_gate = opened(load_row(Gate, place, True, C, CHUNK), TANH, F, False)
        if RUN_SCALE:
            place = table_at(Index, first, True, N, scale_b, scale_m, scale_tokens, ALIGN)
            run_scale = one_plus(load_row(Scale, place, True, C, CHUNK), F, False)
        for tile in tl.range(at, stop, ROWS, num_stages=STAGES):
            row = tile + lane
            ok = row < stop
            if Order is not None:
                row = tl.load(Order + row, mask=ok, other=0)
            out = row.to(tl.int64) * C
            sample = row // N if ACROSS else at // N
            if RUN_GATE:
                gate = run_gate
            else:
                place = table_at(GateIndex, row, ok, N, gate_b, gate_m, gate_tokens, ALIGN)
                gate = opened(load_row(Gate, place, ok, C, CHUNK), TANH, F, False)
            if RUN_SCALE:
                scale = run_scale
            else:
                place = table_at(Index, row, ok, N, scale_b, scale_m, scale_tokens, ALIGN)
                scale = one_plus(load_row(Scale, place, ok, C, CHUNK), F, False)

            # r again, as the forward stored it
            unit = load_row(Y, token_at(row, sample, N, y_b, y_n, ALIGN), ok, C, CHUNK)
            if POST:
                _, square = moments(unit, False, C, CHUNK)
                post_root = tl.where(ok, tl.rsqrt(square + post_eps), 0.0)  # a row that is not there adds no NaN
                unit = standardised(unit, 0.0, post_root)
            branch = multiply(unit, post)
            if GradH is not None:
                r = unit
                if Res is not None:
                    r = load_row(Res, token_at(row, sample, N, res_b, res_n, ALIGN), ok, C, CHUNK)
                    r = rounded(add(r, multiply(branch, gate)), Res.dtype.element_ty, True)
                mean, square = moments(r, not RMS, C, CHUNK)
                root = tl.where(ok, tl.rsqrt(square + eps), 0.0)
                n = standardised(r, mean, root)
                g = load_row(GradH, token_at(row, sample, N, grad_h_b, grad_h_n, ALIGN), ok, C, CHUNK)
                if TO_SHIFT == -1:
                    store_row(DShift, out, ok, g, C, CHUNK)
                if TO_SHIFT >= 0:
                    d_shift = add(d_shift, g)
                if TO_SCALE >= -1:
                    a = multiply(n, weight)
                    if len(bias) > 0:
                        a = add(a, bias)
                    a = multiply(a, g)
                    if TO_SCALE == -1:
                        store_row(DScale, out, ok, a, C, CHUNK)
                    else:
                        d_scale = add(d_scale, a)
                g = multiply(g, scale)
                if TO_W >= 0:
                    d_weight = add(d_weight, multiply(g, n))
                if TO_BIAS >= 0:
                    d_bias = add(d_bias, g)
                d = _through_norm(multiply(g, weight), n, root, RMS, C)
                if GradR is not None:
                    d = add(d, load_row(GradR, token_at(row, sample, N, grad_r_b, grad_r_n, ALIGN), ok, C, CHUNK))
            else:
                d = load_row(GradR, token_at(row, sample, N, grad_r_b, grad_r_n, ALIGN), ok, C, CHUNK)
            store_row(DRes, out, ok, d, C, CHUNK)
            if Res is not None:
                if TO_GATE >= -1:
                    a = _closed(multiply(d, branch), gate, TANH)
                    if TO_GATE == -1:
                        store_row(DGate, out, ok, a, C, CHUNK)
                    else:
                        d_gate = add(d_gate, a)
                d = multiply(d, gate)
                if TO_POST >= 0:
                    d_post = add(d_post, multiply(d, unit))
                if POST:
                    d = _through_norm(multiply(d, post), unit, post_root, True, C)
            store_row(DY, out, ok, d, C, CHUNK)
        if TO_GATE >= 0 and DGate is not None:
            _flush(d_gate, DGate, home, whole, Runs, TO_GATE * slots + slot, C, CHUNK)
            d_gate = zeros(ROWS, C, CHUNK)
        if TO_SHIFT >= 0 and DShift is not None:
            _flush(d_shift, DShift, home, whole, Runs, TO_SHIFT * slots + slot, C, CHUNK)
            d_shift = zeros(ROWS, C, CHUNK)
        if TO_SCALE >= 0 and DScale is not None:
            _flush(d_scale, DScale, home, whole, Runs, TO_SCALE * slots + slot, C, CHUNK)
            d_scale = zeros(ROWS, C, CHUNK)
        at = stop
    if TO_GATE >= 0 and DGate is None:
        _flush(d_gate, None, 0, False, Part, TO_GATE * slots + program, C, CHUNK)
    if TO_SHIFT >= 0 and DShift is None:
        _flush(d_shift, None, 0, False, Part, TO_SHIFT * slots + program, C, CHUNK)
    if TO_SCALE >= 0 and DScale is None:
        _flush(d_scale, None, 0, False, Part, TO_SCALE * slots + program, C, CHUNK)
    if TO_W >= 0:
        _flush(d_weight, None, 0, False, Part, TO_W * slots + program, C, CHUNK)
    if TO_BIAS >= 0:
        _flush(d_bias, None, 0, False, Part, TO_BIAS * slots + program, C, CHUNK)
    if TO_POST >= 0:
        _flush(d_post, None, 0, False, Part, TO_POST * slots + program, C, CHUNK)


# ---- second stage -------------------------------------------------------------------------------------
@triton.jit
def _sum(Part, Out, Offsets, home, block, slots, per, count, C: tl.constexpr, BLOCK_K: tl.constexpr,
         BLOCK_C: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    k = tl.arange(0, BLOCK_K)[:, None]
    first = home * count
    wanted = True
    if Offsets is not None:
        head = tl.load(Offsets + home)
        tail = tl.load(Offsets + home + 1)
        first = head // per
        count = tl.where(tail > head, (tail - 1) // per - first + 1, 0)
        wanted = count != 1  # one program held that row whole, and stored it
        count = tl.where(wanted, count, 0)
    acc = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    for i in tl.range(0, count, BLOCK_K, num_stages=STAGES):
        slot = first + i + k
        if Offsets is not None:
            slot = 2 * slot + (i + k == 0)  # a run begins in the second slot of its first program
        at = slot.to(tl.int64) * C + channel
        acc += tl.load(Part + at, mask=(i + k < count) & (channel < C), other=0.0)
    channel = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (channel < C) & wanted
    tl.store(Out + home.to(tl.int64) * C + channel, tl.sum(acc, 0).to(Out.dtype.element_ty), mask=mask)


@kernel(kind="small")
def modulation_sums(
    Part, Out0, Out1, Out2, Out3, Out4, Out5, Offsets, first: tl.int64, slots: tl.int64, per: tl.int32, count: tl.int32,
    C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Out_j[row] = the partial rows of table row `row`, in the order of the tokens; block first + j of Part is Out_j's.

    `count` partial rows each, one after the other; with Offsets those of the programs that took the row's positions,
    `per` positions a program, and rows that nobody used are zero.
    """
    blocks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    home = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    which = tl.program_id(1)
    Part += (first + which) * slots * C
    if which == 0:
        _sum(Part, Out0, Offsets, home, block, slots, per, count, C, BLOCK_K, BLOCK_C, STAGES)
    if Out1 is not None:
        if which == 1:
            _sum(Part, Out1, Offsets, home, block, slots, per, count, C, BLOCK_K, BLOCK_C, STAGES)
    if Out2 is not None:
        if which == 2:
            _sum(Part, Out2, Offsets, home, block, slots, per, count, C, BLOCK_K, BLOCK_C, STAGES)
    if Out3 is not None:
        if which == 3:
            _sum(Part, Out3, Offsets, home, block, slots, per, count, C, BLOCK_K, BLOCK_C, STAGES)
    if Out4 is not None:
        if which == 4:
            _sum(Part, Out4, Offsets, home, block, slots, per, count, C, BLOCK_K, BLOCK_C, STAGES)
    if Out5 is not None:
        if which == 5:
            _sum(Part, Out5, Offsets, home, block, slots, per, count, C, BLOCK_K, BLOCK_C, STAGES)
