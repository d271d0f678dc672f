"""Dense attention by torch's SDPA: no masks, whose path there is quadratic in memory and lets padded NaN through.

Packed attention on CUDA by torch.nn.attention.varlen, which is the FlashAttention-2 that torch carries.
"""

from __future__ import annotations

import functools
import inspect
import math

import torch
import torch.nn.functional as F

from .. import _external as external
from ..reference._vjp import vjp
from ..registry import Impl, register as _register


def supports(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic):
    if kv_len is not None:
        return "has no kv_len without a dense mask"
    if frame_tokens_of is not None or not (isinstance(frame_tokens, int) and frame_tokens == 0):
        return "has no frame_tokens without a dense mask"
    if return_lse:
        return "does not return lse"
    if deterministic and q.device.type == "cuda":
        return "has no deterministic backward of its own on CUDA"
    return None


def attention(q, k, v, kv_len, frame_tokens_of, frame_tokens, scale, return_lse, deterministic):
    qt, kt, vt = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(qt, kt, vt, scale=scale, enable_gqa=q.shape[2] != k.shape[2])
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), math.nan, dtype=wide)  # not asked for, never read
    return o.transpose(1, 2).contiguous(), lse


_recompute = vjp(attention, wrt=range(3), outputs=2, saved=2)


def attention_backward(do, dlse, *rest):
    return _recompute(do, None, *rest)


# ---- packed ---------------------------------------------------------------------------------------------------
@functools.lru_cache(maxsize=1)
def _varlen():
    """torch's function and the names of its parameters; None where this torch has none."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return varlen, frozenset(inspect.signature(varlen.varlen_attn).parameters)


def supports_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic,
):  # fmt: skip
    card, found = external.capability(q), _varlen()
    if card is None:
        return f"needs an NVIDIA GPU; got {q.device}"
    if found is None or not {"scale", "return_aux"} <= found[1]:
        return "needs torch.nn.attention.varlen with scale and return_aux; update torch"
    if card[0] < 8:
        return f"torch.nn.attention.varlen needs sm_80; got sm_{card[0]}{card[1]}"
    if q.shape[1] != k.shape[1] and "enable_gqa" not in found[1]:
        return "torch.nn.attention.varlen of this version has no grouped queries"
    if deterministic:
        return "has no deterministic backward of its own on CUDA"
    if return_lse and external.wants_gradient(q, k, v):
        return "torch.nn.attention.varlen gives lse no gradient"
    masks = external.refuse_masks(None, frame_tokens_of, frame_tokens, grids)
    return masks or external.refuse_inputs(q, 256, "torch.nn.attention.varlen")


def attention_varlen(
    q, k, v, cu_seqlens_q, cu_seqlens_k, frame_tokens_of, grids, max_seqlen_q, max_seqlen_k, frame_tokens,
    window, window_stride, scale, return_lse, deterministic,
):  # fmt: skip
    if q.numel() == 0 or k.shape[0] == 0:
        return external.without_keys(q)
    varlen, names = _varlen()
    options = dict(scale=scale, return_aux=varlen.AuxRequest(lse=True))
    if "enable_gqa" in names:
        options["enable_gqa"] = q.shape[1] != k.shape[1]
    o, lse = varlen.varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options)
    if lse.shape != (q.shape[1], q.shape[0]):  # its page says (tokens, heads), its kernels (heads, tokens)
        lse = lse.transpose(0, 1)
    return external.converted(o, lse, cu_seqlens_q)


_varlen_again = vjp(attention_varlen, wrt=range(3), outputs=2, saved=2)


def attention_varlen_backward(do, dlse, q, k, v, cu_seqlens_q, cu_seqlens_k, *rest):
    grads = _varlen_again(do, None, q, k, v, cu_seqlens_q, cu_seqlens_k, *rest)
    return external.cleared(grads, (q, k, v), (cu_seqlens_q, cu_seqlens_k, cu_seqlens_k))


def register() -> None:
    _register(Impl("attention", "sdpa", supports, attention, attention_backward, deterministic=False))
    backward = attention_varlen_backward
    _register(Impl("attention_varlen", "sdpa", supports_varlen, attention_varlen, backward, deterministic=False))
