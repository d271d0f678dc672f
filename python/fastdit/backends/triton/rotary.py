"""rotary on the Triton kernels (kernels/rotary.py): tensors to strides, layouts to constants.

Launches: one for q and k, in place or not; one more before it where the grids of a pack want their running totals.
Bytes: 2 * N * (Hq + Hk) * D * itemsize and one reading of the table; about 8 FLOPs an element.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fastdit.kernels import rotary as kernels, rotary_table
from fastdit.kernels.rotary import Law
from fastdit.kernels.rotary_table import Head, Side

from .._facts import kept
from .._tensors import contiguous, empty
from ..reference import rotary as reference
from ..registry import Impl, register as _register
from ._config import Config, choose, tunable
from ._launch import Launch, launch, unfit
from ._tiles import alignment, power

WIDEST = 1 << 15  # channels that share a statistic: a row stays in registers
_END = (1 << 31) - 1  # where a slice ends that has no end of its own
_NO_AXES = (None,) * 8


def supports(q, k, *args):
    reason = unfit(q)
    if reason is not None:
        return reason
    heads = max(q.shape[-2], k.shape[-2]) if args[16] == "hidden" else 1
    if heads * q.shape[-1] > WIDEST:
        return f"has no kernel for a norm over more than {WIDEST} channels"
    for t in args[:14]:
        if t is not None and t.dtype == torch.float64:
            return "has no kernel for parameters or tables in float64"
    return None


# ---- static facts -> constants --------------------------------------------------------------------------------
def vector(dtype: torch.dtype) -> int:
    """Elements of 16 bytes."""
    return 16 // dtype.itemsize


def tile(dtype: torch.dtype, D: int, Hq: int, Hk: int, hidden: bool, halves: bool, held: int = 96) -> Config:
    """(BT, HB, MOST): 16 bytes per thread and load; the HB that pads H least; at most MOST chunks in a program.

    halves: the channels of a head come in two loads. held: elements that a thread may hold.
    """
    load = power((D + 1) // 2) * (1 if halves else 2)  # channels of a head that one load brings
    lane = vector(dtype)
    heads = max(Hq, Hk, 1)
    per_chunk = lane * (2 if halves else 1)
    most = held // per_chunk

    def chunks(HB: int) -> int:
        return -(-Hq // HB) - (-Hk // HB)

    blocks = [1 << n for n in range(heads.bit_length() + 1) if 1 << n <= power(heads)]
    fits = [HB for HB in blocks if HB == 1 or HB * load <= 128 * lane]
    if hidden:  # all heads at once, whatever that takes
        fits = [HB for HB in fits if chunks(HB) <= most] or [next((b for b in blocks if chunks(b) <= most), blocks[-1])]
    HB = min(fits, key=lambda HB: chunks(HB) * (HB + 0.25))
    BT = max(1, 128 * lane // (HB * load))
    return Config((BT, HB, most), min(max(BT * HB * load // (32 * lane), 1), 16), 1)


tunable(
    "qk_norm_rope",
    *(Config((BT, HB, 12), warps, 1) for BT, HB, warps in ((1, 4, 2), (1, 8, 4), (1, 16, 8), (2, 4, 4), (2, 8, 8))),
    *(Config((BT, HB, 6), warps, 1) for BT, HB, warps in ((1, 8, 2), (1, 16, 4), (2, 8, 4))),
)


class Facts(NamedTuple):
    """All that decides the constants of a launch, beside its configuration."""

    dtype: torch.dtype
    D: int
    Hq: int
    Hk: int
    layout: str
    sections: tuple[int, ...]
    q_table: tuple  # TABLE, PER_HEAD, UNIT, ROUND
    k_table: tuple
    norm: str | None
    hidden: bool
    native: bool


@functools.lru_cache(maxsize=4096)
def head_of(facts: Facts) -> Head:
    D, grain = facts.D, vector(facts.dtype)
    w0, w1, w2 = (*facts.sections, 0, 0, 0)[:3]
    pairs = w0 + w1 + w2
    starts = (w0, w1, w2) if facts.layout == "axis_half" else (pairs,)
    if any(w % grain for w in starts) or (D - 2 * pairs) % (2 * grain):
        grain = 1
    return Head(D, power((D + 1) // 2), facts.layout if pairs else "interleaved", w0, w1, w2, grain)


@functools.lru_cache(maxsize=4096)
def constants(facts: Facts, config: Config, together: bool) -> tuple[tuple, int]:
    """(BT, HB, HEAD, QS, KS, LAW), and how many groups of heads there are."""
    BT, HB, most = config.blocks
    q_chunks, k_chunks = (max(1, -(-H // HB)) for H in (facts.Hq, facts.Hk))
    groups = 1
    if not facts.hidden:
        held = q_chunks + k_chunks if together else max(q_chunks, k_chunks)
        least = -(-held // most)
        even = (g for g in range(least, 2 * least + 1) if q_chunks % g == 0 and k_chunks % g == 0)
        groups = next(even, least)
        q_chunks, k_chunks = -(-q_chunks // groups), -(-k_chunks // groups)
    QS, KS = Side(facts.Hq, q_chunks, *facts.q_table), Side(facts.Hk, k_chunks, *facts.k_table)
    return (BT, HB, head_of(facts), QS, KS, Law(facts.norm, facts.hidden, facts.native)), groups


def configuration(kernel: str, q, facts: Facts, default=lambda arch, *key: tile(*key)) -> Config:
    halves = facts.layout != "interleaved" and bool(facts.sections)
    key = (facts.dtype, facts.D, facts.Hq, facts.Hk, facts.hidden, halves)
    return choose(kernel, q, key, lambda arch: default(arch, *key))


def one_side(facts: Facts) -> Facts:
    """The kernel that serves q or k alone has no code of its own for the other, which is empty or absent."""
    H = max(facts.Hq, facts.Hk)
    return facts._replace(Hq=H, Hk=H)


# ---- tensors -> pointers and strides --------------------------------------------------------------------------
def strides(x):
    """(batch, token, head); 0 where there is one."""
    shape, stride = x.shape, x.stride()
    if len(shape) == 3:
        return 0, stride[0] if shape[0] > 1 else 0, stride[1] if shape[1] > 1 else 0
    return tuple([s if n > 1 else 0 for n, s in zip(shape[:3], stride, strict=False)])


def contiguous_strides(x):
    """`strides` of a contiguous tensor of x's shape."""
    *batch, tokens, heads, channels = x.shape
    token = heads * channels
    steps = (tokens * token if batch and batch[0] > 1 else 0, token, channels)
    return steps[0], steps[1] if tokens > 1 else 0, steps[2] if heads > 1 else 0


def alike(cos, sin):
    """cos and sin in one layout."""
    return (cos, sin) if cos is None or cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())


def table(cos, x):
    """Kind of the table for the constants; its strides, from sample to pair."""
    if cos is None:
        return (None, False, True, False), (0, 0, 0, 0)
    steps = [s if n > 1 else 0 for n, s in zip(cos.shape, cos.stride(), strict=True)]
    steps[-1] = cos.stride(-1)
    if len(steps) == 2:
        steps.insert(1, 0)
    if len(steps) == 3:
        steps.insert(0, 0)
    rounds = cos.dtype == x.dtype != torch.float32
    return ("dense", steps[2] != 0, steps[3] == 1, rounds), tuple(steps)


def axes(tables, grids, dtype: torch.dtype):
    """Widths and kind for the constants; the numbers of the kernels' `axes`."""
    segments, count = grids.shape
    widths = tuple([t.shape[1] for t in tables[: 2 * count : 2]])
    sizes = [t.shape[0] if t is not None else 0 for t in tables[::2]]
    kind = ("axes" if segments else None, False, True, tables[0].dtype == dtype != torch.float32)
    return widths, kind, (*sizes, segments, segments.bit_length())


def axes_tensors(tables, grids, packed: bool):
    """The pointers of the kernels' `axes`: six tables, the grids and, of several in a pack, where each one ends."""
    tables = [contiguous(t) for t in tables]
    grids = grids.contiguous()
    segments, count = grids.shape
    ends = None
    if packed and segments > 1:
        ends = torch.empty(segments, dtype=torch.int32, device=grids.device)
        launch(rotary_table.segment_ends, (1, 1, 1), (grids, ends), (segments,), (count, 128))
    return (*tables, grids, ends)


def table_tensors(q, cos, sin, k_cos, k_sin, *compact):
    """All pointers to tables: of q, of k, of the axes; compact: the axes' six tables and the grids."""
    own = alike(cos, sin)
    keys = own if k_cos is None else alike(k_cos, k_sin)
    return *own, *keys, *(_NO_AXES if compact[6] is None else axes_tensors(compact[:6], compact[6], q.dim() == 3))


def described(q, k, cos, k_cos, compact, norm, scope, eps, layout, rope_start, rope_len, precision):
    """Facts; the strides of q's table and of k's; the numbers of the axes; (start, stop, eps).

    cos, k_cos: as `table_tensors` gives them, k_cos None where k reads q's.
    """
    q_kind, q_steps = table(cos, q)
    k_kind, k_steps = table(cos if k_cos is None else k_cos, k)
    numbers: tuple = (0,) * 5
    sections: tuple[int, ...] = ()
    if compact[6] is not None:
        sections, q_kind, numbers = axes(compact[:6], compact[6], q.dtype)
        if k_cos is None:
            k_kind = q_kind
    elif cos is not None or k_cos is not None:
        pairs = (k_cos if cos is None else cos).shape[-1]
        sections = (pairs // 3,) * 3 if layout == "axis_half" else (pairs,)
    stop = _END if rope_len is None else rope_start + rope_len
    native = precision == "native" and q.dtype != torch.float32
    shape = (q.dtype, q.shape[-1], q.shape[-2], k.shape[-2])
    facts = Facts(*shape, layout, sections, q_kind, k_kind, norm, scope == "hidden", native)
    return facts, q_steps, k_steps, numbers, (rope_start, stop, eps)


def counted(q, k) -> tuple[int, int, int]:
    """Samples, tokens of q and of k."""
    return (1, q.shape[0], k.shape[0]) if q.dim() == 3 else (q.shape[0], q.shape[1], k.shape[1])


# ---- forward --------------------------------------------------------------------------------------------------
@kept
def _plan(q, k, inplace, cos, k_cos, *rest) -> Launch:
    q_any, k_any = q.numel() > 0, k.numel() > 0
    facts, q_steps, k_steps, axes_numbers, last = described(q, k, cos, k_cos, rest[:7], *rest[7:])
    batch, q_tokens, k_tokens = counted(q, k)
    together = q_any and k_any and q_tokens == k_tokens and k_cos is None
    config = configuration("qk_norm_rope", q, facts)
    if not (q_any and k_any):
        facts = one_side(facts)
    fixed, groups = constants(facts, config, together)
    BT = fixed[0]
    q_tiles = -(-batch * q_tokens // BT) if q_any else 0
    k_tiles = -(-batch * k_tokens // BT) if k_any and not together else 0
    written = strides if inplace else contiguous_strides
    steps = (*strides(q), *strides(k), *written(q), *written(k))
    return Launch(
        kernels.qk_norm_rope,
        (q_tiles + k_tiles, groups, 1),
        (batch, q_tokens, k_tokens, q_tiles, *steps, *q_steps, *k_steps, *axes_numbers, *last),
        (*fixed, together, alignment(q.element_size(), *steps), alignment(4, *q_steps[:3], *k_steps[:3])),
        config.warps,
        config.stages,
    )


def _forward(
    q, k, q_out, k_out, q_weight, k_weight, q_bias, k_bias, cos, sin, k_cos, k_sin,
    cos_t, sin_t, cos_h, sin_h, cos_w, sin_w, grids, *options,
):  # fmt: skip
    compact = (cos_t, sin_t, cos_h, sin_h, cos_w, sin_w, grids)
    tables = table_tensors(q, cos, sin, k_cos, k_sin, *compact)
    plan = _plan(q, k, q_out is q, tables[0], None if k_cos is None else tables[2], *compact, *options)
    plan(q, k, q_out, k_out, q_weight, k_weight, q_bias, k_bias, *tables)


def qk_norm_rope(q, k, *args):
    q_out, k_out = empty(q), empty(k)
    if q.numel() or k.numel():
        _forward(q, k, q_out, k_out, *args)
    return q_out, k_out


def qk_norm_rope_(q, k, *args):
    if q.numel() or k.numel():
        _forward(q, k, q, k, *args)


def register() -> None:
    from .rotary_backward import qk_norm_rope_backward

    _register(Impl("qk_norm_rope", "triton", supports, qk_norm_rope, qk_norm_rope_backward))
    _register(Impl("qk_norm_rope_", "triton", supports, qk_norm_rope_, reference.no_backward))
