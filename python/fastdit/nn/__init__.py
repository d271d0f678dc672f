"""torch.nn layers over `fastdit.ops`: for models of your own, for `fastdit.models` and for `fastdit.accelerate`."""

from fastdit.nn.adaln import AdaLNAttention, AdaLNMlp, FinalLayer
from fastdit.nn.block import AdaLNZeroBlock, CrossAttention, DiTBlock
from fastdit.nn.conv import (
    CausalConv3d,
    FrameConv2d,
    channels_last,
    frame_attention,
    last_frames,
    upsample2x,
    upsampled,
)
from fastdit.nn.norm import ChannelNorm, ChannelRMSSiLU, QKNormRope
from fastdit.nn.patch import PatchEmbed3d

__all__ = [
    "AdaLNAttention",
    "AdaLNMlp",
    "AdaLNZeroBlock",
    "CausalConv3d",
    "ChannelNorm",
    "ChannelRMSSiLU",
    "CrossAttention",
    "DiTBlock",
    "FinalLayer",
    "FrameConv2d",
    "PatchEmbed3d",
    "QKNormRope",
    "channels_last",
    "frame_attention",
    "last_frames",
    "upsample2x",
    "upsampled",
]
