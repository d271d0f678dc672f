"""rotary at the models' shapes against its peers: `pytest benchmarks/bench_rotary.py`."""

import pytest

from fastdit.testing import bench


@pytest.mark.parametrize("workload, dtype", bench.family("rotary"), ids=bench.label)
def test_rotary(row, workload, dtype):
    row(workload, dtype)
