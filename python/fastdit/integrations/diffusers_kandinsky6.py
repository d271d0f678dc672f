"""diffusers' Kandinsky6Transformer3DModel: text blocks, and blocks of a video and an audio stream that meet."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from fastdit.integrations.diffusers_kandinsky import (
    TEXT,
    VISUAL,
    closed,
    opened,
    register_block,
    seam,
    tables,
)
from fastdit.integrations.joint import refuse_plain_norms
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, unknown


def text6_forward(self, x: Tensor, time_embed: Tensor, rope: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    own, ff = tables(self.text_modulation, time_embed, 2)
    y = self.attn(opened(self, self.attn_norm, x, own), attn_mask=attn_mask, rotary_emb=rope)
    x, h = seam(self, self.feed_forward_norm, x, y, own[2], ff)
    return closed(self, x, self.feed_forward(h), ff[2])


class Stream(NamedTuple):
    """One modality on its way through the block: x + gate * y is still to be computed."""

    x: Tensor
    y: Tensor
    gate: Tensor
    keys: Tensor  # what entered the text's attention, for the other modality to read
    ff: tuple[Tensor, ...]


def read_text(
    block: Any, layers: Any, x: Tensor, temb: Tensor, rope: Tensor | None, text: Tensor, mask: Tensor | None
) -> Stream:
    """Self-attention, then the text's."""
    own, cross, ff = tables(layers.visual_modulation, temb, 3)
    y = layers.self_attention(opened(block, layers.self_attention_norm, x, own), rotary_emb=rope)
    x, h = seam(block, layers.cross_attention_norm, x, y, own[2], cross)
    y = layers.cross_attention(h, encoder_hidden_states=text, attn_mask=mask)
    return Stream(x, y, cross[2], h, ff)


def last(block: Any, layers: Any, stream: Stream | None) -> Tensor | None:
    """The feed-forward."""
    if stream is None:
        return None
    x, h = seam(block, layers.feed_forward_norm, stream.x, stream.y, stream.gate, stream.ff)
    return closed(block, x, layers.feed_forward(h), stream.ff[2])


def fused_forward(
    self,
    vis: Tensor | None,
    aud: Tensor | None,
    text_v: Tensor,
    text_a: Tensor,
    time_embed: tuple[Tensor, Tensor],
    vis_rope: Tensor | None,
    aud_rope: Tensor | None,
    attn_mask: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    video = audio = None
    if vis is not None:
        video = read_text(self, self.video_dec_block, vis, time_embed[0], vis_rope, text_v, attn_mask)
    if aud is not None:
        audio = read_text(self, self.audio_dec_block, aud, time_embed[1], aud_rope, text_a, attn_mask)
    if video is not None and audio is not None:
        video, audio = meet(self, video, audio, time_embed, (vis_rope, aud_rope) if self.ca_rope else (None, None))
    return last(self, self.video_dec_block, video), last(self, self.audio_dec_block, audio)


def meet(
    block: Any, video: Stream, audio: Stream, time_embed: tuple[Tensor, Tensor], rope: tuple[Tensor | None, ...]
) -> tuple[Stream, Stream]:
    """Each modality attends to what the other read the text with."""
    t_video, t_audio = time_embed if block.fix_modulation else time_embed[::-1]
    own, other = block.model_dim, block.model_dim_a
    gates = (other, own) if block.cross_gates else (own, other)
    va = block.va_modulation(t_video).split((own, own, gates[0]), dim=-1)
    av = block.av_modulation(t_audio).split((other, other, gates[1]), dim=-1)
    video_gate, audio_gate = (av[2], va[2]) if block.cross_gates else (va[2], av[2])
    x, h = seam(block, block.va_normalization, video.x, video.y, video.gate, va)
    a, g = seam(block, block.av_normalization, audio.x, audio.y, audio.gate, av)
    y = block.va_cross_attention(h, encoder_hidden_states=audio.keys, rope_q=rope[0], rope_kv=rope[1])
    z = block.av_cross_attention(g, encoder_hidden_states=video.keys, rope_q=rope[1], rope_kv=rope[0])
    return video._replace(x=x, y=y, gate=video_gate), audio._replace(x=a, y=z, gate=audio_gate)


text6_forward.__name__ = fused_forward.__name__ = "forward"

register_block(
    "Kandinsky 6 text block", ("text_modulation", "attn_norm", "attn", *TEXT[3:]),
    ["x", "time_embed", "rope", "attn_mask"], text6_forward, 2 * 37 - 9,
)  # fmt: skip

CONTAINERS = ("video_dec_block", "audio_dec_block")
FUSED = (
    *("va_cross_attention", "av_cross_attention", "va_modulation", "av_modulation"),
    *("va_normalization", "av_normalization"),
)
SETTINGS = ("ca_rope", "cross_gates", "fix_modulation", "model_dim", "model_dim_a")


def fused_norms(block: Any) -> list[Any]:
    inner = [getattr(part, n) for part in (block.video_dec_block, block.audio_dec_block) for n in VISUAL if "norm" in n]
    return [block.va_normalization, block.av_normalization, *inner]


def refuse_fused(block: Any) -> str | None:
    return (
        refuse_plain_norms(*fused_norms(block))
        or unknown(block, *CONTAINERS, *FUSED, *SETTINGS)
        or unknown(block.video_dec_block, *VISUAL)
        or unknown(block.audio_dec_block, *VISUAL)
    )


register(
    Kind(
        name="Kandinsky 6 block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *CONTAINERS, *FUSED, *SETTINGS) and all(has(getattr(m, c), *VISUAL) for c in CONTAINERS),
        refuse=refuse_fused,
        patches=lambda block: [(block, "forward", fused_forward)],
        absorbs=fused_norms,
        # as above: four sublayers of the video
        saving=lambda block: (4 * 37 - 17) * block.model_dim * itemsize(block.video_dec_block.feed_forward),
        precision="fp32",
        block=True,
    )
)
