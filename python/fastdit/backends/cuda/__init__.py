"""The CUDA C++ kernels as a backend: NVIDIA sm_80 and later; one thin adapter per family (docs/cuda.md)."""

from __future__ import annotations

import importlib

from .. import registry
from ._launch import _cuda, missing

FAMILIES = ("modulation", "attention", "conv", "patch", "rotary")


def register_all() -> None:
    if _cuda is None:
        registry.mark_unavailable("cuda", missing)
        return
    for family in FAMILIES:
        importlib.import_module(f"{__name__}.{family}").register()
