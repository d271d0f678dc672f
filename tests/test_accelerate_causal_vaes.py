"""accelerate on the VAEs of Qwen-Image, HunyuanVideo, HunyuanVideo-1.5 and CogVideoX: what is special to them."""

import copy

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXResnetBlock3D
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoMidBlock3D
from diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15 import HunyuanVideo15AttnBlock
from torch import nn
from torch._dynamo.testing import CompileCounter

import fastdit
from fastdit.integrations.vae_layers import WIDEST, frame_causal_attention, group_norm, nearest
from fastdit.reference import attention as reference
from fastdit.testing import close
from fastdit.testing.accelerated import reasons
from fastdit.testing.exact import exact
from fastdit.testing.models import randomize
from fastdit.testing.zoo import vae_cogvideox, vae_hunyuan, vae_hunyuan15, vae_qwen

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def replaced(report):
    return {row.layer.split(" (")[0]: row.count for row in report.rows if row.replaced}


def video(*shape, dtype=torch.float32, seed=1):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last_3d) if x.ndim == 5 else x


def assert_same(module, *inputs):
    """The first output of the module before and after accelerate."""

    def first(module, given):
        output = module(*given)
        return output[0] if isinstance(output, tuple) else output

    truth, before = first(exact(module), [x.double() for x in inputs]), first(module, inputs)
    report = fastdit.accelerate(module)
    after = first(module, inputs)
    close.assert_close(after, truth, before)
    return report


# Blocks at the models' widths -------------------------------------------------------------------------------------


@each_dtype
@torch.no_grad()
def test_hunyuan_video_mid_block_at_full_width(dtype):
    """512 channels, one head of 512."""
    block = vae_hunyuan.around_one(randomize(HunyuanVideoMidBlock3D(512, attention_head_dim=512))).to(dtype)
    report = assert_same(block, video(2, 512, 3, 3, 4, dtype=dtype))
    assert replaced(report) == {"mid block with frame-causal attention": 1, "residual block with repeated borders": 2}


@each_dtype
@torch.no_grad()
def test_hunyuan_video15_attention_at_full_width(dtype):
    """1024 channels, one head of 1024: wider than what the GPU kernels hold."""
    block = randomize(HunyuanVideo15AttnBlock(1024)).to(dtype)
    report = assert_same(block, video(1, 1024, 3, 3, 2, dtype=dtype))
    assert replaced(report) == {"video attention of a VAE": 1}


@each_dtype
@torch.no_grad()
def test_cogvideox_block_at_full_width(dtype):
    """256 to 128 channels, conditioned on 16 latent channels at a quarter of the size; 2 chunks of frames."""
    block = CogVideoXResnetBlock3D(256, 128, temb_channels=0, spatial_norm_dim=16)
    block = vae_hunyuan.around_one(randomize(block)).to(dtype)
    first, second = video(1, 256, 5, 8, 12, dtype=dtype), video(1, 256, 4, 8, 12, dtype=dtype, seed=2)
    z1, z2 = video(1, 16, 3, 2, 3, dtype=dtype, seed=3), video(1, 16, 2, 2, 3, dtype=dtype, seed=4)

    def run(model, x1, x2, zq1, zq2):
        y1, cache = model(x1, None, zq1)
        return torch.cat([y1, model(x2, None, zq2, conv_cache=cache)[0]], dim=2)

    given = (first, second, z1, z2)
    truth, before = run(exact(block), *(x.double() for x in given)), run(block, *given)
    fastdit.accelerate(block)
    close.assert_close(run(block, *given), truth, before)


# Pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [WIDEST, WIDEST + 8])
def test_frame_causal_attention(channels):
    q, k, v = (video(2, 12, 1, channels, seed=i).requires_grad_() for i in range(3))
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    before = reference.attention(q, k, v, frame_tokens=4)
    truth = reference.attention(*wide, frame_tokens=4)
    after = frame_causal_attention(q, k, v, 4)
    close.assert_close(after, truth, before)
    grads = [
        torch.autograd.grad(o.square().sum(), t) for o, t in ((after, (q, k, v)), (truth, wide), (before, (q, k, v)))
    ]
    for g, t, b in zip(*grads, strict=True):
        close.assert_close(g, t, b)


@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_group_norm(shift):
    """torch's own is 1e-3 off at shift 10 in fp32 and channels_last memory."""
    norm = vae_hunyuan.around_one(randomize(nn.GroupNorm(4, 16)))
    for x in (video(2, 16, 3, 40, 40), video(2, 16, 50)):
        x = x + shift
        truth = copy.deepcopy(norm).double()(x.double())
        close.assert_close(group_norm(norm, x), truth, norm(x.contiguous()))


def test_nearest():
    x = video(2, 3, 3, 2, 4)
    for factor in ((1, 2, 2), (2, 1, 1), (2, 2, 2)):
        close.assert_bitwise(nearest(x, factor, False), nn.functional.interpolate(x, scale_factor=factor))
        first, rest = x[:, :, :1], x[:, :, 1:]
        parts = [nn.functional.interpolate(p, scale_factor=f) for p, f in ((first, (1, *factor[1:])), (rest, factor))]
        close.assert_bitwise(nearest(x, factor), torch.cat(parts, 2))


# Sizes and modes that take another path ---------------------------------------------------------------------------

SINGLE = [
    (vae_qwen.qwen_image, vae_qwen.SMALL),
    (vae_hunyuan.hunyuan_video, vae_hunyuan.SMALL),
    (vae_hunyuan15.hunyuan_video15, vae_hunyuan15.SMALL),
    (vae_cogvideox.cogvideox, vae_cogvideox.SMALL),
]


@pytest.mark.parametrize("build, config", SINGLE, ids=["qwen", "hunyuan", "hunyuan1.5", "cogvideox"])
@torch.no_grad()
def test_single_images(build, config):
    """And the strides of the original's outputs."""
    model, z, x = build(**config), torch.randn(1, 4, 1, 3, 5), torch.randn(1, 3, 1, 24, 40)
    truth = exact(model)
    decoded, encoded = model.decode(z).sample, model.encode(x).latent_dist.parameters
    fastdit.accelerate(model)
    after = model.decode(z).sample, model.encode(x).latent_dist.parameters
    close.assert_close(after[0], truth.decode(z.double()).sample, decoded)
    close.assert_close(after[1], truth.encode(x.double()).latent_dist.parameters, encoded)
    assert [t.stride() for t in after] == [decoded.stride(), encoded.stride()]


@pytest.mark.parametrize("build, config", [SINGLE[1], SINGLE[2], SINGLE[3]], ids=["hunyuan", "hunyuan1.5", "cogvideox"])
@torch.no_grad()
def test_tiled_and_sliced_encode(build, config):
    model, x = build(**config), torch.randn(2, 3, 9, 40, 48)
    tiled = vae_hunyuan.tiled if build is vae_hunyuan.hunyuan_video else vae_cogvideox.tiled
    tiled = vae_hunyuan15.tiled if build is vae_hunyuan15.hunyuan_video15 else tiled
    tiled(model).enable_slicing()
    truth, before = exact(model).encode(x.double()).latent_dist.mean, model.encode(x).latent_dist.mean
    fastdit.accelerate(model)
    close.assert_close(model.encode(x).latent_dist.mean, truth, before)


@torch.no_grad()
def test_hunyuan_video15_takes_a_batch():
    """The original's mask does not."""
    model, z = vae_hunyuan15.hunyuan_video15(**vae_hunyuan15.SMALL), torch.randn(2, 4, 2, 3, 3)
    with pytest.raises(RuntimeError):
        model.decode(z)
    fastdit.accelerate(model)
    together, alone = model.decode(z).sample, [model.decode(part).sample for part in z.split(1)]
    close.assert_bitwise(together, torch.cat(alone))


@torch.no_grad()
def test_cogvideox_with_timesteps_and_replicated_borders():
    block = randomize(CogVideoXResnetBlock3D(8, 16, temb_channels=12, groups=4, conv_shortcut=True))
    assert replaced(assert_same(block, video(2, 8, 3, 5, 4), torch.randn(2, 12)))  # to the original
    block = randomize(CogVideoXResnetBlock3D(8, 16, temb_channels=0, groups=4, pad_mode="replicate"))
    assert replaced(assert_same(block, video(2, 8, 3, 5, 4)))
    block = randomize(CogVideoXResnetBlock3D(8, 16, temb_channels=0, groups=4, conv_shortcut=True))
    assert replaced(assert_same(block, video(2, 8, 3, 5, 4)))


@torch.no_grad()
def test_attention_without_frames_goes_to_the_original():
    model, x = vae_hunyuan.hunyuan_video(**vae_hunyuan.SMALL), torch.randn(1, 6, 24)
    attn = model.decoder.mid_block.attentions[0]
    before = attn(x)
    fastdit.accelerate(model)
    close.assert_bitwise(attn(x), before)
    assert attn.processor is model.encoder.mid_block.attentions[0].processor


# What stays -------------------------------------------------------------------------------------------------------


def test_what_stays():
    model = vae_hunyuan.hunyuan_video(**vae_hunyuan.SMALL)
    blocks = model.decoder.up_blocks
    blocks[0].resnets[0].nonlinearity = nn.GELU()
    blocks[0].resnets[1].dropout.p = 0.1
    blocks[1].resnets[0].conv1.pad_mode = "reflect"
    blocks[1].resnets[1].norm1 = nn.InstanceNorm3d(24)
    blocks[2].upsamplers[0].conv.conv = nn.Conv3d(16, 16, 3, padding=1)
    blocks[2].resnets[0].adapter = nn.Linear(2, 2)
    model.decoder.mid_block.attentions[0].processor = copy.copy(model.encoder.mid_block.attentions[0].processor)
    report = fastdit.accelerate(model)
    assert {
        "its activation is GELU, not SiLU",
        "dropout p=0.1 between its norm and its convolution",
        "its convolution pads with reflect",
        "its convolution sees later frames, or pads twice",
        "has adapter, which the HunyuanVideoResnetBlockCausal3D that is known does not have",
    } <= reasons(report)
    assert "forward" not in blocks[0].resnets[0].__dict__ and "forward" not in blocks[2].upsamplers[0].__dict__

    model = vae_cogvideox.cogvideox(**vae_cogvideox.SMALL)
    resnets = model.decoder.up_blocks[0].resnets
    resnets[0].norm1.norm_layer = nn.GroupNorm(4, 16, affine=False)
    resnets[1].conv1.conv.dilation = (2, 1, 1)
    model.decoder.up_blocks[1].upsamplers[0].conv.padding_mode = "reflect"
    report = fastdit.accelerate(model)
    assert "its convolution has a stride or a dilation in time" in reasons(report)
    assert "its norm is a GroupNorm without weights, or not a GroupNorm" in reasons(report)
    assert "its convolution is a Conv2d with groups, other borders or a wrapper" in reasons(report)


@torch.no_grad()
def test_parts_left_out():
    """A residual block that stays, in a decoder that does not."""
    for build, config in SINGLE[1:]:
        model, z = build(**config), torch.randn(1, 4, 3, 3, 4)
        truth, before = exact(model).decode(z.double()).sample, model.decode(z).sample
        for pattern in (
            "decoder.up_blocks.1",
            "decoder.conv_in",
            "decoder.mid_block",
            "decoder.up_blocks.0.upsamplers",
        ):
            fastdit.accelerate(model, exclude=[pattern])
            close.assert_close(model.decode(z).sample, truth, before)
        fastdit.accelerate(model, ops={"causal_conv3d"})
        close.assert_close(model.decode(z).sample, truth, before)


# torch.compile ----------------------------------------------------------------------------------------------------


HUNYUAN, HUNYUAN15, COGVIDEOX = (build(**config) for build, config in SINGLE[1:])
COMPILED = [
    (HUNYUAN.decoder.mid_block, 24),
    (HUNYUAN.decoder.up_blocks[2].upsamplers[0], 16),
    (HUNYUAN15.decoder.mid_block.attentions[0], 64),
    (HUNYUAN15.decoder.up_blocks[0].upsamplers[0], 64),
    (COGVIDEOX.decoder.up_blocks[0].resnets[0], 16),
    (COGVIDEOX.decoder.up_blocks[0].upsamplers[0], 16),
]


@pytest.mark.parametrize("block, channels", COMPILED, ids=lambda case: type(case).__name__)
@torch.no_grad()
def test_compiled_blocks(block, channels):
    """Fullgraph; one compilation serves every number of frames and every size (no two of the first are equal)."""
    block = copy.deepcopy(block)
    fastdit.accelerate(block)
    graphs = CompileCounter()
    compiled = torch.compile(block, fullgraph=True, backend=graphs, dynamic=True)
    for frames, side in ((5, 18), (9, 8), (13, 6)):
        x = video(1, channels, frames, side, side + 2)
        more = (
            (None, video(1, 4, (frames + 1) // 2, side // 2, side // 2 + 1))
            if isinstance(block, CogVideoXResnetBlock3D)
            else ()
        )
        after, expected = compiled(x, *more), block(x, *more)
        close.assert_bitwise(*(y[0] if isinstance(y, tuple) else y for y in (after, expected)))
    assert graphs.frame_count == 1
