"""accelerate on the video VAEs of diffusers with first-frame or symmetric time padding: what stays, and compilation."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close, models, zoo
from fastdit.testing.accelerated import layers, reasons
from fastdit.testing.zoo import vae_allegro, vae_cosmos, vae_ltx, vae_magvit, vae_mochi


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
    assert reasons(report) >= {
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


@torch.no_grad()
def test_mochi_processor_of_somebody_else():
    """Set before, the block is left; set after, the block runs its own code."""
    from diffusers.models.attention_processor import MochiVaeAttnProcessor2_0

    class Foreign(MochiVaeAttnProcessor2_0):
        def __call__(self, attn, hidden_states, **options):
            return 2 * super().__call__(attn, hidden_states, **options)

    kind, x = "Mochi attention over the frames of each pixel", zoo.randn(2, 64, 3, 2, 5)
    block = vae_mochi.mochi_vae(**vae_mochi.SMALL).encoder.down_blocks[0]
    block.attentions[0].processor = Foreign()
    before = block(x)[0]
    assert kind in layers(fastdit.accelerate(block), replaced=False)
    fastdit.restore(block)

    block.attentions[0].processor = MochiVaeAttnProcessor2_0()
    assert layers(fastdit.accelerate(block, ops=["attention"])) == {kind: 1}
    block.attentions[0].processor = Foreign()
    close.assert_bitwise(block(x)[0], before)


def test_cosmos_layers_that_stay():
    model = vae_cosmos.cosmos_vae(**vae_cosmos.SMALL)
    model.decoder.mid_block.resnets[0].conv1.conv_s.pad_mode = "replicate"
    model.decoder.mid_block.attentions[0].to_out[1].p = 0.1
    model.encoder.mid_block.temp_attentions[0].processor = lambda attn, hidden_states, attention_mask: hidden_states
    model.encoder.patch_embed.patch_method = "db2"
    report = fastdit.accelerate(model)
    assert reasons(report) >= {
        "its convolution has groups or pads space otherwise than with zeros",
        "dropout p=0.1 inside",
        "its processor is function, not one of Cosmos",
        "its patches are db2",
    }
    assert layers(report)["Cosmos attention in each frame, then over frames"] == 4 - 2


@torch.no_grad()
@pytest.mark.parametrize("p", [2, 4])
def test_cosmos_wavelets_in_one_matrix(p):
    """All levels at once; frames or pixels that fill no patch go to the original, which mirrors them."""
    from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosPatchEmbed3d, CosmosUnpatcher3d

    from fastdit.integrations import registry
    from fastdit.integrations.diffusers_cosmos_patches import patch_forward, unpatch_forward

    patch, unpatch = CosmosPatchEmbed3d(p), CosmosUnpatcher3d(p)
    x, odd = zoo.randn(2, 3, 1 + 2 * p, 3 * p, 2 * p), zoo.randn(1, 3, 1 + 2 * p, 2 * p + 2, 2 * p + 1)
    z = patch(x)
    truth = patch.double()(x.double()), unpatch.double()(z.double())
    patch.float(), unpatch.float()
    back, odd_z = unpatch(z), patch(odd)
    for module, forward in ((patch, patch_forward), (unpatch, unpatch_forward)):
        registry.patch(module, "forward", forward, registry.KINDS[0], "native")
    close.assert_close(patch(x), truth[0], z)
    close.assert_close(unpatch(z), truth[1], back)
    close.assert_bitwise(patch(odd), odd_z)


@torch.no_grad()
def test_cosmos_mask_of_the_callers_own():
    """Only the block's triangular mask is known; another goes to the original."""
    block = vae_cosmos.cosmos_vae(**vae_cosmos.SMALL).encoder.mid_block
    attn, x = block.temp_attentions[0], zoo.randn(1, 24, 3, 2, 2)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 1, 1]]).bool()
    before, exact = (attn(x, mask), attn(x)), copy.deepcopy(attn).double()
    truth = exact(x.double(), mask), exact(x.double())
    assert not close.errors(before[0], truth[1], before[1]).ok
    fastdit.accelerate(block)
    close.assert_close(attn(x, mask), truth[0], before[0])
    close.assert_close(attn(x), truth[1], before[1])


def test_allegro_layers_that_stay():
    model = vae_allegro.small()
    model.decoder.mid_block.resnets[0].output_scale_factor = 2.0
    model.decoder.up_blocks[0].temp_convs[0].conv2.insert(1, nn.Tanh())
    model.encoder.down_blocks[0].downsamplers[0].norm = nn.LayerNorm(8)
    model.encoder.conv_out.padding = "same"
    report = fastdit.accelerate(model)
    assert reasons(report) >= {
        "its residual block scales its norm or its output",
        "its temporal layer has more than norm, SiLU and convolution",
        "its resampling has a norm or no convolution",
        "its convolution is a Conv2d with groups, other borders or a wrapper",
    }
    assert layers(report) == {
        "Allegro block (2-D residual blocks, temporal layers, resampling)": 7,
        "Allegro decoder (first and last convolutions)": 1,
    }


@torch.no_grad()
def test_allegro_dropout_while_training():
    """The temporal layers drop a tenth while training: then a block runs its own code, which calls them."""
    model = vae_allegro.allegro_vae((8, 16, 24), (4, 8, 24), **vae_allegro.SMALL)
    block, x, called = model.decoder.up_blocks[1], zoo.randn(1, 24, 2, 2, 3), []
    fastdit.accelerate(block)
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_: called.append(True))
    block.eval()(x)
    assert not called
    block.train()(x)
    assert called


@torch.no_grad()
def test_magvit_caches_across_restore():
    """The kept frames mean the same to both sides: any of them may go on with the next chunk, of any length."""
    model = vae_magvit.magvit_vae(**vae_magvit.SMALL)
    x, wide = zoo.randn(1, 3, 8, 16, 8), copy.deepcopy(model).double()
    chunks = (1, 4, 3)

    def coded(vae, ours=()):
        made = []
        for i, frames in enumerate(x.to(vae.dtype).split(chunks, dim=2)):
            fastdit.accelerate(vae) if i in ours else fastdit.restore(vae)
            made.append(vae.encoder(frames))
        vae._clear_conv_cache()
        return torch.cat(made, dim=2)

    before, truth = coded(model), coded(wide)
    for ours in ((0,), (1,), (0, 2)):
        close.assert_close(coded(model, ours), truth, before)


def test_magvit_layers_that_stay():
    model = vae_magvit.magvit_vae(**vae_magvit.SMALL)
    model.decoder.mid_block.convs[0].output_scale_factor = 2.0
    model.decoder.up_blocks[0].convs[0].conv1.padding_mode = "reflect"
    model.encoder.conv_act = nn.GELU()
    report = fastdit.accelerate(model)
    assert reasons(report) >= {
        "dropout between its norm and its convolution, or a scaled output",
        "its convolution has groups or another border",
        "its activation is GELU, not SiLU",
    }
    assert layers(report)["EasyAnimate residual block (GroupNorm, SiLU, conv, twice)"] == 11 - 2
