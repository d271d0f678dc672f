"""Where a CPU kernel spends its time: the innermost loops under `perf`, and what instructions they are made of.

    python benchmarks/hot_loops.py attention --model DiT-XL/2-512 --dtype bf16

Samples one row of `fastdit bench` on one thread (`perf record`, Linux, no root) and reads the machine code around the
samples (`objdump`). A loop with most of the samples and mostly FMAs is at the limit of the arithmetic units.
"""

from __future__ import annotations

import argparse
import bisect
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from fastdit import _cpu, ops
from fastdit.testing import workloads

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LONGEST = 12_000  # bytes of code between a backward jump and its target: more is no inner loop
SHOWN = 0.04  # share of the samples below which a loop is not shown
KINDS = (
    ("fma", re.compile(r"v(dpbf16|fn?m(add|sub))")),
    ("prefetch", re.compile("prefetch")),
    ("move", re.compile("v(mov|broadcast|pbroadcast|pmov)")),
    ("vector", re.compile("v")),
)


def run(op: str, model: str, dtype: torch.dtype, seconds: float) -> None:
    """The row again and again: what the recorded process does."""
    torch.set_num_threads(1)
    rows = [w for w in workloads.bench(op) if model.lower() in w.model.lower() and dtype in w.dtypes]
    if not rows:
        raise SystemExit(f"hot_loops: no row; got {op} --model {model!r} in {dtype}, see `fastdit bench --op {op}`")
    row = rows[0]
    args, kwargs = row.make(workloads.Maker(dtype))
    call, start = getattr(ops, op), time.monotonic()
    while time.monotonic() - start < seconds:
        call(*args, **kwargs, backend="cpu")


def script(data: Path, fields: str, *options: str) -> str:
    return subprocess.run(
        ["perf", "script", "-i", data, *options, "-F", fields], capture_output=True, text=True, check=True
    ).stdout


def samples(data: Path, module: Path) -> Counter[int]:
    """Address inside the module -> samples."""
    events = script(data, "comm,ip,dso", "--show-mmap-events")
    mapped = re.search(rf"\[0x([0-9a-f]+)\(\S+ @ (0x[0-9a-f]+|0) .*{re.escape(str(module))}", events)
    if mapped is None:
        raise SystemExit(f"hot_loops: perf saw nothing of {module}; got no mapping of it, expected one")
    base = int(mapped[1], 16) - int(mapped[2], 16)
    found: Counter[int] = Counter()
    for line in script(data, "ip,dso").splitlines():
        if str(module) in line:
            found[int(line.split()[0], 16) - base] += 1
    return found


def code(module: Path) -> tuple[list[int], list[tuple[str, str]], list[tuple[int, int]]]:
    """Addresses, (mnemonic, operands), and loops as (first, last) address: backward jumps."""
    text = subprocess.run(["objdump", "-d", "--no-show-raw-insn", module], capture_output=True, text=True).stdout
    addresses, instructions, loops = [], [], []
    for at, name, operands in re.findall(r"^\s*([0-9a-f]+):\s+(\S+)[ \t]*(.*)$", text, re.MULTILINE):
        addresses.append(int(at, 16))
        instructions.append((name, operands))
        target = re.match(r"[0-9a-f]+\b", operands)
        if name[0] == "j" and name != "jmp" and target and 0 <= int(at, 16) - int(target[0], 16) < LONGEST:
            loops.append((int(target[0], 16), int(at, 16)))
    return addresses, instructions, loops


def mix(body: list[tuple[str, str]]) -> str:
    counts: Counter[str] = Counter()
    for name, operands in body:
        kind = next((kind for kind, pattern in KINDS if pattern.match(name)), "scalar")
        counts["load, store" if kind == "move" and "(" in operands else kind] += 1
    return ", ".join(f"{n} {kind}" for kind, n in counts.most_common())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", help="e.g. attention")
    parser.add_argument("--model", default="", help="part of the row's name in `fastdit bench`; default: its first row")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        return run(given.op, given.model, DTYPES[given.dtype], given.seconds)

    module = Path(_cpu.__file__).resolve()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "perf.data"
        command = [sys.executable, __file__, *sys.argv[1:], "--run"]
        subprocess.run(["perf", "record", "-q", "-F", "2000", "-o", data, *command], check=True)
        found = samples(data, module)
    addresses, instructions, loops = code(module)
    hit, before = sorted(found), [0]
    for at in hit:
        before.append(before[-1] + found[at])
    total = before[-1]

    def inside(loop: tuple[int, int]) -> int:
        return before[bisect.bisect_right(hit, loop[1])] - before[bisect.bisect_left(hit, loop[0])]

    hot = [loop for loop in loops if inside(loop) > SHOWN * total]
    inner = [a for a in hot if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in hot)]
    print(f"{total} samples in {module.name}, {_cpu.isa()}")
    for loop in sorted(inner, key=inside, reverse=True):
        body = instructions[bisect.bisect_left(addresses, loop[0]) : bisect.bisect_right(addresses, loop[1])]
        print(f"{100 * inside(loop) / total:4.0f} %  {len(body)} instructions: {mix(body)}")


if __name__ == "__main__":
    main()
