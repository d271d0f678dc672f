"""Which implementation serves a call: one table of `Impl`, an ordered list per device, the reasons for every refusal.

Selection runs in plain Python before the torch op, reads only dtype, device, rank and static dims, and so folds away
under Dynamo. An explicit choice (`backend=`, `use_backend`, `set_backend`, `FASTDIT_BACKEND`) never falls back.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

log = logging.getLogger("fastdit")

# Fastest first, per device type. `reference` runs everywhere and closes every list.
AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "flash_attn", "sdpa", "reference"),
}
ELSEWHERE = ("sdpa", "reference")
# Ops with an order of their own on CUDA. No GPU has measured ours yet: dense attention without masks is what the
# vendors' libraries are best at, and Triton's kernels use sm_90's matrix unit, which the CUDA kernels leave idle.
ON_CUDA: dict[str, tuple[str, ...]] = {
    "attention": ("flash_attn", "sdpa", "triton", "cuda", "reference"),
    "attention_varlen": ("triton", "cuda", "flash_attn", "sdpa", "reference"),
    "causal_conv3d": ("triton", "cuda", "reference"),
}
BACKENDS = ("cuda", "triton", "cpu", "flash_attn", "sdpa", "reference")


class NoBackend(RuntimeError):
    """No implementation can run the call; the message holds the reason of each one that was asked."""


@dataclass(frozen=True)
class Impl:
    """One implementation of one op. All three functions take the op's arguments in schema order.

    supports: None when it can run the call, else the reason why not.
    backward: (*grad_outputs, *args, *saved_outputs, needs) -> one grad or None per differentiable argument.
    pays: of an op that fuses others, None where it is the faster way, else the reason; absent: never taken by itself.
    path: which of its kernels serve the call, for `explain`.
    """

    op: str
    backend: str
    supports: Callable[..., str | None]
    forward: Callable
    backward: Callable
    deterministic: bool = True
    backward_backend: str | None = None  # where the gradient runs when it is another backend's
    pays: Callable[..., str | None] | None = None
    path: Callable[..., str] | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"Impl: unknown backend; got {self.backend!r}, expected one of {BACKENDS}; add it there")


_impls: dict[str, dict[str, Impl]] = {}
# By backend, (forward, args, tensors) -> (outputs, again): runs forward(*args); again(tensors) does the same on other
# tensors with the facts of these, or returns None where this time it cannot. again is None where it never can.
recorders: dict[str, Callable[..., tuple]] = {}
_unavailable: dict[str, str] = {}
_logged: set[str] = set()
_default: str | None = os.environ.get("FASTDIT_BACKEND") or None  # read once: os.environ in traced code would freeze
if _default is not None and _default not in BACKENDS:
    raise ValueError(
        f"FASTDIT_BACKEND: unknown backend; got {_default!r}, expected one of {BACKENDS}; unset it for auto"
    )


class _Stack(threading.local):
    def __init__(self) -> None:
        self.names: list[str] = []


_stack = _Stack()  # a plain list: a ContextVar would break fullgraph


def register(impl: Impl) -> None:
    table = _impls.setdefault(impl.op, {})
    if impl.backend in table:
        raise ValueError(f"register: {impl.op} has a {impl.backend} implementation already")
    table[impl.backend] = impl


def mark_unavailable(backend: str, reason: str) -> None:
    """Records why a backend as a whole is missing (extension not built, no driver, ...)."""
    _unavailable[backend] = reason


def unavailable() -> dict[str, str]:
    return dict(_unavailable)


def ops() -> tuple[str, ...]:
    return tuple(_impls)


def implementations(op: str) -> dict[str, Impl]:
    return dict(_impls[op])


def find(op: str, backend: str) -> Impl | None:
    return _impls[op].get(backend)


def get(op: str, backend: str) -> Impl:
    impl = _impls[op].get(backend)
    if impl is None:
        raise NoBackend(f"{op}: backend={backend!r} cannot run it: {_reason(op, backend, ())}")
    return impl


def _known(backend: str, where: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(
            f"{where}: unknown backend; got {backend!r}, expected one of {BACKENDS}; None means the best one"
        )
    return backend


def set_backend(backend: str | None) -> None:
    """Use one backend for every op of the process; None returns to automatic choice."""
    global _default
    _default = None if backend is None else _known(backend, "set_backend")


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Use one backend for every op inside the `with` block, in this thread; raises NoBackend where it cannot run."""
    _stack.names.append(_known(backend, "use_backend"))
    try:
        yield
    finally:
        _stack.names.pop()


def requested(backend: str | None) -> str | None:
    if backend is not None:
        return _known(backend, "backend=")
    return wanted()


def wanted() -> str | None:
    """What `requested(None)` answers, for one call less."""
    return _stack.names[-1] if _stack.names else _default


def order(op: str, x: torch.Tensor) -> tuple[str, ...]:
    if x.is_cpu:  # 0.05 us; device.type costs 0.25
        return AUTO["cpu"]
    if op in ON_CUDA and x.is_cuda:
        return ON_CUDA[op]
    return AUTO.get(x.device.type, ELSEWHERE)


def _reason(op: str, backend: str, args: tuple) -> str | None:
    impl = _impls[op].get(backend)
    if impl is None:
        return _unavailable.get(backend, f"has no {op}")
    return impl.supports(*args) if args else None


def select(op: str, args: tuple, backend: str | None) -> Impl:
    """The implementation for this call, or NoBackend with every reason; args[0] is a tensor and says the device."""
    table = _impls[op]
    x = args[0]
    if backend is not None or _stack.names or _default is not None:
        name = requested(backend)
        assert name is not None
        reason = _reason(op, name, args)
        if reason is None:
            return table[name]
        raise NoBackend(
            f"{op}: backend={name!r} cannot run it on {_describe(args)}: {reason}; pass backend=None for the best one"
        )
    for name in order(op, x):
        impl = table.get(name)
        if impl is not None and impl.supports(*args) is None:
            if name == "reference" and op not in _logged and not torch.compiler.is_compiling():
                _log_reference(op, args)
            return impl
    reasons = "; ".join(f"{name}: {_reason(op, name, args)}" for name in order(op, x))
    raise NoBackend(f"{op}: nothing can run {_describe(args)}: {reasons}")


def _log_reference(op: str, args: tuple) -> None:
    _logged.add(op)
    reasons = "; ".join(f"{name}: {_reason(op, name, args)}" for name in order(op, args[0]) if name != "reference")
    log.warning("%s runs on the slow reference backend (%s)", op, reasons or "no kernels for this device")


def _describe(args: tuple) -> str:
    tensor = next((a for a in args if isinstance(a, torch.Tensor)), None)
    if tensor is None:
        return "no tensor"
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)} on {tensor.device}"


def decisions(op: str, args: tuple, backend: str | None) -> list[tuple[str, str]]:
    """(backend, verdict) for every backend: what `fastdit.explain` prints."""
    try:
        chosen = select(op, args, backend).backend
    except NoBackend:
        chosen = ""
    rows = []
    for name in BACKENDS:
        reason = _reason(op, name, args)
        if name == chosen:
            impl = _impls[op][name]
            also = f", backward: {impl.backward_backend}" if impl.backward_backend else ""
            path = f" ({impl.path(*args)})" if impl.path else ""
            rows.append((name, f"chosen{also}{path}"))
        elif reason is not None:
            rows.append((name, f"no: {reason}"))
        else:
            rows.append((name, "can run" if name in order(op, args[0]) else "can run, never chosen by itself here"))
    return rows
