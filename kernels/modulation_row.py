"""A few modulation rows in registers: what the forward and the backward share.

A row of C channels is a tuple of [ROWS, CHUNK] fp32 tensors; a row that is absent is (). CHUNK = lanes of a row x 16
bytes (x 8 where that fits better), so widths that are no power of two (384, 1152, 3072, 5120) idle at most a quarter of
the lanes where one padded tensor would idle up to half. Tables are gathered in that layout: no lane changes hands.

Tokens are rows (b, n) of B x N. A table finds the row of a token by an index, or at (b, n / tokens per table row).
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import multiple, tanh


# ---- rows as tuples -----------------------------------------------------------------------------------
@triton.jit
def load_row(P, at, ok, C: tl.constexpr, CHUNK: tl.constexpr):
    """P[at + channel] as fp32, zero beyond C and where `ok` is false; () where there is no P. at, ok: [ROWS, 1]."""
    if P is None:
        return ()
    else:
        row = ()
        for i in tl.static_range((C + CHUNK - 1) // CHUNK):
            channel = i * CHUNK + tl.arange(0, CHUNK)[None, :]
            mask = ok & (channel < C) if (i + 1) * CHUNK > C else ok
            row = row + (tl.load(P + at + channel, mask=mask, other=0.0).to(tl.float32),)
        return row


@triton.jit
def store_row(P, at, ok, row, C: tl.constexpr, CHUNK: tl.constexpr):
    """Rounds to P's dtype. P None: nobody wants it."""
    if P is not None:
        for i in tl.static_range(len(row)):
            channel = i * CHUNK + tl.arange(0, CHUNK)[None, :]
            mask = ok & (channel < C) if (i + 1) * CHUNK > C else ok
            tl.store(P + at + channel, row[i].to(P.dtype.element_ty), mask=mask)


@triton.jit
def zeros(ROWS: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    row = ()
    for _ in tl.static_range((C + CHUNK - 1) // CHUNK):
        row = row + (tl.zeros([ROWS, CHUNK], tl.float32),)
    return row


@triton.jit
def add(a, b):
    row = ()
    for i in tl.static_range(len(a)):
        row = row + (a[i] + b[i],)
    return row


@triton.jit
def multiply(a, b):
    """a * b; a where there is no b."""
    if len(b) == 0:
        return a
    else:
        row = ()
        for i in tl.static_range(len(a)):
            row = row + (a[i] * b[i],)
        return row


@triton.jit
def rounded(row, T: tl.constexpr, NATIVE: tl.constexpr):
    """As eager code stores it between two operations: in dtype T, where the law is the native one."""
    if NATIVE and T != tl.float32:
        out = ()
        for i in tl.static_range(len(row)):
            out = out + (row[i].to(T).to(tl.float32),)
        return out
    else:
        return row


# ---- statistics ---------------------------------------------------------------------------------------
@triton.jit
def total(a):
    """Sum over the channels: [ROWS, 1]."""
    s = a[0]
    for i in tl.static_range(1, len(a)):
        s += a[i]
    return tl.sum(s, 1, keep_dims=True)


@triton.jit
def totals(a, b):
    """Both sums by one exchange between the lanes."""
    s, t = a[0], b[0]
    for i in tl.static_range(1, len(a)):
        s += a[i]
        t += b[i]
    s, t = tl.split(tl.sum(tl.join(s, t), 1))
    return s[:, None], t[:, None]


@triton.jit
def moments(x, CENTRED: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """Mean (zero unless CENTRED) and mean square about it, in two readings of the registers."""
    if CENTRED:
        mean = total(x) / C
        away = ()
        for i in tl.static_range(len(x)):
            u = x[i] - mean
            if (i + 1) * CHUNK > C:
                u = tl.where(i * CHUNK + tl.arange(0, CHUNK)[None, :] < C, u, 0.0)
            away = away + (u,)
        rest, square = totals(away, multiply(away, away))
        rest = rest / C  # what rounding left in the mean
        return mean + rest, square / C - rest * rest
    else:
        return 0.0, total(multiply(x, x)) / C


@triton.jit
def standardised(x, mean, root):
    row = ()
    for i in tl.static_range(len(x)):
        row = row + ((x[i] - mean) * root,)
    return row


# ---- where things stand -------------------------------------------------------------------------------
@triton.jit
def token_at(row, sample, N, stride_b, stride_n, ALIGN: tl.constexpr):
    """Offset of token `row` of B x N, of sample `sample`, in a tensor with these strides."""
    n = (row - sample * N).to(tl.int64)
    return sample.to(tl.int64) * multiple(stride_b, ALIGN) + n * multiple(stride_n, ALIGN)


@triton.jit
def table_at(Index, row, ok, N, stride_b, stride_m, tokens, ALIGN: tl.constexpr):
    """Offset of the table row that token `row` uses; `tokens` consecutive ones share it. Index: contiguous."""
    if Index is not None:
        return tl.load(Index + row, mask=ok, other=0).to(tl.int64) * multiple(stride_m, ALIGN)
    else:
        sample = row // N
        m = ((row - sample * N) // tokens).to(tl.int64)
        return sample.to(tl.int64) * multiple(stride_b, ALIGN) + m * multiple(stride_m, ALIGN)


@triton.jit
def affine(W, OFFSET: tl.constexpr, T: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr,
           CHUNK: tl.constexpr):  # fmt: skip
    """OFFSET + W, of every row alike."""
    w = load_row(W, tl.zeros([ROWS, 1], tl.int64), True, C, CHUNK)
    if W is None or OFFSET == 0.0:
        return w
    else:
        row = ()
        for i in tl.static_range(len(w)):
            row = row + (w[i] + OFFSET,)
        return rounded(row, T, NATIVE)


@triton.jit
def one_plus(scale, T: tl.constexpr, NATIVE: tl.constexpr):
    row = ()
    for i in tl.static_range(len(scale)):
        row = row + (1.0 + scale[i],)
    return rounded(row, T, NATIVE)


@triton.jit
def opened(gate, TANH: tl.constexpr, T: tl.constexpr, NATIVE: tl.constexpr):
    """act(gate)."""
    if not TANH:
        return gate
    else:
        row = ()
        for i in tl.static_range(len(gate)):
            row = row + (tanh(gate[i]),)
        return rounded(row, T, NATIVE)
