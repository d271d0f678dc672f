"""conv's CUDA kernels: every sample and tile, in the block simulator or on a GPU."""

import contextlib

import pytest
import torch
from test_contract import HOT_SAMPLES
from test_conv_triton import _draw_conv, _wan
from hypothesis import Phase, given, settings, strategies as st

from fastdit import ops
from fastdit.backends.cuda import _launch
from fastdit.backends.registry import NoBackend
from fastdit.testing import close, contract, simt
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

DEVICE = "cuda" if torch.cuda.is_available() and _launch._cuda is not None else "cpu"
if DEVICE == "cpu":
    pytest.importorskip("fastdit._cuda_sim", reason="neither the CUDA module with a GPU nor the block simulator")
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
