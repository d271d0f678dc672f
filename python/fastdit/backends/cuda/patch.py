"""patch on the CUDA kernels (csrc/cuda/patch.cu, patch_backward.cu, patch_unpatchify.cu).

patch_embed3d: one launch forward, no workspace: (N*K + N*D + D*K) * itemsize bytes, 2*N*D*K FLOPs. Backward: one for x,
one for weight and bias together and their sums over splits, one for pos where samples share it. unpatchify3d and its
gradient: one. Of a list each of them is one launch for every 16 videos.
"""

from __future__ import annotations

import torch

from .._patch import moves, summed, without_tokens, without_values
from .._patch_abi import embed_arguments, embed_shape, inside, items
from .._tensors import contiguous
from ..cpu._abi import DTYPE, pointer
from ..registry import Impl, register as _register
from ._launch import ask, launch, unfit

VALUES = 4096  # of a token, the most: shared memory holds a table of them


def _refusal(x, values: int) -> str | None:
    refusal = unfit(x)
    if refusal is None and values > VALUES:
        refusal = f"holds a token's values in shared memory: up to {VALUES}; got {values}"
    return refusal


def _embeds(x, weight, *_) -> str | None:
    return _refusal(x, weight.shape[1:].numel())


def _moves(tokens, *_) -> str | None:
    return _refusal(tokens, tokens.shape[-1])


def patch_embed3d(x, weight, bias, pos, grids):
    y = x.new_empty(embed_shape(x, weight, grids))
    if y.numel() == 0:
        return y
    if weight.numel() == 0:
        return without_values(y, bias, pos)
    bias = contiguous(bias)
    arguments = embed_arguments(x, weight, bias, pos, y, grids)
    launch("patch_embed3d_forward", "patch_embed3d", x, arguments, (x, weight, bias, pos), (y,))
    return y


def patch_embed3d_backward(grad, x, weight, bias, pos, grids, needs):
    if grad is None or grad.numel() == 0 or weight.numel() == 0:
        return without_tokens(grad, (x, weight, bias, pos), needs)
    g = grad.contiguous()
    op = "patch_embed3d_backward"
    dx = dw = db = dpos = None
    if needs[0]:
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        launch("patch_embed3d_dx", op, x, embed_arguments(dx, weight, None, None, g, grids), (weight, g), (dx,))
    if needs[1]:
        dw = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    if needs[2] and bias is not None:
        db = torch.empty(bias.shape, dtype=bias.dtype, device=x.device)
    if dw is not None or db is not None:
        arguments = embed_arguments(x, weight, bias, None, g, grids)
        partial = torch.empty(ask("patch_embed3d_partials", x, *arguments), dtype=torch.float32, device=x.device)
        arguments = (pointer(dw), pointer(db), partial.data_ptr(), *arguments)
        launch("patch_embed3d_dw", op, x, arguments, (x, g), (dw, db, partial))
    if needs[3] and pos is not None:
        if summed(pos, x):
            dpos = torch.empty(pos.shape, dtype=pos.dtype, device=pos.device)
            size = dpos.numel()
            arguments = (g.data_ptr(), DTYPE[g.dtype], x.shape[0], size, dpos.data_ptr(), DTYPE[dpos.dtype], size)
            launch("patch_sum", op, x, arguments, (g,), (dpos,))
        else:
            dpos = g.view(pos.shape).to(pos.dtype, copy=True)
    return dx, dw, db, dpos


def _move(tokens, video, grid, patch, channels, order, back) -> None:
    arguments = (
        items(video, channels, patch, grid, tokens), tuple(patch), inside(channels, *patch, order), channels,
        tokens.element_size(), back,
    )  # fmt: skip
    op, ends = "unpatchify3d_backward" if back else "unpatchify3d", ((tokens,), (video,))
    launch("patch_move", op, tokens, arguments, *(reversed(ends) if back else ends))


unpatchify3d, unpatchify3d_backward = moves(_move)


def register() -> None:
    _register(Impl("patch_embed3d", "cuda", _embeds, patch_embed3d, patch_embed3d_backward))
    _register(Impl("unpatchify3d", "cuda", _moves, unpatchify3d, unpatchify3d_backward))
