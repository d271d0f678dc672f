"""What a compiled kernel asks of the machine, read off its cubin with the tools that Triton carries."""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

VERSION = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # of what is read off, and how
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_THREADS = re.compile(r"\.reqntid (\d+)")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)", re.MULTILINE)
_WIDTH = {"8": 1, "U8": 1, "S8": 1, "16": 2, "U16": 2, "S16": 2, "64": 8, "128": 16, "256": 32}
_WORD = 4


@dataclass(frozen=True)
class Processor:
    """Limits of one multiprocessor: warps, blocks, shared memory, and shared memory of one block, in bytes."""

    warps: int
    blocks: int
    shared: int
    shared_block: int


PROCESSORS = {
    80: Processor(64, 32, 164 * 1024, 163 * 1024),
    90: Processor(64, 32, 228 * 1024, 227 * 1024),
    100: Processor(64, 32, 228 * 1024, 227 * 1024),
    120: Processor(48, 24, 100 * 1024, 99 * 1024),
}
_REGISTERS, _REGISTER_UNIT, _SHARED_RESERVED = 65536, 256, 1024  # of every one of them


@dataclass(frozen=True)
class Usage:
    """shared: static and dynamic bytes of a block. spill: bytes that the code stores to local memory, counted once.

    loads, stores: bytes per global access of one thread -> how many such instructions. Accesses by TMA count in `tma`.
    """

    registers: int
    stack: int
    spill: int
    shared: int
    threads: int
    warps_per_sm: int
    wgmma: int = 0
    mma: int = 0
    tma: int = 0
    atomics: int = 0
    loads: dict[int, int] = field(default_factory=dict)
    stores: dict[int, int] = field(default_factory=dict)


def share(accesses: dict[int, int], width: int = 16) -> float:
    """Of the bytes that these instructions name, the share that moves in accesses at least so wide."""
    total = sum(size * count for size, count in accesses.items())
    return sum(size * count for size, count in accesses.items() if size >= width) / total if total else 1.0


def warps_per_sm(arch: int, registers: int, shared: int, threads: int) -> int:
    """How many warps of such blocks one multiprocessor holds at a time: what registers, memory and slots leave."""
    limit = PROCESSORS[arch]
    warps = -(-threads // 32)
    per_warp = -(-max(registers, 1) * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    by_registers = (_REGISTERS // 4 // per_warp * 4) // warps  # warps are spread over four schedulers
    by_shared = limit.shared // (shared + _SHARED_RESERVED)
    return warps * min(by_registers, by_shared, limit.warps // warps, limit.blocks)


def usage(cubin: bytes, ptx: str, arch: int, dynamic_shared: int) -> Usage:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        resources = _RESOURCES.search(_tool("cuobjdump", "-res-usage", file))
        code = _tool("nvdisasm", "-c", file)
    if resources is None:
        raise RuntimeError("sass: cuobjdump -res-usage names no registers; another version of the tool?")
    registers, stack, static_shared = map(int, resources.groups())
    threads = int(_found(_THREADS.search(ptx)))
    # Triton declares shared memory as one external array, whose size it gives at launch
    shared = max(static_shared, dynamic_shared)
    counts = count(code)
    return Usage(
        registers, stack, shared=shared, threads=threads, warps_per_sm=warps_per_sm(arch, registers, shared, threads),
        **counts,
    )  # fmt: skip


def count(code: str) -> dict:
    """Instructions of the kinds that a report names, in a disassembly."""
    found: Counter[str] = Counter()
    loads: Counter[int] = Counter()
    stores: Counter[int] = Counter()
    for operation, modifiers in _INSTRUCTION.findall(code):
        parts = modifiers.split(".")[1:]
        width = next((_WIDTH[p] for p in parts if p in _WIDTH), _WORD)
        if operation in ("LDG", "LD", "LDGSTS"):
            loads[width] += 1
        elif operation in ("STG", "ST"):
            stores[width] += 1
        elif operation == "STL":
            found["spill"] += width
        elif re.fullmatch(r"[HQIB]GMMA", operation) or re.fullmatch(r"UTC\w*MMA", operation):
            found["wgmma"] += 1
        elif re.fullmatch(r"[HQIDO]MMA", operation):
            found["mma"] += 1
        elif operation in ("UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP"):
            found["tma"] += 1
        elif operation in ("ATOM", "ATOMG", "RED", "REDG"):
            found["atomics"] += 1
    names = ("spill", "wgmma", "mma", "tma", "atomics")
    return {**{name: found[name] for name in names}, "loads": dict(loads), "stores": dict(stores)}


def _tool(name: str, *arguments: str | Path) -> str:
    return subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def _found(match: re.Match[str] | None) -> str:
    if match is None:
        raise RuntimeError("sass: the PTX names no block size")
    return match.group(1)
