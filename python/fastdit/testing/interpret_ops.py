"""What Triton's interpreter does with numbers and memory, as `interpret.py` mends it: loads and stores, casts,
arithmetic, dots, reductions. A bf16 value is an fp32 array of bf16 numbers; only memory sees 16 bits."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import interpreter as _memory, ir
from triton.runtime import interpreter as base

from .interpret_dot import fp32_dot, round_tf32

Handle = base.TensorHandle
_BUILDER = base.InterpreterBuilder


class OutOfBounds(IndexError):
    """A kernel touched memory that belongs to none of its tensors."""


# bf16 ---------------------------------------------------------------------------------------------

_NUMPY = {
    "int1": np.bool_, "int8": np.int8, "uint8": np.uint8, "int16": np.int16, "uint16": np.uint16,
    "int32": np.int32, "uint32": np.uint32, "int64": np.int64, "uint64": np.uint64,
    "fp16": np.float16, "bf16": np.float32, "fp32": np.float32, "fp64": np.float64,
    "fp8e5": np.uint8, "fp8e5b16": np.uint8, "fp8e4nv": np.uint8, "fp8e4b8": np.uint8, "fp8e4b15": np.uint8,
}  # fmt: skip
_NUMPY_DTYPE = {name: np.dtype(kind) for name, kind in _NUMPY.items()}
_POINTER = np.dtype(np.uint64)


def np_dtype(dtype: tl.dtype) -> np.dtype:
    """The numpy type in which values of `dtype` are held: fp32 for bf16."""
    return _NUMPY_DTYPE.get(dtype.scalar.name, _POINTER)


def _is_bf16(dtype: tl.dtype) -> bool:
    return dtype.scalar.name == "bf16"


def round_bf16(x: np.ndarray) -> np.ndarray:
    """fp32 to the nearest bf16, ties to even, as fp32. NaN stays NaN."""
    bits = x.view(np.uint32)
    if not (bits & np.uint32(0xFFFF)).any():
        return x
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) & np.uint32(0xFFFF0000)
    quiet = (bits | np.uint32(0x00400000)) & np.uint32(0xFFFF0000)
    return np.where(np.isnan(x), quiet, rounded).view(np.float32)


def _narrow(x: np.ndarray) -> np.ndarray:
    return (x.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _stored(handle: Any, dtype: tl.dtype) -> np.ndarray:
    """A handle's data as it lies in memory behind a pointer to `dtype`."""
    if _is_bf16(dtype):
        return _narrow(handle.data.astype(np.float32, copy=False))
    if handle.data.dtype.itemsize != max(1, dtype.primitive_bitwidth // 8):
        raise TypeError(f"a store of {handle.data.dtype} through a pointer to {dtype}")
    return handle.data


def post_init(self) -> None:
    kind = self.dtype.scalar
    if kind.name == "bf16":
        self.data = round_bf16(self.data.astype(np.float32, copy=False))
    elif not kind.is_ptr() and self.data.itemsize * 8 > max(8, kind.primitive_bitwidth):
        raise ValueError(f"{self.data.dtype} does not fit {kind}")


def fits(array: np.ndarray, dtype: tl.dtype) -> bool:
    return _is_bf16(dtype) or dtype.scalar.is_ptr() or array.itemsize * 8 <= max(8, dtype.primitive_bitwidth)


# Memory -------------------------------------------------------------------------------------------


class _Bounds:
    """The memory of one launch: disjoint intervals, sorted. None outside a launch of ours."""

    starts: list[int] | None = None
    ends: list[int]

    def enter(self, tensors: list[torch.Tensor]) -> None:
        spans = []
        for t in tensors:
            if t.numel():
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                spans.append((t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()))
        self.starts, self.ends = [], []
        for start, end in sorted(spans):
            if self.ends and start <= self.ends[-1]:
                self.ends[-1] = max(end, self.ends[-1])
            else:
                self.starts.append(start)
                self.ends.append(end)

    def check(self, pointers: np.ndarray, mask: np.ndarray | None, size: int, what: str) -> None:
        if self.starts is None:
            return
        live = pointers if mask is None or mask.all() else pointers[mask]
        if live.size == 0:
            return
        at = bisect.bisect_right(self.starts, int(live.min())) - 1
        if at >= 0 and int(live.max()) + size <= self.ends[at]:
            return
        spot = np.searchsorted(np.array(self.starts, np.uint64), live, side="right") - 1
        ends = np.array([0, *self.ends], np.uint64)  # a lane below every tensor sees the end 0
        outside = live + np.uint64(size) > ends[spot + 1]
        if outside.any():
            first = int(live[outside].flat[0])
            near = min((abs(first - e), first - e) for e in (*self.starts, *self.ends)) if self.ends else (0, 0)
            raise OutOfBounds(
                f"program {base.interpreter_builder.grid_idx}: {what} of {int(outside.sum())} lanes outside every "
                f"tensor of the launch; the first lies {near[1]} bytes from the nearest edge of one"
            )


bounds = _Bounds()


def _absent(shape: tuple, dtype: np.dtype) -> np.ndarray:
    """What a lane holds that a mask switched off and no `other` filled."""
    return np.full(shape, np.nan if dtype.kind == "f" else True if dtype.kind == "b" else np.iinfo(dtype).max, dtype)


def _lanes(mask: Any) -> np.ndarray:
    return mask if isinstance(mask, np.ndarray) else mask.data  # block pointers and descriptors bring the bare array


def _load(self, pointers, _cache, _eviction, volatile):
    return _read(pointers, None, None)


def _masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
    return _read(ptrs, _lanes(mask), other)


filled = False  # the load at hand has an `other`; set by interpret.py


def _read(pointers: Any, mask: np.ndarray | None, other: Any) -> Any:
    dtype = pointers.get_element_ty()
    wide = np_dtype(dtype)
    memory = np.dtype(np.uint16) if _is_bf16(dtype) else wide
    address = pointers.data
    bounds.check(address, mask, memory.itemsize, "a load")
    if mask is None or (other is None and filled):
        fill = np.zeros(address.shape, memory)
        mask = np.ones(address.shape, bool) if mask is None else mask
    elif other is None:
        fill = _absent(address.shape, wide)
        fill = _narrow(fill) if _is_bf16(dtype) else fill
    else:
        fill = _stored(other, dtype)
    data = _memory.load(address, mask, fill, memory)
    return Handle(_widen(data) if _is_bf16(dtype) else data, dtype)


def _store(self, ptr, val, _cache, _eviction):
    return _masked_store(self, ptr, val, Handle(np.ones(ptr.data.shape, bool), tl.int1), None, None)


def _masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
    data = _stored(value, ptrs.get_element_ty())
    lanes = _lanes(mask)
    bounds.check(ptrs.data, lanes, data.itemsize, "a store")
    return _memory.store(ptrs.data, data, lanes)


_atomic_cas, _atomic_rmw = _BUILDER.create_atomic_cas, _BUILDER.create_atomic_rmw


def _checked_cas(self, ptr, cmp, val, sem, scope):
    bounds.check(ptr.data, None, val.data.itemsize, "an atomic")
    return _atomic_cas(self, ptr, cmp, val, sem, scope)


def _checked_rmw(self, op, ptr, val, mask, sem, scope):
    bf16 = _is_bf16(val.dtype)
    bounds.check(ptr.data, mask.data, 2 if bf16 else val.data.itemsize, "an atomic")
    if not bf16:
        return _atomic_rmw(self, op, ptr, val, mask, sem, scope)
    if op is not ir.ATOMIC_OP.FADD and op != ir.ATOMIC_OP.FADD:
        raise NotImplementedError(f"{op} of bf16")
    before = np.zeros(ptr.data.shape, np.float32)
    for i in np.flatnonzero(mask.data):  # one after the other: lanes may meet in one address
        lane, on = ptr.data.reshape(-1)[i : i + 1], np.ones(1, bool)
        old = _widen(_memory.load(lane, on, np.zeros(1, np.uint16), np.dtype(np.uint16)))
        before.reshape(-1)[i] = old[0]
        _memory.store(lane, _narrow(round_bf16(old + val.data.reshape(-1)[i])), on)
    return Handle(before, tl.bfloat16)


# Casts and arithmetic -----------------------------------------------------------------------------

_fp_to_fp = _BUILDER.create_fp_to_fp


def _cast(self, src, dst_type):
    return Handle(src.data.astype(np_dtype(dst_type), copy=False), dst_type.scalar)


def _int_cast(self, src, dst_type, is_signed):
    return _cast(self, src, dst_type)


def _float_cast(self, src, dst_type, rounding_mode):
    """fp8 and roundings other than to nearest."""
    if _is_bf16(src.dtype):
        src = Handle(src.data, tl.float32)
    if not _is_bf16(dst_type):
        return _fp_to_fp(self, src, dst_type, rounding_mode)
    data = src.data.astype(np.float32)
    if rounding_mode == ir.ROUNDING_MODE.RTZ:
        data = np.where(np.isnan(data), data, (data.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
    return Handle(data, tl.bfloat16)


def _bitcast(self, src, dst_type):
    data = _narrow(src.data) if _is_bf16(src.dtype) else src.data
    return Handle(
        _widen(data.view(np.uint16)) if _is_bf16(dst_type) else data.view(np_dtype(dst_type)), dst_type.scalar
    )


def _compare(op: np.ufunc, nan: bool | None = None) -> Callable:
    """nan: what the comparison says of a NaN, where `op` says otherwise."""

    def create(self, lhs, rhs):
        out = op(lhs.data, rhs.data)
        if nan is not None:
            unordered = np.isnan(lhs.data) | np.isnan(rhs.data)
            out = out | unordered if nan else out & ~unordered
        return Handle(out, tl.int1)

    return create


def _binary(op: np.ufunc) -> Callable:
    return lambda self, lhs, rhs: self.binary_op(lhs, rhs, op)


def _clamp(self, arg, lo, hi, propagate_nans):
    if propagate_nans == ir.PROPAGATE_NAN.ALL:
        return self.ternary_op(arg, lo, hi, np.clip)
    return self.ternary_op(arg, lo, hi, lambda x, a, b: np.fmin(np.fmax(x, a), b))


def _fma(self, x, y, z):
    wide = np.float64 if z.data.dtype.kind == "f" else z.data.dtype
    return Handle((x.data.astype(wide) * y.data + z.data).astype(z.data.dtype), z.dtype.scalar)


def _erf(self, arg):
    x = torch.from_numpy(np.ascontiguousarray(arg.data, np.float64))
    return Handle(torch.erf(x).numpy().astype(arg.data.dtype), arg.dtype.scalar)


def _dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    x, y, kind = a.data, b.data, d.dtype.scalar
    if x.dtype.kind != "f":
        if a.dtype.is_floating():
            raise NotImplementedError(f"tl.dot of {a.dtype}")
        return Handle(np.matmul(x, y, dtype=d.data.dtype) + d.data, kind)
    wide = np.promote_types(x.dtype, np.float32)
    x, y = x.astype(wide, copy=False), y.astype(wide, copy=False)
    if a.dtype.scalar == tl.float32 and input_precision == ir.INPUT_PRECISION.TF32:
        x, y = round_tf32(x), round_tf32(y)
    elif a.dtype.scalar == tl.float32:
        return Handle(fp32_dot(x, y, d.data), kind)
    return Handle((np.matmul(x, y) + d.data.astype(wide, copy=False)).astype(np_dtype(kind), copy=False), kind)


# Reductions and scans -----------------------------------------------------------------------------


def _tensor(data: np.ndarray, dtype: tl.dtype) -> tl.tensor:
    return tl.tensor(Handle(data, dtype.scalar), tl.block_type(dtype.scalar, list(data.shape)))


def _combine(self, left: list[np.ndarray], right: list[np.ndarray], dtypes: list[tl.dtype]) -> list[np.ndarray]:
    fn = self.combine_fn.rewrite()
    out = fn(*map(_tensor, left, dtypes), *map(_tensor, right, dtypes))
    out = out if isinstance(out, tuple) else (out,)
    data = [o.handle.data if isinstance(o, tl.tensor) else np.asarray(o) for o in out]
    return [np.broadcast_to(d, x.shape).astype(x.dtype, copy=False) for d, x in zip(data, left, strict=True)]


def generic_reduce(self, input):
    rank, dtypes = len(input[0].shape), [t.dtype for t in input]
    data = [t.handle.data for t in input]
    data = [d.reshape(-1) if self.axis is None else np.moveaxis(d, self.axis, 0) for d in data]
    while len(data[0]) > 1:  # neighbours first: the order of the operands is kept
        data = _combine(self, [d[0::2] for d in data], [d[1::2] for d in data], dtypes)
    data = [d[0] for d in data]
    if self.keep_dims:
        data = [d.reshape((1,) * rank) if self.axis is None else np.expand_dims(d, self.axis) for d in data]
    return [self.to_tensor(d, dtype) for d, dtype in zip(data, dtypes, strict=True)]


def generic_scan(self, input):
    dtypes = [t.dtype for t in input]
    data = [np.moveaxis(t.handle.data, self.axis, 0) for t in input]
    step, count = 1, len(data[0])
    while step < count:
        new = _combine(self, [np.roll(d, step, 0) for d in data], data, dtypes)
        data = [np.concatenate([d[:step], n[step:]]) for d, n in zip(data, new, strict=True)]
        step *= 2
    return [self.to_tensor(np.moveaxis(d, 0, self.axis), dtype) for d, dtype in zip(data, dtypes, strict=True)]


# All of it ----------------------------------------------------------------------------------------


def functions() -> Iterator[tuple[str, Callable]]:
    """What replaces the methods of the interpreter's builder, by name."""
    builder: dict[str, Callable] = {
        "load": _load, "store": _store, "masked_load": _masked_load, "masked_store": _masked_store,
        "atomic_cas": _checked_cas, "atomic_rmw": _checked_rmw,
        "si_to_fp": _cast, "ui_to_fp": _cast, "fp_to_si": _cast, "fp_to_ui": _cast, "fp_ext": _cast, "fp_trunc": _cast,
        "int_cast": _int_cast, "fp_to_fp": _float_cast,
        "bitcast": _bitcast, "int_to_ptr": _bitcast, "ptr_to_int": _bitcast,
        "maxnumf": _binary(np.fmax), "minnumf": _binary(np.fmin), "clampf": _clamp, "fma": _fma, "erf": _erf,
        "dot": _dot,
        "fabs": lambda self, arg: self.unary_op(arg, np.abs),
    }  # fmt: skip
    ops = {"LE": np.less_equal, "LT": np.less, "GE": np.greater_equal, "GT": np.greater}
    for name, op in {**ops, "EQ": np.equal, "NE": np.not_equal}.items():
        signs = ("S", "U") if name in ops else ("",)
        builder |= {f"icmp{sign}{name}": _compare(op) for sign in signs}
        builder[f"fcmpO{name}"] = _compare(op, False if name == "NE" else None)
        builder[f"fcmpU{name}"] = _compare(op, None if name == "NE" else True)
    yield from ((f"create_{name}", function) for name, function in builder.items())
    yield "get_bf16", lambda self, value: Handle(np.array([value], np.float32), tl.bfloat16)
