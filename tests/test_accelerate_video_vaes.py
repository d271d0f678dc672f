"""accelerate on the video VAEs of diffusers with first-frame or symmetric time padding: what stays, and compilation."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close, models, zoo
from fastdit.testing.zoo import vae_ltx


def layers(report, replaced=True):
    return {row.layer: row.count for row in report.rows if row.replaced is replaced}


def entry(name):
    return next(model for model in zoo.models() if model.name == name)


def same_in_both(model, call):
    before, truth = call(model), call(models.cast(copy.deepcopy(model), torch.float64))
    fastdit.accelerate(model)
    close.assert_close(call(model), truth, before)


def test_ltx_layers_that_stay():
    model = vae_ltx.ltx_vae(**vae_ltx.LTX)
    block = model.decoder.mid_block.resnets[0]
    block.dropout.p = 0.1
    model.decoder.up_blocks[0].resnets[0].norm2 = nn.GroupNorm(4, 24)
    model.decoder.up_blocks[1].resnets[0].conv1.conv.padding_mode = "circular"
    model.encoder.conv_act = nn.GELU()
    model.encoder.mid_block.resnets[0].adapter = nn.Linear(2, 2)
    report = fastdit.accelerate(model)
    reasons = {row.why for row in report.rows if not row.replaced}
    assert reasons >= {
        "dropout p=0.1 between its norm and its convolution",
        "its norm is a GroupNorm, not one over the channels",
        "its convolution is a Conv3d with groups, padding in time, another border or a wrapper",
        "its activation is GELU, not SiLU",
        "has adapter, which the LTXVideoResnetBlock3d that is known does not have",
    }
    assert layers(report)["LTX residual block (RMS norm, SiLU, conv, twice)"] == 13 - 4


@torch.no_grad()
@pytest.mark.parametrize("name", ["AutoencoderKLLTXVideo decode", "AutoencoderKLLTX2Video decode"])
def test_compiled_ltx_block(name):
    model = entry(name).build()
    fastdit.accelerate(model)
    block = model.decoder.mid_block.resnets[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((2, 3, 4), (3, 5, 6)):
        x = zoo.randn(2, block.conv1.in_channels, *size)
        close.assert_bitwise(compiled(x), block(x))


@torch.no_grad()
def test_ltx2_flag_of_a_call():
    """`causal` is given per call, to the encoder and the decoder as to their blocks."""
    model = vae_ltx.ltx2_vae(**vae_ltx.LTX2, decoder_causal=False)
    z = vae_ltx.latents()["z"]
    same_in_both(model, lambda vae: vae.decoder(z.to(vae.dtype), causal=True))
