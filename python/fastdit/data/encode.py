"""Frames to the bytes of a file: MP4 by PyAV, GIF and PNG by pillow. `media.write` is the way in.

Each encoder takes where the bytes go, uint8 (H, W, 3) pictures of one size, and frames per second.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from fractions import Fraction
from typing import IO

import numpy as np


def mp4(out: IO[bytes], pictures: Iterator[np.ndarray], fps: float) -> None:
    """H.264 where PyAV has an encoder for it, else MPEG-4; pictures are encoded as they come."""
    import av

    x264 = "libx264" in av.codecs_available
    with av.open(out, mode="w", format="mp4") as container:
        rate = Fraction(fps).limit_denominator(1001)
        stream = container.add_stream("libx264" if x264 else "mpeg4", rate=rate)
        stream.pix_fmt = "yuv420p"
        if x264:
            stream.options = {"crf": "12"}
        else:
            stream.codec_context.bit_rate = 8_000_000
        for i, picture in enumerate(pictures):
            height, width = picture.shape[:2]
            even = np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if i == 0:
                stream.height, stream.width = even.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(even, format="rgb24")))
        container.mux(stream.encode())


def gif(out: IO[bytes], pictures: Iterator[np.ndarray], fps: float) -> None:
    """A loop. Equal frames are joined, so the times count, not the frames."""
    from PIL import Image

    images = [Image.fromarray(picture) for picture in pictures]
    edges = [10 * round(100 * k / fps) for k in range(len(images) + 1)]  # ms; rounded so that errors do not add up
    times = {"duration": [b - a for a, b in itertools.pairwise(edges)]} if len(images) > 1 else {}
    images[0].save(out, format="GIF", save_all=True, append_images=images[1:], loop=0, **times)


def png(out: IO[bytes], pictures: Iterator[np.ndarray], fps: float) -> None:
    """One picture."""
    from PIL import Image

    first = next(pictures)
    if next(pictures, None) is not None:
        raise ValueError("write: a PNG holds one frame; got more; pass frames[:1], or write .mp4 or .gif.")
    Image.fromarray(first).save(out, format="PNG")
