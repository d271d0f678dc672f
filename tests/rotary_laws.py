"""Laws of rotary's GPU kernels that the samples do not hold. A test file imports them and has a fixture `on`: Place."""

import pytest
import torch

from fastdit import ops
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, samples

SAMPLES = samples("qk_norm_rope")


def angles(m: Maker, *shape: int) -> dict:
    angle = m.randn(*shape, dtype=torch.float64)
    return dict(cos=angle.cos().float(), sin=angle.sin().float())


class Place:
    """A backend and the device of its tensors."""

    def __init__(self, backend: str, device: str) -> None:
        self.backend, self.device = backend, device

    def maker(self, dtype=torch.float32, **kwargs) -> Maker:
        return Maker(dtype, self.device, **kwargs)

    def rotate(self, *args, **kwargs):
        return ops.qk_norm_rope(*args, **kwargs, backend=self.backend)

    def gradients(self, sample, dtype, n=6):
        args, kwargs = sample.make(self.maker(dtype, n=n))
        args, kwargs, leaves = contract._leaves(sample, args, kwargs)
        out = self.rotate(*args, **kwargs)
        return torch.autograd.grad(out, leaves, [o.detach().cos() for o in out])


@pytest.mark.parametrize("dtype", contract.DTYPES, ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_inplace(sample, dtype, on):
    (q, k), kwargs = sample.make(on.maker(dtype))
    expected = on.rotate(q, k, **kwargs)
    a, b = on.rotate(q, k, **kwargs, inplace=True)
    assert a is q and b is k
    for x, y in zip((q, k), expected, strict=True):
        close.assert_bitwise(x, y)


def test_inplace_leaves_the_rest_of_a_fused_projection_alone(on):
    m = on.maker(torch.bfloat16)
    qkv = m.randn(2, 5, 3, 2, 24)
    v, tail = qkv[:, :, 2].clone(), qkv[..., 20:].clone()
    on.rotate(qkv[:, :, 0, :, :20], qkv[:, :, 1, :, :20], norm="rms", inplace=True)
    close.assert_bitwise(qkv[:, :, 2], v)
    close.assert_bitwise(qkv[..., 20:], tail)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
def test_axes_equal_the_dense_table(layout, on):
    """Packed grids, empty ones among them, more than a block of the running totals; and one grid per sample."""
    m, dims = on.maker(torch.bfloat16), (8, 12, 12)
    axes = [t.to(on.device) for dim in dims for t in ops.rope_table((5,), (dim,))]
    packed = [(1, 1, 1), (0, 3, 2), (2, 3, 2), *[(1, 1, n % 3) for n in range(140)], (1, 2, 4)]
    for grids, lead in ((packed, ()), ([(2, 3, 2), (1, 4, 3)], (2,)), ([(2, 3, 2)], (2,)), ([(3, 1, 4)], ())):
        cos, sin = ops.rope_table(grids, dims, device=on.device)
        if lead:
            cos, sin = (t.view(len(grids), -1, 1, 16) for t in (cos, sin))
        tokens = cos.shape[-3] if lead else cos.shape[0]
        q, k = m.randn(*lead, tokens, 3, 32), m.randn(*lead, tokens, 1, 32)
        options = dict(norm="rms", layout=layout)
        dense = on.rotate(q, k, cos=cos, sin=sin, **options)
        for index in (torch.int32, torch.int64):
            compact = on.rotate(q, k, axes=axes, grids=m.index(grids, dtype=index), **options)
            for a, b in zip(compact, dense, strict=True):
                close.assert_bitwise(a, b)


@pytest.mark.parametrize("layout", ["interleaved", "half"])
@pytest.mark.parametrize("scope", ["head", "hidden"])
def test_nan_stays_where_it_is(scope, layout, on):
    """In its head, or token; the channels and tokens that do not rotate take nothing from their partners."""
    m = on.maker(torch.bfloat16)
    q, k = m.randn(1, 5, 3, 40), m.randn(1, 5, 3, 40)
    q[0, 2, 1, 7] = float("nan")
    for x in on.rotate(q, k, norm="layer", scope=scope, layout=layout, **angles(m, 5, 12)):
        bad = torch.isnan(x)
        where = bad[0, 2] if scope == "hidden" else bad[0, 2, 1]
        assert bad.sum() == where.sum() and (where.all() or not bad.any())
    plain = on.rotate(q, k, layout=layout, **angles(m, 5, 4))
    assert torch.isnan(plain[0]).sum() == 2  # its pair
    k[0, 1, 0, 30] = float("inf")
    assert torch.isinf(on.rotate(q, k, layout=layout, **angles(m, 5, 4))[1]).sum() == 1


@pytest.mark.parametrize("scope", ["head", "hidden"])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_sums_take_nothing_from_beyond_the_last_row(norm, scope, on):
    """With eps = 0 the empty rows of a tile are no numbers."""
    m = on.maker()
    q, k = m.randn(3, 3, 24), m.randn(3, 3, 24)
    size = 24 if scope == "head" else 72
    weight, bias = m.randn(size).requires_grad_(), m.randn(size).requires_grad_()
    options = dict(norm=norm, scope=scope, eps=0.0, q_weight=weight, q_bias=bias, k_weight=weight, k_bias=bias)
    found = []
    for backend in (on.backend, "reference"):
        a, b = ops.qk_norm_rope(q, k, **options, backend=backend)
        found.append(torch.autograd.grad(a.sin().sum() + b.cos().sum(), (weight, bias)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("wanted", ["q", "k", "q_weight", "k_bias", "cos", "k_sin"])
def test_one_gradient_alone(wanted, on):
    """Each gradient asked for alone has the bits that it has among all."""
    m = on.maker()
    names = ("q", "k", "q_weight", "k_bias", "cos", "sin", "k_cos", "k_sin")
    shapes = ((2, 5, 3, 16), (2, 4, 3, 16), (16,), (16,), (5, 8), (5, 8), (4, 8), (4, 8))
    tensors = {name: m.randn(*shape) for name, shape in zip(names, shapes, strict=True)}

    def gradient(needed):
        given = {name: t.clone().requires_grad_(name in needed) for name, t in tensors.items()}
        total = sum(x.square().sum() for x in on.rotate(**given, norm="layer") if x.requires_grad)
        return torch.autograd.grad(total, given[wanted])[0]

    close.assert_bitwise(gradient((wanted,)), gradient(names))


def test_gradient_of_one_output(on):
    m = on.maker()
    q, k, w = m.randn(2, 5, 3, 16), m.randn(2, 5, 3, 16), m.randn(16)
    leaves = [t.requires_grad_() for t in (q, k, w)]
    a, _ = on.rotate(q, k, norm="rms", q_weight=w, k_weight=w)
    dq, dk, dw = torch.autograd.grad(a.square().sum(), leaves)
    assert dq.abs().sum() > 0 and dw.abs().sum() > 0 and not dk.any()


@pytest.mark.parametrize("shapes", [((0, 4, 2, 8),) * 2, ((2, 0, 2, 8), (2, 3, 2, 8)), ((2, 4, 2, 8), (2, 4, 0, 8))])
def test_zero_size(shapes, on):
    q, k = (torch.randn(shape, device=on.device, requires_grad=True) for shape in shapes)
    weight = torch.ones(8, device=on.device, requires_grad=True)
    options = dict(norm="layer", q_weight=weight, k_weight=weight, k_bias=weight)
    results = [ops.qk_norm_rope(q, k, **options, backend=b) for b in (on.backend, "reference")]
    grads = [torch.autograd.grad([x.sin().sum() for x in r], (q, k, weight)) for r in results]
    for a, b in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.big
def test_offsets_beyond_32_bits(on):
    """Tokens 2^31 elements apart: reserved memory, of which only the rows themselves are ever touched."""
    m = on.maker(torch.bfloat16)
    rows = m.randn(1, 3, 2, 32)
    far = torch.empty(2**32 + 64, dtype=torch.bfloat16, device=on.device).as_strided((1, 3, 2, 32), (0, 2**31, 32, 1))
    far.copy_(rows)
    kwargs = dict(norm="rms", **angles(m, 3, 16))
    expected = on.rotate(rows, rows, **kwargs)
    for a, b in zip(on.rotate(far, far, **kwargs), expected, strict=True):
        close.assert_bitwise(a, b)
    grads = [torch.autograd.grad(on.rotate(x.requires_grad_(), rows, **kwargs)[0].sum(), x)[0] for x in (far, rows)]
    close.assert_bitwise(*grads)
    on.rotate(far.detach(), rows.detach(), **kwargs, inplace=True)
    close.assert_bitwise(far.detach(), expected[0])
