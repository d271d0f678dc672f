"""Where one forward pass spends its time: seconds per operator, seen through a dispatch mode."""

from __future__ import annotations

import time
from collections import defaultdict
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdit.testing import timing

_VIEWS = {"view", "_unsafe_view", "t", "transpose", "permute", "unsqueeze", "squeeze", "split", "slice", "select"}
_VIEWS |= {"expand", "as_strided", "unbind", "chunk", "detach", "alias", "split_with_sizes", "reshape", "empty"}
_LINEAR = {"addmm", "mm", "bmm", "baddbmm", "linear", "matmul"}
_COPIES = {"cat", "constant_pad_nd", "pad", "clone", "copy_", "_to_copy", "contiguous", "stack", "repeat"}
_KINDS = {"linear": _LINEAR, "activation": {"gelu", "silu"}, "copies": _COPIES, "views": _VIEWS}


class OpClock(TorchDispatchMode):
    """`with OpClock(device) as clock: model(x)`; then clock.seconds and clock.calls, by operator name.

    Python adds about 10 us to each operator: honest for the milliseconds of a real model, not for microseconds.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        timing.synchronize(self.device)
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        timing.synchronize(self.device)
        name = func.name().split(".")[0] if isinstance(func, torch._ops.OpOverload) else str(func)
        self.seconds[name] += time.perf_counter() - start
        self.calls[name] += 1
        return result


def kind(name: str) -> str:
    """One of linear, attention, conv, patch, modulation, rotary, activation, copies, views, elementwise."""
    library, _, op = name.partition("::")
    if "attention" in op:
        return "attention"
    if "conv" in op or op == "norm_silu":
        return "conv"
    if library == "fastdit":
        if op == "activation":
            return op
        return "patch" if "patch" in op else "rotary" if "rope" in op else "modulation"
    for group, members in _KINDS.items():
        if op in members:
            return group
    return "elementwise"


def by_group(clock: OpClock, groups: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Seconds per group; `groups` maps a printed name to the kinds that it holds, the last one takes what is left."""
    sums = dict.fromkeys(groups, 0.0)
    place = {k: name for name, kinds in groups.items() for k in kinds}
    rest = list(groups)[-1]
    for name, seconds in clock.seconds.items():
        sums[place.get(kind(name), rest)] += seconds
    return sums
