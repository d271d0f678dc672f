"""Hooks of the modules that a replacement reads instead of calling (norms): they run around the replacement.

Offloading and casting bring a module's weights where and as they are needed by hooks on its forward. Those of diffusers
(group offload, layerwise casting) and of accelerate (sequential offload) have both halves as methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn


def between_hooks(modules: Iterable[nn.Module], call: Callable, *args: Any, **kwargs: Any) -> Any:
    """call(*args, **kwargs) with the weights of `modules` in their places."""
    hooks = attached(modules)
    if not hooks:
        return call(*args, **kwargs)
    for hook, module in hooks:
        hook.pre_forward(module)
    try:
        return call(*args, **kwargs)
    finally:
        for hook, module in hooks:
            hook.post_forward(module, None)


def attached(modules: Iterable[nn.Module]) -> list[tuple[Any, nn.Module]]:
    """(hook, module) of the hooks that diffusers and accelerate added since."""
    found: list[tuple[Any, nn.Module]] = []
    for module in modules:
        own = module.__dict__  # a miss of getattr costs ten times as much
        registry, hook = own.get("_diffusers_hook"), own.get("_hf_hook")
        if registry is not None:
            found += [(hook, module) for hook in registry.hooks.values()]
        if hook is not None:
            found.append((hook, module))
    return found
