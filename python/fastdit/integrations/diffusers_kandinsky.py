"""diffusers' Kandinsky5Transformer3DModel: text and visual blocks, feed-forward; the attention of Kandinsky 5 and 6.

The fp32 law: modulation layers stay in fp32, and every norm, gate and sum is computed in fp32 and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.diffusers_processor import Processor, refuse_processor, refuse_weighted_rms, shared
from fastdit.integrations.joint import refuse_plain_norms
from fastdit.integrations.masks import valid_first
from fastdit.integrations.registry import RECORD, Kind, register
from fastdit.integrations.structure import has, itemsize, parameters, unknown

# Sublayers --------------------------------------------------------------------------------------------------------


def tables(modulation: nn.Module, time_embed: Tensor, count: int) -> list[tuple[Tensor, ...]]:
    """(shift, scale, gate), each (B, C), of `count` sublayers."""
    parts = modulation(time_embed).chunk(3 * count, dim=-1)
    return [parts[3 * i : 3 * i + 3] for i in range(count)]


def opened(block: Any, norm: Any, x: Tensor, table: tuple[Tensor, ...]) -> Tensor:
    """What enters a sublayer."""
    shift, scale = table[:2]
    return ops.norm_modulate(x, shift=shift, scale=scale, eps=norm.eps, precision=getattr(block, RECORD).precision)


def seam(block: Any, norm: Any, x: Tensor, y: Tensor, gate: Tensor, table: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """x + gate * y, and what enters the next sublayer."""
    shift, scale = table[:2]
    precision = getattr(block, RECORD).precision
    return ops.gate_residual_norm_modulate(x, y, gate, shift=shift, scale=scale, eps=norm.eps, precision=precision)


def closed(block: Any, x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    return ops.gate_residual(x, y, gate, precision=getattr(block, RECORD).precision)


# Kandinsky 5 ------------------------------------------------------------------------------------------------------


def text_forward(self, x: Tensor, time_embed: Tensor, rope: Tensor) -> Tensor:
    own, ff = tables(self.text_modulation, time_embed, 2)
    y = self.self_attention(opened(self, self.self_attention_norm, x, own), rotary_emb=rope)
    x, h = seam(self, self.feed_forward_norm, x, y, own[2], ff)
    return closed(self, x, self.feed_forward(h), ff[2])


def visual_forward(
    self, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor, rope: Tensor, sparse_params: dict | None
) -> Tensor:
    own, cross, ff = tables(self.visual_modulation, time_embed, 3)
    h = opened(self, self.self_attention_norm, visual_embed, own)
    y = self.self_attention(h, rotary_emb=rope, sparse_params=sparse_params)
    x, h = seam(self, self.cross_attention_norm, visual_embed, y, own[2], cross)
    x, h = seam(
        self, self.feed_forward_norm, x, self.cross_attention(h, encoder_hidden_states=text_embed), cross[2], ff
    )
    return closed(self, x, self.feed_forward(h), ff[2])


text_forward.__name__ = visual_forward.__name__ = "forward"

TEXT = ("text_modulation", "self_attention_norm", "self_attention", "feed_forward_norm", "feed_forward")
VISUAL = ("visual_modulation", "cross_attention_norm", "cross_attention", *TEXT[1:])


def register_block(name: str, held: tuple[str, ...], call: list[str], forward: Any, passes: int) -> None:
    norms = [layer for layer in held if layer.endswith("norm")]
    register(
        Kind(
            name=name,
            ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
            match=lambda m: has(m, *held) and parameters(m) == call,
            refuse=lambda m: refuse_plain_norms(*(getattr(m, n) for n in norms)) or unknown(m, *held),
            patches=lambda m: [(m, "forward", forward)],
            absorbs=lambda m: [getattr(m, n) for n in norms],
            saving=lambda m: passes * getattr(m, norms[0]).normalized_shape[0] * itemsize(m.feed_forward),
            precision="fp32",
            block=True,
        )
    )


# passes over (tokens, C) in 2 bytes. A sublayer: cast 3, norm 4, scale 4, shift 4, cast 3; two casts 6, gate 4, sum 6,
# cast 3: 37. Two of them against 2 + 4 + 3, three against 2 + 4 + 4 + 3.
register_block("Kandinsky 5 text block", TEXT, ["x", "time_embed", "rope"], text_forward, 2 * 37 - 9)
register_block(
    "Kandinsky 5 block", VISUAL, ["visual_embed", "text_embed", "time_embed", "rope", "sparse_params"],
    visual_forward, 3 * 37 - 13,
)  # fmt: skip


# Feed-forward of Kandinsky 5 --------------------------------------------------------------------------------------


def feed_forward(self, x: Tensor) -> Tensor:
    return self.out_layer(ops.activation(self.in_layer(x), "gelu"))


feed_forward.__name__ = "forward"

register(
    Kind(
        name="feed-forward (Kandinsky 5)",
        ops=("activation",),
        match=lambda m: (
            has(m, "in_layer", "activation", "out_layer")
            and type(m.activation) is nn.GELU
            and m.activation.approximate == "none"
            and parameters(m) == ["x"]
        ),
        refuse=lambda m: unknown(m, "in_layer", "activation", "out_layer"),
        patches=lambda m: [(m, "forward", feed_forward)],
        absorbs=lambda m: [m.activation],
        part=True,
    )
)


# The output layers of 5 and 6 -------------------------------------------------------------------------------------


def output_forward(self, visual_embed: Tensor, time_embed: Tensor) -> Tensor:
    """(B, T, H, W, C) -> (B, T * p_t, H * p_h, W * p_w, visual_dim)."""
    x = opened(self, self.norm, visual_embed.flatten(1, 3), self.modulation(time_embed).chunk(2, dim=-1))
    x = self.out_layer(x).unflatten(1, visual_embed.shape[1:4])
    x = x.unflatten(-1, (-1, *self.patch_size)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.flatten(1, 2).flatten(2, 3).flatten(3, 4)


def output5_forward(self, visual_embed: Tensor, text_embed: Tensor, time_embed: Tensor) -> Tensor:
    return output_forward(self, visual_embed, time_embed)


output5_forward.__name__ = output_forward.__name__ = "forward"

OUTPUT = ("modulation", "norm", "out_layer", "patch_size")
OUTPUTS = {
    ("visual_embed", "text_embed", "time_embed"): output5_forward,
    ("visual_embed", "time_embed"): output_forward,
}

register(
    Kind(
        name="output layer (Kandinsky)",
        ops=("norm_modulate",),
        match=lambda m: has(m, *OUTPUT) and tuple(parameters(m)) in OUTPUTS,
        refuse=lambda m: refuse_plain_norms(m.norm) or unknown(m, *OUTPUT),
        patches=lambda m: [(m, "forward", OUTPUTS[tuple(parameters(m))])],
        absorbs=lambda m: [m.norm],
        # passes over (tokens, C) in 2 bytes: cast 3, norm 4, scale 4, shift 4, cast 3 against 2
        saving=lambda m: 16 * m.norm.normalized_shape[0] * itemsize(m),
        precision="fp32",
    )
)


# Attention --------------------------------------------------------------------------------------------------------


class FastditKandinsky5AttnProcessor(Processor):
    """Kandinsky5AttnProcessor with `qk_norm_rope` and `attention`; sparse attention goes to the original.

    The original rounds rotated queries and keys to bf16 whatever the dtype; here they have the model's.
    """

    def __init__(self):
        from diffusers.models.transformers.transformer_kandinsky import Kandinsky5AttnProcessor

        super().__init__(Kandinsky5AttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        sparse_params: dict | None = None,
    ) -> Tensor:
        if sparse_params is not None:
            return self.original(attn, hidden_states, encoder_hidden_states, rotary_emb, sparse_params)
        return attend(attn, hidden_states, encoder_hidden_states, rotary_emb, rotary_emb, None)


class FastditKandinsky6AttnProcessor(Processor):
    """Kandinsky6AttnProcessor with `qk_norm_rope` and `attention`; a bool mask (B, M) becomes key lengths."""

    def __init__(self):
        from diffusers.models.transformers.transformer_kandinsky6 import Kandinsky6AttnProcessor

        super().__init__(Kandinsky6AttnProcessor())

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        rotary_emb: Tensor | None = None,
        rotary_emb_kv: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        padding = attn_mask is None or (attn_mask.dtype is torch.bool and attn_mask.ndim == 2)
        if not padding or (rotary_emb is None) != (rotary_emb_kv is None):
            return self.original(attn, hidden_states, encoder_hidden_states, rotary_emb, rotary_emb_kv, attn_mask)
        return attend(attn, hidden_states, encoder_hidden_states, rotary_emb, rotary_emb_kv, attn_mask)


def attend(
    attn: Any, x: Tensor, context: Tensor | None, rotary: Tensor | None, k_rotary: Tensor | None, mask: Tensor | None
) -> Tensor:
    """mask (B, M) 0/1, over the keys: valid ones first, then their number."""
    context = x if context is None else context
    heads = (attn.num_heads, -1)
    q, k = attn.to_query(x).unflatten(-1, heads), attn.to_key(context).unflatten(-1, heads)
    v = attn.to_value(context).unflatten(-1, heads)
    cos, sin = pair_tables(rotary)
    k_cos, k_sin = pair_tables(k_rotary)
    eps = attn.query_norm.eps
    q, k = ops.qk_norm_rope(
        q,
        k,
        q_weight=attn.query_norm.weight,
        k_weight=attn.key_norm.weight,
        norm="rms",
        eps=torch.finfo(torch.promote_types(q.dtype, torch.float32)).eps if eps is None else eps,
        cos=cos,
        sin=sin,
        k_cos=k_cos,
        k_sin=k_sin,
        precision="fp32",
    )
    lengths = None
    if mask is not None:
        lengths, k, v = valid_first(mask, k, v)
    return attn.out_layer(ops.attention(q, k, v, kv_len=lengths).flatten(2))


def pair_tables(rotary: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Rotations (1 or B, N, 1, D/2, 2, 2), or (N, 1, D/2, 2, 2), each ((cos, -sin), (sin, cos)) -> cos, sin of them."""
    if rotary is None:
        return None, None
    rotary = rotary.to(torch.promote_types(rotary.dtype, torch.float32))  # `.to(bfloat16)` casts the model's angles too
    return rotary[..., 0, 0], rotary[..., 1, 0]


PROCESSORS = {
    "Kandinsky5AttnProcessor": FastditKandinsky5AttnProcessor,
    "Kandinsky6AttnProcessor": FastditKandinsky6AttnProcessor,
}
ATTENTION = ("to_query", "to_key", "to_value", "out_layer", "query_norm", "key_norm", "num_heads", "processor")


def refuse_attention(attn: Any) -> str | None:
    return refuse_processor(attn.processor, *PROCESSORS) or refuse_weighted_rms(attn.query_norm, attn.key_norm)


register(
    Kind(
        name="attention (Kandinsky)",
        ops=("qk_norm_rope", "attention"),
        match=lambda m: has(m, *ATTENTION),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "processor", shared(PROCESSORS[type(attn.processor).__name__]))],
        absorbs=lambda attn: [attn.query_norm, attn.key_norm],
        # q and k in 2 bytes: cast 3, norm 4, cast 3; cast 3, product by 2 x 2 matrices 6, sum 6, cast 3, against 2;
        # one of two attentions rotates
        saving=lambda attn: (2 * 8 + 18) * attn.to_query.out_features * itemsize(attn),
        part=True,
    )
)
