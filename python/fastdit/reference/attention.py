"""Scaled dot-product attention, dense and packed, and the merge of two partial results.

    s[i, j] = scale * q[i] . k[j]   over the keys j that query i sees
    lse[i]  = log sum_j exp(s[i, j])
    o[i]    = sum_j exp(s[i, j] - lse[i]) * v[j]

A query without keys gives o = 0 and lse = -inf. lse is float32 (float64 for float64 inputs).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    frame_tokens: int | Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
):
    """q (B, N, H, D), k and v (B, M, Hkv, D) -> o (B, N, H, D)[, lse (B, H, N)]."""
    if kv_len is not None:  # a padded key may hold anything: 0 * NaN would reach every query
        padded = torch.arange(k.shape[1], device=k.device) >= kv_len[:, None]
        k, v = (x.masked_fill(padded[:, :, None, None], 0) for x in (k, v))
    visible = visible_dense(q.shape[1], k.shape[1], kv_len, frame_tokens, q.device)
    o, lse = _attend(q, k, v, visible, default_scale(q, scale))
    return (o, lse) if return_lse else o


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int,
    max_seqlen_k: int | None = None,
    scale: float | None = None,
    frame_tokens: int | Tensor | None = None,
    window: tuple[int, int, int] | None = None,
    window_stride: tuple[int, int, int] = (1, 1, 1),
    grids: Tensor | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
):
    """q (N, H, D), k and v (M, Hkv, D) -> o (N, H, D)[, lse (H, N)]: segments become a padded batch and come back.

    Rows behind the last segment belong to none: o = 0, lse = -inf.
    """
    cu_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    max_k = max_seqlen_q if max_seqlen_k is None else max_seqlen_k
    rows_q, rows_k = padded_rows(cu_seqlens_q, max_seqlen_q, q.shape[0]), padded_rows(cu_k, max_k, k.shape[0])
    lengths = cu_seqlens_q.diff(), cu_k.diff()
    visible = visible_varlen(*lengths, rows_q.shape[1], rows_k.shape[1], frame_tokens, window, window_stride, grids)
    # row N of the zero-extended tensor stands for "no token"
    qp, kp, vp = (F.pad(x, (0, 0, 0, 0, 0, 1))[rows] for x, rows in ((q, rows_q), (k, rows_k), (v, rows_k)))
    o, lse = _attend(qp, kp, vp, visible[:, None], default_scale(q, scale))
    back = _packed_slots(cu_seqlens_q, rows_q.shape[1], q.shape[0])
    o = F.pad(o.flatten(0, 1), (0, 0, 0, 0, 0, 1))[back]
    lse = F.pad(lse.transpose(1, 2).flatten(0, 1), (0, 0, 0, 1), value=-math.inf)[back].t().contiguous()
    return (o, lse) if return_lse else o


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor):
    """Two attentions of the same queries over disjoint keys -> the attention over their union.

    o (B, N, H, D) or (N, H, D) with lse (B, H, N) or (H, N):
        lse = log(exp(lse1) + exp(lse2));   o = exp(lse1 - lse) * o1 + exp(lse2 - lse) * o2
    """
    law = _law(o1)
    top = torch.maximum(lse1, lse2).detach()
    top = torch.where(top == -math.inf, 0.0, top)
    w1, w2 = torch.exp(lse1 - top), torch.exp(lse2 - top)
    empty = w1 + w2 == 0
    total = torch.where(empty, 1.0, w1 + w2)
    lse = torch.where(empty, -math.inf, top + torch.log(total))
    a, b = ((w / total).transpose(-1, -2)[..., None].to(law) for w in (w1, w2))
    return (a * o1.to(law) + b * o2.to(law)).to(o1.dtype), lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dlse: Tensor | None = None,
    scale: float | None = None,
    kv_len: Tensor | None = None,
    frame_tokens: int | Tensor | None = None,
):
    """dq, dk, dv of `attention`, one head at a time: O(N * M) memory, whatever B and H are."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=_law(q), device=x.device) for x in (q, k, v))
    scale = default_scale(q, scale)
    for b in range(q.shape[0]):
        m = k.shape[1] if kv_len is None else int(kv_len[b])
        frames = frame_tokens[b] if isinstance(frame_tokens, Tensor) else frame_tokens
        visible = visible_dense(q.shape[1], k.shape[1], None, frames, q.device)
        visible = None if visible is None else visible[..., :m]
        _segment_backward(
            *(do[b], q[b], k[b, :m], v[b, :m], None if dlse is None else dlse[b], visible, scale),
            *(dq[b], dk[b, :m], dv[b, :m]),
        )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def attention_varlen_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dlse: Tensor | None = None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    scale: float | None = None,
    frame_tokens: int | Tensor | None = None,
    window: tuple[int, int, int] | None = None,
    window_stride: tuple[int, int, int] = (1, 1, 1),
    grids: Tensor | None = None,
):
    """dq, dk, dv of `attention_varlen`, one head of one segment at a time."""
    dq, dk, dv = (torch.zeros(x.shape, dtype=_law(q), device=x.device) for x in (q, k, v))
    scale = default_scale(q, scale)
    cu_q, cu_k = cu_seqlens_q, cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    bounds_q, bounds_k = cu_q.tolist(), cu_k.tolist()
    for s in range(len(bounds_q) - 1):
        iq, ik = slice(*bounds_q[s : s + 2]), slice(*bounds_k[s : s + 2])
        visible = visible_varlen(
            *(cu_q[s : s + 2].diff(), cu_k[s : s + 2].diff(), iq.stop - iq.start, ik.stop - ik.start),
            *(frame_tokens[s : s + 1] if isinstance(frame_tokens, Tensor) else frame_tokens, window, window_stride),
            None if grids is None else grids[s : s + 1],
        )[0]
        _segment_backward(
            *(do[iq], q[iq], k[ik], v[ik], None if dlse is None else dlse[:, iq], visible, scale),
            *(dq[iq], dk[ik], dv[ik]),
        )
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def default_scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else scale


# ---- which keys a query sees ----------------------------------------------------------------------------


def visible_dense(n: int, m: int, kv_len: Tensor | None, frame_tokens: int | Tensor | None, device):
    """None, or bool, broadcastable to (B, H, n, m)."""
    key = torch.arange(m, device=device)
    visible = None
    if kv_len is not None:
        visible = (key < kv_len[:, None])[:, None, None]
    if frame_tokens is not None:
        position = torch.arange(n, device=device) + (m - n)  # queries are the last of the keys
        if isinstance(frame_tokens, Tensor):
            frame_tokens = frame_tokens[..., None, None, None]
        causal = key < frame_end(position[:, None], frame_tokens)
        visible = causal if visible is None else visible & causal
    return visible


def visible_varlen(
    len_q: Tensor,
    len_k: Tensor,
    n: int,
    m: int,
    frame_tokens: int | Tensor | None,
    window: tuple[int, int, int] | None,
    window_stride: tuple[int, int, int],
    grids: Tensor | None,
) -> Tensor:
    """bool (S, n, m): query and key by their index inside the segment."""
    query = torch.arange(n, device=len_q.device)[:, None]
    key = torch.arange(m, device=len_k.device)[None, :]
    visible = (key < len_k[:, None, None]) & (query < len_q[:, None, None])
    if frame_tokens is not None:
        if isinstance(frame_tokens, Tensor):
            frame_tokens = frame_tokens[:, None, None]
        position = query + (len_k - len_q)[:, None, None]
        visible = visible & (key < frame_end(position, frame_tokens))
    if window is not None and grids is not None:
        T, H, W = grids[:, :, None, None].unbind(1)  # (S, 1, 1) each
        sizes = (T, H, W)
        for i, j, size, w, stride in zip(
            grid_index(query, sizes), grid_index(key, sizes), sizes, window, window_stride, strict=True
        ):
            start = window_start(i, size, w, stride)
            visible = visible & (start <= j) & (j < start + w)
    return visible


def frame_end(position: Tensor, frame_tokens: int | Tensor) -> Tensor:
    """First key that a query at `position` does not see: the end of its own frame."""
    return (position.div(frame_tokens, rounding_mode="floor") + 1) * frame_tokens


def window_start(i: Tensor, size: Tensor, window: int, stride: int) -> Tensor:
    """NATTEN's window: centred on the query's stride block, shifted inside at the borders. A longer window sees all."""
    start = i // stride * stride + stride // 2 - window // 2
    return torch.minimum(start, size - window).clamp(min=0)


def grid_index(token: Tensor, sizes: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(t, h, w) of a token; tokens run w fastest. Empty grids count as 1 to keep the division defined."""
    _, height, width = (s.clamp(min=1) for s in sizes)
    return token // (height * width), token // width % height, token % width


def padded_rows(cu_seqlens: Tensor, max_seqlen: int, total: int) -> Tensor:
    """int64 (S, max_seqlen): the row of each token of the padded batch; `total` where there is none."""
    index = torch.arange(max_seqlen, device=cu_seqlens.device)
    start, end = cu_seqlens[:-1, None].long(), cu_seqlens[1:, None].long()
    return torch.where(start + index < end, start + index, total)


def _packed_slots(cu_seqlens: Tensor, width: int, total: int) -> Tensor:
    """int64 (total,): where each row lies in the flattened padded batch; S * width for rows behind the last segment."""
    row = torch.arange(total, device=cu_seqlens.device)
    bounds = cu_seqlens.long()
    segment = torch.searchsorted(bounds, row, right=True) - 1
    slot = segment * width + row - bounds[segment]
    return torch.where(row < bounds[-1], slot, (len(cu_seqlens) - 1) * width)


# ---- the formula ----------------------------------------------------------------------------------------


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float):
    law = _law(q)
    group = q.shape[2] // max(k.shape[2], 1)
    k, v = (x.repeat_interleave(group, dim=2) if group > 1 else x for x in (k, v))
    qt, kt, vt = (x.to(law).transpose(1, 2) for x in (q, k, v))  # (B, H, N, D)
    p, lse = _weights(scale * (qt @ kt.mT), visible)
    return (p @ vt).to(q.dtype).transpose(1, 2).contiguous(), lse


def _weights(scores: Tensor, visible: Tensor | None):
    if visible is not None:
        scores = torch.where(visible, scores, -math.inf)
    lse = scores.logsumexp(-1)
    return torch.where(lse[..., None] == -math.inf, 0.0, scores.softmax(-1)), lse


def _law(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)


def _segment_backward(do, q, k, v, dlse, visible, scale, dq, dk, dv):
    """Adds to dq (N, H, D), dk, dv (M, Hkv, D). With dp = do v^T: ds = p * (dp - sum_j p dp + dlse)."""
    if visible is not None:
        visible = visible.reshape(visible.shape[-2:])
    law, group = _law(q), q.shape[1] // max(k.shape[1], 1)
    for h in range(q.shape[1]):
        qh, kh, vh, doh = (x.to(law) for x in (q[:, h], k[:, h // group], v[:, h // group], do[:, h]))
        p = _weights(scale * (qh @ kh.mT), visible)[0]
        dp = doh @ vh.mT
        shared = (p * dp).sum(-1)
        if dlse is not None:
            shared = shared - dlse[h]
        ds = scale * p * (dp - shared[:, None])
        dq[:, h] += ds @ kh
        dk[:, h // group] += ds.mT @ qh
        dv[:, h // group] += p.mT @ doh
