"""Tile sizes: a default per architecture, overridden by a table per device that `fastdit bench --tune` writes.

Nothing is tuned at run time. A kernel's candidates (at most 8) are registered beside its adapter; the table
`choice/<device>.json` maps "kernel|key" to one of them.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _facts
from ._launch import arch

FOLDER = Path(__file__).parent / "choice"


class Config(NamedTuple):
    """blocks: the kernel's tile constants, in its own order."""

    blocks: tuple[int, ...]
    warps: int = 4
    stages: int = 2


CANDIDATES: dict[str, tuple[Config, ...]] = {}
_forced: dict[str, Config] = {}
_chosen: dict[tuple, Config] = {}
_tables: dict[str, dict[str, Config]] = {}


def tunable(kernel: str, *candidates: Config) -> None:
    if not 1 <= len(candidates) <= 8 or kernel in CANDIDATES:
        raise ValueError(f"tunable: {kernel} needs 1 to 8 candidates, once; got {len(candidates)}")
    CANDIDATES[kernel] = candidates


def choose(kernel: str, x: Tensor, key: tuple, default: Callable[[int], Config]) -> Config:
    """The configuration of `kernel` for static facts `key` (dtype, channels, head dim) on x's device."""
    spot = (kernel, x.get_device(), key)
    found = _chosen.get(spot)
    if found is None:
        found = _forced.get(kernel) or table(device_name(x)).get(_name(kernel, key)) or default(arch(x))
        _chosen[spot] = found
    return found


def _name(kernel: str, key: tuple) -> str:
    """The key of a choice in its table."""
    return f"{kernel}|{','.join(str(k).removeprefix('torch.') for k in key)}"


def chosen() -> dict[str, Config]:
    """What was chosen since `forget()` or the last change of `forced`, by the names in the tables."""
    return {_name(kernel, key): config for (kernel, _, key), config in _chosen.items()}


def device_name(x: Tensor) -> str:
    """The device as a file name: nvidia-h200."""
    name = torch.cuda.get_device_name(x.device) if x.is_cuda else "none"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def table(device: str) -> dict[str, Config]:
    if device not in _tables:
        file = FOLDER / f"{device}.json"
        rows = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        _tables[device] = {k: Config(tuple(v["blocks"]), v["warps"], v["stages"]) for k, v in rows.items()}
    return _tables[device]


def save(device: str, rows: dict[str, Config]) -> Path:
    """Adds rows to the device's table on disk; they hold from the next choice on."""
    forget()
    file = FOLDER / f"{device}.json"
    known = {name: c._asdict() for name, c in sorted((table(device) | rows).items())}
    file.write_text(
        "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in known.items()) + "\n}\n", "utf-8"
    )
    forget()
    return file


@contextlib.contextmanager
def forced(kernel: str, config: Config) -> Iterator[None]:
    """Every choice of this kernel is `config` inside the block: how the tuner and the tests try candidates."""
    _forced[kernel] = config
    _forget_choices()
    try:
        yield
    finally:
        del _forced[kernel]
        _forget_choices()


def forget() -> None:
    """Drops what was chosen: after the architecture was pretended, or a table rewritten."""
    _forget_choices()
    _tables.clear()


def _forget_choices() -> None:
    _chosen.clear()
    _facts.forget()
