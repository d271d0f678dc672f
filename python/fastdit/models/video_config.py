"""What a `VideoDiT` is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastdit.models.dit import DIT_CONFIGS

CHOICES: dict[str, tuple[str | None, ...]] = {
    "conditioning": ("in_context", "cross_attention", "adaln", "adaln_zero"),
    "text": ("joint", "cross", None),
    "positions": ("rope", "sincos", "rope+sincos"),
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
    positions: "rope", rotations over (t, h, w) with `rope_theta`; "sincos", added to the patches; "rope+sincos", both:
        rotations tell patches from each other, and only what is added tells the middle from the border.
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
        if self.hidden_size % self.num_heads or ("rope" in self.positions and self.head_size % 2):
            raise ValueError(
                f"VideoDiT: heads must have an even width; got hidden_size {self.hidden_size} for {self.num_heads} "
                f"heads, expected a multiple of {2 * self.num_heads}; change one of them."
            )
        if "rope" in self.positions and self.head_size < 8:
            raise ValueError(
                f"VideoDiT: a head is too narrow to rotate over three axes; got {self.head_size} channels, expected "
                "at least 8; use fewer heads or positions='sincos'."
            )
        if "sincos" in self.positions and self.hidden_size % 16:
            raise ValueError(
                f"VideoDiT: positions={self.positions!r} needs hidden_size % 16 == 0; got {self.hidden_size}; "
                "change it."
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
