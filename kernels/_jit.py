"""What every kernel file needs: the decorator, and the few device functions that all families share.

Parameters of a kernel stand in this order: pointers (None where an optional tensor is absent: `if W is not None` is
decided at compile time), numbers (annotated tl.int32, tl.int64 or tl.float32), constants (tl.constexpr, upper case).
No libdevice and no inline assembly: the interpreter has neither.
"""

import inspect

import triton
import triton.language as tl

_NUMBERS = (tl.int32, tl.int64, tl.float32)


def kernel(fn):
    """triton.jit whose annotated numbers are never specialised: one build serves every token count and stride."""
    parameters = inspect.signature(fn).parameters
    numbers = [name for name, p in parameters.items() if p.annotation in _NUMBERS]
    return triton.jit(fn, do_not_specialize=numbers)


@triton.jit
def multiple(number, ALIGN: tl.constexpr):
    """`number`, known to the compiler as a multiple of ALIGN: what makes loads of whole rows 16 bytes wide."""
    return number // ALIGN * ALIGN


@triton.jit
def tanh(x):
    """tanh of fp32 by exp: exact signs, no overflow, absolute error of an fp32 rounding."""
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0, -y, y)
