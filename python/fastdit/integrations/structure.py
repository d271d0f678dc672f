"""What recognising a block has in common: attributes, and the reasons why a layer is not the one that is known."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fastdit.integrations.registry import RECORD


def has(module: Any, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


def unknown(module: Any, *known: str) -> str | None:
    """The first child, parameter or buffer of the module, or own attribute that its forward reads, not among `known`.

    What a fork adds to a block (an adapter, a second norm, a flag) is seen here, and the block is left as it is; also
    what a cache adds that replaces a class's forward and keeps its state in attributes of the class (TeaCache).
    """
    held = {*module._modules, *module._parameters, *module._buffers}
    read = inspect.unwrap(type(module).forward).__code__.co_names
    methods = (property, classmethod, staticmethod)
    of_class = {
        n for c in type(module).__mro__ for n, v in vars(c).items() if not (callable(v) or isinstance(v, methods))
    }
    settings = {name for name in {*module.__dict__, *of_class} if not name.startswith("_") and name != "training"}
    for name in sorted((held | settings.intersection(read)) - set(known)):
        if name in held and getattr(module, name) is None:
            continue
        return f"has {name}, which the {type(module).__name__} that is known does not have"
    return None


def law(module: Any, x: Tensor, *tables: Tensor | None) -> str:
    """The rounding law of modulation with these tables and norm weights.

    Under autocast x and its tables, or the norm's weights, differ in dtype; promotion makes the math fp32.
    """
    same = all(table is None or table.dtype == x.dtype for table in tables)
    return getattr(module, RECORD).precision if same else "fp32"


def autocasted(x: Tensor) -> Tensor:
    """x as a linear layer or a convolution takes it under autocast."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def itemsize(module: Any) -> int:
    """Bytes of a value between the layers: as a weight that is stored as it is computed, or two (packed, fp8)."""
    sizes = (p.element_size() for p in module.parameters() if p.is_floating_point())
    return next((size for size in sizes if size > 1), 2)


def is_causal_conv(module: object) -> bool:
    """Wan's convolution, or Qwen-Image 2.1's Conv2d of single frames: each pads by its own `_padding`."""
    pads = len(getattr(module, "_padding", ()))
    return (isinstance(module, nn.Conv3d) and pads == 6) or (isinstance(module, nn.Conv2d) and pads == 4)


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


def reads(function: Any) -> frozenset[str]:
    """The names that a function looks up: attributes, methods and globals. Copies of one original read the same."""
    return frozenset(inspect.unwrap(function).__code__.co_names)


def parameters(module: Any) -> list[str]:
    """Names of the parameters of the module's forward, without self."""
    return list(inspect.signature(type(module).forward).parameters)[1:]
