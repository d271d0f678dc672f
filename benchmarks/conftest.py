"""`pytest benchmarks/`: one row per workload and dtype, timed by pytest-benchmark, its peers in extra_info.

pytest benchmarks/ --benchmark-json=rows.json
pytest benchmarks/bench_attention.py -k DiT
"""

import pytest

from fastdit.testing import bench, timing


@pytest.fixture(scope="session", autouse=True)
def _kept_memory():
    timing.keep_freed_memory()


@pytest.fixture
def row(benchmark):
    """`row(workload, dtype)` asserts correctness, measures fastdit against its peers and records both."""

    def measure(workload, dtype, **settings):
        measured = bench.measure(workload, dtype, bench.Settings(compiled=False, **settings))
        benchmark.group = workload.op
        benchmark.extra_info["rows"] = measured.rows()
        benchmark.pedantic(bench.call(workload, dtype), rounds=7, warmup_rounds=1)
        return measured

    return measure
