"""What other people's attention kernels need to keep fastdit's contract: lse, rows outside the segments, gradients.

They know no masks but causal ones and sliding windows, and read the rows next to a segment: those must be finite.
Their backward is reached through their own autograd, so it computes the forward again.
"""

from __future__ import annotations

import math

import torch


def capability(q) -> tuple[int, int] | None:
    """Compute capability of q's card; None off CUDA."""
    return torch.cuda.get_device_capability(q.device) if q.is_cuda and torch.version.hip is None else None


def refuse_masks(kv_len, frame_tokens_of, frame_tokens, grids) -> str | None:
    if kv_len is not None:
        return "has no kv_len; pack the batch and call attention_varlen"
    if frame_tokens_of is not None or not (isinstance(frame_tokens, int) and frame_tokens == 0):
        return "has no frame_tokens"
    if grids is not None:
        return "has no 3-D window"
    return None


def refuse_inputs(q, widest: int, what: str) -> str | None:
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{what} computes float16 and bfloat16; got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > widest:
        return f"{what} has head dims that are multiples of 8 up to {widest}; got {q.shape[-1]}"
    return None


def wants_gradient(*tensors) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def without_keys(q):
    """o and lse where there is nothing to compute."""
    *batch, tokens, heads, _ = q.shape
    lse = torch.full((*batch, heads, tokens), -math.inf, dtype=torch.float32, device=q.device)
    return torch.zeros(q.shape, dtype=q.dtype, device=q.device), lse


def converted(o, lse, cu_seqlens=None):
    """o contiguous; lse natural, fp32, -inf where a row has no keys (they say +inf), which also gives o = 0.

    cu_seqlens: rows beyond its end belong to no segment and were never written.
    """
    empty = lse == math.inf
    lse = lse.float().masked_fill(empty, -math.inf)
    if cu_seqlens is not None:
        out = outside(o, cu_seqlens)
        o, lse = o.masked_fill(out[:, None, None], 0), lse.masked_fill(out, -math.inf)
    return o.contiguous(), lse.contiguous()


def outside(t, cu_seqlens):
    """Which rows of a packed tensor lie beyond the last segment; without a look at the numbers."""
    return torch.arange(t.shape[0], device=t.device) >= cu_seqlens[-1]


def cleared(grads, tensors, bounds):
    """Gradients with zeros in the rows that no segment holds."""
    return tuple(
        None if g is None else g.masked_fill(outside(t, cu)[:, None, None], 0).contiguous()
        for g, t, cu in zip(grads, tensors, bounds, strict=True)
    )
