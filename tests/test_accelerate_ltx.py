"""accelerate on diffusers' LTX-Video: key lengths where the mask is 0/1, and what stays."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.integrations.diffusers_processor import Processor
from fastdit.integrations.masks import valid_first
from fastdit.testing import close
from fastdit.testing.exact import exact
from fastdit.testing.zoo import ltx


def layers(report):
    return {row.layer: row.count for row in report.rows if row.replaced}


def reasons(report):
    return {row.why for row in report.rows if not row.replaced}


def forbidden(*args, **kwargs):
    raise AssertionError("the original was called")


def test_valid_first():
    states, mask = torch.arange(12.0).view(3, 4, 1), torch.tensor([[0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    lengths, moved, keys = valid_first(mask, states, states[..., None].expand(3, 4, 2, 5))
    assert moved[..., 0].tolist() == [[1, 3, 0, 2], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert torch.equal(keys[:, :, 1, 2], moved[..., 0])
    assert lengths.tolist() == [2, 2, 0] and lengths.dtype is torch.int32


@torch.no_grad()
def test_masks_become_lengths_or_go_to_the_original(monkeypatch):
    model, given = ltx.ltx(), ltx.inputs()
    fastdit.accelerate(model)
    processor = model.transformer_blocks[0].attn2.processor
    assert isinstance(processor, Processor)
    monkeypatch.setattr(processor, "original", forbidden)
    model(**given)
    weights = {**given, "encoder_attention_mask": given["encoder_attention_mask"].float()}
    with pytest.raises(AssertionError, match="original"):
        model(**weights)


@torch.no_grad()
def test_one_block_excluded():
    """A plain block takes no lengths: then all get the bias."""
    model, given = ltx.ltx(), ltx.inputs()
    truth, before = exact(model)(**ltx.MODELS[0].given(torch.float64)).sample, model(**given).sample
    report = fastdit.accelerate(model, exclude=["transformer_blocks.1"])
    assert layers(report)["LTX block"] == 1
    close.assert_close(model(**given).sample, truth, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_autocast(dtype):
    model, given = ltx.ltx(), ltx.inputs()
    truth = exact(model)(**ltx.MODELS[0].given(torch.float64)).sample
    with torch.autocast("cpu", dtype):
        before = model(**given).sample
        fastdit.accelerate(model)
        after = model(**given).sample
    assert after.dtype == before.dtype
    close.assert_close(after, truth, before)


def test_what_stays():
    model = ltx.ltx()
    first, second = model.transformer_blocks
    first.norm2 = nn.RMSNorm(44, elementwise_affine=False)
    second.adapter = nn.Linear(44, 44)
    report = fastdit.accelerate(model)
    assert layers(report) == {"text padding (a 0/1 mask over the keys)": 1}
    assert {
        "its norm is a RMSNorm, not diffusers' RMSNorm without weights",
        "has adapter, which the LTXVideoTransformerBlock that is known does not have",
        "inside a block that is left",
    } <= reasons(report)

    model = ltx.ltx(norm_elementwise_affine=True, num_layers=1)
    model.adapter = nn.Linear(44, 44)
    assert {
        "its norm is a RMSNorm, not diffusers' RMSNorm without weights",
        "has adapter, which the LTXVideoTransformer3DModel that is known does not have",
    } <= reasons(fastdit.accelerate(model))

    model = ltx.ltx(num_layers=1)
    block = model.transformer_blocks[0]
    block.attn1.norm_q = nn.LayerNorm(44)
    block.attn2.processor._attention_backend = "native"
    assert {
        "its norms are not nn.RMSNorm with weights and one eps",
        "another attention backend was chosen for it",
    } <= reasons(fastdit.accelerate(model))


@torch.no_grad()
def test_compiled_block():
    model = ltx.ltx(num_layers=1)
    fastdit.accelerate(model)
    block = model.transformer_blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grid, text, lengths in (((2, 3, 5), 7, [3, 5]), ((2, 4, 6), 9, [9, 2])):
            tokens = grid[0] * grid[1] * grid[2]
            x, context, temb = torch.randn(2, tokens, 44), torch.randn(2, text, 44), torch.randn(2, 1, 6 * 44)
            call = x, context, temb, model.rope(x, *grid), torch.tensor(lengths, dtype=torch.int32)
            close.assert_bitwise(compiled(*call), block(*call))


@torch.no_grad()
def test_compiled_model():
    """Tokens of valid text are put in front inside the graph."""
    model, given = ltx.ltx(num_layers=1), ltx.inputs()
    fastdit.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close.assert_bitwise(compiled(**given).sample, model(**given).sample)
