"""modulation on Triton: what is its own beside the samples of test_triton.py. In the interpreter, or on a GPU."""

import dataclasses

import modulation_laws as laws
import pytest
import torch
from hypothesis import given, settings, strategies as st
from modulation_laws import MAPS, seam

from fastdit import ops
from fastdit.backends.triton import _config, _launch
from fastdit.packing import pack
from fastdit.testing import close, contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HERE = "triton", DEVICE
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)


def both(sample: Sample, dtype: torch.dtype) -> None:
    contract.forward(sample, dtype, *HERE)
    contract.backward(sample, dtype, *HERE)


# ---- row maps -----------------------------------------------------------------------------------------
# fp16 is bf16's code but for the format of loads and stores: of it the samples
@pytest.mark.parametrize("dtype", contract.DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", MAPS)
def test_row_maps(name, dtype):
    both(MAPS[name], dtype)


def test_an_index_of_64_bits_that_is_no_row():
    x = torch.randn(6, 2, 40, device=DEVICE).transpose(0, 1)
    index = torch.arange(12, device=DEVICE).view(6, 2).t() % 3
    table = torch.randn(3, 40, device=DEVICE)
    out = [ops.norm_modulate(x, scale=table, row_index=i, backend="triton") for i in (index, index.int().contiguous())]
    close.assert_bitwise(*out)


@pytest.mark.parametrize("law, arguments", laws.EVERYWHERE)
def test_law(law, arguments):
    law(*HERE, *arguments)


@pytest.mark.parametrize("wanted", ["x", "shift", "weight", "gate"])
def test_one_gradient_alone(wanted):
    """Each is what it is beside the others: nothing is left out with them."""
    alone, together = laws.alone_and_together(*HERE, wanted)
    close.assert_close(alone, together.double(), together, wanted)


@pytest.mark.parametrize("one", [0, 1], ids=["grad_r", "grad_h"])
def test_one_output_alone(one):
    (r, y, gate), kwargs = MAPS["long-runs"].make(Maker(torch.float32, DEVICE))
    found = []
    for name, dtype in (("triton", torch.float32), ("reference", torch.float64), ("reference", torch.float32)):
        leaves = [t.to(dtype).detach().requires_grad_() for t in (r, y, gate, kwargs["shift"], kwargs["scale"])]
        given = kwargs | dict(shift=leaves[3], scale=leaves[4])
        out = ops.gate_residual_norm_modulate(*leaves[:3], **given, backend=name)[one]
        with poisoned():
            found.append(torch.autograd.grad(out, leaves, torch.cos(r.to(dtype)), allow_unused=True))
    for ours, truth, baseline in zip(*found, strict=True):
        assert ours is not None
        if truth is None:
            assert (ours == 0).all()
        else:
            close.assert_close(ours, truth, baseline)


# ---- fuzz ---------------------------------------------------------------------------------------------
@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data):
    B, M, per = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 13))
    N, C = M * per, data.draw(st.sampled_from([37, 40, 72, 264]))
    form = data.draw(st.sampled_from(["sample", "map", "index"]))
    rest = dict(
        norm=data.draw(st.sampled_from(["layer", "rms"])), strided=data.draw(st.booleans()),
        affine=data.draw(st.booleans()),
    )  # fmt: skip
    gate = data.draw(st.booleans())
    if gate and data.draw(st.booleans()):
        rest["gate_act"] = "tanh"
    if data.draw(st.booleans()):
        rest["post_norm"] = "rms"
    if form == "index":
        index = data.draw(st.lists(st.integers(0, 3), min_size=B * N, max_size=B * N))
        lead, rest["index"] = (4,), index
    else:
        lead = (B,) if form == "sample" else (B, M)
    sample = seam(B, N, C, gate=lead if gate else None, shift=lead, scale=lead, **rest)
    # places are fuzzed, not roundings: with few rows, luck in the last bits of fp32 sums decides; bf16 rounds once
    both(sample, torch.bfloat16)


# ---- tile sizes and cards -----------------------------------------------------------------------------
@pytest.mark.parametrize("kernel", ["modulation_forward", "modulation_backward"])
def test_every_candidate(kernel):
    chosen = [s for s in samples("gate_residual_norm_modulate") if s.id in ("seam", "indexed")]
    check = contract.forward if kernel == "modulation_forward" else contract.backward
    for config in _config.CANDIDATES[kernel]:
        with _config.forced(kernel, config):
            for sample in chosen:
                check(sample, torch.bfloat16, *HERE)


@pytest.mark.skipif(DEVICE == "cuda", reason="a real card is no other")
@pytest.mark.parametrize("card", [0, 80, 90, 100, 120])
def test_cards(card):
    """More programs than tokens, and their own default tiles."""
    _launch.pretend(card)
    _config.forget()
    try:
        both(MAPS["long-runs"], torch.bfloat16)
        both(MAPS["scattered"], torch.bfloat16)
    finally:
        _launch.pretend(None)
        _config.forget()


@pytest.mark.parametrize("channels", [384, 1152, 3072])
def test_widths_of_models(channels):
    both(seam(1, 4, channels, gate=(1,), shift=(1,), scale=(1,)), torch.bfloat16)


# ---- laws ---------------------------------------------------------------------------------------------
@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter has one order of programs")
@pytest.mark.parametrize("name", ["long-runs", "many-frames", "scattered", "two-indices"])
def test_the_same_bits_again(name):
    once, again = (laws.results(*HERE, MAPS[name], torch.bfloat16) for _ in range(2))
    assert all(t.isfinite().all() for t in once)
    close.assert_all_bitwise(again, once)


def test_nothing_to_normalise_by():
    """eps = 0 and rows beyond the last token: what is not there adds no NaN to sums."""
    both(seam(1, 9, 40, gate=(1,), shift=(1,), scale=(1,), eps=0.0, post_norm="rms", post_norm_eps=0.0), torch.float32)


def test_far_mean():
    """A mean 1000 times the deviation: what rounding left in it is taken out again."""
    moved = seam(1, 6, 1152, scale=(1,), norm="layer")

    def make(m: Maker):
        (r, y, gate), kwargs = moved.make(m)
        return (r + 1000.0, y, gate), kwargs

    contract.forward(dataclasses.replace(moved, make=make), torch.float32, "triton", DEVICE)


# ---- cost ---------------------------------------------------------------------------------------------
def launches(monkeypatch, call) -> list[str]:
    seen, run = [], _launch.Launch.__call__

    def counted(self, *tensors):
        seen.append(self.kernel.fn.__name__)
        run(self, *tensors)

    with monkeypatch.context() as patch:
        patch.setattr(_launch.Launch, "__call__", counted)
        call()
    return seen


@pytest.mark.parametrize(
    "name, expected",
    [
        ("long-runs", ["modulation_backward", "modulation_sums"]),
        ("per-token", ["modulation_backward"]),
        ("scattered", ["modulation_backward", "modulation_sums", "modulation_sums", "modulation_sums"]),
        ("two-indices", ["modulation_backward", "modulation_sums", "modulation_backward", "modulation_sums"]),
    ],
)
def test_launches(monkeypatch, name, expected):
    args, kwargs, leaves = contract._leaves(MAPS[name], *MAPS[name].make(Maker(torch.float32, DEVICE)))
    call = lambda: ops.gate_residual_norm_modulate(*args, **kwargs, backend="triton")  # noqa: E731
    out = []
    assert launches(monkeypatch, lambda: out.extend(call())) == ["modulation_forward"]
    assert launches(monkeypatch, lambda: torch.autograd.grad(out, leaves, [o.detach() for o in out])) == expected


def test_a_pack_is_not_sorted(monkeypatch):
    p = pack([torch.randn(n, 40, device=DEVICE) for n in (3, 1, 9)])
    table = torch.randn(3, 40, device=DEVICE, requires_grad=True)

    def refuse(*_, **__):
        raise AssertionError("sorted what is in order")

    monkeypatch.setattr(torch, "argsort", refuse)
    y = ops.norm_modulate(p.tokens, scale=table, row_index=p.segment_ids, backend="triton")
    (grad,) = torch.autograd.grad(y.sum(), table)
    one = [ops.norm_modulate(t.double(), backend="reference").sum(0) for t in p.tokens.split(p.lengths)]
    base = [ops.norm_modulate(t, backend="reference").sum(0) for t in p.tokens.split(p.lengths)]
    close.assert_close(grad, torch.stack(one), torch.stack(base))


@pytest.mark.big
@each_dtype
def test_beyond_2_31_elements(dtype):
    """Tokens and tables further apart than an int32 can say, in reserved memory."""
    near = torch.randn(2, 3, 40, device=DEVICE).to(dtype)
    far = torch.empty(2**32 + 128, dtype=dtype, device=DEVICE).as_strided(near.shape, (2**31, 48, 1))
    far.copy_(near)
    table = torch.randn(2, 40, device=DEVICE).to(dtype)
    wide = torch.empty(2**31 + 64, dtype=dtype, device=DEVICE).as_strided(table.shape, (2**31, 1))
    wide.copy_(table)
    out = []
    for x, t in ((near, table), (far, wide)):
        x, t = x.detach().requires_grad_(), t.detach().requires_grad_()
        y = ops.norm_modulate(x, scale=t, shift=t, backend="triton")
        out.append((y, *torch.autograd.grad(y, (x, t), torch.cos(y.detach()))))
    close.assert_all_bitwise(*out)
