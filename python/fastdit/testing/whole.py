"""Benchmark rows of whole models and blocks: as they are, compiled, and accelerated, in turns.

They stand beside the rows of the ops in `fastdit bench`, under the op name "model".
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from fastdit.integrations import accelerate

from . import bench, close, models, timing, zoo

OP = "model"
Run = Callable[[Any], Tensor]
_aten = torch.ops.aten


@dataclass(frozen=True)
class Whole:
    """One model at one size.

    build: the model, in fp32. run: (dtype, device) -> the call that is timed. probe: the call that is judged, where
    run's takes too long in a wider dtype. compile: what people compile, in place; None where torch.compile breaks the
    model into pieces. flops: of one call, counted when the row is measured. options: of `accelerate`.
    """

    model: str
    shape: str
    build: Callable[[], nn.Module]
    run: Callable[[torch.dtype, str], Run]
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    probe: Callable[[torch.dtype, str], Run] | None = None
    compile: Callable[[Any], None] | None = None
    pass_: str = "fwd"
    rounds: int = 7
    flops: int = 0
    op: str = OP
    options: dict[str, Any] = field(default_factory=dict)

    def moved(self, dtype: torch.dtype, pass_: str) -> int:
        return 0

    def computed(self, pass_: str) -> float:
        return self.flops

    def __str__(self) -> str:
        return f"{self.op}-{self.model}"


def cases(op: str | None = None, suite: str = "cpu") -> list[tuple[Whole, torch.dtype]]:
    """`models`: one block or layer of every codebase that `accelerate` knows, at its own width."""
    rows = {"smoke": (), "models": zoo.rows(), "gpu": GPU_ROWS}.get(suite, ROWS)
    return [(row, dtype) for row in rows for dtype in row.dtypes] if op in (None, OP) else []


def measure(row: Whole, dtype: torch.dtype, settings: bench.Settings) -> bench.Measured:
    """Raises AssertionError where the accelerated model is wrong; truth is the original in the next wider dtype."""
    wide = torch.float64 if dtype == torch.float32 else torch.float32
    judged, device = row.probe or row.run, settings.device
    original, run, probe = models.cast(row.build(), dtype).to(device), row.run(dtype, device), judged(dtype, device)
    truth = judged(wide, device)(models.cast(copy.deepcopy(original), wide))
    fast = models.twin(original)
    accelerate(fast, **row.options)
    found = close.assert_close(probe(fast), truth, probe(original), f"{row} {dtype}")
    with FlopCounterMode(display=False, custom_mapping=_FLOPS) as counter:
        run(original)
    row = replace(row, flops=counter.get_total_flops())

    calls: dict[str, timing.Call] = {"fastdit": lambda: run(fast), "eager": lambda: run(original)}
    skipped: dict[str, str] = {}
    if settings.compiled and row.compile is not None:
        torch._dynamo.reset()
        for peer in ("compile", "fastdit+compile") if device == "cuda" else ("compile",):
            try:
                calls[peer] = _compiled(row, run, models.twin(original), faster=peer != "compile")
            except Exception as error:  # a compiler that cannot is no reason to lose the others
                skipped[peer] = f"{type(error).__name__}: {str(error)[:200]}"
    name, limit, share = bench.ceiling(row, dtype, row.pass_, settings.device)
    rounds = min(settings.rounds, row.rounds)
    repeats = 1 if device == "cpu" else None
    timings = timing.interleaved({**calls, name: limit}, device=device, rounds=rounds, repeats=repeats)
    timings[name] = timings[name].scaled(share)
    ours = timings.pop("fastdit")
    backend = "cpu" if device == "cpu" else "auto"
    return bench.Measured(row, dtype, row.pass_, backend, ours, timings, found.ratio, skipped)


def _compiled(row: Whole, run: Run, model: Any, faster: bool) -> timing.Call:
    assert row.compile is not None
    if faster:
        accelerate(model, **row.options)
    row.compile(model)
    run(model)
    return lambda: run(model)


def block_row(
    name: str, shape: str, build: Callable[[], nn.Module], block: str, inputs: Callable[[torch.dtype], tuple]
) -> Whole:
    """A row of one block of two streams: its name in the model, and its positional arguments."""

    def run(dtype: torch.dtype, device: str) -> Run:
        arguments = tree_map_only(Tensor, lambda t: t.to(device), inputs(dtype))

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                output = model.get_submodule(block)(*arguments)
            return output if isinstance(output, Tensor) else torch.cat(output, dim=-2)

        return call

    return Whole(name, shape, build, run, compile=lambda model: model.get_submodule(block).compile(dynamic=False))


def model_row(
    name: str, shape: str, build: Callable[[], nn.Module], block: str, inputs: Callable[[torch.dtype], dict[str, Any]]
) -> Whole:
    """A row of a model of one block, so that what the model makes of its inputs counts too: its keyword arguments."""

    def run(dtype: torch.dtype, device: str) -> Run:
        given = tree_map_only(Tensor, lambda t: t.to(device), inputs(dtype))

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                return zoo.call_model(model, given)

        return call

    return Whole(name, shape, build, run, compile=lambda model: model.get_submodule(block).compile(dynamic=False))


def _attention_flops(q, k, v, *args, **kwargs) -> int:
    return 4 * math.prod(q[:-1]) * k[-2] * v[-1]


def _attention_backward_flops(do, q, k, v, *args, **kwargs) -> int:
    return 10 * math.prod(q[:-1]) * k[-2] * v[-1]


# torch counts no FLOPs for these
_FLOPS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


# ---- the rows -----------------------------------------------------------------------------------------------
def _compile_blocks(model: Any) -> None:
    """As diffusers advises: the repeated block, once."""
    for block in model.transformer_blocks:
        block.compile(dynamic=False)


def _dit_inputs(batch: int, size: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, 4, size, size, generator=generator).to(device, dtype)
    return x, torch.linspace(120, 880, batch).long().to(device), torch.arange(batch, device=device) * 7 % 1000


def _dit_forward(model: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x, t, y, return_dict=False)[0]


def _dit_training(model: Any, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Forward and backward of a batch; judged by the gradient of the input, which has passed through every layer."""
    for p in (x.requires_grad_(), *model.parameters()):
        p.grad = None
    model(x, t, y, return_dict=False)[0].float().square().mean().backward()
    assert x.grad is not None
    return x.grad


def _dit(
    name: str, layers: int, heads: int, head_dim: int, size: int, batch: int,
    call: Callable[..., Tensor] = _dit_forward, pass_: str = "fwd",
) -> Whole:  # fmt: skip
    def run(dtype: torch.dtype, device: str) -> Run:
        inputs = _dit_inputs(batch, size, dtype, device)
        return lambda model: call(model, *inputs)

    return Whole(
        name, f"{batch}x{size * size // 4}x{heads * head_dim}, {layers} blocks",
        lambda: models.diffusers_dit(layers=layers, heads=heads, head_dim=head_dim, size=size), run,
        compile=_compile_blocks, pass_=pass_,
    )  # fmt: skip


def _wan_block(name: str, heads: int, ffn: int, grid: tuple[int, int, int]) -> Whole:
    width, tokens = 128 * heads, math.prod(grid)

    def build() -> nn.Module:
        return models.diffusers_wan(
            num_attention_heads=heads, attention_head_dim=128, ffn_dim=ffn, num_layers=1, rope_max_seq_len=1024
        )

    def run(dtype: torch.dtype, device: str) -> Run:
        g = torch.Generator().manual_seed(3)
        x, context = (torch.randn(1, n, width, generator=g).to(device, dtype) for n in (tokens, 512))
        temb = torch.randn(1, 6, width, generator=g).to(device)

        def call(model: Any) -> Tensor:
            with torch.no_grad():
                rope = model.rope(x.new_empty(1, 4, grid[0], 2 * grid[1], 2 * grid[2]))
                return model.blocks[0](x, context, temb, rope)

        return call

    return Whole(
        name, f"1x{tokens}x{width}, one block, 512 text tokens", build, run,
        compile=lambda model: model.blocks[0].compile(dynamic=False),
    )  # fmt: skip


def decode_row(
    name: str, build: Callable[[], nn.Module], size: tuple[int, ...], probe: tuple[int, ...] | None = None,
    rounds: int = 5, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16), batch: int = 1, **given: Any,
) -> Whole:  # fmt: skip
    """A VAE's decode of latents (C, T, H, W), or (C, H, W), judged on `probe` where that takes too long in fp64."""

    def decode(size: tuple[int, ...]) -> Callable[[torch.dtype, str], Run]:
        def run(dtype: torch.dtype, device: str) -> Run:
            z = torch.randn(batch, *size, generator=torch.Generator().manual_seed(3)).to(device, dtype)
            more = tree_map_only(Tensor, lambda t: t.to(device, dtype), given)

            def call(model: Any) -> Tensor:
                with torch.no_grad():
                    return model.decode(z, **more, return_dict=False)[0]

            return call

        return run

    return Whole(
        f"{name} decode", "x".join(map(str, (batch, *size))), build, decode(size),
        dtypes=dtypes, probe=decode(probe) if probe else None, rounds=rounds,
    )  # fmt: skip


_BF16 = (torch.bfloat16,)
_WAN_VAE = decode_row("AutoencoderKLWan", models.diffusers_wan_vae, (16, 3, 16, 16), probe=(16, 2, 6, 6))
ROWS = (
    _dit("DiT-XL/2-256", 28, 16, 72, 32, batch=2),
    _dit("DiT-XL/2-512", 28, 16, 72, 64, batch=2),
    _wan_block("Wan2.1-1.3B block", 12, 8960, (4, 32, 32)),
    _dit("DiT-B/2-256 training step", 12, 12, 64, 32, batch=8, call=_dit_training, pass_="fwd+bwd"),
    _WAN_VAE,
    replace(_WAN_VAE, model=f"{_WAN_VAE.model}, winograd2d", dtypes=_BF16, options={"conv_algo": "winograd2d"}),
)

_PROBE = (16, 2, 12, 20)
# At the sizes that people run on a card, the quickest first: 480p and 720p of 81 frames.
GPU_ROWS = (
    *ROWS[:2],
    _wan_block("Wan2.1-1.3B-480p block", 12, 8960, (21, 30, 52)),
    _wan_block("Wan2.1-14B-720p block", 40, 13824, (21, 45, 80)),
    decode_row("AutoencoderKLWan-480p81f", models.diffusers_wan_vae, (16, 21, 60, 104), _PROBE, 3, dtypes=_BF16),
    ROWS[3],
    decode_row("AutoencoderKLWan-720p17f", models.diffusers_wan_vae, (16, 5, 90, 160), _PROBE, 3, dtypes=_BF16),
    decode_row("AutoencoderKLWan-720p81f", models.diffusers_wan_vae, (16, 21, 90, 160), _PROBE, 3, dtypes=_BF16),
)
