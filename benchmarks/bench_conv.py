"""conv at the models' shapes against its peers: `pytest benchmarks/bench_conv.py`."""

import pytest

from fastdit.testing import bench


@pytest.mark.parametrize("workload, dtype", bench.family("conv"), ids=bench.label)
def test_conv(row, workload, dtype):
    row(workload, dtype)
