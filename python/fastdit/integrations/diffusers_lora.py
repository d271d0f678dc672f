"""LoRA scales in the forward of a diffusers transformer: `attention_kwargs={"scale": 0.5}` weighs its LoRA layers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def lora_scaled(forward: Callable) -> Callable:
    """As the originals' `@apply_lora_scale("attention_kwargs")`, without importing diffusers: called, it is there."""

    @functools.wraps(forward)
    def wrapper(self, *args, attention_kwargs: dict[str, Any] | None = None, **kwargs):
        if (attention_kwargs or {}).get("scale", 1.0) == 1.0:
            return forward(self, *args, **kwargs)
        from diffusers.utils import apply_lora_scale

        scaled = apply_lora_scale("attention_kwargs")(forward)
        return scaled(self, *args, attention_kwargs=attention_kwargs, **kwargs)

    wrapper.__name__ = "forward"
    return wrapper
