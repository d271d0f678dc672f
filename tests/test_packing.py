"""packing: the layout of a Packed, its inverse, the remembered row order, and every check of its input."""

import gc

import pytest
import torch

from fastdit import ops, packing
from fastdit.packing import Packed, pack, row_order, unpack
from fastdit.testing import close

GRIDS = [(1, 2, 3), (2, 1, 1), (0, 4, 4), (1, 1, 5)]


def _segments(grids=GRIDS, D=4):
    return [torch.randn(t * h * w, D) for t, h, w in grids]


def test_layout():
    p = pack(_segments(), GRIDS)
    assert p.tokens.shape == (13, 4) and len(p) == 4 and p.lengths == [6, 2, 0, 5] and p.max_seqlen == 6
    assert p.cu_seqlens.tolist() == [0, 6, 8, 8, 13] and p.cu_seqlens.dtype == torch.int32
    assert p.grids.tolist() == [list(g) for g in GRIDS] and p.grids.dtype == torch.int32
    assert p.segment_ids.tolist() == [0] * 6 + [1] * 2 + [3] * 5 and p.segment_ids.dtype == torch.int32
    assert p.host_grids == tuple(GRIDS)


def test_round_trip_and_gradient():
    parts = [t.requires_grad_() for t in _segments()]
    p = pack(parts, GRIDS)
    for a, b in zip(unpack(p), parts, strict=True):
        close.assert_bitwise(a, b)
    (unpack(p)[0].sum() + 2 * unpack(p)[3].sum()).backward()
    for part, slope in zip(parts, (1.0, 0.0, 0.0, 2.0), strict=True):
        close.assert_bitwise(part.grad, torch.full_like(part, slope))


def test_plain_sequences():
    p = pack(_segments())
    assert p.host_grids == ((1, 1, 6), (1, 1, 2), (1, 1, 0), (1, 1, 5))


def test_with_tokens():
    p = pack(_segments(), GRIDS)
    q = p.with_tokens(torch.randn(13, 9))
    assert q.tokens.shape == (13, 9) and q.cu_seqlens is p.cu_seqlens and q.segment_ids is p.segment_ids
    with pytest.raises(ValueError, match=r"got \[12, 4\], expected \[13, D\]"):
        p.with_tokens(torch.randn(12, 4))


def test_layout_serves_the_ops():
    # rows of a table by segment, then the videos back: what a packed DiT does
    x = [torch.randn(4, t, 2 * h, 2 * w) for t, h, w in GRIDS]
    p = ops.patch_embed3d(x, torch.randn(16, 4, 1, 2, 2))
    assert isinstance(p, Packed) and p.host_grids == tuple(GRIDS)
    shift = torch.randn(4, 16)
    y = ops.norm_modulate(p.tokens, shift=shift, row_index=p.segment_ids)
    for part, tokens, row in zip(unpack(p.with_tokens(y)), unpack(p), shift, strict=True):
        close.assert_bitwise(part, ops.norm_modulate(tokens, shift=row[None]))
    videos = ops.unpatchify3d(y, grid=p.host_grids, patch=(1, 2, 2), channels=4)
    assert [v.shape for v in videos] == [v.shape for v in x]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_row_order(dtype):
    index = torch.tensor([2, 0, 2, 2, 4, 0], dtype=dtype)
    order, offsets = row_order(index, 6)
    assert order.tolist() == [1, 5, 0, 2, 3, 4]  # stable: tokens of one row keep their order
    assert offsets.tolist() == [0, 2, 2, 5, 5, 6, 6] and order.dtype == offsets.dtype == torch.int32
    batched = row_order(index.view(2, 3), 6)
    close.assert_bitwise(batched.order, order)


def test_row_order_of_segments_needs_no_sort(monkeypatch):
    p = pack(_segments(), GRIDS)
    monkeypatch.setattr(torch, "argsort", None)
    assert row_order(p.segment_ids, 4).order is None
    close.assert_bitwise(row_order(p.segment_ids, 4).offsets, p.cu_seqlens)
    assert p.row_order.order is None


def test_row_order_is_computed_once():
    index = torch.tensor([1, 0, 1])
    first = row_order(index, 2)
    assert row_order(index, 2) is first
    assert row_order(index, 3).offsets.tolist() == [0, 1, 3, 3]  # a table of another size is another order
    assert row_order(index, 2) is first
    index[0] = 0  # a write makes the remembered order stale
    assert row_order(index, 2).offsets.tolist() == [0, 2, 3]
    p = pack(_segments(), GRIDS)
    p.segment_ids[0] = 1
    assert row_order(p.segment_ids, 4).offsets.tolist() == [0, 5, 8, 8, 13]


def test_row_order_forgets_dead_tensors():
    gc.collect()
    before = len(packing._orders)
    index = torch.tensor([1, 0, 1])
    row_order(index, 2)
    assert len(packing._orders) == before + 1
    del index
    gc.collect()
    assert len(packing._orders) == before


def test_row_order_in_inference_mode():
    with torch.inference_mode():
        index = torch.tensor([1, 0, 1])
        assert row_order(index, 2).order.tolist() == [1, 0, 2]
        assert pack(_segments(), GRIDS).max_seqlen == 6


def test_packs_inside_a_compiled_graph():
    def call(parts, shift):
        p = pack(parts, GRIDS)
        return p.with_tokens(p.tokens + shift[p.segment_ids]).tokens

    parts, shift = _segments(), torch.randn(4, 4)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    close.assert_bitwise(compiled(parts, shift), call(parts, shift))


@pytest.mark.parametrize(
    "tokens, grids, error, match",
    [
        ([], None, ValueError, "empty list"),
        ([torch.randn(2, 3, 4)], None, ValueError, r"\[N, D\]"),
        ([torch.randn(3, 4), torch.randn(3, 5)], None, ValueError, "one D"),
        ([torch.randn(3, 4), torch.randn(3, 4).half()], None, TypeError, "differ in dtype"),
        ([torch.randn(3, 4), torch.randn(3, 4, device="meta")], None, ValueError, "different devices"),
        ([torch.randn(3, 4)], [(1, 1, 3), (1, 1, 3)], ValueError, "one grid per segment"),
        ([torch.randn(3, 4)], [(1, 2, 2)], ValueError, "not its segment's"),
    ],
)
def test_bad_input(tokens, grids, error, match):
    with pytest.raises(error, match=match) as caught:
        pack(tokens, grids)
    assert str(caught.value).startswith("pack: ") and "got" in str(caught.value)
