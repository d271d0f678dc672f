"""What a figure was measured on: stands in every JSON file that fastdit writes."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from pathlib import Path

import torch


def describe(device: torch.device | str = "cpu") -> dict[str, str | int | float]:
    """Processor, instruction sets, threads, versions and, for a CUDA device, the GPU."""
    facts: dict[str, str | int | float] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "memory_gib": round(_memory() / 2**30, 1),
        "isa": native_isa() or "fastdit._cpu is not built",
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S %z"),
        "commit": _commit(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda or "",
        }
    return facts


def results(device: torch.device | str = "cpu") -> Path:
    """The folder of this machine's figures: benchmarks/results/h200, or below FASTDIT_RESULTS."""
    name = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else _cpu_name()
    name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-").removeprefix("nvidia-")
    return Path(os.environ.get("FASTDIT_RESULTS", "benchmarks/results")) / name


def native_isa() -> str | None:
    """The instruction set that the compiled CPU kernels use; None where the module is missing."""
    try:
        from fastdit import _cpu
    except ImportError:
        return None
    return str(_cpu.isa())


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout that this package runs from, marked when it was edited since. Where files travel without their
    history, what FASTDIT_COMMIT says; empty for an installed wheel."""
    git = ("git", "-C", str(Path(__file__).parent))
    try:
        tracked = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, timeout=10)
        if tracked.returncode:
            return os.environ.get("FASTDIT_COMMIT", "")
        commit = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return os.environ.get("FASTDIT_COMMIT", "")
    return commit.stdout.strip()


def _memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def _version(module: str) -> str:
    try:
        return str(__import__(module).__version__)
    except ImportError:
        return "not installed"
