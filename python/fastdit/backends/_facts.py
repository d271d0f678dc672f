"""What follows from the facts of a call, found once: checks that passed, and plans of launches.

The facts of a tensor are its shape, strides, dtype and device; those of anything else are its value. Neither a pointer
nor an element is one, so nothing here looks into memory or keeps a tensor alive.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")
MOST = 4096  # facts of one function: what ragged shapes leave behind before it starts anew
_VALUES = frozenset((type(None), bool, int, float, str, tuple, torch.Size))
_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_C: Any = torch._C
_all: list[dict[tuple, Any] | list[tuple]] = []


def _place(t: Tensor) -> Any:
    """The number of the accelerator's device, of which a torch has one kind; True for the CPU, else the device."""
    index = t.get_device()
    return index if index >= 0 else t.is_cpu or t.device


def _facts(args: tuple) -> tuple | None:
    """The facts of args, as `kept` says them; None where there is an argument whose facts cannot be kept."""
    found: list = []
    for a in args:
        if type(a) in _VALUES:
            found.append(a)
        elif type(a) not in _TENSORS:
            return None
        else:
            try:
                found += (a.shape, a.stride(), a.dtype, _place(a))
            except RuntimeError:  # a layout without strides
                return None
    return tuple(found)


try:
    from .. import _cpu
except ImportError:  # the CPU backend tells why
    facts = _facts

    def recent(calls: list[tuple], given: tuple, *settings: Any) -> tuple | None:
        return None

    def any_of(questions: tuple[Callable[[], Any], ...]) -> bool:
        return any(question() for question in questions)
else:
    _cpu.facts_types(Tensor, torch.nn.Parameter, torch.Size)
    facts = _cpu.facts  # the same in half the time
    recent = _cpu.recent
    any_of = _cpu.any_of


def memory() -> dict[tuple, Any]:
    """A dict that `forget` clears, for what follows from facts."""
    made: dict[tuple, Any] = {}
    _all.append(made)
    return made


def recents() -> list[tuple]:
    """A list that `forget` clears, for `recent`: calls as (all_same(tensors), constants, settings, ...)."""
    made: list[tuple] = []
    _all.append(made)
    return made


def as_recent(given: Sequence, *settings: Any) -> tuple | None:
    """A call as `recent` knows it again, in a third of the time that finding its facts takes.

    By torch.compile's guard of tensors: type, shape, strides, dtype, device, requires_grad and dispatch keys, which
    autocast and inference change. It never knows a call again that passes one tensor twice: None for such a one, and
    where this torch has it in another form.
    """
    tensors = [a for a in given if isinstance(a, Tensor)]
    if len(set(map(id, tensors))) < len(tensors):
        return None
    try:
        check = _C._dynamo.guards.TensorGuards(
            *tensors,
            dynamic_dims_sizes=[list(t.shape) for t in tensors],
            dynamic_dims_strides=[list(t.stride()) for t in tensors],
        ).check
        if not check(*tensors):
            return None
    except Exception:
        return None
    return check, tuple(... if isinstance(a, Tensor) else a for a in given), settings


def kept(make: Callable[..., Made]) -> Callable[..., Made]:
    """Keeps what `make` returns, by the facts of its arguments; what it raises is raised anew.

    make may ask nothing else of a tensor and may return none; a global setting that it depends on is an argument, or
    `forget` is called where that changes. A tuple holds plain values, never tensors; values that are equal (1 and 1.0)
    are one fact, so make judges no types of numbers. Lists, symbolic sizes, fake tensors and subclasses are never kept,
    and under torch.compile nothing is: make runs. None is not kept either.
    """
    found: dict[tuple, Made] = memory()

    @functools.wraps(make)
    def known(*args: Any) -> Made:
        if torch.compiler.is_compiling():
            return make(*args)
        key = facts(args)
        if key is None:
            return make(*args)
        try:
            made = found.get(key)
        except TypeError:  # a tuple that holds a list
            return make(*args)
        if made is None:
            made = make(*args)
            if len(found) >= MOST:
                found.clear()
            found[key] = made
        return made

    return known


def forget() -> None:
    """Drops everything kept: after a choice of tiles changed, or the architecture was pretended."""
    for found in _all:
        found.clear()
