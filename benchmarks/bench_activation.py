"""activation at the models' shapes against its peers: `pytest benchmarks/bench_activation.py`."""

import pytest

from fastdit.testing import bench


@pytest.mark.parametrize("workload, dtype", bench.family("activation"), ids=bench.label)
def test_activation(row, workload, dtype):
    row(workload, dtype)
