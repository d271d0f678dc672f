"""The forwards, one class per layer: `kernelize` binds a class's `forward` to the layer that it replaces.

So they have no state, no constructor and no other member; parameters and submodules are the replaced layer's, and
linear layers are called, never read. Names and signatures are those of diffusers' classes. All have a backward and
compile. Where a dtype is mixed in a way that the original does not round as the op does, the original runs.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_feedforward import gated_forward, gelu_forward


def tokens(x: Tensor) -> Tensor:
    """As `ops.norm_modulate` takes them: at most three dims, channels side by side; no copy of a projection's heads."""
    x = x if x.stride(-1) == 1 else x.contiguous()  # an eager patch embedding leaves them transposed
    return x if x.ndim < 4 else x.flatten(0, -3)


def modulated(norm: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """norm(x) * (1 + scale) + shift in one pass; rounds after each step as eager does, if there is one dtype."""
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    one = all(t is None or t.dtype == x.dtype for t in (weight, bias, shift, scale))
    return ops.norm_modulate(
        tokens(x), shift=shift, scale=scale, weight=weight, bias=bias, eps=norm.eps,
        norm="layer" if isinstance(norm, nn.LayerNorm) else "rms", precision="native" if one else "fp32",
    )  # fmt: skip


class AdaLayerNormZero(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, x, timestep=None, class_labels=None, hidden_dtype=None, emb=None):
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, *rest = self.linear(self.silu(emb)).chunk(6, dim=1)
        return modulated(self.norm, x, shift, scale), *rest


class AdaLayerNormZeroSingle(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, x, emb=None):
        shift, scale, gate = self.linear(self.silu(emb)).chunk(3, dim=1)
        return modulated(self.norm, x, shift, scale), gate


class AdaLayerNormContinuous(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, x, conditioning_embedding):
        emb = self.linear(self.silu(conditioning_embedding).to(x.dtype))
        scale, shift = emb.chunk(2, dim=1)
        return modulated(self.norm, x, shift, scale)


class FP32LayerNorm(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, inputs):
        if len(self.normalized_shape) != 1 or inputs.ndim < 2:
            return type(self).forward(self, inputs)
        y = ops.norm_modulate(tokens(inputs), weight=self.weight, bias=self.bias, eps=self.eps)
        return y.view(inputs.shape)


class RMSNorm(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, hidden_states):
        x, weight = hidden_states, self.weight
        if x.ndim < 2 or (weight is not None and (weight.dtype != x.dtype or weight.ndim != 1)):
            return type(self).forward(self, x)  # an fp32 weight makes an fp32 result
        y = ops.norm_modulate(tokens(x), weight=weight, bias=self.bias, norm="rms", eps=self.eps, precision="native")
        return y.view(x.shape)


class GELU(nn.Module):
    has_backward = True
    can_torch_compile = True
    forward = gelu_forward


class GEGLU(nn.Module):
    has_backward = True
    can_torch_compile = True

    def forward(self: Any, hidden_states, *args, **kwargs):
        return gated_forward(self, hidden_states)


class SwiGLU(nn.Module):
    has_backward = True
    can_torch_compile = True
    forward = gated_forward
