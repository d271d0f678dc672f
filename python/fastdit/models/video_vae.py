"""A small causal video VAE to train: the first half of the reference system, over `fastdit.ops`.

Pictures become patches (space to channels), a few blocks work on all frames at 1/4 of the size, the rest on fewer
frames at 1/8. Every convolution fuses the norm and the SiLU before it and the residual after it. Time is causal as
in `fastdit.models.vae`: the first frame is coded alone, every later group of four becomes one latent frame.
Under `fastdit.use_backend("reference")` the whole model is plain PyTorch.

Shapes: videos (B, 3, 1 + 4*t, H, W) <-> latents (B, z, 1 + t, H/8, W/8), H and W any multiples of 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit.models.vae import AFTER, ResidualBlock, Stream, chunks, patchify, unpatchify
from fastdit.nn import CausalConv3d, ChannelNorm, FrameConv2d, channels_last

FRAMES = 4  # of a video per latent frame after the first
FRAME = (1, 3, 3)  # the kernel of layers that see one frame at a time


@dataclass(frozen=True)
class VideoVAEConfig:
    """Widths and depths of a `VideoVAE`; pairs are (at 1/p of the size with all frames, at 1/2p with every fourth)."""

    latent_channels: int = 8
    patch_size: int = 4
    widths: tuple[int, int] = (48, 64)
    encoder_blocks: tuple[int, int] = (1, 1)
    decoder_blocks: tuple[int, int] = (2, 1)

    @property
    def side(self) -> int:
        """Height and width in pixels of what one latent value covers."""
        return 2 * self.patch_size

    def __post_init__(self):
        for name in ("latent_channels", "patch_size"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(
                    f"VideoVAEConfig: {name} must be a positive int; got {getattr(self, name)!r}, expected e.g. "
                    f"{getattr(VideoVAEConfig, name)}; correct the configuration."
                )
        for name in ("widths", "encoder_blocks", "decoder_blocks"):
            value, least = getattr(self, name), int(name == "widths")
            if (
                not isinstance(value, (list, tuple))
                or len(value) != 2
                or not all(isinstance(n, int) and n >= least for n in value)
            ):
                raise ValueError(
                    f"VideoVAEConfig: {name} must have one number for each of the two stages; got {value!r}, expected "
                    f"two ints of at least {least}; write the finer stage first."
                )
            object.__setattr__(self, name, tuple(value))  # a list where it comes from JSON or TOML


@dataclass(frozen=True)
class Posterior:
    """The Gaussian that the encoder gives each latent value: `mean` and `logvar`, (B, z, 1 + t, h, w) each."""

    mean: Tensor
    logvar: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise"""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """(mean^2 + var - 1 - logvar) / 2: the divergence from the standard normal, averaged over all values."""
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).mean()


class Whole(Stream):
    """The pass over a whole video: nothing comes after it, so nothing is remembered, and blocks can be run again."""

    def __call__(self, conv: CausalConv3d, x: Tensor, **fused) -> Tensor:
        return conv(x, **fused)


class Down(nn.Module):
    """One convolution over groups of four frames, at half the size: 1 + 4n -> 1 + n frames.

    The first frame has a group of its own, with zeros before it. Later chunks are whole groups, so this layer has
    nothing to remember.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.conv = CausalConv3d(in_dim, out_dim, (FRAMES, 3, 3), stride=(FRAMES, 2, 2))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.conv(x, padding=(FRAMES - 1 if stream.first else 0, *AFTER[1:]))


class Up(nn.Module):
    """Four frames of each, then 2 x 2 pixels: 1 + n -> 1 + 4n frames, since of the first group only one is kept.

    Channels become frames and pixels. Nearest-neighbour pixels before the same convolution learn more slowly.
    """

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.time_conv = CausalConv3d(in_dim, FRAMES * in_dim, (3, 1, 1))
        self.conv = FrameConv2d(in_dim, 4 * out_dim, 3)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        y = spread(stream(self.time_conv, x), FRAMES, 1)
        return spread(self.conv(y[:, :, FRAMES - 1 :] if stream.first else y), 1, 2)


def spread(x: Tensor, f_t: int, f: int) -> Tensor:
    """Channels (t, h, w, c) to pixels: (B, f_t*f*f*C, T, H, W) -> (B, C, T*f_t, H*f, W*f) in channels_last_3d."""
    b, _, t, h, w = x.shape
    y = x.unflatten(1, (f_t, f, f, -1)).permute(0, 5, 1, 6, 2, 7, 3, 4)  # (B, T, f_t, H, f, W, f, C)
    return y.reshape(b, t * f_t, h * f, w * f, -1).permute(0, 4, 1, 2, 3)


class Coder(nn.Module):
    """An encoder or a decoder: a convolution, blocks, and a convolution of the normed and gated result."""

    def __init__(self, conv_in: CausalConv3d, blocks: list[nn.Module], conv_out: CausalConv3d):
        super().__init__()
        self.conv_in = conv_in
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = ChannelNorm(conv_out.in_channels)
        self.conv_out = conv_out
        self.gradient_checkpointing = False

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        again = self.gradient_checkpointing and isinstance(stream, Whole) and torch.is_grad_enabled()
        x = stream(self.conv_in, channels_last(x))
        for block in self.blocks:
            x = checkpoint(block, x, stream, use_reentrant=False) if again else block(x, stream)
        return stream(self.conv_out, x, norm_weight=self.norm_out.weight, act="silu")


class VideoVAE(nn.Module):
    """Causal video autoencoder to train, with a Gaussian posterior; z, p, widths (f, c) and blocks of the config.

    | part | layers | at | parameters |
    |---|---|---|---|
    | encoder | conv 3p^2 -> f, blocks of f | T frames of H/p x W/p | 104 k |
    | | conv over 4 frames f -> c, blocks of c, conv c -> 2z | t = 1 + (T-1)/4 frames of H/2p x W/2p | 194 k |
    | decoder | conv z -> c, blocks of c, conv over time c -> 4c | t frames of H/2p x W/2p | 128 k |
    | | conv c -> 4f to pixels, blocks of f, conv f -> 3p^2 | T frames of H/p x W/p | 256 k |

    682 k parameters by default. A block is two convolutions, each with norm and SiLU before it. Only four layers look
    back in time: the first and the last convolution two frames, the one over 4 frames to its group, the one over time
    two latent frames. What a layer saw in training is therefore all that it sees in a video of any length: crops of
    17 frames hold every case.

    Shapes: video (B, 3, 1 + 4k, H, W) in [-1, 1], H and W multiples of 2p <-> latents (B, z, 1 + k, H/2p, W/2p).
    Cost, FLOPs of a video with n fine blocks of width f and m coarse ones of width c, of that side:
        encode  2 * ((81 p^2 f + 18 n f^2) * T*H*W/p^2 + (36 f c + 18 m c^2 + 18 z c) * t*H*W/4p^2)
        decode  2 * ((9 z c + 18 m c^2 + 12 c^2) * t*H*W/4p^2 + (9 c f + 18 n f^2 + 81 p^2 f) * T*H*W/p^2)
        1.03 and 1.59 GFLOP for 17 x 64 x 64; training three times as many.
    Training: `decode` clamps to [-1, 1] in eval mode only, so that every pixel has a gradient.
        `gradient_checkpointing = True` keeps only what enters each block and runs the blocks again in backward.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: VideoVAEConfig | None = None):
        super().__init__()
        self.config = c = config or VideoVAEConfig()
        pixels, z, (fine, coarse) = 3 * c.patch_size**2, c.latent_channels, c.widths

        def blocks(stage: int, counts: tuple[int, int]) -> list[nn.Module]:
            return [ResidualBlock(c.widths[stage], c.widths[stage], FRAME) for _ in range(counts[stage])]

        down = [*blocks(0, c.encoder_blocks), Down(fine, coarse), *blocks(1, c.encoder_blocks)]
        up = [*blocks(1, c.decoder_blocks), Up(coarse, fine), *blocks(0, c.decoder_blocks)]
        self.encoder = Coder(CausalConv3d(pixels, fine, 3), down, CausalConv3d(coarse, 2 * z, FRAME))
        self.decoder = Coder(CausalConv3d(z, coarse, FRAME), up, CausalConv3d(fine, pixels, 3))
        self.register_buffer("latent_mean", torch.zeros(z))
        self.register_buffer("latent_std", torch.ones(z))
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Residual branches start small, and the posterior narrow: at first its noise would drown the mean."""
        for name, parameter in self.named_parameters():
            if ".conv2." in name:
                parameter.data.mul_(0.1)
        self.encoder.conv_out.get_parameter("bias").data[self.config.latent_channels :] = -5.0

    @property
    def gradient_checkpointing(self) -> bool:
        return self.encoder.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        self.encoder.gradient_checkpointing = self.decoder.gradient_checkpointing = on

    def encode(self, video: Tensor) -> Posterior:
        """The posterior of whole videos (B, 3, 1 + 4k, H, W); an image is a video of one frame."""
        self._check_video(video)
        return self._encode(video, Whole())

    def decode(self, z: Tensor) -> Tensor:
        """Whole videos of latents (B, z, 1 + k, h, w), as `encode` gives them; not normalized ones."""
        self._check_latents(z)
        return self._decode(z, Whole())

    def encode_chunks(self, video: Tensor | Iterable[Tensor], chunk: int = 1) -> Iterator[Posterior]:
        """The posteriors of consecutive parts of a video, equal to those of the whole; memory is that of one part.

        Args:
            video (Tensor): cut into the first frame, then `chunk` groups of four frames at a time; or an iterable of
                parts, the first of 1 + 4k frames, the others of 4k.
        """
        stream = Stream()
        for part in parts(video, chunk * FRAMES):
            self._check_video(part, first=stream.first)
            yield self._encode(part, stream)
            stream.first = False

    def decode_chunks(self, z: Tensor | Iterable[Tensor], chunk: int = 1) -> Iterator[Tensor]:
        """Consecutive parts of a video, equal to those of the whole; memory is that of one part.

        Args:
            z (Tensor): cut into the first latent frame, then `chunk` at a time; or an iterable of parts of any length.
        """
        stream = Stream()
        for part in parts(z, chunk):
            self._check_latents(part)
            yield self._decode(part, stream)
            stream.first = False

    def forward(self, video: Tensor) -> Tensor:
        """Reconstruction from the mean."""
        return self.decode(self.encode(video).mean)

    def normalize(self, z: Tensor) -> Tensor:
        """(z - latent_mean) / latent_std: what the diffusion model sees."""
        return (z - self.latent_mean[:, None, None, None]) / self.latent_std[:, None, None, None]

    def denormalize(self, z: Tensor) -> Tensor:
        return z * self.latent_std[:, None, None, None] + self.latent_mean[:, None, None, None]

    def _encode(self, video: Tensor, stream: Stream) -> Posterior:
        mean, logvar = self.encoder(patchify(video, self.config.patch_size), stream).chunk(2, dim=1)
        return Posterior(mean.contiguous(), logvar.contiguous().clamp(-30.0, 20.0))

    def _decode(self, z: Tensor, stream: Stream) -> Tensor:
        video = unpatchify(self.decoder(z, stream), self.config.patch_size).contiguous()
        return video if self.training else video.clamp(-1.0, 1.0)

    def _check_video(self, video: Tensor, first: bool = True) -> None:
        size = self.config.side
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(
                f"VideoVAE: a video must be (B, 3, T, H, W); got {list(video.shape)}, expected five dims with 3 "
                "colours; give an image one frame, and a single video a batch of one."
            )
        t, h, w = video.shape[2:]
        if t < 1 or (t - first) % FRAMES:
            kind = f"1 + a multiple of {FRAMES}" if first else f"a multiple of {FRAMES} after the first part"
            raise ValueError(
                f"VideoVAE: the number of frames must be {kind}; got {t}, expected e.g. "
                f"{max(t - (t - first) % FRAMES, 1 if first else FRAMES)}; cut the video or repeat its last frame."
            )
        if h % size or w % size or not h or not w:
            raise ValueError(
                f"VideoVAE: height and width must be multiples of {size}; got {h} x {w}, expected e.g. "
                f"{max(size, h // size * size)} x {max(size, w // size * size)}; crop or resize the frames."
            )

    def _check_latents(self, z: Tensor) -> None:
        if z.ndim != 5 or z.shape[1] != self.config.latent_channels or 0 in z.shape[2:]:
            raise ValueError(
                f"VideoVAE: latents must be (B, {self.config.latent_channels}, T, h, w); got {list(z.shape)}, expected "
                "five dims, none of T, h, w empty; pass what encode gives."
            )


def parts(whole: Tensor | Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """The first frame, then `size` frames at a time; what is in parts already stays so."""
    if not isinstance(whole, Tensor):
        yield from whole
        return
    if size < 1:
        raise ValueError(f"VideoVAE: chunk must be at least 1; got {size}, expected latent frames; pass 1 or more.")
    for start, stop in chunks(whole.shape[2], size):
        yield whole[:, :, start:stop]
