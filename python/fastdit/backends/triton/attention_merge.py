"""merge_attention on Triton (kernels/attention_merge.py): one launch forward, one backward."""

from __future__ import annotations

from ...kernels.attention_merge import merge_backward, merge_forward
from .._attention_abi import of_lse, of_o
from .._facts import kept
from .._tensors import empty, rows_contiguous
from ._launch import Launch, launch
from ._tiles import alignment, power


def _rows(o):
    """Rows in all, tokens of a sample, heads; constants: channels, padded, rows of a program; the grid."""
    tokens, heads, channels = o.shape[-3:]
    total = o.numel() // channels
    width = max(power(channels), 16)
    block = max(1024 // width, 1)
    return (total, tokens, heads), (channels, width, block), ((total + block - 1) // block, 1, 1)


@kept
def _plan(o1, lse1, o2, lse2) -> Launch | None:
    if not o1.numel():
        return None
    numbers, (channels, width, block), grid = _rows(o1)
    strides = (*of_o(o1), *of_o(o2))
    return Launch(
        merge_forward, grid, (*numbers, *strides, *of_lse(lse1), *of_lse(lse2)),
        (channels, alignment(o1.element_size(), *strides), width, block), 4, 1,
    )  # fmt: skip


def merge_attention(o1, lse1, o2, lse2):
    o, lse = empty(o1), empty(lse1)
    plan = _plan(o1, lse1, o2, lse2)
    if plan is not None:
        plan(o1, lse1, o2, lse2, o, lse)
    return o, lse


def merge_attention_backward(do, dlse, o1, lse1, o2, lse2, needs):
    grads = [empty(t) if need else None for t, need in zip((o1, lse1, o2, lse2), needs, strict=True)]
    if o1.numel() == 0 or (do is None and dlse is None) or not any(needs):
        return tuple(None if g is None else g.zero_() for g in grads)
    if do is not None:
        do = rows_contiguous(do)
    numbers, (channels, width, block), grid = _rows(o1)
    strides = (*of_o(o1), *of_o(o2))
    of_do = of_o(o1 if do is None else do)
    of_dlse = of_lse(lse1 if dlse is None else dlse)
    launch(
        merge_backward, grid, (o1, lse1, o2, lse2, do, dlse, *grads),
        (*numbers, *strides, *of_lse(lse1), *of_lse(lse2), *of_do, *of_dlse),
        (channels, alignment(o1.element_size(), *strides, *of_do), width, block), 4, 1,
    )  # fmt: skip
    return tuple(grads)
