"""What the adapters of patch do around a kernel: tokens without values, gradients of no tokens, the move both ways."""

from __future__ import annotations

from collections.abc import Callable

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


def moves(move: Callable) -> tuple[Callable, Callable]:
    """unpatchify3d and its gradient in the order of their schemas.

    move: (tokens, video, grid, patch, channels, order, back) writes the video, or with `back` the tokens. Neither is
    empty; the video is (B, C, T, H, W), or flat for a list.
    """

    def unpatchify3d(tokens, grid, patch, channels, order):
        if tokens.dim() == 2:
            y = tokens.new_empty((tokens.numel(),))
        else:
            y = tokens.new_empty((tokens.shape[0], channels, *(g * p for g, p in zip(grid, patch, strict=True))))
        if y.numel():
            move(tokens, y, grid, patch, channels, order, False)
        return y

    def unpatchify3d_backward(grad, tokens, grid, patch, channels, order, needs):
        if grad is None or not needs[0]:
            return (torch.zeros_like(tokens) if needs[0] else None,)
        out = torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
        if out.numel():
            move(out, grad.contiguous() if grad.dim() == 1 else grad, grid, patch, channels, order, True)
        return (out,)

    return unpatchify3d, unpatchify3d_backward
