"""accelerate on the VAEs of KVAE: chunks of every length, widths, and what stays."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close, models, zoo
from fastdit.testing.accelerated import layers, reasons
from fastdit.testing.zoo import vae_kvae

KIND = "KVAE residual block (GroupNorm or spatial norm, SiLU, conv, twice)"
IMAGE_KIND = "KVAE image block (GroupNorm or spatial norm, SiLU, conv, twice)"
FLAT = dict(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4)


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 6, 9])
def test_latents_of_any_length(frames):
    """Chunks of 5 and 4 latent frames; a last one of a single frame is not doubled."""
    model, z = vae_kvae.kvae(**FLAT), zoo.randn(1, 4, frames, 2, 2)
    truth = models.cast(copy.deepcopy(model), torch.float64).decode(z.double()).sample
    before = model.decode(z).sample
    fastdit.accelerate(model)
    after = model.decode(z).sample
    assert after.stride() == before.stride()
    close.assert_close(after, truth, before)


@torch.no_grad()
@pytest.mark.parametrize("frames, times", [(1, 4), (16, 4), (19, 2)])
def test_frames_of_any_length(frames, times):
    model, x = vae_kvae.kvae(**FLAT, temporal_compress_times=times), zoo.randn(1, 3, frames, 8, 8)
    truth = models.cast(copy.deepcopy(model), torch.float64).encode(x.double()).latent_dist.mean
    before = model.encode(x).latent_dist.mean
    fastdit.accelerate(model)
    close.assert_close(model.encode(x).latent_dist.mean, truth, before)


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["decoder.up.1.block.0", "decoder.up.2.upsample"])
def test_parts_left_out(pattern):
    """A layer that stays beside layers that do not, over two chunks."""
    model, z = vae_kvae.kvae(**FLAT), zoo.randn(1, 4, 7, 2, 2)
    truth = models.cast(copy.deepcopy(model), torch.float64).decode(z.double()).sample
    before = model.decode(z).sample
    fastdit.accelerate(model, exclude=[pattern])
    close.assert_close(model.decode(z).sample, truth, before)


@torch.no_grad()
def test_a_convolution_as_shortcut():
    """No released model has one; its frames are kept too."""
    from diffusers.models.autoencoders.autoencoder_kl_kvae_video import KVAECachedResnetBlock3D

    block = models.randomize(KVAECachedResnetBlock3D(in_channels=32, out_channels=64, conv_shortcut=True))
    chunks = zoo.randn(2, 32, 5, 3, 4).split([3, 2], dim=2)

    def run(module):
        dtype = module.conv1.conv.weight.dtype
        names = ("norm1", "norm2", "conv1", "conv2", "conv_shortcut")
        cache = {name: {"padding": None, "mean": None, "var": None} for name in names}
        return torch.cat([module(x.to(dtype), None, layer_cache=cache) for x in chunks], dim=2)

    before, truth = run(block), run(copy.deepcopy(block).double())
    assert layers(fastdit.accelerate(block)) == {KIND: 1}
    close.assert_close(run(block), truth, before)


def test_layers_that_stay():
    model = vae_kvae.kvae(**FLAT)
    blocks = [model.decoder.up[i].block[0] for i in range(3)]
    blocks[0].norm1.add_conv = True
    blocks[1].conv1.conv.dilation = (2, 1, 1)
    blocks[2].norm2.norm_layer.norm_layer = nn.InstanceNorm3d(32)
    model.encoder.mid.block_1.adapter = nn.Linear(2, 2)
    model.encoder.down[0].downsample.spatial_conv.padding_mode = "zeros"
    model.encoder.down[1].attn.append(nn.Identity())
    model.decoder.mid.attn_1 = nn.Identity()
    model.decoder.up[1].upsample.factor = 3
    report = fastdit.accelerate(model)
    assert reasons(report) >= {
        "its norm convolves the latents first",
        "its convolution has another kernel or dilation in time, or pads twice",
        "its norm is a InstanceNorm3d without weights, or not a GroupNorm",
        "has adapter, which the KVAECachedResnetBlock3D that is known does not have",
        "its convolution is a KVAESafeConv3d with groups, other borders or a wrapper",
        "it has attention",
        "has attn_1, which the Module that is known does not have",
        "its factor is not 2",
    }
    assert layers(report)[KIND] == 13 - 4


@torch.no_grad()
@pytest.mark.parametrize("pattern", [None, "decoder.up.1.block.0", "decoder.up.2.upsample"])
def test_images_and_parts_left_out(pattern):
    """Weights in channels_last memory, as people keep those of an image VAE, and a layer beside ours that stays."""
    model, z = vae_kvae.kvae_image(**vae_kvae.IMAGE_SMALL), zoo.randn(1, 4, 3, 2)
    truth = models.cast(copy.deepcopy(model), torch.float64).decode(z.double()).sample
    model.to(memory_format=torch.channels_last)
    before = model.decode(z).sample
    fastdit.accelerate(model, exclude=[pattern] if pattern else [])
    close.assert_close(model.decode(z).sample, truth, before)


@torch.no_grad()
def test_images_with_a_convolution_as_shortcut():
    from diffusers.models.autoencoders.autoencoder_kl_kvae import KVAEResnetBlock2D

    block = KVAEResnetBlock2D(in_channels=32, out_channels=64, conv_shortcut=True, temb_channels=8)
    block, x = models.randomize(block), zoo.randn(2, 32, 3, 4)
    before, truth = block(x, None), copy.deepcopy(block).double()(x.double(), None)
    assert layers(fastdit.accelerate(block)) == {IMAGE_KIND: 1}
    close.assert_close(block(x, None), truth, before)


def test_layers_of_images_that_stay():
    model = vae_kvae.kvae_image(**vae_kvae.IMAGE_SMALL)
    blocks = [model.decoder.up[i].block[0] for i in range(3)]
    blocks[0].norm1.add_conv = True
    blocks[1].conv1.padding_mode = "zeros"
    blocks[2].nonlinearity = nn.GELU()
    model.encoder.mid.block_1.norm1 = nn.InstanceNorm2d(64)
    model.encoder.down[0].downsample.spatial_conv.padding_mode = "zeros"
    model.encoder.down[1].attn.append(nn.Identity())
    model.decoder.up[1].upsample.factor = 3
    model.decoder.give_pre_end = True
    report = fastdit.accelerate(model)
    assert reasons(report) >= {
        "its norm convolves the latents first",
        "its convolution is a Conv2d with groups, other borders or a wrapper",
        "its activation is GELU, not SiLU",
        "its norm is a InstanceNorm2d without weights, or not a GroupNorm",
        "it has attention",
        "its factor is not 2",
        "it ends before its last norm",
    }
    assert layers(report)[IMAGE_KIND] == 13 - 4
