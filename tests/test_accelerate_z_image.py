"""accelerate on diffusers' Z-Image: masks, mixed dtypes, compilation, the ControlNet, what stays."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_one_graph, layers, reasons
from fastdit.testing.exact import exact
from fastdit.testing.zoo import randn, z_image

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def rotations(*shape):
    return torch.polar(torch.ones(shape), randn(*shape))


@each_dtype
@torch.no_grad()
def test_head_width(dtype):
    """Heads of 128; a sample with padding."""
    config = dict(dim=256, n_heads=2, n_kv_heads=2, axes_dims=[32, 48, 48], n_layers=1, n_refiner_layers=0)
    block = z_image.z_image(**config).to(dtype).layers[0]
    x, temb, freqs = randn(2, 9, 256).to(dtype), randn(2, 256).to(dtype), rotations(2, 9, 64)
    mask = torch.arange(9) < torch.tensor([[9], [6]])
    truth = exact(block)(x.double(), mask, freqs.cdouble(), temb.double())
    before = block(x, mask, freqs, temb)
    fastdit.accelerate(block)
    close.assert_close(block(x, mask, freqs, temb), truth, before)


@torch.no_grad()
def test_other_masks_keep_the_attention_of_diffusers():
    block = z_image.z_image().layers[0]
    x, temb, freqs = randn(2, 9, 72), randn(2, 72), rotations(2, 9, 12)
    for mask in (randn(2, 9), randn(2, 1, 9, 9)):
        truth = exact(block)(x.double(), mask.double(), freqs.cdouble(), temb.double())
        before = block(x, mask, freqs, temb)
        fastdit.accelerate(block)
        close.assert_close(block(x, mask, freqs, temb), truth, before)
        fastdit.restore(block)


@torch.no_grad()
def test_weights_of_another_dtype_keep_the_original():
    """It widens the tokens."""
    block = z_image.z_image().layers[0]
    x, temb, freqs = randn(2, 9, 72).double(), randn(2, 72), rotations(2, 9, 12)
    for norm in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
        getattr(block, norm).double()
    block.attention.double(), block.feed_forward.double()
    before = block(x.float(), None, freqs, temb)
    fastdit.accelerate(block)
    after = block(x.float(), None, freqs, temb)
    assert after.dtype == before.dtype == torch.float64


@torch.no_grad()
def test_compiled_block():
    """One graph for all lengths, with padding and with clean and noisy tokens."""
    block = z_image.z_image().layers[0]
    fastdit.accelerate(block)

    def call(tokens):
        mask = torch.arange(tokens) < torch.tensor([[tokens], [7]])
        noisy = (torch.arange(tokens) > 5).long().expand(2, tokens)
        return randn(2, tokens, 72), mask, rotations(2, tokens, 12), None, noisy, randn(2, 72), randn(2, 72, seed=2)

    check_one_graph(block, map(call, (15, 12, 20)))


def test_what_stays():
    model = z_image.z_image()
    model.layers[0].ffn_norm2 = nn.LayerNorm(72)
    model.layers[1].attention.processor._attention_backend = "native"
    model.context_refiner[0].gate = nn.Parameter(torch.ones(72))
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "Z-Image block": 2,
        "attention (ZSingleStreamAttnProcessor)": 1,
        "feed-forward (SwiGLU of three linear layers)": 2,
        "Z-Image output layer (norm, modulation)": 1,
    }
    assert reasons(report) >= {
        "its norm is a LayerNorm, not an RMSNorm with a weight",
        "another attention backend was chosen for it",
        "has gate, which the ZImageTransformerBlock that is known does not have",
    }
