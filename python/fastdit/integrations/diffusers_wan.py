"""diffusers' WanTransformer3DModel (Wan 2.1, 2.2): the block, its two attentions, the patch embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations import wan_block
from fastdit.integrations.diffusers_processor import Processor, by_head, queries_keys_values, refuse_processor, shared
from fastdit.integrations.joint import is_diffusers_rms
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import autocasted, has, itemsize, parameters, unknown
from fastdit.integrations.wan_block import Rows

TEXT_TOKENS = 512  # the tokens before them in the context are the image's (I2V)

# The block --------------------------------------------------------------------------------------------------------


def block_forward(
    self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor | Rows, rotary_emb: tuple[Tensor, Tensor]
) -> Tensor:
    return run_block(self, hidden_states, encoder_hidden_states, temb, rotary_emb)


def run_block(
    block: Any,
    x: Tensor,
    context: Tensor,
    temb: Tensor | Rows,
    rotary_emb: tuple[Tensor, Tensor],
    attention_mask: Any = None,
) -> Tensor:
    """What Wan's block and those with its parts (VACE, SkyReels-V2) compute; attention_mask: of self-attention."""
    tables, index = wan_block.six(block.scale_shift_table, temb)
    return wan_block.run(
        block,
        x,
        tables,
        index,
        (block.norm1, block.norm2, block.norm3),
        lambda h: block.attn1(h, None, attention_mask, rotary_emb),
        lambda h: block.attn2(h, context, None, None),
    )


block_forward.__name__ = "forward"

BLOCK = ("norm1", "attn1", "attn2", "norm2", "norm3", "ffn", "scale_shift_table")


def is_block(module: Any, *taken: str) -> bool:
    """A block with Wan's parts whose forward takes these parameters."""
    if not has(module, *BLOCK) or module.scale_shift_table.ndim != 3 or module.scale_shift_table.shape[1] != 6:
        return False
    return parameters(module) == list(taken)


def refuse_block(block: Any, *more: str) -> str | None:
    """`more` are the children and settings that this kind of block has besides Wan's."""
    return wan_block.refuse_norms(block.norm1, block.norm2, block.norm3) or unknown(block, *BLOCK, *more)


def register_block(name: str, forward: Callable, taken: tuple[str, ...], *more: str) -> None:
    wan_block.register_block(
        name,
        "scale_shift_table",
        forward,
        lambda m: is_block(m, *taken),
        lambda block: refuse_block(block, *more),
    )


register_block("Wan block", block_forward, ("hidden_states", "encoder_hidden_states", "temb", "rotary_emb"))


# Attention --------------------------------------------------------------------------------------------------------


class FastditWanAttnProcessor(Processor):
    """WanAttnProcessor with `qk_norm_rope` and `attention`; masks and foreign backends go to the original."""

    def __init__(self):
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        super().__init__(WanAttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None or hidden_states.ndim != 3:
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)
        return attend(attn, hidden_states, encoder_hidden_states, rotary_emb)


PROCESSORS: dict[str, type] = {"WanAttnProcessor": FastditWanAttnProcessor}


def attend(
    attn: Any, x: Tensor, context: Tensor | None, rotary_emb: tuple[Tensor, Tensor] | None, **options: Any
) -> Tensor:
    """Self-attention, or attention to the text behind the image's tokens in context; `options` of `ops.attention`."""
    image = None
    if attn.add_k_proj is not None and context is not None:
        split = context.shape[1] - TEXT_TOKENS
        image, context = context[:, :split], context[:, split:]
    return attend_beside(attn, x, context, image, rotary_emb, **options)


def attend_beside(
    attn: Any,
    x: Tensor,
    context: Tensor | None,
    image: Tensor | None,
    rotary_emb: tuple[Tensor, Tensor] | None = None,
    **options: Any,
) -> Tensor:
    """Self-attention, or attention to the text and, beside it, to the image."""
    q, k, v = projections(attn, x, context)
    rope = {} if rotary_emb is None else dict(cos=rotary_emb[0][..., 0::2], sin=rotary_emb[1][..., 1::2])
    q, k = normed(q, k, attn.norm_q, attn.norm_k, **rope)
    o = ops.attention(q, k, v, **options).flatten(2)
    if image is not None:
        k, v = image_projections(attn, image)
        _, k = normed(k[:, :0], k, None, attn.norm_added_k)
        o = o + ops.attention(q, k, v).flatten(2)
    return attn.to_out[1](attn.to_out[0](o))


def projections(attn: Any, x: Tensor, context: Tensor | None) -> tuple[Tensor, ...]:
    """`queries_keys_values`, also of the layers that `fuse_projections` leaves."""
    if not getattr(attn, "fused_projections", False):
        return queries_keys_values(attn, x, context)
    if attn.is_cross_attention:
        return by_head(attn, attn.to_q(x), *attn.to_kv(x if context is None else context).chunk(2, dim=-1))
    return by_head(attn, *attn.to_qkv(x).chunk(3, dim=-1))


def image_projections(attn: Any, image: Tensor) -> tuple[Tensor, ...]:
    fused = getattr(attn, "fused_projections", False)
    k, v = attn.to_added_kv(image).chunk(2, dim=-1) if fused else (attn.add_k_proj(image), attn.add_v_proj(image))
    return by_head(attn, k, v)


def normed(q: Tensor, k: Tensor, norm_q: Any, norm_k: Any, **rope) -> tuple[Tensor, Tensor]:
    """RMSNorm over all heads, then RoPE, in one pass; rounds between the two as the eager modules do."""
    q_weight, k_weight = (None if norm is None else norm.weight for norm in (norm_q, norm_k))
    eps = torch.finfo(q.dtype).eps if norm_k is None or norm_k.eps is None else norm_k.eps
    same = all(w is None or w.dtype == q.dtype for w in (q_weight, k_weight))
    return ops.qk_norm_rope(
        q,
        k,
        q_weight=q_weight,
        k_weight=k_weight,
        norm=None if norm_k is None else "rms",
        scope="hidden",
        eps=eps,
        precision="native" if same else "fp32",
        **rope,
    )


def refuse_attention(attn: Any) -> str | None:
    if reason := refuse_processor(attn.processor, *PROCESSORS):
        return reason
    if any(type(norm) is not nn.RMSNorm and not is_diffusers_rms(norm) for norm in norms_of(attn)):
        return "its norms are not RMSNorm"
    return None if attn.norm_q.eps == attn.norm_k.eps else "its norms differ in eps"


def width(norm: Any) -> int:
    return (norm.dim if is_diffusers_rms(norm) else norm.normalized_shape)[0]


def norms_of(attn: Any) -> list[Any]:
    image = getattr(attn, "add_k_proj", None) is not None
    return [attn.norm_q, attn.norm_k, *([attn.norm_added_k] if image else [])]


register(
    Kind(
        name="attention (WanAttnProcessor)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: (
            has(m, "to_q", "to_k", "to_v", "to_out", "heads", "processor")
            and (has(m, "add_k_proj", "kv_inner_dim") or type(m.processor).__name__ in PROCESSORS)
        ),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(PROCESSORS[type(attn.processor).__name__]))],
        absorbs=norms_of,
        # q and k: norm 2, then four strided products, two sums, two scattered writes (14 halves) against 2
        saving=lambda attn: 2 * 7 * width(attn.norm_q) * itemsize(attn),
        part=True,
    )
)


# Patch embedding --------------------------------------------------------------------------------------------------


def patch_conv_forward(self, input: Tensor) -> Tensor:
    """nn.Conv3d with kernel = stride, (B, C, T, H, W) -> (B, D, t, h, w), as one GEMM; channels last in memory."""
    if input.ndim != 5:
        return original(self, input)
    grid = tuple(size // p for size, p in zip(input.shape[2:], self.kernel_size, strict=True))
    t, h, w = (n * p for n, p in zip(grid, self.kernel_size, strict=True))
    tokens = ops.patch_embed3d(autocasted(input[:, :, :t, :h, :w]), self.weight, self.bias)
    return tokens.unflatten(1, grid).permute(0, 4, 1, 2, 3)


patch_conv_forward.__name__ = "forward"


def is_patch_conv(module: Any) -> bool:
    plain = type(module) is nn.Conv3d and module.kernel_size == module.stride and module.groups == 1
    return plain and module.padding == (0, 0, 0) and module.dilation == (1, 1, 1)


register(
    Kind(
        name="patch embedding (Conv3d, kernel = stride)",
        ops=("patch_embed3d",),
        match=lambda m: isinstance(getattr(m, "patch_embedding", None), nn.Conv3d),
        refuse=lambda m: None if is_patch_conv(m.patch_embedding) else "its convolution is not a plain nn.Conv3d",
        # beside it those of the model's other inputs: control (VACE), pose (Animate), history (Helios)
        patches=lambda m: [(conv, "forward", patch_conv_forward) for conv in m.children() if is_patch_conv(conv)],
    )
)
