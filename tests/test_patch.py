"""patch: the laws that are its own, and every check of its input."""

import itertools
import math

import patch_laws as laws
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._pytree import tree_map

import fastdit
from fastdit import ops, packing
from fastdit.testing import close, contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker

each_sample = pytest.mark.parametrize("sample", laws.EMBED + laws.MOVE, ids=str)
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])


@each_sample
def test_forward_fp64(sample, isa):
    # fp64 has no wider truth: on small integers every sum is exact, in any order
    args, kwargs = tree_map(
        lambda t: t.mul(4).round() if isinstance(t, torch.Tensor) else t, sample.make(Maker(torch.float64))
    )
    with torch.no_grad(), poisoned():
        actual = close.flat(getattr(ops, sample.op)(*args, **kwargs, backend="cpu"))
    for a, b in zip(actual, close.flat(getattr(ops, sample.op)(*args, **kwargs, backend="reference")), strict=True):
        close.assert_bitwise(a, b)


@each_dtype
@pytest.mark.parametrize("pos", [False, True])
def test_large_output_is_streamed(dtype, pos):
    # more than 8 MiB of y takes the stores that bypass the caches; 1184 is no multiple of a panel of outputs
    m = Maker(dtype)
    rows, D, rest = 3600, 1184, 90
    x, w, b = m.randn(1, 4, 1, 2 * 45, 2 * 80), m.randn(D, 4, 1, 2, 2), m.randn(D)
    p = m.randn(rows, D) if pos else None
    y = ops.patch_embed3d(x, w, b, pos=p, backend="cpu")
    assert y.nbytes > 8 << 20
    part = ops.patch_embed3d(x, w[rest:], b[rest:], pos=None if p is None else p[:, rest:], backend="cpu")
    close.assert_bitwise(y[..., rest:], part)
    close.assert_close(
        y,
        ops.patch_embed3d(*(t.double() for t in (x, w, b)), pos=p if p is None else p.double(), backend="reference"),
        ops.patch_embed3d(x, w, b, pos=p, backend="reference"),
    )


@each_dtype
def test_packed_equals_one_by_one(dtype, isa):
    m = Maker(dtype)
    grids = [(1, 3, 7), (4, 5, 6), (1, 1, 1), (2, 8, 9), (1, 0, 4), (3, 1, 2)]
    x = [m.randn(16, t, 2 * h, 2 * w) for t, h, w in grids]
    pos = [m.randn(t * h * w, 96) for t, h, w in grids]
    weight, bias = m.randn(96, 16, 1, 2, 2), m.randn(96)
    p = ops.patch_embed3d(x, weight, bias, pos=pos, backend="cpu")
    assert p.host_grids == tuple(grids) and p.max_seqlen == 144 and p.grids.tolist() == [list(g) for g in grids]
    for one, v, row in zip(packing.unpack(p), x, pos, strict=True):
        close.assert_bitwise(one, ops.patch_embed3d(v[None], weight, bias, pos=row, backend="cpu")[0])
    tokens = m.randn(p.tokens.shape[0], 64)
    videos = ops.unpatchify3d(tokens, grid=p.host_grids, patch=(1, 2, 2), channels=16, backend="cpu")
    for video, part, g in zip(videos, tokens.split(p.lengths), grids, strict=True):
        close.assert_bitwise(video, ops.unpatchify3d(part[None], grid=g, patch=(1, 2, 2), channels=16)[0])


@pytest.mark.parametrize("order", map("".join, itertools.permutations("cthw")))
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 3, 4), (1, 1, 1), (2, 1, 8)])
def test_every_order(order, patch, isa):
    for dtype, C, grid in itertools.product((torch.bfloat16, torch.float32, torch.float64), (1, 3, 16), [(2, 3, 9)]):
        tokens = Maker(dtype).randn(2, math.prod(grid), C * math.prod(patch))
        call = dict(grid=grid, patch=patch, channels=C, order=order)
        close.assert_bitwise(
            ops.unpatchify3d(tokens, **call, backend="cpu"), ops.unpatchify3d(tokens, **call, backend="reference")
        )


def test_round_trip():
    # the identity as the embedding: patches come out in the order c, t, h, w, and go back where they were
    m = Maker()
    x = m.randn(2, 3, 4, 6, 8)
    weight = torch.eye(24).view(24, 3, 2, 2, 2)
    tokens = ops.patch_embed3d(x, weight)
    back = ops.unpatchify3d(tokens, grid=(2, 3, 4), patch=(2, 2, 2), channels=3, order="cthw")
    close.assert_bitwise(back, x)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape, D", laws.EMPTY)
def test_zero_size_embed(shape, D, backend):
    x = torch.randn(shape, requires_grad=True)
    weight, bias = torch.randn(D, shape[1], 1, 2, 2, requires_grad=True), torch.randn(D, requires_grad=True)
    y = ops.patch_embed3d(x, weight, bias, backend=backend)
    assert y.shape == (shape[0], shape[2] * (shape[3] // 2) * (shape[4] // 2), D)
    if shape[1] == 0:
        close.assert_bitwise(y, bias.expand(2, 4, 8))
    y.sum().backward()
    assert x.grad.shape == shape and weight.grad.shape == weight.shape and bias.grad.shape == bias.shape


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_zero_size_unpatchify(backend):
    call = dict(patch=(1, 2, 2), channels=2, backend=backend)
    assert ops.unpatchify3d(torch.randn(0, 6, 8), grid=(1, 2, 3), **call).shape == (0, 2, 1, 4, 6)
    tokens = torch.randn(2, 0, 8, requires_grad=True)
    y = ops.unpatchify3d(tokens, grid=(3, 0, 4), **call)
    assert y.shape == (2, 2, 3, 0, 8)
    y.sum().backward()
    assert tokens.grad.shape == tokens.shape
    empty, one = ops.unpatchify3d(torch.randn(1, 8), grid=[(0, 1, 1), (1, 1, 1)], **call)
    assert empty.shape == (2, 0, 2, 2) and one.shape == (2, 1, 2, 2)
    p = ops.patch_embed3d([torch.randn(4, 0, 2, 2)], torch.randn(8, 4, 1, 2, 2), backend=backend)
    assert p.tokens.shape == (0, 8) and p.cu_seqlens.tolist() == [0, 0] and p.max_seqlen == 0


def test_never_returns_its_input():
    tokens = torch.randn(1, 6, 4)
    for backend in ("cpu", "reference"):
        y = ops.unpatchify3d(tokens, grid=(1, 2, 3), patch=(1, 1, 1), channels=4, order="cthw", backend=backend)
        assert y.is_contiguous() and y.untyped_storage().data_ptr() != tokens.untyped_storage().data_ptr()
        one = torch.randn(1, 1, 1, 1, 5)
        y = ops.unpatchify3d(one.view(1, 5, 1), grid=(1, 1, 5), patch=(1, 1, 1), channels=1, backend=backend)
        assert y.data_ptr() != one.data_ptr()


def test_gradients_own_their_memory():
    # a gradient that shares the incoming one's memory would change when an optimiser scales it in place
    w, tokens = torch.randn(4, 1, 1, 1, 1), torch.randn(1, 6, 4, requires_grad=True)
    pos = torch.randn(6, 4, requires_grad=True)
    grad = torch.randn(1, 6, 4)
    given = torch.autograd.grad(ops.patch_embed3d(torch.randn(1, 1, 1, 2, 3), w, pos=pos, backend="cpu"), pos, grad)[0]
    assert given.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr()
    grad = torch.randn(1, 4, 1, 2, 3)
    y = ops.unpatchify3d(tokens, grid=(1, 2, 3), patch=(1, 1, 1), channels=4, backend="cpu")
    given = torch.autograd.grad(y, tokens, grad)[0]
    assert given.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr() and given.is_contiguous()


@each_dtype
def test_a_bad_token_stays_alone(dtype, isa):
    laws.a_bad_token_stays_alone("cpu", "cpu", dtype)


def test_reads_nothing_outside_its_view():
    laws.reads_nothing_outside_its_view("cpu", "cpu")


def test_double_backward_raises():
    x = torch.randn(1, 4, 1, 4, 4, requires_grad=True)
    weight = torch.randn(8, 4, 1, 2, 2, requires_grad=True)
    (g,) = torch.autograd.grad(ops.patch_embed3d(x, weight, backend="cpu").pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        torch.autograd.grad(g.sum(), weight)


def test_explain():
    x, w = torch.randn(1, 4, 1, 4, 4), torch.randn(8, 4, 1, 2, 2)
    assert "cpu         chosen" in fastdit.explain("patch_embed3d", x, w)
    assert "cpu         chosen" in fastdit.explain("patch_embed3d", [x[0]], w)
    tokens = torch.randn(1, 4, 16)
    assert "cpu         chosen" in fastdit.explain("unpatchify3d", tokens, grid=(1, 2, 2), patch=(1, 2, 2), channels=4)
    with pytest.raises(fastdit.NoBackend, match="needs a CPU tensor; got meta"):
        ops.patch_embed3d(x.to("meta"), w.to("meta"), backend="cpu")
    assert ops.patch_embed3d(x.to("meta"), w.to("meta")).shape == (1, 4, 8)


X, W, BIAS = torch.randn(2, 4, 1, 4, 6), torch.randn(8, 4, 1, 2, 2), torch.randn(8)
LIST = [X[0], X[1]]
BAD_EMBED = {
    "not-a-tensor": (dict(x="video"), TypeError, "must be a tensor"),
    "integer": (dict(x=X.int()), TypeError, "int32"),
    "image": (dict(x=X[:, :, 0]), ValueError, r"wrong rank.*unsqueeze\(2\)"),
    "rank": (dict(x=X[None]), ValueError, "wrong rank"),
    "channels": (dict(x=X[:, :3]), ValueError, "differ in channels"),
    "T": (dict(weight=torch.randn(8, 4, 2, 2, 2)), ValueError, "T of x is no multiple"),
    "H": (dict(x=X[..., :3, :]), ValueError, "H of x is no multiple"),
    "W": (dict(x=X[..., :5]), ValueError, "W of x is no multiple"),
    "weight-2d": (dict(weight=W[:, :, 0]), ValueError, r"nn.Conv3d's.*unsqueeze\(2\)"),
    "weight-patch": (dict(weight=W[..., :0]), ValueError, "at least one pixel"),
    "weight-dtype": (dict(weight=W.bfloat16()), TypeError, "weight must have x's dtype"),
    "weight-integer": (dict(weight=W.int()), TypeError, "int32"),
    "weight-device": (dict(weight=W.to("meta")), ValueError, "another device"),
    "bias-shape": (dict(bias=BIAS[:7]), ValueError, r"bias must be \(D,\)"),
    "bias-dtype": (dict(bias=BIAS.half()), TypeError, "bias must have x's dtype"),
    "bias-device": (dict(bias=BIAS.to("meta")), ValueError, "another device"),
    "pos-N": (dict(pos=torch.randn(5, 8)), ValueError, "pos must be"),
    "pos-D": (dict(pos=torch.randn(6, 7)), ValueError, "pos must be"),
    "pos-B": (dict(pos=torch.randn(3, 6, 8)), ValueError, "pos must be"),
    "pos-dtype": (dict(pos=torch.randn(6, 8).double()), TypeError, "pos must have x's dtype"),
    "pos-strided": (dict(pos=torch.randn(8, 6).t()), ValueError, "last dim of pos must be contiguous"),
    "pos-device": (dict(pos=torch.randn(6, 8, device="meta")), ValueError, "another device"),
    "pos-list": (dict(pos=[torch.randn(6, 8)]), TypeError, "pos must be a tensor"),
    "list-empty": (dict(x=[]), ValueError, "empty list"),
    "list-rank": (dict(x=[X]), ValueError, r"x\[0\] has the wrong rank"),
    "list-item": (dict(x=[X[0], None]), TypeError, r"x\[1\] must be a tensor"),
    "list-dtype": (dict(x=[X[0], X[1].half()]), TypeError, "differ in dtype"),
    "list-device": (dict(x=[X[0], X[1].to("meta")]), ValueError, "another device"),
    "list-channels": (dict(x=[X[0], X[1, :3]]), ValueError, r"x\[1\] and weight differ in channels"),
    "list-size": (dict(x=[X[0], X[1, ..., :5]]), ValueError, r"W of x\[1\] is no multiple"),
    "list-pos-count": (dict(x=LIST, pos=[torch.randn(6, 8)]), ValueError, "one pos per video"),
    "list-pos-item": (dict(x=LIST, pos=[torch.randn(6, 8), torch.randn(5, 8)]), ValueError, "for each video"),
    "list-pos-packed": (dict(x=LIST, pos=torch.randn(6, 8)), ValueError, r"packed \(sum N, D\)"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD_EMBED, ids=str)
def test_bad_input_embed(case, backend):
    kwargs, error, match = BAD_EMBED[case]
    with pytest.raises(error, match=match) as caught:
        ops.patch_embed3d(**{"x": X, "weight": W, "bias": BIAS, **kwargs}, backend=backend)
    assert str(caught.value).startswith("patch_embed3d: ") and "got" in str(caught.value)


TOKENS = torch.randn(2, 6, 16)
GOOD = dict(tokens=TOKENS, grid=(1, 2, 3), patch=(1, 2, 2), channels=4)
BAD_UNPATCHIFY = {
    "integer": (dict(tokens=TOKENS.int()), TypeError, "int32"),
    "rank": (dict(tokens=TOKENS[0]), ValueError, "wrong rank for the grid"),
    "packed-rank": (dict(grid=[(1, 2, 3)]), ValueError, "wrong rank for the grid"),
    "order-letter": (dict(order="thwd"), ValueError, "no permutation"),
    "order-twice": (dict(order="thww"), ValueError, "no permutation"),
    "order-short": (dict(order="thw"), ValueError, "no permutation"),
    "order-type": (dict(order=("t", "h", "w", "c")), ValueError, "no permutation"),
    "patch-2d": (dict(patch=(2, 2)), ValueError, "three sizes"),
    "patch-zero": (dict(patch=(0, 2, 2)), ValueError, "three sizes"),
    "channels": (dict(channels=0), ValueError, "channels must be positive"),
    "K": (dict(channels=3), ValueError, "got 16, expected 12"),
    "N": (dict(grid=(1, 2, 4)), ValueError, "got 6 tokens"),
    "pixels": (dict(grid=(1, 4, 6)), ValueError, "not pixels"),
    "grid-2d": (dict(grid=(2, 3)), ValueError, "grid must be"),
    "grid-negative": (dict(grid=(1, -2, -3)), ValueError, "grid must be"),
    "grid-empty": (dict(tokens=TOKENS[0], grid=[]), ValueError, "grid must be"),
    "grid-list": (dict(tokens=TOKENS[0], grid=[(1, 2, 3), (1, 1)]), ValueError, "grid must be"),
    "list-N": (dict(tokens=TOKENS[0], grid=[(1, 2, 3), (1, 1, 1)]), ValueError, "got 6 tokens"),
    "strided": (dict(tokens=torch.randn(2, 16, 6).transpose(1, 2)), ValueError, "must be contiguous"),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", BAD_UNPATCHIFY, ids=str)
def test_bad_input_unpatchify(case, backend):
    kwargs, error, match = BAD_UNPATCHIFY[case]
    with pytest.raises(error, match=match) as caught:
        ops.unpatchify3d(**{**GOOD, **kwargs}, backend=backend)
    assert str(caught.value).startswith("unpatchify3d: ") and "got" in str(caught.value)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data):
    """Forward, in poisoned memory."""
    embed, move, dtype = laws.drawn(data, "cpu", 20)
    contract.forward(embed, dtype, "cpu")
    contract.forward(move, dtype, "cpu")


@pytest.mark.big
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_offsets_beyond_32_bits(dtype):
    laws.offsets_beyond_32_bits("cpu", dtype)
