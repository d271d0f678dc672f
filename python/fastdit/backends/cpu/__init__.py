"""The native C++ kernels as a backend: tensors to pointers, sizes and strides, and back."""

from __future__ import annotations

import importlib

import torch  # noqa: F401  before the module: its OpenMP runtime must be the one pool of the process

from .. import registry

FAMILIES = ("modulation", "rotary", "attention", "patch", "conv", "activation")

try:
    from ... import _cpu
except ImportError as error:  # an install without the compiled module still has the reference
    _cpu = None  # type: ignore[assignment]
    registry.mark_unavailable("cpu", f"extension not built ({error}); reinstall fastdit from source")


def register_all() -> None:
    if _cpu is not None:
        for family in FAMILIES:
            importlib.import_module(f"{__name__}.{family}").register()
