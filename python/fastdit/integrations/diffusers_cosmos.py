"""diffusers' CosmosTransformer3DModel (Predict1, 2, 2.5) and its ControlNet: block, attentions, output norm, timesteps.

With a timestep per frame the model repeats modulation rows over the tokens of a frame, and then each block runs its
two modulation layers on every token. Here they stay one row per frame.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor, shared
from fastdit.integrations.joint import Stream, joint_attention, refuse_plain_norms, refuse_qk_norms
from fastdit.integrations.registry import Kind, original, record_of, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# Modulation -------------------------------------------------------------------------------------------------------


def rows(norm: Any, embedded_timestep: Tensor, temb: Tensor | None, batch: int) -> Tensor:
    """(B, R), (B, T, R) from one row per frame, or (B, N, R); R = 3C, or 2C for the output norm."""
    table = norm.linear_2(norm.linear_1(norm.activation(embedded_timestep)))
    if temb is not None:
        table = table + temb[..., : table.shape[-1]]
    return table.unflatten(0, (batch, -1)) if table.ndim == 2 and table.shape[0] > batch else table


def refuse_modulation(norm: Any) -> str | None:
    return refuse_plain_norms(norm.norm) or unknown(norm, "norm", "activation", "linear_1", "linear_2", "embedding_dim")


# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | tuple[Tensor | None, Tensor | None] | None,
    embedded_timestep: Tensor,
    temb: Tensor | None = None,
    image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    extra_pos_emb: Tensor | None = None,
    attention_mask: Tensor | None = None,
    controlnet_residual: Tensor | None = None,
    latents: Tensor | None = None,
    block_idx: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    x = hidden_states
    if self.before_proj is not None:
        x = self.before_proj(x) + latents
    norms = (self.norm1, self.norm2, self.norm3)
    (shift1, scale1, gate1), (shift2, scale2, gate2), (shift3, scale3, gate3) = (
        rows(norm, embedded_timestep, temb, x.shape[0]).chunk(3, dim=-1) for norm in norms
    )
    if extra_pos_emb is not None:
        x = x.to(torch.promote_types(x.dtype, extra_pos_emb.dtype))  # autocast: they are fp32, and widen the stream
    eps, precision = self.norm1.norm.eps, law(self, x, gate1)

    if extra_pos_emb is None:
        h = ops.norm_modulate(x, shift=shift1, scale=scale1, eps=eps, precision=precision)
    else:
        places = extra_pos_emb.expand_as(x)
        x, h = ops.gate_residual_norm_modulate(x, places, shift=shift1, scale=scale1, eps=eps, precision=precision)
    x, h = ops.gate_residual_norm_modulate(
        x,
        self.attn1(h, image_rotary_emb=image_rotary_emb),
        gate1,
        shift=shift2,
        scale=scale2,
        eps=self.norm2.norm.eps,
        precision=precision,
    )
    x, h = ops.gate_residual_norm_modulate(
        x,
        self.attn2(h, encoder_hidden_states=encoder_hidden_states, attention_mask=attention_mask),
        gate2,
        shift=shift3,
        scale=scale3,
        eps=self.norm3.norm.eps,
        precision=precision,
    )
    x = ops.gate_residual(x, self.ff(h), gate3, precision=precision)
    if controlnet_residual is not None:
        x = x + controlnet_residual
    return x if self.after_proj is None else (x, self.after_proj(x))


block_forward.__name__ = "forward"

BLOCK = ("norm1", "attn1", "norm2", "attn2", "norm3", "ff", "before_proj", "after_proj")
CALL = ["hidden_states", "encoder_hidden_states", "embedded_timestep", "temb", "image_rotary_emb", "extra_pos_emb"]
CALL += ["attention_mask", "controlnet_residual", "latents", "block_idx"]


def refuse_block(block: Any) -> str | None:
    norms = (block.norm1, block.norm2, block.norm3)
    return next(filter(None, map(refuse_modulation, norms)), None) or unknown(block, *BLOCK, "img_context")


register(
    Kind(
        name="Cosmos block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *BLOCK) and has(m.norm1, "activation", "linear_1", "linear_2") and parameters(m) == CALL,
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [m for norm in (block.norm1, block.norm2, block.norm3) for m in (norm, norm.norm)],
        # passes over (tokens, C): 3 norms, scales, shifts and gates 2 each, 3 sums 3: 33, fused 2 + 4 + 4 + 3
        saving=lambda block: 20 * block.norm1.norm.normalized_shape[0] * itemsize(block),
        block=True,
    )
)


# The output norm, and a row of modulation per frame ---------------------------------------------------------------


def norm_out_forward(self, hidden_states: Tensor, embedded_timestep: Tensor, temb: Tensor | None = None) -> Tensor:
    shift, scale = rows(self, embedded_timestep, temb, hidden_states.shape[0]).chunk(2, dim=-1)
    precision = law(self, hidden_states, scale)
    return ops.norm_modulate(hidden_states, shift=shift, scale=scale, eps=self.norm.eps, precision=precision)


def model_forward(self, hidden_states: Tensor, timestep: Tensor, *args, **kwargs):
    frames = (hidden_states.shape[0], 1, hidden_states.shape[2], 1, 1)
    if timestep.shape == frames and self.config.patch_size[0] == 1:
        if all(record_of(module) is not None for module in (*self.transformer_blocks, self.norm_out)):
            timestep = timestep.flatten()  # the model repeats no rows of 1-D timesteps
    return original(self, hidden_states, timestep, *args, **kwargs)


norm_out_forward.__name__ = model_forward.__name__ = "forward"

MODEL = (
    *("patch_embed", "rope", "learnable_pos_embed", "time_embed", "transformer_blocks", "norm_out", "proj_out"),
    *("crossattn_proj", "img_context_proj", "gradient_checkpointing"),
)

register(
    Kind(
        name="output norm (CosmosAdaLayerNorm)",
        ops=("norm_modulate",),
        match=lambda m: (
            has(m, "norm", "activation", "linear_1", "linear_2", "embedding_dim")
            and parameters(m) == ["hidden_states", "embedded_timestep", "temb"]
        ),
        refuse=refuse_modulation,
        patches=lambda norm: [(norm, "forward", norm_out_forward)],
        absorbs=lambda norm: [norm.norm],
        saving=lambda norm: 4 * norm.embedding_dim * itemsize(norm),  # norm 2, scale 2, shift 2, against 2
    )
)

register(
    Kind(
        name="a timestep per frame (Cosmos)",
        ops=("norm_modulate",),
        match=lambda m: (
            has(m, "patch_embed", "time_embed", "transformer_blocks", "norm_out", "learnable_pos_embed")
            and parameters(m)[:2] == ["hidden_states", "timestep"]
            and "block_controlnet_hidden_states" in parameters(m)
        ),
        refuse=lambda model: unknown(model, *MODEL),
        patches=lambda model: [(model, "forward", model_forward)],
    )
)


# Attention --------------------------------------------------------------------------------------------------------


def attend(attn: Any, x: Tensor, context: Tensor, layers: tuple[Any, ...], rotary: tuple | None) -> Tensor:
    """Attention of x over context through layers = (to_q, to_k, to_v, norm_q, norm_k): (B, N, H * D)."""
    to_q, to_k, to_v, norm_q, norm_k = layers
    q, k, v = (t.unflatten(-1, (attn.heads, -1)) for t in (to_q(x), to_k(context), to_v(context)))
    cos, sin = (None, None) if rotary is None else (t[..., : t.shape[-1] // 2] for t in rotary)  # each value twice
    return joint_attention(Stream(q, k, v, norm_q, norm_k, cos, sin, "half"))[0]


def own(attn: Any) -> tuple[Any, ...]:
    return attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k


class FastditCosmosAttnProcessor(Processor):
    """CosmosAttnProcessor2_0 with `qk_norm_rope` and `attention`; masks go to the original."""

    def __init__(self):
        from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0

        super().__init__(CosmosAttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        return attn.to_out[1](attn.to_out[0](attend(attn, hidden_states, context, own(attn), image_rotary_emb)))


class FastditCosmosImageAttnProcessor(Processor):
    """CosmosAttnProcessor2_5: attention over the text and, with projections of its own, over an image."""

    def __init__(self):
        from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_5

        super().__init__(CosmosAttnProcessor2_5())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: tuple[Tensor | None, Tensor | None],
        attention_mask: tuple[Tensor | None, Tensor | None] | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        pair = isinstance(encoder_hidden_states, tuple) and len(encoder_hidden_states) == 2
        if not pair or attention_mask not in (None, (None, None)):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        text, image = encoder_hidden_states
        o = attend(attn, hidden_states, hidden_states if text is None else text, own(attn), image_rotary_emb)
        if image is not None:
            layers = attn.q_img, attn.k_img, attn.v_img, attn.q_img_norm, attn.k_img_norm
            o = o + attend(attn, hidden_states, image, layers, None)
        return attn.to_out[1](attn.to_out[0](o))


PROCESSORS = {
    "CosmosAttnProcessor2_0": FastditCosmosAttnProcessor,
    "CosmosAttnProcessor2_5": FastditCosmosImageAttnProcessor,
}


def refuse_attention(attn: Any) -> str | None:
    image = (attn.q_img_norm, attn.k_img_norm) if hasattr(attn, "q_img_norm") else ()
    return refuse_qk_norms(attn.norm_q, attn.norm_k) or refuse_qk_norms(*image)


register(
    Kind(
        name="attention (CosmosAttnProcessor)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "heads", "processor", "norm_q", "norm_k")
            and type(m.processor).__name__ in PROCESSORS
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(PROCESSORS[type(attn.processor).__name__]))],
        absorbs=lambda attn: [norm for norm in attn.children() if isinstance(norm, nn.Module) and has(norm, "eps")],
        # q and k in 2 bytes: norm to fp32 3, square 4, mean 2, product 3, weight 2; negate and join 4, two casts 6, two
        # products 8, sum 6, rounding 3, against 2; one of the two attentions of a block rotates
        saving=lambda attn: (27 + 26) * attn.inner_dim * itemsize(attn),
        part=True,
    )
)
