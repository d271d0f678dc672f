"""`fastdit train vae | dit | decoder`."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Train the reference system on the built-in moving shapes or on a folder of videos and images with captions: "
    "first the video VAE, then the video DiT on its latents.\n\n"
    "Example: `fastdit train vae --out out/shapes`, then `fastdit train dit --vae out/shapes --out out/shapes`",
)
Data = Annotated[str, typer.Option(help="shapes, or a folder of videos and images with captions.")]
ConfigName = Annotated[str, typer.Option("--config", help="shapes, smoke, or a TOML file.")]
Out = Annotated[Path, typer.Option(help="Folder for the weights; what resuming needs goes into state/ there.")]
Steps = Annotated[int | None, typer.Option(min=1, help="Stop after this many steps instead of the configuration's.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")]
Backend = Annotated[str | None, typer.Option(help="Only this backend: cpu, cuda, triton, reference, ...")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
Parallel = Annotated[str, typer.Option(help="Under torchrun: ddp, or fsdp (sharded).")]


@app.command()
def vae(
    out: Out,
    data: Data = "shapes",
    config: ConfigName = "shapes",
    steps: Steps = None,
    resume: Resume = False,
    backend: Backend = None,
    device: Device = None,
    parallel: Parallel = "ddp",
) -> None:
    """Train the causal video VAE, and measure the mean and deviation of its latents.

    Shows loss, PSNR of held-out clips and steps per second; loss.csv and loss.png are in OUT/state/vae. Ctrl-C saves
    first, and so does SIGTERM.

    Examples: `fastdit train vae --out out/shapes`, `fastdit train vae --data clips/ --config my.toml --out out/mine`
    """
    _run("vae", out, data, config, steps, resume, backend, device, parallel)


@app.command()
def decoder(
    vae: Annotated[Path, typer.Option(help="Folder of a trained VAE; may be --out.")],
    out: Out,
    data: Data = "shapes",
    config: ConfigName = "shapes",
    steps: Steps = None,
    resume: Resume = False,
    backend: Backend = None,
    device: Device = None,
    parallel: Parallel = "ddp",
) -> None:
    """Train the decoder of a VAE on; the encoder, and so every latent and a DiT trained on them, stays as it is.

    Uses the [vae] section of the configuration. Losses are in OUT/state/decoder.

    Example: `fastdit train decoder --vae out/shapes --out out/shapes --steps 6000`
    """
    _run("decoder", out, data, config, steps, resume, backend, device, parallel, vae=vae)


@app.command()
def dit(
    vae: Annotated[Path, typer.Option(help="Folder of a trained VAE; may be --out.")],
    out: Out,
    data: Data = "shapes",
    config: ConfigName = "shapes",
    steps: Steps = None,
    resume: Resume = False,
    backend: Backend = None,
    device: Device = None,
    parallel: Parallel = "ddp",
) -> None:
    """Train the video DiT on latents of clips of mixed sizes, packed, with a text encoder trained along.

    Clips are encoded once, into OUT/state/dit/latents.safetensors. OUT is then all that `fastdit generate` needs.

    Examples: `fastdit train dit --vae out/shapes --out out/shapes`,
    `torchrun --nproc-per-node 2 -m fastdit train dit --vae out/shapes --out out/shapes --parallel fsdp`
    """
    _run("dit", out, data, config, steps, resume, backend, device, parallel, vae=vae)


def _run(
    name: str, out: Path, data: str, config: str, steps: int | None, resume: bool, backend: str | None,
    device: str | None, parallel: str, vae: Path | None = None,
) -> None:  # fmt: skip
    """Runs a training; exit status 2 for a request that cannot be served, 1 for a training that cannot go on."""
    console = Console()
    import fastdit

    try:
        from fastdit.training import CheckpointError, config as settings, loop, parallel as processes
        from fastdit.training.dit import DiTTask
        from fastdit.training.vae import VAETask
    except ImportError as error:
        console.print(
            f"train: {error.name} is missing; expected fastdit[train]; pip install 'fastdit[train]'", style="red"
        )
        raise typer.Exit(2) from None
    try:
        chosen = settings.load(config)
        section = "dit" if name == "dit" else "vae"
        training: Any = getattr(chosen, section)
        if steps is not None:
            training = dataclasses.replace(training, loop=dataclasses.replace(training.loop, steps=steps))
            chosen = dataclasses.replace(chosen, **{section: training})
        with processes.join(parallel, device) as world, fastdit.use_backend(backend) if backend else nullcontext():
            task: Any
            if name == "dit" and vae is not None:
                task = DiTTask(chosen, data, out, vae, world, console=console)
            else:
                task = VAETask(chosen, data, out, vae)
            folder = out / "state" / name
            loop.fit(task, training.optimizer, training.loop, folder, world, resume=resume, console=console)
        processes.leave(world)
    except (ValueError, FileNotFoundError, ImportError, fastdit.NoBackend) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(2) from None
    except (CheckpointError, FloatingPointError) as error:
        console.print(str(error), style="red", highlight=False, markup=False)
        raise typer.Exit(1) from None
