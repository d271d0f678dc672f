"""The causal video VAE of Wan 2.1 and 2.2 (arXiv 2503.20314), over `fastdit.ops`.

The parameters carry the names and shapes of diffusers' AutoencoderKLWan, so its checkpoints load strictly.
Under `fastdit.use_backend("reference")` the whole model is plain PyTorch.

Time is causal: the first frame is coded alone, every later group of four frames becomes one latent frame. A video
is therefore processed in chunks of any length with the same result; a `Stream` carries the last input frames of
each layer from chunk to chunk, so memory does not grow with the length of the video.

Shapes: videos (B, 3, 1 + 4*t, H, W) <-> latents (B, z_dim, 1 + t, H/8, W/8).
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.nn import CausalConv3d, ChannelNorm, FrameConv2d, channels_last, frame_attention, last_frames, upsampled

AFTER = (0, 0, 0, 1, 0, 1)  # one row and one column of zeros after the image, for stride 2
PIECE = 2  # frames that leave a block of a decoder at a time: as many as a 3-tap convolution remembers
LARGE = 2**25  # bytes of a chunk; below, pieces would spare nothing worth 3 % of the time
ONE_BEFORE = (1, 0, 0, 0, 0, 0)  # one earlier frame, for the temporal stride 2


class Stream(dict):
    """What a pass over a video remembers between chunks: each causal layer's last input frames."""

    first = True  # the chunk is the first frame

    def __call__(self, conv: CausalConv3d, x: Tensor, **fused) -> Tensor:
        if conv.kernel_size[0] == 1:
            return conv(x, **fused)
        cache = self.get(conv)
        y = conv(x, cache, **fused)
        self[conv] = last_frames(x, cache, conv.kernel_size[0])
        return y


class ResidualBlock(nn.Module):
    """shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))): two fused calls."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int | tuple[int, int, int] = 3):
        super().__init__()
        self.norm1 = ChannelNorm(in_dim)
        self.conv1 = CausalConv3d(in_dim, out_dim, kernel)
        self.norm2 = ChannelNorm(out_dim)
        self.conv2 = CausalConv3d(out_dim, out_dim, kernel)
        self.conv_shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        shortcut = self.conv_shortcut(x)
        y = stream(self.conv1, x, norm_weight=self.norm1.weight, act="silu")
        return stream(self.conv2, y, norm_weight=self.norm2.weight, act="silu", residual=shortcut)


class AttentionBlock(nn.Module):
    """x + proj(attention(to_qkv(norm(x)))) inside each frame, one head."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelNorm(dim, axes=2)
        self.to_qkv = FrameConv2d(dim, 3 * dim, 1)
        self.proj = FrameConv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.to_qkv(x, norm_weight=self.norm.weight)
        return self.proj(frame_attention(qkv), residual=x)


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.resnets = nn.ModuleList([ResidualBlock(dim, dim), ResidualBlock(dim, dim)])
        self.attentions = nn.ModuleList([AttentionBlock(dim)])

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.resnets[0](x, stream)
        return self.resnets[1](self.attentions[0](x), stream)


class Downsample(nn.Module):
    """2x smaller images, then with `time` 2x fewer frames. The first frame of a video keeps its place in time."""

    def __init__(self, dim: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), FrameConv2d(dim, dim, 3, stride=2))
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = self.resample[1](x, padding=AFTER)
        if self.time_conv is None:
            return x
        last = stream.get(self.time_conv)
        stream[self.time_conv] = ops.next_cache(x, last, 2)
        return x if stream.first else self.time_conv(x, last, padding=ONE_BEFORE)


class Upsample(nn.Module):
    """With `time` 2x more frames (but for the first frame of a video), then 2x larger images."""

    def __init__(self, dim: int, out_dim: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), FrameConv2d(dim, out_dim, 3))
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is None or stream.first:
            return upsampled(self.resample[1], x)
        return upsampled(self.resample[1], stream(self.time_conv, x), frames=2)


class DownBlock(nn.Module):
    """Wan 2.2: residual blocks and a downsampling, beside a shortcut of averages."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, down: bool, time: bool):
        super().__init__()
        dims = [in_dim] + [out_dim] * num_res_blocks
        self.factors = (2 if time else 1, 2 if down else 1)
        self.out_dim = out_dim
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(dims))
        self.downsampler = Downsample(out_dim, time) if down else None

    def shortcut(self, x: Tensor) -> Tensor:
        """Space and time to channels (order c, t, h, w), then the mean of each group of channels."""
        f_t, f = self.factors
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % f_t, 0))
        x = x.unflatten(4, (-1, f)).unflatten(3, (-1, f)).unflatten(2, (-1, f_t))  # (B, C, T, f_t, H, f, W, f)
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return x.unflatten(1, (self.out_dim, -1)).mean(dim=2)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, stream)
        if self.downsampler is not None:
            y = self.downsampler(y, stream)
        return y + self.shortcut(x)


class UpBlock(nn.Module):
    """Residual blocks, then an upsampling. Wan 2.1 halves the channels; 2.2 adds a shortcut of repeats."""

    def __init__(self, in_dim: int, out_dim: int, num_res_blocks: int, up: bool, time: bool, is_residual: bool):
        super().__init__()
        dims = [in_dim] + [out_dim] * (num_res_blocks + 1)
        self.resnets = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(dims))
        self.upsampler = Upsample(out_dim, out_dim, time) if up and is_residual else None
        self.upsamplers = nn.ModuleList([Upsample(out_dim, out_dim // 2, time)]) if up and not is_residual else None
        self.out_dim = out_dim
        self.f_t = 2 if time else 1

    def shortcut(self, x: Tensor, first: bool) -> Tensor:
        """Channels (repeated to fit) to time and space; the first frame of a video stays one frame."""
        x = x.repeat_interleave(self.out_dim * self.f_t * 4 // x.shape[1], dim=1)
        x = x.unflatten(1, (self.out_dim, self.f_t, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return x[:, :, self.f_t - 1 :] if first else x

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = x
        for block in self.resnets:
            y = block(y, stream)
        if self.upsamplers is not None:
            y = self.upsamplers[0](y, stream)
        if self.upsampler is not None:
            y = self.upsampler(y, stream) + self.shortcut(x, stream.first)
        return y


class Encoder(nn.Module):
    def __init__(self, in_channels, dim, z_dim, dim_mult, num_res_blocks, downsample_time, is_residual):
        super().__init__()
        dims = [dim * m for m in [1, *dim_mult]]
        self.conv_in = CausalConv3d(in_channels, dims[0], 3)
        self.down_blocks = nn.ModuleList()
        for i, (in_dim, out_dim) in enumerate(pairwise(dims)):
            down = i != len(dim_mult) - 1
            time = down and downsample_time[i]
            if is_residual:
                self.down_blocks.append(DownBlock(in_dim, out_dim, num_res_blocks, down, time))
                continue
            for _ in range(num_res_blocks):
                self.down_blocks.append(ResidualBlock(in_dim, out_dim))
                in_dim = out_dim
            if down:
                self.down_blocks.append(Downsample(out_dim, time))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], z_dim, 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = stream(self.conv_in, x)
        for block in self.down_blocks:
            x = block(x, stream)
        x = self.mid_block(x, stream)
        return stream(self.conv_out, x, norm_weight=self.norm_out.weight, act="silu")


class Decoder(nn.Module):
    def __init__(self, dim, z_dim, dim_mult, num_res_blocks, upsample_time, out_channels, is_residual):
        super().__init__()
        dims = [dim * m for m in [dim_mult[-1], *reversed(dim_mult)]]
        self.conv_in = CausalConv3d(z_dim, dims[0], 3)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList()
        for i, (in_dim, out_dim) in enumerate(pairwise(dims)):
            up = i != len(dim_mult) - 1
            if i > 0 and not is_residual:
                in_dim //= 2  # the upsampling before has halved them
            time = up and upsample_time[i]
            self.up_blocks.append(UpBlock(in_dim, out_dim, num_res_blocks, up, time, is_residual))
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = CausalConv3d(dims[-1], out_channels, 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.rest(self.mid_block(stream(self.conv_in, x), stream), stream)

    def rest(self, x: Tensor, stream: Stream, start: int = 0) -> Tensor:
        """The up blocks from `start` on; large pictures PIECE frames at a time to the end."""
        for i in range(start, len(self.up_blocks)):
            block: Any = self.up_blocks[i]
            if (parts := pieces(x, block.f_t)) is not None:
                return torch.cat([self.rest(part, stream, i) for part in parts], dim=2)
            x = block(x, stream)
        return stream(self.conv_out, x, norm_weight=self.norm_out.weight, act="silu")


class CausalVAE(nn.Module):
    """Causal video autoencoder, key-compatible with diffusers' AutoencoderKLWan; defaults are Wan 2.1's.

    Args: as AutoencoderKLWan's config, `CausalVAE.from_config(vae.config)` picks them.
    """

    def __init__(
        self,
        base_dim: int = 96,
        decoder_base_dim: int | None = None,
        z_dim: int = 16,
        dim_mult: tuple[int, ...] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        temperal_downsample: tuple[bool, ...] = (False, True, True),
        is_residual: bool = False,
        in_channels: int = 3,
        out_channels: int = 3,
        patch_size: int | None = None,
    ):
        super().__init__()
        self.patch_size = patch_size or 1
        time = list(temperal_downsample)
        self.frames_per_latent = 2 ** sum(time)
        self.encoder = Encoder(in_channels, base_dim, 2 * z_dim, dim_mult, num_res_blocks, time, is_residual)
        self.quant_conv = CausalConv3d(2 * z_dim, 2 * z_dim, 1)
        self.post_quant_conv = CausalConv3d(z_dim, z_dim, 1)
        dim = decoder_base_dim or base_dim
        self.decoder = Decoder(dim, z_dim, dim_mult, num_res_blocks, time[::-1], out_channels, is_residual)

    @classmethod
    def from_config(cls, config) -> "CausalVAE":
        """The model of an AutoencoderKLWan's config (a mapping)."""
        if config.get("attn_scales"):
            raise ValueError(f"CausalVAE: attn_scales are not supported; got {config['attn_scales']}, expected [].")
        names = cls.__init__.__code__.co_varnames[1 : cls.__init__.__code__.co_argcount]
        return cls(**{name: config[name] for name in names if name in config})

    def encode_chunks(self, x: Tensor, chunk: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        """Mean and log-variance of the first latent frame, then of `chunk` latent frames at a time."""
        step = self.frames_per_latent
        if (x.shape[2] - 1) % step:
            raise ValueError(
                f"CausalVAE: the number of frames must be 1 + a multiple of {step}; got {x.shape[2]}; "
                f"drop the last {(x.shape[2] - 1) % step}."
            )
        stream = Stream()
        for start, stop in chunks(x.shape[2], chunk * step):
            stream.first = start == 0
            frames = channels_last(patchify(x[:, :, start:stop], self.patch_size))
            mean, logvar = self.quant_conv(self.encoder(frames, stream)).contiguous().chunk(2, dim=1)
            yield mean, logvar.clamp(-30.0, 20.0)

    def decode_chunks(self, z: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """The first frame, then the frames of `chunk` latent frames at a time, in [-1, 1]."""
        stream = Stream()
        for start, stop in chunks(z.shape[2], chunk):
            stream.first = start == 0
            frames = self.decoder(self.post_quant_conv(channels_last(z[:, :, start:stop])), stream)
            yield unpatchify(frames, self.patch_size).contiguous().clamp(-1.0, 1.0)

    def encode(self, x: Tensor, *, chunk: int = 1) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (B, z_dim, 1 + t, h, w) of videos (B, 3, 1 + 4*t, H, W)."""
        means, logvars = zip(*self.encode_chunks(x, chunk), strict=True)
        return torch.cat(means, dim=2), torch.cat(logvars, dim=2)

    def decode(self, z: Tensor, *, chunk: int = 1) -> Tensor:
        """Videos (B, 3, 1 + 4*t, H, W) of latents (B, z_dim, 1 + t, h, w).

        Working memory is that of one chunk and does not grow with t; `decode_chunks` frees the output too.
        """
        return torch.cat(list(self.decode_chunks(z, chunk)), dim=2)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction from the mean."""
        return self.decode(self.encode(x)[0])


def chunks(frames: int, size: int) -> Iterator[tuple[int, int]]:
    """(0, 1), (1, 1 + size), ...: the first frame alone."""
    if frames:
        yield 0, 1
    for start in range(1, frames, size):
        yield start, min(start + size, frames)


def pieces(x: Tensor, frames: int) -> tuple[Tensor, ...] | None:
    """A large chunk in parts of which each leaves a block as PIECE frames; the block makes `frames` of one."""
    size = PIECE // frames
    if x.shape[2] <= size or x.numel() * x.element_size() <= LARGE:
        return None
    return x.split(size, dim=2)


def patchify(x: Tensor, p: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C*p*p, T, H/p, W/p), channels in the order (c, w, h); Wan 2.2 with p = 2."""
    if p == 1:
        return x
    return x.unflatten(4, (-1, p)).unflatten(3, (-1, p)).permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: Tensor, p: int) -> Tensor:
    if p == 1:
        return x
    return x.unflatten(1, (-1, p, p)).permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
