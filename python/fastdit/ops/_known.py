"""What follows from the facts of a call, in the form that the next call with these facts runs."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..backends import _facts
from ..backends.registry import Impl, recorders

RECENT = 4  # calls of an op; each takes 0.1 us to pass by


def apart(given: Sequence, grad: bool = False) -> list:
    """given, each tensor an object of its own: the q and k of this call may be one, those of the next are not."""
    return [a.detach().requires_grad_(grad and a.requires_grad) if isinstance(a, Tensor) else a for a in given]


def learn(impl: Impl, given: Sequence, args: Sequence, wrt: Sequence[int]) -> Known | None:
    """given: `apart`; args: what the op's check made of them. None where it made a tensor or took one twice that has a
    gradient."""
    positions = {id(a): i for i, a in enumerate(given) if isinstance(a, Tensor)}
    sources = [positions.get(id(a)) for a in args]
    if any(isinstance(a, Tensor) and (j is None or args[j] is not a) for a, j in zip(args, sources, strict=True)):
        return None
    moved = [(i, j) for i, j in enumerate(sources) if j is not None]
    known = Known(impl, args, moved, wrt, all(a is b for a, b in zip(args, given, strict=True)))
    slots = [k for k in known.wrt if k is not None]
    return known if len(set(slots)) == len(slots) else None


class Known:
    """One call: who runs it, on which arguments, and how it is done again. It is recorded when it comes a second time:
    recording takes 0.2 ms, and a pack of ragged lengths may never come again.

    args: its arguments in the order of the schema. moved: (position there, in what is given) of each tensor. wrt: the
    positions of the differentiable ones. same: what is given is the arguments.

    Attributes:
        tensors: from what is given, those that the arguments are made of, each once: all that autograd is shown, since
            it takes 0.2 us for anything else.
        wrt: the place among those of each differentiable argument, or None.
    """

    __slots__ = (
        "_count", "_gradients", "_moved", "_recent", "_record", "_recorder", "_rest", "_seen", "_times",
        "again", "impl", "same", "tensors", "wrt",
    )  # fmt: skip

    def __init__(
        self, impl: Impl, args: Sequence, moved: Sequence[tuple[int, int]], wrt: Sequence[int], same: bool
    ) -> None:
        self.impl, self.same = impl, same
        self._recorder = self._record = recorders.get(impl.backend)
        self._seen, self._gradients = False, list[tuple]()
        self._recent, self._times = (), 0
        self._rest = [None if isinstance(a, Tensor) else a for a in args]  # never written to
        sources = sorted({j for _, j in moved})
        self._moved = [(i, sources.index(j)) for i, j in moved]
        self._count = len(sources)
        places = dict(self._moved)
        self.wrt = [places.get(i) for i in wrt]
        self.tensors: Callable[[Sequence], tuple[Tensor, ...]] = (
            operator.itemgetter(*sources) if len(sources) > 1 else lambda given: tuple([given[j] for j in sources])
        )
        self.again: Callable[[Sequence[Tensor]], Any] | None = None

    def remember(self, calls: list[tuple], given: Sequence, settings: tuple, grad: bool) -> None:
        """Puts this call among the first that are compared with the next one.

        Other tensors may have its facts: with a gradient to get where grad is False, or under autocast. Built twice
        at most, since that takes 3 us.
        """
        if self._times < 2:
            how = _facts.as_recent(given, *settings)
            if how is not None:
                self._recent = (*how, self, grad)
                self._times += 1
        if self._recent:
            calls[:] = [self._recent, *(c for c in calls if c is not self._recent)][:RECENT]

    def arguments(self, tensors: Sequence[Tensor]) -> list:
        """The arguments in the order of the schema."""
        args = self._rest.copy()
        for i, k in self._moved:
            args[i] = tensors[k]
        return args

    def forward(self, tensors: Sequence[Tensor], args: Sequence | None = None) -> Any:
        """args: the arguments, where the caller has them."""
        if self._recorder is None:
            return self.impl.forward(*(self.arguments(tensors) if args is None else args))
        record = self._record  # another thread may be recording, too
        if self.again is not None:
            outputs = self.again(tensors)
            if outputs is not None:
                return outputs
        elif record is not None and self._seen:
            tensors = apart(tensors)
            outputs, self.again = record(self.impl.forward, self.arguments(tensors), tensors)
            self._record = None
            return outputs
        self._seen = True
        return self.impl.forward(*(self.arguments(tensors) if args is None else args))

    def backward(self, grads: Sequence[Tensor | None], saved: Sequence[Tensor], needs: Sequence[bool]) -> Sequence:
        """A gradient for each differentiable argument, None where needs is False. saved: `tensors`, then outputs."""
        if self._recorder is None:
            return self.gradient(grads, saved, needs)
        given = (tuple(needs), *grads, *saved)
        call = _facts.recent(self._gradients, given)
        if call is not None:
            return call[3].again(given)
        how = _facts.as_recent(given)
        if how is not None:
            self._gradients[:] = [(*how, _Gradient(self, given, len(grads))), *self._gradients][:RECENT]
        return self.gradient(grads, saved, needs)

    def gradient(self, grads: Sequence[Tensor | None], saved: Sequence[Tensor], needs: Sequence[bool]) -> Sequence:
        """`backward`, step by step."""
        return self.impl.backward(*grads, *self.arguments(saved), *saved[self._count :], list(needs))


class _Gradient:
    """A backward of one call with certain facts: (needs, the incoming `grads` gradients, what was saved). Like the
    forward it is recorded when it comes a second time."""

    __slots__ = ("_grads", "_known", "_list", "_places", "_record", "_spread")

    def __init__(self, known: Known, given: Sequence, grads: int) -> None:
        self._known, self._grads, self._record = known, grads, known._recorder
        self._places = [i for i, a in enumerate(given) if isinstance(a, Tensor)]
        self._list: Callable[[Sequence[Tensor]], Any] | None = None
        # of each gradient: which of the list's results it is, or ~(its place in what is given)
        self._spread: list[int | None] = []

    def again(self, given: Sequence) -> Sequence:
        if self._list is not None:
            made = self._list(tuple([given[i] for i in self._places]))
            if made is not None:
                return [None if k is None else made[k] if k >= 0 else given[~k] for k in self._spread]
        record, self._record = self._record, None
        # of two tensors in one place an adapter may take a way that others with these facts have not
        if record is None or len({given[i].data_ptr() for i in self._places}) < len(self._places):
            return self._run(given)
        given = apart(given)
        passed = {id(given[i]): ~i for i in self._places}  # a residual's gradient is the incoming one
        found: list = []

        def backward(*given: Any) -> tuple:
            found[:] = self._run(given)
            return tuple(g for g in found if g is not None and id(g) not in passed)

        _, again = record(backward, given, [given[i] for i in self._places])
        count = itertools.count()
        self._spread = [None if g is None else passed[id(g)] if id(g) in passed else next(count) for g in found]
        self._list = again  # last: another thread may be looking
        return found

    def _run(self, given: Sequence) -> Sequence:
        last = 1 + self._grads
        return self._known.gradient(given[1:last], given[last:], given[0])


def as_it_is(impl: Impl, args: Sequence, wrt: Sequence[int]) -> Known:
    """A call of which nothing is kept."""
    known = Known(impl, args, [(i, i) for i, a in enumerate(args) if isinstance(a, Tensor)], wrt, True)
    known._record = known._recorder = None
    return known
