"""diffusers' DiTTransformer2DModel: the adaLN-Zero block, its attention, the patch embedding, the output layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor, queries_keys_values, refuse_processor, shared
from fastdit.integrations.padding import is_lengths
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import autocasted, has, itemsize, law

# The adaLN-Zero block ---------------------------------------------------------------------------------------------


def block_forward(
    self,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    timestep: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
) -> Tensor:
    if hidden_states.ndim != 3 or self._chunk_size is not None or cross_attention_kwargs:
        return original(
            self,
            hidden_states,
            attention_mask,
            encoder_hidden_states,
            encoder_attention_mask,
            timestep,
            cross_attention_kwargs,
            class_labels,
            added_cond_kwargs,
        )
    hidden_states = hidden_states.contiguous()  # the first block's come transposed from an eager patch embedding
    norm1, norm3 = self.norm1, self.norm3
    emb = norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = norm1.linear(norm1.silu(emb)).chunk(6, dim=1)
    precision = law(self, hidden_states, gate_msa)

    h = ops.norm_modulate(hidden_states, shift=shift_msa, scale=scale_msa, eps=norm1.norm.eps, precision=precision)
    attn_output = self.attn1(
        h,
        encoder_hidden_states=encoder_hidden_states if self.only_cross_attention else None,
        attention_mask=attention_mask,
    )
    x, h = ops.gate_residual_norm_modulate(
        hidden_states,
        attn_output,
        gate_msa,
        shift=shift_mlp,
        scale=scale_mlp,
        weight=norm3.weight,
        bias=norm3.bias,
        eps=norm3.eps,
        precision=precision,
    )
    return ops.gate_residual(x, self.ff(h), gate_mlp, precision=precision)


block_forward.__name__ = "forward"


def refuse_block(block: Any) -> str | None:
    if block.attn2 is not None or hasattr(block, "fuser") or block.pos_embed is not None:
        return "has a cross-attention, a fuser or positions of its own, which adaLN-Zero blocks do not have"
    if block.norm1.emb is None:
        return "its timestep embedding is not its own"
    if type(block.norm1.norm) is not nn.LayerNorm or type(block.norm3) is not nn.LayerNorm:
        return "its norm is not nn.LayerNorm"
    return None


register(
    Kind(
        name="adaLN-Zero block",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: (
            has(m, "norm1", "attn1", "attn2", "norm3", "ff", "norm_type", "only_cross_attention", "_chunk_size")
            and m.norm_type == "ada_norm_zero"
            and has(m.norm1, "emb", "silu", "linear", "norm")
        ),
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.norm1, block.norm1.norm, block.norm3],
        # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3 = 9
        saving=lambda block: 13 * block.norm3.normalized_shape[0] * itemsize(block),
        block=True,
    )
)


# Attention --------------------------------------------------------------------------------------------------------


class FastditAttnProcessor(Processor):
    """AttnProcessor2_0 with `fastdit.ops.attention`; what that does not cover goes to the original.

    attention_mask: None, a bias (the original's), or key lengths (padding.py).
    """

    def __init__(self):
        from diffusers.models.attention_processor import AttnProcessor2_0

        super().__init__(AttnProcessor2_0())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor:
        masked = attention_mask is not None and not is_lengths(attention_mask)
        if masked or hidden_states.ndim != 3 or args or kwargs:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        return attend(attn, hidden_states, encoder_hidden_states, attention_mask)


def attend(
    attn: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    kv_len: Tensor | None,
    rotated: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """What the processors of diffusers' `Attention` have in common; rotated: (q, k), each (B, N, H, D) -> (q, k)."""
    residual = hidden_states
    if encoder_hidden_states is not None and attn.norm_cross:
        encoder_hidden_states = attn.norm_encoder_hidden_states(encoder_hidden_states)
    query, key, value = queries_keys_values(attn, hidden_states, encoder_hidden_states)
    if rotated is not None:
        query, key = rotated(query, key)
    hidden_states = ops.attention(query, key, value, kv_len=kv_len).flatten(2)
    hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
    if attn.residual_connection:
        hidden_states = hidden_states + residual
    if attn.rescale_output_factor != 1.0:
        hidden_states = hidden_states / attn.rescale_output_factor
    return hidden_states


def refuse_attention(attn: Any, expected: str = "AttnProcessor2_0") -> str | None:
    if reason := refuse_processor(attn.processor, expected):
        return reason
    if attn.spatial_norm is not None or attn.group_norm is not None or attn.norm_q is not None:
        return "norms inside the attention"
    return None


def matches_attention(module: Any, *extra: str) -> bool:
    """diffusers' `Attention` with a processor that takes (hidden_states, temb) and these."""
    if not has(module, "to_q", "to_k", "to_v", "to_out", "heads", "processor", "norm_cross", "spatial_norm"):
        return False
    taken = inspect.signature(module.processor.__call__).parameters
    return "temb" in taken and ("image_rotary_emb" in taken) == ("image_rotary_emb" in extra)


register(
    Kind(
        name="attention (AttnProcessor2_0)",
        ops=("attention",),
        match=matches_attention,
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(FastditAttnProcessor))],
        # the division by rescale_output_factor = 1; the op's own gain is arithmetic, not traffic
        saving=lambda attn: 2 * attn.out_dim * itemsize(attn) if attn.rescale_output_factor == 1.0 else 0,
        part=True,
    )
)


# Patch embedding --------------------------------------------------------------------------------------------------


def patch_conv_forward(self, input: Tensor) -> Tensor:
    """nn.Conv2d with kernel = stride, (B, C, H, W) -> (B, D, H/p, W/p), as one GEMM; channels last in memory."""
    if input.ndim != 4:
        return original(self, input)
    (p_h, p_w), (height, width) = self.kernel_size, input.shape[2:]
    grid = (height // p_h, width // p_w)
    frames = autocasted(input[:, :, : grid[0] * p_h, : grid[1] * p_w].unsqueeze(2))
    tokens = ops.patch_embed3d(frames, self.weight.unsqueeze(2), self.bias)
    return tokens.unflatten(1, grid).permute(0, 3, 1, 2)


patch_conv_forward.__name__ = "forward"


def patch_convs(module: Any) -> list[Any]:
    """Its projection, or OmniGen's two: of the noisy image, and of those among the text."""
    names = ("proj", "output_image_proj", "input_image_proj")
    return [conv for conv in (getattr(module, name, None) for name in names) if isinstance(conv, nn.Conv2d)]


def is_patch_embedding(module: Any) -> bool:
    convs = patch_convs(module)
    if not convs or any(conv.kernel_size != conv.stride for conv in convs):
        return False
    return "patch_size" in module.config if has(module, "config") else has(module, "patch_size")


def refuse_patch_embedding(module: Any) -> str | None:
    for conv in patch_convs(module):
        if type(conv) is not nn.Conv2d or conv.padding != (0, 0) or conv.dilation != (1, 1) or conv.groups != 1:
            return "its convolution is not a plain nn.Conv2d without padding"
    return None


register(
    Kind(
        name="patch embedding (Conv2d, kernel = stride)",
        ops=("patch_embed3d",),
        match=is_patch_embedding,
        refuse=refuse_patch_embedding,
        patches=lambda module: [(conv, "forward", patch_conv_forward) for conv in patch_convs(module)],
    )
)


# The output layer, in the model's own forward ---------------------------------------------------------------------


def model_forward(
    self,
    hidden_states: Tensor,
    timestep: Tensor | None = None,
    class_labels: Tensor | None = None,
    cross_attention_kwargs: dict[str, Any] | None = None,
    return_dict: bool = True,
):
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    hidden_states = self.pos_embed(hidden_states)
    for block in self.transformer_blocks:
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            hidden_states = self._gradient_checkpointing_func(
                block, hidden_states, None, None, None, timestep, cross_attention_kwargs, class_labels
            )
        else:
            hidden_states = block(
                hidden_states,
                attention_mask=None,
                encoder_hidden_states=None,
                encoder_attention_mask=None,
                timestep=timestep,
                cross_attention_kwargs=cross_attention_kwargs,
                class_labels=class_labels,
            )

    conditioning = self.transformer_blocks[0].norm1.emb(timestep, class_labels, hidden_dtype=hidden_states.dtype)
    shift, scale = self.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
    precision = law(self, hidden_states, scale)
    tokens = self.proj_out_2(
        ops.norm_modulate(hidden_states, shift=shift, scale=scale, eps=self.norm_out.eps, precision=precision)
    )
    side, p = int(tokens.shape[1] ** 0.5), self.patch_size
    output = ops.unpatchify3d(
        tokens, grid=(1, side, side), patch=(1, p, p), channels=self.out_channels, order="thwc"
    ).squeeze(2)
    return Transformer2DModelOutput(sample=output) if return_dict else (output,)


model_forward.__name__ = "forward"


def refuse_model(model: Any) -> str | None:
    if type(model.norm_out) is not nn.LayerNorm or model.norm_out.elementwise_affine:
        return "its last norm is not a plain LayerNorm"
    return None


def model_patches(model: Any) -> Iterator[tuple[nn.Module, str, Any]]:
    yield model, "forward", model_forward


register(
    Kind(
        name="DiT output layer (norm, modulation, unpatchify)",
        ops=("norm_modulate", "unpatchify3d"),
        match=lambda m: (
            has(m, "pos_embed", "transformer_blocks", "norm_out", "proj_out_1", "proj_out_2", "patch_size")
            and len(m.transformer_blocks) > 0
            and has(m.transformer_blocks[0], "norm1")
            and getattr(m.transformer_blocks[0].norm1, "emb", None) is not None
        ),
        refuse=refuse_model,
        patches=model_patches,
        absorbs=lambda model: [model.norm_out],
        # passes over (tokens, C): norm 2, scale 2, shift 2 against 2
        saving=lambda model: 4 * model.norm_out.normalized_shape[0] * itemsize(model),
    )
)
