"""A Diffusion Transformer for video of any length and size, conditioned on text, over `fastdit.ops`.

Samples are packed: spacetime patches of every video (an image is one frame), with its text tokens in joint mode, form
one segment of one sequence; no padding anywhere. Under `fastdit.use_backend("reference")` it is plain PyTorch.

Shapes: S samples; N tokens of all of them; C channels (hidden_size).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdit import ops
from fastdit.models import video_layout as layouts
from fastdit.models.dit import TimestepEmbedder
from fastdit.models.text import Text
from fastdit.models.video_config import VideoDiTConfig
from fastdit.nn import DiTBlock, FinalLayer, PatchEmbed3d
from fastdit.packing import Grid, packed


class VideoDiT(nn.Module):
    """Diffusion Transformer over packed spacetime patches.

    Args: config (VideoDiTConfig). `gradient_checkpointing` of the model may be changed at any time.
    Shapes: x, S videos of in_channels, t (S,), text of S prompts -> like x with out_channels; see `forward`.
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
        cfg, samples = self.config, len(grids)

        c = self.t_embedder(t if given is None else torch.stack([torch.zeros_like(t), t], 1).flatten())
        words: list[layouts.Kind] = []
        if text is not None and self.pooled_embedder is not None and self.text_embedder is not None:
            pooled = self.pooled_embedder(text.pooled)
            c = c + (pooled if given is None else pooled.repeat_interleave(2, 0))
            words = [(self.text_embedder(text.tokens), text.lengths)]
        ones = [1] * samples
        after: list[layouts.Kind] = [*words] if cfg.text == "joint" else []
        after += [(c, ones)] if cfg.conditioning == "in_context" else []
        context: list[layouts.Kind] = [(c, ones)] if cfg.conditioning == "cross_attention" else []
        context += words if cfg.text == "cross" else []

        tokens = self._embed(x, grids)
        extra = tuple(sum(n) for n in zip(*(n for _, n in after), strict=True)) if after else (0,) * samples
        where = (grids, given, extra, cfg.rope_axes if "rope" in cfg.positions else None, cfg.rope_theta, tokens.device)
        layout = layouts.whole(*where) if keep is None else layouts.partial(*where, keep)
        if layout.rows is not None:
            tokens = tokens.index_select(0, layout.rows)
        tokens = layouts.interleave((tokens, layout.pieces[::2]), *after)
        options: dict[str, Any] = {"cu_seqlens": layout.cu_seqlens, "max_seqlen": layout.max_seqlen}
        options |= {"cos": layout.cos, "sin": layout.sin}
        if cfg.modulated:
            options |= {"c": c, "row_index": layout.row_index}
        if context:
            options |= self._context(context)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, use_reentrant=False, preserve_rng_state=False, **options)
            else:
                tokens = block(tokens, **options)

        if cfg.modulated:
            tokens = self.final_layer(tokens, c, row_index=layout.row_index)
        else:
            tokens = self.final_layer(tokens)
        if after:
            tokens = torch.cat(tokens.split(layout.pieces)[::2])
        if layout.rows is not None:
            tokens = tokens.new_zeros(layouts.count(grids), tokens.shape[1]).index_copy(0, layout.rows, tokens)
        return self._unpatchify(tokens, grids, isinstance(x, Tensor), self.out_channels)

    def kept(self, x: Tensor | Sequence[Tensor], keep: Sequence[Tensor]) -> Any:
        """What x is with one channel: 1 at the pixels of the tokens that take part, 0 at the others. For the loss."""
        grids = self.grids(x)
        like = x if isinstance(x, Tensor) else x[0]
        mask = like.new_zeros(layouts.count(grids), math.prod(self.patch_size))
        mask.index_fill_(0, layouts.places(grids, keep)[0].to(like.device), 1.0)
        return self._unpatchify(mask, grids, isinstance(x, Tensor), 1)

    def _embed(self, x: Any, grids: tuple[Grid, ...]) -> Tensor:
        """Packed tokens (N, C) of the patches."""
        one, pos = isinstance(x, Tensor), None
        if "sincos" in self.config.positions:
            device = self.x_embedder.proj.weight.device
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
        if len(known) != len(grids):
            raise ValueError(
                f"VideoDiT: one known_frames per sample; got {len(known)}, expected {len(grids)}; or pass one int."
            )
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

    @staticmethod
    def _context(parts: list[layouts.Kind]) -> dict[str, Any]:
        lengths = [sum(n) for n in zip(*(n for _, n in parts), strict=True)]
        p = packed(layouts.interleave(*parts), [(1, 1, n) for n in lengths])
        return {"context": p.tokens, "context_cu_seqlens": p.cu_seqlens, "context_max_seqlen": p.max_seqlen}
