"""The two halves of an adaLN-Zero block: compositions of the families, or two fused GEMMs around what lies between.

A projection is a callable (LoRA, a quantised layer: it is called, never read) or a (weight, bias) pair. Plain weights,
a pair or an nn.Linear that is nothing but its weight and bias, may also be read by the fused form (adaln_fused.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..reference.activation import ACTS
from . import _check, adaln_fused
from .activation import activation
from .attention import attention, attention_varlen
from .modulation import gate_residual, norm_modulate
from .rotary import qk_norm_rope

Projection = Callable[[Tensor], Tensor] | tuple[Tensor, Tensor | None]


def _layer(op: str, what: str, layer: Projection) -> Callable[[Tensor], Tensor]:
    if callable(layer):
        return layer
    if not isinstance(layer, (tuple, list)) or len(layer) != 2 or not isinstance(layer[0], Tensor):
        raise TypeError(
            f"{op}: {what} must be a callable or a (weight, bias) pair; got {type(layer).__name__}, "
            "expected e.g. nn.Linear or (weight, None); wrap it."
        )
    weight, bias = layer
    return lambda x: F.linear(x, weight, bias)


def _projected(op: str, what: str, y, x: Tensor, channels: str, ok: bool) -> None:
    if not isinstance(y, Tensor) or y.shape[:-1] != x.shape[:-1] or not ok:
        got = list(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"{op}: {what} gave the wrong shape; got {got}, expected {[*x.shape[:-1]]} + [{channels}]; check its width."
        )


def adaln_attention(
    x: Tensor,
    *,
    shift: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    qkv: Projection,
    proj: Projection,
    num_heads: int,
    num_kv_heads: int | None = None,
    norm: str = "layer",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    row_index: Tensor | None = None,
    qk_norm: str | None = None,
    qk_eps: float = 1e-6,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    scope: str = "head",
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    layout: str = "interleaved",
    rope_start: int = 0,
    rope_len: int | None = None,
    attn_scale: float | None = None,
    kv_len: Tensor | None = None,
    frame_tokens: int | Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    window: tuple[int, int, int] | None = None,
    window_stride: tuple[int, int, int] = (1, 1, 1),
    grids: Tensor | None = None,
    gate_act: str | None = None,
    post_norm: str | None = None,
    post_norm_weight: Tensor | None = None,
    post_norm_eps: float = 1e-6,
    precision: str = "fp32",
    fused: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """The attention half of an adaLN block.

        y = x + gate * proj(attention(rope(norm(q, k)), v)),   q, k, v = qkv(n(x) * (1 + scale) + shift)

    Args:
        x (Tensor[B, N, C], or packed [N, C] with cu_seqlens and max_seqlen): tokens, also the residual.
        shift, scale, gate: modulation tables, as in `norm_modulate` and `gate_residual`; row_index serves all three.
        qkv (callable or (weight, bias)): C -> (num_heads + 2 * num_kv_heads) * D, q before k before v. proj: back to C.
        norm, eps, weight, bias, weight_offset: of `norm_modulate`.
        qk_norm, qk_eps, q_weight, k_weight, q_bias, k_bias, scope, cos, sin, layout, rope_start, rope_len: of
            `qk_norm_rope`; without qk_norm and cos it is left out. x's packed rows are the tokens of cos and sin.
        attn_scale, kv_len, frame_tokens: of `attention`; cu_seqlens, max_seqlen, window, window_stride, grids: of
            `attention_varlen`.
        gate_act, post_norm, post_norm_weight, post_norm_eps: of `gate_residual`. precision, backend: of all of them.
        fused (bool, optional): True is three kernels (the norms, the modulation, the rotation and the gate inside the
            GEMMs), False the parts one by one; None takes what is faster on the device. Fused reads the weights: plain
            ones only, no post_norm, no scope "hidden".
    Returns:
        Tensor like x. Gradients for everything that a part has gradients for.
    Raises:
        ValueError, TypeError, NoBackend: as the parts, named after the part that found it. NoBackend also where
        fused=True cannot run.
    Cost:   the GEMMs (4*C*C*N FLOPs times 2) and the attention, plus about 8*N*C*itemsize bytes around them,
            none when fused.
    Source: arXiv 2212.09748; facebookresearch/DiT models.py DiTBlock.
    """
    op = "adaln_attention"
    qkv_layer, proj_layer = _layer(op, "qkv", qkv), _layer(op, "proj", proj)
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_heads < 1 or kv_heads < 1:
        raise ValueError(
            f"{op}: head counts must be positive; got {num_heads} and {kv_heads}, expected >= 1; set them."
        )
    packed = cu_seqlens is not None
    if packed != (max_seqlen is not None) or packed != (x.dim() == 2):
        raise ValueError(
            f"{op}: packed x (N, C), cu_seqlens and max_seqlen come together; got x {list(x.shape)}, "
            "expected all or none; pass the missing ones."
        )
    if (packed and kv_len is not None) or (not packed and (window is not None or grids is not None)):
        wrong, why = ("kv_len", "dense") if packed else ("window", "packed")
        raise ValueError(f"{op}: {wrong} is for {why} tokens; got x {list(x.shape)}, expected None; drop it.")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if cu_seqlens is None or max_seqlen is None:
            return attention(q, k, v, scale=attn_scale, kv_len=kv_len, frame_tokens=frame_tokens, backend=backend)
        return attention_varlen(
            q, k, v, cu_seqlens_q=cu_seqlens, max_seqlen_q=max_seqlen, scale=attn_scale, frame_tokens=frame_tokens,
            window=window, window_stride=window_stride, grids=grids, backend=backend,
        )  # fmt: skip

    if fused is not False:
        out = adaln_fused.attention_half(
            x, qkv, proj, attend, num_heads, kv_heads, shift, scale, gate, row_index,
            (norm, eps, weight, bias, weight_offset), (qk_norm, qk_eps, scope),
            (q_weight, k_weight, q_bias, k_bias, cos, sin), (layout, rope_start, rope_len), gate_act, post_norm,
            precision, fused, backend,
        )  # fmt: skip
        if out is not None:
            return out
    h = norm_modulate(
        x, shift=shift, scale=scale, weight=weight, bias=bias, weight_offset=weight_offset, norm=norm, eps=eps,
        row_index=row_index, precision=precision, backend=backend,
    )  # fmt: skip
    projected = qkv_layer(h)
    total = num_heads + 2 * kv_heads
    wide = projected.shape[-1] if isinstance(projected, Tensor) else 0
    _projected(op, "qkv", projected, x, f"{total} * D", wide > 0 and wide % total == 0)
    q, k, v = projected.unflatten(-1, (total, wide // total)).split([num_heads, kv_heads, kv_heads], dim=-2)
    if qk_norm is not None or cos is not None:
        q, k = qk_norm_rope(
            q, k, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias, norm=qk_norm, scope=scope,
            eps=qk_eps, cos=cos, sin=sin, layout=layout, rope_start=rope_start, rope_len=rope_len,
            precision=precision, backend=backend,
        )  # fmt: skip
    y = proj_layer(attend(q, k, v).flatten(-2))
    _projected(op, "proj", y, x, str(x.shape[-1]), isinstance(y, Tensor) and y.shape[-1] == x.shape[-1])
    return gate_residual(
        x, y, gate, gate_act=gate_act, post_norm=post_norm, post_norm_weight=post_norm_weight,
        post_norm_eps=post_norm_eps, row_index=_gate_rows(gate, row_index), precision=precision, backend=backend,
    )  # fmt: skip


def adaln_mlp(
    x: Tensor,
    *,
    shift: Tensor | None,
    scale: Tensor | None,
    gate: Tensor | None,
    fc1: Projection,
    fc2: Projection,
    act: str | Callable[[Tensor], Tensor] = "gelu_tanh",
    norm: str = "layer",
    eps: float = 1e-6,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    weight_offset: float = 0.0,
    row_index: Tensor | None = None,
    gate_act: str | None = None,
    post_norm: str | None = None,
    post_norm_weight: Tensor | None = None,
    post_norm_eps: float = 1e-6,
    precision: str = "fp32",
    fused: bool | None = None,
    backend: str | None = None,
) -> Tensor:
    """The MLP half of an adaLN block.

        y = x + gate * fc2(act(fc1(n(x) * (1 + scale) + shift)))

    Args:
        x (Tensor[B, N, C] or packed [N, C]): tokens, also the residual. shift, scale, gate, row_index: as above.
        fc1, fc2 (callable or (weight, bias)): C -> hidden, hidden -> C.
        act (str or callable): of `activation`, or any function of the hidden tokens.
        fused: as above, two kernels; needs act to be a name.
        The rest: of `norm_modulate` and `gate_residual`.
    Returns:
        Tensor like x. Gradients for everything that a part has gradients for.
    Raises:
        ValueError, TypeError, NoBackend: as above.
    Cost:   the two GEMMs, plus about 5*N*C*itemsize bytes and one pass over the hidden tokens; fused: none of them.
    Source: arXiv 2212.09748; facebookresearch/DiT models.py DiTBlock.
    """
    op = "adaln_mlp"
    up, down = _layer(op, "fc1", fc1), _layer(op, "fc2", fc2)
    if isinstance(act, str):
        _check.choice(op, "act", act, ACTS)
    if fused is not False:
        out = adaln_fused.mlp_half(
            x, fc1, fc2, act, shift, scale, gate, row_index, (norm, eps, weight, bias, weight_offset), gate_act,
            post_norm, precision, fused, backend,
        )  # fmt: skip
        if out is not None:
            return out
    h = norm_modulate(
        x, shift=shift, scale=scale, weight=weight, bias=bias, weight_offset=weight_offset, norm=norm, eps=eps,
        row_index=row_index, precision=precision, backend=backend,
    )  # fmt: skip
    hidden = up(h)
    y = down(activation(hidden, act, backend=backend) if isinstance(act, str) else act(hidden))
    _projected(op, "fc2", y, x, str(x.shape[-1]), isinstance(y, Tensor) and y.shape[-1] == x.shape[-1])
    return gate_residual(
        x, y, gate, gate_act=gate_act, post_norm=post_norm, post_norm_weight=post_norm_weight,
        post_norm_eps=post_norm_eps, row_index=_gate_rows(gate, row_index), precision=precision, backend=backend,
    )  # fmt: skip


def _gate_rows(gate: Tensor | None, row_index: Tensor | None) -> Tensor | None:
    return None if gate is None else row_index
