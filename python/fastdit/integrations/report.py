"""What `accelerate` did to a model, and the proof on the user's own inputs."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Layers that no op of fastdit replaces, and why they stay; what is below a named one is not listed again.
LEFT = {
    "AvgDown3D": "one copy per chunk",
    "CombinedTimestepLabelEmbeddings": "one row per sample",
    "DupUp3D": "one copy per chunk",
    "Embedding": "a table look-up",
    "FourierFeatures": "of the pictures' three channels",
    "Linear": "called, never read (LoRA, quantised weights): the vendor's GEMM",
    "QwenImage21AvgDown3D": "one copy per image",
    "QwenImage21DupUp3D": "one copy per image",
    "LpNorm": "called, between projection and attention",
    "SiLU": "one row per sample, or between layers that no known block holds",
    "Timesteps": "one row per sample",
}
UNKNOWN = "no known block holds it"
IDLE = (nn.Identity, nn.Dropout, nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass
class Row:
    """One kind of layer: replaced (`why` names the ops) or left (`why` is the reason)."""

    layer: str
    replaced: bool
    why: str
    count: int = 0
    saving: int = 0  # bytes of memory traffic spared per `unit`, all layers of the row together
    unit: str = ""


def left_rows(roots: list[nn.Module], covered: set[nn.Module]) -> list[Row]:
    """The layers that nothing covers, by class: leaves that compute, and the containers that `LEFT` names."""
    counts: Counter[str] = Counter()
    done = set(covered)
    for module in (module for root in roots for module in root.modules()):
        name = type(module).__name__
        leaf = not any(True for _ in module.children()) and not isinstance(module, IDLE)
        if module not in done and (leaf or name in LEFT):
            counts[name] += 1
            done.update(module.modules())
    return [Row(name, False, LEFT.get(name, UNKNOWN), count) for name, count in sorted(counts.items())]


@dataclass
class Verification:
    """Outputs before and after `accelerate` on the same inputs."""

    max_error: float
    rms_error: float
    rms_before: float
    before_ms: float
    after_ms: float

    @property
    def speedup(self) -> float:
        return self.before_ms / self.after_ms

    def __str__(self) -> str:
        return (
            f"against eager: max error {self.max_error:.3g}, rms {self.rms_error:.3g} of {self.rms_before:.3g}; "
            f"time {self.before_ms:.1f} -> {self.after_ms:.1f} ms, {self.speedup:.2f}x"
        )


@dataclass
class Report:
    """`print` it; `rows` for programs."""

    models: list[nn.Module] = field(repr=False)
    rows: list[Row]
    options: dict[str, Any]

    @property
    def replaced(self) -> int:
        """Number of blocks that now run on fastdit's ops."""
        return sum(row.count for row in self.rows if row.replaced)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        title = "fastdit.accelerate: " + ", ".join(type(model).__name__ for model in self.models)
        table = Table("layer", "count", "", "ops, or why not", "traffic spared", title=title)
        for row in self.rows:
            spared = f"{row.saving / 1000:.1f} kB per {row.unit}" if row.saving else ""
            table.add_row(row.layer, str(row.count), "replaced" if row.replaced else "left", row.why, spared)
        out = io.StringIO()
        Console(file=out, width=140).print(table)
        if not self.replaced:
            from fastdit.integrations.registry import KINDS

            out.write("Nothing was replaced. Looked for: " + "; ".join(kind.name for kind in KINDS) + ".\n")
        return out.getvalue()

    def verify(
        self, *inputs: Any, of: nn.Module | None = None, call: str | None = None, rounds: int = 3, **kwargs: Any
    ) -> Verification:
        """Run the model as it was and as it is, interleaved, without grad; print and return errors and speed.

        Args:
            inputs, kwargs: of the call. All floating tensors of its output count, in dicts, lists and diffusers'
                outputs too; a latent distribution counts by its parameters.
            of (nn.Module): which model, where the report is on several (a pipeline's transformer, its VAE).
            call (str): another method than the model's own call, e.g. "decode".
            rounds (int): times are medians of so many.
        Raises:
            ValueError: the report is on several models and `of` is none of them; an output without tensors.
        """
        from fastdit.integrations._accelerate import accelerate, is_excluded, restore

        model = self.models[0] if of is None and len(self.models) == 1 else of
        if not any(model is m for m in self.models):
            known = ", ".join(type(m).__name__ for m in self.models)
            got = "none" if of is None else type(of).__name__
            raise ValueError(
                f"verify: one model at a time; got of={got} for a report on {known}, expected of=<one of these models>."
            )
        assert model is not None
        names = [name for name, _ in model.named_modules()]  # patterns that concern other models of the report
        here = [p for p in self.options["exclude"] if any(is_excluded(name, [p]) for name in names)]
        options = {**self.options, "exclude": here}
        times: dict[str, list[float]] = {"before": [], "after": []}
        outputs: dict[str, Tensor] = {}
        try:
            for _ in range(rounds):
                restore(model)
                outputs["before"] = timed(getattr(model, call or "__call__"), inputs, kwargs, times["before"])
                accelerate(model, **options)
                outputs["after"] = timed(getattr(model, call or "__call__"), inputs, kwargs, times["after"])
        finally:
            accelerate(model, **options)
        error = outputs["after"] - outputs["before"]
        result = Verification(
            max_error=error.abs().max().item(),
            rms_error=error.square().mean().sqrt().item(),
            rms_before=outputs["before"].square().mean().sqrt().item(),
            before_ms=median(times["before"]),
            after_ms=median(times["after"]),
        )
        print(result)
        return result


def timed(function: Callable, inputs: tuple, kwargs: dict, times: list[float]) -> Tensor:
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    with torch.no_grad():
        synchronize()
        start = time.perf_counter()
        output = function(*inputs, **kwargs)
        synchronize()
    times.append((time.perf_counter() - start) * 1e3)
    found = [t.double().flatten() for t in tensors(output) if t.is_floating_point()]
    if not found:
        raise ValueError(f"verify: nothing to compare; got {type(output).__name__}, expected floating tensors in it.")
    return torch.cat(found)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in a model's output: itself, those of a list, dict or dataclass, a distribution's parameters."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors(value)
    elif is_dataclass(output):
        for part in fields(output):
            yield from tensors(getattr(output, part.name))
    elif isinstance(getattr(output, "parameters", None), Tensor):  # DiagonalGaussianDistribution
        yield output.parameters


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
