"""attention and attention_varlen on FlashAttention: arguments by name, as each version publishes them.

flash_attn_interface (3)   sm_90                 lse with return_attn_probs, or always in older builds
flash_attn.cute      (4)   sm_90, 100, 110, 120  lse with return_lse, and its gradient
flash_attn           (2)   sm_80 and later       lse third of three with return_attn_probs; +inf without keys
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from typing import NamedTuple

from .. import _external as external
from ..reference._vjp import vjp
from ..registry import Impl, register as _register


class Library(NamedTuple):
    module: str
    file: str  # inside the package's folder; the package itself is not imported to be found
    cards: tuple[int, ...]  # major compute capabilities
    lse_option: str
    lse_gradient: bool
    backward: bool


LIBRARIES = (
    Library("flash_attn_interface", "", (9,), "return_attn_probs", False, True),
    Library("fa3_fwd_interface", "", (9,), "return_attn_probs", False, False),
    Library("flash_attn.cute", "cute", (9, 10, 11, 12), "return_lse", True, True),
    Library("flash_attn", "flash_attn_interface.py", (8, 9, 10, 11, 12), "return_attn_probs", False, True),
)


@functools.lru_cache(maxsize=1)
def installed() -> tuple[Library, ...]:
    """The libraries that can be found, best first."""
    found = []
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library.module.split(".")[0])
        if spec is None:
            continue
        folders = list(spec.submodule_search_locations or ())
        if not library.file or any(os.path.exists(os.path.join(f, library.file)) for f in folders):
            found.append(library)
    return tuple(found)


@functools.lru_cache(maxsize=8)
def _function(library: Library, name: str):
    """A function of the library, and whether its lse has to be asked for."""
    function = getattr(importlib.import_module(library.module), name)
    return function, library.lse_option in inspect.signature(function).parameters


def _widest(library: Library, card: int) -> int:
    return 128 if library.module == "flash_attn.cute" and card >= 10 else 256


def _choose(q, k, v, return_lse) -> tuple[Library | None, str]:
    """The library for this call, or every reason why there is none."""
    card = external.capability(q)
    if card is None:
        return None, f"needs an NVIDIA GPU; got {q.device}"
    reasons = []
    for library in installed():
        if card[0] not in library.cards:
            reason: str | None = f"{library.module} has no kernels for sm_{card[0]}{card[1]}"
        elif not library.backward and external.wants_gradient(q, k, v):
            reason = f"{library.module} has no backward"
        elif return_lse and not library.lse_gradient and external.wants_gradient(q, k, v):
            reason = f"{library.module} gives lse no gradient"
        else:
            reason = external.refuse_inputs(q, _widest(library, card[0]), library.module)
        if reason is None:
            return library, ""
        reasons.append(reason)
    return None, ", ".join(reasons) or "no library is installed"


def supports(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic):
    masks = external.refuse_masks(kv_len, frame_tokens_of, frame_tokens, None)
    return masks or _choose(q, k, v, return_lse)[1] or None


def supports_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic,
):  # fmt: skip
    masks = external.refuse_masks(None, frame_tokens_of, frame_tokens, grids)
    return masks or _choose(q, k, v, return_lse)[1] or None


def _call(name, q, k, v, return_lse, **kwargs):
    library, reason = _choose(q, k, v, return_lse)
    if library is None:
        raise RuntimeError(f"flash_attn: {reason}")
    function, asks = _function(library, name)
    if asks:
        kwargs[library.lse_option] = True
    return function(q, k, v, **kwargs)[:2]


def attention(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic):
    if q.numel() == 0 or k.shape[1] == 0:
        return external.without_keys(q)
    options = dict(softmax_scale=scale, deterministic=deterministic)
    o, lse = _call("flash_attn_func", q, k, v, return_lse, **options)
    return external.converted(o, lse)


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic,
):  # fmt: skip
    if q.numel() == 0 or k.shape[0] == 0:
        return external.without_keys(q)
    lengths = dict(
        cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k
    )
    options = dict(softmax_scale=scale, deterministic=deterministic)
    o, lse = _call("flash_attn_varlen_func", q, k, v, return_lse, **lengths, **options)
    return external.converted(o, lse, cu_seqlens_q)


attention_backward = vjp(attention, wrt=range(3), outputs=2, saved=2)
_varlen_backward = vjp(attention_varlen, wrt=range(3), outputs=2, saved=2)


def attention_varlen_backward(do, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, *rest):
    grads = _varlen_backward(do, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, *rest)
    return external.cleared(grads, (q, k, v), (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k))


def register() -> None:
    _register(Impl("attention", "flash_attn", supports, attention, attention_backward))
    _register(Impl("attention_varlen", "flash_attn", supports_varlen, attention_varlen, attention_varlen_backward))
