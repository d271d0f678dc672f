"""accelerate on MiniMax-H3: fused projections, a mask, one graph for two lengths, the decoder's stream, what stays."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close, models, zoo
from fastdit.testing.accelerated import check_one_graph, layers, reasons
from fastdit.testing.zoo import minimax_h3


def given(n):
    return zoo.randn(2, n, 40), zoo.randn(3, 18), torch.arange(n) % 9, minimax_h3.tables(n, 24)


@torch.no_grad()
@pytest.mark.parametrize("fused, mask", [(True, None), (False, torch.rand(2, 1, 1, 15) > 0.3)])
def test_attention(fused, mask):
    """Fused projections, and a mask, which the model never passes."""
    attn = minimax_h3.minimax_h3().transformer_blocks[0].attn
    x, rotary = zoo.randn(2, 15, 40), minimax_h3.tables(15, 24)
    truth = copy.deepcopy(attn).double()(x.double(), tuple(t.double() for t in rotary), mask)
    before = attn(x, rotary, mask)
    if fused:
        attn.fuse_projections()
    assert layers(fastdit.accelerate(attn)) == {"attention (MiniMaxH3AttnProcessor)": 1}
    close.assert_close(attn(x, rotary, mask), truth, before)


@pytest.mark.full
@torch.no_grad()
def test_one_graph_for_two_lengths():
    model = minimax_h3.minimax_h3()
    fastdit.accelerate(model)
    check_one_graph(model.transformer_blocks[0], [given(15), given(24)])


@torch.no_grad()
def test_the_stream_of_the_decoder():
    """In two bytes before the first block, fp32 behind it."""
    block = models.cast(minimax_h3.minimax_h3_vae(), torch.bfloat16).decoder.transformer_blocks[0]
    block.scale1.data, block.scale2.data = block.scale1.float(), block.scale2.float()
    cos, sin = minimax_h3.tables(15, 12)
    x, rotary = zoo.randn(2, 15, 32).bfloat16(), (cos[None, :, None], sin[None, :, None])
    truth, before = copy.deepcopy(block).float()(x.float(), rotary), block(x, rotary)
    fastdit.accelerate(block)
    after = block(x, rotary)
    assert after.dtype is before.dtype is torch.float32
    close.assert_close(after.bfloat16(), truth, before.bfloat16())


def test_what_stays():
    model = minimax_h3.minimax_h3()
    model.transformer_blocks[0].norm1 = nn.LayerNorm(40)
    model.transformer_blocks[1].adapter = nn.Linear(2, 2)
    report = fastdit.accelerate(model)
    assert reasons(report) >= {
        "its norm is a LayerNorm, not an nn.RMSNorm with a weight and an eps",
        "has adapter, which the MiniMaxH3TransformerBlock that is known does not have",
        "inside a block that is left",
    }
    assert layers(report)["attention (MiniMaxH3AttnProcessor)"] == 1

    vae = minimax_h3.minimax_h3_vae()
    blocks = vae.encoder.down_blocks
    blocks[0].resnets[0].conv1.spatial_padding_mode = "circular"
    blocks[1].resnets[0].norm2 = nn.GroupNorm(4, 12)
    blocks[0].downsamplers[0].spatial_padding_mode = "replicate"
    vae.encoder.conv_in = nn.Conv3d(3, 8, 3, padding=1)
    report = fastdit.accelerate(vae)
    assert reasons(report) >= {
        "its convolution has groups, pads twice or has another border",
        "its norm is a GroupNorm without weights, or not a GroupNorm of frames",
        "its two borders differ",
    }
    assert layers(report)["MiniMax-H3 residual block (GroupNorm of frames, SiLU, conv, twice)"] == 1


def test_a_block_of_another_order_is_left():
    """The text's block has names that others have too."""

    class Behind(type(minimax_h3.minimax_h3().token_refiner.refiner_blocks[0])):
        def forward(self, hidden_states):
            hidden_states = hidden_states + self.norm1(self.attn(hidden_states))
            return hidden_states + self.norm2(self.ff(hidden_states))

    model = minimax_h3.minimax_h3()
    model.token_refiner.refiner_blocks[0].__class__ = Behind
    assert "MiniMax-H3 text block" not in layers(fastdit.accelerate(model))
