"""WanVAE_ of Wan's own repositories, written anew: same parts, names, cache slots and arithmetic."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.models.vae import patchify, unpatchify
from fastdit.testing.models import randomize
from fastdit.testing.whole import Whole
from fastdit.testing.zoo import Model, randn

# Layers: a slot of the cache holds a convolution's last two input frames ----------------------------------------------


class CausalConv3d(nn.Conv3d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        t, h, w = (int(p) for p in self.padding)
        self._padding, self.padding = (w, w, h, h, 2 * t, 0), (0, 0, 0)

    def forward(self, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
        w0, w1, h0, h1, before, _ = self._padding
        if cache_x is not None and before > 0:
            x, before = torch.cat([cache_x, x], dim=2), before - cache_x.shape[2]
        return super().forward(F.pad(x, (w0, w1, h0, h1, before, 0)))


def slotted(conv: nn.Module, x: Tensor, feat_cache: list | None, feat_idx: list) -> Tensor:
    if feat_cache is None:
        return conv(x)
    i, kept = feat_idx[0], x[:, :, -2:].clone()
    if kept.shape[2] < 2 and feat_cache[i] is not None:
        kept = torch.cat([feat_cache[i][:, :, -1:], kept], dim=2)
    y, feat_cache[i] = conv(x, feat_cache[i]), kept
    feat_idx[0] += 1
    return y


class RMS_norm(nn.Module):
    def __init__(self, dim: int, images: bool = False):
        super().__init__()
        self.channel_first, self.scale, self.bias = True, dim**0.5, 0.0
        self.gamma = nn.Parameter(torch.ones(dim, 1, 1, *[1] * (not images)))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1) * self.scale * self.gamma + self.bias


class Upsample(nn.Upsample):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).type_as(x)


class Resample(nn.Module):
    def __init__(self, dim: int, out_dim: int, mode: str):
        super().__init__()
        self.dim, self.mode = dim, mode
        if mode.startswith("up"):
            up = Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact")
            self.resample = nn.Sequential(up, nn.Conv2d(dim, out_dim, 3, padding=1))
        else:
            self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=(2, 2)))
        if mode == "upsample3d":
            self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1), padding=(1, 0, 0))
        if mode == "downsample3d":
            self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor, feat_cache: list | None = None, feat_idx: Any = None) -> Tensor:
        b, t = x.shape[0], x.shape[2]
        if self.mode == "upsample3d" and feat_cache is not None:
            x = self.twice(x, feat_cache, feat_idx)
            t = x.shape[2]
        x = self.resample(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (b, t)).transpose(1, 2)
        if self.mode == "downsample3d" and feat_cache is not None:
            i, kept = feat_idx[0], x[:, :, -1:].clone()
            if feat_cache[i] is not None:
                x = self.time_conv(torch.cat([feat_cache[i], x], dim=2))
            feat_cache[i] = kept
            feat_idx[0] += 1
        return x

    def twice(self, x: Tensor, feat_cache: list, feat_idx: list) -> Tensor:
        i, (b, c, t, h, w) = feat_idx[0], x.shape
        if feat_cache[i] is None:  # the first frame of the video
            feat_cache[i] = "Rep"
            feat_idx[0] += 1
            return x
        kept = x[:, :, -2:].clone()
        if kept.shape[2] < 2:
            last = torch.zeros_like(kept) if isinstance(feat_cache[i], str) else feat_cache[i][:, :, -1:]
            kept = torch.cat([last, kept], dim=2)
        y = self.time_conv(x) if isinstance(feat_cache[i], str) else self.time_conv(x, feat_cache[i])
        feat_cache[i] = kept
        feat_idx[0] += 1
        return torch.stack(y.view(b, 2, c, t, h, w).unbind(1), dim=3).reshape(b, c, 2 * t, h, w)


class ResidualBlock(nn.Module):
    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.residual = nn.Sequential(
            RMS_norm(in_dim), nn.SiLU(), CausalConv3d(in_dim, out_dim, 3, padding=1),
            RMS_norm(out_dim), nn.SiLU(), nn.Dropout(0.0), CausalConv3d(out_dim, out_dim, 3, padding=1),
        )  # fmt: skip
        self.shortcut = CausalConv3d(in_dim, out_dim, 1) if in_dim != out_dim else nn.Identity()

    def forward(self, x: Tensor, feat_cache: list | None = None, feat_idx: Any = None) -> Tensor:
        y = x
        for layer in self.residual:
            y = slotted(layer, y, feat_cache, feat_idx) if isinstance(layer, CausalConv3d) else layer(y)
        return y + self.shortcut(x)


class AttentionBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.dim, self.norm = dim, RMS_norm(dim, images=True)
        self.to_qkv, self.proj = nn.Conv2d(dim, 3 * dim, 1), nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        y = self.to_qkv(self.norm(x.transpose(1, 2).flatten(0, 1)))
        q, k, v = y.flatten(2).transpose(1, 2).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(b * t, c, h, w)
        return self.proj(y).unflatten(0, (b, t)).transpose(1, 2) + x


# Stages -----------------------------------------------------------------------------------------------------------


def middle(dim: int) -> nn.Module:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


class Side(nn.Module):
    """Encoder3d and Decoder3d: conv1, two stages in the order of `stages`, head."""

    stages: tuple[str, str]
    conv1: nn.Module
    head: nn.Sequential

    def forward(self, x: Tensor, feat_cache: list | None = None, feat_idx: Any = None) -> Tensor:
        x = slotted(self.conv1, x, feat_cache, feat_idx)
        for layer in (layer for stage in self.stages for layer in getattr(self, stage)):
            x = layer(x) if isinstance(layer, AttentionBlock) else layer(x, feat_cache, feat_idx)
        norm, act, conv = self.head
        return slotted(conv, act(norm(x)), feat_cache, feat_idx)


class Encoder3d(Side):
    stages = ("downsamples", "middle")

    def __init__(self, dim: int, z_dim: int, dim_mult: tuple[int, ...], time: tuple[bool, ...], colours: int):
        super().__init__()
        dims = [dim * u for u in (1, *dim_mult)]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(dims)):
            layers.append(ResidualBlock(a, b))
            if i < len(time):
                layers.append(Resample(b, b, "downsample3d" if time[i] else "downsample2d"))
        self.conv1, self.downsamples = CausalConv3d(colours, dims[0], 3, padding=1), nn.Sequential(*layers)
        self.middle = middle(dims[-1])
        last = CausalConv3d(dims[-1], z_dim, 3, padding=1)
        self.head = nn.Sequential(RMS_norm(dims[-1]), nn.SiLU(), last)


class Decoder3d(Side):
    stages = ("middle", "upsamples")

    def __init__(self, dim: int, z_dim: int, dim_mult: tuple[int, ...], time: tuple[bool, ...], colours: int):
        super().__init__()
        dims = [dim * u for u in (dim_mult[-1], *reversed(dim_mult))]
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(pairwise(dims)):
            layers.append(ResidualBlock(a // 2 if i else a, b))
            if i < len(time):
                layers.append(Resample(b, b // 2, "upsample3d" if time[i] else "upsample2d"))
        self.conv1, self.upsamples = CausalConv3d(z_dim, dims[0], 3, padding=1), nn.Sequential(*layers)
        self.middle = middle(dims[0])
        last = CausalConv3d(dims[-1], colours, 3, padding=1)
        self.head = nn.Sequential(RMS_norm(dims[-1]), nn.SiLU(), last)


class WanVAE_(nn.Module):
    """patch: 1 (Wan 2.1) or 2 (Wan 2.2, whose encoder and decoder see 2 x 2 patches)."""

    def __init__(self, dim=8, z_dim=4, dim_mult=(1, 2, 2, 2), time=(False, True, True), patch=1):
        super().__init__()
        colours = 3 * patch**2
        self.patch = patch
        self.encoder = Encoder3d(dim, 2 * z_dim, dim_mult, time, colours)
        self.conv1, self.conv2 = CausalConv3d(2 * z_dim, 2 * z_dim, 1), CausalConv3d(z_dim, z_dim, 1)
        self.decoder = Decoder3d(dim, z_dim, dim_mult, time[::-1], colours)

    def clear_cache(self) -> None:
        self._conv_idx, self._feat_map = [0], [None] * count(self.decoder)
        self._enc_conv_idx, self._enc_feat_map = [0], [None] * count(self.encoder)

    def encode(self, x: Tensor, scale: list) -> Tensor:
        self.clear_cache()
        x, out = patchify(x, self.patch), []
        for i in range(1 + (x.shape[2] - 1) // 4):
            part = x[:, :, 4 * i - 3 : 4 * i + 1] if i else x[:, :, :1]
            out.append(self.encoder(part, self._enc_feat_map, [0]))
        mean = self.conv1(torch.cat(out, dim=2)).chunk(2, dim=1)[0]
        self.clear_cache()
        return (mean - scale[0].view(1, -1, 1, 1, 1)) * scale[1].view(1, -1, 1, 1, 1)

    def decode(self, z: Tensor, scale: list) -> Tensor:
        self.clear_cache()
        x = self.conv2(z / scale[1].view(1, -1, 1, 1, 1) + scale[0].view(1, -1, 1, 1, 1))
        out = torch.cat([self.decoder(frame, self._feat_map, [0]) for frame in x.split(1, dim=2)], dim=2)
        self.clear_cache()
        return unpatchify(out, self.patch)


def count(model: nn.Module) -> int:
    return sum(isinstance(m, CausalConv3d) for m in model.modules())


# ------------------------------------------------------------------------------------------------------------------


def vae(**config) -> Any:
    return randomize(WanVAE_(**config))


def scale(like: Tensor, channels: int) -> list[Tensor]:
    """Mean and 1 / std of the latents."""
    return [torch.linspace(a, b, channels).to(like) for a, b in ((-0.5, 0.5), (0.4, 1.2))]


def encode(model: Any, given: dict[str, Any]) -> Tensor:
    return model.encode(given["x"], scale(given["x"], 4))


def decode(model: Any, given: dict[str, Any]) -> Tensor:
    return model.decode(given["z"], scale(given["z"], 4))


LAYERS = {
    "causal residual block (Wan-Video)": 12,
    "causal resampling (2x in space, 2x in time)": 6,
    "frame attention of a VAE": 2,
    "causal encoder (Wan-Video)": 1,
    "causal decoder (Wan-Video)": 1,
    "loop over time (Wan-Video)": 1,
}
VIDEO, LATENTS = (lambda: dict(x=randn(2, 3, 10, 32, 48))), (lambda: dict(z=randn(2, 4, 3, 3, 5)))
MODELS = (
    Model("WanVAE_ (Wan-Video) encode", "wan_native", vae, VIDEO, LAYERS, encode),
    Model("WanVAE_ (Wan-Video) decode", "wan_native", vae, LATENTS, LAYERS, decode),
    Model("WanVAE_ (Wan-Video), patches, encode", "wan_native", lambda: vae(patch=2), VIDEO, LAYERS, encode),
    Model("WanVAE_ (Wan-Video), patches, decode", "wan_native", lambda: vae(patch=2), LATENTS, LAYERS, decode),
)


def decode_whole(*size: int) -> Any:
    def run(dtype: torch.dtype, device: str) -> Any:
        z = randn(1, *size).to(device, dtype)

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return model.decode(z, scale(z, size[0]))

        return call

    return run


ROWS = (
    Whole(
        "WanVAE_ (Wan-Video) decode",
        "1x16x3x16x16",
        lambda: vae(dim=96, z_dim=16, dim_mult=(1, 2, 4, 4)),
        decode_whole(16, 3, 16, 16),
        probe=decode_whole(16, 2, 6, 6),
        rounds=5,
    ),
)
