"""The forward of Wan 2.2's own WanModel: one row of modulation per timestep, videos laid out in one move each.

The original gives every token its own timestep and modulation, fp32 (B, L, 6, C): 9.3 GB for 14B at 720p. Its text-
and image-to-video pipelines have one timestep per video, or two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdit import ops
from fastdit.integrations.registry import Kind, record_of, register
from fastdit.integrations.structure import has, parameters, unknown
from fastdit.integrations.wan_block import Rows, distinct, per_block


def model_forward(
    self, x: list[Tensor], t: Tensor, context: list[Tensor], seq_len: int, y: list[Tensor] | None = None
) -> list[Tensor]:
    if self.freqs.device != self.patch_embedding.weight.device:
        self.freqs = self.freqs.to(self.patch_embedding.weight.device)
    if y is not None:
        x = [torch.cat(pair) for pair in zip(x, y, strict=True)]
    elif self.model_type == "i2v":
        raise ValueError("WanModel: image to video needs the conditioning video; got y=None; pass it.")

    videos = [self.patch_embedding(video[None]) for video in x]
    grids = [tuple(video.shape[2:]) for video in videos]
    lens = torch.tensor([math.prod(grid) for grid in grids])
    if max(lens.tolist()) > seq_len:
        raise ValueError(f"WanModel: seq_len is too short; got {seq_len}, expected at least {max(lens.tolist())}.")
    tokens = [
        F.pad(video.flatten(2).transpose(1, 2), (0, 0, 0, seq_len - n))
        for video, n in zip(videos, lens.tolist(), strict=True)
    ]
    h = torch.cat(tokens)
    temb, rows = modulation(self, t)
    text = torch.stack([F.pad(u, (0, 0, 0, self.text_len - len(u))) for u in context])
    given = dict(
        seq_lens=lens, grid_sizes=torch.tensor(grids), freqs=self.freqs, context=self.text_embedding(text),
        context_lens=None,
    )  # fmt: skip
    for block, e in per_block(self.blocks, rows, lambda few: few.dense(seq_len)):
        h = block(h, e=e, **given)
    if record_of(self.head) is None and isinstance(temb, Rows):
        temb = temb.dense(seq_len).squeeze(-2)
    h = self.head(h, temb)
    return [
        ops.unpatchify3d(
            h[i : i + 1, :n], grid=grid, patch=self.patch_size, channels=self.out_dim, order="thwc"
        )[0].float()
        for i, (grid, n) in enumerate(zip(grids, lens.tolist(), strict=True))
    ]  # fmt: skip


model_forward.__name__ = "forward"


def modulation(model: Any, t: Tensor) -> tuple[Tensor | Rows, Tensor | Rows]:
    """Of timesteps (B,) or (B, L): temb of the head (..., C) and of the blocks (..., 6, C), as few rows."""
    few = None if t.ndim == 1 else distinct(t)
    values = t.flatten() if few is None else few[0]
    half = model.freq_dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=t.device) / half
    angles = values.double()[:, None] * 10000**-steps
    with torch.autocast("cuda", dtype=torch.float32, enabled=t.is_cuda):
        e = model.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=1).float())
        e0 = model.time_projection(e).unflatten(1, (6, -1))
    if few is not None:
        return Rows(e.unsqueeze(-2), few[1]), Rows(e0, few[1])
    if t.ndim == 1:  # one row for all tokens of a sample
        return Rows(e[:, None, None]), Rows(e0[:, None])
    return e.unflatten(0, t.shape), e0.unflatten(0, t.shape)


CHILDREN = ("patch_embedding", "text_embedding", "time_embedding", "time_projection", "blocks", "head")
SETTINGS = ("model_type", "freqs", "freq_dim", "dim", "text_len")

register(
    Kind(
        name="WanModel (Wan-Video): few rows, unpatchify",
        ops=("unpatchify3d",),
        match=lambda m: has(m, *CHILDREN, *SETTINGS) and parameters(m) == ["x", "t", "context", "seq_len", "y"],
        refuse=lambda m: unknown(m, *CHILDREN, *SETTINGS),
        patches=lambda m: [(m, "forward", model_forward)],
    )
)
