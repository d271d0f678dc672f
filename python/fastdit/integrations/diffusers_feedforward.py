"""diffusers' feed-forward activations (GELU, GEGLU, SwiGLU with their projection), in whatever model they stand."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize


def gelu_forward(self, hidden_states: Tensor) -> Tensor:
    return ops.activation(self.proj(hidden_states), "gelu_tanh" if self.approximate == "tanh" else "gelu")


def gated_forward(self, hidden_states: Tensor) -> Tensor:
    up, gate = self.proj(hidden_states).chunk(2, dim=-1)
    return ops.activation(gate, "silu" if hasattr(self, "activation") else "gelu", up=up)


gelu_forward.__name__ = gated_forward.__name__ = "forward"


def is_gelu(module: Any) -> bool:
    return has(module, "proj", "approximate", "gelu") and module.approximate in ("none", "tanh")


def is_gated(module: Any) -> bool:
    name = type(module).__name__
    return has(module, "proj") and (
        (name == "GEGLU" and has(module, "gelu")) or (name == "SwiGLU" and type(module.activation) is nn.SiLU)
    )


register(
    Kind(
        name="feed-forward activation",
        ops=("activation",),
        match=lambda m: is_gelu(m) or is_gated(m),
        refuse=lambda m: None,
        patches=lambda m: [(m, "forward", gelu_forward if is_gelu(m) else gated_forward)],
        # gated: one product less to write and read; the plain ones gain arithmetic, not traffic
        saving=lambda m: 0 if is_gelu(m) else m.proj.out_features * itemsize(m),
        part=True,
    )
)
