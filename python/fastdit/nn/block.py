"""A transformer block with each of the conditionings of a Diffusion Transformer, over `fastdit.ops`.

Shapes: as in `fastdit.nn.adaln`; M tokens of a context of E channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.nn.adaln import AdaLNAttention, AdaLNMlp, modulation
from fastdit.nn.norm import affine, token_norm

TABLES = {"adaln_zero": 6, "adaln": 4, None: 0}  # by conditioning


class CrossAttention(nn.Module):
    """Attention of the tokens to a context, ungated.

        y = x + proj(attention(norm(q), norm(k), v)),   q = to_q(LayerNorm(x)),   k, v = to_kv(context)

    Args:
        hidden_size, num_heads (int): C and heads of C / num_heads channels. context_size (int): E. Default: C.
        eps (float): of the norm of x. qk_norm, qk_eps, device, dtype: as in `AdaLNAttention`.
    Shapes:
        x (B, N, C), context (B, M, E) -> (B, N, C). Packed: x (N, C) with cu_seqlens, max_seqlen; context (M, E) with
        context_cu_seqlens, context_max_seqlen -> (N, C).
    Source: arXiv 2212.09748; diffusers BasicTransformerBlock.attn2 (PixArt), WanTransformerBlock.attn2.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        context_size: int | None = None,
        *,
        eps: float = 1e-6,
        qk_norm: str | None = None,
        qk_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_heads, self.qk_norm, self.qk_eps = num_heads, qk_norm, qk_eps
        self.norm = nn.LayerNorm(hidden_size, eps=eps, **factory)
        self.to_q = nn.Linear(hidden_size, hidden_size, **factory)
        self.to_kv = nn.Linear(context_size or hidden_size, 2 * hidden_size, **factory)
        self.q_norm, self.k_norm = (token_norm(qk_norm, hidden_size // num_heads, qk_eps, **factory) for _ in "qk")
        self.proj = nn.Linear(hidden_size, hidden_size, **factory)

    def forward(
        self,
        x: Tensor,
        context: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        context_cu_seqlens: Tensor | None = None,
        context_max_seqlen: int | None = None,
    ) -> Tensor:
        h = ops.norm_modulate(x, weight=self.norm.weight, bias=self.norm.bias, eps=self.norm.eps)
        q = self.to_q(h).unflatten(-1, (self.num_heads, -1))
        k, v = self.to_kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)
        if self.qk_norm is not None:
            (q_weight, q_bias), (k_weight, k_bias) = affine(self.q_norm), affine(self.k_norm)
            q, k = ops.qk_norm_rope(
                q, k, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias, norm=self.qk_norm,
                eps=self.qk_eps,
            )  # fmt: skip
        if cu_seqlens is None or max_seqlen is None:
            y = ops.attention(q, k, v)
        else:
            y = ops.attention_varlen(
                q, k, v, cu_seqlens_q=cu_seqlens, max_seqlen_q=max_seqlen, cu_seqlens_k=context_cu_seqlens,
                max_seqlen_k=context_max_seqlen,
            )  # fmt: skip
        return ops.gate_residual(x, self.proj(y.flatten(-2)))


class DiTBlock(nn.Module):
    """A transformer block of a Diffusion Transformer.

        x = attn(x);   x = cross(x, context) where there is a context;   y = mlp(x)

    Args:
        hidden_size, num_heads (int): as in `AdaLNAttention`. mlp_ratio (float): width of the MLP in units of C.
        conditioning: "adaln_zero": the vector c gives shift, scale and gate of both halves; the identity until its
            modulation is trained (but for the context). "adaln": shift and scale, no gates. None: neither, but norms
            `norm1`, `norm2` with weights, a plain ViT block.
        cond_size (int): width of c. Default: C. A narrow c keeps the modulation small.
        context_size (int, optional): E; adds `cross`, a `CrossAttention` between the halves.
        act (str): of the MLP. eps, precision, device, dtype: as in `AdaLNAttention`.
        attention (keyword arguments): the rest of `AdaLNAttention`'s, e.g. qk_norm="rms".
    Shapes:
        x (B, N, C), c (B, cond_size), or (B, M, cond_size) with a row per N / M tokens -> (B, N, C).
        Packed: x (N, C), c (S, cond_size) with row_index (N,), cu_seqlens (S + 1,), max_seqlen -> (N, C).
        context as in `CrossAttention`.
    Source: arXiv 2212.09748; facebookresearch/DiT models.py DiTBlock.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        *,
        conditioning: str | None = "adaln_zero",
        cond_size: int | None = None,
        context_size: int | None = None,
        act: str = "gelu_tanh",
        eps: float = 1e-6,
        precision: str = "native",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **attention: Any,
    ):
        super().__init__()
        if conditioning not in TABLES:
            raise ValueError(
                f"DiTBlock: unknown conditioning; got {conditioning!r}, expected 'adaln_zero', 'adaln' or None; "
                "other conditionings are tokens of x or of the context."
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conditioning = conditioning
        self.attn = AdaLNAttention(hidden_size, num_heads, eps=eps, precision=precision, **factory, **attention)
        self.mlp = AdaLNMlp(hidden_size, int(hidden_size * mlp_ratio), act=act, eps=eps, precision=precision, **factory)
        self.norm1, self.norm2, self.adaLN_modulation, self.cross = None, None, None, None
        if conditioning is None:
            self.norm1, self.norm2 = (nn.LayerNorm(hidden_size, eps=eps, **factory) for _ in range(2))
        else:
            self.adaLN_modulation = modulation(hidden_size, TABLES[conditioning], cond_size, **factory)
        if context_size is not None:
            norms = {name: attention[name] for name in ("qk_norm", "qk_eps") if name in attention}
            self.cross = CrossAttention(hidden_size, num_heads, context_size, eps=eps, **norms, **factory)

    def forward(
        self,
        x: Tensor,
        c: Tensor | None = None,
        *,
        row_index: Tensor | None = None,
        context: Tensor | None = None,
        context_cu_seqlens: Tensor | None = None,
        context_max_seqlen: int | None = None,
        **attention: Any,
    ) -> Tensor:
        """`attention`: what else `ops.adaln_attention` takes, e.g. cos, sin, kv_len, cu_seqlens, max_seqlen."""
        first, second = self._modulations(c)
        (weight1, bias1), (weight2, bias2) = affine(self.norm1), affine(self.norm2)
        x = self.attn(x, *first, row_index=row_index, weight=weight1, bias=bias1, **attention)
        if self.cross is not None:
            x = self.cross(
                x, context, cu_seqlens=attention.get("cu_seqlens"), max_seqlen=attention.get("max_seqlen"),
                context_cu_seqlens=context_cu_seqlens, context_max_seqlen=context_max_seqlen,
            )  # fmt: skip
        return self.mlp(x, *second, row_index=row_index, weight=weight2, bias=bias2)

    def _modulations(self, c: Tensor | None) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """(shift, scale, gate) of both halves."""
        if self.adaLN_modulation is None:
            return (None, None, None), (None, None, None)
        tables = self.adaLN_modulation(c).chunk(TABLES[self.conditioning], dim=-1)
        if self.conditioning == "adaln":
            return (*tables[:2], None), (*tables[2:], None)
        return tables[:3], tables[3:]


class AdaLNZeroBlock(DiTBlock):
    """The paper's best block: the identity until its modulation is trained. `DiTBlock` as it is by default.

        shift1, scale1, gate1, shift2, scale2, gate2 = adaLN_modulation(c)
        x = attn(x, shift1, scale1, gate1);   y = mlp(x, shift2, scale2, gate2)

    Args, shapes: of `DiTBlock`.
    """
