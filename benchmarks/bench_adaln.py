"""The halves of an adaLN block at the models' shapes: `pytest benchmarks/bench_adaln.py`."""

import pytest

from fastdit.testing import bench


@pytest.mark.parametrize("workload, dtype", bench.family("adaln"), ids=bench.label)
def test_adaln(row, workload, dtype):
    row(workload, dtype)
