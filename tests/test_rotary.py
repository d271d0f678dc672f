"""rotary: the laws that are its own, and every check of its input."""

import pytest
import rotary_laws as laws
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from rotary_laws import SAMPLES

import fastdit
from fastdit import ops
from fastdit.ops import rotary_inplace
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker

each_sample = pytest.mark.parametrize("sample", SAMPLES, ids=str)
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
HOT = ("hunyuan", "cogvideox-native", "wan", "ltx2-split", "packed-axes", "tail-D-half")
each_hot = pytest.mark.parametrize("sample", [s for s in SAMPLES if s.id in HOT], ids=str)


@each_backend
@pytest.mark.parametrize("shape", [(0, 4, 2, 8), (2, 0, 2, 8), (2, 4, 0, 8), (0, 2, 8)])
def test_zero_size(shape, backend):
    q = torch.randn(shape, requires_grad=True)
    angle = torch.randn(shape[-3], 4)
    a, b = ops.qk_norm_rope(q, q, norm="rms", cos=angle.cos(), sin=angle.sin(), backend=backend)
    assert a.shape == b.shape == shape
    (a + b).sum().backward()
    assert q.grad.shape == shape


def test_zero_grids():
    grids, axes = torch.zeros(0, 1, dtype=torch.int32), ops.rope_table((4,), (8,))
    q, _ = ops.qk_norm_rope(torch.randn(0, 2, 8), torch.randn(0, 1, 8), axes=axes, grids=grids)
    assert q.shape == (0, 2, 8)


@each_backend
def test_never_returns_its_input(backend):
    q, k = torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 8)
    for a, b in zip(ops.qk_norm_rope(q, k, backend=backend), (q, k), strict=True):
        assert a.data_ptr() != b.data_ptr() and torch.equal(a, b) and a.is_contiguous()


@pytest.mark.parametrize("layout", laws.LAYOUTS)
@pytest.mark.parametrize("scope", laws.SCOPES)
def test_nan_stays_where_it_is(scope, layout, isa):
    laws.nan_stays_where_it_is("cpu", "cpu", scope, layout)


@each_dtype
@pytest.mark.parametrize("D", [42, 64])
@pytest.mark.parametrize("layout", laws.LAYOUTS)
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_a_head_does_not_see_its_neighbours(norm, layout, D, dtype, isa):
    """Nor how many they are: heads go side by side in groups."""
    m = Maker(dtype)
    q, grad, weight, angle = m.randn(2, 3, 7, D), m.randn(2, 3, 7, D), m.randn(D), m.randn(3, 12, dtype=torch.float32)
    q[1, 1, 2] += 300  # a head whose moments are taken twice
    options = dict(norm=norm, layout=layout, q_weight=weight, backend="cpu", cos=angle.cos(), sin=angle.sin())

    def run(heads):
        x = q[:, :, heads].clone().requires_grad_()
        out, _ = ops.qk_norm_rope(x, x.detach()[:, :, :1], k_weight=weight, **options)
        return out.detach(), torch.autograd.grad(out, x, grad[:, :, heads])[0]

    whole = run(slice(None))
    for first, end in ((0, 1), (1, 3), (2, 7)):
        for part, all_of_it in zip(run(slice(first, end)), whole, strict=True):
            close.assert_bitwise(part, all_of_it[:, :, first:end])


def test_tokens_outside_the_slice_are_normalised_only(isa):
    m = Maker(torch.bfloat16)
    q, k = m.randn(2, 9, 2, 24), m.randn(2, 7, 2, 24)
    angle = m.randn(4, 12, dtype=torch.float32)
    rope = dict(cos=angle.cos(), sin=angle.sin(), rope_start=2, rope_len=4)
    for precision in ("fp32", "native"):
        options = dict(norm="layer", precision=precision, backend="cpu")
        for ours, normed in zip(
            ops.qk_norm_rope(q, k, **options, **rope), ops.qk_norm_rope(q, k, **options), strict=True
        ):
            close.assert_bitwise(ours[:, :2], normed[:, :2])
            close.assert_bitwise(ours[:, 6:], normed[:, 6:])
            assert not torch.equal(ours[:, 2:6], normed[:, 2:6])


@pytest.mark.parametrize("layout", laws.LAYOUTS)
def test_axes_equal_the_dense_table(layout, isa):
    laws.axes_equal_the_dense_table("cpu", "cpu", layout)


def test_rotation_is_undone_by_the_opposite_angle():
    m = Maker(torch.float64)
    q, k = m.randn(1, 6, 2, 48), m.randn(1, 6, 2, 48)
    angle = m.randn(6, 24)
    for layout in ("interleaved", "half", "axis_half"):
        there = ops.qk_norm_rope(q, k, cos=angle.cos(), sin=angle.sin(), layout=layout)
        back = ops.qk_norm_rope(*there, cos=angle.cos(), sin=-angle.sin(), layout=layout)
        for a, b in zip(back, (q, k), strict=True):
            torch.testing.assert_close(a, b)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data):
    contract.forward(*laws.drawn(data), "cpu")


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzz_backward(isa, data):
    contract.backward(*laws.drawn(data), "cpu")


@each_hot
def test_backward_threads(sample):
    """Every gradient has the same bits for any thread count; the axis tables hold 64 positions."""
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            args, kwargs = sample.make(Maker(torch.bfloat16, n=128 if "axes" in sample.id else 1200))
            args, kwargs, leaves = contract._leaves(sample, args, kwargs)
            out = ops.qk_norm_rope(*args, **kwargs, backend="cpu")
            found.append(torch.autograd.grad([o.float().square().sum() for o in out], leaves))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        close.assert_all_bitwise(other, found[0])


@pytest.mark.parametrize("wanted", laws.WANTED)
def test_one_gradient_alone(wanted):
    laws.one_gradient_alone("cpu", "cpu", wanted)


def test_gradient_of_one_output():
    laws.gradient_of_one_output("cpu", "cpu")


@each_backend
def test_scope_belongs_to_the_norm(backend):
    laws.scope_belongs_to_the_norm(backend, "cpu")


@pytest.mark.big
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_beyond_32_bits(dtype):
    laws.offsets_beyond_32_bits("cpu", "cpu", dtype)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@each_dtype
def test_streamed_outputs(layout, dtype, isa):
    """Outputs larger than the caches take stores of their own; the same bits as token by token."""
    m, N, H, D = Maker(dtype), 6, 4, 128
    tokens = 2**26 // (4 * H * D * dtype.itemsize) + N  # in and out: 64 MiB and more
    few, angle = m.randn(1, N, H, D), m.randn(N, D // 2, dtype=torch.float32)
    repeats = -(-tokens // N)
    q, table = few.repeat(1, repeats, 1, 1), angle.repeat(repeats, 1)
    options = dict(norm="rms", layout=layout, backend="cpu")
    small = ops.qk_norm_rope(few, few, cos=angle.cos(), sin=angle.sin(), **options)[0]
    for large in ops.qk_norm_rope(q, q, cos=table.cos(), sin=table.sin(), **options):
        assert torch.equal(large.view(repeats, N, H, D), small.expand(repeats, N, H, D))


# ---- in place --------------------------------------------------------------------------------------------------


@each_dtype
@each_backend
@each_sample
def test_inplace(sample, backend, dtype):
    laws.inplace(backend, "cpu", sample, dtype)


def test_inplace_leaves_the_rest_of_a_fused_projection_alone():
    laws.inplace_leaves_the_rest_of_a_fused_projection_alone("cpu", "cpu")


def test_inplace_schema():
    schema = torch.ops.fastdit.qk_norm_rope_.default._schema
    assert schema.is_mutable and not schema.returns
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["q", "k"]
    q, k = torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 8)
    args = (q, k, *(None,) * 15, "rms", "head", 1e-6, "interleaved", 0, None, "fp32", "cpu")
    torch.library.opcheck(torch.ops.fastdit.qk_norm_rope_.default, args)


@each_backend
def test_inplace_compiles(backend):
    def call(qkv):
        q, k = qkv[:, :, 0] * 1, qkv[:, :, 1] * 1
        ops.qk_norm_rope(q, k, norm="rms", inplace=True, backend=backend)
        return q + k

    for n in (4, 6, 9):
        qkv = torch.randn(2, n, 3, 2, 8)
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(qkv), call(qkv))


def test_inplace_is_refused_under_grad():
    q, k = torch.randn(2, 4, 2, 8), torch.randn(2, 4, 2, 8)
    weight = torch.ones(8, requires_grad=True)
    before = q.clone()
    with pytest.raises(ValueError, match="inplace=True under grad"):
        ops.qk_norm_rope(q, k, norm="rms", q_weight=weight, inplace=True)
    assert torch.equal(q, before)
    with torch.no_grad():
        ops.qk_norm_rope(q, k, norm="rms", q_weight=weight, inplace=True)


SHARED = torch.randn(2, 6, 4, 8)
OVERLAPS = {
    "same": (SHARED, SHARED),
    "shifted-tokens": (SHARED[:, :4], SHARED[:, 2:]),
    "shared-head": (SHARED[:, :, :2], SHARED[:, :, 1:3]),
    "shifted-channels": (SHARED[..., :6], SHARED[..., 2:]),
}


@pytest.mark.parametrize("path", ["direct", "torch.ops"])
@pytest.mark.parametrize("case", OVERLAPS)
def test_inplace_refuses_overlap(case, path):
    q, k = OVERLAPS[case]
    before = q.clone()
    with pytest.raises(ValueError, match="q and k overlap"):
        if path == "direct":
            ops.qk_norm_rope(q, k, norm="rms", inplace=True)
        else:
            with torch.profiler.profile():  # a watched call goes through the dispatcher
                ops.qk_norm_rope(q, k, norm="rms", inplace=True)
    assert torch.equal(q, before)


def test_inplace_refuses_expanded_tensors():
    q = torch.randn(1, 6, 2, 8).expand(2, 6, 2, 8)
    with pytest.raises(ValueError, match="cannot be written in place"):
        ops.qk_norm_rope(q, torch.randn(2, 6, 2, 8), inplace=True)


def test_overlap_is_exact():
    """Against brute force over small strided views of one buffer."""
    base = torch.zeros(400)
    generator = torch.Generator().manual_seed(0)
    seen = {True: 0, False: 0}
    for _ in range(400):
        views = []
        for _ in "ab":
            size = torch.randint(1, 4, (3,), generator=generator).tolist()
            stride = torch.randint(0, 30, (3,), generator=generator).tolist()
            offset = int(torch.randint(0, 60, (1,), generator=generator))
            views.append(base.as_strided(size, stride, offset))
        base.zero_()
        views[0].fill_(1)
        expected = bool((views[1] == 1).any())
        assert rotary_inplace.overlap(*views) == expected, (views[0].stride(), views[1].stride())
        seen[expected] += 1
    assert min(seen.values()) > 50
    assert not rotary_inplace.overlap(torch.zeros(4), torch.zeros(4))
    assert not rotary_inplace.overlap(torch.zeros(0), base)


# ---- dispatch --------------------------------------------------------------------------------------------------


def test_double_backward_raises():
    q = torch.randn(1, 4, 2, 8, requires_grad=True)
    a, _ = ops.qk_norm_rope(q, q.detach(), norm="rms", backend="cpu")
    (g,) = torch.autograd.grad(a.pow(2).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(g.sum(), q)


def test_explain_and_refusal():
    q = torch.randn(1, 4, 2, 8)
    assert "cpu         chosen\n" in fastdit.explain("qk_norm_rope", q, q)
    assert "cpu         chosen" in fastdit.explain("qk_norm_rope", q, q.clone(), inplace=True)
    for inplace in (False, True):
        with pytest.raises(fastdit.NoBackend, match="needs a CPU tensor; got meta"):
            ops.qk_norm_rope(q.to("meta"), q.to("meta"), backend="cpu", inplace=inplace)
        assert ops.qk_norm_rope(q.to("meta"), q.to("meta"), norm="rms", inplace=inplace)[0].device.type == "meta"


def test_same_grid_error_inside_a_compiled_graph():
    grids = torch.tensor([[9, 1]], dtype=torch.int32)
    axes = (*ops.rope_table((4,), (4,)), *ops.rope_table((4,), (4,)))
    compiled = torch.compile(
        lambda q: ops.qk_norm_rope(q, q * 2, axes=axes, grids=grids, backend="cpu"), backend="aot_eager"
    )
    with pytest.raises(ValueError, match="grids is out of range"):
        compiled(torch.randn(1, 9, 2, 8))


# ---- bad input -------------------------------------------------------------------------------------------------

B, N, H, D = 2, 6, 3, 12
Q, K, W = torch.randn(B, N, H, D), torch.randn(B, N, H, D), torch.randn(D)
COS, SIN = ops.rope_table((N,), (D,))
AXES = (*ops.rope_table((4,), (8,)), *ops.rope_table((4,), (4,)))
GRIDS = torch.tensor([[3, 2]], dtype=torch.int32)
ROPE = dict(cos=COS, sin=SIN)
COMPACT = dict(axes=AXES, grids=GRIDS)


def table(*shape, dtype=torch.float32):
    t = torch.randn(*shape).to(dtype)
    return dict(cos=t, sin=t)


BAD = {
    "q-not-a-tensor": (dict(q=[1.0]), TypeError, "must be a tensor"),
    "q-rank": (dict(q=Q[0, 0]), ValueError, "q has the wrong rank"),
    "k-rank": (dict(k=K[0, 0]), ValueError, "k has the wrong rank"),
    "k-other-rank": (dict(k=K[0]), ValueError, "differ only in N and H"),
    "q-integer": (dict(q=Q.int()), TypeError, "int32"),
    "k-dtype": (dict(k=K.double()), TypeError, "differ in dtype"),
    "k-device": (dict(k=K.to("meta")), ValueError, "another device"),
    "k-batch": (dict(k=K[:1]), ValueError, "differ only in N and H"),
    "k-D": (dict(k=K[..., :8]), ValueError, "differ only in N and H"),
    "no-channels": (dict(q=Q[..., :0]), ValueError, "no channels"),
    "q-last-dim": (dict(q=torch.randn(B, N, D, H).transpose(2, 3)), ValueError, "must be contiguous"),
    "k-last-dim": (dict(k=torch.randn(B, N, D, H).transpose(2, 3)), ValueError, "must be contiguous"),
    "norm": (dict(norm="batch"), ValueError, "norm is unknown"),
    "scope": (dict(scope="all"), ValueError, "scope is unknown"),
    "layout": (dict(layout="split"), ValueError, "layout is unknown"),
    "precision": (dict(precision="bf16"), ValueError, "precision is unknown"),
    "eps-nan": (dict(eps=float("nan")), ValueError, "eps"),
    "eps-negative": (dict(eps=-1e-6), ValueError, "eps"),
    "weight-without-norm": (dict(q_weight=W), ValueError, "without a norm"),
    "bias-without-norm": (dict(k_bias=W), ValueError, "without a norm"),
    "weight-shape": (dict(norm="rms", q_weight=torch.randn(H * D)), ValueError, r"must be \(D,\)"),
    "weight-rank": (dict(norm="rms", k_weight=torch.randn(1, D)), ValueError, r"must be \(D,\)"),
    "hidden-weight": (dict(norm="rms", scope="hidden", k_weight=W), ValueError, r"must be \(H \* D,\)"),
    "bias-shape": (dict(norm="layer", q_bias=torch.randn(D + 1)), ValueError, r"must be \(D,\)"),
    "weight-strided": (dict(norm="rms", q_weight=torch.randn(2 * D)[::2]), ValueError, "contiguous"),
    "weight-dtype": (dict(norm="rms", q_weight=W.int()), TypeError, "int32"),
    "weight-device": (dict(norm="rms", q_weight=W.to("meta")), ValueError, "another device"),
    "native-weight": (
        dict(q=Q.bfloat16(), k=K.bfloat16(), norm="rms", q_weight=W, precision="native"),
        TypeError,
        "fp32",
    ),
    "cos-alone": (dict(cos=COS), ValueError, "cos and sin come together"),
    "sin-alone": (dict(sin=SIN), ValueError, "cos and sin come together"),
    "k-cos-alone": (dict(**ROPE, k_cos=COS), ValueError, "k_cos and k_sin come together"),
    "k-sin-alone": (dict(**ROPE, k_sin=SIN), ValueError, "k_cos and k_sin come together"),
    "cos-integer": (dict(cos=COS.int(), sin=SIN), TypeError, "int32"),
    "cos-bf16": (dict(cos=COS.bfloat16(), sin=SIN.bfloat16()), TypeError, "expected float32"),
    "cos-bf16-law": (
        dict(q=Q.bfloat16(), k=K.bfloat16(), **table(N, D // 2, dtype=torch.bfloat16)),
        TypeError,
        "precision='native'",
    ),
    "cos-fp64": (dict(cos=COS.double(), sin=SIN.double()), TypeError, "expected float32"),
    "sin-dtype": (dict(q=Q.double(), k=K.double(), cos=COS.double(), sin=SIN), ValueError, "must be alike"),
    "sin-shape": (dict(cos=COS, sin=SIN[:1]), ValueError, "must be alike"),
    "cos-device": (dict(cos=COS.to("meta"), sin=SIN), ValueError, "another device"),
    "cos-rank": (dict(**table(D // 2)), ValueError, "must be"),
    "cos-rank-packed": (dict(q=Q[0], k=K[0], **table(1, N, H, D // 2)), ValueError, "must be"),
    "cos-doubled": (dict(**table(N, D)), ValueError, "doubled table"),
    "cos-wide": (dict(**table(N, D // 2 + 1)), ValueError, "one value per pair"),
    "cos-empty": (dict(**table(N, 0)), ValueError, "one value per pair"),
    "cos-N": (dict(**table(N + 1, D // 2)), ValueError, "does not broadcast"),
    "cos-slice": (dict(**ROPE, rope_start=2), ValueError, "does not broadcast"),
    "cos-H": (dict(**table(N, 2, D // 2)), ValueError, "does not broadcast"),
    "cos-B": (dict(**table(3, N, 1, D // 2)), ValueError, "does not broadcast"),
    "cos-for-k": (dict(k=K[:, :4], **ROPE), ValueError, "tokens of k"),
    "k-cos-N": (dict(**ROPE, k_cos=COS[:4], k_sin=SIN[:4]), ValueError, "k_cos does not broadcast"),
    "k-cos-R": (dict(**ROPE, k_cos=COS[:, :4], k_sin=SIN[:, :4]), ValueError, "different numbers of channels"),
    "thirds": (dict(cos=COS[:, :4], sin=SIN[:, :4], layout="axis_half"), ValueError, "R % 6"),
    "start-negative": (dict(**ROPE, rope_start=-1), ValueError, "must lie inside q"),
    "start-high": (dict(**ROPE, rope_start=N + 1), ValueError, "must lie inside q"),
    "len-negative": (dict(**ROPE, rope_len=-1), ValueError, "must lie inside q"),
    "len-high": (dict(**ROPE, rope_start=1, rope_len=N), ValueError, "must lie inside q"),
    "len-high-k": (dict(k=K[:, :4], **ROPE, rope_len=N), ValueError, "must lie inside k"),
    "axes-and-cos": (dict(**ROPE, **COMPACT), ValueError, "two tables for q"),
    "axes-count": (dict(axes=AXES[:3], grids=GRIDS), ValueError, "axes must be"),
    "axes-type": (dict(axes=(1, 2), grids=GRIDS), ValueError, "axes must be"),
    "axes-without-grids": (dict(axes=AXES), ValueError, "axes without grids"),
    "grids-without-axes": (dict(grids=GRIDS), ValueError, "grids without axes"),
    "axes-dtype": (dict(axes=tuple(t.bfloat16() for t in AXES), grids=GRIDS), TypeError, "expected float32"),
    "axes-mixed": (
        dict(q=Q.double(), k=K.double(), axes=(*AXES[:3], AXES[3].double()), grids=GRIDS),
        ValueError,
        "like its partner",
    ),
    "axes-device": (dict(axes=(AXES[0].to("meta"), *AXES[1:]), grids=GRIDS), ValueError, "another device"),
    "axes-shape": (dict(axes=(*AXES[:3], AXES[3][:3]), grids=GRIDS), ValueError, "like its partner"),
    "axes-rank": (dict(axes=(*AXES[:2], AXES[2][0], AXES[3][0]), grids=GRIDS), ValueError, "like its partner"),
    "axes-wide": (dict(axes=(*AXES[:2], *AXES[:2]), grids=GRIDS), ValueError, "more channels than a head"),
    "axes-k-length": (dict(k=K[:, :4], **COMPACT), ValueError, "axes serve q and k of one length"),
    "grids-dtype": (dict(axes=AXES, grids=GRIDS.float()), TypeError, "int32 or int64"),
    "grids-columns": (dict(axes=AXES, grids=torch.ones(1, 3, dtype=torch.int32)), ValueError, "a column per axis"),
    "grids-rows": (dict(axes=AXES, grids=GRIDS.expand(3, 2)), ValueError, "row per sample"),
    "grids-rank": (dict(axes=AXES, grids=GRIDS[0]), ValueError, "row per sample"),
    "grids-device": (dict(axes=AXES, grids=GRIDS.to("meta")), ValueError, "another device"),
    "grids-high": (dict(axes=AXES, grids=torch.tensor([[1, 6]])), ValueError, "grids is out of range"),
    "grids-negative": (dict(axes=AXES, grids=torch.tensor([[-3, -2]])), ValueError, "grids is out of range"),
    "grids-short": (dict(axes=AXES, grids=torch.tensor([[2, 2]])), ValueError, "must cover"),
    "grids-one-short": (dict(axes=AXES, grids=torch.tensor([[3, 2], [2, 2]])), ValueError, "must cover"),
    "grids-packed": (dict(q=Q[0], k=K[0], axes=AXES, grids=torch.tensor([[2, 2], [2, 2]])), ValueError, "must cover"),
}


@each_backend
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("case", BAD, ids=str)
def test_bad_input(case, inplace, backend):
    kwargs, error, match = BAD[case]
    arguments = {"q": Q, "k": K, **kwargs}
    before = [t.clone() for t in (Q, K)]
    with pytest.raises(error, match=match) as caught:
        ops.qk_norm_rope(arguments.pop("q"), arguments.pop("k"), **arguments, inplace=inplace, backend=backend)
    assert str(caught.value).startswith("qk_norm_rope: ") and "got" in str(caught.value)
    assert torch.equal(before[0], Q) and torch.equal(before[1], K)


# ---- rope_table ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(2, 3, 5), (1, 1, 1), (0, 3, 5), [(2, 3, 5), (1, 2, 2)]], ids=str)
def test_rope_table_formula(grid):
    dims, theta = (4, 6, 6), 256.0
    cos, sin = ops.rope_table(grid, dims, theta=theta)
    rows = []
    for T, Y, X in grid if isinstance(grid, list) else [grid]:
        for position in torch.cartesian_prod(torch.arange(T), torch.arange(Y), torch.arange(X)).tolist():
            rows.append([p * theta ** (-2 * i / d) for p, d in zip(position, dims, strict=True) for i in range(d // 2)])
    angle = torch.tensor(rows, dtype=torch.float64).reshape(-1, 8)
    for ours, truth in ((cos, angle.cos()), (sin, angle.sin())):
        assert ours.dtype == torch.float32 and ours.shape == angle.shape and ours.is_contiguous()
        torch.testing.assert_close(ours, truth.float(), rtol=0, atol=1e-7)


def test_rope_table_compiles_and_takes_a_device():
    compiled = torch.compile(lambda x: x * ops.rope_table((2, x.shape[1]), (4, 4))[0].sum(), backend="aot_eager")
    x = torch.ones(1, 3)
    torch.testing.assert_close(compiled(x), x * ops.rope_table((2, 3), (4, 4))[0].sum())
    assert ops.rope_table((2, 3), (4, 4), device="meta")[0].device.type == "meta"


@pytest.mark.parametrize(
    "args, kwargs, match",
    [
        (((2, 3), (4, 4, 4)), {}, "one size per axis"),
        (([(2, 3, 4), (2, 3)], (4, 4, 4)), {}, "one size per axis"),
        (((2, -1), (4, 4)), {}, "one size per axis"),
        (((2, 1.5), (4, 4)), {}, "one size per axis"),
        (((2, 3), (4, 3)), {}, "even channel counts"),
        (((2, 3), (4, 0)), {}, "even channel counts"),
        (((), ()), {}, "even channel counts"),
        (((2, 3), (4, 4)), dict(theta=0.0), "theta"),
        (((2, 3), (4, 4)), dict(theta=float("nan")), "theta"),
    ],
)
def test_rope_table_bad_input(args, kwargs, match):
    with pytest.raises(ValueError, match=match) as caught:
        ops.rope_table(*args, **kwargs)
    assert str(caught.value).startswith("rope_table: ") and "got" in str(caught.value)
