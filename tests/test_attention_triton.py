"""attention on Triton: the laws of its own that the samples do not reach."""

import contextlib
import itertools
import math

import attention_laws as laws
import pytest
import torch
from attention_laws import BASELINE, bounds
from hypothesis import Phase, given, settings, strategies as st
from torch.torch_version import TorchVersion

from fastdit import ops
from fastdit.reference import attention as reference
from fastdit.testing import contract
from fastdit.testing.workloads import Maker, Sample, samples

tl = pytest.importorskip("triton.language")

from fastdit.backends.triton import _config, _launch, attention as adapter  # noqa: E402
from fastdit.backends.triton._config import Config, forced  # noqa: E402
from fastdit.backends.triton.attention_tiles import plan  # noqa: E402
from fastdit.kernels import attention_mask as mask  # noqa: E402
from fastdit.kernels._jit import kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
fuzz = settings(max_examples=50, deadline=None, derandomize=True)
slow = settings(fuzz, max_examples=12, phases=[Phase.generate])  # shrinking would run for minutes


# ---- ranges and masks against the reference's dense mask ------------------------------------------------------
@kernel
def _linear_probe(OUT, queries: tl.int32, keys: tl.int32, shift: tl.int32, frame: tl.int32,
                  FRAMES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Row t of OUT: key_range of query tile t, then query_range of key tile t."""
    t = tl.program_id(0)
    frame = mask.frame_length(frame, queries + shift)
    i0, j0 = t * BLOCK, t * BLOCK
    whole, end = mask.key_range(i0, tl.minimum(i0 + BLOCK, queries), keys, shift, frame, FRAMES, BLOCK)
    begin, all_see = mask.query_range(j0, j0 + BLOCK, queries, keys, shift, frame, FRAMES, BLOCK)
    tl.store(OUT + t * 4, whole)
    tl.store(OUT + t * 4 + 1, end)
    tl.store(OUT + t * 4 + 2, begin)
    tl.store(OUT + t * 4 + 3, all_see)


@fuzz
@given(
    st.integers(1, 20), st.integers(0, 9), st.integers(0, 30), st.one_of(st.none(), st.sampled_from([1, 2, 3, 7, 40]))
)
def test_linear_ranges(queries, cached, valid, frame):
    block, total = 4, queries + cached
    keys = min(valid, total)
    visible = torch.ones(queries, total, dtype=torch.bool)
    if frame is not None:
        visible &= reference.visible_dense(queries, total, None, frame, "cpu")
    visible[:, keys:] = False
    tiles = -(-total // block)
    out = torch.empty(tiles, 4, dtype=torch.int32, device=DEVICE)
    _linear_probe[(tiles,)](out, queries, keys, cached, frame or 0, frame is not None, block)
    for t, (whole, end, begin, all_see) in enumerate(out.tolist()):
        rows = visible[t * block : (t + 1) * block]
        assert whole % block == 0 and rows[:, :whole].all() and not rows[:, end:].any()
        assert not len(rows) or (end == rows.any(0).sum() and whole + block > rows.all(0).sum())
        columns = visible[:, t * block : min((t + 1) * block, keys)]
        if columns.shape[1]:
            assert not columns[:begin].any() and columns[all_see:].all()
            assert begin + block > queries - columns.any(1).sum() and all_see <= -(-queries // block) * block
        else:
            assert begin == all_see == queries


@kernel
def _axis_probe(SPAN, SEEN, n: tl.int32, W: tl.constexpr, STRIDE: tl.constexpr, B: tl.constexpr):
    """Row p of SPAN: seen_span of p..p+B-1, viewer_span of the same; row p of SEEN: what query p sees of 32 keys."""
    p = tl.program_id(0)
    a, b, c, d = mask.seen_span(p, p + B, n, W, STRIDE)
    e, f, g, h = mask.viewer_span(p, p + B, n, W, STRIDE)
    tl.store(SPAN + p * 8, a)
    tl.store(SPAN + p * 8 + 1, b)
    tl.store(SPAN + p * 8 + 2, c)
    tl.store(SPAN + p * 8 + 3, d)
    tl.store(SPAN + p * 8 + 4, e)
    tl.store(SPAN + p * 8 + 5, f)
    tl.store(SPAN + p * 8 + 6, g)
    tl.store(SPAN + p * 8 + 7, h)
    j = tl.arange(0, 32)
    tl.store(SEEN + p * 32 + j, mask.within(j, mask.window_start(p, n, W, STRIDE), tl.minimum(n, W)).to(tl.int8))


@fuzz
@given(st.integers(1, 20), st.integers(1, 24), st.data(), st.sampled_from([1, 2, 4]))
def test_window_spans(n, window, data, brick):
    stride = data.draw(st.integers(1, window))
    index = torch.arange(n)
    start = reference.window_start(index, torch.tensor(n), window, stride)[:, None]
    visible = (start <= index) & (index < start + window)
    span = torch.empty(n, 8, dtype=torch.int32, device=DEVICE)
    seen = torch.empty(n, 32, dtype=torch.int8, device=DEVICE)
    _axis_probe[(n,)](span, seen, n, window, stride, brick)
    assert torch.equal(seen.bool().cpu()[:, :n], visible) and not seen[:, n:].any()
    for p, spans in enumerate(span.tolist()):
        for rows, (lo, hi, core_lo, core_hi) in zip(
            (visible[p : p + brick], visible.t()[p : p + brick]), (spans[:4], spans[4:]), strict=True
        ):
            some, every = (index[r].tolist() for r in (rows.any(0), rows.all(0)))
            assert some == list(range(lo, hi)) and every == list(range(core_lo, core_hi))


@kernel
def _brick_probe(COUNT, nt: tl.int32, nh: tl.int32, nw: tl.int32,
                 BT: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr):  # fmt: skip
    """Counts how often each token of a box lies in its bricks; one program per brick."""
    t0, h0, w0 = mask.brick_corner(tl.program_id(0), nt, nh, nw, BT, BH, BW)
    t, h, w = mask.brick_tokens(BT, BH, BW)
    t, h, w = t + t0, h + h0, w + w0
    inside = (t < nt) & (h < nh) & (w < nw)
    at = COUNT + (t * nh + h) * nw + w
    tl.store(at, tl.load(at, mask=inside) + 1, mask=inside)


@pytest.mark.parametrize("box", [(1, 1, 1), (3, 5, 9), (4, 4, 8), (2, 1, 17)])
def test_bricks_cover_a_box_once(box):
    brick = (2, 2, 4)
    count = torch.zeros(box, dtype=torch.int32, device=DEVICE)
    number = 1
    for n, b in zip(box, brick, strict=True):
        number *= -(-n // b)
    _brick_probe[(number,)](count, *box, *brick)
    assert (count == 1).all()


# ---- shapes, masks and raggedness under small tiles -------------------------------------------------------------
SMALL = (Config((16, 16, 0), 4, 1), Config((32, 16, 0), 4, 1), Config((16, 32, 0), 4, 1))


@contextlib.contextmanager
def tiles(config):
    """Tiles so small that a few dozen tokens make many of them."""
    with forced("attention_forward", config), forced("attention_window_forward", Config(config.blocks[:2], 4, 1)):
        yield


@contextlib.contextmanager
def another_card(capability):
    """The paths of that card: TMA boxes for every size, on 100 in the form for warp specialisation."""
    before, adapter.TMA_PAIRS = adapter.TMA_PAIRS, 0
    _launch.pretend(capability)
    _config.forget()
    try:
        yield
    finally:
        adapter.TMA_PAIRS = before
        _launch.pretend(None)
        _config.forget()


def check(op, args, kwargs, config, dtype=torch.float32):
    with tiles(config):
        contract.forward(Sample(op, "fuzz", lambda m: (args, kwargs), baseline=BASELINE[op]), dtype, "triton", DEVICE)


HEADS = st.sampled_from([(1, 1, 72), (2, 1, 13), (2, 2, 40), (4, 2, 16), (1, 1, 96), (2, 2, 8)])


@slow
@given(
    *(st.integers(1, 70), st.integers(1, 70), HEADS, st.sampled_from(SMALL), st.data()),
    *(st.sampled_from([None, 0.5, -0.3]), st.sampled_from([None, 1, 5, 16, 33])),
)
def test_dense(n, m, heads, config, data, scale, frames):
    H, Hkv, D = heads
    m = max(n, m) if frames else m
    make = Maker(torch.float32, DEVICE, seed=n * 100 + m)
    kwargs = dict(scale=scale, frame_tokens=frames, return_lse=n >= 30)  # of few rows the error is luck
    if data.draw(st.booleans()):
        kwargs["kv_len"] = make.index(data.draw(st.lists(st.integers(0, m), min_size=2, max_size=2)))
    if frames and data.draw(st.booleans()):
        kwargs["frame_tokens"] = make.index([frames, 7])
    args = make.randn(2, n, H, D), make.randn(2, m, Hkv, D), make.randn(2, m, Hkv, D)
    check("attention", args, kwargs, config)


LENGTHS = st.lists(st.sampled_from([0, 0, 1, 2, 15, 16, 17, 33, 50]), min_size=0, max_size=5)


@slow
@given(LENGTHS, LENGTHS, st.integers(0, 20), HEADS, st.sampled_from(SMALL), st.sampled_from([None, 1, 16, 21]))
def test_packed(queries, keys, tail, heads, config, frames):
    H, Hkv, D = heads
    keys = [a + b if frames else b for a, b in itertools.zip_longest(queries, keys, fillvalue=3)][: len(queries)]
    make = Maker(torch.float32, DEVICE, seed=len(queries))
    n, m = max(sum(queries) + tail, 1), max(sum(keys), 1)
    kwargs = dict(
        cu_seqlens_q=bounds(make, queries), cu_seqlens_k=bounds(make, keys), max_seqlen_q=max(queries, default=0),
        max_seqlen_k=max(keys, default=0), frame_tokens=frames, return_lse=n >= 30,
    )  # fmt: skip
    args = make.randn(n, H, D), make.randn(m, Hkv, D), make.randn(m, Hkv, D)
    check("attention_varlen", args, kwargs, config)


SIDE = st.integers(1, 6)


@slow
@given(
    *(st.lists(st.tuples(SIDE, SIDE, SIDE), min_size=1, max_size=3), st.tuples(SIDE, SIDE, SIDE), st.data()),
    *(HEADS, st.sampled_from(SMALL), st.integers(0, 9)),
)
def test_windows(grids, window, data, heads, config, tail):
    H, Hkv, D = heads
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    make = Maker(torch.float32, DEVICE, seed=tail)
    lengths = [t * h * w for t, h, w in grids]
    n = sum(lengths) + tail
    kwargs = dict(
        cu_seqlens_q=bounds(make, lengths), max_seqlen_q=max(lengths), grids=make.index(grids), window=window,
        window_stride=stride, return_lse=n >= 30,
    )  # fmt: skip
    args = make.randn(n, H, D), make.randn(n, Hkv, D), make.randn(n, Hkv, D)
    check("attention_varlen", args, kwargs, config)


@pytest.mark.parametrize("capability", [90, 100])
# fp16 has bf16's boxes
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str)
@pytest.mark.parametrize("sample", samples("attention") + samples("attention_varlen"), ids=str)
def test_boxes(sample, dtype, capability):
    """Every sample by TMA where its strides allow boxes, else by the same card's pointers."""
    with another_card(capability):
        contract.forward(sample, dtype, "triton", DEVICE)


@pytest.mark.parametrize("capability", [90, 100])
@pytest.mark.parametrize("specialised", [0, 1])
@pytest.mark.parametrize("frames", [None, 10])
def test_boxes_over_many_tiles(capability, specialised, frames, monkeypatch):
    made = []
    monkeypatch.setattr(adapter, "_boxes", lambda *a, kept=adapter._boxes: made.append(kept(*a)) or made[-1])
    make = Maker(torch.float16, DEVICE)
    q, k, v = make.randn(2, 40, 3, 2, 72).unbind(2)
    with another_card(capability):
        for kv_len in (None, make.index([40, 21])):
            kwargs = dict(kv_len=kv_len, frame_tokens=frames)
            config = Config((16, 16, specialised), 4, 1)
            check("attention", (q, k, v), kwargs, config, torch.float16)
        cu = make.index([0, 3, 3, 36])
        kwargs = dict(cu_seqlens_q=cu, max_seqlen_q=33, frame_tokens=frames)
        check("attention_varlen", (q[0], k[0], v[0]), kwargs, config, torch.float16)
    assert len(made) == 3


@pytest.mark.parametrize(("version", "cards"), [("3.6.0", (90, 100)), ("3.7.1", (90, 100, 120))])
def test_boxes_where_they_are_one_instruction(version, cards, monkeypatch):
    monkeypatch.setattr(adapter, "VERSION", TorchVersion(version))
    q = torch.empty(1, 4096, 1, 64, dtype=torch.bfloat16)
    found = []
    for card in (0, 80, 90, 100, 120):
        with another_card(card):
            found += [card] if adapter._boxed(q, q, q, adapter.TMA_PAIRS) else []
    assert tuple(found) == cards


# ---- what must not be read, and what must not matter --------------------------------------------------------------
@pytest.mark.parametrize("capability", [80, 90])
def test_foreign_rows_never_leak(capability):
    """NaN behind kv_len and in the neighbour segments stays where it is."""
    make = Maker(torch.float16, DEVICE)
    q, k, v = make.randn(2, 40, 3, 2, 72).unbind(2)
    kv_len = make.index([21, 3])
    op = ops.attention
    with another_card(capability), tiles(SMALL[0]):
        clean = op(q, k, v, kv_len=kv_len, backend="triton")
        for b, count in enumerate(kv_len.tolist()):
            k[b, count:] = v[b, count:] = math.nan
        assert torch.equal(op(q, k, v, kv_len=kv_len, backend="triton"), clean)
        packed = [x[0, :21].contiguous() for x in (q, k, v)]
        bounds_q = dict(cu_seqlens_q=make.index([0, 5, 18]), max_seqlen_q=13)
        alone = ops.attention_varlen(*packed, **bounds_q, backend="triton")
        for x in packed:
            x[:5] = x[18:] = math.inf
        again = ops.attention_varlen(*packed, **bounds_q, backend="triton")
    assert torch.equal(again[5:18], alone[5:18]) and alone[5:18].isfinite().all() and not again[18:].any()


def test_unseen_tiles_are_not_loaded():
    with tiles(SMALL[0]):
        laws.unseen_keys_are_not_loaded("triton", DEVICE, torch.float32, 16, 64, (2, 8, 8), (1, 4, 4))


@fuzz
@given(LENGTHS, st.integers(0, 20), st.sampled_from([1, 16]), st.data())
def test_plan(lengths, tail, block, data):
    make = Maker(device=DEVICE)
    keys = data.draw(st.lists(st.integers(0, 9), min_size=len(lengths), max_size=len(lengths)))
    first, order = plan(bounds(make, lengths), bounds(make, keys), sum(lengths) + tail, block).tolist()
    laws.plan_takes_every_tile_once(first, order, lengths, keys, tail, block)


def test_rows_far_apart():
    """Rows of k and v so far apart that a tile spans more than 2^31 elements: reserved memory, mostly untouched."""
    make = Maker(torch.float16, DEVICE)
    n, step = 17, 1 << 28
    memory = torch.empty((n - 1) * step + 32, dtype=torch.float16, device=DEVICE)
    q, near_k, near_v = (make.randn(1, n, 1, 16) for _ in range(3))
    k, v = (memory[at:].as_strided((1, n, 1, 16), (step, step, 16, 1)) for at in (0, 16))
    k.copy_(near_k)
    v.copy_(near_v)
    with tiles(SMALL[0]):
        assert torch.equal(ops.attention(q, k, v, backend="triton"), ops.attention(q, near_k, near_v, backend="triton"))
        args = dict(cu_seqlens_q=make.index([0, n]), max_seqlen_q=n, window=(1, 2, 9), grids=make.index([[1, 1, n]]))
        far, near = (
            ops.attention_varlen(q[0], a[0], b[0], **args, backend="triton") for a, b in ((k, v), (near_k, near_v))
        )
    assert torch.equal(far, near)


@laws.each_missing
@laws.each_wanted
def test_merge_partial_gradients(missing, wanted):
    laws.partial_merge("triton", DEVICE, missing, wanted)
