"""Wan's own repositories, written anew: same parts, names and arithmetic; attention in plain PyTorch.

The originals need flash-attn and a GPU. They run under autocast, their weights in bf16.
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

TEXT = 512  # text tokens in the context of image to video; the CLIP tokens stand before them


def autocast(x: Tensor) -> Any:
    """Theirs is torch.cuda.amp.autocast(dtype=torch.float32): nothing on a CPU."""
    return torch.autocast("cuda", dtype=torch.float32, enabled=x.is_cuda)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, k_lens: Tensor | None = None, window_size=(-1, -1)) -> Tensor:
    """Keys of sample b behind k_lens[b] do not exist; q and k in the dtype of v, the result in that of q."""
    dtype, (q, k) = q.dtype, (q.to(v.dtype), k.to(v.dtype))
    lens = [k.shape[1]] * len(k) if k_lens is None else k_lens.tolist()
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = [
        F.scaled_dot_product_attention(q[i : i + 1], k[i : i + 1, :, :n], v[i : i + 1, :, :n])
        for i, n in enumerate(lens)
    ]
    return torch.cat(out).transpose(1, 2).to(dtype)


def rope_table(positions: int, dim: int) -> Tensor:
    angles = torch.outer(torch.arange(positions).double(), 10000.0 ** (-torch.arange(0, dim, 2).double() / dim))
    return torch.polar(torch.ones_like(angles), angles)


def rotated(x: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
    third = freqs.shape[1] // 3
    axes = freqs.split([freqs.shape[1] - 2 * third, third, third], dim=1)
    out = []
    for sample, (f, h, w) in zip(x, grid_sizes.tolist(), strict=True):
        n = f * h * w
        grid = torch.cat([
            axes[0][:f, None, None].expand(f, h, w, -1),
            axes[1][None, :h, None].expand(f, h, w, -1),
            axes[2][None, None, :w].expand(f, h, w, -1),
        ], dim=-1).view(n, 1, -1)  # fmt: skip
        pairs = torch.view_as_complex(sample[:n].double().unflatten(-1, (-1, 2)))
        out.append(torch.cat([torch.view_as_real(pairs * grid).flatten(2), sample[n:]]))
    return torch.stack(out).float()


class WanRMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return self._norm(x.float()).type_as(x) * self.weight

    def _norm(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.eps)


class WanLayerNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))  # as CUDA's autocast does
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).type_as(x)


class WanSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6):
        super().__init__()
        self.dim, self.num_heads, self.head_dim, self.window_size = dim, num_heads, dim // num_heads, (-1, -1)
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = WanRMSNorm(dim, eps), WanRMSNorm(dim, eps)

    def forward(self, x: Tensor, seq_lens: Tensor, grid_sizes: Tensor, freqs: Tensor) -> Tensor:
        heads = (self.num_heads, self.head_dim)
        q, k = self.norm_q(self.q(x)).unflatten(2, heads), self.norm_k(self.k(x)).unflatten(2, heads)
        q, k = rotated(q, grid_sizes, freqs), rotated(k, grid_sizes, freqs)
        o = flash_attention(q, k, self.v(x).unflatten(2, heads), seq_lens, self.window_size)
        return self.o(o.flatten(2))


class WanT2VCrossAttention(WanSelfAttention):
    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:  # type: ignore[override]
        heads = (self.num_heads, self.head_dim)
        q, k = self.norm_q(self.q(x)).unflatten(2, heads), self.norm_k(self.k(context)).unflatten(2, heads)
        return self.o(flash_attention(q, k, self.v(context).unflatten(2, heads), context_lens).flatten(2))


class WanI2VCrossAttention(WanSelfAttention):
    def __init__(self, dim: int, num_heads: int):
        super().__init__(dim, num_heads)
        self.k_img, self.v_img, self.norm_k_img = nn.Linear(dim, dim), nn.Linear(dim, dim), WanRMSNorm(dim, 1e-6)

    def forward(self, x: Tensor, context: Tensor, context_lens: Tensor | None) -> Tensor:  # type: ignore[override]
        heads, image, context = (self.num_heads, self.head_dim), context[:, :-TEXT], context[:, -TEXT:]
        q, k = self.norm_q(self.q(x)).unflatten(2, heads), self.norm_k(self.k(context)).unflatten(2, heads)
        k_img, v_img = self.norm_k_img(self.k_img(image)).unflatten(2, heads), self.v_img(image).unflatten(2, heads)
        o = flash_attention(q, k, self.v(context).unflatten(2, heads), context_lens)
        return self.o(o.flatten(2) + flash_attention(q, k_img, v_img).flatten(2))


class WanAttentionBlock(nn.Module):
    """per_token: Wan 2.2's, whose e is (B, L, 6, C); Wan 2.1's is (B, 6, C)."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, image: bool = False, cross_attn_norm: bool = True):
        super().__init__()
        self.norm1 = WanLayerNorm(dim, 1e-6, elementwise_affine=False)
        self.self_attn = WanSelfAttention(dim, num_heads)
        self.norm3 = WanLayerNorm(dim, 1e-6) if cross_attn_norm else nn.Identity()
        self.cross_attn = (WanI2VCrossAttention if image else WanT2VCrossAttention)(dim, num_heads)
        self.norm2 = WanLayerNorm(dim, 1e-6, elementwise_affine=False)
        self.ffn = nn.Sequential(nn.Linear(dim, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    def rows(self, e: Tensor) -> tuple[Tensor, ...]:
        return (self.modulation + e).chunk(6, dim=1)

    def forward(self, x, e, seq_lens, grid_sizes, freqs, context, context_lens) -> Tensor:
        with autocast(x):
            rows = self.rows(e)
        y = self.self_attn(self.norm1(x).float() * (1 + rows[1]) + rows[0], seq_lens, grid_sizes, freqs)
        with autocast(x):
            x = x + y * rows[2]
        x = x + self.cross_attn(self.norm3(x), context, context_lens)
        y = self.ffn(self.norm2(x).float() * (1 + rows[4]) + rows[3])
        with autocast(x):
            return x + y * rows[5]


class Wan22AttentionBlock(WanAttentionBlock):
    def rows(self, e: Tensor) -> tuple[Tensor, ...]:
        return tuple(row.squeeze(2) for row in (self.modulation.unsqueeze(0) + e).chunk(6, dim=2))


class Head(nn.Module):
    def __init__(self, dim: int, out_dim: int, patch: tuple[int, ...]):
        super().__init__()
        self.norm = WanLayerNorm(dim, 1e-6, elementwise_affine=False)
        self.head = nn.Linear(dim, math.prod(patch) * out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        with autocast(x):
            rows = (self.modulation + e.unsqueeze(1)).chunk(2, dim=1)
            return self.head(self.norm(x) * (1 + rows[1]) + rows[0])


class Head22(Head):
    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        with autocast(x):
            rows = (self.modulation.unsqueeze(0) + e.unsqueeze(2)).chunk(2, dim=2)
            return self.head(self.norm(x) * (1 + rows[1].squeeze(2)) + rows[0].squeeze(2))


class Wan21(nn.Module):
    """WanModel of Wan 2.1; with clip_fea its image-to-video form."""

    block, last = WanAttentionBlock, Head

    def __init__(self, dim=48, ffn_dim=80, num_heads=3, num_layers=2, in_dim=4, text_dim=20, freq_dim=16, **options):
        super().__init__()
        self.model_type, self.patch_size, self.text_len = "t2v", (1, 2, 2), options.pop("text_len", 9)
        self.dim, self.freq_dim, self.out_dim = dim, freq_dim, in_dim
        self.patch_embedding = nn.Conv3d(in_dim, dim, self.patch_size, stride=self.patch_size)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        if options.get("image"):
            self.img_emb = nn.Linear(12, dim)
        self.blocks = nn.ModuleList(self.block(dim, ffn_dim, num_heads, **options) for _ in range(num_layers))
        self.head = self.last(dim, in_dim, self.patch_size)
        d = dim // num_heads
        self.freqs = torch.cat([rope_table(64, d - 4 * (d // 6)), *[rope_table(64, 2 * (d // 6))] * 2], dim=1)

    def embedded(self, t: Tensor) -> Tensor:
        half = self.freq_dim // 2
        angles = torch.outer(t.double(), 10000.0 ** (-torch.arange(half).to(t.device) / half).double())
        return self.time_embedding(torch.cat([angles.cos(), angles.sin()], dim=1).float())

    def run(self, x, e, e0, context, seq_len, clip_fea=None) -> list[Tensor]:
        x = [self.patch_embedding(u[None]) for u in x]
        grids = torch.tensor([u.shape[2:] for u in x])
        x = [u.flatten(2).transpose(1, 2) for u in x]
        seq_lens = torch.tensor([u.shape[1] for u in x])
        h = torch.cat([torch.cat([u, u.new_zeros(1, seq_len - u.shape[1], u.shape[2])], dim=1) for u in x])
        text = [torch.cat([u, u.new_zeros(self.text_len - len(u), u.shape[1])]) for u in context]
        tokens = self.text_embedding(torch.stack(text))
        if clip_fea is not None:
            tokens = torch.cat([self.img_emb(clip_fea), tokens], dim=1)
        for block in self.blocks:
            h = block(h, e=e0, seq_lens=seq_lens, grid_sizes=grids, freqs=self.freqs, context=tokens, context_lens=None)
        return self.unpatchify(self.head(h, e), grids)

    def unpatchify(self, x: Tensor, grid_sizes: Tensor) -> list[Tensor]:
        out = []
        for u, grid in zip(x, grid_sizes.tolist(), strict=True):
            u = u[: math.prod(grid)].view(*grid, *self.patch_size, self.out_dim)
            u = torch.einsum("fhwpqrc->cfphqwr", u)
            out.append(u.reshape(-1, *(n * p for n, p in zip(grid, self.patch_size, strict=True))).float())
        return out

    def forward(self, x, t, context, seq_len, clip_fea=None, y=None) -> list[Tensor]:
        with autocast(x[0]):
            e = self.embedded(t)
            e0 = self.time_projection(e).unflatten(1, (6, self.dim))
        return self.run(x, e, e0, context, seq_len, clip_fea)


class Wan22(Wan21):
    """WanModel of Wan 2.2: a timestep (B, L) per token, or (B,), which becomes one."""

    block, last = Wan22AttentionBlock, Head22

    def forward(self, x, t, context, seq_len, y=None) -> list[Tensor]:  # type: ignore[override]
        if y is not None:
            x = [torch.cat([u, v]) for u, v in zip(x, y, strict=True)]
        t = t[:, None].expand(len(t), seq_len) if t.dim() == 1 else t
        with autocast(x[0]):
            e = self.embedded(t.flatten()).unflatten(0, t.shape)
            e0 = self.time_projection(e).unflatten(2, (6, self.dim))
        return self.run(x, e, e0, context, seq_len)


# ------------------------------------------------------------------------------------------------------------------


def wan(kind: type[Wan21], **config) -> Any:
    return randomize(kind(**config))


def inputs(*grids: tuple[int, int, int], seq_len: int, per_token: bool = False, image: bool = False) -> dict[str, Any]:
    t = torch.tensor([987.0, 3.0][: len(grids)])
    if per_token:
        t = t[:, None] * torch.arange(seq_len).ge(6)
    given = dict(
        x=[randn(4, f, 2 * h, 2 * w, seed=i) for i, (f, h, w) in enumerate(grids)],
        t=t,
        context=[randn(n, 20, seed=9) for n in (7, 4)[: len(grids)]],
        seq_len=seq_len,
    )
    return given | (dict(clip_fea=randn(len(grids), 5, 12)) if image else {})


def call(model: Any, given: dict[str, Any]) -> Tensor:
    """As the pipelines do: bf16 weights under autocast."""
    with torch.autocast("cpu", torch.bfloat16, enabled=model.head.head.weight.dtype is torch.bfloat16):
        return torch.cat([video.flatten() for video in model(**given)])


LAYERS = {
    "WanAttentionBlock (Wan-Video)": 2,
    "attention (Wan-Video)": 4,
    "activation (nn.GELU)": 2,
    "patch embedding (Conv3d, kernel = stride)": 1,
    "head (Wan-Video)": 1,
}
FEW = {"WanModel (Wan-Video): few rows, unpatchify": 1}


def model(name: str, build, given, layers) -> Model:
    return Model(name, "wan_native", build, given, layers, call=call, keeps=("t",), fixed=("t",))


MODELS = (
    model("Wan-Video/Wan2.1", lambda: wan(Wan21), lambda: inputs((2, 3, 4), (2, 3, 4), seq_len=24), LAYERS),
    model(
        "Wan-Video/Wan2.1, image to video, two sizes",
        lambda: wan(Wan21, image=True, text_len=TEXT, cross_attn_norm=False),
        lambda: inputs((2, 3, 4), (1, 4, 3), seq_len=25, image=True),
        LAYERS,
    ),
    model("Wan-Video/Wan2.2", lambda: wan(Wan22), lambda: inputs((2, 3, 4), (1, 4, 3), seq_len=25), LAYERS | FEW),
    model(
        "Wan-Video/Wan2.2, a timestep per token",
        lambda: wan(Wan22),
        lambda: inputs((2, 3, 4), (2, 3, 4), seq_len=24, per_token=True),
        LAYERS | FEW,
    ),
)


def whole(dtype: torch.dtype, device: str) -> Run:
    """Wan 2.2's 5B, its pipeline's one timestep for all 1,920 tokens."""
    given = dict(
        x=[randn(48, 6, 32, 40).to(device)], t=torch.tensor([900.0], device=device),
        context=[randn(512, 4096).to(device, dtype)], seq_len=1920,
    )  # fmt: skip

    def run(model: Any) -> Tensor:
        with torch.no_grad():
            return call(model, given)

    return run


ROWS = (
    Whole(
        "Wan-Video/Wan2.2-5B",
        "1x1920x3072, one block, 512 text tokens",
        lambda: wan(
            Wan22, dim=3072, ffn_dim=14336, num_heads=24, num_layers=1, in_dim=48, text_dim=4096, freq_dim=256,
            text_len=512,
        ),
        whole,
    ),
)  # fmt: skip
