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
    try:
        adapters = [importlib.import_module(f"{__name__}.{family}") for family in FAMILIES]
    except (ImportError, AttributeError) as error:  # a Triton that moved what the launches stand on
        registry.mark_unavailable("triton", f"cannot use the installed triton ({error}); 3.6 and 3.7 are known to work")
        return
    registry.recorders["triton"] = importlib.import_module(f"{__name__}._record").record
    for adapter in adapters:
        adapter.register()
