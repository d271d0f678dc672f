"""The norm before the output layer, whose modulation stands in the model's own forward (PixArt, Latte, Allegro, LTX).

    proj_out(norm_out(x) * (1 + scale) + shift),    (shift, scale) = scale_shift_table + embedded timestep

The norm hands out a value that waits for the product and the sum, and takes all three steps in one pass; to anybody
who asks for anything else it is the normalised tensor. So the forward stays the original's, whatever it does between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastdit import ops
from fastdit.integrations.joint import refuse_plain_norms
from fastdit.integrations.registry import Kind, has_hooks, original, register
from fastdit.integrations.structure import has, itemsize


@dataclass(frozen=True, eq=False)
class Deferred:
    """LayerNorm(x) without parameters, times `factor` (B, 1 or N, C) once there is one; x (B, N, C)."""

    x: Tensor
    eps: float
    factor: Tensor | None = None

    def dense(self) -> Tensor:
        n = F.layer_norm(self.x, self.x.shape[-1:], eps=self.eps)
        return n if self.factor is None else n * self.factor

    def fits(self, table: Any) -> bool:
        if not isinstance(table, Tensor) or table.dtype != self.x.dtype or table.ndim != 3:
            return False
        batch, tokens, width = self.x.shape
        return table.shape in ((batch, 1, width), (batch, tokens, width))

    def __mul__(self, factor: Any) -> Any:
        if self.factor is None and self.fits(factor):
            return replace(self, factor=factor)
        return self.dense() * factor

    def __add__(self, shift: Any) -> Any:
        if self.factor is None or not self.fits(shift):
            return self.dense() + shift
        # the factor is 1 + scale, rounded: the difference is a number whose sum with 1 is that factor again
        return ops.norm_modulate(self.x, shift=shift, scale=self.factor - 1, eps=self.eps, precision="native")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.x if name in ("device", "dtype", "shape", "ndim") else self.dense(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in STEPS and len(args) == 2 and not kwargs:  # with the tensor in front, or in a graph
            waiting, other = args if isinstance(args[0], cls) else args[::-1]
            return STEPS[func](waiting, other)
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


STEPS = {torch.Tensor.mul: Deferred.__mul__, torch.Tensor.add: Deferred.__add__}


def of_dense(name: str) -> Callable:
    return lambda self, *args: getattr(self.dense(), name)(*args)


for _name in "getitem len iter neg radd rmul sub rsub truediv rtruediv matmul pow".split():
    setattr(Deferred, f"__{_name}__", of_dense(f"__{_name}__"))


def forward(self, input: Tensor) -> Tensor | Deferred:
    """nn.LayerNorm; autocast has a dtype of its own for the norm, and hooks get a tensor."""
    hooked = self._forward_hooks or self._backward_hooks or self._backward_pre_hooks
    if hooked or input.ndim != 3 or torch.is_autocast_enabled(input.device.type):
        return original(self, input)
    return Deferred(input, self.eps)


def norms(model: Any) -> list[Any]:
    """Of each stream: its last norm, where a table (2, C) stands beside it."""
    return [
        getattr(model, f"{stream}norm_out")
        for stream in ("", "audio_")
        if has(model, f"{stream}norm_out", f"{stream}scale_shift_table", f"{stream}proj_out")
        and getattr(model, f"{stream}scale_shift_table").ndim == 2
        and isinstance(getattr(model, f"{stream}norm_out"), nn.LayerNorm)
    ]


def refuse(model: Any) -> str | None:
    hooked = has_hooks(norms(model))
    return f"{hooked} carries a hook, which expects a tensor" if hooked else refuse_plain_norms(*norms(model))


register(
    Kind(
        name="output norm (modulated by the model)",
        ops=("norm_modulate",),
        match=lambda m: bool(norms(m)),
        refuse=refuse,
        patches=lambda m: [(norm, "forward", forward) for norm in norms(m)],
        # passes over (tokens, C): norm 2, scale 2, shift 2 against 2
        saving=lambda m: sum(4 * norm.normalized_shape[0] * itemsize(m) for norm in norms(m)),
    )
)
