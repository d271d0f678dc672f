"""From an adapter's call to a kernel: the device, the stream, and every tensor that it reads and writes.

On CUDA tensors the call goes to fastdit._cuda. Tests set `simulator` (testing/simt.py), which takes CPU tensors to the
same kernels in the block simulator; it is why a call names its tensors beside their pointers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

missing = ""  # why there is no module
try:
    from ... import _cuda
except ImportError as error:
    _cuda = None  # type: ignore[assignment]
    missing = f"extension not built ({error}); build from source where nvcc is, with -Ccmake.define.FASTDIT_CUDA=ON"

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_C: Any = torch._C
simulator: Callable[..., Any] | None = None  # (entry, op, arguments, reads, writes): set by testing/simt.py only
card: int | None = None  # the compute capability to choose kernels for, not the card's own: set by testing/simt.py only


def unfit(x: Tensor) -> str | None:
    """The refusal that all CUDA kernels share: None when x is theirs."""
    if not x.is_cuda and (simulator is None or not x.is_cpu):
        return f"needs a CUDA tensor; got {x.device}"
    if x.dtype not in DTYPES:
        return f"has no kernel for {x.dtype}"
    return None


@functools.cache
def _of_device(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability(x: Tensor) -> int:
    """Compute capability of the card that x is on: 90 for sm_90. In the simulator it is 80."""
    if card is not None:
        return card
    return _of_device(x.get_device()) if x.is_cuda else 80


@functools.cache
def _processors_of(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def processors(x: Tensor) -> int:
    """Multiprocessors of the card that x is on; in the simulator those of an H100."""
    return _processors_of(x.get_device()) if x.is_cuda else 132


def launch(
    entry: str, op: str, x: Tensor, arguments: tuple, reads: Iterable[Tensor | None], writes: Iterable[Tensor | None]
) -> None:
    """Runs an entry of fastdit._cuda on the device of x and its current stream. op: whom an error names."""
    if simulator is not None and x.is_cpu:
        simulator(entry, op, arguments, reads, writes)
        return
    device = x.get_device()
    if device != _C._cuda_getDevice():
        with torch.cuda.device(device):
            launch(entry, op, x, arguments, reads, writes)
        return
    getattr(_cuda, entry)((device, _C._cuda_getCurrentRawStream(device)), op, *arguments)


def ask(entry: str, x: Tensor, *arguments: Any) -> Any:
    """What an entry of fastdit._cuda says about a launch to come; nothing runs."""
    if simulator is not None and x.is_cpu:
        return simulator(entry, None, (0, *arguments), (), ())
    return getattr(_cuda, entry)(x.get_device(), *arguments)


@functools.cache
def hopper_built(simulated: bool) -> bool:
    """Whether the module has kernels of sm_90a."""
    built = simulator("hopper_built", None, (0,), (), ()) if simulated and simulator else _cuda.hopper_built(0)
    return bool(built)


def unfit_for_wgmma(x: Tensor) -> str | None:
    """Why the card of x, or the module, has no kernels of sm_90a; None when it has."""
    if capability(x) != 90:
        return f"wgmma needs sm_90; got sm_{capability(x)}"
    if not hopper_built(x.is_cpu):
        return "wgmma needs machine code for sm_90a; FASTDIT_CUDA_ARCHS lacks it"
    return None
