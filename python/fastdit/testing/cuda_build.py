"""What the CUDA kernels ask of the machine: registers, spills, shared memory and instructions, read off fastdit._cuda.

python -m fastdit.testing.cuda_build [module]     the table; status 1 where a kernel spills or keeps a stack
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import sass

_FUNCTION = re.compile(r"Function (\S+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)")
_LOCAL = re.compile(r"LOCAL:(\d+)")
_CODE = re.compile(r"^\s*Function : (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    counts: dict

    @property
    def sound(self) -> bool:
        return self.stack == 0 and self.counts["spill"] == 0


def kernels(module: Path) -> Iterator[Kernel]:
    """Every kernel of every architecture that the module carries."""
    names = sass._tool("cuobjdump", "-lelf", module).split()
    for arch in sorted({a for n in names for a in re.findall(r"sm_\w+?(?=\.)", n)}):
        used = {m[0]: tuple(map(int, m[1:])) for m in _FUNCTION.findall(
            sass._tool("cuobjdump", "-res-usage", "-arch", arch, module))}  # fmt: skip
        code = _CODE.split(sass._tool("cuobjdump", "-sass", "-arch", arch, module))
        for name, text in zip(code[1::2], code[2::2], strict=True):
            registers, stack, shared = used[name]
            yield Kernel(_plain(name), arch, registers, stack, shared, sass.count(text))


def _plain(name: str) -> str:
    """Without the namespaces: modulation_forward_kernel<bf16, bf16, 8, 1, false>."""
    said = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    said = re.sub(r"\(anonymous namespace\)::|fastdit::cuda::|fastdit::|^void ", "", said)
    return re.sub(r"\((int|bool)\)", "", said).split("(")[0]


def show(console: Console, module: Path) -> int:
    table = Table(title=str(module.name), title_justify="left")
    table.add_column("kernel", overflow="fold")
    for column in ("arch", "registers", "stack", "spill", "shared", "mma", "wgmma", "tma", "16-byte loads", "stores"):
        table.add_column(column, justify="right")
    found = list(kernels(module))
    for k in found:
        c = k.counts
        table.add_row(
            k.name, k.arch, str(k.registers), str(k.stack), str(c["spill"]), str(k.shared), str(c["mma"]),
            str(c["wgmma"]), str(c["tma"]), f"{sass.share(c['loads']):.0%}", f"{sass.share(c['stores']):.0%}",
            style=None if k.sound else "red",
        )  # fmt: skip
    console.print(table)
    bad = [k for k in found if not k.sound]
    console.print(f"{len(found)} kernels, {len(bad)} with spills or a stack")
    return 1 if bad or not found else 0


def installed() -> Path:
    from fastdit import _cuda

    return Path(_cuda.__file__)


if __name__ == "__main__":
    sys.exit(show(Console(width=200), Path(sys.argv[1]) if len(sys.argv) > 1 else installed()))
