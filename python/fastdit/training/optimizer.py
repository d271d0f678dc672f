"""AdamW on every parameter; or Muon on the matrices and kernels of the blocks, and AdamW on the rest.

Muon (K. Jordan, 2024, kellerjordan.github.io/posts/muon) steps along the momentum's nearest orthogonal matrix:

    B = momentum * B + G;   W -= lr * sqrt(max(1, rows / columns)) * orthogonal(G + momentum * B)

A convolution's kernel (out, in, t, h, w) is the matrix (out, in*t*h*w).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fastdit.training import config as settings

KEPT: dict[type, tuple[str, ...]] = {
    torch.optim.AdamW: ("exp_avg", "exp_avg_sq", "step"),
    torch.optim.Muon: ("momentum_buffer",),
}  # of each parameter


class Optimizers:
    """`step(lr)` on named parameters; `kept(name)` is all that is remembered of one.

    Args: named: the parameters. blocks: modules whose matrices and kernels Muon takes, but for those of adaLN, which
        begin at zero.
    Raises: ValueError: Muon without a matrix.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], blocks: Sequence[nn.Module], config: settings.Optimizer):
        self.named, self.config = named, config
        matrices = set(_matrices(blocks)) if config.kind == "muon" else set()
        if config.kind == "muon" and not matrices:
            raise ValueError(
                "optimizer: muon needs matrices or kernels; got blocks without any, expected those of transformers or "
                "convolutions; take adamw."
            )
        taken = [p for p in named.values() if p in matrices]
        self.seen = {p: p if p.ndim == 2 else nn.Parameter(p.detach().view(len(p), -1)) for p in taken}  # one storage
        rest = [p for p in named.values() if p not in matrices]
        self.adamw = torch.optim.AdamW(
            rest, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
        self.every: list[torch.optim.Optimizer] = [self.adamw]
        if matrices:
            seen = self.seen.values()
            self.every.append(torch.optim.Muon(seen, lr=config.muon_lr, weight_decay=config.weight_decay))

    def zero_grad(self) -> None:
        for p in self.named.values():
            p.grad = None

    def step(self, lr: float) -> None:
        """With AdamW's rate `lr`, and Muon's in proportion."""
        for p, matrix in self.seen.items():
            if matrix is not p:
                matrix.grad = None if p.grad is None else p.grad.reshape(matrix.shape)
        for optimizer in self.every:
            full = self.config.lr if optimizer is self.adamw else self.config.muon_lr
            for group in optimizer.param_groups:
                group["lr"] = full * (lr / self.config.lr)
            optimizer.step()

    def kept(self, name: str) -> dict[str, Tensor]:
        """Moments by name; zero before the first gradient."""
        p = self.named[name]
        optimizer, p = (self.every[1], self.seen[p]) if p in self.seen else (self.adamw, p)
        moments = optimizer.state[p]
        if not moments:
            for kind in KEPT[type(optimizer)]:
                moments[kind] = torch.zeros((), device=p.device) if kind == "step" else torch.zeros_like(p)
        return {kind: moments[kind] for kind in KEPT[type(optimizer)]}


def _matrices(blocks: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    for block in blocks:
        for name, p in block.named_parameters():
            wide = p.ndim >= 2 and p.numel() > len(p)  # a norm's gain may be (C, 1, 1, 1)
            if wide and p.requires_grad and "adaLN_modulation" not in name:
                yield p
