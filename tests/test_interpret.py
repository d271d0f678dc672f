"""The interpreter as mended by testing/interpret.py. Where an upgrade of Triton breaks a patch, or makes one needless,
a test here fails."""

import itertools
import math
import os

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.tools.tensor_descriptor import TensorDescriptor

from fastdit.testing import interpret, interpret_semantic as semantic
from fastdit.testing.interpret_dot import fp32_dot, round_tf32
from fastdit.testing.interpret_ops import round_bf16

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="kernels run on a GPU here")

SPECIAL = [0.0, -0.0, 1.0, -2.5, 3.3895e38, float("inf"), -float("inf"), float("nan"), 1e-40, -1e-45, 1.00390625]


@triton.jit
def arithmetic(X, Y, ADD, SUB, MUL, DIV, MIN, MAX, NEG, WHERE, LESS, EXP, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i)
    y = tl.load(Y + i)
    tl.store(ADD + i, x + y)
    tl.store(SUB + i, x - y)
    tl.store(MUL + i, x * y)
    tl.store(DIV + i, x / y)
    tl.store(MIN + i, tl.minimum(x, y))
    tl.store(MAX + i, tl.maximum(x, y))
    tl.store(NEG + i, -x)
    tl.store(WHERE + i, tl.where(x < y, x, y))
    tl.store(LESS + i, (x < y).to(x.dtype))
    tl.store(EXP + i, tl.exp(x.to(tl.float32)))


def results(x, y):
    outs = [torch.empty_like(x) for _ in range(10)]
    arithmetic[(1,)](x, y, *outs, x.numel())
    return outs


def pair(dtype):
    x = torch.randn(1024).to(dtype)
    y = torch.randn(1024).to(dtype)
    s = torch.tensor(SPECIAL).to(dtype)
    n = len(SPECIAL)
    x[: n * n], y[: n * n] = s.repeat_interleave(n), s.repeat(n)
    return x, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_arithmetic(dtype):
    x, y = pair(dtype)
    add, sub, mul, div, least, most, neg, where, less, exp = results(x, y)
    equal = dict(rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(add, x + y, **equal)
    torch.testing.assert_close(sub, x - y, **equal)
    torch.testing.assert_close(mul, x * y, **equal)
    torch.testing.assert_close(div, (x.float() / y.float()).to(dtype), **equal)
    torch.testing.assert_close(least, torch.fmin(x, y), **equal)
    torch.testing.assert_close(most, torch.fmax(x, y), **equal)
    torch.testing.assert_close(neg, -x, **equal)
    torch.testing.assert_close(where, torch.where(x < y, x, y), **equal)
    torch.testing.assert_close(less, (x < y).to(dtype), **equal)
    torch.testing.assert_close(
        exp, torch.exp(x.float()).to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=0, equal_nan=True
    )


def test_without_the_patch_bf16_is_wrong():
    x, y = torch.randn(1024).bfloat16(), torch.randn(1024).bfloat16()
    with interpret.plain():
        add, sub, mul, *_ = results(x, y)
    assert not torch.equal(mul, x * y) and not torch.equal(add, x + y) and not torch.equal(sub, x - y)
    assert torch.equal(results(x, y)[2], x * y)  # and the block leaves the patch as it was


@triton.jit
def cast(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(Y.dtype.element_ty))


@triton.jit
def truncate(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(tl.bfloat16, fp_downcast_rounding="rtz"))


@triton.jit
def bits(X, Y, Z, N: tl.constexpr):
    i = tl.arange(0, N)
    word = tl.load(X + i).to(tl.int16, bitcast=True)
    tl.store(Y + i, word)
    tl.store(Z + i, word.to(tl.bfloat16, bitcast=True))


def every_float(count=1 << 16):
    """fp32 numbers of every bf16 exponent and sign with low halves that round each way."""
    high = torch.arange(1 << 16, dtype=torch.int64)
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])[torch.arange(1 << 16) % 6]
    return ((high << 16) | low).to(torch.int32, copy=True).view(torch.float32)[:count]


@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.int32], ids=str)
def test_casts_round_to_nearest_even(source):
    x = every_float() if source.is_floating_point else torch.randint(-(2**30), 2**30, (1 << 16,), dtype=torch.int32)
    x = x.to(source)
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    cast[(1,)](x, y, x.numel())
    torch.testing.assert_close(y, x.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)
    back = torch.empty(x.shape)
    cast[(1,)](y, back, x.numel())
    torch.testing.assert_close(back, y.float(), rtol=0, atol=0, equal_nan=True)


def test_without_the_patch_casts_truncate():
    x = torch.tensor([1.0 + 2**-8 + 2**-9] * 16)
    y = torch.empty(16, dtype=torch.bfloat16)
    with interpret.plain():
        cast[(1,)](x, y, 16)
    assert not torch.equal(y, x.bfloat16())


def test_rounding_toward_zero():
    x = every_float()
    x = x[x.isfinite()][: 1 << 15].contiguous()
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    truncate[(1,)](x, y, x.numel())
    assert torch.equal(y.view(torch.int16), (x.view(torch.int32) >> 16).short())


def test_bitcast():
    x = torch.randn(256).bfloat16()
    words, again = torch.empty(256, dtype=torch.int16), torch.empty_like(x)
    bits[(1,)](x, words, again, 256)
    assert torch.equal(words, x.view(torch.int16)) and torch.equal(again, x)


@triton.jit
def dot(A, B, C, ACC, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, TRANS: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    a = tl.load(A + m[:, None] * K + k[None, :])
    if TRANS:
        b = tl.trans(tl.load(B + n[:, None] * K + k[None, :]))
    else:
        b = tl.load(B + k[:, None] * N + n[None, :])
    acc = tl.load(ACC + m[:, None] * N + n[None, :])
    tl.store(C + m[:, None] * N + n[None, :], tl.dot(a, b, acc, input_precision=PRECISION))


def run_dot(dtype, precision="ieee", trans=False, k=64):
    a, b, acc = torch.randn(16, k).to(dtype), torch.randn(k, 32).to(dtype), torch.randn(16, 32)
    c = torch.empty(16, 32)
    dot[(1,)](a, b.t().contiguous() if trans else b, c, acc, 16, 32, k, precision, trans)
    return a, b, acc, c


@pytest.mark.parametrize("trans", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dot(dtype, trans):
    a, b, acc, c = run_dot(dtype, trans=trans)
    torch.testing.assert_close(c.double(), a.double() @ b.double() + acc.double(), rtol=1e-6, atol=1e-5)


def test_without_the_patch_a_bf16_dot_is_wrong():
    with interpret.plain():
        a, b, acc, c = run_dot(torch.bfloat16)
    assert not torch.allclose(c, a.float() @ b.float() + acc, rtol=1e-1, atol=1e-1)


def test_dot_of_fp32_in_tf32_loses_bits():
    a, b, acc, c = run_dot(torch.float32, "tf32")
    error = (c.double() - a.double() @ b.double() - acc.double()).abs().max()
    assert 1e-4 < error < 1e-1
    x = torch.randn(4096)
    assert not (round_tf32(x.numpy()).view(np.uint32) & 0x1FFF).any()


def test_fp32_dot_has_the_bits_of_its_transpose():
    """The forward's scores and the backward's, k @ q.T, have the same bits, whatever numpy's BLAS does on this CPU."""
    a, b = torch.randn(48, 72).numpy(), torch.randn(72, 32).numpy()
    zero = np.zeros((48, 32), np.float32)
    found = fp32_dot(a, b, zero)
    assert (found == fp32_dot(b.T, a.T, zero.T).T).all()
    truth = a.astype(np.float64) @ b.astype(np.float64)
    assert 0 < np.abs(found - truth).max() <= np.spacing(np.float32(np.abs(truth).max())) / 2


def test_dot_needs_sixteen_in_k():
    with pytest.raises(Exception, match="K >= 16"):
        run_dot(torch.bfloat16, k=8)


@triton.jit
def welford(mean_a, m2_a, n_a, mean_b, m2_b, n_b):
    delta = mean_b - mean_a
    n = n_a + n_b
    return mean_a + delta * n_b / n, m2_a + m2_b + delta * delta * n_a * n_b / n, n


@triton.jit
def affine(a, b, c, d):
    return a * c, b * c + d


@triton.jit
def reductions(X, SUM, MOST, BEST, MEAN, CUM, SCAN, M: tl.constexpr, N: tl.constexpr):
    i, j = tl.arange(0, M), tl.arange(0, N)
    at = i[:, None] * N + j[None, :]
    x = tl.load(X + at)
    tl.store(SUM + i, tl.sum(x.to(tl.float32), axis=1))
    tl.store(MOST + i, tl.max(x, axis=1))
    tl.store(BEST + j, tl.argmax(x.to(tl.float32), axis=0))
    y = x.to(tl.float32)
    mean, _m2, _n = tl.reduce((y, tl.zeros_like(y), tl.full([M, N], 1.0, tl.float32)), 1, welford)
    tl.store(MEAN + i, mean)
    tl.store(CUM + at, tl.cumsum(y, axis=1))
    _a, b = tl.associative_scan((tl.full([M, N], 0.5, tl.float32), y), 1, affine)
    tl.store(SCAN + at, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_reductions_and_scans(dtype):
    x = torch.randn(8, 32).to(dtype)
    total, most, mean = torch.empty(8), torch.empty(8, dtype=dtype), torch.empty(8)
    best, cum, scan = torch.empty(32, dtype=torch.int32), torch.empty(8, 32), torch.empty(8, 32)
    reductions[(1,)](x, total, most, best, mean, cum, scan, 8, 32)
    torch.testing.assert_close(total, x.float().sum(1))
    assert torch.equal(most, x.amax(1)) and torch.equal(best.long(), x.float().argmax(0))
    torch.testing.assert_close(mean, x.float().mean(1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(cum, x.float().cumsum(1), rtol=1e-5, atol=1e-5)
    state, want = torch.zeros(8), []
    for column in x.float().unbind(1):
        state = 0.5 * state + column
        want.append(state)
    torch.testing.assert_close(scan, torch.stack(want, 1), rtol=1e-5, atol=1e-6)


@triton.jit
def atomics(X, AT, OUT, COUNT, LOCK, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.atomic_add(OUT + tl.load(AT + i), tl.load(X + i), mask=i < N - 1)
    tl.atomic_max(COUNT, tl.program_id(0))
    tl.atomic_cas(LOCK, 0, 7)
    tl.atomic_add(LOCK + 1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_atomics(dtype):
    x = torch.randint(-8, 9, (64,)).to(dtype)
    at = torch.randint(0, 4, (64,), dtype=torch.int32)
    out, count, lock = torch.zeros(4, dtype=dtype), torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    atomics[(3,)](x, at, out, count, lock, 64)
    want = torch.zeros(4, dtype=torch.float64).index_add_(0, at[:-1].long(), x[:-1].double()) * 3
    assert torch.equal(out.double(), want) and count.item() == 2 and lock.tolist() == [7, 3]


@triton.jit
def device_descriptor(X, Y, H, W: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    x = tl.make_tensor_descriptor(X, [H, W], [W, 1], [ROWS, COLS])
    y = tl.make_tensor_descriptor(Y, [H, W], [W, 1], [ROWS, COLS])
    for r in tl.range(0, H, ROWS, num_stages=2, warp_specialize=False):
        y.store([r, 0], x.load([r, 0]) + 1.0)


@triton.jit
def host_descriptor(X, Y, ROWS: tl.constexpr, COLS: tl.constexpr):
    r = tl.program_id(0) * ROWS
    Y.store([r, COLS], X.load([r, COLS]) * 2.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_descriptors(dtype):
    x = torch.randn(21, 32).to(dtype)
    y = torch.empty_like(x)
    device_descriptor[(1,)](x, y, 21, 32, 8, 32)
    assert torch.equal(y, x + 1)
    y = torch.zeros_like(x)
    describe = lambda t: TensorDescriptor(t, list(t.shape), list(t.stride()), [8, 16])  # noqa: E731
    host_descriptor[(3,)](describe(x), describe(y), 8, 16)
    assert torch.equal(y[:, 16:], x[:, 16:] * 2) and not y[:, :16].any()


@triton.jit
def numbers(OUT, WIDE, REAL, small: tl.int32, large: tl.int64, real: tl.float32):
    tl.store(OUT, small * small)
    tl.store(WIDE, large * large)
    tl.store(REAL, real * real)


def test_numbers_take_their_annotation():
    out, wide, real = torch.empty(1, dtype=torch.int32), torch.empty(1, dtype=torch.int64), torch.empty(1)
    numbers[(1,)](out, wide, real, 65537, 65537, 0.1)
    assert out.item() == 131073 and wide.item() == 65537**2  # int32 wraps around
    assert real.item() == (torch.tensor(0.1) * torch.tensor(0.1)).item()
    with pytest.raises(OverflowError, match="small"):
        numbers[(1,)](out, wide, real, 1 << 31, 1, 0.1)


@triton.jit
def copy(X, Y, count: tl.int32, shift: tl.int32, MASKED: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(X + i + shift, mask=i < count)
    tl.store(Y + i, x, mask=(i < count) | (not MASKED))


def test_lanes_outside_raise():
    x, y = torch.arange(12.0).bfloat16(), torch.empty(16).bfloat16()
    copy[(1,)](x[2:12], y, 10, 0, True, 16)
    assert torch.equal(y[:10], x[2:])
    with pytest.raises(Exception, match="a load of 2 lanes outside every tensor"):
        copy[(1,)](x[2:12], y, 12, 0, True, 16)
    with pytest.raises(Exception, match="a load of 1 lanes outside every tensor"):
        copy[(1,)](x[2:12], y, 10, -1, True, 16)  # the storage goes on there, the tensor does not
    with pytest.raises(Exception, match="a store of 4 lanes outside every tensor"):
        copy[(1,)](x, y[:12], 12, 0, False, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32], ids=str)
def test_lanes_without_other_are_not_zero(dtype):
    x, y = torch.ones(16).to(dtype), torch.zeros(16).to(dtype)
    copy[(1,)](x, y, 12, 0, False, 16)
    assert (y[12:].isnan() if dtype.is_floating_point else y[12:] == 2**31 - 1).all() and (y[:12] == 1).all()


@triton.jit
def one(X, Y, n):
    tl.store(Y, tl.load(X, mask=n > 0, other=0))
    tl.store(Y + 1, tl.load(X + tl.arange(0, 1), mask=tl.arange(0, 1) < n, other=0).sum(0))


def test_a_single_lane_takes_its_other():
    """Triton asks `if other`, and a single zero says no."""
    y = torch.ones(2, dtype=torch.int32)
    one[(1,)](torch.ones(1, dtype=torch.int32), y, 0)
    assert y.tolist() == [0, 0]


@triton.jit
def helper(x):
    return tl.sum(tl.maximum(x, 0.0), axis=0)


@triton.jit
def once(X, Y, N: tl.constexpr):
    tl.store(Y, helper(tl.load(X + tl.arange(0, N))))


def test_the_language_is_left_as_it_was():
    before = tl.load, tl.core.load, tl.tensor.__add__, tl.range
    once[(1,)](torch.ones(16), y := torch.zeros(1), 16)
    assert y.item() == 16 and before == (tl.load, tl.core.load, tl.tensor.__add__, tl.range)
    with pytest.raises(Exception):  # noqa: B017  too few arguments
        once[(1,)](torch.ones(16), y)
    assert before == (tl.load, tl.core.load, tl.tensor.__add__, tl.range)


def test_install_is_idempotent():
    run = triton.runtime.interpreter.InterpretedFunction.run
    interpret.install()
    assert triton.runtime.interpreter.InterpretedFunction.run is run


def test_rounding_by_hand():
    x = np.array([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, np.nan, np.inf], np.float32)
    assert np.array_equal(round_bf16(x), np.array([1, 1 + 2**-6, np.inf, np.nan, np.inf], np.float32), equal_nan=True)


KINDS = (tl.int1, tl.int32, tl.int64, tl.uint32, tl.float16, tl.bfloat16, tl.float32, tl.float64)
KINDS = (*KINDS, tl.pointer_type(tl.float16), tl.pointer_type(tl.float32))
NUMBERS = (0, 1, -3, 2**31, -(2**63), 2**63, 2**64, True, 0.0, -0.5, 1e30, 1e300, float("inf"))


def operands():
    """Numbers, and a scalar, a row, a column, a square and a cube of every kind."""
    yield from NUMBERS
    for kind in KINDS:
        for shape in ((), (4,), (4, 1), (4, 4), (2, 1, 4)):
            data = (np.arange(math.prod(shape)) % 2).reshape(shape or 1).astype(interpret.ops.np_dtype(kind))
            handle = triton.runtime.interpreter.TensorHandle(data, kind)
            yield tl.tensor(handle, tl.block_type(kind, list(shape)) if shape else kind)


def answer(check, a, b, options):
    try:
        pair = check(triton.runtime.interpreter.interpreter_semantic, a, b, *options)
        return [(t.type, t.dtype, str(t.shape), t.numel.value, t.handle.dtype, t.handle.data) for t in pair]
    except Exception as error:
        return type(error)


@pytest.mark.parametrize(
    "options", [(True, True), (True, False), (), (False, False, True, True), (False, False, False)]
)
def test_shortcuts_give_what_triton_gives(monkeypatch, options):
    """Types, shapes and values of both operands, or the error; twice, as numbers are kept."""
    pairs = list(itertools.product(operands(), repeat=2))
    with np.errstate(all="ignore"):
        ours = [answer(semantic.checked, *pair, options) for pair in (*pairs, *pairs)]
        monkeypatch.setattr(TritonSemantic, "broadcast_impl_value", semantic._broadcast)
        theirs = [answer(semantic._checked, *pair, options) for pair in pairs]
    for pair, a, b in zip((*pairs, *pairs), ours, (*theirs, *theirs), strict=True):
        if isinstance(b, type):
            assert a is b, pair
            continue
        for (*facts, data), (*expected, wanted) in zip(a, b, strict=True):
            assert facts == expected, pair
            assert data.dtype == wanted.dtype and np.array_equal(data, wanted), pair
