"""Recognising a layer by what its forward computes: run it on a few numbers, with stand-ins for its parts.

Code that is copied from repository to repository keeps its names and changes its formula. A forward that reads
anything but the parts that it is given, or makes something else of them, is not the one that is known.
"""

from __future__ import annotations

import inspect
import warnings
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn


class StandIn:
    """A module's settings and methods, and in the place of its children and parameters what the caller gives."""

    def __init__(self, module: nn.Module, parts: dict[str, Any]):
        self.__dict__.update({name: v for name, v in module.__dict__.items() if not name.startswith("_")})
        self.__dict__.update(parts)
        self._class = type(module)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.__dict__["_class"], name)
        if not isinstance(method, FunctionType):
            raise AttributeError(name)
        return MethodType(method, self)


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")


def follows(
    module: nn.Module, parts: dict[str, Any], inputs: tuple[Any, ...], expected: Tensor, method: str = "forward"
) -> bool:
    """Does this method of the module's class make `expected` of the inputs and these parts?"""
    forward = inspect.unwrap(getattr(type(module), method))
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            actual = forward(StandIn(module, parts), *inputs)
    except Exception:
        return False
    same = isinstance(actual, Tensor) and actual.shape == expected.shape
    return same and torch.allclose(actual.double(), expected.double())
