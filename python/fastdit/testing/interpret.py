"""Triton's interpreter made right, strict and about three times as fast: `install()` before kernels run on CPU tensors.

What Triton 3.7.1's own interpreter gets wrong, and what stands here instead:

- bf16 lives in uint16 there, so arithmetic, comparisons, dots and reductions work on raw bits and casts truncate. Here
  a bf16 value is an fp32 array that holds bf16 numbers: every result is rounded to nearest even when its handle is
  made, NaN and Inf stay; only loads, stores, bitcasts and atomics see 16 bits.
- Numbers take the type that fits their value there. Here they take their annotation (int32 wraps around, int64 does
  not), and floats are fp32 as on a GPU.
- A comparison's result keeps the type of what was compared, tl.maximum propagates NaN, tl.fma rounds twice, tl.dot of
  fp32 ignores its `input_precision`. Here they do what the hardware does; TF32 drops 13 bits of both factors.

What the GPU leaves undefined, the interpreter makes visible:

- A load or store of an unmasked lane outside every tensor of the launch raises `OutOfBounds`.
- Lanes that a mask switches off without `other=` hold NaN (the largest integer), not zero.
- A dot's K is at least 16, as on the card.

Speed: the language is patched once a launch, not for every call of a device function; operands take shortcuts
(interpret_semantic.py); overflow checks whose result nobody reads are off; combine functions work on halves, not
element by element.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter as base
from triton.runtime.errors import InterpreterError
from triton.runtime.jit import _normalize_ty
from triton.tools.tensor_descriptor import TensorDescriptor

from . import interpret_ops as ops, interpret_semantic
from .interpret_ops import Handle, OutOfBounds, bounds

__all__ = ["OutOfBounds", "install", "plain"]

_MISSING: Any = object()

# Launches -----------------------------------------------------------------------------------------


def _patch_attr(obj, name, member, builder, scope):
    semantic = base.interpreter_semantic

    def call(*args, **kwargs):
        kwargs["_semantic"] = semantic
        return member(*args, **kwargs)

    scope.set_attr(obj, name, call)


class _Language:
    """triton.language while kernels run: the interpreter's functions, gathered once and swapped in for a launch."""

    def __init__(self) -> None:
        self.depth = 0
        self.changes: list[tuple[Any, str, Any, Any]] | None = None

    def gather(self) -> list[tuple[Any, str, Any, Any]]:
        scope = base._LangPatchScope()
        for lang in (tl.core, tl):
            base._patch_builtin(lang, base.interpreter_builder, scope)
            base._patch_builtin(lang.tensor, base.interpreter_builder, scope)
            base._patch_lang_tensor(lang.tensor, scope)
            base._patch_lang_core(lang, scope)
        base._patch_builtin(tl.math, base.interpreter_builder, scope)
        base._patch_builtin(tl.core.tensor_descriptor_base, base.interpreter_builder, scope)
        first: dict[tuple[int, str], tuple[Any, str, Any]] = {}
        for obj, name, original in scope._changes:
            first.setdefault((id(obj), name), (obj, name, original))
        changes = [(obj, name, original, getattr(obj, name)) for obj, name, original in first.values()]
        scope.restore()
        return changes

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        if self.changes is None:
            self.changes = self.gather()
        if self.depth == 0:
            for obj, name, _, new in self.changes:
                setattr(obj, name, new)
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0:
                for obj, name, original, _ in self.changes:
                    if original is base._MISSING:
                        delattr(obj, name)
                    else:
                        setattr(obj, name, original)


_language = _Language()


def _number(name: str, value: Any, annotation: Any) -> Any:
    """A launch argument that is no tensor, in its annotated type; without one, as the compiler types it."""
    if isinstance(value, float):
        dtype = annotation if isinstance(annotation, tl.dtype) else tl.float32
    elif isinstance(value, bool):
        dtype = tl.int1
    elif isinstance(value, int):
        fits = next((t for t in (tl.int32, tl.int64, tl.uint64) if _holds(t, value)), tl.uint64)
        dtype = annotation if isinstance(annotation, tl.dtype) else fits
    else:
        return base._implicit_cvt(value)  # None, tuples
    if dtype.is_int() and not dtype.is_bool() and not _holds(dtype, value):
        raise OverflowError(f"{name} = {value} does not fit {dtype}")
    return tl.tensor(Handle(np.array([value], ops.np_dtype(dtype)), dtype), dtype)


def _holds(dtype: tl.dtype, value: int) -> bool:
    info = np.iinfo(ops.np_dtype(dtype))
    return int(info.min) <= value <= int(info.max)


def _flat(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, TensorDescriptor):
        yield value.base
    elif isinstance(value, tuple):
        for v in value:
            yield from _flat(v)


def _run(self, *args, grid, warmup, **kwargs):
    if warmup:
        return
    facts = self.__dict__.get("_facts")
    if facts is None:
        hints = self.fn.__annotations__
        constants = {name for name in self.arg_names if _normalize_ty(hints.get(name, "")) == "constexpr"}
        facts = self._facts = (inspect.signature(self.fn), constants, hints)
    signature, constants, hints = facts
    bound = signature.bind(*args, **{k: v for k, v in kwargs.items() if k in signature.parameters})
    bound.apply_defaults()
    tensors = [t for value in bound.arguments.values() for t in _flat(value)]
    if not all(t.device.type == "cpu" for t in tensors):
        raise TypeError("the interpreter takes CPU tensors")
    fn, builder = self.rewrite(), base.interpreter_builder
    with _language.active(), np.errstate(all="ignore"):
        values = {
            name: value
            if name in constants
            else base._implicit_cvt(value)
            if isinstance(value, (torch.Tensor, TensorDescriptor))
            else _number(name, value, hints.get(name))
            for name, value in bound.arguments.items()
        }
        grid = grid(bound.arguments) if callable(grid) else grid
        grid = (*grid, 1, 1)[:3]
        builder.set_grid_dim(*grid)
        bounds.enter(tensors)
        try:
            for x in range(grid[0]):
                for y in range(grid[1]):
                    for z in range(grid[2]):
                        builder.grid_idx = (x, y, z)
                        fn(**values)
        except Exception as e:
            raise InterpreterError(repr(e)) from e
        finally:
            bounds.starts = None


def _call(self, *args, **kwargs):
    """A device function: the language is already the interpreter's."""
    with contextlib.nullcontext() if _language.depth else _language.active():
        return self.rewrite()(*args, **kwargs)


# Installing ---------------------------------------------------------------------------------------


def _min_dot_size(lhs: tl.dtype, rhs: tl.dtype) -> tuple[int, int, int]:
    return (1, 1, 32 if lhs.scalar.primitive_bitwidth == 8 else 16)


_triton_load = TritonSemantic.load


def _load(self, ptr, mask, other, *options):
    """Triton passes `other` on only `if other`, which one zero that is no block denies: here it is remembered."""
    ops.filled = other is not None
    return _triton_load(self, ptr, mask, other, *options)


def _patches() -> Iterator[tuple[Any, str, Any]]:
    yield from ((base, "_get_np_dtype", ops.np_dtype), (base, "_validate_np_data_size", ops.fits))
    yield from ((base, "_patch_attr", _patch_attr), (Handle, "__post_init__", ops.post_init))
    yield from interpret_semantic.patches()
    yield TritonSemantic, "load", _load
    yield from ((base.InterpretedFunction, "run", _run), (base.InterpretedFunction, "__call__", _call))
    yield from (
        (base.ReduceOps, "generic_reduce", ops.generic_reduce),
        (base.ScanOps, "generic_scan", ops.generic_scan),
    )
    quiet = base.InterpreterOptions(sanitize_overflow=False)
    least = {**base.interpreter_builder.codegen_fns, "min_dot_size": _min_dot_size}
    yield from ((base.interpreter_builder, "options", quiet), (base.interpreter_builder, "codegen_fns", least))
    yield from ((base.InterpreterBuilder, name, function) for name, function in ops.functions())


_originals: list[tuple[Any, str, Any]] | None = None


def install() -> None:
    """Idempotent. Kernels of this process run under the rules above from now on."""
    global _originals
    if _originals is not None:
        return
    _originals = []
    for obj, name, new in _patches():
        _originals.append((obj, name, vars(obj).get(name, _MISSING)))
        setattr(obj, name, new)


@contextlib.contextmanager
def plain() -> Iterator[None]:
    """Inside the block the interpreter is Triton's own: what the self-test shows to be wrong."""
    global _originals
    undo, _originals = _originals or [], None
    for obj, name, original in reversed(undo):
        if original is _MISSING:
            delattr(obj, name)
        else:
            setattr(obj, name, original)
    try:
        yield
    finally:
        if undo:
            install()
