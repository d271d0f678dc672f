"""SwiGLU and GEGLU of three linear layers, under the names that models give them, and SwiGLU of two.

y = down(act(gate(x)) * up(x)),    act = silu or gelu, gate and up in one layer where there are two
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import ops
from fastdit.integrations.probe import follows, numbers
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, parameters, refuse_activation, unknown

NAMES = (
    ("w1", "w3", "w2"),  # Z-Image, HiDream
    ("linear_1", "linear_2", "out_projection"),  # AuraFlow
    ("gate", "up", "down"),  # Krea 2
    ("gate_proj", "up_proj", "down_proj"),  # ACE-Step, Cosmos 3
    ("gate_layer", "proj", "out"),  # Qwen-Image 2.1
    ("gate_proj", "up_proj", "linear_fc2"),  # ERNIE-Image
    ("linear_1", "linear_3", "linear_2"),  # Lumina-Next, Lumina 2
)
ACTIVATIONS = ("activation_fn", "act_fn", "silu")  # or a function


def names(module: Any) -> tuple[str, str, str] | None:
    """Of its gate, its other factor and its output."""
    return next((three for three in NAMES if has(module, *three)), None)


def activations(module: Any) -> list[Any]:
    """Its activation, where that is a module."""
    return [getattr(module, name) for name in ACTIVATIONS if has(module, name)]


def gated(module: Any, x: Tensor, act: str) -> Tensor:
    gate, up, down = (getattr(module, name) for name in names(module) or ())
    return down(ops.activation(gate(x), act, up=up(x)))


def forward(self, x: Tensor) -> Tensor:
    return gated(self, x, "silu")


def hidden_states_forward(self, hidden_states: Tensor) -> Tensor:
    return gated(self, hidden_states, "silu")


def gelu_forward(self, x: Tensor) -> Tensor:
    return gated(self, x, "gelu")


hidden_states_forward.__name__ = gelu_forward.__name__ = "forward"
SWIGLU = {"x": forward, "hidden_states": hidden_states_forward}
GEGLU = {"x": gelu_forward}


def matches(module: Any, forwards: dict[str, Any], act: Callable[[Tensor], Tensor]) -> bool:
    three = names(module)
    if three is None or parameters(module) not in ([name] for name in forwards):
        return False
    x, layers = numbers(2, 3), (lambda x: 2 * x, lambda x: x + 1, lambda x: 3 * x)
    parts = {**dict(zip(three, layers, strict=True)), **dict.fromkeys(ACTIVATIONS, F.silu)}
    return follows(module, parts, (x,), 3 * (act(2 * x) * (x + 1)))


def rounds_late(activation: Any) -> bool:
    """diffusers' SiLU in fp32, whose output alone is rounded."""
    return type(activation).__name__ == "FP32SiLU"


def refuse(module: Any) -> str | None:
    reasons = (refuse_activation(act) for act in activations(module) if not rounds_late(act))
    reason = next(filter(None, reasons), None)
    return reason or unknown(module, *(names(module) or ()), *ACTIVATIONS, "hidden_act")


def passes(module: Any) -> int:
    """The product in a pass of its own, 3 less 1; in two bytes a SiLU in fp32 has casts too, 3 and 3, and 2 more."""
    return 10 if itemsize(module) == 2 and any(map(rounds_late, activations(module))) else 2


def register_gated(name: str, forwards: dict[str, Any], act: Callable[[Tensor], Tensor]) -> None:
    """forwards: the replacement for each name that the forward's parameter has."""
    register(
        Kind(
            name=f"feed-forward ({name} of three linear layers)",
            ops=("activation",),
            match=lambda m: matches(m, forwards, act),
            refuse=refuse,
            patches=lambda m: [(m, "forward", forwards[parameters(m)[0]])],
            absorbs=activations,
            saving=lambda m: passes(m) * getattr(m, (names(m) or ("",))[0]).out_features * itemsize(m),
            part=True,
        )
    )


register_gated("SwiGLU", SWIGLU, F.silu)
register_gated("GEGLU", GEGLU, F.gelu)


# Two layers: OmniGen -----------------------------------------------------------------------------------------------


def joint_forward(self, hidden_states: Tensor) -> Tensor:
    gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return self.down_proj(ops.activation(gate, "silu", up=up))


joint_forward.__name__ = "forward"
JOINT = ("gate_up_proj", "down_proj", "activation_fn")


def matches_joint(module: Any) -> bool:
    if not has(module, *JOINT) or parameters(module) != ["hidden_states"]:
        return False
    x = numbers(2, 3)
    layers = (lambda x: torch.cat([2 * x, x + 1], dim=-1), lambda x: 3 * x, F.silu)
    return follows(module, dict(zip(JOINT, layers, strict=True)), (x,), 3 * (F.silu(2 * x) * (x + 1)))


register(
    Kind(
        name="feed-forward (SwiGLU of two linear layers)",
        ops=("activation",),
        match=matches_joint,
        refuse=lambda m: refuse_activation(m.activation_fn) or unknown(m, *JOINT),
        patches=lambda m: [(m, "forward", joint_forward)],
        absorbs=lambda m: [m.activation_fn],
        saving=lambda m: m.gate_up_proj.out_features * itemsize(m),  # twice half of it: 3 less 1, as above
        part=True,
    )
)
