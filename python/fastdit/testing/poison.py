"""Uninitialised memory made visible: fresh tensors hold NaN and stand between guard rows that are checked later."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from ..backends import _facts

GUARD = 256  # elements on each side
_PATTERN = {torch.int32: 0x7FABCDEF, torch.int64: 0x7FABCDEF_7FABCDEF, torch.uint8: 0xAB, torch.int16: 0x7ABC}


def _bits(t: Tensor) -> Tensor:
    return t.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block torch's ways to uninitialised memory give NaN between guards.

    On exit a guard that was written to raises AssertionError. An output element that a kernel forgot stays NaN and
    fails the comparison that follows.
    """
    real_empty, real_strided = torch.empty, Tensor.new_empty_strided
    guards: list[tuple[Tensor, int]] = []

    def empty(*size, dtype=None, device=None, memory_format=torch.contiguous_format, **kwargs):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or torch.get_default_dtype()
        return guarded(real_empty(shape, dtype=dtype, device=device, memory_format=memory_format, **kwargs))

    def guarded(plain: Tensor) -> Tensor:
        """plain leaves no gaps."""
        if (
            plain.device.type not in ("cpu", "cuda")
            or plain.numel() == 0
            or plain.dtype is torch.bool
            or plain.is_complex()
        ):
            return plain
        wide = real_empty(plain.numel() + 2 * GUARD, dtype=plain.dtype, device=plain.device)
        wide.fill_(float("nan") if plain.is_floating_point() else _PATTERN.get(plain.dtype, 0x5A))
        guards.append((wide, plain.numel()))
        return wide.as_strided(plain.shape, plain.stride(), GUARD)

    def empty_like(t, *, dtype=None, device=None, memory_format=torch.preserve_format, **kwargs):
        if memory_format is torch.preserve_format:
            memory_format = torch.contiguous_format
            if t.dim() == 5 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last_3d):
                memory_format = torch.channels_last_3d
        return empty(t.shape, dtype=dtype or t.dtype, device=device or t.device, memory_format=memory_format)

    def new_empty(t, *size, dtype=None, device=None, **kwargs):
        return empty(*size, dtype=dtype or t.dtype, device=device or t.device)

    def new_empty_strided(t, size, stride, **kwargs):
        plain = real_strided(t, size, stride, **kwargs)
        span = 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        return guarded(plain) if plain.numel() == span else plain

    with (
        mock.patch.object(torch, "empty", empty),
        mock.patch.object(torch, "empty_like", empty_like),
        mock.patch.object(Tensor, "new_empty", new_empty),
        mock.patch.object(Tensor, "new_empty_strided", new_empty_strided),
    ):
        yield
    _facts.forget()  # a forward was not recorded while its memory was being filled
    for wide, count in guards:
        bits = _bits(wide)
        edge = torch.cat([bits[:GUARD], bits[GUARD + count :]])
        clean = _bits(
            torch.full(
                (1,),
                float("nan") if wide.dtype.is_floating_point else _PATTERN.get(wide.dtype, 0x5A),
                dtype=wide.dtype,
                device=wide.device,
            )
        )
        if not bool((edge == clean).all()):
            raise AssertionError(f"a kernel wrote outside its output of {count} {wide.dtype} elements")
