"""A timestep per token in as many rows as there are different timesteps (LTX, LTX-2).

Image conditioning gives every token a timestep of its own, of which two or three differ. The originals embed each, and
every block reads (B, N, 6C); here each different one is embedded once, and blocks take the row of each token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastdit.integrations.registry import Kind, original, register
from fastdit.integrations.structure import has, parameters, unknown
from fastdit.integrations.wan_block import distinct


@dataclass(frozen=True, eq=False)
class PerToken:
    """A tensor (B, N, W) of few different rows: they, (R, W), and which each token has, (B, N).

    Blocks that know it read these two; to anybody else it is the tensor, made anew each time.
    """

    table: Tensor
    row_index: Tensor

    def dense(self) -> Tensor:
        return self.table[self.row_index]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.row_index.shape, self.table.shape[-1]))

    def size(self, *dim: int) -> Any:
        return self.shape[dim[0]] if dim else self.shape

    def view(self, *shape: int) -> PerToken | Tensor:
        if shape[-1] != self.table.shape[-1]:
            return self.dense().view(*shape)
        return PerToken(self.table, self.row_index.view(*shape[:-1]))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dense(), name)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, cls.dense, (args, kwargs or {}))
        return func(*args, **kwargs)


def with_index(temb: Tensor | PerToken) -> tuple[Tensor, Tensor | None]:
    """(B, M, W) as it is, or rows (R, W) and the row of each token."""
    return (temb.table, temb.row_index) if isinstance(temb, PerToken) else (temb, None)


def embedding_forward(
    self,
    timestep: Tensor,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    batch_size: int | None = None,
    hidden_dtype: torch.dtype | None = None,
) -> tuple[Tensor | PerToken, Tensor]:
    """AdaLayerNormSingle of (B,) timesteps, or of (B * N,) with one per token; the output layer's stay dense."""
    few, tokens = None, timestep.shape[0]
    if batch_size is not None and tokens > batch_size and not added_cond_kwargs:
        few = distinct(timestep)
    if few is None or 2 * few[0].shape[0] > tokens:
        return original(self, timestep, added_cond_kwargs, batch_size, hidden_dtype)
    steps, index = few
    temb, embedded = original(self, steps, batch_size=batch_size, hidden_dtype=hidden_dtype)
    return PerToken(temb, index), embedded[index]


embedding_forward.__name__ = "forward"

EMBEDDING = ["timestep", "added_cond_kwargs", "batch_size", "hidden_dtype"]


def embeddings(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.children() if has(m, "emb", "silu", "linear") and parameters(m) == EMBEDDING]


def refuse(model: Any, refuse_block: Callable[[Any], str | None]) -> str | None:
    if all(refuse_block(block) is not None for block in model.transformer_blocks):
        return "none of its blocks is known"
    for module in embeddings(model):
        if getattr(module.emb, "use_additional_conditions", True):
            return "its timesteps are embedded with sizes, which every sample has"
        if reason := unknown(module, "emb", "silu", "linear", "num_mod_params"):
            return reason
    return None


def register_model(name: str, call: list[str], refuse_block: Callable[[Any], str | None]) -> None:
    """Of a model whose blocks have these parameters, and where they are not refused take `PerToken` for their temb."""
    register(
        Kind(
            name=name,
            ops=("norm_modulate", "gate_residual", "gate_residual_norm_modulate"),
            match=lambda m: (
                has(m, "transformer_blocks", "time_embed")
                and all(parameters(block) == call for block in m.transformer_blocks)
                and m.time_embed in embeddings(m)
            ),
            refuse=lambda m: refuse(m, refuse_block),
            patches=lambda model: [(module, "forward", embedding_forward) for module in embeddings(model)],
        )
    )
