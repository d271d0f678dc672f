"""The steps of `fastdit demo`, from the rendered clip to the generated one and the written report."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fastdit
from fastdit.data import media, to_frames, to_video
from fastdit.data.folder import fit
from fastdit.generation.judge import psnr
from fastdit.testing.machine import describe

from . import clip, generated, models, report
from .compare import Subject, compare
from .models import Plan

Step = Callable[[str], None]

_DIT_GROUPS = {
    "linear layers (torch's GEMM)": ("linear",),
    "GELU, SiLU (torch's)": ("activation",),
    "attention": ("attention",),
    "patch embedding": ("patch", "conv"),
    "norm, modulate, gate, residual": ("modulation", "rotary", "elementwise", "copies", "views"),
}
_VAE_GROUPS: dict[str, tuple[str, ...]] = {
    "attention, linear": ("linear", "attention"),
    "conv chain: cat, pad, norm, SiLU, conv, residual": ("conv",),  # and everything else
}


def steps(plan: Plan) -> int:
    """How many progress steps `run` makes."""
    fixed = 5  # per comparison, beside its rounds
    return 4 + (fixed + plan.dit_rounds + 2) + len(plan.vae_dtypes) * (fixed + plan.vae_rounds) + 4


def run(plan: Plan, out: Path, step: Step = lambda what: None) -> dict[str, Any]:
    """Everything, written to `out`/report.html and `out`/report.json; returns what report.json holds."""
    began = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    shown: dict[str, Any] = {}
    clip_facts, pictures = _clip(plan, out, step)
    shown["clip"] = pictures
    compared = [_dit(plan, step)]
    compared += _vae(plan, pictures, step, shown)
    generation, shown["generated"] = generated.run(plan.device, out, step)
    step("writing the report")
    result: dict[str, Any] = {
        "fastdit": fastdit.__version__,
        "machine": describe(plan.device),
        "seconds": 0.0,
        "clip": clip_facts,
        "models": [report.plain(entry) for entry in compared],
        "generation": generation,
    }
    result["seconds"] = time.perf_counter() - began
    result["agree"] = all(m["errors"]["agree"] and m["restored_bitwise"] for m in result["models"])
    report.write(out, result, shown)
    return result


def _clip(plan: Plan, out: Path, step: Step) -> tuple[dict[str, Any], Any]:
    step("rendering the clip")
    rendered = clip.render(**plan.clip)
    step("writing and reading clip.mp4")
    path = out / "clip.mp4"
    frames = torch.from_numpy(rendered.frames)
    media.write(path, frames, rendered.fps)
    read = media.read(path).frames
    facts = {
        "file": path.name,
        "caption": rendered.caption,
        "frames": len(read),
        "size": [int(n) for n in read.shape[1:3]],
        "fps": rendered.fps,
        "bytes": path.stat().st_size,
        "psnr_db": psnr(frames, read),
    }
    return facts, read.numpy()


def _dit(plan: Plan, step: Step) -> dict[str, Any]:
    step("DiT: seeded weights")
    wide = models.dit(plan.dit)
    for weight in wide.parameters():
        weight.data = weight.data.bfloat16().float()  # both models then hold the very same numbers
    inputs = models.dit_inputs(plan.dit, plan.dit_batch, plan.device)
    step("DiT: fp32 run, the truth")
    with torch.no_grad(), _full_precision():
        truth = models.run_dit(wide.to(plan.device), inputs)
    size = plan.dit["sample_size"]
    heads, layers = plan.dit["num_attention_heads"], plan.dit["num_layers"]
    full = heads == 16 and layers == 28
    subject = Subject(
        name=f"DiT-XL/2 {8 * size}x{8 * size}" if full else f"DiT, {layers} layers, {heads} heads",
        detail=f"diffusers DiTTransformer2DModel, batch {plan.dit_batch}, {(size // 2) ** 2} tokens, one forward",
        model=wide.bfloat16(),
        call=(forward := lambda model: models.run_dit(model, inputs)),
        probe=forward,
        truth=truth,
        truth_name="fp32 run of the same weights",
        rounds=plan.dit_rounds,
        device=plan.device,
        groups=_DIT_GROUPS,
    )
    return compare(subject, step)


def _vae(plan: Plan, pictures: Any, step: Step, shown: dict[str, Any]) -> list[dict[str, Any]]:
    step("VAE: seeded weights")
    model = models.vae(plan.vae).to(plan.device)
    frames, height, width = plan.video
    chosen = np.linspace(0, len(pictures) - 1, frames).round().astype(int)
    resized = np.stack([fit(pictures[t], (height, width)) for t in chosen])
    pixels = to_video(torch.from_numpy(resized))[None].to(plan.device)
    step("VAE: encoding the clip")
    with torch.no_grad():
        latents = model.encode(pixels).latent_dist.mode()
    latents = latents / latents.std()  # random weights do not know the scale of trained latents
    t, h, w = plan.probe
    corner = latents[:, :, :t, :h, :w].contiguous()

    compared = []
    for dtype in plan.vae_dtypes:
        model = model.to(dtype)
        single = dtype == torch.float32
        step(f"VAE: {'fp64' if single else 'fp32'} run, the truth")
        judged = corner if single else latents
        with torch.no_grad(), _full_precision():
            truth = _decode(copy.deepcopy(model).to(torch.float64 if single else torch.float32), judged)
        call = _Decode(latents)
        subject = Subject(
            name="Wan video VAE decode" if not plan.vae else "small Wan video VAE decode",
            detail=f"diffusers AutoencoderKLWan, latents {list(latents.shape)} -> {frames} frames of {height}x{width}",
            model=model,
            call=call,
            probe=_Decode(corner) if single else call,
            truth=truth,
            truth_name=f"fp64 run on a {t}x{h}x{w} corner of the latents" if single else "fp32 run",
            rounds=plan.vae_rounds,
            device=plan.device,
            groups=_VAE_GROUPS,
        )
        compared.append(compare(subject, step))
        if single:
            eager, fast = compared[-1]["outputs"]
            shown["eager"], shown["fastdit"] = to_frames(eager[0]).numpy(), to_frames(fast[0]).numpy()
            shown["difference"] = float((eager - fast).abs().max())
    return compared


class _Decode:
    """Decodes the same latents with any VAE, in the dtype of its weights."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents

    def __call__(self, model: Any) -> Tensor:
        return _decode(model, self.latents)


def _decode(model: Any, latents: Tensor) -> Tensor:
    return model.decode(latents.to(next(model.parameters()).dtype), return_dict=False)[0]


class _full_precision:
    """TF32 off: the truth of an fp32 model is fp32 on a GPU too."""

    def __enter__(self) -> None:
        self._before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    def __exit__(self, *error: object) -> None:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = self._before
