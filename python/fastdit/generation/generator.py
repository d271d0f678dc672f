"""Text to video, end to end, on the operators of `fastdit.ops`.

    prompt --expand--> long prompt --text encoder--> tokens and one vector
    noise --sampler: VideoDiT at every step, guided by the text--> latents
    latents --VideoVAE.decode_chunks, four frames at a time--> pictures

Shapes: a clip of 1 + 4*k frames of H x W pixels is a latent (C, 1 + k, H/8, W/8).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast, overload

import torch
from torch import Tensor, nn

from fastdit.data import WORDS, Clip, captions, to_frames, to_video
from fastdit.data.clip import check_frames
from fastdit.data.folder import fit
from fastdit.diffusion import RectifiedFlow, guided
from fastdit.models import Text, WordEncoder
from fastdit.models.video_vae import FRAMES
from fastdit.training import checkpoint

from . import request

SHIPPED = Path(__file__).parent.parent / "checkpoints" / "shapes"
SIZE = (64, 64)  # of most clips that the shipped checkpoint was trained on
SHORT = 12  # words; a prompt with more is not expanded
STEPS, GUIDANCE = 30, 6.0  # by which the shipped checkpoint is judged


class Generator:
    """A trained VAE, a denoiser and its text encoder. `Generator.load()` has the shipped ones.

    >>> generator = Generator.load()
    >>> clip = generator.generate("a red circle moving right on a blue background", seed=1)
    >>> media.write("clip.mp4", clip.frames, clip.fps)
    """

    def __init__(self, loaded: checkpoint.Loaded):
        if loaded.dit is None:
            raise ValueError(
                "generate: the checkpoint cannot make videos yet; got a VAE alone, expected dit.safetensors beside it; "
                "run `fastdit train dit`."
            )
        self.vae, self.dit, self.text = loaded.vae, loaded.dit, loaded.text
        self.diffusion, self.fps = loaded.diffusion, loaded.fps
        for model in self._models():
            model.eval().requires_grad_(False)

    @classmethod
    def load(cls, path: str | Path | None = None, *, device: str | torch.device | None = None) -> Generator:
        """A folder of `fastdit train`, or the shipped checkpoint, on `device` (default: cuda where there is one).

        Raises: CheckpointError: the folder is none.
        """
        chosen = request.device(device)
        return cls(checkpoint.load(SHIPPED if path is None else path)).to(chosen)

    def to(self, *where: Any) -> Generator:
        """As `nn.Module.to`, for all models."""
        for model in self._models():
            model.to(*where)
        return self

    @overload
    def generate(self, prompt: str, **options: Any) -> Clip: ...
    @overload
    def generate(self, prompt: Sequence[str], **options: Any) -> list[Clip]: ...
    def generate(self, prompt, **options):
        """The clip of a prompt, or the clips of several, made together. Options: those of `latents`."""
        videos = torch.cat(list(self.stream(prompt, **options)), dim=1)
        clips = [Clip(frames, told, self.fps) for frames, told in zip(videos, request.prompts(prompt), strict=True)]
        return clips[0] if isinstance(prompt, str) else clips

    def stream(self, prompt: str | Sequence[str], **options: Any) -> Iterator[Tensor]:
        """The pictures of `generate` as they are decoded: uint8 (B, 1, H, W, 3), then (B, 4, H, W, 3) each.

        Of a clip, only the latents (1/24 of the pictures' bytes) and one such group are in memory.
        """
        return self.decode(self.latents(prompt, **options))

    @torch.no_grad()
    def latents(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        frames: int = 17,
        size: Sequence[int] | None = None,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        method: str | None = None,
        image: Tensor | None = None,
        expand: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """Denoised latents (B, C, 1 + k, h, w), one per prompt, normalised as the denoiser sees them.

        Args:
            seed (int): of the noise; prompt i has seed + i, whatever the others are. The noise is drawn on the CPU: it
                is the same for every device.
            frames (int): 1 (a picture) or 1 + a multiple of 4.
            size ((height, width)): multiples of 16. Default: the image's, or 64 x 64.
            steps (int): of the sampler.
            method: of a flow "euler" or "heun" (two calls of the model a step), of a DDPM "ddim" or "ddpm". Default:
                the first.
            guidance (float): 1 follows the text as the model learned it, more follows it harder.
            image (Tensor[h, w, 3], uint8): the first frame, scaled to cover `size` and cut to it; the clip goes on from
                it.
            expand (bool): rewrite a short prompt into a long one first, see `expanded`. Not beside an image, which may
                show something else than what the long one says more.
            progress: called with (steps done, steps in all).
        Raises:
            ValueError: a length or size that no whole latents make, words that the model does not know, a bad image.
        """
        prompts = request.prompts(prompt)
        height, width = request.area(self._size(size, image), self._token())
        length = request.latent_frames(frames, FRAMES)
        known = None if image is None else self._first_frame(image, (height, width), length, len(prompts))
        model = guided(
            lambda x, t, text: self.dit(x, t, text, known_frames=0 if known is None else 1),
            *self._conditions([self.expanded(p) if expand and image is None else p for p in prompts]),
            guidance if self.text is not None else 1.0,
        )
        side = self.vae.config.side
        shape = (self.dit.config.in_channels, length, height // side, width // side)
        drawers = [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))]
        noise = torch.stack([torch.randn(shape, generator=drawer) for drawer in drawers])
        noise = noise.to(next(self.dit.parameters()))
        sample = self._sampler(method, drawers)
        return cast(Tensor, sample(model, noise, steps, known=known, progress=progress))

    @torch.no_grad()
    def decode(self, latents: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """Pictures of normalised latents: uint8 (B, 1, H, W, 3), then the frames of `chunk` latent frames at a time."""
        for video in self.vae.decode_chunks(self.vae.denormalize(latents), chunk):
            yield torch.stack([to_frames(one) for one in video])

    def expanded(self, prompt: str) -> str:
        """What the model is told for a short prompt of the built-in renderer's words (`captions.expand`)."""
        if not isinstance(self.text, WordEncoder) or not set(WORDS) <= set(self.text.words):
            return prompt
        self.text.split(prompt)  # unknown words raise here, with the nearest known ones
        return captions.expand(prompt) if 0 < len(captions.tokenize(prompt)) <= SHORT else prompt

    def _models(self) -> list[nn.Module]:
        return [model for model in (self.vae, self.dit, self.text) if model is not None]

    def _token(self) -> tuple[int, int]:
        """Height and width in pixels of what one token covers."""
        side = self.vae.config.side
        return side * self.dit.patch_size[1], side * self.dit.patch_size[2]

    def _conditions(self, prompts: list[str]) -> tuple[Text | None, Text | None]:
        """The text of the prompts, and of none."""
        if self.text is not None:
            return self.text(prompts), self.text([""] * len(prompts))
        if any(prompts):
            raise ValueError(f'generate: this model was trained without text; got {prompts[0]!r}, expected "".')
        return None, None

    @staticmethod
    def _size(size: Sequence[int] | None, image: Tensor | None) -> Sequence[int]:
        return size or (SIZE if image is None else tuple(image.shape[:2]))

    def _first_frame(self, image: Tensor, size: tuple[int, int], length: int, count: int) -> Tensor:
        """The latent (count, C, 1, h, w) of a given picture."""
        check_frames("generate", image[None])
        if length == 1:
            raise ValueError(
                f"generate: image is the first frame of a longer clip; got frames=1, expected {1 + FRAMES} or more."
            )
        video = to_video(torch.from_numpy(fit(image.cpu().numpy(), size).copy())[None])
        latent = self.vae.normalize(self.vae.encode(video[None].to(self.vae.latent_mean)).mean)
        return latent.expand(count, -1, -1, -1, -1)

    def _sampler(self, method: str | None, drawers: list[torch.Generator]) -> Callable[..., Any]:
        """(model_fn, noise, steps, known=, progress=) -> latents."""
        samplers: dict[str, Callable[..., Any]]
        if isinstance(self.diffusion, RectifiedFlow):
            samplers = {name: partial(self.diffusion.sample, method=name) for name in ("euler", "heun")}
        else:
            samplers = {"ddim": self.diffusion.ddim, "ddpm": partial(self.diffusion.sample, generator=drawers)}
        chosen = method or next(iter(samplers))
        if chosen not in samplers:
            kind = type(self.diffusion).__name__
            raise ValueError(
                f"generate: unknown method; got {method!r}, expected one of {', '.join(samplers)}, which "
                f"the model is trained for ({kind}); choose one."
            )
        return samplers[chosen]
