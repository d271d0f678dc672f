"""rotary on the Triton kernels: the laws that the samples do not hold, in the interpreter or on a GPU."""

import pytest
import torch
from hypothesis import given, settings, strategies as st
from test_rotary import _fuzz

import fastdit
from fastdit import ops
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, samples

pytest.importorskip("triton")
from fastdit.backends.triton import _config, rotary as adapter

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
SAMPLES = samples("qk_norm_rope")
SEVERAL = ("hunyuan-native", "wan", "ltx2-split", "packed-axes", "tail-D-half", "allegro-axes")
each_hot = pytest.mark.parametrize("sample", [s for s in SAMPLES if s.id in SEVERAL], ids=str)
KERNELS = ("qk_norm_rope", "qk_norm_rope_backward")


def maker(dtype=torch.float32, **kwargs) -> Maker:
    return Maker(dtype, DEVICE, **kwargs)


def rotate(*args, **kwargs):
    return ops.qk_norm_rope(*args, **kwargs, backend="triton")


def angles(m: Maker, *shape: int) -> dict:
    angle = m.randn(*shape, dtype=torch.float64)
    return dict(cos=angle.cos().float(), sin=angle.sin().float())


def gradients(sample, dtype, n=6):
    args, kwargs = sample.make(maker(dtype, n=n))
    args, kwargs, leaves = contract._leaves(sample, args, kwargs)
    out = rotate(*args, **kwargs)
    return torch.autograd.grad(out, leaves, [o.detach().cos() for o in out])


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_inplace(sample, dtype):
    (q, k), kwargs = sample.make(maker(dtype))
    expected = rotate(q, k, **kwargs)
    a, b = rotate(q, k, **kwargs, inplace=True)
    assert a is q and b is k
    for x, y in zip((q, k), expected, strict=True):
        close.assert_bitwise(x, y)


def test_inplace_leaves_the_rest_of_a_fused_projection_alone():
    m = maker(torch.bfloat16)
    qkv = m.randn(2, 5, 3, 2, 24)
    v, tail = qkv[:, :, 2].clone(), qkv[..., 20:].clone()
    rotate(qkv[:, :, 0, :, :20], qkv[:, :, 1, :, :20], norm="rms", inplace=True)
    close.assert_bitwise(qkv[:, :, 2], v)
    close.assert_bitwise(qkv[..., 20:], tail)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data):
    contract.forward(*_fuzz(data), "triton", DEVICE)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz_backward(data):
    contract.backward(*_fuzz(data), "triton", DEVICE)


@each_hot
def test_backward_is_reproducible(sample):
    """More tokens than the programs that sum parameters hold at a time."""
    first = gradients(sample, torch.bfloat16, n=60)
    for a, b in zip(gradients(sample, torch.bfloat16, n=60), first, strict=True):
        close.assert_bitwise(a, b)


@pytest.mark.parametrize("kernel", KERNELS)
@each_hot
def test_every_tile(kernel, sample):
    """All that the tuner may choose, and tiles that split heads into groups; 12 heads of 32 channels fill none."""
    for config in (*_config.CANDIDATES[kernel][::3], _config.Config((1, 1, 2), 1, 1), _config.Config((2, 2, 1), 4, 1)):
        with _config.forced(kernel, config):
            check = contract.forward if kernel == KERNELS[0] else contract.backward
            check(sample, torch.float32, "triton", DEVICE)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_axes_equal_the_dense_table(layout):
    """Packed grids, empty ones among them, more than a block of the running totals; and one grid per sample."""
    m, dims = maker(torch.bfloat16), (8, 12, 12)
    axes = [t.to(DEVICE) for dim in dims for t in ops.rope_table((5,), (dim,))]
    packed = [(1, 1, 1), (0, 3, 2), (2, 3, 2), *[(1, 1, n % 3) for n in range(140)], (1, 2, 4)]
    for grids, lead in ((packed, ()), ([(2, 3, 2), (1, 4, 3)], (2,)), ([(2, 3, 2)], (2,)), ([(3, 1, 4)], ())):
        cos, sin = ops.rope_table(grids, dims, device=DEVICE)
        if lead:
            cos, sin = (t.view(len(grids), -1, 1, 16) for t in (cos, sin))
        tokens = cos.shape[-3] if lead else cos.shape[0]
        q, k = m.randn(*lead, tokens, 3, 32), m.randn(*lead, tokens, 1, 32)
        options = dict(norm="rms", layout=layout)
        dense = rotate(q, k, cos=cos, sin=sin, **options)
        for index in (torch.int32, torch.int64):
            compact = rotate(q, k, axes=axes, grids=m.index(grids, dtype=index), **options)
            for a, b in zip(compact, dense, strict=True):
                close.assert_bitwise(a, b)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("scope", ["head", "hidden"])
def test_nan_stays_where_it_is(scope, layout):
    """In its head, or token; the channels and tokens that do not rotate take nothing from their partners."""
    m = maker(torch.bfloat16)
    q, k = m.randn(1, 5, 3, 40), m.randn(1, 5, 3, 40)
    q[0, 2, 1, 7] = float("nan")
    for x in rotate(q, k, norm="layer", scope=scope, layout=layout, **angles(m, 5, 12)):
        bad = torch.isnan(x)
        where = bad[0, 2] if scope == "hidden" else bad[0, 2, 1]
        assert bad.sum() == where.sum() and (where.all() or not bad.any())
    plain = rotate(q, k, layout=layout, **angles(m, 5, 4))
    assert torch.isnan(plain[0]).sum() == 2  # its pair
    k[0, 1, 0, 30] = float("inf")
    assert torch.isinf(rotate(q, k, layout=layout, **angles(m, 5, 4))[1]).sum() == 1


@pytest.mark.parametrize("scope", ["head", "hidden"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_sums_take_nothing_from_beyond_the_last_row(norm, scope):
    """With eps = 0 the empty rows of a tile are no numbers."""
    m = maker()
    q, k = m.randn(3, 3, 24), m.randn(3, 3, 24)
    size = 24 if scope == "head" else 72
    weight, bias = m.randn(size).requires_grad_(), m.randn(size).requires_grad_()
    options = dict(norm=norm, scope=scope, eps=0.0, q_weight=weight, q_bias=bias, k_weight=weight, k_bias=bias)
    found = []
    for backend in ("triton", "reference"):
        a, b = ops.qk_norm_rope(q, k, **options, backend=backend)
        found.append(torch.autograd.grad(a.sin().sum() + b.cos().sum(), (weight, bias)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", ["q", "k", "q_weight", "k_bias", "cos", "k_sin"])
def test_one_gradient_alone(wanted):
    """Each gradient asked for alone has the bits that it has among all."""
    m = maker()
    names = ("q", "k", "q_weight", "k_bias", "cos", "sin", "k_cos", "k_sin")
    shapes = ((2, 5, 3, 16), (2, 4, 3, 16), (16,), (16,), (5, 8), (5, 8), (4, 8), (4, 8))
    tensors = {name: m.randn(*shape) for name, shape in zip(names, shapes, strict=True)}

    def gradient(needed):
        given = {name: t.clone().requires_grad_(name in needed) for name, t in tensors.items()}
        total = sum(x.square().sum() for x in rotate(**given, norm="layer") if x.requires_grad)
        return torch.autograd.grad(total, given[wanted])[0]

    close.assert_bitwise(gradient((wanted,)), gradient(names))


def test_gradient_of_one_output():
    m = maker()
    q, k, w = m.randn(2, 5, 3, 16), m.randn(2, 5, 3, 16), m.randn(16)
    leaves = [t.requires_grad_() for t in (q, k, w)]
    a, _ = rotate(q, k, norm="rms", q_weight=w, k_weight=w)
    dq, dk, dw = torch.autograd.grad(a.square().sum(), leaves)
    assert dq.abs().sum() > 0 and dw.abs().sum() > 0 and not dk.any()


@pytest.mark.parametrize("shapes", [((0, 4, 2, 8),) * 2, ((2, 0, 2, 8), (2, 3, 2, 8)), ((2, 4, 2, 8), (2, 4, 0, 8))])
def test_zero_size(shapes):
    q, k = (torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes)
    weight = torch.ones(8, device=DEVICE, requires_grad=True)
    options = dict(norm="layer", q_weight=weight, k_weight=weight, k_bias=weight)
    results = [ops.qk_norm_rope(q, k, **options, backend=b) for b in ("triton", "reference")]
    grads = [torch.autograd.grad([x.sin().sum() for x in r], (q, k, weight)) for r in results]
    for a, b in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.big
def test_offsets_beyond_32_bits():
    """Tokens 2^31 elements apart: reserved memory, of which only the rows themselves are ever touched."""
    m = maker(torch.bfloat16)
    rows = m.randn(1, 3, 2, 32)
    far = torch.empty(2**32 + 64, dtype=torch.bfloat16, device=DEVICE).as_strided((1, 3, 2, 32), (0, 2**31, 32, 1))
    far.copy_(rows)
    kwargs = dict(norm="rms", **angles(m, 3, 16))
    expected = rotate(rows, rows, **kwargs)
    for a, b in zip(rotate(far, far, **kwargs), expected, strict=True):
        close.assert_bitwise(a, b)
    grads = [torch.autograd.grad(rotate(x.requires_grad_(), rows, **kwargs)[0].sum(), x)[0] for x in (far, rows)]
    close.assert_bitwise(*grads)
    rotate(far.detach(), rows.detach(), **kwargs, inplace=True)
    close.assert_bitwise(far.detach(), expected[0])


def test_refusals():
    m = maker()
    wide = torch.empty(1, 1, 2, adapter.WIDEST // 2 + 1, device=DEVICE)
    with pytest.raises(fastdit.NoBackend, match="more than 32768 channels"):
        rotate(wide, wide, norm="rms", scope="hidden")
    q, weight = m.randn(1, 2, 2, 8), m.randn(8, dtype=torch.float64)
    with pytest.raises(fastdit.NoBackend, match="float64"):
        rotate(q, q, norm="rms", q_weight=weight)
    with pytest.raises(fastdit.NoBackend, match="float64"):
        rotate(q.double(), q.double())


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
def test_tiles_suit_every_head(dtype, halves, hidden):
    """Powers of two; all heads of a row at once under scope "hidden"; whole warps, at most 16."""
    for D in (1, 8, 42, 64, 72, 96, 128, 256):
        for heads in ((1, 1), (12, 12), (24, 1), (30, 30), (32, 8), (40, 40), (48, 48), (0, 3), (100, 100)):
            (BT, HB, most), warps, _ = adapter.tile(dtype, D, *heads, hidden, halves)
            assert BT & (BT - 1) == 0 and HB & (HB - 1) == 0 and warps in (1, 2, 4, 8, 16) and most >= 1
            padded = sum(-(-h // HB) * HB for h in heads)
            assert padded <= 1.34 * sum(heads) or sum(heads) < 4, (D, heads, HB)
            assert not hidden or sum(-(-h // HB) for h in heads) <= most
