"""attention on the CUDA kernels (csrc/cuda/attention*.cu): dense and packed, bf16 and fp16, forward and backward.

Launches: 1 forward, 3 backward; packed, one more for each plan of tiles (1 and 2). Deterministic in any case. Tensors
are read where they lie; those whose rows do not stand on 16 bytes are copied first. On sm_90 products run on wgmma
(attention_hopper.cu, attention_backward_*hopper.cu), save where `_wgmma_refusal` says why not; else on mma.sync. There
the backward is one pass over the keys where that pays (`_two_passes`): statistics, zeroed counters, the pass, dq from
its sums.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .._attention_abi import dense, given_lse, given_o, merges, packed
from .._attention_bricks import bricks
from .._tensors import contiguous, empty, rows_contiguous
from ..cpu._abi import pointer
from ..registry import Impl, register as _register
from . import _launch
from ._launch import launch, unfit, unfit_for_wgmma

QUERIES, KEYS, TILE = 128, 64, 64  # tokens: kAttentionQueries, kAttentionKeys, kAttentionGradTile
HOPPER_KEYS, HOPPER_OWN, HOPPER_MET = 128, 128, 64  # kHopperKeys, kHopperGradOwn, kHopperGradMet
HOPPER_ACROSS = 8  # what a brick has along w at least
CHANNELS = 128
# The one-pass backward by count, in clocks of a processor (docs/cuda.md): saved per channel, brick of queries and tile
# of keys; spent per channel and brick on the sums of dq, until the next block may add to a brick, for one more launch.
SAVED, ROUNDED, TURN, LAUNCH = 5, 27, 3000, 4000
L2 = 24 << 20  # bytes of q, do and dq that stay there while blocks work on them


def _supports(q, *_) -> str | None:
    refusal, channels = unfit(q), q.shape[-1]
    if refusal is None and q.dtype == torch.float32:
        refusal = "multiplies 16-bit values; got torch.float32"
    if refusal is None and (channels > CHANNELS or channels % 8):
        refusal = f"holds heads of 8 to {CHANNELS} channels, a multiple of 8; got {channels}"
    return refusal


def _fit(t):
    """Rows as the kernels copy them: 16-byte packs, less than 2^32 bytes apart."""
    strides = t.stride()
    low = t.data_ptr() >> 1
    for stride in strides[:-1]:  # all of them at once
        low |= stride
    return t if low % 8 == 0 and strides[-3] < 1 << 31 else t.clone(memory_format=torch.contiguous_format)


def _wgmma_refusal(q, k, v, do=None) -> str | None:
    """Why a pass over these tensors, as `_fit` gives them, is left to mma.sync; None when wgmma takes it."""
    if (refusal := unfit_for_wgmma(q)) is not None:
        return refusal
    for name, t in (("q", q), ("k", k), ("v", v), ("the gradient", do)):
        if t is None:
            continue
        for size, stride in zip(t.shape[:-1], t.stride(), strict=False):
            if (size != 1 and stride == 0) or size == 0:
                return f"wgmma reads tensors whose rows are all there; got {name} of {list(t.shape)}, {t.stride()}"
    return None


def _path(Call, *args) -> str:
    call = Call(*args)
    refusal = _wgmma_refusal(call.q, call.k, call.v)
    if refusal is not None:
        return f"mma.sync: {refusal}"
    two = _two_passes(call)
    return "wgmma, backward in one pass" if two is None else f"wgmma, backward in two passes: {two}"


def _width(call) -> int:
    """Channels of a head as the kernels of sm_90 run it."""
    return next(d for d in (64, 96, 128) if call.q.shape[-1] <= d)


def _together(call) -> int:
    """Heads of keys whose tiles the one-pass backward hands out in turn: as many as L2 holds queries of."""
    samples, queries, _ = call.lengths()
    heads, kv_heads = call.q.shape[-2], call.k.shape[-2]
    planes = kv_heads * (samples if call.q.dim() == 4 else 1)
    return max(1, min(planes, int(L2 // max(1, heads // kv_heads * queries * _width(call) * 8))))


def _two_passes(call) -> str | None:
    """Why the backward of a call that wgmma serves takes two passes; None where it is one. A matter of counts alone,
    and of tokens and segments only: the gradients that are asked for change nothing."""
    if call.windowed:
        return "tiles of keys that meet a brick of a window have no order"
    samples, queries, keys = call.lengths()
    bricks, tiles = -(-queries // HOPPER_MET), -(-keys // HOPPER_OWN)
    processors = _launch.processors(call.q)
    met = tiles / 2 if call.framed else tiles
    saved = samples * call.q.shape[-2] * bricks / processors * _width(call) * (SAVED * met - ROUNDED)
    waits = min(tiles, -(-processors // _together(call)))  # blocks that begin at the same brick
    if saved > TURN * (waits - 1) + LAUNCH:
        return None
    return f"turns of blocks cost more than they save; got {bricks} x {tiles} bricks of queries and tiles of keys"


def _line(tokens: int) -> tuple[int, int, int]:
    return (1, 1, tokens)


class _Dense:
    """What a dense call tells its kernels."""

    def __init__(self, q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, *_):
        self.op = "attention"
        self.q, self.k, self.v = _fit(q), _fit(k), _fit(v)
        self.indices = contiguous(kv_len), contiguous(frame_tokens_of)
        self._rest = frame_tokens, scale
        self.framed, self.windowed = bool(frame_tokens or frame_tokens_of is not None), False

    def shared(self, o, lse) -> tuple:
        return dense(self.q, self.k, self.v, o, lse, *self.indices, *self._rest)

    def lengths(self) -> tuple[int, int, int]:
        """Samples or segments, and how many queries and keys one has."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1]

    def slots(self) -> tuple[int, int]:
        """Planes of queries, and the bricks that one has room for; cuda/attention.h."""
        return self.q.shape[0] * self.q.shape[2], -(-self.q.shape[1] // HOPPER_MET)

    def cut(self, own: int, met: int, keys: bool = False, across: int = 1) -> tuple[tuple, None]:
        """(plan, programs of a head, bricks of `own` and of `met` tokens), and the tensor of the plan. across: what
        bricks of a window have along w at least."""
        rows = self.k if keys else self.q
        return (0, -(-rows.shape[1] // own), _line(own), _line(met)), None


class _Packed:
    """What a packed call tells its kernels."""

    def __init__(
        self, q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
        window, window_stride, scale, *_,
    ):  # fmt: skip
        self.op = "attention_varlen"
        self.q, self.k, self.v = _fit(q), _fit(k), _fit(v)
        self.indices = (
            cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), contiguous(frame_tokens_of), contiguous(grids)
        )  # fmt: skip
        self._rest = frame_tokens, window, window_stride, scale
        self._window = None if grids is None else (tuple(window), tuple(window_stride))
        self.framed, self.windowed = bool(frame_tokens or frame_tokens_of is not None), grids is not None

    def shared(self, o, lse) -> tuple:
        return packed(self.q, self.k, self.v, o, lse, *self.indices, *self._rest)

    def lengths(self) -> tuple[int, int, int]:
        segments = max(self.indices[0].shape[0] - 1, 1)
        return segments, -(-self.q.shape[0] // segments), -(-self.k.shape[0] // segments)

    def slots(self) -> tuple[int, int]:
        return self.q.shape[1], self.q.shape[0] // HOPPER_MET + self.indices[0].shape[0]

    def cut(self, own: int, met: int, keys: bool = False, across: int = 1) -> tuple[tuple, Tensor]:
        cu_q, cu_k, _, grids = self.indices
        cu, cu_other, rows = (cu_k, cu_q, self.k.shape[0]) if keys else (cu_q, cu_k, self.q.shape[0])
        tiles, sides = -(-rows // own), (0, 0, 0)
        programs, of_own, of_met = tiles + cu.shape[0], _line(own), _line(met)
        if self._window is not None:
            sides, stride = self._window
            of_own, of_met = bricks(sides, stride, own, met, keys, across)
            programs += tiles  # only the device knows how many bricks there are: programs may take several
        plan = cu.new_empty((2, cu.shape[0] + 1))
        pointers = (pointer(plan), pointer(cu), pointer(cu_other), pointer(grids))
        arguments = (*pointers, cu.shape[0] - 1, rows, sides, of_own)
        launch("attention_plan", self.op, self.q, arguments, (cu, cu_other, grids), (plan,))
        return (pointer(plan), programs, of_own, of_met), plan


# ---- forward ------------------------------------------------------------------------------------------------
def _forward(Call, q, *rest):
    *batch, tokens, heads, _ = q.shape
    o = empty(q)
    lse = torch.empty((*batch, heads, tokens), dtype=torch.float32, device=q.device)
    if o.numel():
        call = Call(q, *rest)
        wgmma = _wgmma_refusal(call.q, call.k, call.v) is None
        cut, plan = call.cut(QUERIES, HOPPER_KEYS, across=HOPPER_ACROSS) if wgmma else call.cut(QUERIES, KEYS)
        reads = (call.q, call.k, call.v, *call.indices, plan)
        entry = "attention_forward_hopper" if wgmma else "attention_forward"
        launch(entry, call.op, call.q, (call.shared(o, lse), cut), reads, (o, lse))
    return o, lse


attention = partial(_forward, _Dense)
attention_varlen = partial(_forward, _Packed)


# ---- backward -----------------------------------------------------------------------------------------------
def _one_pass(call, op, shared, given, do, rows, grads) -> None:
    planes, slots = call.slots()
    bricks = 0 if grads[0] is None else planes * slots
    sums = rows.new_empty((bricks, HOPPER_MET * _width(call)))
    counters = torch.zeros(1 + bricks, dtype=torch.int32, device=rows.device)
    cut, plan = call.cut(HOPPER_OWN, HOPPER_MET, True, HOPPER_ACROSS)
    one = pointer(sums), pointer(counters), slots, _together(call)
    reads = (call.q, call.k, call.v, do, rows, *call.indices, plan, counters)
    arguments = (shared, given, pointer(rows), cut, one)
    launch("attention_backward_one_pass_hopper", op, call.q, arguments, reads, (*grads, sums, counters))


def _backward(Call, do, dlse, q, k, v, *rest):
    """Beside the gradients 8 bytes a query row are allocated, for its statistics; in one pass also 4 a value of dq, of
    heads as wide as they are run and segments of a multiple of 64 tokens."""
    *facts, o, lse, needs = rest
    dq, dk, dv = grads = [empty(t) if need else None for t, need in zip((q, k, v), needs, strict=True)]
    if q.numel() == 0 or k.numel() == 0 or (do is None and dlse is None):
        return tuple(None if g is None else g.zero_() for g in grads)
    call = Call(q, k, v, *facts)
    op = f"{call.op}_backward"
    do = torch.zeros_like(o) if do is None else _fit(rows_contiguous(do))
    o, lse = _fit(o.contiguous()), lse.contiguous()
    shared = call.shared(o, lse)
    given = (given_o(do), given_lse(dlse), *(given_o(g) for g in grads))
    rows = torch.empty((2, *lse.shape), dtype=torch.float32, device=q.device)
    launch("attention_backward_rows", op, q, (shared, given, pointer(rows)), (do, dlse, o, lse), (rows,))
    wgmma = _wgmma_refusal(call.q, call.k, call.v, do) is None
    if wgmma and _two_passes(call) is None:
        _one_pass(call, op, shared, given, do, rows, grads)
        return tuple(grads)
    suffix, sizes = ("_hopper", (HOPPER_OWN, HOPPER_MET)) if wgmma else ("", (TILE, TILE))
    for entry, made, keys in (("keys", (dk, dv), True), ("queries", (dq,), False)):
        if any(g is not None for g in made):
            cut, plan = call.cut(*sizes, keys, HOPPER_ACROSS if wgmma else 1)
            reads = (call.q, call.k, call.v, do, rows, *call.indices, plan)
            arguments = (shared, given, pointer(rows), cut)
            launch(f"attention_backward_{entry}{suffix}", op, q, arguments, reads, made)
    return tuple(grads)


attention_backward = partial(_backward, _Dense)
attention_varlen_backward = partial(_backward, _Packed)


# ---- merge --------------------------------------------------------------------------------------------------
merge_attention, merge_attention_backward = merges(launch)


def register() -> None:
    for name, Call in (("attention", _Dense), ("attention_varlen", _Packed)):
        path = partial(_path, Call)
        _register(Impl(name, "cuda", _supports, globals()[name], globals()[f"{name}_backward"], path=path))
    _register(Impl("merge_attention", "cuda", lambda o1, *_: unfit(o1), merge_attention, merge_attention_backward))
