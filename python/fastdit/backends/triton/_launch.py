"""From an adapter's call to a running kernel, with what can be decided once decided once.

    plan     `.._facts.kept`: an adapter's decisions (grid, numbers, constants) are kept by the facts they were made
             from, every tensor's shape, strides, dtype and device, and all options: same facts, same launches
    launch   `Launch`: the compiled kernel is kept by what decides its build: dtypes, 16-byte alignment of the pointers,
             constants and options. Numbers are never specialised (`kernels/_jit.py`)

A warm call makes a key, finds its plan, allocates the outputs and passes pointers on. A plain `kernel[grid](...)` binds
and specialises every argument on every call (11 us of Python for 23 of them).

Three ways to run, one code path in the adapters:
    a GPU            compiled kernels
    interpreter      TRITON_INTERPRET=1 before fastdit is imported: kernels run on CPU tensors, slowly
    `collecting`     a driver that pretends a GPU (testing/aot.py): kernels are compiled, nothing runs
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.torch_version import TorchVersion
from triton.runtime import _allocation, driver

from .. import _facts

VERSION: Any = TorchVersion(triton.__version__)
INTERPRET: bool = triton.knobs.runtime.interpret
_C: Any = torch._C
_runtime: Any = triton.knobs.runtime
_allows_tf32 = _C._get_cublas_allow_tf32  # torch.backends.cuda.matmul.allow_tf32, for a tenth of its cost
_hooks: Any = _runtime.launch_enter_hook  # a chain, empty until a profiler adds to it

_ready: dict[tuple, Callable[..., None]] = {}  # key of a build -> (grid, stream, arguments) -> None
_arch: dict[int, int] = {}
_PROCESSORS = {80: 108, 90: 132, 100: 148, 120: 188}  # of A100, H200, B200, RTX PRO 6000, where they are pretended
collecting: Callable[..., None] | None = None  # (kernel, grid, args, options): set by testing/aot.py only
on_cpu: bool = INTERPRET  # kernels take CPU tensors: the interpreter, and tests that pretend a GPU
_pretended: int | None = None


class _Watching(threading.local):
    launched: list | None = None  # (Launch, tensors, run) of this thread, while `_record` looks on


watching = _Watching()


def unfit(x: Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)) -> str | None:
    """The refusal that all Triton kernels share: None when x is theirs."""
    if not (x.is_cuda or on_cpu):
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
    _facts.forget()


def processors(x: Tensor) -> int:
    """Multiprocessors of x's device: how many programs a persistent kernel starts. Few where none run in parallel."""
    if _pretended is not None:
        return _PROCESSORS.get(_pretended, 128)
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


# ---- launches -----------------------------------------------------------------------------------------------
class Launch:
    """A kernel and all that decides its launch but the tensors: what a plan holds. It keeps none of them alive.

    grid: x up to 2^31 - 1, y and z up to 65,535. numbers: after the tensors; constants: after the numbers.
    """

    __slots__ = ("_runs", "constants", "grid", "kernel", "num_stages", "num_warps", "rest")

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, int, int],
        numbers: tuple,
        constants: tuple,
        num_warps: int = 4,
        num_stages: int = 2,
    ) -> None:
        self.kernel, self.grid, self.constants = kernel, grid, constants
        self.num_warps, self.num_stages = num_warps, num_stages
        self.rest = (*numbers, *constants)
        self._runs: dict[tuple, Callable[..., None]] = {}  # by (dtypes, alignment; None where all pointers have it)

    def __call__(self, *tensors: Any) -> None:
        """Runs on the stream and device of tensors[0]. tensors: Tensor, None or triton's TensorDescriptor."""
        if INTERPRET or collecting is not None or hooked():
            self._build(tensors)
            if watching.launched is not None:
                watching.launched.append((self, tensors, None))
            return
        device = tensors[0].get_device()
        if device != _C._cuda_getDevice():
            with torch.cuda.device(device):
                self(*tensors)
            return
        aligned: tuple | None = None
        try:
            pointers = [t if t is None else t.data_ptr() for t in tensors]
            kinds = tuple([t if t is None else t.dtype for t in tensors])
            for p in filter(None, pointers):
                if p & 15:
                    aligned = tuple([q is None or q & 15 == 0 for q in pointers])
                    break
        except AttributeError:  # a tensor descriptor has neither
            pointers, kinds, aligned = _described(tensors)
        run = self._runs.get((kinds, aligned))
        if run is None:
            key = (id(self.kernel), device, kinds, aligned, self.constants, self.num_warps, self.num_stages)
            run = _ready.get(key)  # hash(kernel) costs 0.5 us
            if run is None:
                self._runs[kinds, aligned] = _ready[key] = run = _runner(self._build(tensors))  # which runs it, too
                if watching.launched is not None:
                    watching.launched.append((self, tensors, None if aligned else run))
                return
            self._runs[kinds, aligned] = run
        if watching.launched is not None:
            watching.launched.append((self, tensors, None if aligned else run))
        run(self.grid, _C._cuda_getCurrentRawStream(device), (*pointers, *self.rest))

    def _build(self, tensors: tuple) -> Any:
        return _slow(self.kernel, self.grid, (*tensors, *self.rest), self.num_warps, self.num_stages)


def hooked() -> bool:
    """A profiler wants to see every launch."""
    return _hooks.calls or _runtime.launch_enter_hook is not _hooks


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    tensors: tuple,
    numbers: tuple,
    constants: tuple,
    num_warps: int = 4,
    num_stages: int = 2,
) -> None:
    """A launch without a plan."""
    Launch(kernel, grid, numbers, constants, num_warps, num_stages)(*tensors)


def _described(tensors: tuple) -> tuple[list, tuple, tuple]:
    """Arguments and what a build depends on of them, where tensor descriptors are among the tensors."""
    pointers = [t.data_ptr() if isinstance(t, Tensor) else t for t in tensors]
    kinds = (
        t.dtype if isinstance(t, Tensor) else t and (t.base.dtype, tuple(t.block_shape), t.padding) for t in tensors
    )
    return pointers, tuple(kinds), tuple(not isinstance(p, int) or p & 15 == 0 for p in pointers)


def _slow(kernel: Any, grid: tuple[int, int, int], args: tuple, num_warps: int, num_stages: int) -> Any:
    if collecting is not None:
        return collecting(kernel, grid, args, {"num_warps": num_warps, "num_stages": num_stages})
    if not INTERPRET:
        _offer_memory()
    return kernel[grid](*args, num_warps=num_warps, num_stages=num_stages)


def _runner(made: Any) -> Callable[..., None]:
    """(grid, stream, arguments) -> None for a compiled kernel, with as little Python in between as is safe.

    `made.run`, Triton's launcher, looks for scratch memory on every call; where the kernel needs none, its C function
    is called with what the launcher would pass.
    """
    launcher, function, packed = made.run, made.function, made.packed_metadata
    scratch = launcher.global_scratch_size if hasattr(launcher, "global_scratch_size") else None
    plain = scratch == 0 and launcher.profile_scratch_size == 0 and type(launcher).__name__ == "CudaLauncher"
    if plain and VERSION.startswith(("3.6.", "3.7.")):
        start, cooperative, pdl = launcher.launch, launcher.launch_cooperative_grid, launcher.launch_pdl
        if hasattr(launcher, "arg_annotations"):  # 3.7
            notes, signature = launcher.arg_annotations, launcher.kernel_signature
            return lambda grid, stream, args: start(
                *grid, stream, function, cooperative, pdl, packed, None, None, None, None, None, notes, signature, args
            )
        return lambda grid, stream, args: start(
            *grid, stream, function, cooperative, pdl, None, None, packed, None, None, None, *args
        )

    def run(grid: tuple[int, int, int], stream: int, args: tuple) -> None:
        if scratch:
            _offer_memory()
        launcher(*grid, stream, function, packed, None, None, None, *args)

    return run


def _offer_memory() -> None:
    """Scratch memory (tensor descriptors made on the device) comes from torch, unless the user set an allocator.

    Triton keeps the allocator in a context variable, which a thread of autograd does not inherit.
    """
    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="cuda")


def target() -> Any:
    """The GPU that Triton compiles for now."""
    return driver.active.get_current_target()


def dot_precision() -> str:
    """How tl.dot multiplies fp32: exactly, unless the user allowed TF32 to torch's own matmuls."""
    return "tf32" if _allows_tf32() else "ieee"


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices by the vendor's GEMM; while launches are only collected it does not run either."""
    return a @ b if collecting is None else a.new_empty(a.shape[0], b.shape[1])
