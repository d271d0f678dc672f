"""Peak memory of decoding a video with AutoencoderKLWan, as it is and accelerated, each in a process of its own.

    pytest benchmarks/bench_memory.py -s
    python benchmarks/bench_memory.py accelerated bfloat16 2 90 160       (one figure: MiB above the loaded model)

What counts is what the decode adds to the process: activations, the frames that each layer remembers (most of it, and
the same for both), copies, packed weights, the video. 720p takes two minutes.
"""

import resource
import subprocess
import sys

import pytest
import torch

import fastdit
from fastdit.testing import models


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure(mode: str, dtype: str, *grid: str) -> float:
    model = models.cast(models.quiet(models.diffusers_wan_vae()), getattr(torch, dtype))
    z = torch.randn(1, 16, *map(int, grid)).to(getattr(torch, dtype))
    if mode == "accelerated":
        fastdit.accelerate(model)
    before = resident()
    with torch.no_grad():
        model.decode(z)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 2**20


def peak(*arguments: object) -> float:
    command = [sys.executable, __file__, *map(str, arguments)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("dtype, height, width", [("float32", 48, 48), ("bfloat16", 48, 48), ("bfloat16", 90, 160)])
def test_decode(dtype, height, width):
    eager, ours = (peak(mode, dtype, 2, height, width) for mode in ("eager", "accelerated"))
    size = f"{8 * height} x {8 * width}"
    print(f"\n5 frames of {size}, {dtype}: {eager:.0f} MiB as it is, {ours:.0f} accelerated, {ours / eager:.2f}x")
    assert ours <= (0.6 if height > 48 else 0.8) * eager  # packed weights are a constant part


if __name__ == "__main__":
    print(measure(*sys.argv[1:]))
