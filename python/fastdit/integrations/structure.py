"""What recognising a block has in common: attributes, and the reasons why a layer is not the one that is known."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def has(module: Any, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def itemsize(module: Any) -> int:
    return next(module.parameters()).element_size()


def is_causal_conv(module: object) -> bool:
    return isinstance(module, nn.Conv3d) and len(getattr(module, "_padding", ())) == 6


def refuse_convs(*convs: Any) -> str | None:
    for conv in convs:
        plain = type(conv) is nn.Conv2d or is_causal_conv(conv)
        if not plain or conv.groups != 1 or conv.padding_mode != "zeros" or set(conv.dilation) != {1}:
            return f"its convolution is a {type(conv).__name__} with groups, dilation or a wrapper"
    return None


def refuse_norms(*norms: Any) -> str | None:
    for norm in norms:
        if not has(norm, "gamma", "scale", "bias", "channel_first") or not norm.channel_first:
            return f"its norm is a {type(norm).__name__}, not a channel norm"
        if isinstance(norm.bias, Tensor):
            return "its norm has a bias"
    return None


def refuse_activation(module: Any) -> str | None:
    return None if type(module) is nn.SiLU else f"its activation is {type(module).__name__}, not SiLU"
