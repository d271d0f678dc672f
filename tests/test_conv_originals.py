"""conv: the reference against the causal convolutions and norms of diffusers' video VAEs themselves.

A convolution alone is bitwise the original in fp32. In bf16, and where the norm is written in another order, the
original rounds after every layer of the chain and we round where a product needs it and once at the end, so there the
claim is: no further from the original in fp64 than the original in bf16 is.
"""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders import (
    autoencoder_kl_cogvideox as cogvideox,
    autoencoder_kl_hunyuan_video as hunyuan,
    autoencoder_kl_hunyuanvideo15 as hunyuan15,
    autoencoder_kl_ltx as ltx,
    autoencoder_kl_ltx2 as ltx2,
    autoencoder_kl_mochi as mochi,
    autoencoder_kl_wan as wan,
)

from fastdit.reference import conv as ref
from fastdit.testing import close

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
LAST = torch.channels_last_3d


def seeded(module, dtype):
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.5 if p.dim() < 2 else p[0].numel() ** -0.5)
        p.data = (p.data + 1 if p.dim() == 4 else p.data).to(dtype)  # gammas stand around one
    return module.eval()


def against(original, ours, module, dtype, *inputs, exact=False):
    """ours(module, *inputs) under the tolerance policy: truth and baseline are the original in fp64 and in `dtype`.

    exact: the same operations in the same order, so bitwise in fp32.
    """
    with torch.no_grad():
        actual = ours(module, *inputs)
        baseline = original(module, *inputs)
        wide = [None if t is None else t.double() for t in inputs]
        truth = original(module.double(), *wide)
        module.to(dtype)
    for a, t, b in zip(close.flat(actual), close.flat(truth), close.flat(baseline), strict=True):
        assert a.dtype == b.dtype
        close.assert_close(a, t, b)
        if exact and dtype == torch.float32:
            close.assert_bitwise(a, b)


def video(*shape, dtype, last=False):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.to(memory_format=LAST) if last else x


@each_dtype
@pytest.mark.parametrize("cached", [0, 1, 2])
@pytest.mark.parametrize("kernel, padding", [(3, 1), ((3, 1, 1), (1, 0, 0)), (1, 0)], ids=["3x3x3", "3x1x1", "1x1x1"])
def test_wan_causal_conv(kernel, padding, cached, dtype):
    conv = seeded(wan.WanCausalConv3d(96, 96, kernel, padding=padding), dtype)
    x = video(1, 96, 2, 6, 5, dtype=dtype)
    cache = video(1, 96, cached, 6, 5, dtype=dtype) if cached else None
    used = cache if conv.kernel_size[0] > 1 else None

    def ours(m, x, c):
        return ref.causal_conv3d(x, m.weight, m.bias, cache=used)

    against(lambda m, x, c: m(x, c), ours, conv, dtype, x, cache, exact=True)


@each_dtype
@pytest.mark.parametrize("module", [wan.WanRMS_norm, hunyuan15.HunyuanVideo15RMS_norm], ids=["wan", "hunyuan15"])
@pytest.mark.parametrize("bias", [False, True])
def test_channel_l2_norm(module, bias, dtype):
    norm = seeded(module(96, images=False, bias=bias), dtype)
    x = video(1, 96, 2, 6, 5, dtype=dtype)
    x[0, :, 0, 0, 0] = 0  # the clamp of the norm

    def ours(m, x):
        return ref.norm_silu(x, weight=m.gamma.flatten(), bias=m.bias.flatten() if bias else None)

    against(lambda m, x: F.silu(m(x)), ours, norm, dtype, x)


@each_dtype
@pytest.mark.parametrize("dims", [(96, 96), (192, 96)], ids=["same", "shortcut"])
def test_wan_residual_block_in_chunks(dims, dtype):
    """The whole block with its feat_cache: frames 1, 1, 4, as the decoder feeds them."""
    block = seeded(wan.WanResidualBlock(*dims), dtype)
    x = video(1, dims[0], 6, 5, 4, dtype=dtype)
    chunks = (1, 1, 4)

    def original(m, x):
        cache, parts = [None, None], []
        for chunk in x.split(chunks, 2):
            parts.append(m(chunk, feat_cache=cache, feat_idx=[0]))
        return torch.cat(parts, 2)

    def ours(m, x):
        caches, parts = [None, None], []
        for chunk in x.split(chunks, 2):
            h = chunk
            if dims[0] != dims[1]:
                h = ref.causal_conv3d(chunk, m.conv_shortcut.weight, m.conv_shortcut.bias)
            y = chunk
            for i, (norm, conv) in enumerate(((m.norm1, m.conv1), (m.norm2, m.conv2))):
                now = y
                y = ref.causal_conv3d(
                    now, conv.weight, conv.bias, cache=caches[i], norm="channel_l2",
                    norm_weight=norm.gamma.flatten(), act="silu", residual=h if i else None,
                )  # fmt: skip
                caches[i] = ref.next_cache(now, caches[i], 3)
            parts.append(y)
        return torch.cat(parts, 2)

    against(original, ours, block, dtype, x)


@each_dtype
def test_wan_downsampling(dtype):
    """ZeroPad2d((0, 1, 0, 1)) + strided Conv2d, and the strided time_conv on its one cached frame."""
    down = seeded(wan.WanResample(32, "downsample3d"), dtype)
    x = video(1, 32, 4, 6, 8, dtype=dtype)
    last = video(1, 32, 1, 3, 4, dtype=dtype)

    def original(m, x, last):
        return m(x, feat_cache=[last], feat_idx=[0])

    def ours(m, x, last):
        conv = m.resample[1]
        y = ref.causal_conv3d(x, conv.weight.unsqueeze(2), conv.bias, stride=(1, 2, 2), padding=(0, 0, 0, 1, 0, 1))
        t = m.time_conv
        return ref.causal_conv3d(y, t.weight, t.bias, stride=t.stride, padding=(1, 0, 0, 0, 0, 0), cache=last)

    against(original, ours, down, dtype, x, last)


@each_dtype
@pytest.mark.parametrize("last", [False, True], ids=["ncdhw", "ndhwc"])
def test_cogvideox_causal_conv_in_chunks(last, dtype):
    conv = seeded(cogvideox.CogVideoXCausalConv3d(64, 64, 3, pad_mode="first"), dtype)
    x = video(1, 64, 5, 6, 5, dtype=dtype, last=last)

    def original(m, x):
        first, cache = m(x[:, :, :3])
        return torch.cat([first, m(x[:, :, 3:], cache)[0]], 2), cache

    def ours(m, x):
        first = ref.causal_conv3d(x[:, :, :3], m.conv.weight, m.conv.bias, time_pad="first")
        cache = ref.next_cache(x[:, :, :3], None, 3)
        return torch.cat([first, ref.causal_conv3d(x[:, :, 3:], m.conv.weight, m.conv.bias, cache=cache)], 2), cache

    against(original, ours, conv, dtype, x, exact=True)


@each_dtype
@pytest.mark.parametrize("stride", [1, (2, 2, 2), (1, 2, 2)], ids=["1", "222", "122"])
@pytest.mark.parametrize(
    "module", [hunyuan.HunyuanVideoCausalConv3d, hunyuan15.HunyuanVideo15CausalConv3d], ids=["hunyuan", "hunyuan15"]
)
def test_hunyuan_causal_conv(module, stride, dtype):
    conv = seeded(module(64, 64, 3, stride=stride), dtype)
    x = video(1, 64, 5, 6, 8, dtype=dtype)  # 4k + 1 frames in one piece, also under a time stride of 2

    def ours(m, x):
        return ref.causal_conv3d(x, m.conv.weight, m.conv.bias, stride=stride, time_pad="first", space_pad="replicate")

    against(lambda m, x: m(x), ours, conv, dtype, x, exact=True)


@each_dtype
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("space_pad", ["zeros", "reflect"])
def test_ltx_causal_conv(space_pad, causal, dtype):
    x = video(1, 64, 3, 6, 5, dtype=dtype)
    padding = (2, 0, 1, 1, 1, 1) if causal else (1, 1, 1, 1, 1, 1)

    def ours(m, x):
        return ref.causal_conv3d(x, m.conv.weight, m.conv.bias, padding=padding, time_pad="first", space_pad=space_pad)

    first = ltx.LTXVideoCausalConv3d(64, 64, 3, padding_mode=space_pad, is_causal=causal)
    against(lambda m, x: m(x), ours, seeded(first, dtype), dtype, x, exact=True)
    second = ltx2.LTX2VideoCausalConv3d(64, 64, 3, spatial_padding_mode=space_pad)
    against(lambda m, x: m(x, causal=causal), ours, seeded(second, dtype), dtype, x, exact=True)


@each_dtype
def test_ltx_residual_block(dtype):
    block = seeded(ltx.LTXVideoResnetBlock3d(64), dtype)
    x = video(1, 64, 3, 6, 5, dtype=dtype)

    def ours(m, x):
        h = x
        for conv in (m.conv1, m.conv2):
            h = ref.causal_conv3d(
                h, conv.conv.weight, conv.conv.bias, time_pad="first", norm="channel_rms", act="silu",
                residual=x if conv is m.conv2 else None,
            )  # fmt: skip
        return h

    against(lambda m, x: m(x), ours, block, dtype, x)


@each_dtype
def test_ltx2_per_channel_rms_norm(dtype):
    x = video(1, 64, 3, 6, 5, dtype=dtype)
    norm = ltx2.PerChannelRMSNorm()
    against(lambda m, x: F.silu(m(x)), lambda m, x: ref.norm_silu(x, norm="channel_rms", weight=None), norm, dtype, x)


@each_dtype
def test_mochi_residual_block(dtype):
    """GroupNorm per frame + SiLU, then a convolution that repeats edges in time and space."""
    block = seeded(mochi.MochiResnetBlock3D(64), dtype)
    x = video(2, 64, 3, 6, 5, dtype=dtype)

    def ours(m, x):
        h = x
        for norm, conv in ((m.norm1, m.conv1.conv), (m.norm2, m.conv2.conv)):
            n = norm.norm_layer
            frames = h.transpose(1, 2).flatten(0, 1)
            frames = ref.norm_silu(frames, norm="group", weight=n.weight, bias=n.bias, groups=n.num_groups, eps=n.eps)
            h = ref.causal_conv3d(
                frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2), conv.weight, conv.bias,
                time_pad="first", space_pad="replicate", residual=x if norm is m.norm2 else None,
            )  # fmt: skip
        return h

    against(lambda m, x: m(x)[0], ours, block, dtype, x)


@each_dtype
def test_mochi_downsampling(dtype):
    conv = seeded(cogvideox.CogVideoXCausalConv3d(32, 64, (2, 2, 2), stride=(2, 2, 2), pad_mode="replicate"), dtype)
    x = video(1, 32, 4, 6, 8, dtype=dtype)

    def ours(m, x):
        c = m.conv
        return ref.causal_conv3d(
            x, c.weight, c.bias, stride=2, padding=(1, 0, 0, 0, 0, 0), time_pad="first", space_pad="replicate"
        )

    against(lambda m, x: m(x)[0], ours, conv, dtype, x, exact=True)


@each_dtype
@pytest.mark.parametrize("groups", [32, 8])
def test_group_norm_silu(groups, dtype):
    """HunyuanVideo and CogVideoX: GroupNorm over the clip, then SiLU."""
    norm = seeded(torch.nn.GroupNorm(groups, 64, eps=1e-6), dtype)
    x = video(2, 64, 3, 6, 5, dtype=dtype) * 3 + 1

    def ours(m, x):
        return ref.norm_silu(x, norm="group", weight=m.weight, bias=m.bias, groups=groups)

    against(lambda m, x: F.silu(m(x)), ours, norm, dtype, x)
