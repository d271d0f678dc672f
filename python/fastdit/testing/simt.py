"""The CUDA kernels without a GPU: fastdit._cuda_sim runs the same sources on CPU tensors, one thread block at a time.

Every access is checked: bounds to the element, alignment, what was never written, races, missing waits. A fault is a
RuntimeError that names the kernel, the block and the thread. `simulated()` makes it the backend "cuda" of CPU tensors;
`as_card()` says for which card kernels are chosen.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from ..backends import cuda, registry
from ..backends.cuda import _launch

SCHEDULES = ("eager", "lazy", "random")


def module() -> Any:
    """fastdit._cuda_sim; ImportError where it is not built (an editable install with g++ builds it)."""
    return importlib.import_module("fastdit._cuda_sim")


def _call(entry: str, op: str | None, arguments: tuple, reads: Iterable, writes: Iterable) -> Any:
    sim = module()
    if op is None:
        return getattr(sim, entry)(*arguments)
    sim.forget()
    kept = [t for t in reads if t is not None]
    for t in kept:
        _allow(sim, t, True, False)
    for t in writes:
        if t is not None:
            _allow(sim, t, False, True)
    return getattr(sim, entry)((0, 0), op, *arguments)


def _allow(sim: Any, t: Tensor, filled: bool, writable: bool) -> None:
    sim.allow(t.data_ptr(), t.element_size(), list(t.shape), list(t.stride()), filled, writable)


@contextlib.contextmanager
def as_card(sm: int) -> Iterator[None]:
    """Inside the block kernels are chosen for this compute capability: 90 also runs those for sm_90a alone."""
    before, _launch.card = _launch.card, sm
    try:
        yield
    finally:
        _launch.card = before


@contextlib.contextmanager
def simulated(schedule: str = "eager", seed: int = 1) -> Iterator[None]:
    """Inside the block backend="cuda" takes CPU tensors, in this order of threads, blocks and asynchronous copies.
    The card is one of sm_80 unless `as_card` says otherwise."""
    sim = module()
    sim.schedule(schedule, seed)
    if _launch.simulator is not None:  # inside another such block: only the schedule is its own
        yield
        return
    unavailable = registry._unavailable.pop("cuda", None)
    _launch.simulator = _call
    try:
        if _launch._cuda is None:
            for family in cuda.FAMILIES:
                importlib.import_module(f"{cuda.__name__}.{family}").register()
        yield
    finally:
        _launch.simulator = None
        if _launch._cuda is None:
            for op in registry.ops():
                registry._impls[op].pop("cuda", None)
        if unavailable is not None:
            registry.mark_unavailable("cuda", unavailable)
