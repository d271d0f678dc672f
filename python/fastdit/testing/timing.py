"""Clocks for benchmarks and the demo: everything that is compared is timed interleaved, in one run.

Absolute times drift on shared machines; the ratio of two medians taken round by round does not.
"""

from __future__ import annotations

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Percentiles over rounds of the seconds that one call takes."""

    p20: float
    p50: float
    p80: float
    rounds: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        ordered = sorted(samples)

        def at(share: float) -> float:
            place = share * (len(ordered) - 1)
            low = math.floor(place)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

        return cls(at(0.2), at(0.5), at(0.8), len(ordered))

    def scaled(self, factor: float) -> Timing:
        return Timing(factor * self.p20, factor * self.p50, factor * self.p80, self.rounds)

    @property
    def ms(self) -> float:
        return self.p50 * 1e3


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def keep_freed_memory(reserve: int = 2**30) -> bool:
    """Raise glibc's mmap and trim thresholds, so that large outputs reuse pages that are already mapped.

    Without it a benchmark of a memory-bound op times the kernel's page faults (an fp32 clone of 100 MB on one core:
    36 ms against 5 ms). Call it once, before anything is timed: it holds for the whole process, peers included. The
    thresholds alone are not enough (a freed block that is 80 bytes too small sends malloc to fresh pages), so `reserve`
    bytes are touched once and given back to the heap. Returns False where the C library has no mallopt.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    m_trim_threshold, m_mmap_threshold = -1, -3
    raised = bool(mallopt(m_mmap_threshold, 2**31 - 1) and mallopt(m_trim_threshold, 2**31 - 1))
    torch.empty(reserve, dtype=torch.uint8).fill_(1)
    return raised


def once(call: Call, device: torch.device | str = "cpu") -> tuple[float, object]:
    """Seconds of a single call, and what it returned."""
    synchronize(device)
    start = time.perf_counter()
    result = call()
    synchronize(device)
    return time.perf_counter() - start, result


def _repeats(call: Call, device: torch.device | str, shortest: float) -> int:
    seconds = min(once(call, device)[0] for _ in range(2))
    return max(1, math.ceil(shortest / max(seconds, 1e-7)))


def _sample(call: Call, repeats: int, device: torch.device | str) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleaved(
    calls: Mapping[str, Call],
    *,
    device: torch.device | str = "cpu",
    rounds: int = 7,
    shortest: float = 2e-3,
    repeats: int | None = None,
    after_round: Callable[[int], None] | None = None,
) -> dict[str, Timing]:
    """Time every call once per round, in an order that turns from round to round.

    Args:
        calls: name -> function without arguments.
        rounds: samples per call; at least 7 for a figure that is published.
        shortest: a sample repeats its call until it lasts this many seconds; two unrecorded calls find out how often.
        repeats: calls per sample, when the caller knows and has warmed up.
        after_round: called with the number of rounds done (progress bars).
    """
    times = {name: repeats or _repeats(call, device, shortest) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for done in range(rounds):
            turn = done % len(names)
            for name in names[turn:] + names[:turn]:
                samples[name].append(_sample(calls[name], times[name], device))
            if after_round is not None:
                after_round(done + 1)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing.of(taken) for name, taken in samples.items()}


def graphed(call: Call) -> Call:
    """A CUDA-graph replay of `call`, so that small sizes time the device and not Python; raises where capture fails."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def copy_bandwidth(nbytes: int, *, device: torch.device | str = "cpu", rounds: int = 7) -> float:
    """Bytes per second, read and write together, of cloning `nbytes` bytes."""
    source = torch.rand(max(nbytes // 4, 1), dtype=torch.float32, device=device)
    timing = interleaved({"copy": source.clone}, device=device, rounds=rounds)["copy"]
    return 2 * source.numel() * 4 / timing.p50


def gemm_rate(dtype: torch.dtype, *, size: int | None = None, device: torch.device | str = "cpu") -> float:
    """FLOP per second of torch's own square GEMM: 2048 on a CPU, 8192 on a GPU unless told."""
    n = size or (8192 if torch.device(device).type == "cuda" else 2048)
    a = torch.randn(n, n, device=device).to(dtype)
    b = torch.randn(n, n, device=device).to(dtype)
    timing = interleaved({"gemm": lambda: a @ b}, device=device, rounds=5)["gemm"]
    return 2 * n**3 / timing.p50
