"""modulation: the laws that are its own, and every check of its input."""

import itertools

import modulation_laws as laws
import pytest
import torch
from hypothesis import given, settings, strategies as st

import fastdit
from fastdit import ops
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample

each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])


@pytest.mark.parametrize("shape", laws.EMPTY)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zero_size(shape, backend):
    laws.zero_size(backend, "cpu", shape)


@pytest.mark.parametrize("backend", ["cpu", "triton", "reference"])
def test_offset_belongs_to_the_weight(backend):
    x = torch.randn(2, 4, 8, requires_grad=True)
    for seam in (ops.norm_modulate, lambda x, **rest: ops.gate_residual_norm_modulate(x, x, **rest)[1]):
        plain, offset = (seam(x, weight_offset=o, backend=backend) for o in (0.0, 1.5))
        close.assert_bitwise(offset, plain)
        (a,), (b,) = (torch.autograd.grad(y.square().sum(), x) for y in (plain, offset))
        close.assert_bitwise(a, b)


def test_never_returns_its_input():
    x = torch.randn(2, 4, 8)
    zero = torch.zeros_like(x)
    assert ops.gate_residual(x, zero).data_ptr() != x.data_ptr()
    assert ops.norm_modulate(x).data_ptr() != x.data_ptr()


def test_nan_stays_in_its_token(isa):
    m = Maker(torch.bfloat16)
    x = m.randn(1, 6, 40)
    x[0, 2, 5] = float("nan")
    y = ops.norm_modulate(x, shift=m.randn(1, 40), backend="cpu")
    assert torch.isnan(y[0, 2]).all() and not torch.isnan(y[0, [0, 1, 3, 4, 5]]).any()


def test_packing_equals_one_by_one():
    m = Maker(torch.bfloat16)
    parts = [m.randn(n, 72) for n in (3, 1, 5)]
    table = m.randn(3, 72)
    index = torch.repeat_interleave(torch.arange(3), torch.tensor([3, 1, 5])).to(torch.int32)
    packed = ops.norm_modulate(torch.cat(parts), scale=table, row_index=index)
    single = torch.cat([ops.norm_modulate(p, scale=table[i : i + 1]) for i, p in enumerate(parts)])
    close.assert_bitwise(packed, single)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("C", [100, 1152, 3072])
@each_dtype
def test_a_token_does_not_see_its_neighbours(dtype, C, norm, isa):
    """Tokens are taken several at a time; how many, and so which thread has them, must not change a bit."""
    m = Maker(dtype)
    x, y, gate, shift, scale = m.randn(1, 37, C), m.randn(1, 37, C), m.randn(1, C), m.randn(1, C), m.randn(1, C)
    ends = [0, 1, 3, 8, 14, 25, 37]

    def run(rows):
        h = ops.norm_modulate(x[:, rows], norm=norm, shift=shift, scale=scale, backend="cpu")
        seam = ops.gate_residual_norm_modulate(
            x[:, rows], y[:, rows], gate, norm=norm, shift=shift, scale=scale, backend="cpu"
        )
        return h, *seam

    parts = [run(slice(a, b)) for a, b in itertools.pairwise(ends)]
    for whole, part in zip(run(slice(None)), zip(*parts, strict=True), strict=True):
        close.assert_bitwise(torch.cat(part, 1), whole)


def test_double_backward_raises():
    x = torch.randn(2, 4, 8, requires_grad=True)
    y = ops.norm_modulate(x, backend="cpu")
    (g,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(g.sum(), x)


def test_forward_mode_is_not_silently_dropped():
    x, t = torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, t)
        with pytest.raises((RuntimeError, NotImplementedError)):
            ops.norm_modulate(dual, backend="cpu")
        exact = torch.autograd.forward_ad.unpack_dual(ops.norm_modulate(dual, backend="reference")).tangent
    assert exact is not None and exact.abs().sum() > 0


def test_backends_and_explain(capsys):
    x = torch.randn(2, 4, 8)
    text = fastdit.explain("norm_modulate", x)
    assert "cpu         chosen" in text and text in capsys.readouterr().out
    with fastdit.use_backend("reference"):
        assert "reference   chosen" in fastdit.explain("norm_modulate", x)
        with pytest.raises(fastdit.NoBackend, match="triton"):
            ops.norm_modulate(x.double(), backend="triton")
    with pytest.raises(ValueError, match="unknown backend"):
        ops.norm_modulate(x, backend="gpu")
    with pytest.raises(fastdit.NoBackend, match="needs a CPU tensor; got meta"):
        ops.norm_modulate(x.to("meta"), backend="cpu")
    assert ops.norm_modulate(x.to("meta")).device.type == "meta"


B, N, C = 2, 6, 8
X, T, V = torch.randn(B, N, C), torch.randn(B, C), torch.randn(C)
BAD_NORM = {
    "rank": (dict(x=X[0, 0]), ValueError, "wrong rank"),
    "integer": (dict(x=X.int()), TypeError, "int32"),
    "last-dim": (dict(x=torch.randn(B, C, N).transpose(1, 2)), ValueError, "must be contiguous"),
    "no-channels": (dict(x=X[..., :0]), ValueError, "no channels"),
    "scale-chunk": (dict(scale=torch.randn(B, 6 * C)), ValueError, r"chunk\(6"),
    "scale-C": (dict(scale=torch.randn(B, C + 1)), ValueError, "must end in C"),
    "scale-B": (dict(scale=torch.randn(B + 1, C)), ValueError, "must be"),
    "scale-rank": (dict(scale=torch.randn(B, 1, 1, C)), ValueError, "must be"),
    "M-divides": (dict(scale=torch.randn(B, 4, C)), ValueError, "must divide"),
    "scale-strided": (dict(scale=torch.randn(C, B).t()), ValueError, "contiguous"),
    "scale-dtype": (dict(scale=T.int()), TypeError, "int32"),
    "scale-device": (dict(scale=T.to("meta")), ValueError, "another device"),
    "packed-table": (dict(x=X[0], scale=T), ValueError, "packed"),
    "weight-shape": (dict(weight=T), ValueError, r"must be \(C,\)"),
    "bias-shape": (dict(bias=torch.randn(C + 1)), ValueError, r"must be \(C,\)"),
    "index-dtype": (dict(scale=T, row_index=torch.zeros(B, N)), TypeError, "int32 or int64"),
    "index-shape": (
        dict(scale=T, row_index=torch.zeros(B, N + 1, dtype=torch.int32)),
        ValueError,
        "one entry per token",
    ),
    "index-table": (dict(scale=T[None], row_index=torch.zeros(B, N, dtype=torch.int32)), ValueError, "table"),
    "index-high": (dict(scale=T, row_index=torch.full((B, N), B, dtype=torch.int32)), ValueError, "out of range"),
    "index-low": (dict(scale=T, row_index=torch.full((B, N), -1)), ValueError, "out of range"),
    "eps-nan": (dict(eps=float("nan")), ValueError, "eps"),
    "eps-negative": (dict(eps=-1e-6), ValueError, "eps"),
    "norm": (dict(norm="batch"), ValueError, "norm"),
    "precision": (dict(precision="tf32"), ValueError, "precision"),
    "native-dtype": (dict(x=X.bfloat16(), scale=T, precision="native"), TypeError, "fp32"),
    "native-weight": (dict(x=X.bfloat16(), weight=V, precision="native"), TypeError, "fp32"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD_NORM, ids=str)
def test_bad_input_norm_modulate(case, backend):
    kwargs, error, match = BAD_NORM[case]
    with pytest.raises(error, match=match) as caught:
        ops.norm_modulate(**{"x": X, **kwargs}, backend=backend)
    assert str(caught.value).startswith("norm_modulate: ") and "got" in str(caught.value)


GOOD = dict(residual=X, y=X, gate=T)
BAD_GATE = {
    "shape": (dict(residual=X[:, :4]), ValueError, "differ in shape"),
    "rank": (dict(y=X[None], residual=X[None]), ValueError, "wrong rank"),
    "residual-dtype": (dict(residual=X.double()), TypeError, "residual must have"),
    "residual-device": (dict(residual=X.to("meta")), ValueError, "another device"),
    "native-dtype": (dict(y=X.bfloat16(), gate=None, precision="native"), TypeError, "fp32"),
    "gate-C": (dict(gate=torch.randn(B, C + 1)), ValueError, "must end in C"),
    "gate-act": (dict(gate_act="relu"), ValueError, "gate_act"),
    "act-without-gate": (dict(gate=None, gate_act="tanh"), ValueError, "nothing to act on"),
    "post-norm": (dict(post_norm="layer"), ValueError, "post_norm"),
    "post-weight": (dict(post_norm_weight=V), ValueError, "without post_norm"),
    "post-weight-shape": (dict(post_norm="rms", post_norm_weight=T), ValueError, r"must be \(C,\)"),
    "post-eps": (dict(post_norm="rms", post_norm_eps=float("nan")), ValueError, "post_norm_eps"),
    "index-high": (dict(row_index=torch.full((B, N), B, dtype=torch.int32)), ValueError, "out of range"),
    "precision": (dict(precision="bf16"), ValueError, "precision"),
}


@pytest.mark.parametrize("op", ["gate_residual", "gate_residual_norm_modulate"])
@pytest.mark.parametrize("case", BAD_GATE, ids=str)
def test_bad_input_gate(case, op):
    kwargs, error, match = BAD_GATE[case]
    with pytest.raises(error, match=match) as caught:
        getattr(ops, op)(**{**GOOD, **kwargs})
    assert str(caught.value).startswith(f"{op}: ")


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(gate=None, gate_row_index=torch.zeros(B, N, dtype=torch.int32)), "gate_row_index has no table"),
        (dict(gate_row_index=torch.zeros(B, 1, dtype=torch.int32)), "one entry per token"),
        (dict(gate_row_index=torch.full((B, N), 9, dtype=torch.int32)), "gate_row_index is out of range"),
        (dict(scale=torch.randn(B, 4, C)), "must divide"),
        (dict(eps=float("inf")), "eps"),
    ],
)
def test_bad_input_seam(kwargs, match):
    with pytest.raises(ValueError, match=match):
        ops.gate_residual_norm_modulate(**{**GOOD, **kwargs})


def test_bad_index_is_caught_inside_a_compiled_graph():
    index = torch.full((B, N), B, dtype=torch.int32)
    compiled = torch.compile(
        lambda x: ops.norm_modulate(x, scale=T, row_index=index, backend="cpu"), backend="aot_eager"
    )
    with pytest.raises(ValueError, match="out of range"):
        compiled(X)


def _fuzz(data) -> tuple[Sample, torch.dtype]:
    """Any mix of ranks, sizes, row maps, laws and optional tensors."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    dtype, C, N = draw(*contract.DTYPES), data.draw(st.integers(1, 70)), data.draw(st.integers(0, 12))
    indexed, packed = draw(True, False), draw(True, False)
    M = data.draw(st.sampled_from([m for m in range(1, N + 1) if N % m == 0] or [1]))

    def make(m):
        lead = (N,) if packed else (2, N)
        rows = (3,) if indexed else (1,) if packed else draw((2,), (1,), (2, M))
        table = lambda: m.randn(*rows, 2 * C).chunk(2, -1)[1] if draw(True, False) else None  # noqa: E731
        vector = lambda: m.randn(C) if draw(True, False) else None  # noqa: E731
        kwargs = dict(shift=table(), scale=table(), weight=vector(), bias=vector(), norm=draw("layer", "rms"))
        kwargs["precision"] = draw("fp32", "native")
        if indexed:
            kwargs["row_index"] = m.randint(0, 3, lead)
        return (m.randn(*lead, C), m.randn(*lead, C), table()), kwargs

    made = make(Maker(dtype))
    return Sample("gate_residual_norm_modulate", "fuzz", lambda _: made), dtype


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data):
    contract.forward(*_fuzz(data), "cpu")


def _far(mean: float):
    def make(m: Maker):
        x = m.randn(2, 9, 96, dtype=torch.float64) + mean * torch.linspace(-1, 1, 9)[:, None]
        return (x.to(m.dtype),), dict(shift=m.randn(2, 96), scale=m.randn(2, 96))

    return Sample("norm_modulate", f"mean-{mean:g}", make)


@pytest.mark.parametrize("mean", [4.0, 10.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rows_far_from_their_mean(mean, dtype, isa):
    """The two ways to a variance of bf16 rows, on either side of where they part."""
    contract.forward(_far(mean), dtype, "cpu")
    contract.backward(_far(mean), dtype, "cpu")


def _rows_that_need_care(m: Maker) -> torch.Tensor:
    """Among ordinary rows: constant, below eps, and far from 0 in units of their deviation."""
    x = m.randn(13, 128, dtype=torch.float64)
    x[1], x[2], x[5], x[9] = 1.375, -0.171875, 1e-5 * x[5], 200 + x[9]
    return x.to(m.dtype)


@each_dtype
def test_gradients_of_rows_that_need_care(dtype, isa):
    """In 16 bits the backward folds the mean away, but not of these rows: their zeros stay zeros, as in eager code."""

    def make(m: Maker):
        return (_rows_that_need_care(m)[None],), dict(shift=m.randn(1, 128), scale=m.randn(1, 128))

    contract.backward(Sample("norm_modulate", "care", make), dtype, "cpu")
    m = Maker(dtype)
    x, grad = _rows_that_need_care(m), m.randn(13, 128)
    scale = m.randn(13, 128).requires_grad_()
    h = ops.norm_modulate(x, scale=scale, row_index=torch.arange(13), backend="cpu")
    d_scale = torch.autograd.grad(h, scale, grad)[0]
    assert not d_scale[[1, 2]].any() and d_scale[[0, 3, 5, 9]].any()


@pytest.mark.parametrize("op", ["norm_modulate", "gate_residual_norm_modulate"])
@each_dtype
def test_a_gradient_does_not_see_its_neighbours(op, dtype, isa):
    """Also where some rows of a group are taken another way than the others."""
    m = Maker(dtype)
    x, grad = _rows_that_need_care(m)[None], m.randn(1, 13, 128)
    shift, scale = m.randn(1, 128), m.randn(1, 128)

    def run(rows):
        y = x[:, rows].clone().requires_grad_()
        if op == "norm_modulate":
            out = [ops.norm_modulate(y, shift=shift, scale=scale, backend="cpu")]
        else:
            args = (torch.zeros_like(y), y, torch.ones_like(shift))  # r is y
            out = list(ops.gate_residual_norm_modulate(*args, shift=shift, scale=scale, backend="cpu"))
        return torch.autograd.grad(out, y, [grad[:, rows]] * len(out))[0]

    whole = run(slice(None))
    for a, b in itertools.pairwise([0, 1, 2, 4, 8, 13]):
        close.assert_bitwise(run(slice(a, b)), whole[:, a:b])


@pytest.mark.parametrize("op", ["norm_modulate", "gate_residual_norm_modulate"])
@each_dtype
def test_streamed_outputs(op, dtype, isa):
    """Outputs larger than the caches take stores of their own; the same bits as for a few rows."""
    m, C, few = Maker(dtype), 1024, 8
    repeats = -(-(2**26) // (2 * few * C * dtype.itemsize))  # all outputs together: 32 MiB and more
    rows, tables = [m.randn(1, few, C) for _ in range(2)], [m.randn(1, C) for _ in range(3)]

    def gradients(copies):
        x, y = (t.repeat(1, copies, 1).requires_grad_() for t in rows)
        args = (x,) if op == "norm_modulate" else (x, y, tables[2])
        out = close.flat(getattr(ops, op)(*args, shift=tables[0], scale=tables[1], backend="cpu"))
        grads = torch.autograd.grad(out, args[:2], [x.detach() + i for i, _ in enumerate(out)])
        return [t.detach().view(copies, few, C) for t in (*out, *grads)]

    for large, small in zip(gradients(repeats), gradients(1), strict=True):
        assert torch.equal(large, small.expand(repeats, few, C))


@pytest.mark.big
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_beyond_32_bits(dtype):
    """Rows 2^31 elements apart: reserved memory, of which only the rows themselves are ever touched."""
    m = Maker(dtype)
    rows, table = m.randn(1, 3, 72), m.randn(1, 72)
    far = torch.empty(2**32 + 72, dtype=dtype).as_strided((1, 3, 72), (0, 2**31, 1))
    far.copy_(rows)
    expected = ops.gate_residual_norm_modulate(rows, rows, table, shift=table, backend="cpu")
    for a, b in zip(
        ops.gate_residual_norm_modulate(far, far, table, shift=table, backend="cpu"), expected, strict=True
    ):
        close.assert_bitwise(a, b)
    tables = torch.empty(2**32 + 72, dtype=dtype).as_strided((3, 72), (2**31, 1))
    tables.copy_(rows[0])
    index = torch.tensor([[2, 0, 1]])
    ours = ops.norm_modulate(rows, scale=tables, row_index=index, backend="cpu")
    close.assert_bitwise(ours, ops.norm_modulate(rows, scale=rows[0], row_index=index, backend="cpu"))
