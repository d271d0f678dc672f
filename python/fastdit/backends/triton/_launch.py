"""From an adapter's call to a running kernel: the compiled kernel is cached here, under a key that is cheap to make.

A plain `kernel[grid](...)` binds and specialises every argument on every call (11 us of Python for 23 of them). Here
numbers are never specialised (`kernels/_jit.py`), so a key needs only what is left: dtypes, 16-byte alignment of the
pointers, the constants and the options.

Three ways to run, one code path in the adapters:
    a GPU            compiled kernels
    interpreter      TRITON_INTERPRET=1 before fastdit is imported: kernels run on CPU tensors, slowly
    `collecting`     a driver that pretends a GPU (testing/aot.py): kernels are compiled, nothing runs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

INTERPRET: bool = triton.knobs.runtime.interpret
_C: Any = torch._C

_compiled: dict[tuple, Any] = {}
_arch: dict[int, int] = {}
_PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 188}  # of A100, H200, B200, RTX PRO 6000, where they are pretended
collecting: Callable[..., None] | None = None  # (kernel, grid, args, options): set by testing/aot.py only
_pretended: int | None = None


def unfit(x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)) -> str | None:
    """The refusal that all Triton kernels share: None when x is theirs."""
    if not (x.is_cuda or INTERPRET or collecting is not None):
        return f"needs a GPU tensor; got {x.device}"
    if x.dtype not in dtypes:
        return f"has no kernel for {x.dtype}"
    return None


def arch(x: Tensor) -> int:
    """Compute capability of x's device as one number: 80, 90, 100, 120. ROCm answers 0, the interpreter 80."""
    if _pretended is not None:
        return _pretended
    if INTERPRET or not x.is_cuda:
        return 80
    index = x.get_device()
    found = _arch.get(index)
    if found is None:
        major, minor = torch.cuda.get_device_capability(index)
        found = _arch[index] = 0 if torch.version.hip else 10 * major + minor
    return found


def pretend(capability: int | None) -> None:
    """Makes `arch` answer this: what tests use to reach another card's code paths. None ends it."""
    global _pretended
    _pretended = capability


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device: how many programs a persistent kernel starts. Few where none run in parallel."""
    if _pretended is not None:
        return _PROCESSORS.get(_pretended, 128)
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple,
    numbers: tuple,
    constants: tuple,
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """Runs kernel(*tensors, *numbers, *constants) on the stream and device of tensors[0].

    tensors: Tensor, None or triton's TensorDescriptor. grid: x up to 2^31 - 1, y and z up to 65,535.
    """
    first = tensors[0]
    if INTERPRET or collecting is not None or triton.knobs.runtime.launch_enter_hook is not None or not first.is_cuda:
        _slow(kernel, grid, (*tensors, *numbers, *constants), num_warps, num_stages)
        return
    device = first.get_device()
    if device != _C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, numbers, constants, num_warps, num_stages)
        return
    pointers: list[Any] = []
    kinds: list[Any] = []
    low = 0
    for t in tensors:
        if type(t) is Tensor or isinstance(t, Tensor):
            p = t.data_ptr()
            low |= p
            pointers.append(p)
            kinds.append(t.dtype)
        elif t is None:
            pointers.append(None)
            kinds.append(None)
        else:
            pointers.append(t)
            kinds.append((t.base.dtype, tuple(t.block_shape)))
    aligned: Any = True
    if low & 15:
        aligned = tuple(p & 15 == 0 if isinstance(p, int) else None for p in pointers)
    key = (kernel, device, tuple(kinds), aligned, constants, num_warps, num_stages)
    compiled = _compiled.get(key)
    if compiled is None:
        compiled = _compiled[key] = _slow(kernel, grid, (*tensors, *numbers, *constants), num_warps, num_stages)
        return  # that call ran it
    compiled.run(
        *grid, _C._cuda_getCurrentRawStream(device), compiled.function, compiled.packed_metadata, None, None, None,
        *pointers, *numbers, *constants,
    )  # fmt: skip


def _slow(kernel: Any, grid: tuple[int, int, int], args: tuple, num_warps: int, num_stages: int) -> Any:
    if collecting is not None:
        return collecting(kernel, grid, args, {"num_warps": num_warps, "num_stages": num_stages})
    return kernel[grid](*args, num_warps=num_warps, num_stages=num_stages)


def target() -> Any:
    """The GPU that Triton compiles for now."""
    return driver.active.get_current_target()


def dot_precision() -> str:
    """How tl.dot multiplies fp32: exactly, unless the user allowed TF32 to torch's own matmuls."""
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
