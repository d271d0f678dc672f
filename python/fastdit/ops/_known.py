"""What follows from the facts of a call, in the form that the next call with these facts runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..backends.registry import Impl, recorders


def apart(given: Sequence, grad: bool = False) -> list:
    """given, each tensor an object of its own: the q and k of this call may be one, those of the next are not."""
    return [a.detach().requires_grad_(grad and a.requires_grad) if isinstance(a, Tensor) else a for a in given]


def learn(impl: Impl, given: Sequence, args: Sequence) -> Known | None:
    """given: `apart`; args: what the op's check made of them. None where it made a tensor."""
    positions = {id(a): i for i, a in enumerate(given) if isinstance(a, Tensor)}
    sources = [positions.get(id(a)) for a in args]
    if any(isinstance(a, Tensor) and (j is None or args[j] is not a) for a, j in zip(args, sources, strict=True)):
        return None
    same = all(a is b for a, b in zip(args, given, strict=True))
    return Known(impl, args, [(i, j) for i, j in enumerate(sources) if j is not None], same)


class Known:
    """One call: who runs it, on which arguments, and how it is done again. It is recorded when it comes a second time:
    recording takes 0.2 ms, and a pack of ragged lengths may never come again.

    args: its arguments in the order of the schema. moved: (position there, in what is given) of each tensor; the
    arguments may be given, too. same: what is given is the arguments.
    """

    __slots__ = ("_moved", "_record", "_same", "_seen", "again", "impl", "places", "rest", "tensors")

    def __init__(self, impl: Impl, args: Sequence, moved: Sequence[tuple[int, int]], same: bool) -> None:
        self.impl, self._moved, self._same = impl, moved, same
        self._record, self._seen = recorders.get(impl.backend), False
        self.rest = [None if isinstance(a, Tensor) else a for a in args]  # never written to
        self.places = [i for i, _ in moved]
        sources = sorted({j for _, j in moved})
        self.tensors: Callable[[Sequence], tuple[Tensor, ...]] = (
            operator.itemgetter(*sources) if len(sources) > 1 else lambda given: tuple([given[j] for j in sources])
        )
        self.again: Callable[[tuple[Tensor, ...]], Any] | None = None

    def arguments(self, given: Sequence) -> Sequence:
        """The arguments in the order of the schema."""
        if self._same:
            return given
        args = self.rest.copy()
        for i, j in self._moved:
            args[i] = given[j]
        return args

    def forward(self, given: Sequence) -> Any:
        record = self._record  # another thread may be recording, too
        if self.again is not None:
            outputs = self.again(self.tensors(given))
            if outputs is not None:
                return outputs
        elif record is not None and self._seen:
            given = apart(given)
            outputs, self.again = record(self.impl.forward, self.arguments(given), self.tensors(given))
            self._record = None
            return outputs
        self._seen = True
        return self.impl.forward(*self.arguments(given))


def as_it_is(impl: Impl, args: Sequence) -> Known:
    """A call of which nothing is kept."""
    known = Known(impl, args, [(i, i) for i, a in enumerate(args) if isinstance(a, Tensor)], True)
    known._record = None
    return known
