"""SwiGLU of three linear layers, under the names that models give them, or of two.

y = down(silu(gate(x)) * up(x)),    gate and up in one layer where there are two
"""

from __future__ import annotations

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
    ("gate_proj", "up_proj", "down_proj"),  # ACE-Step
    ("gate_layer", "proj", "out"),  # Qwen-Image 2.1
)
ACTIVATION = "activation_fn"  # or a function


def names(module: Any) -> tuple[str, str, str] | None:
    """Of its gate, its other factor and its output."""
    return next((three for three in NAMES if has(module, *three)), None)


def forward(self, x: Tensor) -> Tensor:
    gate, up, down = (getattr(self, name) for name in names(self) or ())
    return down(ops.activation(gate(x), "silu", up=up(x)))


def hidden_states_forward(self, hidden_states: Tensor) -> Tensor:
    return forward(self, hidden_states)


hidden_states_forward.__name__ = "forward"
FORWARDS = {"x": forward, "hidden_states": hidden_states_forward}


def matches(module: Any) -> bool:
    three = names(module)
    if three is None or parameters(module) not in ([name] for name in FORWARDS):
        return False
    x, layers = numbers(2, 3), (lambda x: 2 * x, lambda x: x + 1, lambda x: 3 * x)
    parts = dict(zip((*three, ACTIVATION), (*layers, F.silu), strict=True))
    return follows(module, parts, (x,), 3 * (F.silu(2 * x) * (x + 1)))


def refuse(module: Any) -> str | None:
    act = getattr(module, ACTIVATION, None)
    reason = None if act is None else refuse_activation(act)
    return reason or unknown(module, *(names(module) or ()), ACTIVATION)


register(
    Kind(
        name="feed-forward (SwiGLU of three linear layers)",
        ops=("activation",),
        match=matches,
        refuse=refuse,
        patches=lambda m: [(m, "forward", FORWARDS[parameters(m)[0]])],
        absorbs=lambda m: [getattr(m, ACTIVATION)] if has(m, ACTIVATION) else [],
        # the product in a pass of its own, 3 less 1
        saving=lambda m: 2 * getattr(m, (names(m) or ("",))[0]).out_features * itemsize(m),
        part=True,
    )
)


# Two layers: OmniGen -----------------------------------------------------------------------------------------------


def joint_forward(self, hidden_states: Tensor) -> Tensor:
    gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
    return self.down_proj(ops.activation(gate, "silu", up=up))


joint_forward.__name__ = "forward"
JOINT = ("gate_up_proj", "down_proj", ACTIVATION)


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
