"""An average of a model's weights over its training: the weights that generate best."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class EMA:
    """average = d * average + (1 - d) * weights after each step n, d = min(decay, (1 + n) / (10 + n)).

    `shadow` holds the averages by parameter name, in the parameters' dtype and placement. Buffers are not averaged.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.live = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.shadow: dict[str, Tensor] = {name: p.detach().clone() for name, p in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.shadow.values()), [p.detach() for p in self.live.values()], weight)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model computes with the averages."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, p in self.live.items():
            kept = p.detach().clone()
            p.copy_(self.shadow[name])
            self.shadow[name].copy_(kept)
