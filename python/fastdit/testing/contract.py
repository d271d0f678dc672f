"""The checks that every op must pass, once, for every family: tests/test_<family>.py runs them over its samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from .. import ops
from . import close
from .poison import poisoned
from .workloads import Maker, Sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def public(op: str) -> Callable:
    return getattr(ops, op)


def _double(tree):
    return tree_map(lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t, tree)


def _leaves(sample: Sample, args: tuple, kwargs: dict) -> tuple[tuple, dict, list[Tensor]]:
    """Fresh differentiable copies (layouts kept) of every floating argument that has a gradient."""
    leaves: list[Tensor] = []

    def leaf(t):
        if not isinstance(t, Tensor) or not t.is_floating_point():
            return t
        leaves.append(t.detach().requires_grad_())
        return leaves[-1]

    new_args = tree_map(leaf, args)
    new_kwargs = {k: v if k in sample.fixed else tree_map(leaf, v) for k, v in kwargs.items()}
    return new_args, new_kwargs, leaves


def forward(sample: Sample, dtype: torch.dtype, backend: str, device: str = "cpu") -> list[close.Errors]:
    """The backend against the fp64 reference under the tolerance policy, in poisoned memory."""
    args, kwargs = sample.make(Maker(dtype, device))
    op = public(sample.op)
    with torch.no_grad():
        with poisoned():
            actual = close.flat(op(*args, **kwargs, backend=backend))
        baseline = close.flat((sample.baseline or _reference(op))(*args, **kwargs))
        if sample.moves:
            for a, b in zip(actual, baseline, strict=True):
                close.assert_bitwise(a, b, f"{sample} {dtype} {backend}")
            return [close.errors(a, a, a) for a in actual]
        wide_args, wide_kwargs = _double((args, kwargs))
        truth = close.flat(op(*wide_args, **wide_kwargs, backend="reference"))
    return [
        close.assert_close(a, t, b, f"{sample} {dtype} {backend} output {i}")
        for i, (a, t, b) in enumerate(zip(actual, truth, baseline, strict=True))
    ]


def backward(sample: Sample, dtype: torch.dtype, backend: str, device: str = "cpu") -> list[close.Errors]:
    """Every gradient of the backend against the fp64 reference's."""
    args, kwargs = sample.make(Maker(dtype, device))
    op = public(sample.op)
    maker = Maker(dtype, device, seed=1)
    outputs = [o for o in close.flat(op(*args, **kwargs, backend="reference")) if o.is_floating_point()]
    cotangents = [maker.randn(*o.shape, dtype=o.dtype) for o in outputs]

    def grads(call: Callable, args, kwargs, cotangents) -> list[Tensor | None]:
        args, kwargs, leaves = _leaves(sample, args, kwargs)
        out = [o for o in close.flat(call(*args, **kwargs)) if o.is_floating_point()]
        pairs = [(o, g) for o, g in zip(out, cotangents, strict=True) if o.requires_grad]
        return list(torch.autograd.grad([o for o, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True))

    with poisoned():
        actual = grads(lambda *a, **k: op(*a, **k, backend=backend), args, kwargs, cotangents)
    baseline = grads(sample.baseline or _reference(op), args, kwargs, cotangents)
    wide_args, wide_kwargs = _double((args, kwargs))
    truth = grads(_reference(op), wide_args, wide_kwargs, _double(cotangents))
    found = []
    for i, (a, t, b) in enumerate(zip(actual, truth, baseline, strict=True)):
        if (a is None) != (t is None):
            raise AssertionError(f"{sample} {dtype} {backend}: gradient {i} is {'missing' if a is None else 'extra'}")
        if a is not None and t is not None:
            found.append(
                close.assert_close(a, t, t.to(a.dtype) if b is None else b, f"{sample} {dtype} {backend} grad {i}")
            )
    return found


def _reference(op: Callable) -> Callable:
    return lambda *args, **kwargs: op(*args, **kwargs, backend="reference")


class _Record(TorchDispatchMode):
    """Collects the fastdit ops that a call reaches; an active mode also routes the call through torch.ops."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastdit":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def torch_calls(
    sample: Sample, backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> list[tuple[Any, tuple]]:
    """The torch.ops.fastdit calls behind a public call, forward and backward, with their arguments."""
    args, kwargs = sample.make(Maker(dtype, device))
    args, kwargs, leaves = _leaves(sample, args, kwargs)
    with _Record() as record:
        out = [o for o in close.flat(public(sample.op)(*args, **kwargs, backend=backend)) if o.requires_grad]
        if out:
            torch.autograd.grad([o.float().sum() for o in out], leaves, allow_unused=True)
    return record.calls


def opcheck(sample: Sample, backend: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> int:
    """All torch.library.opcheck utilities on every op behind the call; returns how many ops were checked."""
    calls = torch_calls(sample, backend, device, dtype)
    if not calls:
        raise AssertionError(f"{sample}: no torch.ops.fastdit call was reached")
    for func, args in calls:
        # a backward op's own autograd raises by design: it is checked without requires_grad
        keep = "backward" not in func.name()
        fresh = tree_map(
            lambda t, keep=keep: (
                t.detach().clone().requires_grad_(keep and t.requires_grad) if isinstance(t, Tensor) else t
            ),
            args,
        )
        torch.library.opcheck(func, fresh)
    return len(calls)


def paths_equal(sample: Sample, dtype: torch.dtype, backend: str, device: str = "cpu", calls: int = 1) -> None:
    """The eager fast path and torch.ops give the same bits, forward and backward.

    calls: with other values each, known by their facts from the second on, and recorded from the third.
    """
    op = public(sample.op)
    for seed in range(calls):
        args, kwargs = sample.make(Maker(dtype, device, seed=seed))

        def run(args=args, kwargs=kwargs):
            a, k, leaves = _leaves(sample, args, kwargs)
            out = [o for o in close.flat(op(*a, **k, backend=backend)) if o.is_floating_point()]
            wanted = [o for o in out if o.requires_grad]
            grads = torch.autograd.grad([o.double().sum() for o in wanted], leaves, allow_unused=True) if wanted else ()
            return [*out, *(g for g in grads if g is not None)]

        direct = run()
        with _Record():
            routed = run()
        for i, (a, b) in enumerate(zip(direct, routed, strict=True)):
            close.assert_bitwise(a, b, f"{sample} {dtype} {backend} call {seed} tensor {i}: fast path and torch.ops")


def _own_memory(t):
    # numeric derivatives cannot nudge one element of a stride-0 view
    return t.contiguous() if isinstance(t, Tensor) and 0 in t.stride() else t


def gradcheck(sample: Sample, backend: str) -> None:
    args, kwargs = tree_map(_own_memory, sample.make(Maker(torch.float64, n=4)))
    args, kwargs, leaves = _leaves(sample, args, kwargs)
    spots = {id(t): i for i, t in enumerate(leaves)}

    def call(*values):
        a, k = tree_map(lambda t: values[spots[id(t)]] if id(t) in spots else t, (args, kwargs))
        return tuple(o for o in close.flat(public(sample.op)(*a, **k, backend=backend)) if o.requires_grad)

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


def compile_dynamic(
    sample: Sample,
    backend: str,
    lengths: tuple[int, ...] = (6, 8, 12, 20),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> None:
    """fullgraph=True over several token counts: no graph break, one static and one dynamic graph, the eager result."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    op = public(sample.op)

    def call(args, kwargs):
        return op(*args, **kwargs, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for n in lengths:
        args, kwargs = sample.make(Maker(dtype, device, n=n))
        eager = close.flat(call(args, kwargs))
        graph = close.flat(compiled(args, kwargs))
        for a, b in zip(graph, eager, strict=True):
            close.assert_bitwise(a, b, f"{sample} {backend} n={n}: compiled and eager")
    if counter.frame_count > 2:
        raise AssertionError(
            f"{sample} {backend}: {counter.frame_count} graphs for {len(lengths)} lengths, expected at most 2"
        )


def threads_equal(sample: Sample, dtype: torch.dtype, backend: str) -> None:
    """Bitwise the same result for any thread count."""
    args, kwargs = sample.make(Maker(dtype, n=90))  # whose thirds and halves are no multiples of a group of 4 rows
    before = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(close.flat(public(sample.op)(*args, **kwargs, backend=backend)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            close.assert_bitwise(a, b, f"{sample} {dtype} {backend}: threads")
