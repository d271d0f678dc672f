"""diffusers' HiDreamImageTransformer2DModel: joint and single block, attention, output layer.

The experts of a feed-forward are SwiGLUs that `swiglu` knows; the gate that picks them by token stays.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastdit.integrations.diffusers_flux_attention import is_processor
from fastdit.integrations.diffusers_processor import Processor, by_head, refuse_choice, refuse_weighted_rms, shared
from fastdit.integrations.diffusers_wan import normed
from fastdit.integrations.dit_native import final_forward, register_final
from fastdit.integrations.joint import Stream, Tables, close_stream, joint_attention, open_stream, refuse_plain_norms
from fastdit.integrations.registry import Kind, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The blocks --------------------------------------------------------------------------------------------------------


def joint_forward(
    self,
    hidden_states: Tensor,
    hidden_states_masks: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    assert encoder_hidden_states is not None  # the original needs it too
    x, c = hidden_states, encoder_hidden_states
    tables = self.adaLN_modulation(temb).chunk(12, dim=1)
    image, text = Tables(*tables[:6]), Tables(*tables[6:])
    precision, text_precision = law(self, x, image.shift1), law(self, c, text.shift1)
    y, y_text = self.attn1(
        open_stream(x, image, self.norm1_i, precision),
        hidden_states_masks,
        open_stream(c, text, self.norm1_t, text_precision),
        image_rotary_emb=image_rotary_emb,
    )
    x = close_stream(x, y, image, self.norm3_i, self.ff_i, precision)
    return x, close_stream(c, y_text, text, self.norm3_t, self.ff_t, text_precision)


def single_forward(
    self,
    hidden_states: Tensor,
    hidden_states_masks: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    temb: Tensor | None = None,
    image_rotary_emb: Tensor | None = None,
) -> Tensor:
    x, tables = hidden_states, Tables(*self.adaLN_modulation(temb).chunk(6, dim=1))
    precision = law(self, x, tables.shift1)
    h = open_stream(x, tables, self.norm1_i, precision)
    y = self.attn1(h, hidden_states_masks, image_rotary_emb=image_rotary_emb)
    return close_stream(x, y, tables, self.norm3_i, self.ff_i, precision)


joint_forward.__name__ = single_forward.__name__ = "forward"

SINGLE = ("adaLN_modulation", "norm1_i", "attn1", "norm3_i", "ff_i")
JOINT = (*SINGLE, "norm1_t", "norm3_t", "ff_t")
CALL = ["hidden_states", "hidden_states_masks", "encoder_hidden_states", "temb", "image_rotary_emb"]


def norms_of(block: Any) -> list[Any]:
    return [getattr(block, name) for name in JOINT if name.startswith("norm") and hasattr(block, name)]


def block_kind(name: str, joint: bool) -> Kind:
    known = JOINT if joint else SINGLE
    return Kind(
        name=name,
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *known) and hasattr(m, "norm1_t") == joint and parameters(m) == CALL,
        refuse=lambda block: refuse_plain_norms(*norms_of(block)) or unknown(block, *known),
        patches=lambda block: [(block, "forward", joint_forward if joint else single_forward)],
        absorbs=norms_of,
        # passes over (tokens, C): 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3
        saving=lambda block: 13 * block.norm1_i.normalized_shape[0] * itemsize(block),
        block=True,
    )


register(block_kind("HiDream joint block", joint=True))
register(block_kind("HiDream single block", joint=False))


# Attention ---------------------------------------------------------------------------------------------------------


class FastditHiDreamAttnProcessor(Processor):
    """HiDreamAttnProcessor with `qk_norm_rope` and `attention`: norms over all heads, image first.

    The mask of a padded image sets its keys to 0, which is done behind their rotation: they are seen nevertheless.
    """

    def __init__(self):
        from diffusers.models.transformers.transformer_hidream_image import HiDreamAttnProcessor

        super().__init__(HiDreamAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        hidden_states_masks: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        image_rotary_emb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        assert image_rotary_emb is not None  # the original needs it too
        cos, sin = image_rotary_emb[..., 0, 0], image_rotary_emb[..., 1, 0]  # (B, N, 1, R/2) of (B, N, 1, R/2, 2, 2)
        n = hidden_states.shape[1]
        q, k, v = projected(attn, hidden_states, "")
        q, k = normed(q, k, attn.q_rms_norm, attn.k_rms_norm, cos=cos[:, :n], sin=sin[:, :n])
        if hidden_states_masks is not None:
            k = k * hidden_states_masks.to(k.dtype)[:, :, None, None]
        image = Stream(q, k, v)
        if attn.single:
            return attn.to_out(*joint_attention(image))
        q, k, v = projected(attn, encoder_hidden_states, "_t")
        q, k = normed(q, k, attn.q_rms_norm_t, attn.k_rms_norm_t, cos=cos[:, n:], sin=sin[:, n:])
        x, c = joint_attention(image, Stream(q, k, v))
        return attn.to_out(x), attn.to_out_t(c)


def projected(attn: Any, x: Tensor | None, suffix: str) -> tuple[Tensor, ...]:
    """(B, N, H, D) three times, by the layers of the image, or with "_t" of the text."""
    return by_head(attn, *(getattr(attn, name + suffix)(x) for name in ("to_q", "to_k", "to_v")))


READS = frozenset(
    "dtype shape q_rms_norm to_q to k_rms_norm to_k to_v heads view single q_rms_norm_t to_q_t k_rms_norm_t to_k_t "
    "to_v_t torch cat apply_rope chunk F scaled_dot_product_attention transpose reshape split to_out to_out_t".split()
)


def qk_norms(attn: Any) -> list[Any]:
    image = [attn.q_rms_norm, attn.k_rms_norm]
    return image if attn.single else [*image, attn.q_rms_norm_t, attn.k_rms_norm_t]


def refuse_attention(attn: Any) -> str | None:
    norms = qk_norms(attn)
    reason = refuse_choice(attn.processor) or refuse_weighted_rms(*norms[:2])
    return reason or (refuse_weighted_rms(*norms[2:]) if norms[2:] else None)


register(
    Kind(
        name="attention (HiDreamAttnProcessor)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "q_rms_norm", "k_rms_norm", "heads", "single", "processor")
            and is_processor(m.processor, READS, frozenset())
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditHiDreamAttnProcessor))],
        absorbs=qk_norms,
        # q and k in 2 bytes: norm 2, cast 3, two products 6, sum 6, rounding 3; in 4 bytes norm 2, products 3, sum 3;
        # against 2
        saving=lambda attn: 2 * (18 if itemsize(attn) == 2 else 6) * attn.inner_dim * itemsize(attn),
        part=True,
    )
)


# The output layer --------------------------------------------------------------------------------------------------


def output_forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
    return final_forward(self, hidden_states, temb)


output_forward.__name__ = "forward"
register_final("HiDream output layer (norm, modulation)", ["hidden_states", "temb"], output_forward)
