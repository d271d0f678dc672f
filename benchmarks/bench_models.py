"""Whole models, as they are and accelerated, in turns: what a user feels.

    pytest benchmarks/bench_models.py -k Wan

`fastdit bench --op model` prints the same rows; `fastdit demo` adds errors and the split per operator.
"""

import pytest

from fastdit.testing import bench, timing, whole


@pytest.mark.parametrize("row, dtype", whole.cases(), ids=bench.label)
def test_model(row, dtype):
    timing.keep_freed_memory()
    measured = whole.measure(row, dtype, bench.Settings(compiled=False))
    print(f"\n{row} {dtype}: {measured.ratio('eager'):.2f}x eager, {measured.pct_ceiling:.0f} % of GEMM")
    assert measured.ratio("eager") > 1
