"""modulation on Triton: what is its own beside the samples of test_triton.py. In the interpreter, or on a GPU."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fastdit import ops
from fastdit.backends.triton import _config, _launch
from fastdit.packing import pack
from fastdit.testing import close, contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)


def both(sample: Sample, dtype: torch.dtype) -> None:
    contract.forward(sample, dtype, "triton", DEVICE)
    contract.backward(sample, dtype, "triton", DEVICE)


def seam(
    B, N, C, *, gate=None, shift=None, scale=None, index=None, gate_index=None, affine=False, strided=False, **rest
):
    """A seam with tables of these leading dims. index: the row of each token; strided: slices of wider tensors."""

    def make(m: Maker):
        def rows(*lead):
            wide = m.randn(*lead, 2 * C + 8)
            return wide[..., C : 2 * C] if strided else wide[..., :C].contiguous()

        def tokens():
            return (m.randn(B, N + 1, 2 * C)[:, 1:, :C] if strided else m.randn(B, N, C)) if B else m.randn(N, C)

        def listed(values):
            return None if values is None else torch.as_tensor(values, device=m.device).view(*(B, N) if B else (N,))

        tables = {k: rows(*lead) for k, lead in (("shift", shift), ("scale", scale)) if lead}
        if affine:
            tables |= dict(weight=m.randn(C), bias=m.randn(C))
        kwargs = tables | dict(row_index=listed(index), gate_row_index=listed(gate_index))
        return (tokens(), tokens(), rows(*gate) if gate else None), kwargs | rest

    return Sample("gate_residual_norm_modulate", "own", make)


# ---- row maps -----------------------------------------------------------------------------------------
# 4 processors are pretended where there is no GPU: 8 programs, so these walk long runs and several short ones.
MAPS = {
    "long-runs": seam(2, 70, 40, gate=(2,), shift=(2,), scale=(2,)),
    "one-row": seam(2, 70, 40, gate=(1,), shift=(1,), scale=(1,)),
    "packed-one-row": seam(0, 90, 40, gate=(1,), shift=(1,), scale=(1,), affine=True),
    "many-frames": seam(2, 48, 40, gate=(2, 12), shift=(2, 12), scale=(2, 12), affine=True),
    "frames-in-samples": seam(2, 48, 40, gate=(2,), shift=(2, 12), scale=(2, 4)),
    "rows-that-do-not-nest": seam(2, 48, 40, gate=(2, 16), shift=(2, 12), scale=(2, 4)),
    "per-token": seam(2, 36, 40, gate=(2, 36), shift=(2, 36), scale=(2, 36)),
    "per-token-in-samples": seam(2, 36, 40, gate=(2,), shift=(2, 36), scale=(2, 36), affine=True),
    "single-tokens": seam(9, 1, 40, gate=(9,), shift=(9,), scale=(9,)),
    "no-tables": seam(2, 36, 40, affine=True),
    "segments": seam(0, 60, 40, gate=(4,), shift=(4,), scale=(4,), index=[0] * 7 + [1] + [3] * 52),
    "scattered": seam(
        2, 30, 40, gate=(9,), shift=(7,), scale=(9,), index=[(i * i) % 7 for i in range(60)], affine=True
    ),
    "two-indices": seam(
        0, 60, 40, gate=(4,), shift=(5,), scale=(5,), index=[i % 5 for i in range(60)],
        gate_index=[i // 20 for i in range(60)],
    ),
    "gate-index": seam(2, 30, 40, gate=(4,), shift=(2, 3), scale=(2,), gate_index=[i % 3 for i in range(60)]),
}  # fmt: skip


@each_dtype
@pytest.mark.parametrize("name", MAPS)
def test_row_maps(name, dtype):
    both(MAPS[name], dtype)


def test_an_index_of_64_bits_that_is_no_row():
    x = torch.randn(6, 2, 40, device=DEVICE).transpose(0, 1)
    index = torch.arange(12, device=DEVICE).view(6, 2).t() % 3
    table = torch.randn(3, 40, device=DEVICE)
    out = [ops.norm_modulate(x, scale=table, row_index=i, backend="triton") for i in (index, index.int().contiguous())]
    close.assert_bitwise(*out)


def check_rows_that_nobody_uses(backend, device):
    x = torch.randn(40, 8, device=device)
    table = torch.randn(5, 8, device=device, requires_grad=True)
    index = torch.tensor([1] * 30 + [3] * 10, device=device)
    with poisoned():
        y = ops.norm_modulate(x, shift=table, row_index=index, backend=backend)
        (grad,) = torch.autograd.grad(y.sum(), table)
    assert (grad[[0, 2, 4]] == 0).all() and (grad[1] == 30).all() and (grad[3] == 10).all()


def alone_and_together(wanted, backend, device):
    """A gradient that alone is asked for, and the same beside all others."""
    (r, y, gate), kwargs = MAPS["frames-in-samples"].make(Maker(torch.float32, device))
    kwargs["weight"] = torch.randn(40, device=device)

    def grads(names):
        leaves = dict(x=y, gate=gate, shift=kwargs["shift"], weight=kwargs["weight"])
        leaves = {k: v.clone().requires_grad_(k in names) for k, v in leaves.items()}
        given = kwargs | {k: leaves[k] for k in ("shift", "weight")}
        out = ops.gate_residual_norm_modulate(r, leaves["x"], leaves["gate"], **given, backend=backend)
        with poisoned():
            found = torch.autograd.grad(out, [leaves[k] for k in names], [torch.cos(o) for o in out])
        return dict(zip(names, found, strict=True))

    return grads([wanted])[wanted], grads(["x", "shift", "weight", "gate"])[wanted]


def test_rows_that_nobody_uses_have_no_gradient():
    check_rows_that_nobody_uses("triton", DEVICE)


@pytest.mark.parametrize("wanted", ["x", "shift", "weight", "gate"])
def test_one_gradient_alone(wanted):
    """Each is what it is beside the others: nothing is left out with them."""
    alone, together = alone_and_together(wanted, "triton", DEVICE)
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
    for config in _config.CANDIDATES[kernel]:
        with _config.forced(kernel, config):
            for sample in chosen:
                both(sample, torch.bfloat16)


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
@pytest.mark.parametrize("name", ["long-runs", "many-frames", "scattered", "two-indices"])
def test_the_same_bits_again(name):
    args, kwargs = MAPS[name].make(Maker(torch.bfloat16, DEVICE))

    def run():
        a, k, leaves = contract._leaves(MAPS[name], args, kwargs)
        with poisoned():
            out = ops.gate_residual_norm_modulate(*a, **k, backend="triton")
            return torch.autograd.grad(out, leaves, [torch.cos(o.detach()) for o in out])

    for a, b in zip(run(), run(), strict=True):
        assert a.isfinite().all()
        close.assert_bitwise(a, b)


def test_nan_stays_with_its_token_and_its_row():
    m = Maker(torch.float32, DEVICE)
    x = m.randn(40, 40)
    x[7, 3] = float("nan")
    index = torch.tensor([0] * 12 + [1] * 28, device=DEVICE)
    table = m.randn(2, 40).requires_grad_()
    x.requires_grad_()
    y = ops.norm_modulate(x, scale=table, shift=m.randn(2, 40), row_index=index, backend="triton")
    grad, d_table = torch.autograd.grad(y, (x, table), m.randn(40, 40))
    others = [i for i in range(40) if i != 7]
    assert y[7].isnan().all() and y[others].isfinite().all() and grad[others].isfinite().all()
    assert d_table[0].isnan().all() and d_table[1].isfinite().all()


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


@pytest.mark.parametrize("shape", [(0, 4, 8), (2, 0, 8), (0, 8)])
def test_zero_size(shape):
    x = torch.randn(shape, requires_grad=True, device=DEVICE)
    table = torch.randn(1 if len(shape) == 2 else shape[0], 8, requires_grad=True, device=DEVICE)
    with poisoned():
        r, h = ops.gate_residual_norm_modulate(x, x, table, shift=table, backend="triton")
        grads = torch.autograd.grad((r.sum() + h.sum()), (x, table))
    assert grads[0].shape == shape and (grads[1] == 0).all()


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
    for a, b in zip(*out, strict=True):
        close.assert_bitwise(a, b)
