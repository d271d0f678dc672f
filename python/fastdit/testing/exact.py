"""Originals in fp64, as truth: what they round to fp32 on the way is kept from rounding."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class _Exact(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def _mochi_rope(freqs: torch.Tensor, pos: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    angles = torch.einsum("nd,dhf->nhf", pos.to(freqs.dtype), freqs)
    return angles.cos(), angles.sin()


def _wide_positions(module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "position_ids": kwargs["position_ids"].double()}


def exact(model: Any) -> Any:
    """A copy of the model in fp64; call it under `no_rounding()`."""
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if type(module).__name__ == "FP32LayerNorm":
            module.__class__ = _Exact
        if isinstance(module, nn.Upsample):  # Wan's rounds to fp32
            module.__class__ = nn.Upsample
        if type(module).__name__ == "Timesteps":  # Motif-Video casts them for narrow weights only
            module.register_forward_hook(lambda module, inputs, output: output.double())
        if type(module).__name__ == "MochiRoPE":  # its positions stay in fp32
            module._create_rope = _mochi_rope
        if type(module).__name__ == "Cosmos3VLTextRotaryEmbedding":  # and so do those of Cosmos 3
            module.register_forward_pre_hook(_wide_positions, with_kwargs=True)
    return double


class no_rounding(TorchFunctionMode):
    """fp64 tensors stay so under `.float()`, and `.to`, `.type` and `f(..., dtype=)` of float32 and bfloat16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if args and isinstance(args[0], torch.Tensor) and args[0].dtype is torch.float64:
            if func is torch.Tensor.float:
                return args[0]
            if func in (torch.Tensor.to, torch.Tensor.type):
                args = tuple(torch.float64 if is_narrow(a) else a for a in args)
            kwargs = {k: torch.float64 if k == "dtype" and is_narrow(v) else v for k, v in kwargs.items()}
        return func(*args, **kwargs)


def is_narrow(value: Any) -> bool:
    return value is torch.float32 or value is torch.bfloat16
