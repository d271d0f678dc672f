"""Haar wavelets and plain patches of AutoencoderKLCosmos: one convolution of one pixel, and one copy.

All levels of the wavelet transform together are a matrix over the values of a patch. The original's own code on one
patch, of which one value is 1, gives its columns.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastdit import ops
from fastdit.integrations.registry import original
from fastdit.integrations.structure import unknown
from fastdit.integrations.vae_layers import nearest
from fastdit.integrations.vae_moves import grid_of, space_to_depth, tokens, video


def patch_forward(self, hidden_states: Tensor) -> Tensor:
    """(B, C, 1 + T, H, W) -> (B, C*p^3, 1 + T/p, H/p, W/p), channels_last_3d; the first frame fills a patch."""
    p, size = self.patch_size, hidden_states.shape
    if any(n % p for n in (size[2] - 1, *size[3:])):
        return original(self, hidden_states)
    first = nearest(hidden_states[:, :, :1], (p, 1, 1), first_apart=False)
    x = video(space_to_depth(torch.cat([first, hidden_states[:, :, 1:]], dim=2), (p, p, p)))
    return x if self.patch_method == "rearrange" else transformed(x, patch_matrix(self, size[1]))


def unpatch_forward(self, hidden_states: Tensor) -> Tensor:
    """(B, C*p^3, 1 + T/p, H/p, W/p) -> (B, C, 1 + T, H, W)."""
    p, x = self.patch_size, hidden_states
    channels = x.shape[1] // p**3
    if self.patch_method != "rearrange":
        x = transformed(x, unpatch_matrix(self, channels))
    y = ops.unpatchify3d(tokens(x), grid=grid_of(x), patch=(p, p, p), channels=channels, order="cthw")
    return y[:, :, p - 1 :]


patch_forward.__name__ = unpatch_forward.__name__ = "forward"


def transformed(x: Tensor, matrix: Tensor) -> Tensor:
    return ops.causal_conv3d(x, matrix.to(x.dtype)[..., None, None, None])


@torch.no_grad()
def patch_matrix(module: Any, channels: int) -> Tensor:
    """(C*p^3, C*p^3) fp32, from the values (c, t, h, w) of a patch to its coefficients."""
    p = module.patch_size
    values = basis(module, channels).unflatten(1, (channels, p, p, p))
    for _ in range(int(math.log2(p))):
        values = module._dwt(values, rescale=True)
    return values.flatten(1).T


@torch.no_grad()
def unpatch_matrix(module: Any, channels: int) -> Tensor:
    p = module.patch_size
    values = basis(module, channels)[..., None, None, None]
    for _ in range(int(math.log2(p))):
        values = module._idwt(values, rescale=True)
    return values.flatten(1).T


def basis(module: Any, channels: int) -> Tensor:
    dtype = torch.promote_types(module.wavelets.dtype, torch.float32)
    return torch.eye(channels * module.patch_size**3, dtype=dtype, device=module.wavelets.device)


def refuse_patches(module: Any) -> str | None:
    if module.patch_method not in ("haar", "rearrange"):
        return f"its patches are {module.patch_method}"
    return unknown(module, "patch_size", "patch_method", "wavelets", "_arange")
