"""accelerate on diffusers' Lumina 2: head width, masks of any pattern, compilation, what stays."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_one_graph, layers, reasons
from fastdit.testing.exact import exact
from fastdit.testing.zoo import lumina2, randn

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
HOLES = torch.tensor([[0, 1, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0, 0]])


def rotations(*shape):
    return torch.polar(torch.ones(shape), randn(*shape)).cdouble()


@each_dtype
@torch.no_grad()
def test_head_width(dtype):
    """Heads of 96, three to a head of keys, and a mask of any pattern."""
    block = lumina2.lumina2(hidden_size=576, num_attention_heads=6, axes_dim_rope=(32, 32, 32)).layers[0].to(dtype)
    x, temb, freqs = randn(2, 7, 576).to(dtype), randn(2, 576).to(dtype), rotations(2, 7, 48)
    truth = exact(block)(x.double(), HOLES, freqs, temb.double())
    before = block(x, HOLES, freqs, temb)
    fastdit.accelerate(block)
    close.assert_close(block(x, HOLES, freqs, temb), truth, before)


@torch.no_grad()
def test_proportional_attention_goes_to_the_original():
    block = lumina2.lumina2().layers[0]
    x = randn(2, 7, 96)
    before = block.attn(x, x, base_sequence_length=3)
    fastdit.accelerate(block)
    close.assert_bitwise(block.attn(x, x, base_sequence_length=3), before)


@torch.no_grad()
def test_compiled_block():
    """One graph for all lengths, with padding."""
    block = lumina2.lumina2().layers[0]
    fastdit.accelerate(block)

    def call(tokens):
        mask = torch.arange(tokens) < torch.tensor([[tokens], [7]])
        return randn(2, tokens, 96), mask, rotations(2, tokens, 12), randn(2, 96)

    check_one_graph(block, map(call, (15, 12, 20)))


def test_what_stays():
    model = lumina2.lumina2()
    model.layers[0].ffn_norm2 = nn.LayerNorm(96)
    model.layers[1].attn.scale_qk = False
    model.noise_refiner[0].norm1.silu = nn.GELU()
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "Lumina 2 block": 2,
        "attention (Lumina2AttnProcessor2_0)": 1,
        "feed-forward (SwiGLU of three linear layers)": 2,
        "output norm (LuminaLayerNormContinuous)": 1,
    }
    assert reasons(report) >= {
        "its norm is a LayerNorm, not an RMSNorm with a weight",
        "its scale is not that of its head",
        "its modulation is a LuminaRMSNormZero, not SiLU, linear layer and norm",
    }
