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
from fastdit.integrations.masks import Run, key_runs, valid_first
from fastdit.integrations.structure import itemsize, unknown

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
    return ops.qk_norm_rope(stream.q, stream.k, **head_norms(norm_q, norm_k, stream.q.dtype), **plain)


def head_norms(norm_q: Any, norm_k: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What `qk_norm_rope` takes for norms over one head of queries and keys in this dtype, or for none."""
    if norm_q is None:
        return {}
    eager = isinstance(norm_q, nn.LayerNorm) or is_diffusers_rms(norm_q)
    rounds = eager and norm_q.weight is not None and norm_q.weight.dtype == dtype
    return dict(
        q_weight=norm_q.weight,
        k_weight=norm_k.weight,
        q_bias=getattr(norm_q, "bias", None),
        k_bias=getattr(norm_k, "bias", None),
        norm="layer" if isinstance(norm_q, nn.LayerNorm) else "rms",
        eps=norm_q.eps,
        precision="native" if rounds else "fp32",  # torch's and Mochi's round once, diffusers' before its weight too
    )


def queries_only(cos: Tensor, sin: Tensor) -> dict[str, Any]:
    """Tables of `qk_norm_rope` for a cross-attention whose keys do not rotate: theirs have one row, of angle 0."""
    row = cos[:, :1] if cos.ndim == 4 else cos[:1]
    return dict(cos=cos, sin=sin, k_cos=torch.ones_like(row), k_sin=torch.zeros_like(row))


def joint_attention(
    *streams: Stream,
    kv_len: Tensor | None = None,
    key_mask: Tensor | None = None,
    joint_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Attention of all streams over all of them: the output of each, (B, N, H * D).

    kv_len (B,), int32: valid keys of the joint sequence, which has its padding last.
    key_mask (B, N): the keys of the last stream that are seen, in any pattern.
    joint_mask (B, N): the same of all streams.
    attn_mask: any other mask or bias, as diffusers takes it.
    """
    q, k = (list(parts) for parts in zip(*(normed(stream) for stream in streams), strict=True))
    v = [stream.v for stream in streams]
    if joint_mask is not None:
        k, v, key_mask = [joined(k)], [joined(v)], joint_mask
    if key_mask is not None:
        lengths, k[-1], v[-1] = valid_first(key_mask, k[-1], v[-1])
        kv_len = lengths + sum(part.shape[1] for part in k[:-1])
    if attn_mask is None:
        o = ops.attention(joined(q), joined(k), joined(v), kv_len=kv_len)
    else:
        o = masked_attention(joined(q), joined(k), joined(v), attn_mask)
    return o.flatten(2).split([part.shape[1] for part in q], dim=1)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of (B, N, H, D) under a mask or bias, with diffusers' own where it has no `key_runs`."""
    runs = key_runs(mask, q.shape[0], q.shape[1], k.shape[1])
    if runs is None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(q, k, v, attn_mask=mask)
    if len(runs) == 1:
        return by_runs(q, k, v, runs[0])
    return torch.cat([by_runs(q[i : i + 1], k[i : i + 1], v[i : i + 1], own) for i, own in enumerate(runs)])


def by_runs(q: Tensor, k: Tensor, v: Tensor, runs: list[Run]) -> Tensor:
    """Attention of (B, N, H, D), a call per run of queries; all samples have the same runs."""
    outputs = []
    for run in runs:
        seen = slice(run.start, run.stop)
        frames = 1 if run.causal else None
        outputs.append(ops.attention(q[:, run.first : run.last], k[:, seen], v[:, seen], frame_tokens=frames))
    return joined(outputs)


def joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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


def adaln_passes(itemsize: int) -> int:
    """Passes over (tokens, C), in the model's dtype, that eager's adaLN of a block of two sublayers takes beyond ours.

    Eager, of each: norm 2 (in two bytes as fp32: cast 3, norm 4, rounding 3), scale 2, shift 2, gate 2, sum 3.
    Fused 2 + 4 + 3.
    """
    return 2 * ((3 + 4 + 3 if itemsize == 2 else 2) + 2 + 2 + 2 + 3) - 9


def complex_rotation_saving(attn: Any, width: int | None = None) -> int:
    """width: of all heads, where the attention does not know its inner_dim."""
    # passes over (tokens, C) for q and k: the norm's six operations and a product of complex numbers, against 2
    norm, rotation = (17, 10) if itemsize(attn) == 2 else (7, 2)  # in two bytes with casts to fp32 and back
    return 2 * ((norm if attn.norm_q is not None else 0) + rotation - 2) * (width or attn.inner_dim) * itemsize(attn)


def is_diffusers_rms(norm: Any) -> bool:
    return type(norm).__name__ == "RMSNorm" and hasattr(norm, "elementwise_affine") and getattr(norm, "bias", 0) is None


def refuse_qk_norms(*norms: Any) -> str | None:
    """For the norms of one attention, (norm_q, norm_k) of each stream: alike, and of a kind that `normed` computes."""
    if all(norm is None for norm in norms):
        return None
    for norm in norms:
        if not (type(norm) is nn.RMSNorm or is_layer_norm(norm) or is_diffusers_rms(norm)) or norm.eps is None:
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


def plain(norm: Any) -> Any:
    """The LayerNorm of a block's first norm, which may be modulated by a module of its own or by the block."""
    return getattr(norm, "norm", norm)


def refuse_plain_norms(*norms: Any) -> str | None:
    for norm in norms:
        if not is_layer_norm(norm) or norm.elementwise_affine:
            return f"its norm is a {type(norm).__name__}, not a LayerNorm without parameters"
    return None


def affine(norm: Any, precision: str) -> dict[str, Any]:
    """What the modulated operators take for a LayerNorm, with or without weights, or for diffusers' RMSNorm."""
    kind = "rms" if is_diffusers_rms(norm) else "layer"
    return dict(weight=norm.weight, bias=norm.bias, norm=kind, eps=norm.eps, precision=precision)


def is_layer_norm(norm: Any) -> bool:
    """diffusers' FP32LayerNorm is the same: layer_norm computes in fp32 and rounds to the tokens' dtype either way."""
    return type(norm) is nn.LayerNorm or (isinstance(norm, nn.LayerNorm) and type(norm).__name__ == "FP32LayerNorm")


def clip_half(x: Tensor) -> Tensor:
    """fp16 within its range, as the originals keep it between blocks."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
