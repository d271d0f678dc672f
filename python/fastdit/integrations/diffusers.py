"""fastdit among diffusers' attention backends: `model.set_attention_backend("fastdit")` and the context manager.

`register()` makes the entry; `fastdit.accelerate` calls it where diffusers is in use. Nothing here imports diffusers
before that.

An accelerated model runs on fastdit's attention without it. A later `set_attention_backend` with another name is
respected: its attention processors then are diffusers' own again, with that backend, inside accelerated blocks;
`set_attention_backend("fastdit")` and `reset_attention_backend()` take that back. The context manager
`attention_backend(...)` is for models without a choice of their own, so not for accelerated ones.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from fastdit import ops

NAME = "fastdit"
DISPATCH = "diffusers.models.attention_dispatch"


def register() -> None:
    """Add "fastdit" to diffusers' attention backends; a second call does nothing.

    Raises:
        ImportError: diffusers is not installed, or has no attention registry (it came with 0.35).
    """
    from diffusers.models import attention_dispatch as dispatch

    names, registry = dispatch.AttentionBackendName, dispatch._AttentionBackendRegistry
    if NAME not in names._value2member_map_:
        add_member(names, NAME.upper(), NAME)
        checks = [dispatch._check_device, dispatch._check_shape]  # run under DIFFUSERS_ATTN_CHECKS
        registry.register(names(NAME), constraints=checks)(attention)


def register_if_used() -> None:
    if DISPATCH in sys.modules:
        register()


def add_member(enum: Any, name: str, value: str) -> None:
    """One more member of a string enum: diffusers accepts no backend that is not one of its enum's."""
    member = str.__new__(enum, value)
    member._name_, member._value_, member.__objclass__ = name, value, enum
    member._sort_order_ = len(enum._member_names_)
    type.__setattr__(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = enum._value2member_map_[value] = member


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    _parallel_config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`ops.attention` behind the signature of diffusers' registry; all (B, N, H, D).

    Args:
        attn_mask (bool Tensor, true where a key counts): over the keys alone, (N,), (B, N), (B, 1, N) or (B, 1, 1, N),
            B or 1. The keys that count move to the front and their number becomes `kv_len`: no dense mask is made and
            the host does not wait for the device.
        return_lse (bool): also return log-sum-exp (B, H, N) in fp32, as the "flash" backend does.
        enable_gqa (bool): heads of k and v that divide those of q are served with and without it.
    Raises:
        ValueError: dropout, a causal mask, a mask that is not one of keys alone, context parallelism.
    """
    if dropout_p > 0.0:
        raise ValueError(f"fastdit attention: no dropout; got dropout_p={dropout_p}, expected 0; use another backend.")
    if is_causal:
        raise ValueError("fastdit attention: no token-causal mask; got is_causal=True; use another backend.")
    if _parallel_config is not None:
        raise ValueError("fastdit attention: no context parallelism; got a parallel config; use another backend.")
    kv_len = None
    if attn_mask is not None:
        keys = key_mask(attn_mask, key)
        key, value, kv_len = front(keys, key, value)
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    return ops.attention(query, key, value, scale=scale, kv_len=kv_len, return_lse=return_lse)


def key_mask(mask: Tensor, key: Tensor) -> Tensor:
    """A mask over keys as (B, N)."""
    batch, keys = key.shape[:2]
    rows, between = (mask.shape[0], mask.shape[1:-1]) if mask.ndim > 1 else (1, ())
    shaped = 0 < mask.ndim < 5 and mask.shape[-1] == keys and rows in (1, batch) and all(n == 1 for n in between)
    if mask.dtype != torch.bool or not shaped:
        raise ValueError(
            f"fastdit attention: attn_mask must be one of keys alone; got {mask.dtype} {list(mask.shape)}, expected "
            f"bool [{batch}, {keys}] or [{batch}, 1, 1, {keys}], true where a key counts; use another backend for it."
        )
    return mask.reshape(rows, keys).expand(batch, keys)


def front(mask: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys and values that count, in order, before those that do not; and how many there are."""
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    sample = torch.arange(mask.shape[0], device=mask.device)[:, None]
    return key[sample, order], value[sample, order], mask.sum(1, dtype=torch.int32)
