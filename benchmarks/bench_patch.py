"""patch at the models' shapes against its peers: `pytest benchmarks/bench_patch.py`."""

import pytest

from fastdit.testing import bench


@pytest.mark.parametrize("workload, dtype", bench.family("patch"), ids=bench.label)
def test_patch(row, workload, dtype):
    row(workload, dtype)
