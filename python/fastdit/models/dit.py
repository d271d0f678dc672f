"""The Diffusion Transformer (arXiv 2212.09748) for images and video, over `fastdit.ops`.

The parameters carry the names and shapes of facebookresearch/DiT, so its checkpoints load strictly.
Under `fastdit.use_backend("reference")` the whole model is plain PyTorch.

Shapes: B samples, N = T*H*W tokens of a grid, C channels (hidden_size).
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fastdit import ops
from fastdit.nn import DiTBlock, FinalLayer, PatchEmbed3d

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")

DIT_CONFIGS = {
    f"DiT-{size}/{patch}": dict(hidden_size=c, depth=depth, num_heads=heads, patch_size=patch)
    for size, c, depth, heads in (("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1152, 28, 16))
    for patch in (2, 4, 8)
}


def sincos_pos_embed(width: int, grid: tuple[int, ...]) -> Tensor:
    """Fixed sine-cosine positions of a token grid, (N, width) in fp32, tokens in row-major order.

    An image grid (H, W) gives [x | y], half of the channels each, as DiT does; a video grid (T, H, W) gives
    [t | x | y] with a quarter for time, as CogVideoX does. Each part is [sin | cos].
    """
    axes = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    shares = [(axes[-1], width // 2), (axes[-2], width // 2)]
    if len(grid) == 3:
        shares = [(axes[0], width // 4), (axes[2], width * 3 // 8), (axes[1], width * 3 // 8)]
    parts = []
    for position, channels in shares:
        frequency = 10000.0 ** (-torch.arange(channels // 2, dtype=torch.float64) / (channels / 2))
        angle = position.reshape(-1, 1) * frequency
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, dim=1).float()


def timestep_embedding(t: Tensor, width: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoidal embedding [cos | sin] of timesteps (B,), possibly fractional: (B, width) in fp32."""
    half = width // 2
    frequency = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class TimestepEmbedder(nn.Module):
    def __init__(self, hidden_size: int, frequency_size: int = 256):
        super().__init__()
        self.frequency_size = frequency_size
        self.mlp = nn.Sequential(nn.Linear(frequency_size, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(timestep_embedding(t, self.frequency_size).to(next(self.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """One row per class, and one more for "no class": classifier-free guidance drops labels to it in training."""

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float):
        super().__init__()
        self.num_classes = num_classes
        self.dropout_prob = dropout_prob
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        if self.training and self.dropout_prob > 0:
            drop = torch.rand(y.shape[0], device=y.device) < self.dropout_prob
            y = torch.where(drop, self.num_classes, y)
        return self.embedding_table(y)


class DiT(nn.Module):
    """Diffusion Transformer conditioned on a timestep and a class label.

    Args:
        input_size (int, (H, W) or (T, H, W)): size of the latent; an int is a square image. Three numbers make a
            video model, whose tokens are spacetime patches.
        patch_size (int or as many numbers as input_size): size of one token. An int is square, one frame long.
        in_channels, hidden_size, depth, num_heads, mlp_ratio: as in the paper. Defaults: DiT-XL/2.
        class_dropout_prob (float): labels dropped in training; above 0 adds the "no class" row.
        learn_sigma (bool): twice as many output channels: noise, then variance.
        conditioning: how the embeddings of t and y reach the blocks. "adaln_zero" and "adaln": their sum gives shift
            and scale, with gates that start closed and without gates; "cross_attention": two tokens that every block
            attends to; "in_context": two tokens after the patches, dropped at the end. The last two have plain norms.

    Shapes:
        x (B, in_channels, [T,] H, W), t (B,) timesteps, y (B,) labels -> (B, out_channels, [T,] H, W)

    Cost: depth * (24 * C^2 * N + 4 * C * N^2) FLOPs per sample (mlp_ratio 4).
    """

    def __init__(
        self,
        input_size: int | tuple[int, ...] = 32,
        patch_size: int | tuple[int, ...] = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        class_dropout_prob: float = 0.1,
        num_classes: int = 1000,
        learn_sigma: bool = True,
        conditioning: str = "adaln_zero",
    ):
        super().__init__()
        self.input_size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if isinstance(patch_size, int):
            patch_size = (1, patch_size, patch_size)[-len(self.input_size) :]
        self.patch_size = tuple(patch_size)
        if len(self.patch_size) != len(self.input_size) or any(
            n % p for n, p in zip(self.input_size, self.patch_size, strict=False)
        ):
            raise ValueError(
                f"DiT: patch_size must divide input_size axis by axis; got patch_size {self.patch_size}, "
                f"input_size {self.input_size}; use two numbers for images and three for video."
            )
        if hidden_size % num_heads:
            raise ValueError(
                f"DiT: num_heads must divide hidden_size; got {num_heads} heads, hidden_size {hidden_size}."
            )
        if conditioning not in CONDITIONINGS:
            raise ValueError(
                f"DiT: conditioning is unknown; got {conditioning!r}, expected one of {CONDITIONINGS}; choose one."
            )
        self.conditioning = conditioning
        modulated = conditioning.startswith("adaln")
        self.in_channels = in_channels
        self.out_channels = in_channels * 2 if learn_sigma else in_channels
        self.grid = tuple(n // p for n, p in zip(self.input_size, self.patch_size, strict=True))

        self.x_embedder = PatchEmbed3d(in_channels, hidden_size, self.patch_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid), hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(
            DiTBlock(
                hidden_size, num_heads, mlp_ratio, conditioning=conditioning if modulated else None,
                context_size=hidden_size if conditioning == "cross_attention" else None,
            )
            for _ in range(depth)
        )  # fmt: skip
        self.final_layer = FinalLayer(hidden_size, math.prod(self.patch_size) * self.out_channels, modulated=modulated)
        self.initialize_weights()

    @classmethod
    def from_name(cls, name: str, **kwargs) -> "DiT":
        """The paper's models: `DiT.from_name("DiT-XL/2")`, sizes S, B, L, XL, patches 2, 4, 8; kwargs override."""
        if name not in DIT_CONFIGS:
            raise ValueError(f"DiT: unknown name; got {name!r}, expected one of {', '.join(DIT_CONFIGS)}.")
        return cls(**{**DIT_CONFIGS[name], **kwargs})

    def initialize_weights(self) -> None:
        """The paper's initialisation: each adaLN-Zero block starts as the identity, the output at zero."""
        for name, parameter in self.named_parameters():
            if name.endswith("weight") and parameter.ndim == 1:
                nn.init.ones_(parameter)  # of a norm
            elif name == "pos_embed":
                parameter.data.copy_(sincos_pos_embed(parameter.shape[-1], self.grid))
            elif "adaLN_modulation" in name or "final_layer" in name or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith(("t_embedder", "y_embedder")):
                nn.init.normal_(parameter, std=0.02)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1))  # the patch embedding too, as the linear it is

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """(B, N, prod(patch) * out_channels) -> (B, out_channels, [T,] H, W)"""
        image = len(self.grid) == 2
        t, h, w = (1, *self.grid) if image else self.grid
        patch = (1, *self.patch_size) if image else self.patch_size
        x = ops.unpatchify3d(tokens, grid=(t, h, w), patch=patch, channels=self.out_channels, order="thwc")
        return x.squeeze(2) if image else x

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if tuple(x.shape[1:]) != (self.in_channels, *self.input_size):
            raise ValueError(
                f"DiT: x has the wrong size; got {tuple(x.shape)}, expected (B, {self.in_channels}, "
                f"{', '.join(map(str, self.input_size))}); build the model with input_size={tuple(x.shape[2:])}."
            )
        tokens = self.x_embedder(x, self.pos_embed)
        conditions = (self.t_embedder(t), self.y_embedder(y))
        c: Tensor | None = None
        context: dict[str, Any] = {}
        if self.conditioning == "in_context":
            tokens = torch.cat([tokens, torch.stack(conditions, dim=1)], dim=1)
        elif self.conditioning == "cross_attention":
            context = {"context": torch.stack(conditions, dim=1)}
        else:
            c = conditions[0] + conditions[1]
        for block in self.blocks:
            tokens = block(tokens, c, **context)
        tokens = tokens[:, : math.prod(self.grid)]
        return self.unpatchify(self.final_layer(tokens, c))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, channels: int = 3) -> Tensor:
        """Classifier-free guidance: the first half of the batch is conditional, the second half unconditional.

        Both halves see the first half's x. As in the original, guidance acts on the first three channels.
        """
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        cond, uncond = out[:, :channels].chunk(2)
        guided = uncond + cfg_scale * (cond - uncond)
        return torch.cat([torch.cat([guided, guided]), out[:, channels:]], dim=1)
