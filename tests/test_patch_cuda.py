"""patch's CUDA kernels: every sample, layout and path, in the block simulator or on a GPU."""

import math

import patch_laws as laws
import pytest
import torch
from cuda_place import DEVICE, HERE, both, machine, pytestmark, same_bits_on_every_schedule  # noqa: F401
from hypothesis import given, settings, strategies as st

import fastdit
from fastdit import ops
from fastdit.testing import close, contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample

SAMPLES = laws.EMBED + laws.MOVE
HOT = [s for s in SAMPLES if s.id in ("image-pos", "list-pos", "wan", "list")]
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])


@each_dtype
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_samples(sample, dtype):
    both(sample, dtype)


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_opcheck(sample):
    assert contract.opcheck(sample, *HERE) == 2


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_fast_path_equals_torch_ops(sample):
    contract.paths_equal(sample, torch.bfloat16, *HERE)


@pytest.mark.parametrize("sample", [s for s in HOT if s.id in ("image-pos", "wan")], ids=str)
def test_compile(sample):
    contract.compile_dynamic(sample, "cuda", device=DEVICE)


@pytest.mark.parametrize("order", laws.ORDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
def test_every_order(order, dtype):
    laws.every_size_in_order(*HERE, order, dtype=dtype)


@pytest.mark.parametrize("grid", [(1, 2, 68), (2, 1, 64)], ids=str)
@pytest.mark.parametrize("order", ["thwc", "cthw"])
def test_rows_of_tokens_in_parts(order, grid):
    """More tokens in a row than a block takes, and lines of whole and of half packs."""
    laws.every_size_in_order(*HERE, order, grid)


@each_dtype
@pytest.mark.parametrize("sample", [s for s in laws.MOVE if s.id in ("wan", "odd-run", "list")], ids=str)
def test_gradient_of_a_move_is_a_move(sample, dtype):
    laws.gradient_of_a_move_is_a_move(*HERE, sample, dtype)


@each_dtype
def test_packed_equals_one_by_one(dtype):
    """Eighteen videos, so two launches."""
    laws.packed_equals_one_by_one(*HERE, dtype, (1, 2, 133, 4, 5, 1, 1, 9, 2, 3, 1, 1))


K_STEPS = [(16, (1, 1, 1)), (1, (1, 1, 8)), (65, (1, 1, 1)), (40, (1, 2, 2))]
K_CHUNKS = [(33, (2, 2, 3)), (3, (1, 14, 14))]  # K = 396 and 588: fp32 and 16 bits no more fit whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("C, patch", K_STEPS + K_CHUNKS)
def test_every_count_of_k_steps(C, patch, dtype):
    laws.count_of_k_steps(*HERE, dtype, C, patch, (1, 2, 3))


@pytest.mark.parametrize("D", [64, 72, 136, 201])
@pytest.mark.parametrize("kind", [None, torch.float32], ids=["own", "fp32"])
def test_outputs(D, kind):
    """One slab and several, whole and cut, in packs and one by one; a bias and a table of the other dtype."""
    m = Maker(torch.bfloat16, DEVICE)
    x, weight, bias = m.randn(1, 4, 1, 6, 44), m.randn(D, 4, 1, 2, 2, dtype=kind), m.randn(D, dtype=torch.float32)
    made = (x, weight, bias), dict(pos=m.randn(66, D + 8)[..., 8:])
    both(Sample("patch_embed3d", "outputs", lambda _: made), torch.bfloat16)


@each_dtype
@pytest.mark.parametrize("kind", [None, torch.float32], ids=["own", "fp32"])
def test_weight_gradient_in_splits(kind, dtype):
    """More tiles of tokens than a split takes."""
    laws.weight_gradient_in_splits(*HERE, dtype, kind, (3, 3, 1, 34, 36))


def _several(m: Maker, C: int = 3):
    x, w, b, pos = m.randn(2, C, 1, 10, 36), m.randn(72, C, 1, 2, 2), m.randn(72), m.randn(90, 72)
    return ops.patch_embed3d, [x, w, b, pos], lambda x, w, b, pos: ((x, w, b), dict(pos=pos))


def _several_as_a_list(m: Maker):
    x, w, b, pos = m.randn(2, 3, 1, 10, 36), m.randn(72, 3, 1, 2, 2), m.randn(72), m.randn(108, 72)
    return ops.patch_embed3d, [x, w, b, pos], lambda x, w, b, pos: (([x[0], x[1, :, :, :2]], w, b), dict(pos=pos))


def _one_move(m: Maker):
    return ops.unpatchify3d, [m.randn(2, 30, 16)], lambda t: ((t,), dict(grid=(2, 3, 5), patch=(1, 2, 2), channels=4))


SCHEDULED = {
    "batch": (_several, torch.bfloat16),
    "list": (_several_as_a_list, torch.bfloat16),
    "chunks": (lambda m: _several(m, 60), torch.float32),
    "move": (_one_move, torch.bfloat16),
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules(name):
    make, dtype = SCHEDULED[name]
    op, leaves, arguments = make(Maker(dtype, DEVICE))
    leaves = [t.requires_grad_() for t in leaves]

    def run():
        args, kwargs = arguments(*leaves)
        with poisoned():
            out = close.flat(op(*args, **kwargs, backend="cuda"))[0]
            return [out, *torch.autograd.grad(out, leaves, torch.cos(out.detach()))]

    same_bits_on_every_schedule(run)


@pytest.mark.parametrize("law, arguments", laws.EVERYWHERE)
def test_law(law, arguments):
    law(*HERE, *arguments)


@each_dtype
def test_a_bad_token_stays_alone(dtype):
    laws.a_bad_token_stays_alone(*HERE, dtype)


def test_tokens_too_wide_are_refused():
    x, w = torch.randn(1, 4097, 1, 1, 1, device=DEVICE), torch.randn(8, 4097, 1, 1, 1, device=DEVICE)
    with pytest.raises(fastdit.NoBackend, match="a token's values in shared memory: up to 4096; got 4097"):
        ops.patch_embed3d(x, w, backend="cuda")
    with pytest.raises(fastdit.NoBackend, match="up to 4096; got 4097"):
        ops.unpatchify3d(x.view(1, 1, -1), grid=(1, 1, 1), patch=(1, 1, 1), channels=4097, backend="cuda")
    most = torch.randn(2, 4096, device=DEVICE)
    move = dict(grid=[(1, 1, 2)], patch=(1, 1, 2), channels=2048)
    close.assert_bitwise(*(ops.unpatchify3d(most, **move, backend=b)[0] for b in ("cuda", "reference")))


def test_explain():
    x, w = torch.randn(1, 4, 1, 4, 4, device=DEVICE), torch.randn(8, 4, 1, 2, 2, device=DEVICE)
    verdict = "chosen" if DEVICE == "cuda" else "can run, never chosen by itself here"
    assert f"cuda        {verdict}" in fastdit.explain("patch_embed3d", x, w)
    move = dict(grid=(1, 2, 2), patch=(1, 2, 2), channels=4)
    assert f"cuda        {verdict}" in fastdit.explain("unpatchify3d", torch.randn(1, 4, 16, device=DEVICE), **move)
    with pytest.raises(fastdit.NoBackend, match=r"has no kernel for torch\.float64"):
        ops.patch_embed3d(x.double(), w.double(), backend="cuda")


@pytest.mark.full
@each_dtype
@pytest.mark.parametrize(
    "C, D, patch, grid, B",
    [(4, 1152, (1, 2, 2), (1, 16, 16), 2), (16, 1536, (1, 2, 2), (1, 30, 52), 1), (48, 320, (1, 2, 2), (2, 8, 40), 1)],
    ids=["DiT-XL/2-256", "Wan2.1-1.3B", "Wan2.2-5B"],
)
def test_sizes_of_models(C, D, patch, grid, B, dtype):
    m = Maker(dtype, DEVICE)
    x = m.randn(B, C, *(g * p for g, p in zip(grid, patch, strict=True)))
    K, N = C * math.prod(patch), math.prod(grid)
    made = (x, m.randn(D, C, *patch) / math.sqrt(K), m.randn(D)), dict(pos=m.randn(N, D))
    both(Sample("patch_embed3d", "model", lambda _: made), dtype)
    move = (m.randn(B, N, K),), dict(grid=grid, patch=patch, channels=C, order="thwc")
    both(Sample("unpatchify3d", "model", lambda _: move, moves=True), dtype)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data):
    laws.fuzz(*HERE, data)


@pytest.mark.big
@pytest.mark.skipif(DEVICE == "cuda", reason="reserved memory that nobody touches is the CPU's")
def test_offsets_beyond_32_bits():
    laws.offsets_beyond_32_bits("cuda")
