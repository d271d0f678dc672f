"""modulation at the models' shapes against its peers: `pytest benchmarks/bench_modulation.py`."""

import pytest

from fastdit.testing import bench


@pytest.mark.parametrize("workload, dtype", bench.family("modulation"), ids=bench.label)
def test_modulation(row, workload, dtype):
    row(workload, dtype)
