"""Small torch.nn layers over `fastdit.ops`, shared by the models and by `fastdit.accelerate`."""

from fastdit.nn.conv import (
    CausalConv3d,
    FrameConv2d,
    channels_last,
    frame_attention,
    last_frames,
    upsample2x,
    upsampled,
)

__all__ = ["CausalConv3d", "FrameConv2d", "channels_last", "frame_attention", "last_frames", "upsample2x", "upsampled"]
