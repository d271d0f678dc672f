"""What the GPU adapters of patch_embed3d do without a kernel: tokens without values, and gradients of no tokens."""

from __future__ import annotations

import torch


def without_values(y, bias, pos):
    """No channels: what is left is bias and pos."""
    wide = torch.zeros(y.shape, dtype=torch.float32, device=y.device)
    for t in (bias, pos):
        if t is not None:
            wide += t
    return y.copy_(wide)


def without_tokens(grad, inputs, needs):
    """Nothing reaches x and weight; what reaches bias and pos needs no kernel of ours."""
    dx, dw, db, dpos = (
        torch.zeros_like(t) if need and t is not None else None for t, need in zip(inputs, needs, strict=True)
    )
    if grad is not None and grad.numel():
        db = None if db is None else grad.flatten(0, -2).sum(0, dtype=torch.float32).to(db.dtype)
        if dpos is not None:
            dpos = (grad.float().sum(0) if dpos.dim() < grad.dim() else grad.float()).to(dpos.dtype)
    return dx, dw, db, dpos


def summed(pos, x) -> bool:
    """Whether several samples share a row of pos, so that its gradient is a sum."""
    return pos.dim() == 2 and x.dim() == 5 and x.shape[0] != 1
