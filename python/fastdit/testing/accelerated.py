"""What the tests of `accelerate` ask of a report, and of a model under autocast and torch.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastdit
from fastdit.integrations import Report
from fastdit.testing import close


def layers(report: Report, replaced: bool = True) -> dict[str, int]:
    """How many of each kind were replaced, or left."""
    return {row.layer: row.count for row in report.rows if row.replaced is replaced}


def reasons(report: Report) -> set[str]:
    """Why layers were left."""
    return {row.why for row in report.rows if not row.replaced}


def check_autocast(
    model: Any, run: Callable[[Any], Tensor], truth: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Report:
    """Accelerates the model; run(model) under autocast has the dtype it had, and is as near to the truth."""
    with torch.autocast("cpu", dtype):
        before = run(model)
        report = fastdit.accelerate(model)
        after = run(model)
    assert after.dtype is before.dtype
    close.assert_close(after, truth, before)
    return report


def check_one_graph(block: Any, calls: Iterable[tuple]) -> None:
    """Compiled fullgraph, the block gives the very bits of eager for the arguments of each call, all in one graph."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(block, backend=counter, fullgraph=True, dynamic=True)
    for call in calls:
        for mine, eager in zip(close.flat(compiled(*call)), close.flat(block(*call)), strict=True):
            close.assert_bitwise(mine, eager)
    assert counter.frame_count == 1
