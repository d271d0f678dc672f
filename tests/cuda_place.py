"""Where the tests of the CUDA kernels run: on a GPU, or on CPU tensors in the block simulator.

A test file imports `machine` and `pytestmark` by these names: pytest finds them there.
"""

import contextlib
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from fastdit.backends.cuda import _launch
from fastdit.testing import close, contract, simt
from fastdit.testing.workloads import Sample

DEVICE = "cuda" if torch.cuda.is_available() and _launch._cuda is not None else "cpu"
if DEVICE == "cpu":
    pytest.importorskip("fastdit._cuda_sim", reason="neither the CUDA module with a GPU nor the block simulator")
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
HERE = "cuda", DEVICE


def where(schedule: str = "eager", seed: int = 1):
    return simt.simulated(schedule, seed) if DEVICE == "cpu" else contextlib.nullcontext()


@contextlib.contextmanager
def on_card(sm: int):
    """Kernels of this compute capability: chosen in the simulator, and on a GPU whose own kernels they are."""
    if DEVICE == "cuda" and (sm == 90) > (torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("the card is no sm_90")
    with simt.as_card(sm):
        yield


@pytest.fixture(autouse=True)
def machine():
    with where():
        yield


def both(sample: Sample, dtype: torch.dtype) -> None:
    contract.forward(sample, dtype, *HERE)
    contract.backward(sample, dtype, *HERE)


def same_bits_on_every_schedule(run: Callable[[], Iterable[Tensor]]) -> None:
    """Another order of threads, blocks and copies: what `run` returns does not change."""
    if DEVICE == "cuda":
        pytest.skip("a card has one schedule")
    first = run()
    for schedule, seed in (("lazy", 1), ("random", 1), ("random", 2)):
        with where(schedule, seed):
            close.assert_all_bitwise(run(), first)
