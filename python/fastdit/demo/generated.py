"""One clip of the shipped checkpoint: what becomes of a prompt, and what a detector sees in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fastdit.data import media
from fastdit.data.detect import detect
from fastdit.generation import Generator

PROMPT, SEED = "a red circle moving right on a blue background", 1


def run(device: str, out: Path, step: Callable[[str], None]) -> tuple[dict[str, Any], np.ndarray]:
    """Writes `out`/generated.mp4; the facts for report.json, and the pictures."""
    step(f"generating {PROMPT!r}")
    generator = Generator.load(device=device)
    began = time.perf_counter()
    made = generator.generate(PROMPT, seed=SEED)
    seconds = time.perf_counter() - began
    path = out / "generated.mp4"
    media.write(path, made.frames, made.fps)
    frames, height, width = made.size
    facts = {
        "file": path.name, "prompt": PROMPT, "expanded": generator.expanded(PROMPT), "seed": SEED, "frames": frames,
        "size": [height, width], "fps": made.fps, "seconds": seconds, "shows": asdict(detect(made.frames)),
    }  # fmt: skip
    return facts, made.frames.numpy()
