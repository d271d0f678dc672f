"""Norms: of the queries and keys of an attention with their rotation, and of the pixels of a video VAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops

NORMS: dict[str, Any] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


def token_norm(norm: str | None, width: int, eps: float, **factory: Any) -> nn.Module | None:
    """The module that holds a norm's affine part; None for no norm."""
    if norm is None:
        return None
    if norm not in NORMS:
        raise ValueError(f"fastdit.nn: unknown norm; got {norm!r}, expected None, 'rms' or 'layer'.")
    return NORMS[norm](width, eps=eps, **factory)


def affine(norm: Any) -> tuple[Tensor | None, Tensor | None]:
    """(weight, bias) of a norm; None for what it does not have."""
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


class QKNormRope(nn.Module):
    """Norm of queries and keys, then the rotation of their channel pairs, in one pass over each.

        q, k = rope(norm_q(q)), rope(norm_k(k))

    Args:
        dim (int): width of the norm: the channels D of a head, or H * D with scope="hidden" (Wan, LTX).
        norm ("rms" | "layer", optional): with weights `norm_q`, `norm_k` (and biases of "layer"); None rotates only.
        k_dim (int, optional): the keys' H * D where they have fewer heads (scope="hidden"). Default: dim.
        scope, eps, layout, precision: of `ops.qk_norm_rope`; "native" rounds where eager modules do.
        device, dtype: of the parameters.
    Shapes:
        q, k (B, N, H, D) or packed (N, H, D), views of a fused projection too; cos, sin (N, R/2) or any shape that
        `ops.qk_norm_rope` takes -> q, k, contiguous.
    Source: diffusers Attention.norm_q, norm_k and apply_rotary_emb; Wan's WanSelfAttention.norm_q, norm_k.
    """

    def __init__(
        self,
        dim: int,
        *,
        norm: str | None = "rms",
        k_dim: int | None = None,
        scope: str = "head",
        eps: float = 1e-6,
        layout: str = "interleaved",
        precision: str = "native",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.norm, self.scope, self.eps, self.layout, self.precision = norm, scope, eps, layout, precision
        self.norm_q = token_norm(norm, dim, eps, device=device, dtype=dtype)
        self.norm_k = token_norm(norm, k_dim or dim, eps, device=device, dtype=dtype)

    def forward(
        self, q: Tensor, k: Tensor, cos: Tensor | None = None, sin: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """`options`: what else `ops.qk_norm_rope` takes, e.g. k_cos, k_sin, axes, grids, rope_start, inplace."""
        (q_weight, q_bias), (k_weight, k_bias) = affine(self.norm_q), affine(self.norm_k)
        one_dtype = q_weight is None or q_weight.dtype == q.dtype  # not so under autocast
        return ops.qk_norm_rope(
            q, k, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias, norm=self.norm, scope=self.scope,
            eps=self.eps, cos=cos, sin=sin, layout=self.layout, precision=self.precision if one_dtype else "fp32",
            **options,
        )  # fmt: skip


class ChannelNorm(nn.Module):
    """x / ||x|| * sqrt(C) * gamma over the channels of each pixel, as the prologue of the convolution that follows.

    Holds `gamma` (C, 1, ...) with `axes` ones, as Wan's RMS_norm does; `weight` is what `CausalConv3d` takes.
    """

    def __init__(
        self,
        channels: int,
        axes: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * axes, device=device, dtype=dtype))

    @property
    def weight(self) -> Tensor:
        return self.gamma.flatten()


class ChannelRMSSiLU(ChannelNorm):
    """A VAE's channel norm and the SiLU after it, in one pass.

        y = silu(x / max(||x||, eps) * sqrt(C) * gamma)

    Before a `CausalConv3d` call that with `norm_weight=self.weight, act="silu"` instead: it costs no pass at all.

    Args:
        channels (int): C. axes (int): ones in gamma's shape, 3 for video layers, 2 for frame layers.
        eps (float): least ||x||. device, dtype: of the parameter.
    Shapes: x (B, C, ...), any memory format -> like x.
    Source: Wan2.1 wan/modules/vae.py RMS_norm and nn.SiLU; diffusers WanRMS_norm.
    """

    def __init__(
        self,
        channels: int,
        axes: int = 3,
        *,
        eps: float = 1e-12,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(channels, axes, device=device, dtype=dtype)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return ops.norm_silu(x, norm="channel_l2", weight=self.weight, eps=self.eps)
