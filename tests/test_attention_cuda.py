"""attention's CUDA kernels: every sample, many tiles under every mask, in the block simulator or on a GPU.

Tests that take `card` run twice: on mma.sync, and on wgmma as sm_90 does.
"""

import math
import re
from functools import partial

import attention_laws as laws
import pytest
import torch
from attention_laws import BASELINE, dense, segments
from cuda_place import DEVICE, HERE, both, machine, on_card, pytestmark, same_bits_on_every_schedule  # noqa: F401
from hypothesis import HealthCheck, given, settings, strategies as st
from test_contract import HOT_SAMPLES

import fastdit
from fastdit import ops
from fastdit.backends.cuda import _launch, attention as adapter
from fastdit.testing import close, contract, simt
from fastdit.testing.workloads import Maker, Sample, samples

SAMPLES = [s for op in BASELINE for s in samples(op) if s.id not in ("odd-head", "one-channel")]
HOT = [s for s in HOT_SAMPLES if s in SAMPLES]
DTYPES = (torch.bfloat16, torch.float16)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
gradients = partial(laws.gradients, "cuda")


@pytest.fixture(params=[80, 90], ids=lambda sm: f"sm_{sm}")
def card(request):
    with on_card(request.param):
        yield request.param


def holds(op: str, dtype: torch.dtype, make, what: str = "case") -> None:
    both(Sample(op, what, make, baseline=BASELINE[op]), dtype)


# ---- every path against the reference ---------------------------------------------------------------------------
# fp16 is bf16's code but for the format and the instruction: a sample of each mask here, every width in test_tiles
@pytest.mark.parametrize(
    "sample, dtype",
    [
        pytest.param(s, dtype, id=f"{s}-{dtype}", marks=pytest.mark.full if dtype == DTYPES[1] and s not in HOT else ())
        for s in SAMPLES for dtype in DTYPES
    ],
)  # fmt: skip
def test_samples(sample, dtype, card):
    both(sample, dtype)


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_opcheck(sample):
    assert contract.opcheck(sample, "cuda", DEVICE, torch.bfloat16) == 2


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_compile(sample):
    contract.compile_dynamic(sample, "cuda", device=DEVICE, dtype=torch.bfloat16)


@pytest.mark.parametrize("sample", HOT, ids=str)
def test_fast_path_equals_torch_ops(sample):
    contract.paths_equal(sample, torch.bfloat16, "cuda", DEVICE)


@pytest.mark.parametrize("d", [64, 72, 80, 96, 112, 128])
def test_tiles(d, card):
    """Several tiles of queries and of keys, the last ones ragged, in every width that a kernel is made for."""
    holds("attention", DTYPES[d % 16 == 0], dense(133, 70, 1, 1, d))


@each_dtype
@pytest.mark.parametrize("scale", [0.4, -0.2, 0.0])
def test_grouped_heads_and_scales(scale, dtype):
    holds("attention", dtype, dense(70, 133, 4, 2, 64, scale=scale))


@pytest.mark.parametrize("scale, dtype", [(-0.2, torch.bfloat16), (0.0, torch.float16)], ids=str)
def test_grouped_heads_and_scales_on_wgmma(scale, dtype):
    with on_card(90):
        holds("attention", dtype, dense(70, 133, 2, 1, 64, scale=scale))


def test_lse_of_large_scores(card):
    """What fp32 rounds of the scale and of a running maximum stays out of lse; several tiles of keys."""
    sample = Sample("attention", "large", dense(70, 300, 4, 2, 64, scale=0.4), baseline=BASELINE["attention"])
    contract.forward(sample, torch.bfloat16, *HERE)


@pytest.mark.parametrize("frames", [1, 7, 50])
def test_frames(frames, card):
    holds("attention_varlen", torch.bfloat16, laws.framed(frames, return_lse=True))


def test_frames_and_valid_keys_together(card):
    holds(
        "attention", torch.bfloat16,
        lambda m: dense(140, 170, 2, 1, 16, frame_tokens=m.index([9, 33]), kv_len=m.index([137, 0]))(m),
    )  # fmt: skip


@pytest.mark.parametrize("window, stride", laws.WINDOWS)
def test_windows(window, stride):
    holds("attention_varlen", torch.float16, laws.windowed(window, stride))


@pytest.mark.parametrize(
    "window, stride", [laws.WINDOWS[0], *(pytest.param(*w, marks=pytest.mark.full) for w in laws.WINDOWS[1:])]
)
def test_windows_on_wgmma(window, stride):
    with on_card(90):
        holds("attention_varlen", torch.float16, laws.windowed(window, stride, ((3, 5, 7), (0, 1, 1), (18, 2, 1))))


@pytest.mark.parametrize("d, queries, keys", [(128, 70, 330), (40, 60, 400)])
def test_rings(d, queries, keys):
    """wgmma: slots go around more than once, with two warpgroups at work and with one."""
    make = Maker(torch.bfloat16, DEVICE)
    args = make.randn(1, queries, 1, d), *make.randn(1, keys, 2, 1, d).unbind(2)
    with on_card(90):
        holds("attention", torch.bfloat16, dense(queries, keys, 1, 1, d))
        same_bits_on_every_schedule(lambda: gradients("attention", args, {}))


@pytest.mark.full
@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz(card, data):
    what, make = laws.drawn(data.draw, st.integers(1, 16).map((8).__mul__), sides=(9, 9), more=90, frames=60)
    holds("attention_varlen", torch.bfloat16, make, what)


# ---- the order of threads, blocks and copies ----------------------------------------------------------------------
@pytest.mark.parametrize("mask", ["frames", "window"])
def test_schedules(mask, card):
    make = Maker(torch.bfloat16, DEVICE)
    args, kwargs = segments(make, [72, 0, 8], 2, 72)
    if mask == "frames":
        kwargs |= dict(frame_tokens=20)
    else:
        kwargs |= dict(window=(2, 3, 3), grids=make.index([[2, 4, 9], [0, 1, 1], [2, 2, 2]]))
    same_bits_on_every_schedule(lambda: gradients("attention_varlen", args, kwargs))


def test_same_bits_packed_or_alone(card):
    laws.packed_or_alone(*HERE, (20, 70, 5))


def test_dense_is_packed(card):
    make = Maker(torch.float16, DEVICE)
    args = make.randn(1, 140, 2, 40), *make.randn(1, 90, 2, 1, 40).unbind(2)
    keys = dict(cu_seqlens_k=make.index([0, 90]), max_seqlen_k=90)
    packed = dict(cu_seqlens_q=make.index([0, 140]), max_seqlen_q=140) | keys
    one = gradients("attention_varlen", [t[0] for t in args], packed)
    close.assert_all_bitwise([t[0] for t in gradients("attention", args, {})], one)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_only_what_is_asked_for(wanted):
    make = Maker(torch.bfloat16, DEVICE)
    args = make.randn(1, 40, 4, 72), *make.randn(1, 70, 2, 2, 72).unbind(2)
    laws.only_what_is_asked_for("cuda", "attention", args, {}, wanted)


# ---- layouts ----------------------------------------------------------------------------------------------------
def test_layouts(card):
    """Strides, rows that do not stand on 16 bytes, tokens and heads in any order, one row for all: the same bits."""
    make = Maker(torch.bfloat16, DEVICE)
    args = [make.randn(2, 70, 2, 24) for _ in range(3)]
    expected = gradients("attention", args, {})

    def heads_first(t):
        return t.transpose(1, 2).contiguous().transpose(1, 2)

    def odd(t):
        wide = t.new_empty(2, 70, 2, 27)[..., 3:]
        return wide.copy_(t)

    for change in (heads_first, odd, lambda t: torch.stack([t, t], 2)[:, :, 1]):
        close.assert_all_bitwise(gradients("attention", [change(t) for t in args], {}), expected)
    one = args[1][:1, :1]
    far = one.expand(2, 70, 2, 24)
    with simt.as_card(80):  # wgmma leaves such tensors to mma.sync
        there = gradients("attention", (args[0], far.contiguous(), far.contiguous()), {})
    close.assert_all_bitwise(gradients("attention", (args[0], far, far), {}), there)


def test_layout_of_the_incoming_gradient():
    laws.layout_of_the_incoming_gradient(*HERE)


@pytest.mark.parametrize("through", ["o", "lse"])
def test_one_output_alone(through):
    laws.one_output_alone(*HERE, torch.bfloat16, through)


# ---- what must not be read ----------------------------------------------------------------------------------------
def test_poisoned_neighbours_never_leak(card):
    laws.poisoned_neighbours_never_leak(*HERE, (21, 90))


def test_poisoned_keys_behind_the_valid_ones_never_leak(card):
    laws.poisoned_keys_behind_the_valid_ones_never_leak(*HERE, 90, (67, 5))


def test_unseen_bricks_are_not_loaded(card):
    laws.unseen_keys_are_not_loaded(*HERE, torch.float16, 128, 256, (2, 16, 16), (1, 8, 16))


def test_rows_without_keys_have_no_gradient(card):
    laws.rows_without_keys_have_no_gradient(*HERE, torch.bfloat16)


@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8)])
@pytest.mark.parametrize("keys", [0, 5])
def test_zero_size(shape, keys, card):
    make = Maker(torch.bfloat16, DEVICE)
    out = gradients("attention", (make.randn(*shape), *make.randn(shape[0], keys, 2, 2, 8).unbind(2)), {})
    assert out[0].shape == shape and not any(t.any() for t in out[2:])
    o, lse = ops.attention(
        make.randn(1, 3, 2, 8), *make.randn(1, 0, 2, 2, 8).unbind(2), return_lse=True, backend="cuda"
    )
    assert not o.any() and (lse == -math.inf).all()


# ---- the plan of tiles ----------------------------------------------------------------------------------------------
LENGTHS = st.lists(st.sampled_from([0, 0, 1, 2, 15, 64, 65, 300]), min_size=0, max_size=5)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LENGTHS, st.integers(0, 90), st.data())
def test_plan(lengths, tail, data):
    make = Maker(torch.bfloat16, DEVICE)
    keys = data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    q, k = make.randn(sum(lengths) + tail, 1, 8), make.randn(sum(keys), 1, 8)
    cu_q, cu_k = (laws.bounds(make, n) for n in (lengths, keys))
    call = adapter._Packed(q, k, k, cu_q, cu_k, None, None, 0, 0, 0, None, (1, 1, 1), 1.0)
    laws.plan_takes_every_tile_once(*call.cut(64, 64)[1].tolist(), lengths, keys, tail, 64)


# ---- merge ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("sample", samples("merge_attention"), ids=str)
def test_merge(sample, dtype):
    both(sample, dtype)


@laws.each_missing
@laws.each_wanted
def test_merge_partial_gradients(missing, wanted):
    laws.partial_merge(*HERE, missing, wanted)


# ---- what is not served ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "dtype, d, reason",
    [
        (torch.float32, 64, "multiplies 16-bit values; got torch.float32"),
        (torch.bfloat16, 13, "holds heads of 8 to 128 channels, a multiple of 8; got 13"),
        (torch.bfloat16, 136, "holds heads of 8 to 128 channels, a multiple of 8; got 136"),
    ],
)
def test_refusals(dtype, d, reason):
    q = torch.zeros(1, 2, 1, d, dtype=dtype, device=DEVICE)
    with pytest.raises(fastdit.NoBackend, match=reason):
        ops.attention(q, q, q, backend="cuda")
    assert reason in fastdit.explain("attention", q, q, q)


def path(*args) -> str:
    with fastdit.use_backend("cuda"):
        return re.search(r"cuda +chosen \((.*)\)\n", fastdit.explain("attention", *args))[1]


def test_explain(monkeypatch):
    q = torch.zeros(2, 2, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    with simt.as_card(86):
        assert path(q, q, q) == "mma.sync: wgmma needs sm_90; got sm_86"
    with simt.as_card(90):
        assert path(q, q, q).startswith("wgmma, backward in two passes: ")
        text = "mma.sync: wgmma reads tensors whose rows are all there; got k of [2, 2, 1, 64], (0, 64, 64, 1)"
        assert path(q, q[:1].expand_as(q), q) == text
        monkeypatch.setattr(_launch, "hopper_built", lambda _: False)
        assert path(q, q, q) == "mma.sync: wgmma needs machine code for sm_90a; FASTDIT_CUDA_ARCHS lacks it"


@pytest.mark.skipif(DEVICE == "cuda", reason="a card has its own")
def test_the_simulator_is_of_sm_80():
    q = torch.zeros(1, 2, 1, 64, dtype=torch.bfloat16)
    assert _launch.capability(q) == 80


def test_tensor_maps_are_checked(monkeypatch):
    """What the adapter never asks for is an error that names the op and its sizes, before anything is written."""
    q = torch.zeros(2, 8, 1, 64, dtype=torch.bfloat16, device=DEVICE)
    with on_card(90), torch.no_grad():
        monkeypatch.setattr(adapter, "HOPPER_KEYS", 512)
        with pytest.raises(RuntimeError, match=r"attention: cuTensorMapEncodeTiled failed; .* q=8 k=8 B=2 H=1/1 D=64"):
            ops.attention(q, q, q, backend="cuda")
        monkeypatch.setattr(adapter, "_wgmma_refusal", lambda *_: None)
        with pytest.raises(ValueError, match=r"attention: a stride of the Hopper kernel's .*; got 0 for .* D=64"):
            ops.attention(q, q[:1].expand_as(q), q, backend="cuda")
