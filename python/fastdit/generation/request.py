"""What can be asked for: lengths, sizes and devices. Every refusal names what is near."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def prompts(prompt: str | Sequence[str]) -> list[str]:
    """One prompt or several, as a list."""
    listed = [prompt] if isinstance(prompt, str) else list(prompt)
    if not listed or not all(isinstance(p, str) for p in listed):
        raise TypeError(f"generate: prompt must be a string or a list of at least one; got {prompt!r}; write in words.")
    return listed


def device(name: str | torch.device | None) -> torch.device:
    """The device of this name; None is cuda where there is one."""
    there = torch.cuda.is_available()
    try:
        chosen = torch.device(name or ("cuda" if there else "cpu"))
    except RuntimeError:
        chosen = None
    if chosen is None or (chosen.type == "cuda" and not there):
        expected = "cpu or cuda" if there else "cpu: torch sees no GPU here"
        raise ValueError(f"generate: no such device; got {name!r}, expected {expected}; leave it out.")
    return chosen


def latent_frames(frames: int, group: int) -> int:
    """Latent frames of `frames` pictures: the first alone, then `group` to each."""
    if frames < 1 or (frames - 1) % group:
        raise ValueError(
            f"generate: frames must be 1 + a multiple of {group}; got {frames}, nearest {nearest(frames, group, 1)}."
        )
    return 1 + (frames - 1) // group


def area(size: Sequence[int], step: tuple[int, int]) -> tuple[int, int]:
    """(height, width), multiples of `step`: the pixels of one token."""
    if len(size) != 2 or any(n < 1 or n % s for n, s in zip(size, step, strict=True)):
        near = [f"{name} {nearest(n, s, s)}" for name, n, s in zip(("height", "width"), size, step, strict=False)]
        raise ValueError(
            f"generate: size must be (height, width), multiples of {step[0]} and {step[1]}; got {tuple(size)}, "
            f"nearest: {', '.join(near)}."
        )
    return size[0], size[1]


def nearest(value: int, step: int, least: int) -> str:
    """The legal values next to `value` among least, least + step, ...: "17 or 21"."""
    below = least + max(0, (value - least) // step) * step
    return f"{below}" if value <= below else f"{below} or {below + step}"
