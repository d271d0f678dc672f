"""conv on the CPU kernels (csrc/cpu/conv.cpp), with a cache of packed weights."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from itertools import takewhile

import torch

from ... import _cpu
from ...reference.conv import NORM_EPS, TILES_CHANNELS, misfit, output_shape
from .._video import empty, next_cache_backward
from ..registry import Impl, register as _register
from ._abi import DTYPE, on_cpu, pointer

_PAD = {"zeros": 0, "first": 1, "replicate": 1, "reflect": 2}
_NORM = {None: 0, "channel_l2": 1, "channel_rms": 2, "group": 3}
_WINOGRAD = {"direct": 0, "winograd": 1, "winograd2d": 2}
_TILES_PIXELS = 36
_NO_STRIDE = (0, 0, 0, 0, 0)


class _Entry:
    """What is known of one weight. packed is None where there was no room: its place in the order still counts."""

    __slots__ = ("digest", "packed", "storage")

    def __init__(self, digest, packed, storage) -> None:
        self.digest, self.packed, self.storage = digest, packed, storage

    @property
    def nbytes(self) -> int:
        return 0 if self.packed is None else self.packed.numel()


class PackedWeights:
    """Weights in the kernels' layout, kept while the memory they were packed from lives and holds the same bytes.

    Neither a version counter nor an address shows every edit (`p.data.mul_()`, LoRA merges, optimizers outside torch),
    so each use compares a 128-bit digest of the bytes (16 MiB: 0.3 ms on 2 cores, against 3-4 ms to pack them).
    An entry goes when its weight's storage is freed. At most `limit` bytes are kept, by default a quarter of the
    machine's memory: beyond, a weight takes the room of those that were not used since its own last use. So a model of
    more than the limit, which goes round, finds what fits of it, where the least recently used would find nothing; and
    a model that is no longer called gives way in the second round of another.
    """

    def __init__(self, limit: int | None = None) -> None:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        self.limit = max(1 << 30, memory // 4) if limit is None else limit
        self.bytes = 0
        self._entries: OrderedDict[tuple, _Entry] = OrderedDict()  # the least recently used first
        self._lock = threading.RLock()  # a storage may die, and call _drop, while this thread holds it

    def __len__(self) -> int:
        """How many weights are kept."""
        with self._lock:
            return sum(entry.packed is not None for entry in self._entries.values())

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.bytes = 0

    def get(self, weight: torch.Tensor, dtype: torch.dtype, winograd: int) -> torch.Tensor:
        if weight.numel() != 1 + sum((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True)):
            return pack(weight, dtype, winograd)  # a view with holes: its bytes are not one run
        key = (weight.data_ptr(), *weight.shape, *weight.stride(), weight.dtype, dtype, winograd, _cpu.isa())
        digest = _cpu.conv_hash(weight.data_ptr(), weight.numel() * weight.element_size(), torch.get_num_threads())
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.packed is not None and entry.digest == digest:
                self._entries.move_to_end(key)
                return entry.packed
        packed = pack(weight, dtype, winograd)
        storage = weakref.ref(weight.untyped_storage(), lambda dead: self._drop(key, dead))
        with self._lock:
            older = self._older(key)
            self._remove(key)
            entry = self._entries[key] = _Entry(digest, None, storage)
            if self._make_room(packed.numel(), older):
                entry.packed = packed
                self.bytes += packed.numel()
        return packed

    def _older(self, key: tuple) -> list[_Entry]:
        """Those that were not used since this one was, the longest unused first; none where it is new."""
        if key not in self._entries:
            return []
        known = list(self._entries.items())  # a copy: a storage may die on the way
        return [entry for _, entry in takewhile(lambda item: item[0] != key, known)]

    def _make_room(self, nbytes: int, candidates: list[_Entry]) -> bool:
        """Lets go of the first candidates, if that makes room for nbytes."""
        free, leaving = self.limit - self.bytes, []
        for entry in candidates:
            if free >= nbytes:
                break
            if entry.packed is not None:
                leaving.append(entry)
                free += entry.nbytes
        if free < nbytes:
            return False
        for entry in leaving:
            self._let_go(entry)
        return True

    def _let_go(self, entry: _Entry) -> None:
        self.bytes -= entry.nbytes
        entry.packed = None

    def _remove(self, key: tuple) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._let_go(entry)

    def _drop(self, key: tuple, dead: weakref.ref) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.storage is dead:
                self._remove(key)


packed_weights = PackedWeights()


def pack(weight: torch.Tensor, dtype: torch.dtype, winograd: int) -> torch.Tensor:
    return pack_strided(weight, weight.data_ptr(), weight.shape, weight.stride(), dtype, winograd)


def pack_strided(weight, address: int, shape, stride, dtype: torch.dtype, winograd: int) -> torch.Tensor:
    """Packs the (Cout, Cin, kt, kh, kw) weight that lies at `address` in weight's memory; strides may be negative."""
    size = _cpu.conv_pack_bytes(*shape[:2], shape[2:], winograd, DTYPE[dtype])
    packed = torch.empty(size, dtype=torch.uint8)
    _cpu.conv_pack(
        address, packed.data_ptr(), *shape[:2], shape[2:], stride,
        winograd, DTYPE[weight.dtype], DTYPE[dtype], torch.get_num_threads(),
    )  # fmt: skip
    return packed


def _stride(t):
    return _NO_STRIDE if t is None else t.stride()


def _code(t):
    return 0 if t is None else DTYPE[t.dtype]


def winograd_code(
    algo: str, dtype: torch.dtype, weight_shape: tuple, stride: tuple, dilation: tuple, pixels: int
) -> int:
    """Winograd of csrc/include/fastdit/conv.h for this many pixels a frame.

    Auto: where products are formed in fp32; tiles where there are channels enough to pay for their transform and pixels
    enough to fill a register tile and to pay for the larger weights. Never by the number of frames: chunked == whole.
    """
    if algo != "auto":
        return _WINOGRAD[algo]
    rounds = dtype == torch.bfloat16 and _cpu.isa() == "avx512_bf16"  # transformed values, before their product
    if rounds or dtype == torch.float64:
        return _WINOGRAD["direct"]
    tiles = min(weight_shape[:2]) >= TILES_CHANNELS and pixels >= _TILES_PIXELS
    for name in ("winograd2d", "winograd") if tiles else ("winograd",):
        if not misfit(name, weight_shape, stride, dilation):
            return _WINOGRAD[name]
    return _WINOGRAD["direct"]


def _geometry(x, weight, norm_weight, stride, dilation, padding, time_pad, space_pad, norm, norm_eps, act, winograd):
    return (
        weight.shape[2:], stride, dilation, (1, 1), padding[::2], _PAD[time_pad], _PAD[space_pad],
        _NORM[norm], norm_eps, act == "silu", winograd, DTYPE[x.dtype], _code(norm_weight), torch.get_num_threads(),
    )  # fmt: skip


def causal_conv3d(
    x, weight, bias, cache, norm_weight, residual,
    stride, dilation, padding, time_pad, space_pad, norm, norm_eps, act, algo,
):  # fmt: skip
    shape = output_shape(x.shape, weight.shape, stride, dilation, padding)
    y = empty(x, shape)
    if y.numel():
        winograd = winograd_code(algo, x.dtype, weight.shape, stride, dilation, shape[3] * shape[4])
        packed = packed_weights.get(weight, x.dtype, winograd)
        _cpu.conv_forward(
            _geometry(
                x, weight, norm_weight, stride, dilation, padding, time_pad, space_pad, norm, norm_eps, act, winograd
            ),
            x.data_ptr(), pointer(cache), packed.data_ptr(), pointer(bias), pointer(norm_weight), pointer(residual),
            y.data_ptr(), x.shape, shape, 0 if cache is None else cache.shape[2],
            x.stride(), _stride(cache), y.stride(), _stride(residual), _code(bias), False, False,
        )  # fmt: skip
    return y


def next_cache(x, cache, k_t):
    new = min(k_t - 1, x.shape[2])
    old = 0 if cache is None else min(k_t - 1 - new, cache.shape[2])
    shape = (*x.shape[:2], old + new, *x.shape[3:])
    out = empty(x, shape)
    if old:
        out[:, :, :old].copy_(cache[:, :, cache.shape[2] - old :])
    if new:
        out[:, :, old:].copy_(x[:, :, x.shape[2] - new :])
    return out


def norm_silu(x, weight, bias, norm, groups, eps):
    y = empty(x)
    if y.numel():
        # (B, C), (B, C, L) and (B, C, H, W) as (B, C, 1, ..., W)
        shape = (*x.shape[:2], *[1] * (5 - x.dim()), *x.shape[2:])
        _cpu.norm_silu_forward(
            x.data_ptr(), pointer(weight), pointer(bias), y.data_ptr(), shape, _five(x), _five(y),
            groups, _NORM[norm], NORM_EPS[norm] if eps is None else eps,
            DTYPE[x.dtype], _code(weight), _code(bias), torch.get_num_threads(),
        )  # fmt: skip
    return y


def _five(t):
    stride = t.stride()
    return (*stride[:2], *[0] * (5 - len(stride)), *stride[2:])


def register() -> None:
    from . import conv_backward  # which needs what is defined here

    _register(Impl("causal_conv3d", "cpu", _supports, causal_conv3d, conv_backward.causal_conv3d_backward))
    _register(Impl("next_cache", "cpu", _supports, next_cache, next_cache_backward))
    _register(Impl("norm_silu", "cpu", _supports, norm_silu, conv_backward.norm_silu_backward))


def _supports(x, *_):
    return on_cpu(x)
