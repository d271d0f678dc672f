"""facebookresearch/DiT and what was built from it (SiT, Latte, REPA, fast-DiT): block, attention, MLP, final layer.

Blocks have `norm1/attn/norm2/mlp/adaLN_modulation` with timm's `Attention` and `Mlp` inside, or copies of them.
timm's patch embedding is that of diffusers' DiT (`diffusers_dit`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from fastdit import ops
from fastdit.integrations.probe import follows, numbers
from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, itemsize, law, parameters, unknown

# The adaLN-Zero block ---------------------------------------------------------------------------------------------


def block_forward(self, x: Tensor, c: Tensor) -> Tensor:
    if x.ndim != 3 or c.ndim != 2:
        return original(self, x, c)
    shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
    norm1, norm2, precision = self.norm1, self.norm2, law(self, x, gate_msa)
    h = ops.norm_modulate(
        x,
        shift=shift_msa,
        scale=scale_msa,
        weight=norm1.weight,
        bias=norm1.bias,
        eps=norm1.eps,
        precision=precision,
    )
    x, h = ops.gate_residual_norm_modulate(
        x,
        self.attn(h),
        gate_msa,
        shift=shift_mlp,
        scale=scale_mlp,
        weight=norm2.weight,
        bias=norm2.bias,
        eps=norm2.eps,
        precision=precision,
    )
    return ops.gate_residual(x, self.mlp(h), gate_mlp, precision=precision)


BLOCK = ("norm1", "attn", "norm2", "mlp", "adaLN_modulation")


def is_adaln_zero(block: Any) -> bool:
    x, c = numbers(2, 3, 4), numbers(2, 24, seed=1)
    parts = dict(
        norm1=lambda x: x.sin(), norm2=lambda x: x.cos(), adaLN_modulation=lambda c: c.exp(),
        attn=lambda h: h + h.mean(dim=1, keepdim=True), mlp=lambda h: h.square(),
    )  # fmt: skip
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = c.exp().unsqueeze(1).chunk(6, dim=2)
    y = x + gate * parts["attn"](x.sin() * (1 + scale) + shift)
    y = y + gate_mlp * (y.cos() * (1 + scale_mlp) + shift_mlp).square()
    return follows(block, parts, (x, c), y)


def refuse_block(block: Any) -> str | None:
    if type(block.norm1) is not nn.LayerNorm or type(block.norm2) is not nn.LayerNorm:
        return "its norm is not nn.LayerNorm"
    if not is_adaln_zero(block):
        return "its forward computes something else than an adaLN-Zero block"
    return unknown(block, *BLOCK)


register(
    Kind(
        name="DiT block (facebookresearch)",
        ops=("norm_modulate", "gate_residual_norm_modulate", "gate_residual"),
        match=lambda m: has(m, *BLOCK) and parameters(m) == ["x", "c"],
        refuse=refuse_block,
        patches=lambda block: [(block, "forward", block_forward)],
        absorbs=lambda block: [block.norm1, block.norm2],
        # passes over (tokens, C): eager 2*(norm 2, scale 2, shift 2) + 2*(gate 2, add 3) = 22, fused 2 + 4 + 3 = 9
        saving=lambda block: 13 * block.norm1.normalized_shape[0] * itemsize(block),
        block=True,
    )
)


# Attention --------------------------------------------------------------------------------------------------------


def attention_forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """timm's Attention: qkv, norms of each head, softmax(q k^T scale) v, norm of the output, projection."""
    if attn_mask is not None or is_causal or x.ndim != 3 or (self.training and self.attn_drop.p > 0):
        options = {} if attn_mask is None and not is_causal else dict(attn_mask=attn_mask, is_causal=is_causal)
        return original(self, x, **options)
    q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, H, D) each
    if hasattr(self, "q_norm"):
        q, k = self.q_norm(q), self.k_norm(k)
    # timm's fused path leaves the scale to torch
    o = ops.attention(q, k, v, scale=None if getattr(self, "fused_attn", False) else self.scale).flatten(2)
    if hasattr(self, "norm"):
        o = self.norm(o)
    return self.proj_drop(self.proj(o))


ATTENTION = ("qkv", "attn_drop", "proj", "proj_drop", "num_heads", "scale")
OPTIONAL = ("q_norm", "k_norm", "norm", "head_dim", "attn_dim", "fused_attn", "attention_mode")


def is_attention(attn: Any) -> bool:
    """Latte's copy, for one, puts the values of its heads in another order in its "flash" and "xformers" modes."""
    x, heads, d = numbers(2, 3, 4), 2, 2
    weight, same = numbers(3 * heads * d, 4, seed=1), nn.Identity()
    parts = dict(
        qkv=lambda x: x @ weight.T, q_norm=same, k_norm=same, norm=same, proj=same, proj_drop=same,
        attn_drop=nn.Dropout(0.0), num_heads=heads, head_dim=d, attn_dim=heads * d, scale=d**-0.5, training=False,
    )  # fmt: skip
    q, k, v = (x @ weight.T).unflatten(-1, (3, heads, d)).permute(2, 0, 3, 1, 4)
    o = (q @ k.mT * d**-0.5).softmax(dim=-1) @ v
    return follows(attn, parts, (x,), o.transpose(1, 2).flatten(2))


def refuse_attention(attn: Any) -> str | None:
    for norm in (getattr(attn, name, None) for name in ("q_norm", "k_norm")):
        if norm is not None and not isinstance(norm, (nn.Identity, nn.LayerNorm, nn.RMSNorm)):
            return f"its norm of the heads is a {type(norm).__name__}"
    if not is_attention(attn):
        return "its forward computes something else than softmax attention over its heads"
    return unknown(attn, *ATTENTION, *OPTIONAL)


register(
    Kind(
        name="attention (timm)",
        ops=("attention",),
        match=lambda m: has(m, *ATTENTION),
        refuse=refuse_attention,
        patches=lambda attn: [(attn, "forward", attention_forward)],
        part=True,
    )
)


# The activation between the layers of an MLP, as a module of its own ------------------------------------------------


def gelu_forward(self, input: Tensor) -> Tensor:
    return ops.activation(input, "gelu_tanh" if self.approximate == "tanh" else "gelu")


register(
    Kind(
        name="activation (nn.GELU)",
        ops=("activation",),
        match=lambda m: type(m) is nn.GELU,
        refuse=lambda m: None,
        patches=lambda m: [(m, "forward", gelu_forward)],
        part=True,
    )
)


# The final layer --------------------------------------------------------------------------------------------------


def final_forward(self, x: Tensor, c: Tensor) -> Tensor:
    if x.ndim != 3 or c.ndim != 2:
        return original(self, x, c)
    shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
    norm, precision = self.norm_final, law(self, x, scale)
    h = ops.norm_modulate(
        x, shift=shift, scale=scale, weight=norm.weight, bias=norm.bias, eps=norm.eps, precision=precision
    )
    return self.linear(h)


FINAL = ("norm_final", "linear", "adaLN_modulation")


def refuse_final(layer: Any) -> str | None:
    if type(layer.norm_final) is not nn.LayerNorm:
        return "its norm is not nn.LayerNorm"
    x, c = numbers(2, 3, 4), numbers(2, 8, seed=1)
    parts = dict(norm_final=lambda x: x.sin(), adaLN_modulation=lambda c: c.exp(), linear=lambda x: x.square())
    shift, scale = c.exp().unsqueeze(1).chunk(2, dim=2)
    if not follows(layer, parts, (x, c), (x.sin() * (1 + scale) + shift).square()):
        return "its forward computes something else than norm, modulation, projection"
    return unknown(layer, *FINAL)


def register_final(name: str, call: list[str], forward: Callable) -> None:
    """`call`: the parameters of the layer's forward, and of the one that takes its place."""
    register(
        Kind(
            name=name,
            ops=("norm_modulate",),
            match=lambda m: has(m, *FINAL) and parameters(m) == call,
            refuse=refuse_final,
            patches=lambda layer: [(layer, "forward", forward)],
            absorbs=lambda layer: [layer.norm_final],
            # passes over (tokens, C): norm 2, scale 2, shift 2 against 2
            saving=lambda layer: 4 * layer.norm_final.normalized_shape[0] * itemsize(layer),
        )
    )


register_final("DiT final layer (facebookresearch)", ["x", "c"], final_forward)


def unpatchify(self, x: Tensor, patch_size: int | None = None) -> Tensor:
    """(B, side * side, p * p * C) -> (B, C, side * p, side * p)."""
    p, side = patch_size or self.x_embedder.patch_size[0], int(x.shape[1] ** 0.5)
    image = ops.unpatchify3d(x, grid=(1, side, side), patch=(1, p, p), channels=self.out_channels, order="thwc")
    return image.squeeze(2)


def refuse_unpatchify(model: Any) -> str | None:
    x, embedder = numbers(2, 4, 12), SimpleNamespace(patch_size=(2, 2))
    image = x.view(2, 2, 2, 2, 2, 3).permute(0, 5, 1, 3, 2, 4).reshape(2, 3, 4, 4)
    known = follows(model, dict(x_embedder=embedder, out_channels=3), (x,), image, method="unpatchify")
    return None if known else "its unpatchify computes something else"


register(
    Kind(
        name="unpatchify (facebookresearch/DiT)",
        ops=("unpatchify3d",),
        match=lambda m: has(m, "unpatchify", "x_embedder", "final_layer", "out_channels"),
        refuse=refuse_unpatchify,
        patches=lambda model: [(model, "unpatchify", unpatchify)],
    )
)

for function in (block_forward, attention_forward, gelu_forward, final_forward):
    function.__name__ = "forward"
