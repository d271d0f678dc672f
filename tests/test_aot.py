"""Ahead-of-time builds: the report finds what it is meant to find, and the ops' own kernels have none of it.

Each run is a process of its own, because this one holds Triton's interpreter.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdit.testing import sass

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parent.parent

KERNELS = """
import triton.language as tl
from fastdit.kernels._jit import kernel, multiple

@kernel
def rows(X, Y, W, stride: tl.int64, C: tl.constexpr, BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    at, c = tl.program_id(0).to(tl.int64) * multiple(stride, ALIGN), tl.arange(0, BLOCK)
    x = tl.load(X + at + c, mask=c < C, other=0.0)
    if W is not None:
        x *= tl.load(W + c, mask=c < C, other=0.0)
    tl.store(Y + at + c, x, mask=c < C)

@kernel(kind="gemm")
def gemm(A, B, D, K: tl.int32, M: tl.constexpr, N: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BK)
    acc = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BK):
        a, b = tl.load(A + m[:, None] * 1024 + start + k), tl.load(B + (start + k)[:, None] * 1024 + n)
        acc = tl.dot(a, b, acc)
    tl.store(D + m[:, None] * 1024 + n, acc.to(D.dtype.element_ty))

@kernel(kind="gemm")
def wrong(A, C: tl.constexpr):
    tl.static_assert(C == 0)
"""
LAUNCHES = """
import json, sys, torch
import toy_kernels as toy
from fastdit.backends.triton._launch import launch
from fastdit.testing import aot

def launches():
    x = torch.empty(64, 1152, dtype=torch.bfloat16)
    def rows(x, align, w=None):
        launch(toy.rows, (64, 1, 1), (x, torch.empty_like(x), w), (1152,), (1152, 2048, align))
    yield "wide", lambda: rows(x, 8)
    yield "wide again", lambda: rows(x[:8], 8)
    yield "weighted", lambda: rows(x, 8, x[0])
    yield "scalar", lambda: rows(x, 1)
    yield "unaligned pointer", lambda: rows(x.view(-1)[1:], 8)
    yield "fp32", lambda: rows(x.float(), 1)
    a = torch.empty(1024, 1024, dtype=torch.bfloat16)
    def gemm(m, n, k, warps, stages=2):
        launch(toy.gemm, (1, 1, 1), (a, a, a), (1024,), (m, n, k), warps, stages)
    yield "wgmma", lambda: gemm(64, 64, 64, 4)
    yield "no wgmma", lambda: gemm(32, 32, 32, 4)
    yield "spills", lambda: gemm(256, 256, 16, 4)
    yield "too large", lambda: gemm(128, 128, 512, 8)
    yield "wrong", lambda: launch(toy.wrong, (1, 1, 1), (a,), (), (1,))

if __name__ == "__main__":
    with aot.Collector() as collector:
        collector.pretend(90)
        for row, call in launches():
            collector.name(row)
            call()
    aot.build_all(collector.reports, 2)
    json.dump([report.document() for report in collector.reports], open(sys.argv[1], "w"))
"""


def _run(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = [str(ROOT / "python"), *([str(path)] if path else []), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy_kernels.py").write_text(KERNELS)
    (folder / "toy.py").write_text(LAUNCHES)
    done = _run(str(folder / "toy.py"), str(folder / "out.json"), path=folder)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "out.json").read_text())
    return {row: report for report in found for row in report["rows"]}


@pytest.mark.parametrize(
    "row, problem",
    [
        ("wide", None),
        ("weighted", None),
        ("fp32", None),  # a row is judged for accesses of 2 bytes
        ("wgmma", None),
        ("scalar", "scalar loads of 2 bytes, 100 %"),
        ("unaligned pointer", "scalar loads of 2 bytes, 100 %"),
        ("no wgmma", "no wgmma"),
        ("spills", "spills"),
        ("too large", "more than a block can have"),
        ("wrong", "CompileTimeAssertionFailure"),
    ],
)
def test_report_names_the_problem(toys, row, problem):
    problems = toys[row]["problems"]
    assert (problem is None) == (not problems), problems
    assert problem is None or problem in problems[0]


def test_equal_launches_are_one_build(toys):
    assert toys["wide"]["rows"] == ["wide", "wide again"]
    assert toys["wide"]["specialisation"] == "bf16(X,Y) C=1152 BLOCK=2048 ALIGN=8 warps=4 stages=2"
    assert toys["weighted"]["specialisation"].startswith("bf16(X,Y,W) ")


def test_widths_of_a_copy(toys):
    assert set(toys["wide"]["usage"]["loads"]) == set(toys["wide"]["usage"]["stores"]) == {"16"}
    assert set(toys["scalar"]["usage"]["loads"]) == {"2"}
    assert toys["wgmma"]["usage"]["wgmma"] > 0 and toys["no wgmma"]["usage"]["mma"] > 0


def test_counts_from_a_disassembly():
    code = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128.CONSTANT R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDG.E.U16 R4, desc[UR4][R2.64+0x100] ;
        /*0030*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0040*/                   LDGSTS.E.BYPASS.LTC128B.64 [R1], desc[UR4][R2.64] ;
        /*0050*/                   LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64] ;
        /*0060*/                   STG.E.64 desc[UR4][R2.64], R8 ;
        /*0070*/                   STL.64 [R1+0x8], R4 ;
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0090*/                   HMMA.16816.F32.BF16 R8, R4, R2, R8 ;
        /*00a0*/                   UTMALDG.2D [UR8], [UR4] ;
        /*00b0*/                   UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR5], tmem[UR10], idesc[UR11], UPT ;
        /*00c0*/                   REDG.E.ADD.F32.FTZ.RN.STRONG.GPU desc[UR4][R2.64], R5 ;
    """
    assert sass.count(code) == {
        "spill": 8, "wgmma": 2, "mma": 1, "tma": 1, "atomics": 1,
        "loads": {16: 1, 2: 1, 4: 1, 8: 1, 32: 1}, "stores": {8: 1},
    }  # fmt: skip
    assert sass.share({16: 3, 2: 8}) == 48 / 64 and sass.share({}) == 1


@pytest.mark.parametrize(
    "arch, registers, shared, threads, warps",
    [  # as NVIDIA's occupancy calculator says
        (90, 32, 0, 1024, 64),
        (90, 33, 0, 128, 48),
        (90, 128, 0, 128, 16),
        (90, 168, 0, 384, 12),
        (90, 255, 0, 256, 8),
        (90, 24, 0, 32, 32),
        (80, 32, 48 * 1024, 128, 12),
        (120, 32, 0, 128, 48),
        (120, 32, 99 * 1024, 128, 4),
        (90, 32, 229 * 1024, 128, 0),
    ],
)
def test_occupancy(arch, registers, shared, threads, warps):
    assert sass.warps_per_sm(arch, registers, shared, threads) == warps


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(("--arch", "90", "--dtype", "bf16"), id="sm_90-bf16"),
        pytest.param((), id="whole", marks=pytest.mark.full),
    ],
)
def test_kernels_of_the_ops(tmp_path, options):
    """No spills, no stack, wgmma where meant, no scalar 2-byte accesses: what `fastdit aot` holds against them."""
    file = tmp_path / "aot.json"
    done = _run("-m", "fastdit", "aot", *options, "--json", str(file))
    assert done.returncode in (0, 1), done.stderr or done.stdout
    document = json.loads(file.read_text())
    bad = {
        b["problems"][0]: f"{b['kernel']} sm_{b['arch']} {b['rows'][0]}" for b in document["builds"] if b["problems"]
    }
    assert not bad, "\n".join(f"{where}: {problem}" for problem, where in bad.items())
    assert done.returncode == 0
    refused = [line for line in document["refused"] if "has no winograd" not in line]  # what auto takes elsewhere
    assert not refused, "\n".join(refused)


def test_bad_request():
    done = _run("-m", "fastdit", "aot", "--arch", "70")
    assert done.returncode == 2 and "expected some of (80, 90, 100, 120)" in done.stdout
