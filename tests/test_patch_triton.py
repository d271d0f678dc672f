"""patch on the Triton kernels: what the contract on the samples (test_triton.py) does not reach."""

import contextlib

import patch_laws as laws
import pytest
import torch
from hypothesis import given, settings, strategies as st

pytest.importorskip("triton")

from fastdit import ops
from fastdit.backends.triton import _config, _launch
from fastdit.backends.triton._config import CANDIDATES, Config, forced
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
HERE = "triton", DEVICE
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])


@contextlib.contextmanager
def card(arch):
    _launch.pretend(arch)
    _config.forget()
    try:
        yield
    finally:
        _launch.pretend(None)
        _config.forget()


@each_dtype
@pytest.mark.parametrize("sample", laws.MOVE, ids=str)
def test_gradient_of_a_move_is_a_move(sample, dtype):
    laws.gradient_of_a_move_is_a_move(*HERE, sample, dtype)


@pytest.mark.parametrize("order", laws.ORDERS)
def test_every_order(order):
    laws.every_size_in_order(*HERE, order)


@each_dtype
def test_packed_equals_one_by_one(dtype):
    """Eleven videos, so two launches; tiles so small that videos have several."""
    small = Config((32, 32), 4, 1)
    with contextlib.ExitStack() as stack:
        for name in ("patch_embed", "patch_embed_dx", "patch_embed_dw"):
            stack.enter_context(forced(name, small))
        laws.packed_equals_one_by_one(*HERE, dtype)


@pytest.mark.parametrize("arch", [80, 90, 100, 120, 0])
@pytest.mark.parametrize("C, patch", [(16, (1, 1, 1)), (5, (1, 4, 4)), (40, (1, 2, 2)), (33, (2, 2, 3))])
def test_every_count_of_k_steps(C, patch, arch):
    """K = 16, 80, 160 and 396: one, two, three and seven steps of 64; five cards."""
    with card(arch):
        laws.count_of_k_steps(*HERE, torch.bfloat16, C, patch)


@pytest.mark.parametrize("name", ["patch_embed", "patch_embed_dx", "patch_embed_dw", "unpatchify"])
def test_every_candidate(name):
    m = Maker(torch.float16, DEVICE)
    x, w, b = m.randn(1, 3, 1, 6, 20), m.randn(72, 3, 1, 2, 2), m.randn(72)
    tokens, layout = m.randn(1, 30, 16), dict(grid=(1, 3, 10), patch=(1, 2, 2), channels=4)
    for config in CANDIDATES[name]:
        with forced(name, config):
            if name == "unpatchify":
                actual = ops.unpatchify3d(tokens, **layout, backend="triton")
                close.assert_bitwise(actual, ops.unpatchify3d(tokens, **layout, backend="reference"))
                continue
            sample = Sample("patch_embed3d", "candidate", lambda _: ((x, w, b), {}))
            (contract.forward if name == "patch_embed" else contract.backward)(sample, torch.float16, "triton", DEVICE)


@each_dtype
@pytest.mark.parametrize("kind", [None, torch.float32], ids=["own", "fp32"])
def test_weight_gradient_in_splits(kind, dtype):
    """Three and more splits."""
    with forced("patch_embed_dw", Config((16, 64), 4, 1)):
        laws.weight_gradient_in_splits(*HERE, dtype, kind)


@pytest.mark.parametrize("law, arguments", laws.EVERYWHERE)
def test_law(law, arguments):
    law(*HERE, *arguments)


def test_a_bad_token_stays_alone():
    laws.a_bad_token_stays_alone(*HERE, torch.float32)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data):
    laws.fuzz(*HERE, data)


@pytest.mark.big
@pytest.mark.skipif(DEVICE == "cuda", reason="reserved memory that nobody touches is the CPU's")
def test_offsets_beyond_32_bits():
    laws.offsets_beyond_32_bits("triton")
