"""The reference activations are those of the codebases: diffusers' MLPs, torch.nn."""

import pytest
import torch
from diffusers.models import activations
from diffusers.models.transformers.transformer_flux2 import Flux2SwiGLU
from torch import nn

from fastdit.reference import activation as ref
from fastdit.testing import close

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def projected(module, dtype):
    module = module.to(dtype)
    x = torch.randn(2, 9, 24).to(dtype)
    return module, x, module.proj(x)


@each_dtype
@pytest.mark.parametrize("approximate, act", [("none", "gelu"), ("tanh", "gelu_tanh")])
def test_gelu(approximate, act, dtype):
    module, x, h = projected(activations.GELU(24, 96, approximate=approximate), dtype)
    close.assert_bitwise(ref.activation(h, act), module(x))
    close.assert_bitwise(ref.activation(h, act), nn.GELU(approximate)(h))


@each_dtype
@pytest.mark.parametrize("kind, act", [(activations.GEGLU, "gelu"), (activations.SwiGLU, "silu")])
def test_gated(kind, act, dtype):
    """diffusers rounds once more, between the activation and the product."""
    module, x, h = projected(kind(24, 96), dtype)
    up, gate = h.chunk(2, dim=-1)
    truth = ref.activation(gate.double(), act, up=up.double())
    close.assert_close(ref.activation(gate, act, up=up), truth, module(x))
    if dtype == torch.float32:
        close.assert_bitwise(ref.activation(gate, act, up=up), module(x))


def test_flux2():
    h = torch.randn(2, 9, 48)
    gate, up = h.chunk(2, dim=-1)
    close.assert_bitwise(ref.activation(gate, "silu", up=up), Flux2SwiGLU()(h))


@each_dtype
def test_silu_and_relu(dtype):
    x = torch.randn(3, 50).to(dtype)
    close.assert_bitwise(ref.activation(x, "silu"), nn.SiLU()(x))
    close.assert_bitwise(ref.activation(x, "relu"), nn.ReLU()(x))
