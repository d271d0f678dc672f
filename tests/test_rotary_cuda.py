"""rotary's CUDA kernels: every sample, and what the samples do not hold, in the block simulator or on a GPU."""

from functools import partial

import pytest
import rotary_laws as laws
import torch
from cuda_place import DEVICE, HERE, both, machine, pytestmark, same_bits_on_every_schedule  # noqa: F401
from hypothesis import HealthCheck, given, settings, strategies as st
from rotary_laws import SAMPLES
from test_contract import HOT_SAMPLES

import fastdit
from fastdit import ops
from fastdit.backends.cuda import rotary as adapter
from fastdit.testing import close, contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample

HOT = [s for s in HOT_SAMPLES if s.op == "qk_norm_rope"]
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)
FEW = ("packed-axes", "tail-D-half")  # the others are for test-full: torch's own checks take long
each_hot = pytest.mark.parametrize(
    "sample", [s if s.id in FEW else pytest.param(s, marks=pytest.mark.full) for s in HOT], ids=str
)
fuzzed = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15
)


@each_dtype
@each_sample
def test_samples(sample, dtype):
    both(sample, dtype)


@each_hot
def test_opcheck(sample):
    assert contract.opcheck(sample, "cuda", DEVICE) == 2


@each_sample
def test_fast_path_equals_torch_ops(sample):
    contract.paths_equal(sample, torch.bfloat16, "cuda", DEVICE)


@each_hot
def test_compile(sample):
    contract.compile_dynamic(sample, "cuda", device=DEVICE)


@pytest.mark.parametrize("law, arguments", laws.EVERYWHERE)
def test_law(law, arguments):
    law(*HERE, *arguments)


# ---- geometries ---------------------------------------------------------------------------------------
def heads(lead, Hq, Hk, D, *, turning=None, per_head=False, start=0, shift=0, bias=False, **options):
    """q (*lead, Hq, D) and k (*lead, Hk, D); shift: elements that they begin beyond 16 bytes."""

    def make(m: Maker):
        q, k = (m.randn(*lead, H, D + 8)[..., shift : D + shift] for H in (Hq, Hk))
        angle = m.randn(lead[-1] - start, *((Hq,) if per_head else ()), turning or D // 2, dtype=torch.float64)
        kwargs = dict(cos=angle.cos().float(), sin=angle.sin().float(), rope_start=start) | options
        hidden = options.get("scope") == "hidden"
        for name, H in (("q", Hq), ("k", Hk)):
            size = H * D if hidden else D
            kwargs[f"{name}_weight"] = m.randn(size) + 1
            if bias:
                kwargs[f"{name}_bias"] = m.randn(size)
        return (q, k), kwargs

    return Sample("qk_norm_rope", "own", make)


# 4 processors are pretended where there is no GPU: from 64 tokens on a warp has all heads of a token, below it a block.
GEOMETRIES = {
    "many-tokens": heads((2, 45), 3, 2, 64, norm="rms", start=5),
    "many-tokens-halves": heads((90,), 5, 1, 96, norm="layer", layout="half", bias=True),
    "rounds-of-a-block": heads((1, 9), 21, 5, 64, norm="rms"),
    "rounds-per-head": heads((1, 7), 9, 9, 128, norm="rms", layout="half", per_head=True),
    "widest-head": heads((3,), 3, 2, 512, norm="rms"),
    "odd-head": heads((70,), 2, 3, 37, norm="layer", layout="half", turning=11, bias=True),
    "not-aligned": heads((2, 5), 3, 3, 64, norm="rms", shift=1),
    "hidden-halves": heads((2, 5), 6, 6, 128, norm="rms", scope="hidden", layout="half"),
    "hidden-tail": heads((1, 5), 13, 7, 96, norm="layer", scope="hidden", turning=40, bias=True),
    "hidden-axis-half": heads((1, 5), 5, 5, 96, norm="layer", scope="hidden", layout="axis_half"),
}


@each_dtype
@pytest.mark.parametrize("name", GEOMETRIES)
def test_geometries(name, dtype):
    both(GEOMETRIES[name], dtype)


@pytest.mark.full
@pytest.mark.parametrize("scope", ["head", "hidden"])
@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_widths_of_models(layout, scope):
    """Wan 14B and 48 heads, the most that a block holds."""
    for count in (40, 48):
        both(heads((1, 9), count, count, 128, norm="rms", scope=scope, layout=layout), torch.bfloat16)


SCHEDULED = {s.id: s for s in SAMPLES if s.id in ("wan-native", "packed-axes", "mochi", "cogvideox")} | {
    name: GEOMETRIES[name] for name in ("many-tokens", "hidden-tail", "rounds-of-a-block")
}


@pytest.mark.parametrize("name", SCHEDULED)
def test_schedules(name):
    sample = SCHEDULED[name]

    def run():
        args, kwargs = sample.make(Maker(torch.bfloat16, DEVICE))
        with poisoned():
            return [*ops.qk_norm_rope(*args, **kwargs, backend="cuda"), *laws.gradients(*HERE, sample, torch.bfloat16)]

    same_bits_on_every_schedule(run)


@fuzzed
@given(data=st.data())
def test_fuzz(data):
    contract.forward(*laws.drawn(data), *HERE)


@fuzzed
@given(data=st.data())
def test_fuzz_backward(data):
    contract.backward(*laws.drawn(data), *HERE)


# ---- what is not served -------------------------------------------------------------------------------
def test_no_grid_leads_out_of_the_table():
    """An index that FASTDIT_CHECK would refuse: numbers of the table's last row, not of the memory behind it."""
    m = Maker(torch.float32, DEVICE)
    axes = [t.to(DEVICE) for t in ops.rope_table((4,), (8,))]
    q = m.randn(1, 9, 2, 8)
    grids = m.index([[9]])
    args = (q, q, *(None,) * 8, *axes, *(None,) * 4, grids, None, "head", 1e-6, "interleaved", 0, None, "fp32")
    out = adapter.qk_norm_rope(*args)[0]
    last = ops.qk_norm_rope(q[:, 3:], q, cos=axes[0][3:], sin=axes[1][3:], backend="cuda")[0]
    close.assert_bitwise(out[:, 3:], last)


def test_refusals():
    m, rotate = Maker(torch.float32, DEVICE), partial(ops.qk_norm_rope, backend="cuda")
    wide, many = m.randn(1, 2, 1, 520), m.randn(1, 2, 49, 128)
    with pytest.raises(fastdit.NoBackend, match="D up to 512; got D=520"):
        rotate(wide, wide)
    with pytest.raises(fastdit.NoBackend, match='up to 48 heads of D=128 under scope="hidden"; got 49'):
        rotate(many, many, norm="rms", scope="hidden")
    q, weight = m.randn(1, 2, 2, 8), m.randn(8, dtype=torch.float64)
    with pytest.raises(fastdit.NoBackend, match="float64"):
        rotate(q, q, norm="rms", q_weight=weight)
    with pytest.raises(fastdit.NoBackend, match="float64"):
        rotate(q.double(), q.double())
