"""The halves and the output layer of a Diffusion Transformer's block, over `fastdit.ops`.

Parameters carry the names of facebookresearch/DiT (`attn.qkv`, `attn.proj`, `mlp.fc1`, `mlp.fc2`,
`adaLN_modulation.1`, `linear`) and, for the norms of queries and keys, of timm's `Attention` (`q_norm`, `k_norm`).

Shapes: B samples, N tokens, C channels, S segments. Tokens are (B, N, C), or packed (N, C) beside `cu_seqlens` and
`max_seqlen` with `row_index` (N,) naming the row of each token: `fastdit.packing.Packed` has all three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.nn.norm import affine, token_norm


def modulation_law(precision: str, x: Tensor, table: Tensor | None) -> str:
    """`precision`; "fp32" where nothing modulates, or x and its tables differ in dtype (autocast)."""
    return precision if table is not None and table.dtype == x.dtype else "fp32"


def modulation(width: int, rows: int, cond_size: int | None = None, **factory: Any) -> nn.Sequential:
    """SiLU and a linear layer to `rows` tables, zero at the start: every gate is closed, every output zero."""
    linear = nn.Linear(cond_size or width, rows * width, **factory)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(nn.SiLU(), linear)


class AdaLNAttention(nn.Module):
    """The attention half of a block.

        y = x + gate * proj(attention(rope(norm(q, k)), v)),   q, k, v = qkv(LayerNorm(x) * (1 + scale) + shift)

    Args:
        hidden_size, num_heads (int): C and heads of C / num_heads channels. num_kv_heads (int, optional): GQA.
        qkv_bias (bool): of `qkv`. eps (float): of the norm of x.
        qk_norm ("rms" | "layer", optional): norm of each head of q and k, with weights `q_norm`, `k_norm`; qk_eps.
        precision ("native" | "fp32"): rounding of `ops.norm_modulate`; DiT is "native".
        device, dtype: of the parameters.
    Shapes:
        x (B, N, C); shift, scale, gate (B, C), (B, M, C) or None; cos, sin of `ops.rope_table` -> (B, N, C).
        Packed: x (N, C), tables (S, C) with row_index (N,), cu_seqlens (S + 1,), max_seqlen -> (N, C).
    Source: arXiv 2212.09748; facebookresearch/DiT models.py DiTBlock, timm Attention.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        qkv_bias: bool = True,
        eps: float = 1e-6,
        qk_norm: str | None = None,
        qk_eps: float = 1e-6,
        precision: str = "native",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(
                f"AdaLNAttention: num_heads must divide hidden_size; got {num_heads} heads, hidden_size {hidden_size}, "
                "expected a divisor; change one of them."
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        head_dim = hidden_size // num_heads
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads or num_heads
        self.eps, self.qk_norm, self.qk_eps, self.precision = eps, qk_norm, qk_eps, precision
        self.qkv = nn.Linear(hidden_size, (num_heads + 2 * self.num_kv_heads) * head_dim, bias=qkv_bias, **factory)
        self.q_norm, self.k_norm = (token_norm(qk_norm, head_dim, qk_eps, **factory) for _ in "qk")
        self.proj = nn.Linear(hidden_size, hidden_size, **factory)

    def forward(
        self, x: Tensor, shift: Tensor | None, scale: Tensor | None, gate: Tensor | None, **options: Any
    ) -> Tensor:
        """`options`: what else `ops.adaln_attention` takes, e.g. cos, sin, kv_len, row_index, cu_seqlens, weight."""
        (q_weight, q_bias), (k_weight, k_bias) = affine(self.q_norm), affine(self.k_norm)
        return ops.adaln_attention(
            x, shift=shift, scale=scale, gate=gate, qkv=self.qkv, proj=self.proj, num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads, eps=self.eps, qk_norm=self.qk_norm, qk_eps=self.qk_eps, q_weight=q_weight,
            k_weight=k_weight, q_bias=q_bias, k_bias=k_bias, precision=modulation_law(self.precision, x, scale),
            **options,
        )  # fmt: skip


class AdaLNMlp(nn.Module):
    """The MLP half of a block.

        y = x + gate * fc2(act(fc1(LayerNorm(x) * (1 + scale) + shift)))

    Args:
        hidden_size, mlp_size (int): C and the width between `fc1` and `fc2`. act (str): of `ops.activation`.
        eps, precision, device, dtype: as in `AdaLNAttention`.
    Shapes: as in `AdaLNAttention`, without what concerns the attention.
    Source: arXiv 2212.09748; facebookresearch/DiT models.py DiTBlock, timm Mlp.
    """

    def __init__(
        self,
        hidden_size: int,
        mlp_size: int,
        *,
        act: str = "gelu_tanh",
        eps: float = 1e-6,
        precision: str = "native",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.activation, self.eps, self.precision = act, eps, precision
        self.fc1 = nn.Linear(hidden_size, mlp_size, device=device, dtype=dtype)
        self.fc2 = nn.Linear(mlp_size, hidden_size, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, shift: Tensor | None, scale: Tensor | None, gate: Tensor | None, **options: Any
    ) -> Tensor:
        """`options`: what else `ops.adaln_mlp` takes, e.g. row_index, weight, bias."""
        return ops.adaln_mlp(
            x, shift=shift, scale=scale, gate=gate, fc1=self.fc1, fc2=self.fc2, act=self.activation, eps=self.eps,
            precision=modulation_law(self.precision, x, scale), **options,
        )  # fmt: skip


class FinalLayer(nn.Module):
    """The output layer of a DiT: zero until it is trained.

        shift, scale = adaLN_modulation(c);   y = linear(LayerNorm(x) * (1 + scale) + shift)

    Args:
        hidden_size (int): C. token_size (int): values of a token, prod(patch) * channels; `ops.unpatchify3d` follows.
        cond_size (int): width of c. Default: C. None of it is read where `modulated` is False: `norm` (LayerNorm with
            weights) then takes the place of the modulation, for a model that is conditioned by its tokens.
        eps, precision, device, dtype: as in `AdaLNAttention`.
    Shapes:
        x (B, N, C), c (B, cond_size) or (B, M, cond_size) -> (B, N, token_size).
        Packed: x (N, C), c (S, cond_size) with row_index (N,).
    Source: facebookresearch/DiT models.py FinalLayer.
    """

    def __init__(
        self,
        hidden_size: int,
        token_size: int,
        *,
        cond_size: int | None = None,
        modulated: bool = True,
        eps: float = 1e-6,
        precision: str = "native",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.eps, self.precision = eps, precision
        self.linear = nn.Linear(hidden_size, token_size, device=device, dtype=dtype)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.adaLN_modulation = modulation(hidden_size, 2, cond_size, **factory) if modulated else None
        self.norm = None if modulated else nn.LayerNorm(hidden_size, eps=eps, **factory)

    def forward(self, x: Tensor, c: Tensor | None = None, *, row_index: Tensor | None = None) -> Tensor:
        if self.adaLN_modulation is None:
            weight, bias = affine(self.norm)
            return self.linear(ops.norm_modulate(x, weight=weight, bias=bias, eps=self.eps))
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        precision = modulation_law(self.precision, x, scale)
        h = ops.norm_modulate(x, shift=shift, scale=scale, eps=self.eps, row_index=row_index, precision=precision)
        return self.linear(h)
