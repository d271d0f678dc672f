"""`fastdit info | verify | bench | aot | demo | train | generate`, also as `python -m fastdit`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import fastdit

from . import train
from .generate import generate

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Kernels that make Diffusion Transformers and causal video VAEs fast.\n\n"
    "Start with `fastdit info` (what runs here), then `fastdit demo` (what it buys on real models).",
)
app.add_typer(train.app, name="train")
app.command()(generate)
# Piped output has no width of its own, and 80 columns would fold every table.
console = Console(width=None if sys.stdout.isatty() else 140)
Backend = Annotated[str | None, typer.Option(help="Only this backend: cpu, cuda, triton, reference, ...")]


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        console.print(fastdit.__version__, highlight=False)
        raise typer.Exit


@app.command()
def info() -> None:
    """Show this machine, its instruction sets and GPU, and every backend: usable, or the reason why not.

    Example: `fastdit info`. Which backend a single call takes is told by `fastdit.explain("attention", q, k, v)`.
    """
    from . import info as command

    command.show(console)


@app.command()
def verify(
    op: Annotated[str | None, typer.Option(help="Only this op, e.g. norm_modulate.")] = None,
    backend: Backend = None,
    backward: Annotated[bool, typer.Option(help="Check gradients too.")] = True,
) -> None:
    """Hold every op on every backend and dtype against the fp64 reference, on small shapes.

    Prints one line per op, backend and dtype with the largest share of the allowed error (1 is the limit).
    Exit status 1 when anything fails.

    Examples: `fastdit verify`, `fastdit verify --op attention --backend cpu`
    """
    from . import verify as command

    raise typer.Exit(command.show(console, op=op, backend=backend, backward=backward))


@app.command()
def bench(
    suite: Annotated[str | None, typer.Option(help="cpu, models, smoke, or gpu: the default if there is one.")] = None,
    op: Annotated[str | None, typer.Option(help="Only this op, e.g. attention.")] = None,
    model: Annotated[str | None, typer.Option(help="Only rows whose model holds this text, e.g. Wan2.1.")] = None,
    passes: Annotated[list[str] | None, typer.Option("--pass", help="fwd, bwd or fwd+bwd; may be repeated.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds per row; 7 or more for a figure to keep.")] = None,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile as a peer.")] = True,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write rows here; auto: benchmarks/results.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a table and a plot here.")] = None,
    budget: Annotated[
        float | None, typer.Option(help="Start no row after so many seconds; skipped ones are named.")
    ] = None,
    tune: Annotated[bool, typer.Option("--tune", help="Find this GPU's tile sizes instead, and write them.")] = False,
) -> None:
    """Measure every op at the models' own shapes, and whole models (--op model), against their peers, interleaved.

    Each row first asserts correctness. Read the ratios: `x eager` above 1 is faster than PyTorch as it is, and
    `% ceiling` compares with a plain copy (or GEMM) of the same size timed in the same run.

    The last table holds the run against the performance bars; a missed one is red and names its rows. Exit status 1
    says that a result was wrong; a missed bar leaves it at 0.

    Examples: `fastdit bench --op norm_modulate`, `fastdit bench --op model --model Wan`,
    `fastdit bench --suite cpu --pass fwd --pass bwd --pass fwd+bwd --json results.json --html results.html`

    `--tune` times the few tile sizes that each Triton kernel offers on the rows at hand (--op, --model), and writes the
    faster ones to the package's table for this GPU. Nothing is tuned while a model runs.
    """
    if tune:
        from . import tune as tuner

        raise typer.Exit(tuner.show(console, op=op, model=model, json_file=json_file))
    from . import bench as command

    status = command.show(
        console, suite=suite, op=op, model=model, passes=tuple(passes or ("fwd",)), rounds=rounds, compiled=compiled,
        json_file=json_file, html_file=html_file, budget=budget,
    )  # fmt: skip
    raise typer.Exit(status)


@app.command()
def aot(
    text: Annotated[str | None, typer.Option("--filter", help="Only ops with this in the name, e.g. norm.")] = None,
    arch: Annotated[list[int] | None, typer.Option(help="80, 90, 100 or 120; may be repeated. Default: all.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16 or fp32; may be repeated. Default: all.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", help="fwd or bwd; may be repeated. Default: both.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only the first workload of each op.")] = False,
    samples: Annotated[bool, typer.Option("--samples", help="The small inputs of the tests too.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Compilers at a time. Default: one per core.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
) -> None:
    """Build every Triton kernel that the ops launch at the models' shapes, for GPUs that need not be here.

    Shows registers, spilled bytes, shared memory, how many warps a multiprocessor holds, tensor-core and TMA
    instructions, and global loads and stores: 16x25 is 25 instructions of 16 bytes a thread; `>=16 B` is the share of
    the bytes that such wide ones move.

    A row is red, and the exit status 1, for spills or a stack, for a GEMM-shaped kernel without tensor cores (wgmma on
    sm_90), for scalar 2-byte accesses in a memory-bound kernel, for more shared memory than a block can have, and for a
    build that fails. A second run finds the builds in Triton's cache (TRITON_CACHE_DIR) and takes two minutes.

    Examples: `fastdit aot --filter norm_modulate --arch 90 --dtype bf16`, `fastdit aot --json build/aot.json`
    """
    from . import aot as command

    status = command.show(
        console, text=text, arches=tuple(arch or ()), dtypes=tuple(dtype or ()), passes=tuple(passes or ()),
        quick=quick, samples=samples, jobs=jobs, json_file=json_file,
    )  # fmt: skip
    raise typer.Exit(status)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report.html, report.json and clip.mp4.")] = Path("out/demo"),
    small: Annotated[bool, typer.Option("--small", help="Tiny models, seconds instead of minutes.")] = False,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
) -> None:
    """Run DiT-XL/2 and the Wan video VAE as they are, then accelerated, and show time, errors and what was replaced.

    Weights are seeded random numbers: nothing is downloaded. About three minutes on two CPU cores.

    Examples: `fastdit demo`, `fastdit demo --small --out build/demo`
    """
    import torch

    from fastdit.demo import console as view, models

    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    raise typer.Exit(0 if view.show(models.plan(small=small, device=chosen), out, console) else 1)


def main() -> None:
    app()
