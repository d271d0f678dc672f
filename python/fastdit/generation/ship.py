"""A checkpoint small enough to be shipped with the package: `python -m fastdit.generation.ship out/shapes`

Matrices and filters are stored in fp16, in half their bytes; vectors and the statistics of the latents stay in fp32.
Loading widens them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from fastdit.training import checkpoint

from .generator import SHIPPED

LIMIT = 10_000_000  # bytes in all
app = typer.Typer()


def ship(source: Path, target: Path) -> int:
    """Writes `target`, the folder `source` in fp16; its size in bytes.

    Raises:
        CheckpointError: no whole checkpoint there.   ValueError: too large, or a weight beyond fp16.
    """
    checkpoint.load(source)  # whole, and everything fits
    small = {}
    for name in (checkpoint.VAE, checkpoint.DIT):
        tensors, _ = checkpoint.read_tensors(source / name)
        small[name] = {k: v.to(torch.float16) if v.ndim > 1 else v for k, v in tensors.items()}
        wrong = [k for k, v in small[name].items() if not v.isfinite().all()]
        if wrong:
            raise ValueError(f"ship: {source / name} does not fit fp16; got {wrong[0]} beyond 65504; train it anew.")
    size = sum(v.numel() * v.element_size() for tensors in small.values() for v in tensors.values())
    if size > LIMIT:
        raise ValueError(
            f"ship: {source} is too large; got {size:,} bytes, expected at most {LIMIT:,}; train a smaller model."
        )
    for name, tensors in small.items():
        checkpoint.write_tensors(target / name, tensors)
    checkpoint.write_json(target / "config.json", checkpoint.read_config(source))
    return sum((target / name).stat().st_size for name in (*small, "config.json"))


@app.command()
def main(
    source: Annotated[Path, typer.Argument(help="Folder of `fastdit train`.")],
    target: Annotated[Path, typer.Argument(help="Folder to write. Default: the package's own.")] = SHIPPED,
) -> None:
    """Store a trained checkpoint in half the bytes."""
    try:
        typer.echo(f"{target}: {ship(source, target):,} bytes")
    except (checkpoint.CheckpointError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    app()
