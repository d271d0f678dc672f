"""qk_norm_rope_ : the in-place form, a schema of its own, (Tensor(a!) q, Tensor(b!) k, ...) -> ()."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends import registry
from . import _explain, _op
from .rotary_check import OP

_NAME = "qk_norm_rope_"
_BRANCHES = 4096  # more than any view of a real tensor needs


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two strided tensors share an element; exact for every view that slicing and reshaping can make.

    Looks for indices with address_a + sum(i_d * stride_d) == address_b + sum(j_d * stride_d): from the largest stride
    down, only the few values from which the smaller strides can still reach the target are tried.
    """
    if a.numel() == 0 or b.numel() == 0 or a.device.type == "meta":
        return False
    lower, upper = (a, b) if a.data_ptr() <= b.data_ptr() else (b, a)
    last = sum((size - 1) * stride for size, stride in zip(lower.shape, lower.stride(), strict=True))
    if upper.data_ptr() > lower.data_ptr() + last * lower.element_size():
        return False
    reach: dict[int, list[int]] = {}  # stride -> least and greatest i - j
    for tensor, end, sign in ((a, 1, 1), (b, 0, -1)):
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            if size > 1 and stride > 0:
                reach.setdefault(stride, [0, 0])[end] += sign * (size - 1)
    dims = sorted(reach.items(), reverse=True)
    below, above = [0], [0]  # [d]: what dims d, d + 1, ... span
    for stride, (low, high) in reversed(dims):
        below.insert(0, below[0] + low * stride)
        above.insert(0, above[0] + high * stride)
    targets = {(b.data_ptr() - a.data_ptr()) // a.element_size()}
    for d, (stride, (low, high)) in enumerate(dims):
        following: set[int] = set()
        for target in targets:
            first = max(low, -((above[d + 1] - target) // stride))
            last = min(high, (target - below[d + 1]) // stride)
            if last - first > _BRANCHES:
                return True
            following.update(target - i * stride for i in range(first, last + 1))
        targets = following
        if len(targets) > _BRANCHES:
            return True
    return 0 in targets


def _self_overlap(t: Tensor) -> bool:
    if t.is_contiguous():
        return False
    span = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1:
            if stride < span:
                return True
            span = stride * (size - 1) + span
    return False


def _refuse_shared_memory(q: Tensor, k: Tensor) -> None:
    for what, t in (("q", q), ("k", k)):
        if t.numel() and _self_overlap(t):
            raise ValueError(
                f"{OP}: {what} cannot be written in place; got strides {tuple(t.stride())} for {list(t.shape)}, "
                "expected every element at an address of its own; use inplace=False."
            )
    if overlap(q, k):
        raise ValueError(
            f"{OP}: q and k overlap; got two views of the same elements with inplace=True, expected separate ones; "
            "use inplace=False."
        )


def define(arguments: str, validate) -> None:
    """Registers the schema, its kernel and its fake kernel; arguments: those of qk_norm_rope after q and k."""

    def run(*args):
        args, backend = args[:-1], args[-1]
        _refuse_shared_memory(args[0], args[1])
        if args[0].device.type == "cpu" or _op.CHECK_INDICES:
            validate(*args)
        registry.get(_NAME, backend).forward(*args)

    _op.LIB.define(f"{_NAME}(Tensor(a!) q, Tensor(b!) k, {arguments}, str backend) -> ()")
    _op.LIB.impl(_NAME, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastdit::{_NAME}", lambda *args: None, lib=_op.LIB)


def call(backend: str | None, validate, *args) -> None:
    q, k = args[0], args[1]
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args):
        raise ValueError(
            f"{OP}: inplace=True under grad; got an argument that requires grad, expected none; "
            "use inplace=False or torch.no_grad()."
        )
    if _explain.probe.calls is not None:
        _explain.intercept(OP, args, backend)
    impl = registry.select(_NAME, args, backend)
    if torch.compiler.is_compiling() or not _op._ordinary(args):
        torch.ops.fastdit.qk_norm_rope_(*args, impl.backend)
        return
    _refuse_shared_memory(q, k)
    if q.device.type == "cpu" or _op.CHECK_INDICES:
        validate(*args)
    impl.forward(*args)
