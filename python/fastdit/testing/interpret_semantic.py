"""Shortcuts through Triton's checks of operands, for those that kernels have most: the same answers with less Python.

A type is built once, operands of one type and shape pass as they are, and a number becomes a block once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic

from .interpret_ops import Handle, np_dtype

_block_type = tl.block_type.__init__
_block_facts: dict[tuple, tuple] = {}
_block_types: dict[tuple[str, str], tl.block_type] = {}
_SCALAR = (tl.tuple([]), tl.constexpr(1))


def block_type(self, element_ty, shape):
    """tl.block_type, whose checks and name of one element type and shape are made once.

    dims: the shape as a plain tuple. of_tensor: shape and numel of its tensors, as constants.
    """
    key = (element_ty.name, *(s.value if isinstance(s, tl.constexpr) else s for s in shape))
    facts = _block_facts.get(key)
    if facts is None:
        _block_type(self, element_ty, shape)
        constants = tl.tuple([tl.constexpr(s) for s in key[1:]]), tl.constexpr(math.prod(key[1:]))
        facts = _block_facts[key] = (self.shape, self.numel, self.name, key[1:], constants)
    self.element_ty = element_ty
    self.shape, self.numel, self.name, self.dims, self.of_tensor = facts


def with_element_ty(self, scalar_ty):
    key = scalar_ty.name, self.name
    found = _block_types.get(key)
    if found is None:
        found = _block_types[key] = tl.block_type(scalar_ty, self.shape)
    return found


def tensor(self, handle, type):
    """tl.tensor, whose shape as constants is its type's."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensor if type.is_block() else _SCALAR


def _splat(value: tl.tensor, block: tl.block_type) -> tl.tensor:
    handle = value.handle
    data = np.full(block.dims, handle.data, np_dtype(handle.dtype))
    return tl.tensor(Handle(data, handle.dtype.scalar), block.with_element_ty(value.type.scalar))


_broadcast = TritonSemantic.broadcast_impl_value


def broadcast(self, lhs, rhs):
    left, right = lhs.type, rhs.type
    if not left.is_block():
        return (_splat(lhs, right), rhs) if right.is_block() else (lhs, rhs)
    if not right.is_block():
        return lhs, _splat(rhs, left)
    return (lhs, rhs) if left.dims == right.dims else _broadcast(self, lhs, rhs)


_RANGES = {name: range(-(2 ** (bits - 1)), 2 ** (bits - 1)) for name, bits in (("int32", 32), ("int64", 64))}
_SAME = {"int1", "int32", "int64", "fp16", "bf16", "fp32"}  # what two of a kind give
_numbers: dict[tuple, tuple[np.ndarray, Any, Any]] = {}


def _number(self, value: Any, type: Any) -> tl.tensor | None:
    """An int or float beside a tensor of this type, whose type it takes; None where Triton has more to say."""
    name, kind = type.scalar.name, value.__class__
    if kind is int:
        if value not in _RANGES.get(name if name != "fp32" else "int64", ()):
            return None
    elif kind is not float or name != "fp32":
        return None
    key = kind, value, type.name
    found = _numbers.get(key)
    if found is None:
        number = self.scalar_constant(value, type.scalar)
        number = _splat(number, type) if type.is_block() else number
        number.handle.data.flags.writeable = False  # the array is shared; handles are not: shifts change theirs
        if len(_numbers) > 1000:
            _numbers.clear()
        found = _numbers[key] = (number.handle.data, number.handle.dtype, number.type)
    data, held, type = found
    return tl.tensor(Handle(data, held), type)


_checked = TritonSemantic.binary_op_type_checking_impl


def checked(self, lhs, rhs, allow_lhs_ptr=False, allow_rhs_ptr=False, arithmetic_check=True, div_or_mod=False):
    if rhs.__class__ is tl.tensor:
        right = rhs.type.scalar
        if lhs.__class__ is tl.tensor:
            left = lhs.type.scalar
            if not div_or_mod and left.name == right.name and left.name in _SAME:
                return broadcast(self, lhs, rhs)
            if allow_lhs_ptr and left.is_ptr() and right.name in _RANGES:
                return broadcast(self, lhs, rhs)
        elif arithmetic_check and (number := _number(self, lhs, rhs.type)) is not None:
            return number, rhs
    elif lhs.__class__ is tl.tensor and arithmetic_check and (number := _number(self, rhs, lhs.type)) is not None:
        return lhs, number
    return _checked(self, lhs, rhs, allow_lhs_ptr, allow_rhs_ptr, arithmetic_check, div_or_mod)


def patches() -> Iterator[tuple[Any, str, Any]]:
    yield from ((tl.block_type, "__init__", block_type), (tl.block_type, "with_element_ty", with_element_ty))
    yield from ((tl.tensor, "__init__", tensor), (TritonSemantic, "broadcast_impl_value", broadcast))
    yield TritonSemantic, "binary_op_type_checking_impl", checked
