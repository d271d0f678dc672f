"""Dense attention by torch's SDPA: no masks, whose path there is quadratic in memory and lets padded NaN through."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

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


def register() -> None:
    _register(Impl("attention", "sdpa", supports, attention, attention_backward, deterministic=False))
