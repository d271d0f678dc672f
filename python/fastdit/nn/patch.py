"""Pixels to tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops


class PatchEmbed3d(nn.Module):
    """Spacetime patches to tokens: the convolution with kernel = stride that it stands for, as one GEMM.

        y[n] = weight . patch[n] + bias + pos[n]

    Args:
        in_channels, hidden_size (int): channels of a pixel and of a token.
        patch (ints): (pt, ph, pw), `proj` then is an nn.Conv3d; or (ph, pw) for images, an nn.Conv2d.
        bias (bool): of `proj`. device, dtype: of the parameters.
    Shapes:
        x (B, C, T, H, W), or (B, C, H, W) for one frame each -> (B, N, D); pos, optional, adds (N, D) or (1, N, D).
        A list of (C, T, H, W) of any sizes -> `Packed`, without padding.
    Source: diffusers HunyuanVideoPatchEmbed and PatchEmbed, timm PatchEmbed of facebookresearch/DiT (all `proj`).
    """

    def __init__(
        self,
        in_channels: int,
        hidden_size: int,
        patch: tuple[int, ...],
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if len(patch) not in (2, 3):
            raise ValueError(
                f"PatchEmbed3d: patch must be (pt, ph, pw) or (ph, pw); got {patch!r}, expected two or three ints."
            )
        conv: Any = nn.Conv3d if len(patch) == 3 else nn.Conv2d
        self.proj = conv(
            in_channels, hidden_size, kernel_size=patch, stride=patch, bias=bias, device=device, dtype=dtype
        )

    def forward(self, x: Any, pos: Tensor | None = None) -> Any:
        weight, bias = self.proj.weight, self.proj.bias
        if isinstance(x, Tensor) and x.ndim == 4:
            x = x.unsqueeze(2)
        return ops.patch_embed3d(x, weight if weight.ndim == 5 else weight.unsqueeze(2), bias, pos=pos)
