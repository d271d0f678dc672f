"""What fastdit's attention processors share: how diffusers and torch.compile see them, and the projections."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastdit.integrations.absorbed import between_hooks
from fastdit.integrations.registry import RECORD

OURS = (None, "fastdit")  # choices of an attention backend that leave the attention to fastdit


class Processor:
    """One instance serves all layers of a model: processors are guarded by identity under torch.compile.

    original: diffusers' processor, for the calls that the subclass does not cover, and for all of them once
    another attention backend or context parallelism is chosen (`set_attention_backend`, `enable_parallelism`).
    """

    def __init__(self, original: Any):
        self.original = original
        self.replaced = True  # False: the original does the work

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "__call__" in cls.__dict__:
            cls.__call__ = unless_chosen(cls.__call__)  # type: ignore[method-assign]

    # The original's, so that diffusers finds what it looks for: it skips processors without them.
    @property
    def _attention_backend(self) -> Any:
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend: Any) -> None:
        self.original._attention_backend = backend
        self.replaced = refuse_choice(self.original) is None

    @property
    def _parallel_config(self) -> Any:
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config: Any) -> None:
        self.original._parallel_config = config
        self.replaced = refuse_choice(self.original) is None


def unless_chosen(call: Callable) -> Callable:
    @functools.wraps(call)  # diffusers reads the signature
    def __call__(self, attn, *args, **kwargs):
        if not self.replaced:
            return self.original(attn, *args, **kwargs)
        return between_hooks(getattr(attn, RECORD).absorbed, call, self, attn, *args, **kwargs)

    return __call__


def refuse_choice(processor: Any) -> str | None:
    """Has somebody chosen another attention than fastdit's for it?"""
    if getattr(processor, "_attention_backend", None) not in OURS:
        return "another attention backend was chosen for it"
    if getattr(processor, "_parallel_config", None) is not None:
        return "context parallelism was set up for it"
    return None


def refuse_processor(processor: Any, *known: str) -> str | None:
    """Is it of none of the known classes, or has somebody chosen another attention for it?"""
    name = type(processor).__name__
    if name not in known:
        return f"its processor is {name}, not {' or '.join(known)}"
    return refuse_choice(processor)


def refuse_weighted_rms(norm_q: Any, norm_k: Any) -> str | None:
    """Of the norms of queries and keys that `qk_norm_rope` computes with one eps."""
    if (
        any(type(norm) is not nn.RMSNorm or norm.weight is None for norm in (norm_q, norm_k))
        or norm_q.eps != norm_k.eps
    ):
        return "its norms are not nn.RMSNorm with weights and one eps"
    return None


@functools.cache
def shared(kind: type) -> Any:
    """The pattern of a processor; `accelerate` places one copy of it per model."""
    return kind()


def per_model(replacement: Any, placed: dict[Any, Any]) -> Any:
    """The model's own copy of a processor, made on first use; anything else as it is."""
    if not isinstance(replacement, Processor):
        return replacement
    if replacement not in placed:
        placed[replacement] = copy.deepcopy(replacement)
    return placed[replacement]


def queries_keys_values(attn: Any, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(B, N, H, D) of x, and twice (B, M, H, D) of context, or of x without one; the layers are called."""
    context = x if context is None else context
    q, k, v = by_head(attn, attn.to_q(x), attn.to_k(context), attn.to_v(context))
    return q, k, v


def by_head(attn: Any, *projected: Tensor) -> tuple[Tensor, ...]:
    """Each (B, N, C) -> (B, N, H, D)."""
    return tuple(t.unflatten(-1, (attn.heads, -1)) for t in projected)
