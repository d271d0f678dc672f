"""The block simulator itself: matrix and copy instructions against torch and against layouts written down here."""

import re

import pytest
import torch

from fastdit.testing import simt

sim = pytest.importorskip("fastdit._cuda_sim", reason="the block simulator is not built")
each_schedule = pytest.mark.parametrize("schedule", simt.SCHEDULES)


def gemm(kind: str, M: int, N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(computed, expected) of a kernel of csrc/cuda/simt/tiles.cu."""
    a, b = torch.randn(M, K).bfloat16(), torch.randn(N, K).bfloat16()
    c = torch.full((M, N), float("nan"))
    first = a.t().contiguous() if "both" in kind else a
    given = b.t().contiguous() if "/transposed" in kind else b
    sim.forget()
    for t, filled in ((first, True), (given, True), (c, False)):
        sim.allow(t.data_ptr(), t.element_size(), list(t.shape), list(t.stride()), filled, not filled)
    sim.run_gemm(kind, first.data_ptr(), given.data_ptr(), c.data_ptr(), M, N, K)
    return c, (a.double() @ b.double().t()).float()


@each_schedule
@pytest.mark.parametrize("shape", [(16, 16, 16), (40, 24, 48), (33, 8, 24)], ids=str)
@pytest.mark.parametrize("kind", ["mma", "mma/transposed"])
def test_mma(kind, shape, schedule):
    sim.schedule(schedule)
    found, expected = gemm(kind, *shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@each_schedule
@pytest.mark.parametrize("shape", [(64, 64, 64), (128, 64, 256), (72, 104, 200)], ids=str)
@pytest.mark.parametrize("kind", ["wgmma", "wgmma/transposed", "wgmma/transposed both", "wgmma/registers"])
def test_wgmma(kind, shape, schedule):
    """Ragged shapes lean on the zero fill of tensor copies; 256 of K passes each stage twice."""
    sim.schedule(schedule)
    found, expected = gemm(kind, *shape)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


FAULTS = {
    "mma:no copy wait": "a wait is missing",
    "wgmma:no full wait": "never written|race|is under way",
    "wgmma:wrong parity": "never written|race|is under way|beyond the pending|deadlock",
    "wgmma:no empty wait": "race|is under way|beyond the pending|deadlock",
    "wgmma:early release": "race",
    "wgmma:no wait": "race|without waiting for its wgmma|without wgmma.fence",
    "wgmma:no fence": "without wgmma.fence",
    "wgmma:half the bytes": "race|is under way|beyond the pending|deadlock|never written|ends while",
    "wgmma:no proxy fence": "without a fence.proxy.async",
}


@each_schedule
@pytest.mark.parametrize("kind", FAULTS)
def test_faults(kind, schedule):
    for seed in range(4 if schedule == "random" else 1):
        sim.schedule(schedule, seed)
        with pytest.raises(RuntimeError) as caught:
            gemm(kind, 64, 64, 256)
        assert re.search(FAULTS[kind], str(caught.value)), str(caught.value)


def test_a_wrong_stride_inside_the_tile_is_a_wrong_result():
    """No fault is raised where a descriptor reads other valid data: only numbers tell."""
    sim.schedule("eager")
    found, expected = gemm("wgmma:wrong stride", 64, 64, 64)
    assert not torch.allclose(found, expected, rtol=1e-2, atol=1e-1)


# mode: (bytes of a row, rows after which the pattern repeats): 16-byte chunk c of row r stands at c ^ (r's place in it)
SWIZZLES = {
    1: (128, lambda r, c: c ^ (r % 8)),
    2: (64, lambda r, c: c ^ (r // 2 % 4)),
    3: (32, lambda r, c: c ^ (r // 4 % 2)),
}


@pytest.mark.parametrize("mode", [0, *SWIZZLES])
@pytest.mark.parametrize("corner", [(0, 0), (8, 64), (-3, -8), (35, 152)], ids=str)
def test_tensor_copy(mode, corner):
    """Where each value of a box stands in shared memory, from the table of the PTX manual; zeros outside the tensor."""
    sim.schedule("lazy")
    M, N, rows = 40, 160, 16
    span, chunk = SWIZZLES.get(mode, (128, lambda r, c: c))
    x = torch.arange(M * N, dtype=torch.int16).view(M, N) + 1
    out = torch.full((rows * span // 2,), -1, dtype=torch.int16)
    sim.forget()
    sim.allow(x.data_ptr(), 2, [M, N], [N, 1], True, False)
    sim.allow(out.data_ptr(), 2, [out.numel()], [1], False, True)
    sim.run_tile(x.data_ptr(), out.data_ptr(), M, N, rows, *corner, mode, False)
    padded = torch.zeros(M + 64, N + 256, dtype=torch.int16)
    padded[32 : 32 + M, 128 : 128 + N] = x
    box = padded[32 + corner[0] :, 128 + corner[1] :][:rows, : span // 2]
    expected = torch.empty(rows, span // 16, 8, dtype=torch.int16)
    for r in range(rows):
        for c in range(span // 16):
            expected[r, chunk(r, c)] = box[r, 8 * c : 8 * c + 8]
    assert torch.equal(out, expected.flatten())


def test_a_dim_of_one_has_no_stride():
    """Whatever its tensor says: here one that the copy engine refuses."""
    sim.schedule("eager")
    x, out = torch.arange(100, dtype=torch.int16), torch.full((2, 64), -1, dtype=torch.int16)
    sim.forget()
    sim.allow(x.data_ptr(), 2, [100], [1], True, False)
    sim.allow(out.data_ptr(), 2, [128], [1], False, True)
    sim.run_tile(x.data_ptr(), out.data_ptr(), 1, 100, 2, 0, 64, 0, False)
    expected = torch.zeros_like(out)
    expected[0, :36] = x[64:]
    assert torch.equal(out, expected)


@each_schedule
def test_tensor_store(schedule):
    """A box goes back where it came from, and what lies outside the tensor is left out."""
    sim.schedule(schedule)
    x = torch.arange(40 * 160, dtype=torch.int16).view(40, 160)
    out = torch.full_like(x, -1)
    sim.forget()
    sim.allow(x.data_ptr(), 2, [40, 160], [160, 1], True, False)
    sim.allow(out.data_ptr(), 2, [40, 160], [160, 1], False, True)
    sim.run_tile(x.data_ptr(), out.data_ptr(), 40, 160, 16, 32, 128, 1, True)
    expected = torch.full_like(x, -1)
    expected[32:, 128:] = x[32:, 128:]
    assert torch.equal(out, expected)
