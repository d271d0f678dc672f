"""Folders of weights for generation, and the state that a training goes on from. Files are written whole or not at all.

DIR/config.json         what builds the models: {"format", "fps", "vae", "dit", "text", "diffusion"}
DIR/vae.safetensors     VideoVAE, with the mean and standard deviation of its latents
DIR/dit.safetensors     VideoDiT and its text encoder: keys `dit.*`, `text.*`
DIR/state/<task>/       training only: train.safetensors, loss.csv, loss.png, latents.safetensors
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastdit.data.files import replacing
from fastdit.diffusion import GaussianDiffusion, RectifiedFlow
from fastdit.models.text import PretrainedEncoder, WordEncoder
from fastdit.models.video_dit import VideoDiT, VideoDiTConfig
from fastdit.models.video_vae import VideoVAE, VideoVAEConfig
from fastdit.training import config as settings
from fastdit.training.config import Diffusion

FORMAT = 1
VAE, DIT = "vae.safetensors", "dit.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, does not fit, or cannot be written."""


@dataclass(frozen=True)
class Loaded:
    """What a folder holds. `dit` and `text` are None before a DiT is trained."""

    vae: VideoVAE
    dit: VideoDiT | None
    text: nn.Module | None
    diffusion: RectifiedFlow | GaussianDiffusion
    fps: float


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what a disk refuses into a CheckpointError."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        rest = "the one before is untouched" if path.exists() else "there is none yet"
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        raise CheckpointError(
            f"checkpoint: cannot write {path}; got {error}, expected room and permission to write; {rest}; "
            f"{'free space' if full else 'look at the folder'} and go on with --resume."
        ) from error


def write(path: Path, fill: Callable[[Path], object]) -> None:
    """Fill a file beside `path`, bring it to the disk and put it in the place of `path` at once.

    Raises:
        CheckpointError: the disk is full or refuses; what stood at `path` is untouched.
    """
    part = path.with_name(f".{path.name}.part")
    with writing(path), replacing(path, part):
        part.touch()
        mode = part.stat().st_mode  # as the umask has it; safetensors makes private files
        fill(part)
        part.chmod(mode)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    text = json.dumps(document, indent=1, ensure_ascii=False) + "\n"
    write(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
    """A safetensors file; `facts`, of JSON's types, stand in its header."""
    plain = {name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}
    header = {"facts": json.dumps(facts or {})}
    write(path, lambda part: safetensors.torch.save_file(plain, part, header))


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the facts of a file of `write_tensors`."""
    try:
        with safetensors.safe_open(path, "pt", device=str(device)) as file:
            facts = json.loads((file.metadata() or {})["facts"])
            return {name: file.get_tensor(name) for name in file.keys()}, facts
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint: there is no {path}; expected one of `fastdit train`; check it.") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: {path} is broken or not ours; got {error}, expected a whole file of fastdit's; "
            "copy it again or train it anew."
        ) from error


def digest(path: Path) -> str:
    """Identifies a file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load every weight of a model, none missing and none left over."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [n for n in own.keys() & tensors.keys() if own[n].shape != tensors[n].shape]
    if missing or extra or wrong:
        raise CheckpointError(
            f"checkpoint: {path} does not fit {type(model).__name__}; got {len(tensors)} tensors, without "
            f"{_few(missing)}, with {_few(extra)} too many, of other shapes {_few(sorted(wrong))}; expected {len(own)} "
            "by config.json; copy the folder again."
        )
    model.load_state_dict(tensors)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "none"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a folder."""
    path = folder / "config.json"
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            got = document.get("format") if isinstance(document, dict) else type(document).__name__
            raise ValueError(f"format {got}, expected {FORMAT}")
    except FileNotFoundError:
        raise CheckpointError(
            f"checkpoint: {folder} holds none; got no config.json, expected a folder of `fastdit train`; check it."
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint: {path} is broken; got {error}; copy it again or train it anew.") from error
    return document


def build_vae(document: Mapping[str, Any]) -> VideoVAE:
    return VideoVAE(settings.build(VideoVAEConfig, document["vae"], "vae"))


def build_text(document: Mapping[str, Any], width: int) -> nn.Module:
    """The encoder that config.json's "text" describes."""
    text = document["text"]
    return PretrainedEncoder(text["path"]) if text.get("path") else WordEncoder(text["words"], width, text["depth"])


def load_vae(folder: Path | str) -> VideoVAE:
    """The VAE of a folder, in eval mode."""
    folder = Path(folder)
    return _vae(folder, read_config(folder))


def _vae(folder: Path, document: Mapping[str, Any]) -> VideoVAE:
    vae = _built(folder, "vae", lambda: build_vae(document))
    fill(vae, read_tensors(folder / VAE)[0], folder / VAE)
    return vae.eval()


def load(folder: Path | str) -> Loaded:
    """Everything that a folder holds, in eval mode."""
    folder = Path(folder)
    document = read_config(folder)
    vae = _vae(folder, document)
    diffusion = settings.build(Diffusion, document.get("diffusion", {}), "diffusion").build()
    fps = float(document.get("fps", 8.0))
    if "dit" not in document:
        return Loaded(vae, None, None, diffusion, fps)
    dit = _built(folder, "dit", lambda: VideoDiT(settings.build(VideoDiTConfig, document["dit"], "dit")))
    text = _built(folder, "text", lambda: build_text(document, dit.config.text_size)) if dit.config.text else None
    tensors = read_tensors(folder / DIT)[0]
    for prefix, model in (("dit.", dit), ("text.", text)):
        if model is not None:
            fill(model.eval(), _under(prefix, tensors), folder / DIT)
    return Loaded(vae, dit, text, diffusion, fps)


def _built(folder: Path, what: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint: {folder / 'config.json'} does not describe a {what}; got {error!r}; copy it again."
        ) from error


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
