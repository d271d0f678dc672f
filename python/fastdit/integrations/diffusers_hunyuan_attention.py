"""The attention of diffusers' HunyuanVideo, HunyuanVideo-1.5 and HunyuanImage: video first, then text, padding last.

The masks say one thing: which text tokens are there. They become key lengths; what padded text tokens see as queries
reaches no other token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdit.integrations.diffusers_flux_attention import pairs
from fastdit.integrations.diffusers_processor import Processor, refuse_choice, shared
from fastdit.integrations.joint import (
    Stream,
    joint_attention,
    projections,
    refuse_qk_norms,
    rotation_passes,
    text_projections,
)
from fastdit.integrations.masks import is_key_mask
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize


class FastditHunyuanVideoAttnProcessor(Processor):
    """HunyuanVideoAttnProcessor2_0 with `qk_norm_rope` and `attention`; Framepack's too.

    In a single block the text may come inside hidden_states: the rotary tables end where it begins.
    """

    name = "HunyuanVideoAttnProcessor2_0"

    def __init__(self):
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

        super().__init__(HunyuanVideoAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        joint = attn.add_q_proj is not None
        if not self.covers(attention_mask) or joint != (encoder_hidden_states is not None):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        cos, sin = (None, None) if image_rotary_emb is None else pairs(*image_rotary_emb)
        video = Stream(*projections(attn, hidden_states), attn.norm_q, attn.norm_k, cos, sin)
        if encoder_hidden_states is None:
            return joint_attention(video, **self.keys(attention_mask, 0, hidden_states.shape[1]))[0], None
        text = Stream(*text_projections(attn, encoder_hidden_states), attn.norm_added_q, attn.norm_added_k)
        sizes = (hidden_states.shape[1], encoder_hidden_states.shape[1])
        x, context = joint_attention(video, text, **self.keys(attention_mask, *sizes))
        return attn.to_out[1](attn.to_out[0](x)), attn.to_add_out(context)

    def covers(self, mask: Tensor | None) -> bool:
        """Is it a padding mask of all keys, (B, 1, 1, N)?"""
        return mask is None or is_key_mask(mask)

    def keys(self, mask: Tensor | None, first: int, last: int) -> dict[str, Tensor]:
        """The valid keys of each sample, which come first: the model makes its mask by counting text tokens.

        first, last: tokens of the two streams; (0, all) where they come in one.
        """
        return {} if mask is None else dict(kv_len=mask.sum((1, 2, 3), dtype=torch.int32))


class FastditHunyuanVideo15AttnProcessor(FastditHunyuanVideoAttnProcessor):
    """HunyuanVideo15AttnProcessor2_0, whose mask (B, T) is of the text alone; the model sorts valid tokens first."""

    name = "HunyuanVideo15AttnProcessor2_0"

    def __init__(self):
        from diffusers.models.transformers.transformer_hunyuan_video15 import HunyuanVideo15AttnProcessor2_0

        Processor.__init__(self, HunyuanVideo15AttnProcessor2_0())

    def covers(self, mask: Tensor | None) -> bool:
        return mask is not None and mask.ndim == 2

    def keys(self, mask: Tensor | None, first: int, last: int) -> dict[str, Tensor]:
        assert mask is not None
        return dict(kv_len=first + last - mask.logical_not().sum(1, dtype=torch.int32))


class FastditHunyuanImageAttnProcessor(FastditHunyuanVideoAttnProcessor):
    """HunyuanImageAttnProcessor, whose text mask has the pattern of the tokenizer's: its valid keys are moved first."""

    name = "HunyuanImageAttnProcessor"

    def __init__(self):
        from diffusers.models.transformers.transformer_hunyuanimage import HunyuanImageAttnProcessor

        Processor.__init__(self, HunyuanImageAttnProcessor())

    def keys(self, mask: Tensor | None, first: int, last: int) -> dict[str, Tensor]:
        return {} if mask is None else dict(key_mask=mask.flatten(1)[:, first:])


PROCESSORS = {
    cls.name: cls
    for cls in (FastditHunyuanVideoAttnProcessor, FastditHunyuanVideo15AttnProcessor, FastditHunyuanImageAttnProcessor)
}


def norms_of(attn: Any) -> list[Any]:
    return [norm for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k) if norm is not None]


def refuse_attention(attn: Any) -> str | None:
    if (attn.add_q_proj is None) != (attn.to_out is None) or (attn.add_q_proj is None) != (attn.to_add_out is None):
        return "it has an output projection without text, or text without one"
    return refuse_choice(attn.processor) or refuse_qk_norms(*norms_of(attn))


def register_attention(name: str, processor: type) -> None:
    register(
        Kind(
            name=f"attention ({name})",
            ops=("qk_norm_rope", "attention"),
            match=lambda m: (
                has(
                    m, "to_q", "to_k", "to_v", "to_out", "heads", "inner_dim", "processor", "add_q_proj", "norm_added_q"
                )
                and type(m.processor).__name__ == name
            ),
            refuse=refuse_attention,
            patches=lambda attn: [(attn, "processor", shared(processor))],
            absorbs=norms_of,
            saving=lambda attn: rotation_passes(itemsize(attn)) * attn.inner_dim * itemsize(attn),
            part=True,
        )
    )


for _name, _processor in PROCESSORS.items():
    register_attention(_name, _processor)
