"""MP4 in and out with PyAV, and the clip as a tensor for a video VAE."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image


def write_mp4(path: Path, frames: np.ndarray, fps: int) -> str:
    """Encode uint8 (T, H, W, 3) frames; returns the codec's name (H.264 where PyAV has an encoder for it)."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    with av.open(str(path), mode="w") as container:
        stream: Any = container.add_stream(codec, rate=fps)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        if codec == "libx264":
            stream.options = {"crf": "18"}
        else:
            stream.bit_rate = 4_000_000
        stream.codec_context.time_base = Fraction(1, fps)
        for array in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return codec


def read_mp4(path: Path) -> np.ndarray:
    """Every frame of the first video stream: uint8 (T, H, W, 3)."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 clips; infinite when they are equal."""
    error = np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def to_tensor(frames: np.ndarray, count: int, size: tuple[int, int]) -> torch.Tensor:
    """`count` frames spread over the clip, resized to (height, width): fp32 (1, 3, count, H, W) in [-1, 1]."""
    chosen = np.linspace(0, len(frames) - 1, count).round().astype(int)
    height, width = size
    pictures = [Image.fromarray(frames[t]).resize((width, height), Image.Resampling.LANCZOS) for t in chosen]
    stacked = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
    return stacked.permute(3, 0, 1, 2).unsqueeze(0).float().div(127.5).sub(1)


def to_frames(video: torch.Tensor) -> np.ndarray:
    """(1, 3, T, H, W) in [-1, 1] -> uint8 (T, H, W, 3)."""
    values = video[0].float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return values.permute(1, 2, 3, 0).contiguous().cpu().numpy()
