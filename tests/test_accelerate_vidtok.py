"""accelerate on AutoencoderVidTok: chunks over kept frames, an odd number of them, what stays."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close, models, zoo
from fastdit.testing.accelerated import layers, reasons
from fastdit.testing.zoo import vae_vidtok

ENCODER, DECODER = vae_vidtok.LAYERS


def coded(vae, x, chunks):
    """The encoder over the chunks of a clip, as its tiles go."""
    vae._empty_causal_cached(vae)
    made = []
    for i, frames in enumerate(x.to(vae.dtype).split(chunks, dim=2)):
        vae._set_first_chunk(i == 0)
        made.append(vae.encoder(frames))
    return torch.cat(made, dim=2)


@torch.no_grad()
@pytest.mark.parametrize("chunks", [(4, 8), (4, 5, 4)], ids=str)
def test_chunks(chunks):
    """An odd number of frames loses one where they are halved."""
    model, x = vae_vidtok.vidtok(**vae_vidtok.SMALL), zoo.randn(1, 3, sum(chunks), 8, 8)
    truth, before = coded(models.cast(copy.deepcopy(model), torch.float64), x, chunks), coded(model, x, chunks)
    fastdit.accelerate(model)
    close.assert_close(coded(model, x, chunks), truth, before)


@torch.no_grad()
def test_frames_kept_are_few():
    model = vae_vidtok.vidtok(**vae_vidtok.SMALL)
    fastdit.accelerate(model)
    model(zoo.randn(1, 3, 9, 8, 8), sample_posterior=False)
    kept = [module.causal_cache for module in model.modules() if getattr(module, "causal_cache", None) is not None]
    assert len(kept) > 20 and max(frames.shape[2] for frames in kept) == 2


@torch.no_grad()
def test_a_clip_of_any_length():
    """The model's own call pads it in time."""
    model, x = vae_vidtok.vidtok(**vae_vidtok.SMALL), zoo.randn(1, 3, 6, 8, 8)
    truth = models.cast(copy.deepcopy(model), torch.float64)(x.double(), sample_posterior=False).sample
    before = model(x, sample_posterior=False).sample
    fastdit.accelerate(model)
    close.assert_close(model(x, sample_posterior=False).sample, truth, before)


@torch.no_grad()
def test_latents_of_levels():
    """The quantiser stays. What it makes of indices is fp32 whatever the model is."""
    model = vae_vidtok.vidtok(**vae_vidtok.SMALL, regularizer="fsq", codebook_size=8**3, double_z=False)
    x, indices = zoo.randn(1, 3, 8, 8, 12), torch.arange(36).view(2, 3, 2, 3) * 41 % 8**3
    truth = models.cast(copy.deepcopy(model), torch.float64).decode(model.indices_to_latent(indices).double())
    before, levels = model.decode(indices, decode_from_indices=True), model.encode(x)[1]
    assert layers(fastdit.accelerate(model)) == vae_vidtok.LAYERS
    close.assert_close(model.decode(indices, decode_from_indices=True), truth, before)
    assert torch.equal(model.encode(x)[1], levels)


@pytest.mark.parametrize(
    "name, value, why",
    [
        ("mid.block_1.nonlinearity", nn.GELU(), "its activation is GELU, not SiLU"),
        ("mid.attn_1.norm", nn.LayerNorm(16), "its norm is a LayerNorm, not a LayerNorm of channels"),
        ("mid.attn_1.k", nn.Conv3d(16, 16, 1, groups=2), "its convolution is a Conv3d with groups"),
        ("down.0.block.0.dropout", nn.Dropout(0.1), "dropout p=0.1 between its norm and its convolution"),
        ("down.0.block.0.adapter", nn.Linear(2, 2), "has adapter, which the VidTokResnetBlock that is known"),
        ("down.0.downsample", nn.Conv2d(8, 8, 2, 2), "its resampling is a Conv2d"),
    ],
)
def test_what_keeps_a_side(name, value, why):
    model = vae_vidtok.vidtok(**vae_vidtok.SMALL)
    parent, _, child = name.rpartition(".")
    setattr(model.encoder.get_submodule(parent), child, value)
    report = fastdit.accelerate(model)
    assert any(reason.startswith(why) for reason in reasons(report)), report
    assert layers(report) == {DECODER: 1}


def test_another_border_keeps_a_side():
    model = vae_vidtok.vidtok(**vae_vidtok.SMALL)
    model.decoder.conv_out.pad_mode = "replicate"
    report = fastdit.accelerate(model)
    assert "its convolution pads space otherwise than with zeros, or pads twice" in reasons(report)
    assert layers(report) == {ENCODER: 1}
