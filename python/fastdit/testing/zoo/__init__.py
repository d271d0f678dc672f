"""Tiny configurations of every model class that `accelerate` knows, with random weights, and rows at real widths.

Each file here is one group of codebases with
    MODELS  small `Model`s: `tests/test_accelerate_zoo.py` compares outputs, gradients and the way back
    ROWS    `whole.Whole` rows at the models' own widths (`fastdit bench --suite models`)
diffusers is imported on use: it is an extra.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from fastdit.testing.whole import Whole


def call_model(model: Any, inputs: dict[str, Any]) -> Tensor:
    """diffusers' transformers: the sample of the plain call."""
    return model(**inputs, return_dict=False)[0]


def call_encode(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model.encode(**inputs).latent_dist.parameters


def call_decode(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model.decode(**inputs, return_dict=False)[0]


@dataclass(frozen=True)
class Model:
    """One class in one configuration.

    name: class and variant, e.g. "WanTransformer3DModel, a timestep per token". page: of docs/codebases.
    build: the model, in fp32, through `models.randomize`. inputs: keyword arguments in fp32; `to_dtype` casts
    the floating ones but those in `keeps` (timesteps). layers: what the report must count as replaced, all of it.
    fixed: floating inputs without a gradient. blocks: module names compiled one by one, fullgraph, at two lengths.
    """

    name: str
    page: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    layers: dict[str, int]
    call: Callable[[Any, dict[str, Any]], Tensor] = call_model
    keeps: tuple[str, ...] = ("timestep",)
    fixed: tuple[str, ...] = ("timestep",)
    kept: dict[str, str] = field(default_factory=dict)  # layers that stay -> the report's reason

    def __str__(self) -> str:
        return self.name

    def given(self, dtype: torch.dtype) -> dict[str, Any]:
        return {name: value if name in self.keeps else cast_tree(value, dtype) for name, value in self.inputs().items()}


def cast_tree(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, (list, tuple)):
        return type(value)(cast_tree(item, dtype) for item in value)
    return value


def randn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rotation(tokens: int) -> tuple[Tensor, Tensor]:
    """cos and sin (N, 128) for heads of 128, each angle twice side by side."""
    angles = randn(tokens, 64).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin()


def text_mask(*lengths: int, total: int) -> Tensor:
    """(B, total) int64, ones first, as tokenizers pad."""
    return (torch.arange(total) < torch.tensor(lengths)[:, None]).long()


def models() -> list[Model]:
    return [model for group in _groups() for model in getattr(group, "MODELS", ())]


def rows() -> list[Whole]:
    return [row for group in _groups() for row in getattr(group, "ROWS", ())]


def groups() -> list[tuple[list[str], list[str]]]:
    """Of each file here: the pages of its models, and the names of its rows."""
    return [
        (
            sorted({model.page for model in getattr(group, "MODELS", ())}),
            [row.model for row in getattr(group, "ROWS", ())],
        )
        for group in _groups()
    ]


def _groups() -> Iterable[Any]:
    return (importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__))
