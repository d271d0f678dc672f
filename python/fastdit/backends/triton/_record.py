"""A forward, done once under observation and from then on as a list: what it allocates, what it launches.

For the facts of its arguments (`.._facts`) an adapter always does the same: it allocates, and launches kernels with the
same grids and numbers on the pointers of its arguments and of what it allocated. Doing that again costs a few us,
finding it out tens. An adapter that also computes with torch (a copy of a strided index, a cat) or describes boxes of a
tensor to TMA is no such list, and runs as it is every time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _launch
from ._launch import watching

_aten = torch.ops.aten
_ALLOCATIONS = {
    _aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default,
    _aten.new_empty_strided.default,
}  # fmt: skip


class _Watch(TorchDispatchMode):
    """Notes what is allocated, and whether anything is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.computes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _ALLOCATIONS:
            self.made.append(out)
        elif not func.is_view:
            self.computes = True
        return out


def record(forward: Callable, args: Sequence, tensors: Sequence[Tensor]) -> tuple[Any, Callable | None]:
    """`registry.recorders`; tensors: those of args, each an object of its own."""
    if _launch.INTERPRET or _launch.collecting is not None:
        return forward(*args), None
    before, watching.launched = watching.launched, []
    try:
        with _Watch() as watch:
            outputs = forward(*args)
        launched = watching.launched
    finally:
        watching.launched = before
    return outputs, None if watch.computes else _listed(tensors, watch.made, launched, outputs)


def _listed(tensors: Sequence[Tensor], made: list[Tensor], launched: list, outputs: Any) -> Callable | None:
    bases = [*tensors, *made]
    storages: dict[int, list[int]] = {}
    for i, t in enumerate(bases):
        storages.setdefault(t.untyped_storage().data_ptr(), []).append(i)
    inputs = {id(t): i for i, t in enumerate(tensors)}
    nothing = len(bases)  # where the pointers have a None
    views: list[tuple[int, int]] = []  # after that: (base, bytes behind its pointer)

    def source(t: Tensor) -> int:
        """The position of its base; ValueError where it is not known whose view it is."""
        i = inputs.get(id(t))
        if i is None:  # torch hands out what it allocates under a second identity
            (i,) = storages.get(t.untyped_storage().data_ptr(), [])
        return i

    def place(t: Tensor | None) -> int:
        if t is None:
            return nothing
        base = source(t)
        if t.data_ptr() == bases[base].data_ptr():
            return base
        views.append((base, t.data_ptr() - bases[base].data_ptr()))
        return nothing + len(views)

    def result(t: Tensor) -> int:
        i = source(t) - len(tensors)
        if i < 0 or t.shape != made[i].shape or t.stride() != made[i].stride() or t.dtype != made[i].dtype:
            raise ValueError
        return i

    launches = []
    try:
        for launch, operands, run in launched:
            if run is None:  # a pointer that is no multiple of 16 wants a build of its own
                return None
            launches.append((run, launch.grid, tuple(map(place, operands)), launch.rest))
        results = [result(t) for t in ((outputs,) if isinstance(outputs, Tensor) else outputs)]
    except (AttributeError, ValueError):  # TMA's boxes; a tensor from elsewhere, or a view of two
        return None
    device = tensors[0].device
    if any(t.device != device for t in bases):
        return None
    allocations = tuple(_allocation(t, tensors) for t in made)
    found: Any = results[0] if isinstance(outputs, Tensor) else tuple(results)
    return _Again(tensors[0].get_device(), (allocations, tuple(views), tuple(launches), found))


def _allocation(t: Tensor, tensors: Sequence[Tensor]) -> tuple[int, tuple, tuple, torch.dtype | None]:
    """The tensor to make it like, shape, strides, and the dtype where it differs: a dtype costs 0.7 us."""
    like = next((i for i, x in enumerate(tensors) if x.dtype == t.dtype), 0)
    return like, tuple(t.shape), t.stride(), None if tensors[like].dtype == t.dtype else t.dtype


class _Again:
    """The list, on other tensors with the same facts; None where a pointer, a profiler or the device forbids it.

    listed: (like, shape, strides, dtype or None) of each allocation; (base, bytes behind it) of each view; (run, grid,
    places of its pointers, rest) of each launch; the places of the outputs among the allocations.
    """

    __slots__ = ("_device", "_listed")

    def __init__(self, device: int, listed: tuple) -> None:
        self._device, self._listed = device, listed

    def __call__(self, tensors: tuple[Tensor, ...]) -> Any:
        if self._device != _launch._C._cuda_getDevice() or _launch.hooked():
            return None
        return again(self._listed, tensors, _launch._C._cuda_getCurrentRawStream(self._device))


def _again(listed: tuple, tensors: Sequence[Tensor], stream: int) -> Any:
    allocations, views, launches, results = listed
    pointers: list[Any] = [t.data_ptr() for t in tensors]
    if any(p & 15 for p in pointers):
        return None
    made = []
    for like, shape, stride, dtype in allocations:
        options = {} if dtype is None else {"dtype": dtype}
        made.append(tensors[like].new_empty_strided(shape, stride, **options))
    pointers += [t.data_ptr() for t in made]
    pointers.append(None)
    pointers += [pointers[base] + offset for base, offset in views]
    for run, grid, places, rest in launches:
        run(grid, stream, (*[pointers[i] for i in places], *rest))
    return made[results] if isinstance(results, int) else tuple([made[i] for i in results])


try:
    from ..._cpu import again
except ImportError:  # the CPU backend tells why
    again = _again
