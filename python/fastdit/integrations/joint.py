"""Blocks of two streams, image and text, that meet in one attention: what Flux, Qwen-Image, SD3 and others share.

    q = cat(rope(n_1(q_1)), rope(n_2(q_2))), k likewise, v = cat(v_1, v_2);    o_1, o_2 = split(attention(q, k, v))
    x = x + gate_1 * o;    x = x + gate_2 * ff(n(x) * (1 + scale) + shift)      for each stream

The streams come in the order of the call: keys have no order of their own, so text goes first or last as the tables of
the model or its padding ask. Normalised queries are joined by torch.cat: joining them raw and normalising in place
costs the same four passes, and has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.structure import unknown

# Attention ---------------------------------------------------------------------------------------------------------


class Stream(NamedTuple):
    """Queries, keys and values of one stream, (B, N, H, D), what normalises them and its rows of the rotary table.

    cos, sin: fp32, (n, R/2), (n, H, R/2) or (B, n, 1, R/2), one value per pair of channels, for the n <= N tokens from
    `start` on; None: this stream does not rotate.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    norm_q: Any = None
    norm_k: Any = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    layout: str = "interleaved"
    start: int = 0


def normed(stream: Stream) -> tuple[Tensor, Tensor]:
    """Queries and keys after their norm over a head and their rotation, in one pass; as they are without either."""
    norm_q, norm_k = stream.norm_q, stream.norm_k
    if norm_q is None and stream.cos is None:
        return stream.q, stream.k
    plain: dict[str, Any] = dict(cos=stream.cos, sin=stream.sin, layout=stream.layout)
    if stream.cos is not None:
        plain.update(rope_start=stream.start, rope_len=stream.cos.shape[stream.cos.ndim == 4])
    if norm_q is None:
        return ops.qk_norm_rope(stream.q, stream.k, **plain)
    eager = isinstance(norm_q, nn.LayerNorm) or is_diffusers_rms(norm_q)
    rounds = eager and norm_q.weight is not None and norm_q.weight.dtype == stream.q.dtype
    return ops.qk_norm_rope(
        stream.q,
        stream.k,
        q_weight=norm_q.weight,
        k_weight=norm_k.weight,
        q_bias=getattr(norm_q, "bias", None),
        k_bias=getattr(norm_k, "bias", None),
        norm="layer" if isinstance(norm_q, nn.LayerNorm) else "rms",
        eps=norm_q.eps,
        precision="native" if rounds else "fp32",  # torch's and Mochi's round once, diffusers' before its weight too
        **plain,
    )


def joint_attention(*streams: Stream, kv_len: Tensor | None = None, valid: Tensor | None = None) -> list[Tensor]:
    """Attention of all streams over all of them: the output of each, (B, N, H * D).

    kv_len (B,), int32: valid keys of the joint sequence, which has its padding last (`valid_first`).
    valid (B, N), in its place: the valid keys of the joint sequence, in any pattern.
    """
    pairs = [normed(stream) for stream in streams]
    if len(streams) == 1:
        (q, k), v = pairs[0], streams[0].v
    else:
        q, k = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
        v = torch.cat([stream.v for stream in streams], dim=1)
    if valid is not None:
        kv_len, k, v = valid_first(valid, k, v)
    o = ops.attention(q, k, v, kv_len=kv_len).flatten(2)
    return list(o.split([stream.q.shape[1] for stream in streams], dim=1))


def valid_first(mask: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The valid tokens of a mask (B, N) of any pattern, counted, and moved to the front of each tensor (B, N, H, D).

    Returns (lengths (B,) int32, *tensors). For keys and values, whose order the softmax does not see; no host sync.
    """
    mask = mask.bool()
    order = torch.argsort(mask, dim=1, descending=True, stable=True)[..., None, None]
    return mask.sum(1, dtype=torch.int32), *(t.gather(1, order.expand(t.shape)) for t in tensors)


def projections(
    attn: Any, x: Tensor, names: tuple[str, str, str] = ("to_q", "to_k", "to_v"), fused: str = "to_qkv"
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, N, H, D), from three linear layers or, after `fuse_projections`, from one.

    Heads are counted from the width: under tensor parallelism a rank has a share of them.
    """
    if getattr(attn, "fused_projections", False):
        q, k, v = getattr(attn, fused)(x).chunk(3, dim=-1)
    else:
        q, k, v = (getattr(attn, name)(x) for name in names)
    heads = (-1, attn.inner_dim // attn.heads)
    return q.unflatten(-1, heads), k.unflatten(-1, heads), v.unflatten(-1, heads)


def text_projections(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return projections(attn, x, ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_qkv")


def rotation_passes(itemsize: int) -> int:
    """Passes over (tokens, C), in the model's dtype, that eager's norm and rotation of q and k take beyond ours.

    Eager, of each: norm 2, negated halves 1, stack 2, products 2 and 2, sum 3; in two bytes the latter three are fp32
    passes, 4 + 4 + 6, and there are casts, 3 + 3 + 3. Fused 2.
    """
    return 2 * (2 + 1 + 2 + (4 + 4 + 6 + 9 if itemsize == 2 else 2 + 2 + 3) - 2)


def is_diffusers_rms(norm: Any) -> bool:
    return type(norm).__name__ == "RMSNorm" and hasattr(norm, "elementwise_affine") and getattr(norm, "bias", 0) is None


def refuse_qk_norms(*norms: Any) -> str | None:
    """For the norms of one attention, (norm_q, norm_k) of each stream: alike, and of a kind that `normed` computes."""
    if all(norm is None for norm in norms):
        return None
    for norm in norms:
        if not (type(norm) in (nn.RMSNorm, nn.LayerNorm) or is_diffusers_rms(norm)) or norm.eps is None:
            return f"its query and key norm is a {type(norm).__name__}, not an RMSNorm or a LayerNorm with an eps"
        if type(norm) is not type(norms[0]) or norm.eps != norms[0].eps:
            return "its query and key norms differ"
        if len(tuple(norm.weight.shape if norm.weight is not None else (1,))) != 1:
            return "its query and key norms are not over one head"
    return None


# The block ---------------------------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """Modulation of one stream: of its attention half, then of its MLP half; each (B, C) or (B, M, C)."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


def open_stream(x: Tensor, tables: Tables, norm: Any, precision: str, row_index: Tensor | None = None) -> Tensor:
    """What enters the attention."""
    return ops.norm_modulate(
        x, shift=tables.shift1, scale=tables.scale1, eps=norm.eps, row_index=row_index, precision=precision
    )


def close_stream(
    x: Tensor,
    attn_output: Tensor,
    tables: Tables,
    norm: Any,
    ff: Callable[[Tensor], Tensor],
    precision: str,
    row_index: Tensor | None = None,
) -> Tensor:
    """From the attention's output to the end of the block."""
    x, h = ops.gate_residual_norm_modulate(
        x,
        attn_output,
        tables.gate1,
        shift=tables.shift2,
        scale=tables.scale2,
        eps=norm.eps,
        row_index=row_index,
        precision=precision,
    )
    return ops.gate_residual(x, ff(h), tables.gate2, row_index=row_index, precision=precision)


def adaln_zero(norm: Any, temb: Tensor) -> Tables:
    """The six tables of diffusers' AdaLayerNormZero."""
    return Tables(*norm.linear(norm.silu(temb)).chunk(6, dim=1))


def refuse_adaln(norm: Any, chunks: int = 6) -> str | None:
    """For AdaLayerNormZero and its kin: SiLU, a linear layer to `chunks` tables, a LayerNorm without parameters."""
    if not (hasattr(norm, "norm") and hasattr(norm, "linear") and type(getattr(norm, "silu", None)) is nn.SiLU):
        return f"its modulation is a {type(norm).__name__}, not SiLU, linear layer and norm"
    if norm.linear.out_features != chunks * norm.linear.in_features:
        return f"its modulation does not make {chunks} tables of the tokens' width"
    return refuse_plain_norms(norm.norm) or unknown(norm, "emb", "silu", "linear", "norm")


def refuse_plain_norms(*norms: Any) -> str | None:
    for norm in norms:
        if type(norm) is not nn.LayerNorm or norm.elementwise_affine:
            return f"its norm is a {type(norm).__name__}, not a LayerNorm without parameters"
    return None


def clip_half(x: Tensor) -> Tensor:
    """fp16 within its range, as the originals keep it between blocks."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
