"""What fastdit's attention processors share: how diffusers and torch.compile see them, and the projections."""

from __future__ import annotations

from functools import cache
from typing import Any

from torch import Tensor


class Processor:
    """One instance serves all layers: processors are guarded by identity under torch.compile.

    original: diffusers' processor, for the calls that the subclass does not cover.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, original: Any):
        self.original = original

    def __deepcopy__(self, memo):
        return self

    def __reduce__(self):
        return shared, (type(self),)


@cache
def shared(kind: type) -> Any:
    return kind()


def queries_keys_values(attn: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, H, D) of x, and twice (B, M, H, D) of context, or of x without one; the layers are called."""
    context = x if context is None else context
    heads = (attn.heads, -1)
    q, k, v = (t.unflatten(-1, heads) for t in (attn.to_q(x), attn.to_k(context), attn.to_v(context)))
    return q, k, v
