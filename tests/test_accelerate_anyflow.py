"""accelerate on diffusers' AnyFlow: rows of frames, blocks that are left, and FAR, which attends by flex attention."""

from typing import Any

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_one_graph, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.models import randomize
from fastdit.testing.zoo import anyflow, randn


@torch.no_grad()
def test_modulation_stays_a_row_per_frame():
    """A block that is left gets a row per token, as the original makes them."""
    entry, shapes = anyflow.MODELS[0], []
    model, given = entry.build(), entry.inputs()
    with no_rounding():
        truth = exact(model)(**entry.given(torch.float64)).sample
    before = model(**given).sample
    fastdit.accelerate(model, exclude=["blocks.1"])
    for block in model.blocks:
        block.register_forward_pre_hook(lambda block, args: shapes.append(getattr(args[2], "table", args[2]).shape))
    close.assert_close(model(**given).sample, truth, before)
    assert shapes == [(2, 3, 6, 48), (2, 45, 6, 48)]


@pytest.mark.full
@torch.no_grad()
def test_one_graph_for_two_lengths():
    model = anyflow.anyflow(num_layers=1)
    fastdit.accelerate(model)

    def call(n):
        freqs = torch.polar(torch.ones(1, 1, n, 12), torch.randn(1, 1, n, 12)).to(torch.complex128)
        rotary = {"query": freqs, "key": freqs}
        return torch.randn(2, n, 48), torch.randn(2, 7, 48), torch.randn(2, n, 6, 48), rotary, None

    check_one_graph(model.blocks[0], map(call, (15, 24)))


@torch.no_grad()
def test_a_mask_goes_to_the_original():
    model = anyflow.anyflow(num_layers=1)
    freqs = torch.polar(torch.ones(1, 1, 9, 12), randn(1, 1, 9, 12)).to(torch.complex128)
    rotary, mask = {"query": freqs, "key": freqs}, torch.ones(9, 9).tril().bool()
    x, text, temb = randn(2, 9, 48), randn(2, 7, 48), randn(2, 9, 6, 48)
    with no_rounding():
        truth = exact(model).blocks[0](x.double(), text.double(), temb.double(), rotary, mask)
    before = model.blocks[0](x, text, temb, rotary, mask)
    fastdit.accelerate(model)
    close.assert_close(model.blocks[0](x, text, temb, rotary, mask), truth, before)


def far() -> Any:
    from diffusers import AnyFlowFARTransformer3DModel

    return randomize(AnyFlowFARTransformer3DModel(**anyflow.SMALL, full_chunk_limit=2, chunk_partition=(1, 1, 1)))


def rollout(model: Any, dtype: torch.dtype) -> torch.Tensor:
    """Three chunks of a frame, the first one compressed; then the third anew, over a cache of the first two."""
    latents, text = randn(2, 3, 4, 8, 12).to(dtype), randn(2, 7, 32, seed=2).to(dtype)
    timestep = torch.tensor([[3.0, 300.0, 987.0], [40.0, 40.0, 500.0]])

    def call(frames: slice, **more: Any) -> Any:
        times = dict(timestep=timestep[:, frames], r_timestep=timestep[:, frames] / 2)
        return model(latents[:, frames], **times, encoder_hidden_states=text, chunk_partition=[1] * frames.stop, **more)

    trained = call(slice(3)).sample

    def cache(tokens: int) -> torch.Tensor:
        return torch.zeros(2, 2, 2, tokens, 24, dtype=dtype)

    kv_cache = [{"compressed_cache": cache(12), "full_cache": cache(48)} for _ in model.blocks]
    call(slice(2), kv_cache=kv_cache, kv_cache_flag={"is_cache_step": True})
    flag = {"is_cache_step": False, "num_cached_chunks": 2}
    step = call(slice(2, 3), kv_cache=kv_cache, kv_cache_flag=flag).sample
    kept = [t for layer in kv_cache for t in layer.values()]
    return torch.cat([t.flatten() for t in (trained, step, *kept)])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_far():
    model = far()
    with no_rounding():
        truth = rollout(exact(model), torch.float64)
    before = rollout(model, torch.float32)
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "AnyFlow block": 2,
        "attention (WanAttnProcessor)": 2,  # the cross-attentions
        "feed-forward activation": 2,
        "patch embedding (Conv3d, kernel = stride)": 1,
    }
    close.assert_close(rollout(model, torch.float32), truth, before)


def test_what_stays():
    model = anyflow.anyflow(num_layers=3)
    model.blocks[0].adapter = nn.Linear(4, 4)
    model.blocks[1].attn1.norm_q = nn.LayerNorm(48)
    model.blocks[2].attn2.norm_k.eps = 1e-3
    report = fastdit.accelerate(model)
    assert {
        "has adapter, which the AnyFlowTransformerBlock that is known does not have",
        "inside a block that is left",
        "its norms are not RMSNorm",
        "its norms differ in eps",
    } <= reasons(report)
    assert layers(report)["AnyFlow block"] == 2 and layers(report)["attention (WanAttnProcessor)"] == 2
