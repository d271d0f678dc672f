"""AdamW on every parameter; or Muon on the matrices of the blocks, and AdamW on the rest.

Muon (K. Jordan, 2024, kellerjordan.github.io/posts/muon) steps along the momentum's nearest orthogonal matrix:

    B = momentum * B + G;   W -= lr * sqrt(max(1, rows / columns)) * orthogonal(G + momentum * B)
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

    Args: named: the parameters. blocks: modules whose matrices Muon takes, but for those of adaLN, which begin at zero.
    Raises: ValueError: Muon without a matrix.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], blocks: Sequence[nn.Module], config: settings.Optimizer):
        self.named, self.config = named, config
        matrices = set(_matrices(blocks)) if config.kind == "muon" else set()
        if config.kind == "muon" and not matrices:
            raise ValueError(
                "optimizer: muon needs matrices; got blocks without any, expected those of transformers; take adamw."
            )
        rest = [p for p in named.values() if p not in matrices]
        self.adamw = torch.optim.AdamW(
            rest, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
        )
        self.every: list[torch.optim.Optimizer] = [self.adamw]
        if matrices:
            taken = [p for p in named.values() if p in matrices]
            self.every.append(torch.optim.Muon(taken, lr=config.muon_lr, weight_decay=config.weight_decay))
        self.of = {p: o for o in self.every for group in o.param_groups for p in group["params"]}

    def zero_grad(self) -> None:
        for optimizer in self.every:
            optimizer.zero_grad(set_to_none=True)

    def step(self, lr: float) -> None:
        """With AdamW's rate `lr`, and Muon's in proportion."""
        for optimizer in self.every:
            full = self.config.lr if optimizer is self.adamw else self.config.muon_lr
            for group in optimizer.param_groups:
                group["lr"] = full * (lr / self.config.lr)
            optimizer.step()

    def kept(self, name: str) -> dict[str, Tensor]:
        """Moments by name; zero before the first gradient."""
        p = self.named[name]
        optimizer = self.of[p]
        moments = optimizer.state[p]
        if not moments:
            for kind in KEPT[type(optimizer)]:
                moments[kind] = torch.zeros((), device=p.device) if kind == "step" else torch.zeros_like(p)
        return {kind: moments[kind] for kind in KEPT[type(optimizer)]}


def _matrices(blocks: Iterable[nn.Module]) -> Iterable[nn.Parameter]:
    for block in blocks:
        for name, p in block.named_parameters():
            if p.ndim == 2 and p.requires_grad and "adaLN_modulation" not in name:
                yield p
