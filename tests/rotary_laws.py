"""The laws of rotary beside the contract on its samples, for the tests of every compiled backend, and what they draw.

A law takes the backend and the device of its tensors first.
"""

from functools import partial

import pytest
import torch
from hypothesis import strategies as st
from laws import rows

from fastdit import ops
from fastdit.testing import close, contract
from fastdit.testing.workloads import Maker, Sample, samples

SAMPLES = samples("qk_norm_rope")
LAYOUTS, SCOPES = ("interleaved", "half"), ("head", "hidden")
WANTED = ("q", "k", "q_weight", "k_bias", "cos", "k_sin")
EMPTY = (((0, 4, 2, 8),) * 2, ((2, 0, 2, 8), (2, 3, 2, 8)), ((2, 4, 2, 8), (2, 4, 0, 8)))  # q and k


def angles(m: Maker, *shape: int) -> dict:
    angle = m.randn(*shape, dtype=torch.float64)
    return dict(cos=angle.cos().float(), sin=angle.sin().float())


def drawn(data) -> tuple[Sample, torch.dtype]:
    """Any mix of ranks, sizes, norms, tables, slices and laws."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    count = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dtype, layout = draw(*contract.DTYPES), draw("interleaved", "half", "axis_half")
    norm, scope = draw(None, "rms", "layer"), draw("head", "hidden")
    B, H, Hk, D = count(1, 2), count(1, 3), count(1, 3), count(6, 140)
    # a handful of fp32 roundings is no baseline for a maximum: its lucky draws are what the search would find
    N = draw(0, 64) if dtype == torch.float32 else count(0, 9)
    start = count(0, N)
    length = count(0, N - start)
    pairs = count(1, D // 6) * 3 if layout == "axis_half" else count(1, D // 2)

    def make(m):
        lead = draw((N,), (B, N))
        q, k = (m.randn(*lead, h, D + 3)[..., :D] for h in (H, Hk))
        heads = draw(1, H) if H == Hk else 1
        shape = draw((length, pairs), (1, pairs), (length, heads, pairs), (1, heads, pairs))
        angle = m.randn(*shape, dtype=torch.float64)
        kwargs = dict(norm=norm, scope=scope, layout=layout, precision=draw("fp32", "native"))
        kwargs |= dict(rope_start=start, rope_len=length, cos=angle.cos().float(), sin=angle.sin().float())
        if norm is not None:
            for what, h in (("q_weight", H), ("k_weight", Hk), ("q_bias", H), ("k_bias", Hk)):
                if draw(True, False):
                    kwargs[what] = m.randn(h * D if scope == "hidden" else D)
        return (q, k), kwargs

    made = make(Maker(dtype))
    return Sample("qk_norm_rope", "fuzz", lambda _: made), dtype


def gradients(backend, device, sample: Sample, dtype: torch.dtype, n: int = 6):
    args, kwargs, leaves = contract._leaves(sample, *sample.make(Maker(dtype, device, n=n)))
    out = ops.qk_norm_rope(*args, **kwargs, backend=backend)
    return torch.autograd.grad(out, leaves, [o.detach().cos() for o in out])


def inplace(backend, device, sample: Sample, dtype: torch.dtype) -> None:
    (q, k), kwargs = sample.make(Maker(dtype, device))
    expected = ops.qk_norm_rope(q, k, **kwargs, backend=backend)
    before = torch.cat([q.flatten(), k.flatten()])
    a, b = ops.qk_norm_rope(q, k, **kwargs, inplace=True, backend=backend)
    assert a is q and b is k
    close.assert_all_bitwise((q, k), expected)
    assert sample.id == "nothing" or not torch.equal(before, torch.cat([q.flatten(), k.flatten()]))


def inplace_leaves_the_rest_of_a_fused_projection_alone(backend, device) -> None:
    m = Maker(torch.bfloat16, device)
    qkv = m.randn(2, 5, 3, 2, 24)
    v, tail = qkv[:, :, 2].clone(), qkv[..., 20:].clone()
    q, k = qkv[:, :, 0, :, :20], qkv[:, :, 1, :, :20]
    ops.qk_norm_rope(q, k, norm="rms", inplace=True, backend=backend)
    close.assert_bitwise(qkv[:, :, 2], v)
    close.assert_bitwise(qkv[..., 20:], tail)


def axes_equal_the_dense_table(backend, device, layout) -> None:
    """Packed grids, empty ones among them, more than a block of the running totals; and one grid per sample."""
    m, dims = Maker(torch.bfloat16, device), (8, 12, 12)
    axes = [t.to(device) for dim in dims for t in ops.rope_table((5,), (dim,))]
    packed = [(1, 1, 1), (0, 3, 2), (2, 3, 2), *[(1, 1, n % 3) for n in range(140)], (1, 2, 4)]
    for grids, lead in ((packed, ()), ([(2, 3, 2), (1, 4, 3)], (2,)), ([(2, 3, 2)], (2,)), ([(3, 1, 4)], ())):
        cos, sin = ops.rope_table(grids, dims, device=device)
        if lead:
            cos, sin = (t.view(len(grids), -1, 1, 16) for t in (cos, sin))
        tokens = cos.shape[-3] if lead else cos.shape[0]
        q, k = m.randn(*lead, tokens, 3, 32), m.randn(*lead, tokens, 1, 32)
        options = dict(norm="rms", layout=layout, backend=backend)
        dense = ops.qk_norm_rope(q, k, cos=cos, sin=sin, **options)
        for index in (torch.int32, torch.int64):
            compact = ops.qk_norm_rope(q, k, axes=axes, grids=m.index(grids, dtype=index), **options)
            close.assert_all_bitwise(compact, dense)


def nan_stays_where_it_is(backend, device, scope, layout) -> None:
    """In its head, or token; the channels and tokens that do not rotate take nothing from their partners."""
    m, options = Maker(torch.bfloat16, device), dict(layout=layout, backend=backend)
    q, k = m.randn(1, 5, 3, 40), m.randn(1, 5, 3, 40)
    q[0, 2, 1, 7] = float("nan")
    for x in ops.qk_norm_rope(q, k, norm="layer", scope=scope, **angles(m, 5, 12), **options):
        bad = torch.isnan(x)
        where = bad[0, 2] if scope == "hidden" else bad[0, 2, 1]
        assert bad.sum() == where.sum() and (where.all() or not bad.any())
    plain = ops.qk_norm_rope(q, k, **angles(m, 5, 4), **options)
    assert torch.isnan(plain[0]).sum() == 2  # its pair
    k[0, 1, 0, 30] = float("inf")
    assert torch.isinf(ops.qk_norm_rope(q, k, **angles(m, 5, 4), **options)[1]).sum() == 1


def sums_take_nothing_from_beyond_the_last_row(backend, device, norm, scope) -> None:
    """With eps = 0 the empty rows of a tile are no numbers."""
    m = Maker(torch.float32, device)
    q, k = m.randn(3, 3, 24), m.randn(3, 3, 24)
    size = 24 if scope == "head" else 72
    weight, bias = m.randn(size).requires_grad_(), m.randn(size).requires_grad_()
    options = dict(norm=norm, scope=scope, eps=0.0, q_weight=weight, q_bias=bias, k_weight=weight, k_bias=bias)
    found = []
    for name in (backend, "reference"):
        a, b = ops.qk_norm_rope(q, k, **options, backend=name)
        found.append(torch.autograd.grad(a.sin().sum() + b.cos().sum(), (weight, bias)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def one_gradient_alone(backend, device, wanted) -> None:
    """Each gradient asked for alone has the bits that it has among all."""
    m = Maker(torch.float32, device)
    names = ("q", "k", "q_weight", "k_bias", "cos", "sin", "k_cos", "k_sin")
    shapes = ((2, 5, 3, 16), (2, 4, 3, 16), (16,), (16,), (5, 8), (5, 8), (4, 8), (4, 8))
    tensors = {name: m.randn(*shape) for name, shape in zip(names, shapes, strict=True)}

    def gradient(needed):
        given = {name: t.clone().requires_grad_(name in needed) for name, t in tensors.items()}
        out = ops.qk_norm_rope(**given, norm="layer", backend=backend)
        return torch.autograd.grad([x.square().sum() for x in out if x.requires_grad], given[wanted])[0]

    close.assert_bitwise(gradient((wanted,)), gradient(names))


def gradient_of_one_output(backend, device) -> None:
    """An output that nobody uses leaves zeros for what only it depends on."""
    m = Maker(torch.float32, device)
    q, k, w = m.randn(2, 5, 3, 16), m.randn(2, 5, 3, 16), m.randn(16)
    leaves = [t.requires_grad_() for t in (q, k, w)]
    a, _ = ops.qk_norm_rope(q, k, norm="rms", q_weight=w, k_weight=w, backend=backend)
    dq, dk, dw = torch.autograd.grad(a.square().sum(), leaves)
    assert dq.abs().sum() > 0 and dw.abs().sum() > 0 and not dk.any()


def scope_belongs_to_the_norm(backend, device) -> None:
    """Without one heads share nothing: the same bits, forward and backward."""
    m, found = Maker(torch.float32, device), []
    q, k, tables = m.randn(2, 5, 3, 16).requires_grad_(), m.randn(2, 5, 1, 16).requires_grad_(), angles(m, 5, 8)
    for scope in SCOPES:
        out = ops.qk_norm_rope(q, k, scope=scope, **tables, backend=backend)
        found.append([*out, *torch.autograd.grad(out, (q, k), [o.detach().cos() for o in out])])
    close.assert_all_bitwise(*found)


def zero_size(backend, device, shapes) -> None:
    q, k = (torch.randn(shape, device=device, requires_grad=True) for shape in shapes)
    weight = torch.ones(8, device=device, requires_grad=True)
    options = dict(norm="layer", q_weight=weight, k_weight=weight, k_bias=weight)
    results = [ops.qk_norm_rope(q, k, **options, backend=b) for b in (backend, "reference")]
    grads = [torch.autograd.grad([x.sin().sum() for x in r], (q, k, weight)) for r in results]
    for a, b in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(a, b)


def offsets_beyond_32_bits(backend, device, dtype) -> None:
    """Tokens 2^31 elements apart: reserved memory, of which only the rows themselves are ever touched."""
    m, rotate = Maker(dtype, device), partial(ops.qk_norm_rope, norm="rms", backend=backend)
    near, kwargs = m.randn(1, 3, 2, 32), angles(m, 3, 16)
    far = torch.empty(2**32 + 64, dtype=dtype, device=device).as_strided((1, 3, 2, 32), (0, 2**31, 32, 1))
    far.copy_(near)
    expected = rotate(near, near, **kwargs)
    close.assert_all_bitwise(rotate(far, far, **kwargs), expected)
    close.assert_bitwise(
        *(torch.autograd.grad(rotate(x.requires_grad_(), near, **kwargs)[0].sum(), x)[0] for x in (far, near))
    )
    rotate(far.detach(), near.detach(), **kwargs, inplace=True)
    close.assert_bitwise(far.detach(), expected[0])


EVERYWHERE = [
    *rows(inplace, SAMPLES, contract.DTYPES),
    *rows(inplace_leaves_the_rest_of_a_fused_projection_alone),
    *rows(axes_equal_the_dense_table, LAYOUTS),
    *rows(nan_stays_where_it_is, SCOPES, LAYOUTS),
    *rows(sums_take_nothing_from_beyond_the_last_row, ("rms", "layer"), SCOPES),
    *rows(one_gradient_alone, WANTED),
    *rows(gradient_of_one_output),
    *rows(scope_belongs_to_the_norm),
    *rows(zero_size, EMPTY),
    *rows(offsets_beyond_32_bits, [torch.bfloat16], marks=pytest.mark.big),
]
