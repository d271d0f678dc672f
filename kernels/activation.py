"""The activation between the two linear layers of an MLP, plain or gated: y = act(x) * up.

One pass over [rows, C], elements in blocks of BLOCK. Rows that follow one another without a gap are one long row, so
narrow rows idle no lanes; of halves of a projection (`h.chunk(2, -1)`) a program takes a block of a row, and nothing is
copied. Math in fp32, one rounding. The backward recomputes act from x and gives both gradients in the same pass.
"""

import triton
import triton.language as tl

from fastdit.kernels._jit import kernel, multiple

GELU, GELU_TANH, SILU, RELU = 0, 1, 2, 3


@triton.jit
def _sigmoid(x):
    """(sigmoid(x), its derivative), neither by a difference that cancels."""
    e = tl.exp(-tl.abs(x))
    r = 1.0 / (1.0 + e)
    return tl.where(x < 0, e * r, r), e * r * r


@triton.jit
def _act(x, ACT: tl.constexpr):
    """(act(x), act'(x))."""
    if ACT == 0:  # gelu: x Phi(x)
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == 1:  # gelu_tanh: x sigmoid(2 u), u = sqrt(2/pi) (x + 0.044715 x^3)
        square = x * x
        s, slope = _sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * square))
        return x * s, s + x * slope * (1.5957691216057308 + 0.21406444881780073 * square)
    elif ACT == 2:  # silu: x sigmoid(x)
        s, slope = _sigmoid(x)
        return x * s, s + x * slope
    else:  # relu; NaN stays
        return tl.where(x < 0, 0.0, x), tl.where(x > 0, 1.0, 0.0)


@kernel
def activation_forward(
    X, Up, Y, C: tl.int64, x_n: tl.int64, up_n: tl.int64, blocks: tl.int32,
    ACT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, block): `blocks` of BLOCK channels a row; C and the strides are multiples of ALIGN."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    C = multiple(C, ALIGN)
    ok = c < C
    x = tl.load(X + row * multiple(x_n, ALIGN) + c, mask=ok, other=0.0).to(tl.float32)
    y, _ = _act(x, ACT)
    if Up is not None:
        y *= tl.load(Up + row * multiple(up_n, ALIGN) + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(Y + row * C + c, y.to(Y.dtype.element_ty), mask=ok)


@kernel
def activation_backward(
    X, Up, Grad, DX, DUp, C: tl.int64, x_n: tl.int64, up_n: tl.int64, grad_n: tl.int64, blocks: tl.int32,
    ACT: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx = grad * up * act'(x), dup = grad * act(x); DX or DUp None: nobody wants it."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    C = multiple(C, ALIGN)
    ok = c < C
    x = tl.load(X + row * multiple(x_n, ALIGN) + c, mask=ok, other=0.0).to(tl.float32)
    grad = tl.load(Grad + row * multiple(grad_n, ALIGN) + c, mask=ok, other=0.0).to(tl.float32)
    y, slope = _act(x, ACT)
    if DUp is not None:
        tl.store(DUp + row * C + c, (grad * y).to(DUp.dtype.element_ty), mask=ok)
    if DX is not None:
        if Up is not None:
            grad *= tl.load(Up + row * multiple(up_n, ALIGN) + c, mask=ok, other=0.0).to(tl.float32)
        tl.store(DX + row * C + c, (grad * slope).to(DX.dtype.element_ty), mask=ok)
