"""`fastdit generate`: a clip of a prompt, into a file."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

Prompt = Annotated[str, typer.Argument(help="What to show, in the words of the checkpoint's captions.")]
Out = Annotated[Path, typer.Option(help=".mp4, .gif or .png, which is one frame.")]
Seed = Annotated[int, typer.Option(help="Of the noise: the same seed gives the same clip.")]
Image = Annotated[Path | None, typer.Option(help="Picture that the clip starts from.")]
Frames = Annotated[int | None, typer.Option(help="1, 5, 9, ...; 8 are a second. Default: 17, and 1 for a .png.")]
Size = Annotated[str | None, typer.Option(help="HEIGHTxWIDTH, multiples of 16. Default: the image's, or 64x64.")]
Steps = Annotated[int, typer.Option(min=1, help="Steps of the sampler: more is slower and cleaner.")]
Guidance = Annotated[float, typer.Option(help="How hard to follow the prompt; 1 is as it was learned.")]
Method = Annotated[str | None, typer.Option(help="euler (default), or heun: twice the work a step, fewer steps.")]
Expand = Annotated[bool, typer.Option("--expand/--no-expand", help="Rewrite a short prompt into a rich one.")]
Backend = Annotated[str | None, typer.Option(help="Only this backend: cpu, cuda, triton, reference, ...")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")]
Checkpoint = Annotated[Path | None, typer.Option(help="Folder of `fastdit train`. Default: the shipped one.")]


def generate(
    prompt: Prompt,
    out: Out = Path("clip.mp4"),
    seed: Seed = 0,
    image: Image = None,
    frames: Frames = None,
    size: Size = None,
    steps: Steps = 30,
    guidance: Guidance = 6.0,
    method: Method = None,
    expand: Expand = True,
    backend: Backend = None,
    device: Device = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Make a video or a picture of a prompt; with --image, a video that starts from a picture.

    A checkpoint of `fastdit train` on the built-in shapes knows one moving shape on a plain background: red, green,
    blue, yellow, purple, orange, white or black; circle, square, triangle or star; small or big; moving left, right, up
    or down, or standing still. What a prompt leaves open is chosen for it. Pictures are decoded as they are written: a
    minute takes no more memory than a second.

    Examples: `fastdit generate "a red circle moving right on a blue background"`,
    `fastdit generate "a big white star on a purple background" --out star.png --size 96x64`,
    `fastdit generate "a red circle moving up" --image first.png --frames 33 --out clip.gif`
    """
    import fastdit
    from fastdit.data import media
    from fastdit.generation import Generator
    from fastdit.training import CheckpointError

    console, began = Console(soft_wrap=True, highlight=False), time.perf_counter()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    length = frames if frames is not None else 1 if out.suffix.lower() == ".png" else 17
    try:
        with (
            fastdit.use_backend(backend) if backend else nullcontext(),
            Progress(*columns, console=console, transient=True) as bar,
        ):
            generator = Generator.load(checkpoint, device=device)
            if expand and image is None and (told := generator.expanded(prompt)) != prompt:
                console.print(f"expanded: {told}", style="dim", markup=False)

            def pictures() -> Iterator[Tensor]:
                task = bar.add_task("denoising", total=steps)
                latents = generator.latents(
                    prompt, seed=seed, frames=length, size=_size(size), steps=steps, guidance=guidance, method=method,
                    image=None if image is None else media.read(image).frames[0], expand=expand,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),
                )  # fmt: skip
                for part in bar.track(generator.decode(latents), latents.shape[2], description="decoding"):
                    yield part[0]

            media.write(out, pictures(), generator.fps)  # refuses a suffix before it asks for pictures
    except (ValueError, fastdit.NoBackend) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(2) from None
    except (CheckpointError, OSError, ImportError) as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    console.print(f"wrote {out}: {length} frames in {time.perf_counter() - began:.1f} s", markup=False)


def _size(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "64x96"."""
    if text is None:
        return None
    height, x, width = text.lower().partition("x")
    if not (x and height.isdecimal() and width.isdecimal()):
        raise ValueError(f"generate: --size is HEIGHTxWIDTH in pixels; got {text!r}, expected e.g. 64x96.")
    return int(height), int(width)
