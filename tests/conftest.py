"""Fixtures that every family's tests use."""

import gc
import importlib.util
import os

import pytest
import torch
from ledger import pytest_runtest_logreport, pytest_terminal_summary  # noqa: F401  hooks

if not torch.cuda.is_available():  # read when the kernels are imported: without a GPU they run in Triton's interpreter
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:  # references in fp32 are baselines: TF32, cuDNN's default, would allow a thousand times their error
    torch.backends.cudnn.allow_tf32 = False

from fastdit import _cpu

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
    from fastdit.testing import interpret

    interpret.install()

_ORDER = ("portable", "avx2", "avx512", "avx512_bf16")
ISAS = _ORDER[: _ORDER.index(_cpu.best_isa()) + 1]


def pytest_collection_finish(session):
    """What the imports left stays: collections need not walk it, a tenth of the time of small tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(params=ISAS)
def isa(request):
    """Runs the test once per instruction set that this machine has."""
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture(autouse=True)
def _fresh():
    # torch.manual_seed formats the stack once for every accelerator that is not there
    (torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed)(0)
    yield
    torch._dynamo.reset()
    if torch.cuda.is_initialized() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # the context is lost, and every test behind this one: xdist starts another process
            os._exit(1)
