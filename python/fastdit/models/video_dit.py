"""A Diffusion Transformer for video of any length and size, conditioned on text, over `fastdit.ops`.

Samples are packed: spacetime patches of every video (an image is one frame), with its text tokens in joint mode, form
one segment of one sequence; no padding anywhere. Under `fastdit.use_backend("reference")` it is plain PyTorch.

Shapes: S samples; N tokens of all of them; C channels (hidden_size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit import ops
from fastdit.models import video_layout as layouts
from fastdit.models.dit import DIT_CONFIGS, TimestepEmbedder
from fastdit.models.text import Text
from fastdit.nn import DiTBlock, FinalLayer, PatchEmbed3d
from fastdit.packing import Grid, packed

CHOICES: dict[str, tuple[str | None, ...]] = {
    "conditioning": ("in_context", "cross_attention", "adaln", "adaln_zero"),
    "text": ("joint", "cross", None),
    "positions": ("rope", "sincos"),
    "tubelet": ("xavier", "central"),
    "qk_norm": ("rms", "layer", None),
}


@dataclass(frozen=True)
class VideoDiTConfig:
    """What a `VideoDiT` is made of. Default: 3.9 million parameters.

    in_channels, hidden_size, depth, num_heads, mlp_ratio: as in `DiT`. learn_sigma: twice as many output channels.
    patch_size: (pt, ph, pw), or one number p for (1, p, p). tubelet: the patch embedding at the start, "xavier", or
        "central": an image's at the central frame of a patch, zeros at the others (ViViT, arXiv 2103.15691).
    conditioning: how the timestep and the pooled text reach a block. "adaln_zero", "adaln": shift and scale, with and
        without gates; "in_context": a token at the end of each sample, dropped at the end; "cross_attention": a token
        that every block attends to.
    text: how the words do. "joint": tokens of the sample, after its patches; "cross": tokens that every block attends
        to; None: there is no text. text_size: channels of `Text`.
    cond_size: width of the conditioning vector of adaLN; narrower than hidden_size it keeps the modulation small.
    positions: "rope", rotations over (t, h, w) with `rope_theta`; "sincos", added to the patches.
    qk_norm: of the heads of queries and keys. gradient_checkpointing: blocks are computed again in the backward.
    """

    in_channels: int = 8
    hidden_size: int = 192
    depth: int = 8
    num_heads: int = 3
    mlp_ratio: float = 4.0
    patch_size: int | tuple[int, int, int] = (1, 2, 2)
    conditioning: str = "adaln_zero"
    text: str | None = "joint"
    text_size: int = 128
    cond_size: int = 32
    positions: str = "rope"
    rope_theta: float = 256.0
    qk_norm: str | None = "rms"
    tubelet: str = "xavier"
    learn_sigma: bool = False
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        p = self.patch_size
        patch = (1, p, p) if isinstance(p, int) else tuple(p)
        object.__setattr__(self, "patch_size", patch)
        if len(patch) != 3 or min(patch) < 1:
            raise ValueError(f"VideoDiT: patch_size must be (pt, ph, pw); got {p!r}, expected three sizes >= 1.")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"VideoDiT: {name} is unknown; got {getattr(self, name)!r}, expected one of {allowed}; choose one."
                )
        if self.hidden_size % self.num_heads or (self.positions == "rope" and self.head_size % 2):
            raise ValueError(
                f"VideoDiT: heads must have an even width; got hidden_size {self.hidden_size} for {self.num_heads} "
                f"heads, expected a multiple of {2 * self.num_heads}; change one of them."
            )
        if self.positions == "rope" and self.head_size < 8:
            raise ValueError(
                f"VideoDiT: a head is too narrow to rotate over three axes; got {self.head_size} channels, expected "
                "at least 8; use fewer heads or positions='sincos'."
            )
        if self.positions == "sincos" and self.hidden_size % 16:
            raise ValueError(
                f"VideoDiT: positions='sincos' needs hidden_size % 16 == 0; got {self.hidden_size}; change it."
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def rope_axes(self) -> tuple[int, int, int]:
        """Channels of a head that t, h, w rotate: a quarter for time (64: 16, 24, 24 as CogVideoX)."""
        t = self.head_size // 8 * 2
        w = (self.head_size - t) // 4 * 2
        return t, self.head_size - t - w, w

    @property
    def modulated(self) -> bool:
        return self.conditioning in ("adaln", "adaln_zero")

    @classmethod
    def from_name(cls, name: str, **kwargs) -> VideoDiTConfig:
        """The sizes of `DiT`: "DiT-S/2" ... "DiT-XL/8", with a conditioning vector as wide; kwargs override."""
        if name not in DIT_CONFIGS:
            raise ValueError(f"VideoDiT: unknown name; got {name!r}, expected one of {', '.join(DIT_CONFIGS)}.")
        size: dict[str, Any] = DIT_CONFIGS[name]
        return cls(**{**size, "cond_size": size["hidden_size"], **kwargs})


class VideoDiT(nn.Module):
    """Diffusion Transformer over packed spacetime patches.

    Args: config (VideoDiTConfig).
    Source: arXiv 2212.09748 (DiT), 2307.06304 (NaViT packing), 2103.15691 (ViViT tubelets), 2403.03206 (joint text).
    """

    def __init__(self, config: VideoDiTConfig | None = None):
        super().__init__()
        self.config = config = config or VideoDiTConfig()
        width, modulated = config.hidden_size, config.modulated
        self.patch_size: tuple[int, int, int] = config.patch_size  # type: ignore[assignment]
        self.out_channels = config.in_channels * (2 if config.learn_sigma else 1)
        self.gradient_checkpointing = config.gradient_checkpointing
        cond = config.cond_size if modulated else width
        crossed = config.text == "cross" or config.conditioning == "cross_attention"

        self.x_embedder = PatchEmbed3d(config.in_channels, width, self.patch_size)
        self.t_embedder = TimestepEmbedder(cond)
        self.pooled_embedder = nn.Linear(config.text_size, cond) if config.text else None
        self.text_embedder = nn.Linear(config.text_size, width) if config.text else None
        self.blocks = nn.ModuleList(
            DiTBlock(
                width, config.num_heads, config.mlp_ratio, conditioning=config.conditioning if modulated else None,
                cond_size=cond, context_size=width if crossed else None, qk_norm=config.qk_norm, precision="fp32",
            )
            for _ in range(config.depth)
        )  # fmt: skip
        self.final_layer = FinalLayer(
            width, math.prod(self.patch_size) * self.out_channels, cond_size=cond, modulated=modulated, precision="fp32"
        )
        self.initialize_weights()

    @classmethod
    def from_name(cls, name: str, **kwargs) -> VideoDiT:
        """`VideoDiT(VideoDiTConfig.from_name(name, **kwargs))`."""
        return cls(VideoDiTConfig.from_name(name, **kwargs))

    def initialize_weights(self) -> None:
        """As DiT: the output is zero, and with adaLN-Zero each block the identity."""
        identity = self.config.conditioning == "adaln_zero"
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.zeros_(module.bias)
            if "adaLN_modulation" in name or "final_layer" in name or (identity and name.endswith("cross.proj")):
                nn.init.zeros_(module.weight)
            elif name.startswith("t_embedder"):
                nn.init.normal_(module.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(module.weight)
        weight = self.x_embedder.proj.weight
        nn.init.xavier_uniform_(weight.flatten(1))
        if self.config.tubelet == "central":
            image = torch.empty_like(weight[:, :, 0])
            nn.init.xavier_uniform_(image.flatten(1))
            nn.init.zeros_(weight)
            weight.data[:, :, weight.shape[2] // 2] = image
        nn.init.zeros_(self.x_embedder.proj.bias)

    def grids(self, x: Tensor | Sequence[Tensor]) -> tuple[Grid, ...]:
        """Tokens of each sample along t, h, w. Raises: ValueError: sizes that the patches do not divide, channels."""
        shapes = [tuple(x.shape[1:])] if isinstance(x, Tensor) else [tuple(v.shape) for v in x]
        for shape in dict.fromkeys(shapes):
            if (
                len(shape) != 4
                or shape[0] != self.config.in_channels
                or any(n % p for n, p in zip(shape[1:], self.patch_size, strict=True))
            ):
                raise ValueError(
                    f"VideoDiT: a sample has the wrong size; got {list(shape)}, expected (C, T, H, W) with "
                    f"C = {self.config.in_channels} and T, H, W multiples of {self.patch_size}; crop or pad it."
                )
        pt, ph, pw = self.patch_size
        grids = tuple((t // pt, h // ph, w // pw) for _, t, h, w in shapes)
        return grids * len(x) if isinstance(x, Tensor) else grids

    def forward(
        self,
        x: Tensor | Sequence[Tensor],
        t: Tensor,
        text: Text | None = None,
        *,
        known_frames: int | Sequence[int] = 0,
        keep: Sequence[Tensor] | None = None,
    ) -> Any:
        """
        Args:
            x (Tensor[S, C, T, H, W], or a list of S Tensor[C, T, H, W] of any sizes): noisy latents.
            t (Tensor[S]): timesteps in [0, 1000], fractions too. text (Text): of the S prompts.
            known_frames (int, or one per sample): frames at the start that are given, without noise (image to video):
                their timestep is 0. Only for "adaln" and "adaln_zero".
            keep (S int64 Tensor[K_s], increasing): the tokens that take part, see `drop_tokens`; None is all.
        Returns:
            What x is, with `out_channels`; zeros at the tokens that do not take part.
        Raises:
            ValueError: sizes, counts, text where there is none or none where there is.
        """
        grids = self.grids(x)
        given = self._given(grids, known_frames)
        self._check(grids, t, text)
        cfg, device, samples = self.config, t.device, len(grids)

        c = self.t_embedder(t if given is None else torch.stack([torch.zeros_like(t), t], 1).flatten())
        words: list[tuple[Tensor, Sequence[int]]] = []
        if text is not None and self.pooled_embedder is not None and self.text_embedder is not None:
            pooled = self.pooled_embedder(text.pooled)
            c = c + (pooled if given is None else pooled.repeat_interleave(2, 0))
            words = [(self.text_embedder(text.tokens), text.lengths)]
        ones = [1] * samples
        after = (words if cfg.text == "joint" else []) + ([(c, ones)] if cfg.conditioning == "in_context" else [])
        context = ([(c, ones)] if cfg.conditioning == "cross_attention" else []) + (
            words if cfg.text == "cross" else []
        )

        lengths = [math.prod(grid) for grid in grids]
        tokens = self._embed(x, grids, device)
        extra = tuple(sum(n) for n in zip(*(n for _, n in after), strict=True)) if after else (0,) * samples
        layout, rows = self._layout(grids, given, extra, keep, device)
        if rows is not None:
            tokens = tokens.index_select(0, rows)
        tokens = layouts.interleave((tokens, layout.pieces[::2]), *after)
        options: dict[str, Any] = {"cu_seqlens": layout.cu_seqlens, "max_seqlen": layout.max_seqlen}
        options |= {"cos": layout.cos, "sin": layout.sin}
        if cfg.modulated:
            options |= {"c": c, "row_index": layout.row_index}
        if context:
            options |= self._context(context)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False, **options)
            else:
                tokens = block(tokens, **options)

        if cfg.modulated:
            tokens = self.final_layer(tokens, c, row_index=layout.row_index)
        else:
            tokens = self.final_layer(tokens)
        if after:
            tokens = torch.cat(tokens.split(layout.pieces)[::2])
        if rows is not None:
            tokens = tokens.new_zeros(sum(lengths), tokens.shape[1]).index_copy(0, rows, tokens)
        return self._unpatchify(tokens, grids, isinstance(x, Tensor), self.out_channels)

    def kept(self, x: Tensor | Sequence[Tensor], keep: Sequence[Tensor]) -> Any:
        """What x is with one channel: 1 at the pixels of the tokens that take part, 0 at the others. For the loss."""
        grids = self.grids(x)
        like = x if isinstance(x, Tensor) else x[0]
        mask = like.new_zeros(sum(math.prod(grid) for grid in grids), math.prod(self.patch_size))
        mask.index_fill_(0, self._rows(grids, keep)[0].to(like.device), 1.0)
        return self._unpatchify(mask, grids, isinstance(x, Tensor), 1)

    def _embed(self, x: Any, grids: tuple[Grid, ...], device: torch.device) -> Tensor:
        """Packed tokens (N, C) of the patches."""
        one, pos = isinstance(x, Tensor), None
        if self.config.positions == "sincos":
            tables = [layouts.sincos(self.config.hidden_size, grid, device) for grid in grids]
            pos = tables[0] if one else tables
        embedded = self.x_embedder(x, pos)
        return embedded.flatten(0, 1) if one else embedded.tokens

    def _unpatchify(self, tokens: Tensor, grids: tuple[Grid, ...], one: bool, channels: int) -> Any:
        if not one:
            return ops.unpatchify3d(tokens, grid=grids, patch=self.patch_size, channels=channels)
        return ops.unpatchify3d(
            tokens.unflatten(0, (len(grids), -1)), grid=grids[0], patch=self.patch_size, channels=channels
        )

    def _given(self, grids: tuple[Grid, ...], known_frames: int | Sequence[int]) -> tuple[int, ...] | None:
        """Tokens of each sample that belong to given frames; None where there are none at all."""
        known = [known_frames] * len(grids) if isinstance(known_frames, int) else list(known_frames)
        if not any(known):
            return None
        pt = self.patch_size[0]
        for frames, (t, _, _) in zip(known, grids, strict=True):
            if not 0 <= frames <= t * pt or frames % pt:
                raise ValueError(
                    f"VideoDiT: known_frames must be frames of the sample, in whole patches; got {frames} of {t * pt} "
                    f"frames, expected 0 to {t * pt} in steps of {pt}; change it."
                )
        if not self.config.modulated:
            raise ValueError(
                f"VideoDiT: known_frames needs a timestep for each frame; got conditioning {self.config.conditioning!r}"
                ", expected 'adaln' or 'adaln_zero'; the others have one timestep for each sample."
            )
        return tuple(frames // pt * h * w for frames, (_, h, w) in zip(known, grids, strict=True))

    def _check(self, grids: tuple[Grid, ...], t: Tensor, text: Text | None) -> None:
        if tuple(t.shape) != (len(grids),) or not grids:
            raise ValueError(
                f"VideoDiT: t must have one timestep per sample; got {list(t.shape)} for {len(grids)} samples, "
                f"expected [{len(grids)}]; expand it."
            )
        if (text is None) != (self.config.text is None):
            raise ValueError(
                f"VideoDiT: text does not fit the model; got {type(text).__name__} with text={self.config.text!r}, "
                "expected a Text for 'joint' and 'cross', None for None; encode '' for no prompt."
            )
        if text is not None and (len(text) != len(grids) or text.tokens.shape[1] != self.config.text_size):
            raise ValueError(
                f"VideoDiT: text does not fit the samples; got {len(text)} prompts of {text.tokens.shape[1]} channels, "
                f"expected {len(grids)} of {self.config.text_size}; encode one prompt for each."
            )

    def _rows(self, grids: tuple[Grid, ...], keep: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Places in the packed tokens of those that take part; the same for each sample on its own. On the host."""
        if len(keep) != len(grids):
            raise ValueError(f"VideoDiT: one keep per sample; got {len(keep)}, expected {len(grids)}; add the rest.")
        parts, shifted, start = [k.cpu() for k in keep], [], 0
        for k, grid in zip(parts, grids, strict=True):
            size = math.prod(grid)
            if k.numel() == 0 or int(k[0]) < 0 or int(k[-1]) >= size or bool((k[1:] <= k[:-1]).any()):
                raise ValueError(
                    f"VideoDiT: keep must be increasing places in a sample; got {k.tolist()[:8]}, expected at least "
                    f"one of 0 .. {size - 1}; see drop_tokens."
                )
            shifted.append(k + start)
            start += size
        return torch.cat(shifted), parts

    def _layout(
        self,
        grids: tuple[Grid, ...],
        given: tuple[int, ...] | None,
        extra: tuple[int, ...],
        keep: Sequence[Tensor] | None,
        device: torch.device,
    ) -> tuple[layouts.Layout, Tensor | None]:
        """The layout of the sequence, and the rows of the packed tokens that enter it; None is all."""
        axes = self.config.rope_axes if self.config.positions == "rope" else None
        if keep is None:
            return layouts.whole(grids, given, extra, axes, self.config.rope_theta, device), None
        rows, parts = self._rows(grids, keep)
        rows = rows.to(device)
        tables = None
        if axes is not None:
            whole = [layouts.rope(grid, axes, self.config.rope_theta, device) for grid in grids]
            tables = [(cos[k], sin[k]) for (cos, sin), k in zip(whole, (k.to(device) for k in parts), strict=True)]
        seen = None if given is None else [int((k < g).sum()) for k, g in zip(parts, given, strict=True)]
        return layouts.build([k.numel() for k in parts], seen, extra, tables, device), rows

    @staticmethod
    def _context(parts: list[tuple[Tensor, Sequence[int]]]) -> dict[str, Any]:
        lengths = [sum(n) for n in zip(*(n for _, n in parts), strict=True)]
        p = packed(layouts.interleave(*parts), [(1, 1, n) for n in lengths])
        return {"context": p.tokens, "context_cu_seqlens": p.cu_seqlens, "context_max_seqlen": p.max_seqlen}
