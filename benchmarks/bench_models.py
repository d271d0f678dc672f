"""Whole models, as they are and accelerated, in turns: what a user feels.

    pytest benchmarks/bench_models.py

`fastdit demo` shows the same with errors and the split per operator.
"""

import pytest
import torch

from fastdit import accelerate
from fastdit.demo import models
from fastdit.testing import timing

DIT_512 = {**models.DIT_XL_2_256, "sample_size": 64}


def rows(benchmark, eager, call, rounds):
    fast = models.twin(eager)
    assert accelerate(fast).replaced > 0
    with torch.no_grad():
        expected, actual = call(eager), call(fast)
        assert torch.isfinite(actual).all()
        scale = expected.double().pow(2).mean().sqrt()
        assert (actual.double() - expected.double()).pow(2).mean().sqrt() < 0.05 * scale
        calls = {"eager": lambda: call(eager), "fastdit": lambda: call(fast)}
        timed = timing.interleaved(calls, rounds=rounds, repeats=1)
        benchmark.pedantic(lambda: call(fast), rounds=1)
    ratio = timed["eager"].p50 / timed["fastdit"].p50
    benchmark.extra_info.update(eager_ms=timed["eager"].ms, fastdit_ms=timed["fastdit"].ms, ratio=ratio)
    print(f"\n{benchmark.name}: {timed['eager'].ms:.0f} -> {timed['fastdit'].ms:.0f} ms, {ratio:.2f}x eager")


@pytest.mark.parametrize("config", [models.DIT_XL_2_256, DIT_512], ids=["DiT-XL/2-256", "DiT-XL/2-512"])
def test_dit(benchmark, config):
    inputs = models.dit_inputs(config, 2, "cpu")
    rows(benchmark, models.dit(config).bfloat16(), lambda model: models.run_dit(model, inputs), rounds=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_wan_vae_decode(benchmark, dtype):
    latents = torch.randn(1, 16, 3, 16, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows(benchmark, models.vae({}).to(dtype), lambda model: model.decode(latents, return_dict=False)[0], rounds=3)
