"""attention on Triton: the laws of its own that the samples do not reach."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

from fastdit.reference import attention as reference

tl = pytest.importorskip("triton.language")

from fastdit.kernels import attention_mask as mask  # noqa: E402
from fastdit.kernels._jit import kernel  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.gpu if DEVICE == "cuda" else []
fuzz = settings(max_examples=50, deadline=None, derandomize=True)


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
