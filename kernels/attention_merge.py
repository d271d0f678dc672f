"""Two attentions of the same queries over disjoint keys become one; element-wise, one pass.

    lse = log(exp(lse1) + exp(lse2)),   a = exp(lse1 - lse),  b = exp(lse2 - lse);   o = a * o1 + b * o2
    backward, with t1 = do . o1, t2 = do . o2:   do1 = a * do,   do2 = b * do
        dlse1 = a * (dlse + b * (t1 - t2)),   dlse2 = b * (dlse + a * (t2 - t1))

Two rows without keys have a = b = 0 and lse = -inf. A program takes ROWS rows (token, head) with all their channels:
o is (rows, D) contiguous on the way out and any (batch, token, head) strides on the way in.

Cost: 3 * rows * D * itemsize bytes forward, 5 backward, and 12 or 24 bytes of lse a row.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple


@triton.jit
def _place(total, N, H, ROWS: tl.constexpr):
    """The rows of this program: (flat row, valid, batch, token, head), the head fastest, in int64."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = row // H
    return row, row < total, token // N, token % N, row % H


@triton.jit
def _load(P, batch, token, head, s_batch, s_token, s_head, mask, D: tl.constexpr, WIDTH: tl.constexpr):
    col = tl.arange(0, WIDTH)
    at = batch * s_batch + token * s_token + head * s_head
    x = tl.load(P + at[:, None] + col[None, :], mask=mask[:, None] & (col < D)[None, :], other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(P, row, x, mask, D: tl.constexpr, WIDTH: tl.constexpr):
    col = tl.arange(0, WIDTH)
    x = x.to(P.dtype.element_ty)
    tl.store(P + (row * D)[:, None] + col[None, :], x, mask=mask[:, None] & (col < D)[None, :])


@triton.jit
def _shares(lse1, lse2):
    """(a, b, lse); rows of two -inf give (0, 0, -inf)."""
    top = tl.maximum(lse1, lse2)
    top = tl.where(top == float("-inf"), 0.0, top)
    one = tl.exp(lse1 - top)
    two = tl.exp(lse2 - top)
    total = one + two
    none = total == 0.0
    share = tl.where(none, 0.0, 1.0 / total)
    return one * share, two * share, tl.where(none, float("-inf"), top + tl.log(total))


@kernel
def merge_forward(
    O1, LSE1, O2, LSE2, O, LSE,
    total: tl.int64, N: tl.int64, H: tl.int64,
    b1: tl.int64, n1: tl.int64, h1: tl.int64, b2: tl.int64, n2: tl.int64, h2: tl.int64,
    lb1: tl.int64, lh1: tl.int64, ln1: tl.int64, lb2: tl.int64, lh2: tl.int64, ln2: tl.int64,
    D: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row, mask, batch, token, head = _place(total, N, H, ROWS)
    lse1 = tl.load(LSE1 + batch * lb1 + head * lh1 + token * ln1, mask=mask, other=0.0)
    lse2 = tl.load(LSE2 + batch * lb2 + head * lh2 + token * ln2, mask=mask, other=0.0)
    a, b, lse = _shares(lse1, lse2)
    x1 = _load(O1, batch, token, head, multiple(b1, ALIGN), multiple(n1, ALIGN), multiple(h1, ALIGN), mask, D, WIDTH)
    x2 = _load(O2, batch, token, head, multiple(b2, ALIGN), multiple(n2, ALIGN), multiple(h2, ALIGN), mask, D, WIDTH)
    _store(O, row, a[:, None] * x1 + b[:, None] * x2, mask, D, WIDTH)
    tl.store(LSE + (batch * H + head) * N + token, lse, mask=mask)


@kernel
def merge_backward(
    O1, LSE1, O2, LSE2, DO, DLSE, DO1, DLSE1, DO2, DLSE2,
    total: tl.int64, N: tl.int64, H: tl.int64,
    b1: tl.int64, n1: tl.int64, h1: tl.int64, b2: tl.int64, n2: tl.int64, h2: tl.int64,
    lb1: tl.int64, lh1: tl.int64, ln1: tl.int64, lb2: tl.int64, lh2: tl.int64, ln2: tl.int64,
    bg: tl.int64, ng: tl.int64, hg: tl.int64, lbg: tl.int64, lhg: tl.int64, lng: tl.int64,
    D: tl.constexpr, ALIGN: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Gradients that nobody asked for are None; DO or DLSE is None where no gradient arrives."""
    row, mask, batch, token, head = _place(total, N, H, ROWS)
    lse1 = tl.load(LSE1 + batch * lb1 + head * lh1 + token * ln1, mask=mask, other=0.0)
    lse2 = tl.load(LSE2 + batch * lb2 + head * lh2 + token * ln2, mask=mask, other=0.0)
    a, b, _ = _shares(lse1, lse2)
    apart = tl.zeros((ROWS,), tl.float32)
    g = tl.zeros((ROWS, WIDTH), tl.float32)
    if DO is not None:
        g = _load(DO, batch, token, head, multiple(bg, ALIGN), multiple(ng, ALIGN), multiple(hg, ALIGN), mask, D, WIDTH)
        if (DLSE1 is not None) or (DLSE2 is not None):
            x1 = _load(
                O1, batch, token, head, multiple(b1, ALIGN), multiple(n1, ALIGN), multiple(h1, ALIGN), mask, D, WIDTH
            )
            x2 = _load(
                O2, batch, token, head, multiple(b2, ALIGN), multiple(n2, ALIGN), multiple(h2, ALIGN), mask, D, WIDTH
            )
            apart = tl.sum(g * (x1 - x2), 1)
    dlse = tl.zeros((ROWS,), tl.float32)
    if DLSE is not None:
        dlse = tl.load(DLSE + batch * lbg + head * lhg + token * lng, mask=mask, other=0.0)
    at = (batch * H + head) * N + token
    if DO1 is not None:
        _store(DO1, row, a[:, None] * g, mask, D, WIDTH)
    if DO2 is not None:
        _store(DO2, row, b[:, None] * g, mask, D, WIDTH)
    if DLSE1 is not None:
        tl.store(DLSE1 + at, a * (dlse + b * apart), mask=mask)
    if DLSE2 is not None:
        tl.store(DLSE2 + at, b * (dlse - a * apart), mask=mask)
