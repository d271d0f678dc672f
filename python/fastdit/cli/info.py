"""`fastdit info`: what this machine has, and which backends can run here."""

from __future__ import annotations

import os

import torch
from rich.console import Console
from rich.table import Table

import fastdit
from fastdit.backends import registry
from fastdit.testing.machine import describe

ON_GPU = ("cuda", "triton", "flash_attn")


def show(console: Console) -> None:
    gpu = torch.cuda.is_available()
    machine = Table(title=f"fastdit {fastdit.__version__}", show_header=False, title_justify="left")
    for key, value in describe("cuda" if gpu else "cpu").items():
        machine.add_row(key.replace("_", " "), str(value))
    if not gpu:
        machine.add_row("gpu", _no_gpu())
    machine.add_row(
        "default backend", registry.requested(None) or "automatic: the first of a measured list that can run"
    )
    console.print(machine)

    table = Table("backend", "usable", "ops", title="backends", title_justify="left")
    for backend in registry.BACKENDS:
        why = reason(backend)
        count = sum(backend in registry.implementations(op) for op in registry.ops())
        table.add_row(backend, "no" if why else "yes", why or f"{count} of {len(registry.ops())}")
    console.print(table)
    native = [op for op in registry.ops() if set(registry.implementations(op)) - {"reference"}]
    console.print(f"ops with a kernel: {', '.join(native) or 'none'}", highlight=False)


def reason(backend: str) -> str | None:
    """Why a whole backend cannot run here; None when it can."""
    unavailable = registry.unavailable()
    if backend in unavailable:
        return unavailable[backend]
    if not any(backend in registry.implementations(op) for op in registry.ops()):
        return "this version has no kernels for it"
    if backend in ON_GPU and not torch.cuda.is_available():
        if backend != "triton":
            return _no_gpu()
        return None if interpreted() else f"{_no_gpu()}; TRITON_INTERPRET=1 runs its kernels on the CPU, slowly"
    return None


def interpreted() -> bool:
    """True where Triton kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _no_gpu() -> str:
    if torch.version.cuda is None:
        return "none: this torch is built without CUDA"
    return "none: torch sees no NVIDIA GPU"
