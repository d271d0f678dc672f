"""diffusers' JoyImageEditTransformer3DModel and its Plus: block of two streams, joint attention, patch embedding.

    x = x + gate_1 * attention(n(x) * (1 + scale_1) + shift_1);    likewise the MLP; of image and of text

The six tables of each stream are a learned one plus the timestep's, which all blocks share.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.integrations.diffusers_processor import Processor, refuse_choice, shared
from fastdit.integrations.diffusers_wan import is_patch_conv, patch_conv_forward
from fastdit.integrations.joint import (
    Stream,
    Tables,
    adaln_passes,
    close_stream,
    joint_attention,
    open_stream,
    refuse_plain_norms,
    refuse_qk_norms,
    rotation_passes,
)
from fastdit.integrations.masks import is_key_mask
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The block ---------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Any, Any] | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    masks = {} if attention_mask is None else dict(attention_mask=attention_mask)
    image, text = Tables(*self.img_mod(temb)), Tables(*self.txt_mod(temb))
    if not hidden_states.dtype == encoder_hidden_states.dtype == image.gate1.dtype == text.gate1.dtype:
        return original(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb, **masks)
    precision = law(self, hidden_states)
    attn_output, context_attn_output = self.attn(
        hidden_states=open_stream(hidden_states, image, self.img_norm1, precision),
        encoder_hidden_states=open_stream(encoder_hidden_states, text, self.txt_norm1, precision),
        image_rotary_emb=image_rotary_emb,
        **masks,
    )
    precision = law(self, hidden_states, attn_output)
    x = close_stream(hidden_states, attn_output, image, self.img_norm2, self.img_mlp, precision)
    context = close_stream(encoder_hidden_states, context_attn_output, text, self.txt_norm2, self.txt_mlp, precision)
    return x, context


block_forward.__name__ = "forward"

NORMS = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2")
BLOCK = ("img_mod", "img_mlp", "txt_mod", "txt_mlp", "attn", *NORMS)
PARAMETERS = ["hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb"]


def block_norms(block: Any) -> list[Any]:
    return [getattr(block, name) for name in NORMS]


def refuse_block(block: Any) -> str | None:
    for mod in (block.img_mod, block.txt_mod):
        if not has(mod, "modulate_table") or getattr(mod, "factor", None) != 6:
            return f"its modulation is a {type(mod).__name__}, not six tables of its own"
    return refuse_plain_norms(*block_norms(block)) or unknown(block, *BLOCK)


register(
    Kind(
        name="JoyImage block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *BLOCK) and parameters(m) in (PARAMETERS, [*PARAMETERS, "attention_mask"]),
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=block_norms,
        saving=lambda m: adaln_passes(itemsize(m)) * m.img_norm1.normalized_shape[0] * itemsize(m),
        block=True,
    )
)


# Attention ---------------------------------------------------------------------------------------------------------


class FastditJoyImageAttnProcessor(Processor):
    """JoyImageAttnProcessor with `qk_norm_rope` and `attention`: image first, then text, which may rotate too."""

    name = "JoyImageAttnProcessor"

    def __init__(self):
        from diffusers.models.transformers.transformer_joyimage import JoyImageAttnProcessor

        super().__init__(JoyImageAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[Any, Any] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        if encoder_hidden_states is None:
            return self.original(attn, hidden_states, encoder_hidden_states, image_rotary_emb, **kwargs)
        return attend(attn, hidden_states, encoder_hidden_states, *(image_rotary_emb or (None, None)))


class FastditJoyImageEditPlusAttnProcessor(Processor):
    """JoyImageEditPlusAttnProcessor: the rotation of each sample is its own, and its mask (B, 1, 1, N), of image and
    text, has padding behind each; its valid keys are moved first."""

    name = "JoyImageEditPlusAttnProcessor"

    def __init__(self):
        from diffusers.models.transformers.transformer_joyimage_edit_plus import JoyImageEditPlusAttnProcessor

        super().__init__(JoyImageEditPlusAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        covered = attention_mask is None or is_key_mask(attention_mask)
        if encoder_hidden_states is None or not covered:
            return self.original(attn, hidden_states, encoder_hidden_states, image_rotary_emb, attention_mask)
        mask = None if attention_mask is None else attention_mask.flatten(1)
        return attend(attn, hidden_states, encoder_hidden_states, image_rotary_emb, mask=mask)


def attend(
    attn: Any,
    x: Tensor,
    context: Tensor,
    image_rope: tuple[Tensor, Tensor] | None,
    text_rope: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """mask (B, N): of all keys."""
    q, k, v = attn.img_attn_qkv(x).unflatten(-1, (3, -1, attn.head_dim)).unbind(2)
    image = Stream(q, k, v, attn.img_attn_q_norm, attn.img_attn_k_norm, *pairs(image_rope, x))
    q, k, v = attn.txt_attn_qkv(context).unflatten(-1, (3, -1, attn.head_dim)).unbind(2)
    text = Stream(q, k, v, attn.txt_attn_q_norm, attn.txt_attn_k_norm, *pairs(text_rope, x))
    x, context = joint_attention(image, text, joint_mask=mask)
    return attn.img_attn_proj(x), attn.txt_attn_proj(context)


def pairs(tables: tuple[Tensor, Tensor] | None, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """One value per pair of channels, of tables (N, D) or (B, N, D) that hold each twice; beside x.

    The model makes those of the image anew in each call, on the CPU.
    """
    if tables is None:
        return None, None
    cos, sin = (table[..., 0::2].to(x.device) for table in tables)
    return (cos, sin) if cos.ndim == 2 else (cos.unsqueeze(2), sin.unsqueeze(2))


HEAD_NORMS = ("img_attn_q_norm", "img_attn_k_norm", "txt_attn_q_norm", "txt_attn_k_norm")


def head_norms_of(attn: Any) -> list[Any]:
    return [getattr(attn, name) for name in HEAD_NORMS]


def register_attention(processor: Any) -> None:
    register(
        Kind(
            name=f"attention ({processor.name})",
            ops=("qk_norm_rope", "attention"),
            match=lambda m: (
                has(m, "img_attn_qkv", "img_attn_proj", "txt_attn_qkv", "txt_attn_proj", "heads", "head_dim")
                and has(m, *HEAD_NORMS)
                and type(getattr(m, "processor", None)).__name__ == processor.name
            ),
            refuse=lambda attn: refuse_choice(attn.processor) or refuse_qk_norms(*head_norms_of(attn)),
            patches=lambda attn: [(attn, "processor", shared(processor))],
            absorbs=head_norms_of,
            saving=lambda attn: rotation_passes(itemsize(attn)) * attn.heads * attn.head_dim * itemsize(attn),
            part=True,
        )
    )


register_attention(FastditJoyImageAttnProcessor)
register_attention(FastditJoyImageEditPlusAttnProcessor)


# Patch embedding ---------------------------------------------------------------------------------------------------


def patches_forward(self, input: Tensor) -> Tensor:
    """A video, or as the Plus calls it (B * N, C, pt, ph, pw): each sample one patch, which a linear layer embeds."""
    if input.ndim == 5 and tuple(input.shape[2:]) == self.kernel_size:
        return F.linear(input.flatten(1), self.weight.flatten(1), self.bias)[..., None, None, None]
    return patch_conv_forward(self, input)


patches_forward.__name__ = "forward"

register(
    Kind(
        name="patch embedding (Conv3d, kernel = stride)",
        ops=("patch_embed3d",),
        match=lambda m: has(m, "double_blocks") and isinstance(getattr(m, "img_in", None), nn.Conv3d),
        refuse=lambda m: None if is_patch_conv(m.img_in) else "its convolution is not a plain nn.Conv3d",
        patches=lambda m: [(m.img_in, "forward", patches_forward)],
    )
)
