"""Activations of MLPs, plain and gated. Math in promote(x.dtype, fp32), one rounding at the end."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTS = ("gelu", "gelu_tanh", "silu", "relu")


def activation(x: Tensor, act: str = "gelu_tanh", *, up: Tensor | None = None) -> Tensor:
    """act(x) * up."""
    wide = x if up is None else x.to(torch.promote_types(x.dtype, torch.float32))  # torch's own round once, at the end
    if act == "gelu":
        y = F.gelu(wide)
    elif act == "gelu_tanh":
        y = F.gelu(wide, approximate="tanh")
    else:
        y = F.silu(wide) if act == "silu" else F.relu(wide)
    return y if up is None else (y * up).to(x.dtype)
