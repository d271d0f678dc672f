"""Settings of a training, from a TOML file: tables `[vae]` and `[dit]`, each with `model`, `optimizer` and `loop`.

`load("shapes")` reads a built-in file, `load("my.toml")` one of your own. What a file leaves out keeps its default; an
unknown key, a wrong type or an impossible value is an error that names the key.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from fastdit.diffusion import GaussianDiffusion, RectifiedFlow
from fastdit.models.video_dit import VideoDiTConfig
from fastdit.models.video_vae import VideoVAEConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Size = tuple[int, int, int]  # frames, height, width
T = TypeVar("T")


@dataclass(frozen=True)
class Optimizer:
    """lr rises linearly over `warmup` steps, then stays, or falls as a cosine to `final` * lr at the last step.

    kind: "adamw", or "muon" for the matrices of a transformer's blocks and the kernels of a VAE's, with `muon_lr` in
    place of lr, and AdamW for the rest. On the small models of "shapes" the DiT takes half the steps to the same loss,
    each a sixth longer, and the VAE a third, each an eighth longer.
    clip: largest norm of the gradient, 0 for none. ema: decay of the averaged weights, which are the ones that are
    evaluated and kept; 0 for none. Early on the average forgets faster: min(ema, (1 + step) / (10 + step)).
    """

    kind: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-4
    muon_lr: float = 0.02
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final: float = 0.0
    clip: float = 1.0
    ema: float = 0.999


@dataclass(frozen=True)
class Loop:
    """seed alone decides every draw: step n is the same in every run. bf16: autocast, with fp32 weights.

    accumulate: parts that a step's batch is worked through in. checkpointing: activations are computed again in the
    backward pass. Every `..._every` counts steps, 0 for never; with a log line, a checkpoint is also written when the
    last is `save_minutes` old.
    """

    steps: int = 10_000
    seed: int = 0
    bf16: bool = False
    accumulate: int = 1
    checkpointing: bool = False
    log_every: int = 20
    evaluate_every: int = 500
    save_every: int = 0
    save_minutes: float = 5.0


@dataclass(frozen=True)
class VAETraining:
    """loss = l1 * |error| + l2 * error^2 + kl * KL, means over the values of a video and of its latent.

    `clips` videos are held in memory, their sizes taken in turn from `sizes`; a step takes `pixels` of them, cut at
    random places to one of `crops`. `held_out` others measure PSNR.
    """

    model: VideoVAEConfig = field(default_factory=VideoVAEConfig)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loop: Loop = field(default_factory=Loop)
    clips: int = 512
    held_out: int = 32
    sizes: tuple[Size, ...] = ((17, 64, 64),)
    crops: tuple[Size, ...] = ((17, 64, 64), (5, 64, 64), (1, 64, 64))
    pixels: int = 2 * 17 * 64 * 64
    l1: float = 1.0
    l2: float = 0.0
    kl: float = 1e-4


@dataclass(frozen=True)
class TextTraining:
    """The built-in word encoder, trained along; or transformers' T5 or CLIP from a folder `path`, which is not.

    Its width is `model.text_size`.
    """

    depth: int = 2
    path: str = ""


@dataclass(frozen=True)
class Diffusion:
    """kind "flow": shift, and times "logit_normal" or "uniform"; kind "ddpm": schedule, prediction, learn_sigma."""

    kind: Literal["flow", "ddpm"] = "flow"
    shift: float = 1.0
    times: Literal["logit_normal", "uniform"] = "logit_normal"
    schedule: Literal["linear", "cosine"] = "cosine"
    prediction: Literal["eps", "x0", "v"] = "v"
    learn_sigma: bool = False

    def build(self) -> RectifiedFlow | GaussianDiffusion:
        if self.kind == "flow":
            return RectifiedFlow(shift=self.shift, times=self.times)
        return GaussianDiffusion(schedule=self.schedule, prediction=self.prediction, learn_sigma=self.learn_sigma)


@dataclass(frozen=True)
class DiTTraining:
    """`clips` videos are encoded once, their sizes taken in turn from `sizes`; one frame makes an image.

    A step packs samples until `tokens` patches are full. Of the samples, `drop_text` lose their prompt (guidance needs
    it), `rich` take a long caption instead of the short one, and `known_frame` of the videos are given their first
    latent frame (image to video). `held_out` others measure the loss.
    """

    model: VideoDiTConfig = field(default_factory=VideoDiTConfig)
    text: TextTraining = field(default_factory=TextTraining)
    diffusion: Diffusion = field(default_factory=Diffusion)
    optimizer: Optimizer = field(default_factory=Optimizer)
    loop: Loop = field(default_factory=Loop)
    clips: int = 4096
    held_out: int = 64
    sizes: tuple[Size, ...] = ((17, 64, 64), (1, 64, 64))
    tokens: int = 2048
    drop_text: float = 0.1
    rich: float = 0.5
    known_frame: float = 0.2

    def __post_init__(self) -> None:
        learned = self.diffusion.kind == "ddpm" and self.diffusion.learn_sigma
        if self.model.learn_sigma != learned:
            raise ValueError(
                f"the model and the diffusion disagree; got model.learn_sigma {self.model.learn_sigma} for a diffusion "
                f"that needs {learned}; correct one of them."
            )


@dataclass(frozen=True)
class Config:
    """A file. fps: frames per second of the videos."""

    fps: float = 8.0
    vae: VAETraining = field(default_factory=VAETraining)
    dit: DiTTraining = field(default_factory=DiTTraining)


# Settings that may be anything; every other number is positive, and these are not negative.
_ZERO_ALLOWED = (
    "seed", "weight_decay", "warmup", "final", "clip", "ema", "log_every", "evaluate_every", "save_every",
    "save_minutes", "l1", "l2", "kl", "drop_text", "rich", "known_frame", "betas",
)  # fmt: skip
_SHARES = ("ema", "final", "drop_text", "rich", "known_frame", "betas")


def names() -> list[str]:
    """The built-in configurations."""
    folder = resources.files("fastdit.training") / "configs"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load(name: str | Path) -> Config:
    """The configuration in a TOML file, or a built-in one by its name."""
    path = Path(name)
    if str(name) in names():
        text = (resources.files("fastdit.training") / "configs" / f"{name}.toml").read_text(encoding="utf-8")
    elif path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"config: no such configuration; got {str(name)!r}, expected one of {', '.join(names())} or a TOML file."
        )
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"config: {name} is not TOML; got {error}, expected key = value lines.") from None
    return build(Config, table)


def build(kind: type[T], table: Mapping[str, Any], where: str = "") -> T:
    """A dataclass of a table; `where` is the table's name in errors."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in table.items():
        at = f"{where}.{key}" if where else key
        if key not in fields:
            raise ValueError(f"config: unknown key {at}; got {key!r}, expected one of {', '.join(sorted(fields))}.")
        values[key] = _value(hints[key], value, at)
        if kind.__module__ == __name__:
            _check_range(key, values[key], at)
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: [{where or 'the file'}]: {error}") from error


def table(config: Any) -> dict[str, Any]:
    """The inverse of `build`, of types that TOML and JSON know."""
    return {
        f.name: table(value) if dataclasses.is_dataclass(value) else _plain(value)
        for f in dataclasses.fields(config)
        if (value := getattr(config, f.name)) is not None
    }


def changes(before: Mapping[str, Any], after: Mapping[str, Any], where: str = "") -> list[str]:
    """What differs between two tables: "dit.optimizer.lr: 0.0001 -> 0.0002"."""
    found = []
    for key in {**before, **after}:
        a, b, at = before.get(key), after.get(key), f"{where}.{key}" if where else key
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += changes(a, b, at)
        elif a != b:
            found.append(f"{at}: {a} -> {b}")
    return found


def _plain(value: Any) -> Any:
    return [_plain(v) for v in value] if isinstance(value, (tuple, list)) else value


def _value(hint: Any, value: Any, at: str) -> Any:
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Union or origin is types.UnionType:
        for option in options:
            try:
                return _value(option, value, at)
            except ValueError as error:
                problem = error
        raise problem
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return build(typing.cast(type, hint), value, at)
    if origin is Literal and value in options:
        return value
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = options[:1] * len(value) if options[1:] == (...,) else options
        if len(kinds) == len(value):
            return tuple(_value(k, v, f"{at}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and type(value) in (int, float):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    expected = ", ".join(map(repr, options)) if origin is Literal else getattr(hint, "__name__", str(hint))
    if origin is tuple:
        expected = f"{hint}".replace("typing.", "")
    raise ValueError(f"config: wrong value of {at}; got {value!r}, expected {expected}.")


def _check_range(key: str, value: Any, at: str) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, tuple):
            _check_range(key, number, at)
        elif isinstance(number, (int, float)) and not isinstance(number, bool):
            zero, share = key in _ZERO_ALLOWED, key in _SHARES
            if number < 0 or (number == 0 and not zero) or (share and number > 1):
                expected = "0 to 1" if share else "0 or more" if zero else "more than 0"
                raise ValueError(f"config: {at} is out of range; got {number}, expected {expected}.")
