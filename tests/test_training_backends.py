"""Training gives the same losses with the native kernels and with plain PyTorch.

`fastdit.testing.close` judges the curve as it judges an op: truth is the reference backend in fp64, the allowance comes
from the reference backend in fp32. Trainings amplify rounding: the kinks of |error| by 10x in ten steps at a rate of
2e-3, so the VAE trains here on the squared error, at the rate of the articles, 1e-4.
"""

from dataclasses import replace

import pytest
import torch

from fastdit.testing import training
from fastdit.testing.close import assert_close


@pytest.mark.parametrize("steps", [30, pytest.param(200, marks=pytest.mark.full)])
@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_same_losses(kind, steps, tmp_path):
    config = training.smoke()
    optimizer = replace(config.vae.optimizer, lr=1e-4)
    config = replace(config, vae=replace(config.vae, optimizer=optimizer, l1=0.0, l2=1.0))
    truth = training.losses(training.trainer(kind, config, tmp_path, dtype=torch.float64), steps, backend="reference")
    baseline = training.losses(training.trainer(kind, config, tmp_path), steps, backend="reference")
    found = training.losses(training.trainer(kind, config, tmp_path), steps)
    assert truth[-5:].mean() < truth[:5].mean() and not torch.equal(found, baseline)
    assert_close(found, truth, baseline)
