"""The laws of patch beside the contract on its samples, for the tests of every compiled backend.

A law takes the backend and the device of its tensors first.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import assume, strategies as st
from laws import rows
from torch.utils._pytree import tree_map

from fastdit import ops, packing
from fastdit.testing import close, contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

EMBED, MOVE = samples("patch_embed3d"), samples("unpatchify3d")
# of a line inside a patch: a pair, three values, one; K = 16, 12, 3, 8
PATCHES = (((1, 2, 2), 4), ((2, 1, 3), 2), ((1, 1, 1), 3), ((2, 4, 1), 1))
EMPTY = (
    ((0, 4, 1, 4, 4), 8), ((2, 4, 0, 4, 4), 8), ((2, 4, 1, 4, 0), 8), ((2, 0, 1, 4, 4), 8), ((1, 4, 1, 4, 4), 0),
)  # fmt: skip
# an order is four strides: those where each letter stands first and last, the other ones for test-full
ORDERS = [
    pytest.param(order, marks=() if order in ("thwc", "cthw", "hwct", "wcth") else pytest.mark.full)
    for order in map("".join, itertools.permutations("cthw"))
]
WANTED = ("x", "weight", "bias", "pos", "weight bias", "x pos")


def grads(backend, device, op, args, kwargs, wanted, upstream=None):
    """Gradients of the tensors in `wanted`, under a cotangent that is the same for every backend."""
    leaves = [t.detach().requires_grad_() for t in wanted]
    swap = {id(t): leaf for t, leaf in zip(wanted, leaves, strict=True)}
    args, kwargs = tree_map(lambda t: swap.get(id(t), t), (args, kwargs))
    out = close.flat(op(*args, **kwargs, backend=backend))
    given = [Maker(o.dtype, device, seed=3 + i).randn(*o.shape) for i, o in enumerate(out)]
    return torch.autograd.grad(out, leaves, [upstream(g) if upstream else g for g in given])


def _moved_back(backend, device, tokens, call, upstream=None) -> None:
    with poisoned():
        (actual,) = grads(backend, device, ops.unpatchify3d, (tokens,), call, [tokens], upstream)
    (expected,) = grads("reference", device, ops.unpatchify3d, (tokens,), call, [tokens], upstream)
    close.assert_bitwise(actual, expected)


def gradient_of_a_move_is_a_move(backend, device, sample: Sample, dtype) -> None:
    (tokens,), kwargs = sample.make(Maker(dtype, device))
    ups: list[Callable | None] = [None]
    if not isinstance(kwargs["grid"], list):  # gradients arrive in the layout of what follows
        ups += [lambda g: g.contiguous(memory_format=torch.channels_last_3d), lambda g: g[:1].expand_as(g)]
    for up in ups:
        _moved_back(backend, device, tokens, kwargs, up)


def every_size_in_order(backend, device, order: str, grid=(2, 3, 5), dtype=torch.bfloat16) -> None:
    for patch, C in PATCHES:
        tokens = Maker(dtype, device).randn(2, math.prod(grid), C * math.prod(patch))
        call: dict[str, Any] = dict(grid=grid, patch=patch, channels=C, order=order)
        with poisoned():
            actual = ops.unpatchify3d(tokens, **call, backend=backend)
        close.assert_bitwise(actual, ops.unpatchify3d(tokens, **call, backend="reference"))
        _moved_back(backend, device, tokens, call)


def packed_equals_one_by_one(backend, device, dtype, rest=(1, 2, 33, 4, 5)) -> None:
    """Six videos, an empty one among them, and `rest` of one line: more than a launch takes."""
    m = Maker(dtype, device)
    grids = [(1, 3, 7), (2, 5, 6), (1, 1, 1), (1, 0, 4), (2, 2, 9), (3, 1, 2), *[(1, 1, n) for n in rest]]
    x = [m.randn(5, t, 2 * h, 2 * w) for t, h, w in grids]
    pos = [m.randn(t * h * w, 40) for t, h, w in grids]
    weight, bias = m.randn(40, 5, 1, 2, 2), m.randn(40)
    with poisoned():
        p = ops.patch_embed3d(x, weight, bias, pos=pos, backend=backend)
        tokens = m.randn(p.tokens.shape[0], 20)
        move: dict[str, Any] = dict(patch=(1, 2, 2), channels=5)
        videos = ops.unpatchify3d(tokens, grid=p.host_grids, **move, backend=backend)
    parts = zip(packing.unpack(p), x, pos, videos, tokens.split(p.lengths), grids, strict=True)
    for y, v, row, video, part, grid in parts:
        close.assert_bitwise(y, ops.patch_embed3d(v[None], weight, bias, pos=row, backend=backend)[0])
        close.assert_bitwise(video, ops.unpatchify3d(part[None], grid=grid, **move, backend=backend)[0])
    made = (x, weight, bias), dict(pos=torch.cat(pos))
    contract.backward(Sample("patch_embed3d", "many", lambda _: made), dtype, backend, device)


def count_of_k_steps(backend, device, dtype, C: int, patch, grid=(1, 3, 5)) -> None:
    m = Maker(dtype, device)
    x = m.randn(2, C, *(g * p for g, p in zip(grid, patch, strict=True)))
    pos = m.randn(math.prod(grid), 136)
    made = (x, m.randn(136, C, *patch) / math.sqrt(C * math.prod(patch)), m.randn(136)), dict(pos=pos)
    sample = Sample("patch_embed3d", "steps", lambda _: made)
    contract.forward(sample, dtype, backend, device)
    contract.backward(sample, dtype, backend, device)


def weight_gradient_in_splits(backend, device, dtype, kind, shape=(2, 3, 1, 10, 18)) -> None:
    """fp32 partials, then their sum; and the same bits again."""
    m = Maker(dtype, device)
    x, w, b = m.randn(*shape), m.randn(40, 3, 1, 2, 2, dtype=kind), m.randn(40, dtype=kind)
    contract.backward(Sample("patch_embed3d", "splits", lambda _: ((x, w, b), {})), dtype, backend, device)
    once, again = (grads(backend, device, ops.patch_embed3d, (x, w, b), {}, [w, b]) for _ in range(2))
    close.assert_all_bitwise(once, again)


def _small(device):
    m = Maker(torch.float32, device)
    return m, dict(x=m.randn(2, 3, 1, 4, 6), weight=m.randn(40, 3, 1, 2, 2), bias=m.randn(40))


def only_the_gradients_asked_for(backend, device, wanted: str, shared: bool) -> None:
    m, t = _small(device)
    t["pos"] = m.randn(6, 40) if shared else m.randn(2, 6, 40)
    some = [t[name] for name in wanted.split()]
    all_of = grads(backend, device, ops.patch_embed3d, (), t, list(t.values()))
    part = grads(backend, device, ops.patch_embed3d, (), t, some, lambda g: g.clone())
    for a, name in zip(part, wanted.split(), strict=True):
        close.assert_bitwise(a, all_of[list(t).index(name)])


def expanded_gradient(backend, device) -> None:
    """What y.sum().backward() sends: one number, seen everywhere."""
    m, t = _small(device)
    t["pos"] = m.randn(6, 40)

    def found(backend, t):
        one = lambda g: g.new_ones(()).expand_as(g)  # noqa: E731
        return grads(backend, device, ops.patch_embed3d, (), t, list(t.values()), one)

    truth = found("reference", {name: v.double() for name, v in t.items()})
    for a, e, b in zip(found(backend, t), truth, found("reference", t), strict=True):
        close.assert_close(a, e, b)


def empty(backend, device, sizes: tuple) -> None:
    shape, D = sizes
    m = Maker(torch.float32, device)
    x, w, b = m.randn(*shape), m.randn(D, shape[1], 1, 2, 2), m.randn(D)
    kwargs = {"pos": m.randn(shape[2] * (shape[3] // 2) * (shape[4] // 2), D)}

    def found(backend):
        y = ops.patch_embed3d(x, w, b, **kwargs, backend=backend)
        return y, *grads(backend, device, ops.patch_embed3d, (x, w, b), kwargs, [x, w, b, kwargs["pos"]])

    for a, e in zip(found(backend), found("reference"), strict=True):
        close.assert_close(a, e.double(), e)
        assert a.dtype == e.dtype
    tokens = m.randn(2, 0, 16)
    layout: dict[str, Any] = dict(grid=(1, 0, 4), patch=(1, 2, 2), channels=4)
    assert ops.unpatchify3d(tokens, **layout, backend=backend).shape == (2, 4, 1, 0, 8)
    assert grads(backend, device, ops.unpatchify3d, (tokens,), layout, [tokens])[0].shape == tokens.shape


def reads_nothing_outside_its_view(backend, device) -> None:
    """A window of a larger NaN-filled video, and a weight that is a slice of a NaN-filled one."""
    m = Maker(torch.bfloat16, device)
    big = torch.full((1, 7, 3, 10, 14), float("nan"), device=device, dtype=torch.bfloat16)
    wide = torch.full((44, 7, 1, 2, 2), float("nan"), device=device, dtype=torch.bfloat16)
    x, w = m.randn(1, 5, 1, 6, 10), m.randn(40, 5, 1, 2, 2)
    big[:, 1:6, 1:2, 2:8, 2:12], wide[2:42, 1:6] = x, w
    windows = big[:, 1:6, 1:2, 2:8, 2:12], wide[2:42, 1:6]
    close.assert_bitwise(ops.patch_embed3d(*windows, backend=backend), ops.patch_embed3d(x, w, backend=backend))
    inside, own = (grads(backend, device, ops.patch_embed3d, pair, {}, list(pair)) for pair in (windows, (x, w)))
    close.assert_all_bitwise(inside, own)


def a_bad_token_stays_alone(backend, device, dtype) -> None:
    """NaN in one patch reaches its own token and no other."""
    m = Maker(dtype, device)
    x, w = m.randn(1, 3, 1, 6, 10), m.randn(40, 3, 1, 2, 2)
    clean = ops.patch_embed3d(x, w, backend=backend)
    x[0, 1, 0, 2, 4] = float("nan")
    y = ops.patch_embed3d(x, w, backend=backend)
    bad = 1 * 5 + 2
    assert y[0, bad].isnan().all()
    others = [i for i in range(15) if i != bad]
    close.assert_bitwise(y[0, others], clean[0, others])


def drawn(data, device, widest: int) -> tuple[Sample, Sample, torch.dtype]:
    """An embedding and a move of any sizes, patches, memory orders, parameter dtypes and tables."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    size = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dtype, B, C, D = draw(*contract.DTYPES), size(1, 3), size(1, 9), size(1, 150)
    patch, grid = (size(1, 2), size(1, 3), size(1, 4)), (size(1, 2), size(1, 4), size(1, widest))
    assume(B * D * math.prod(grid) >= 64)  # of one value the baseline may be exact by luck: K = 8, fp32, 1.9 of what
    # that allows for a sum that is one unit in the last place off
    memory = data.draw(st.permutations(range(5)))
    m = Maker(dtype, device)
    kind = lambda: draw(dtype, torch.float32)  # noqa: E731
    x = m.randn(B, C, *(g * p for g, p in zip(grid, patch, strict=True)))
    x = x.permute(memory).contiguous().permute(sorted(range(5), key=memory.__getitem__))
    N, lead = math.prod(grid), draw(None, (), (1,), (B,))
    kwargs = {"bias": m.randn(D, dtype=kind())} if draw(True, False) else {}
    if lead is not None:
        kwargs["pos"] = m.randn(*lead, N, D + 3, dtype=kind())[..., 3:]
    embed = (x, m.randn(D, C, *patch, dtype=kind())), kwargs
    tokens = m.randn(B, N, C * math.prod(patch) + 1)[..., 1:]
    move = (tokens,), dict(grid=grid, patch=patch, channels=C, order="".join(data.draw(st.permutations("cthw"))))
    return (
        Sample("patch_embed3d", "fuzz", lambda _: embed), Sample("unpatchify3d", "fuzz", lambda _: move, moves=True),
        dtype,
    )  # fmt: skip


def fuzz(backend, device, data) -> None:
    """Both passes, in poisoned memory."""
    embed, move, dtype = drawn(data, device, 12)
    contract.forward(embed, dtype, backend, device)
    contract.backward(embed, dtype, backend, device)
    contract.forward(move, dtype, backend, device)
    (tokens,), layout = move.make(Maker(dtype, device))
    _moved_back(backend, device, tokens, layout)


def offsets_beyond_32_bits(backend, dtype=torch.bfloat16) -> None:
    """Channels, weight rows, table rows and tokens beyond 2^31 elements, both passes: reserved memory of the CPU,
    touched only where the values are."""
    m = Maker(dtype)

    def far(t, dim, step=2**31):
        strides = [step if i == dim else s for i, s in enumerate(t.stride())]
        wide = torch.empty((t.shape[dim] - 1) * step + t.numel(), dtype=t.dtype).as_strided(t.shape, strides)
        return wide.copy_(t)

    def embed(*args, **kwargs):
        return ops.patch_embed3d(*args, **kwargs, backend=backend)

    x, w, pos = m.randn(1, 3, 1, 4, 8), m.randn(40, 3, 1, 2, 2), m.randn(8, 40)
    expected = embed(x, w, pos=pos)
    close.assert_bitwise(embed(far(x, 1), w, pos=pos), expected)
    close.assert_bitwise(embed(x, far(w, 1), pos=pos), expected)
    close.assert_bitwise(embed(x, w, pos=far(pos, 0, 2**29)), expected)
    base = grads(backend, "cpu", ops.patch_embed3d, (x, w), {}, [x, w])
    for pair in ((far(x, 1), w), (x, far(w, 1))):
        close.assert_all_bitwise(grads(backend, "cpu", ops.patch_embed3d, pair, {}, list(pair)), base)
    tokens = m.randn(3, 8, 16)
    layout: dict[str, Any] = dict(grid=(1, 2, 4), patch=(1, 2, 2), channels=4, backend=backend)
    close.assert_bitwise(ops.unpatchify3d(far(tokens, 0), **layout), ops.unpatchify3d(tokens, **layout))


EVERYWHERE = [
    *rows(only_the_gradients_asked_for, WANTED, (True, False)),
    *rows(expanded_gradient),
    *rows(empty, EMPTY),
    *rows(reads_nothing_outside_its_view),
]
