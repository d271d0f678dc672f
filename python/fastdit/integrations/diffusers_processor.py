"""What fastdit's attention processors share: how diffusers and torch.compile see them."""

from __future__ import annotations

from functools import cache
from typing import Any


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
