"""pytest as the items of a GPU stage: the kernels' tests on the card, and a sample of each under compute-sanitizer.

tests/ledger.py writes a line per test to FASTDIT_TEST_LOG, so a run that is cut off still says what it found.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .supervise import UNTIL, Item, stop

ROOT = Path(__file__).resolve().parents[3]
ENDING = 20.0  # seconds that an interrupted pytest has for its end
# Group -> files, markers, seconds, whether tests share the card. Tests with far offsets take up to 30 GB each.
CORRECT: dict[str, tuple[str, str, float, bool]] = {
    "cuda": ("test_*_cuda.py", "gpu and not big", 150.0, True),
    "triton samples": ("test_triton.py", "gpu", 270.0, True),
    "triton": ("test_*_triton.py", "gpu and not big", 400.0, True),
    "libraries": ("test_attention_external.py", "gpu", 60.0, False),
    "generation": ("test_generation_generator.py", "gpu", 60.0, False),
    "cuda, 64-bit offsets": ("test_*_cuda.py", "gpu and big", 60.0, False),
    "triton, 64-bit offsets": ("test_*_triton.py", "gpu and big", 90.0, False),
}
# One small sample of each family, forward and backward, for the memory checkers.
TRITON_SAMPLES = (
    "norm_modulate-adaln", "gate_residual_norm_modulate-seam", "qk_norm_rope-wan", "attention-cross",
    "attention_varlen-packed", "patch_embed3d-image-pos", "causal_conv3d-wan", "norm_silu-l2",
)  # fmt: skip
CUDA_SAMPLES = (
    "test_samples and bfloat16 and (norm_modulate-adaln-torch or qk_norm_rope-wan-torch or attention-self-128"
    " or attention_varlen-packed-torch or patch_embed3d-image-pos or causal_conv3d-wan-torch)"
    " or test_tiles and short-cache"  # conv's weight on sm_90
)
DRY = ("tests/test_close.py", "-k", "reports_the_place")  # needs no GPU
ERRORS = 86  # compute-sanitizer's status for what it found; pytest has none so high


def correct(dry: bool) -> list[Item]:
    """Every test of the kernels, shared by a process per core. dry: a file of tests that needs no GPU."""
    if dry:
        return [Item("dry", functools.partial(run, DRY, 300.0), 360.0)]
    found = []
    for name, (files, markers, seconds, shared) in CORRECT.items():
        arguments = [*_files(files), "-m", markers, *(_shared() if shared else ())]
        found.append(Item(name, functools.partial(run, arguments, seconds), seconds + 2 * ENDING))
    return found


def sanitize(dry: bool) -> list[Item]:
    """memcheck, racecheck, synccheck; first the tests without, so that no kernel is compiled under a checker."""
    nodes = [
        f"tests/test_triton.py::test_{pass_}[{sample}-torch.bfloat16]"
        for sample in TRITON_SAMPLES for pass_ in ("forward", "backward")
    ]  # fmt: skip
    cuda = [*_files("test_*_cuda.py"), "-k", CUDA_SAMPLES]
    if dry:
        return [_checked("memcheck", DRY, "dry")]
    return [
        Item("triton, compiled", functools.partial(run, nodes, 120.0), 160.0),
        _checked("memcheck", nodes, "triton"),
        _checked("memcheck", cuda, "cuda"),
        _checked("racecheck", cuda, "cuda"),
        _checked("synccheck", cuda, "cuda"),
        _checked("racecheck", nodes, "triton"),
    ]


def _checked(tool: str, arguments: Sequence[str], name: str, seconds: float = 120.0) -> Item:
    """Without torch's cache of blocks, so that every tensor has bounds of its own."""

    def check() -> dict[str, Any]:
        program = shutil.which("compute-sanitizer", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")
        if program is None:
            return {"skipped": {tool: "compute-sanitizer is not installed"}}
        prefix = [program, "--tool", tool, "--error-exitcode", str(ERRORS), "--target-processes", "all"]
        return run(arguments, seconds, prefix, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    return Item(f"{name}, {tool}", check, seconds + 2 * ENDING)


def _files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").glob(pattern))


def _shared() -> list[str]:
    """A process per core, all on the one card; one that hangs is ended and replaced (fuzzing compiles a lot)."""
    options = []
    if importlib.util.find_spec("xdist") is not None:
        workers = min(len(os.sched_getaffinity(0)), 12)
        options += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", "40"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options += ["--timeout", "200", "--timeout-method", "thread"]
    return options


def run(arguments: Sequence[str], seconds: float, prefix: Sequence[str] = (), **environment: str) -> dict[str, Any]:
    """pytest from the root of the repository for so long, or as long as the stage has; what its tests said."""
    until = min(time.monotonic() + seconds, float(os.environ.get(UNTIL, "inf")) - 2 * ENDING)
    kept = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder, "tests.jsonl"), Path(folder, "output")
        log.touch()
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
            cwd=ROOT, stdout=out.open("wb"), stderr=subprocess.STDOUT, start_new_session=True,
            env={**kept, "OMP_NUM_THREADS": "1", "FASTDIT_TEST_LOG": str(log), **environment},
        )  # fmt: skip
        status = _status(process, until)
        return _verdict(status, log.read_text("utf-8").splitlines(), out.read_text("utf-8", "replace"))


def _status(process: subprocess.Popen, until: float) -> int | None:
    """None where it had to be interrupted."""
    try:
        return process.wait(max(1.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(ENDING)
    except subprocess.TimeoutExpired:
        pass
    stop(process)
    return None


def _verdict(status: int | None, lines: Sequence[str], output: str) -> dict[str, Any]:
    reports = [json.loads(line) for line in lines if line.endswith("}")]  # the last one may be cut off
    by_outcome: dict[str, list[dict]] = {"passed": [], "failed": [], "skipped": []}
    for report in reports:
        by_outcome[report["outcome"]].append(report)
    slowest = sorted(by_outcome["passed"], key=lambda r: -r["seconds"])[:10]
    tests: dict[str, Any] = {
        "status": status,
        "passed": len(by_outcome["passed"]),
        "failed": [{"test": r["test"], "error": r["error"]} for r in by_outcome["failed"]],
        "skipped": dict(Counter(r["error"] for r in by_outcome["skipped"])),
        "slowest": {r["test"]: r["seconds"] for r in slowest},
    }
    problems = [
        (f"{len(tests['failed'])} failed", bool(tests["failed"])),
        ("stopped before the end", status is None),
        ("no test ran", not reports),
        ("compute-sanitizer found errors", status == ERRORS),
        (f"pytest ended with {status}", status not in (None, 0, 1, ERRORS)),
    ]
    found: dict[str, Any] = {"tests": tests}
    if any(true for _, true in problems):
        found["error"] = ", ".join(text for text, true in problems if true)
        tests["output"] = output[-4000:]
    return found
