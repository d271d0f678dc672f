"""patch on the Triton kernels: what the contract on the samples (test_triton.py) does not reach."""

import contextlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._pytree import tree_map

pytest.importorskip("triton")

from fastdit import ops, packing
from fastdit.backends.triton import _config, _launch
from fastdit.backends.triton._config import CANDIDATES, Config, forced
from fastdit.testing import close, contract
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
EMBED, MOVE = samples("patch_embed3d"), samples("unpatchify3d")
each_dtype = pytest.mark.parametrize("dtype", contract.DTYPES, ids=lambda d: str(d)[6:])


@contextlib.contextmanager
def card(arch):
    _launch.pretend(arch)
    _config.forget()
    try:
        yield
    finally:
        _launch.pretend(None)
        _config.forget()


def grads(op, args, kwargs, wanted, upstream=None, backend="triton"):
    """Gradients of the tensors in `wanted`, under a cotangent that is the same for every backend."""
    leaves = [t.detach().requires_grad_() for t in wanted]
    swap = {id(t): leaf for t, leaf in zip(wanted, leaves, strict=True)}
    args, kwargs = tree_map(lambda t: swap.get(id(t), t), (args, kwargs))
    out = op(*args, **kwargs, backend=backend)
    out = close.flat(out)
    given_ = [Maker(o.dtype, DEVICE, seed=3 + i).randn(*o.shape) for i, o in enumerate(out)]
    return torch.autograd.grad(out, leaves, [upstream(g) if upstream else g for g in given_])


@each_dtype
@pytest.mark.parametrize("sample", MOVE, ids=str)
def test_gradient_of_a_move_is_a_move(sample, dtype):
    (tokens,), kwargs = sample.make(Maker(dtype, DEVICE))
    ups = [None]
    if not isinstance(kwargs["grid"], list):  # gradients arrive in the layout of what follows
        ups += [lambda g: g.contiguous(memory_format=torch.channels_last_3d), lambda g: g[:1].expand_as(g)]
    for up in ups:
        with poisoned():
            (actual,) = grads(ops.unpatchify3d, (tokens,), kwargs, [tokens], up)
        (expected,) = grads(ops.unpatchify3d, (tokens,), kwargs, [tokens], up, "reference")
        close.assert_bitwise(actual, expected)


@pytest.mark.parametrize("order", map("".join, itertools.permutations("cthw")))
def test_every_order(order):
    for patch, C in (((1, 2, 2), 4), ((2, 1, 3), 2), ((1, 1, 1), 3), ((2, 4, 1), 1)):
        tokens = Maker(torch.bfloat16, DEVICE).randn(2, 2 * 3 * 5, C * math.prod(patch))
        call = dict(grid=(2, 3, 5), patch=patch, channels=C, order=order)
        with poisoned():
            actual = ops.unpatchify3d(tokens, **call, backend="triton")
        close.assert_bitwise(actual, ops.unpatchify3d(tokens, **call, backend="reference"))
        close.assert_bitwise(
            *(grads(ops.unpatchify3d, (tokens,), call, [tokens], backend=b)[0] for b in ("triton", "reference"))
        )


@each_dtype
def test_packed_equals_one_by_one(dtype):
    """Eleven videos, so two launches; an empty one among them; tiles so small that videos have several."""
    m = Maker(dtype, DEVICE)
    grids = [(1, 3, 7), (2, 5, 6), (1, 1, 1), (1, 0, 4), (2, 2, 9), (3, 1, 2), *[(1, 1, n) for n in (1, 2, 33, 4, 5)]]
    x = [m.randn(5, t, 2 * h, 2 * w) for t, h, w in grids]
    pos = [m.randn(t * h * w, 40) for t, h, w in grids]
    weight, bias = m.randn(40, 5, 1, 2, 2), m.randn(40)
    small = Config((32, 32), 4, 1)
    with contextlib.ExitStack() as stack:
        for name in ("patch_embed", "patch_embed_dx", "patch_embed_dw"):
            stack.enter_context(forced(name, small))
        with poisoned():
            p = ops.patch_embed3d(x, weight, bias, pos=pos, backend="triton")
            tokens = m.randn(p.tokens.shape[0], 20)
            move = dict(patch=(1, 2, 2), channels=5)
            videos = ops.unpatchify3d(tokens, grid=p.host_grids, **move, backend="triton")
        parts = zip(packing.unpack(p), x, pos, videos, tokens.split(p.lengths), grids, strict=True)
        for y, v, row, video, part, grid in parts:
            close.assert_bitwise(y, ops.patch_embed3d(v[None], weight, bias, pos=row, backend="triton")[0])
            close.assert_bitwise(video, ops.unpatchify3d(part[None], grid=grid, **move, backend="triton")[0])
        made = (x, weight, bias), dict(pos=torch.cat(pos))
        contract.backward(Sample("patch_embed3d", "eleven", lambda _: made), dtype, "triton", DEVICE)


@pytest.mark.parametrize("arch", [80, 90, 100, 120, 0])
@pytest.mark.parametrize("C, patch", [(16, (1, 1, 1)), (5, (1, 4, 4)), (40, (1, 2, 2)), (33, (2, 2, 3))])
def test_every_count_of_k_steps(C, patch, arch):
    """K = 16, 80, 160 and 396: one, two, three and seven steps of 64; five cards."""
    m = Maker(torch.bfloat16, DEVICE)
    x = m.randn(2, C, *(g * p for g, p in zip((1, 3, 5), patch, strict=True)))
    made = (x, m.randn(136, C, *patch) / math.sqrt(C * math.prod(patch)), m.randn(136)), dict(pos=m.randn(15, 136))
    sample = Sample("patch_embed3d", "steps", lambda _: made)
    with card(arch):
        contract.forward(sample, torch.bfloat16, "triton", DEVICE)
        contract.backward(sample, torch.bfloat16, "triton", DEVICE)


@pytest.mark.parametrize("name", ["patch_embed", "patch_embed_dx", "patch_embed_dw", "unpatchify"])
def test_every_candidate(name):
    m = Maker(torch.float16, DEVICE)
    x, w, b = m.randn(1, 3, 1, 6, 20), m.randn(72, 3, 1, 2, 2), m.randn(72)
    tokens, layout = m.randn(1, 30, 16), dict(grid=(1, 3, 10), patch=(1, 2, 2), channels=4)
    for config in CANDIDATES[name]:
        with forced(name, config):
            if name == "unpatchify":
                actual = ops.unpatchify3d(tokens, **layout, backend="triton")
                close.assert_bitwise(actual, ops.unpatchify3d(tokens, **layout, backend="reference"))
                continue
            sample = Sample("patch_embed3d", "candidate", lambda _: ((x, w, b), {}))
            (contract.forward if name == "patch_embed" else contract.backward)(sample, torch.float16, "triton", DEVICE)


@each_dtype
@pytest.mark.parametrize("kind", [None, torch.float32], ids=["own", "fp32"])
def test_weight_gradient_in_splits(kind, dtype):
    """Three and more splits: fp32 partials, then their sum; and the same bits again."""
    m = Maker(dtype, DEVICE)
    x, w, b = m.randn(2, 3, 1, 10, 18), m.randn(40, 3, 1, 2, 2, dtype=kind), m.randn(40, dtype=kind)
    sample = Sample("patch_embed3d", "splits", lambda _: ((x, w, b), {}))
    with forced("patch_embed_dw", Config((16, 64), 4, 1)):
        contract.backward(sample, dtype, "triton", DEVICE)
        once, again = (grads(ops.patch_embed3d, (x, w, b), {}, [w, b]) for _ in range(2))
    for a, c in zip(once, again, strict=True):
        close.assert_bitwise(a, c)


@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "pos", "weight bias", "x pos"])
@pytest.mark.parametrize("shared", [True, False])
def test_only_the_gradients_asked_for(wanted, shared):
    m = Maker(torch.float32, DEVICE)
    t = dict(x=m.randn(2, 3, 1, 4, 6), weight=m.randn(40, 3, 1, 2, 2), bias=m.randn(40))
    t["pos"] = m.randn(6, 40) if shared else m.randn(2, 6, 40)
    some = [t[name] for name in wanted.split()]
    all_of = grads(ops.patch_embed3d, (), t, list(t.values()))
    part = grads(ops.patch_embed3d, (), t, some, lambda g: g.clone())
    for a, name in zip(part, wanted.split(), strict=True):
        close.assert_bitwise(a, all_of[list(t).index(name)])


def test_expanded_gradient():
    # what y.sum().backward() sends: one number, seen everywhere
    m = Maker(torch.float32, DEVICE)
    t = dict(x=m.randn(2, 3, 1, 4, 6), weight=m.randn(40, 3, 1, 2, 2), bias=m.randn(40), pos=m.randn(6, 40))
    one = lambda g: g.new_ones(()).expand_as(g)  # noqa: E731
    actual = grads(ops.patch_embed3d, (), t, list(t.values()), one)
    base = grads(ops.patch_embed3d, (), t, list(t.values()), one, "reference")
    wide = {name: v.double() for name, v in t.items()}
    truth = grads(ops.patch_embed3d, (), wide, list(wide.values()), one, "reference")
    for a, e, b in zip(actual, truth, base, strict=True):
        close.assert_close(a, e, b)


@pytest.mark.parametrize(
    "shape, D",
    [((0, 4, 1, 4, 4), 8), ((2, 4, 0, 4, 4), 8), ((2, 4, 1, 4, 0), 8), ((2, 0, 1, 4, 4), 8), ((1, 4, 1, 4, 4), 0)],
)
def test_empty(shape, D):
    m = Maker(torch.float32, DEVICE)
    x, w, b = m.randn(*shape), m.randn(D, shape[1], 1, 2, 2), m.randn(D)
    N = shape[2] * (shape[3] // 2) * (shape[4] // 2)
    kwargs = {"pos": m.randn(N, D)}
    for backend in ("triton", "reference"):
        y = ops.patch_embed3d(x, w, b, **kwargs, backend=backend)
        found = (y, *grads(ops.patch_embed3d, (x, w, b), kwargs, [x, w, b, kwargs["pos"]], backend=backend))
        if backend == "triton":
            actual = found
    for a, e in zip(actual, found, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype
        torch.testing.assert_close(a, e)
    tokens = m.randn(2, 0, 16)
    layout = dict(grid=(1, 0, 4), patch=(1, 2, 2), channels=4)
    assert ops.unpatchify3d(tokens, **layout, backend="triton").shape == (2, 4, 1, 0, 8)
    assert grads(ops.unpatchify3d, (tokens,), layout, [tokens])[0].shape == tokens.shape


def test_reads_nothing_outside_its_view():
    # a window of a larger NaN-filled video, and a weight that is a slice of a NaN-filled one
    m = Maker(torch.bfloat16, DEVICE)
    big = torch.full((1, 7, 3, 10, 14), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    wide = torch.full((44, 7, 1, 2, 2), float("nan"), device=DEVICE, dtype=torch.bfloat16)
    x, w = m.randn(1, 5, 1, 6, 10), m.randn(40, 5, 1, 2, 2)
    big[:, 1:6, 1:2, 2:8, 2:12], wide[2:42, 1:6] = x, w
    windows = big[:, 1:6, 1:2, 2:8, 2:12], wide[2:42, 1:6]
    y = ops.patch_embed3d(*windows, backend="triton")
    close.assert_bitwise(y, ops.patch_embed3d(x, w, backend="triton"))
    for a, b in zip(
        grads(ops.patch_embed3d, windows, {}, list(windows)), grads(ops.patch_embed3d, (x, w), {}, [x, w]), strict=True
    ):
        close.assert_bitwise(a, b)


def test_a_bad_token_stays_alone():
    # NaN in one patch reaches its own token and the weight's gradient, and no other token
    m = Maker(torch.float32, DEVICE)
    x, w = m.randn(1, 3, 1, 6, 10), m.randn(40, 3, 1, 2, 2)
    clean = ops.patch_embed3d(x, w, backend="triton")
    x[0, 1, 0, 2, 4] = float("nan")
    y = ops.patch_embed3d(x, w, backend="triton")
    bad = 1 * 5 + 2
    assert y[0, bad].isnan().all()
    close.assert_bitwise(torch.cat([y[0, :bad], y[0, bad + 1 :]]), torch.cat([clean[0, :bad], clean[0, bad + 1 :]]))


@pytest.mark.parametrize(
    "sample", [s for s in EMBED + MOVE if s.id in ("image-pos", "list-pos", "wan", "list")], ids=str
)
def test_fast_path_equals_torch_ops(sample):
    if DEVICE == "cpu":
        contract.paths_equal(sample, torch.bfloat16, "triton")
        assert contract.opcheck(sample, "triton") == 2


@settings(max_examples=25, deadline=None, derandomize=True)
@given(data=st.data())
def test_fuzz(data):
    """Any sizes, patches, memory orders, parameter dtypes and tables, both passes, in poisoned memory."""
    draw = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    size = lambda low, high: data.draw(st.integers(low, high))  # noqa: E731
    dtype, B, C, D = draw(*contract.DTYPES), size(1, 3), size(1, 9), size(1, 150)
    patch, grid = (size(1, 2), size(1, 3), size(1, 4)), (size(1, 2), size(1, 4), size(1, 12))
    memory = data.draw(st.permutations(range(5)))
    m = Maker(dtype, DEVICE)
    kind = lambda: draw(dtype, torch.float32)  # noqa: E731
    x = m.randn(B, C, *(g * p for g, p in zip(grid, patch, strict=True)))
    x = x.permute(memory).contiguous().permute(sorted(range(5), key=memory.__getitem__))
    N, lead = math.prod(grid), draw(None, (), (1,), (B,))
    kwargs = {"bias": m.randn(D, dtype=kind())} if draw(True, False) else {}
    if lead is not None:
        kwargs["pos"] = m.randn(*lead, N, D + 3, dtype=kind())[..., 3:]
    made = (x, m.randn(D, C, *patch, dtype=kind())), kwargs
    sample = Sample("patch_embed3d", "fuzz", lambda _: made)
    contract.forward(sample, dtype, "triton", DEVICE)
    contract.backward(sample, dtype, "triton", DEVICE)
    tokens = m.randn(B, N, C * math.prod(patch) + 1)[..., 1:]
    layout = dict(grid=grid, patch=patch, channels=C, order="".join(data.draw(st.permutations("cthw"))))
    contract.forward(Sample("unpatchify3d", "fuzz", lambda _: ((tokens,), layout), moves=True), dtype, "triton", DEVICE)
    close.assert_bitwise(
        *(grads(ops.unpatchify3d, (tokens,), layout, [tokens], backend=b)[0] for b in ("triton", "reference"))
    )


@pytest.mark.big
@pytest.mark.skipif(DEVICE == "cuda", reason="reserved memory that nobody touches is the CPU's")
def test_offsets_beyond_32_bits():
    """Channels, weight rows, table rows and tokens beyond 2^31 elements, both passes: reserved memory, touched only
    where the values are."""
    m = Maker(torch.bfloat16)

    def far(t, dim, step=2**31):
        strides = [step if i == dim else s for i, s in enumerate(t.stride())]
        wide = torch.empty((t.shape[dim] - 1) * step + t.numel(), dtype=t.dtype).as_strided(t.shape, strides)
        return wide.copy_(t)

    x, w, pos = m.randn(1, 3, 1, 4, 8), m.randn(40, 3, 1, 2, 2), m.randn(8, 40)
    expected = ops.patch_embed3d(x, w, pos=pos, backend="triton")
    close.assert_bitwise(ops.patch_embed3d(far(x, 1), w, pos=pos, backend="triton"), expected)
    close.assert_bitwise(ops.patch_embed3d(x, far(w, 1), pos=pos, backend="triton"), expected)
    close.assert_bitwise(ops.patch_embed3d(x, w, pos=far(pos, 0, 2**29), backend="triton"), expected)
    base = grads(ops.patch_embed3d, (x, w), {}, [x, w])
    for pair in ((far(x, 1), w), (x, far(w, 1))):
        for a, b in zip(grads(ops.patch_embed3d, pair, {}, list(pair)), base, strict=True):
            close.assert_bitwise(a, b)
    tokens, layout = m.randn(3, 8, 16), dict(grid=(1, 2, 4), patch=(1, 2, 2), channels=4, backend="triton")
    close.assert_bitwise(ops.unpatchify3d(far(tokens, 0), **layout), ops.unpatchify3d(tokens, **layout))
