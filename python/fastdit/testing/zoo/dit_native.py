"""facebookresearch/DiT and its kin, written anew: same parts, names and arithmetic, with timm's layers inside.

The originals stand in repositories, not in packages, and timm is no dependency; their structure is what counts here.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdit.testing.models import randomize
from fastdit.testing.whole import Run, Whole
from fastdit.testing.zoo import Model, randn

# timm -------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """timm.models.vision_transformer.Attention."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool = False, fused: bool = True):
        super().__init__()
        self.num_heads, self.head_dim, self.fused_attn = num_heads, dim // num_heads, fused
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(self.head_dim, eps=1e-6) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            o = F.scaled_dot_product_attention(q, k, v, dropout_p=self.attn_drop.p if self.training else 0.0)
        else:
            o = self.attn_drop(((q * self.scale) @ k.mT).softmax(dim=-1)) @ v
        return self.proj_drop(self.proj(o.transpose(1, 2).reshape(b, n, c)))


class Mlp(nn.Module):
    """timm.layers.Mlp."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Dropout(0.0)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, dim), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class PatchEmbed(nn.Module):
    """timm.layers.PatchEmbed."""

    def __init__(self, patch: int, channels: int, dim: int):
        super().__init__()
        self.patch_size = (patch, patch)
        self.proj = nn.Conv2d(channels, dim, patch, stride=patch)
        self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x).flatten(2).transpose(1, 2))


# facebookresearch/DiT ---------------------------------------------------------------------------------------------


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


def modulation(dim: int, rows: int) -> nn.Module:
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, rows * dim))


class DiTBlock(nn.Module):
    attention: type[nn.Module] = Attention

    def __init__(self, dim: int, heads: int, mlp_ratio: float, **options):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.attn = self.attention(dim, heads, **options)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.adaLN_modulation = modulation(dim, 6)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate_msa.unsqueeze(1) * self.attn(modulate(self.norm1(x), shift_msa, scale_msa))
        return x + gate_mlp.unsqueeze(1) * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, patch: int, channels: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(dim, patch * patch * channels)
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class TimestepEmbedder(nn.Module):
    def __init__(self, dim: int, width: int = 32):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        half = self.width // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) * torch.arange(half, device=t.device) / half)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(next(self.mlp.parameters()).dtype))


class DiT(nn.Module):
    block: type[nn.Module] = DiTBlock

    def __init__(self, size=8, patch=2, channels=3, dim=48, depth=2, heads=3, mlp_ratio=2.5, **options):
        super().__init__()
        self.out_channels = 2 * channels
        self.x_embedder = PatchEmbed(patch, channels, dim)
        self.t_embedder = TimestepEmbedder(dim)
        self.y_embedder = nn.Embedding(11, dim)
        self.pos_embed = nn.Parameter(randn(1, (size // patch) ** 2, dim), requires_grad=False)
        self.blocks = nn.ModuleList(self.block(dim, heads, mlp_ratio, **options) for _ in range(depth))
        self.final_layer = FinalLayer(dim, patch, self.out_channels)

    def unpatchify(self, x: Tensor) -> Tensor:
        c, p, side = self.out_channels, self.x_embedder.patch_size[0], int(x.shape[1] ** 0.5)
        image = torch.einsum("nhwpqc->nchpwq", x.reshape(x.shape[0], side, side, p, p, c))
        return image.reshape(x.shape[0], c, side * p, side * p)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))


# Vchitect/Latte: the same block in space and in time, its own copy of the attention ----------------------------------


class LatteAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, attention_mode: str = "math"):
        super().__init__()
        self.num_heads, self.scale, self.attention_mode = num_heads, (dim // num_heads) ** -0.5, attention_mode
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, c // self.num_heads).permute(2, 0, 3, 1, 4)
        if self.attention_mode == "flash":  # heads before tokens: the repository's own order
            o = F.scaled_dot_product_attention(q, k, v).reshape(b, n, c)
        else:
            o = (self.attn_drop((q @ k.mT * self.scale).softmax(dim=-1)) @ v).transpose(1, 2).reshape(b, n, c)
        return self.proj_drop(self.proj(o))


class LatteBlock(DiTBlock):
    attention = LatteAttention


class Latte(DiT):
    block = LatteBlock

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        b, f = x.shape[:2]
        x = self.x_embedder(x.flatten(0, 1)) + self.pos_embed
        c, n = self.t_embedder(t) + self.y_embedder(y), x.shape[1]
        for space, time in zip(self.blocks[::2], self.blocks[1::2], strict=True):
            x = space(x, c.repeat_interleave(f, dim=0))
            x = x.unflatten(0, (b, f)).transpose(1, 2).flatten(0, 1)
            x = time(x, c.repeat_interleave(n, dim=0))
            x = x.unflatten(0, (b, n)).transpose(1, 2).flatten(0, 1)
        return self.unpatchify(self.final_layer(x, c.repeat_interleave(f, dim=0))).unflatten(0, (b, f))


# ------------------------------------------------------------------------------------------------------------------


def dit(kind: type[DiT] = DiT, **config) -> Any:
    return randomize(kind(**config))


def inputs(*frames: int) -> dict[str, Any]:
    return dict(x=randn(2, *frames, 3, 8, 8), t=torch.tensor([3.0, 987.0]), y=torch.tensor([1, 10]))


def call(model: Any, given: dict[str, Any]) -> Tensor:
    return model(**given)


LAYERS = {
    "DiT block (facebookresearch)": 2,
    "attention (timm)": 2,
    "activation (nn.GELU)": 2,
    "patch embedding (Conv2d, kernel = stride)": 1,
    "DiT final layer (facebookresearch)": 1,
    "unpatchify (facebookresearch/DiT)": 1,
}


def model(name: str, build, given=inputs, layers=LAYERS, **more) -> Model:
    return Model(name, "dit_native", build, given, layers, call=call, keeps=("t",), fixed=("t",), **more)


MODELS = (
    model("facebookresearch/DiT", dit),
    model("facebookresearch/DiT, norms of q and k, attention not fused", lambda: dit(qk_norm=True, fused=False)),
    model("Vchitect/Latte", lambda: dit(Latte), lambda: inputs(3)),
    model(
        "Vchitect/Latte, attention_mode flash",
        lambda: dit(Latte, attention_mode="flash"),
        lambda: inputs(3),
        {name: count for name, count in LAYERS.items() if name != "attention (timm)"},
        kept={"attention (timm)": "its forward computes something else"},
    ),
)


def block(dtype: torch.dtype, device: str) -> Run:
    x, c = randn(2, 1024, 1152).to(device, dtype), randn(2, 1152).to(device, dtype)

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            return model.blocks[0](x, c)

    return run


ROWS = (
    Whole(
        "facebookresearch DiT-XL/2 block",
        "2x1024x1152, one block",
        lambda: dit(size=64, dim=1152, depth=1, heads=16, mlp_ratio=4),
        block,
        compile=lambda model: model.blocks[0].compile(dynamic=False),
    ),
)
