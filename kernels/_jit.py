"""What every kernel file needs: the decorator, and the few device functions that all families share.

Parameters of a kernel stand in this order: pointers (None where an optional tensor is absent: `if W is not None` is
decided at compile time), numbers (annotated tl.int32, tl.int64 or tl.float32), constants (tl.constexpr, upper case).
No libdevice and no inline assembly: the interpreter has neither.
"""

import inspect

import triton
import triton.language as tl

_NUMBERS = (tl.int32, tl.int64, tl.float32)


KINDS = ("memory", "gemm", "small")


def kernel(fn=None, *, kind="memory"):
    """triton.jit whose annotated numbers are never specialised: one build serves every token count and stride.

    kind says what the ahead-of-time report must find. "memory": every access of 2-byte elements is vectorised.
    "gemm": 16-bit inputs meet the tensor cores, by wgmma on sm_90. "small": little work, nothing of that is asked.
    """
    if fn is None:
        return lambda fn: kernel(fn, kind=kind)
    if kind not in KINDS:
        raise ValueError(f"kernel: unknown kind of {fn.__name__}; got {kind!r}, expected one of {KINDS}")
    parameters = inspect.signature(fn).parameters
    numbers = [name for name, p in parameters.items() if p.annotation in _NUMBERS]
    made = triton.jit(fn, do_not_specialize=numbers)
    made.kind = kind
    return made


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
