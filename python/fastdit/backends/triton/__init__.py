"""The Triton kernels as a backend: NVIDIA sm_80 and later, ROCm by the same sources; one thin adapter per family."""

from __future__ import annotations

import importlib
import importlib.util

from .. import registry

FAMILIES = ("modulation", "rotary", "attention", "patch", "conv", "activation", "adaln")


def register_all() -> None:
    if importlib.util.find_spec("triton") is None:
        registry.mark_unavailable("triton", "triton is not installed; pip install 'fastdit[triton]'")
        return
    for family in FAMILIES:
        if importlib.util.find_spec(f"{__name__}.{family}") is None:  # families arrive one by one
            continue
        importlib.import_module(f"{__name__}.{family}").register()
