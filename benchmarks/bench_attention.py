"""attention at the models' shapes against its peers: `pytest benchmarks/bench_attention.py`."""

import pytest

from fastdit.testing import bench


@pytest.mark.parametrize("workload, dtype", bench.family("attention"), ids=bench.label)
def test_attention(row, workload, dtype):
    row(workload, dtype)
