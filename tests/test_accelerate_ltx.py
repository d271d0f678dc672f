"""accelerate on diffusers' LTX-Video: key lengths where the mask is 0/1, and what stays."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.integrations.diffusers_processor import Processor
from fastdit.integrations.masks import valid_first
from fastdit.integrations.timestep_rows import PerToken
from fastdit.testing import close
from fastdit.testing.accelerated import check_autocast, layers, reasons
from fastdit.testing.exact import exact
from fastdit.testing.zoo import ltx


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
    check_autocast(model, lambda m: m(**given).sample, truth, dtype)


@torch.no_grad()
def test_a_timestep_per_token_is_embedded_once_each():
    """Three timesteps in 60 tokens are three rows, also where a block that is left makes them dense."""
    model, given = ltx.ltx(), ltx.inputs(per_token=True, coordinates=True)
    rows, taken = [], []
    model.time_embed.linear.register_forward_hook(lambda module, inputs, output: rows.append(tuple(output.shape)))
    truth, before = exact(model)(**ltx.MODELS[1].given(torch.float64)).sample, model(**given).sample
    fastdit.accelerate(model)
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda m, args, kwargs: taken.append(kwargs["temb"]), with_kwargs=True)
    close.assert_close(model(**given).sample, truth, before)
    assert rows == [(60, 6 * 44)] * 2 + [(3, 6 * 44)]
    assert [(type(temb), temb.shape) for temb in taken] == [(PerToken, (2, 30, 6 * 44))] * 2
    fastdit.accelerate(model, exclude=["transformer_blocks.1"])
    close.assert_close(model(**given).sample, truth, before)
    assert rows[3:] == [(3, 6 * 44)]
    model(**{**given, "timestep": torch.rand(2, 30)})  # all different
    model(**{**given, "timestep": torch.rand(2)})
    assert rows[4:] == [(60, 6 * 44), (2, 6 * 44)]


def test_rows_are_a_tensor_to_anybody_else():
    rows = PerToken(torch.randn(3, 8), torch.tensor([0, 2, 2, 1, 0, 1])).view(2, -1, 8)
    dense = rows.dense()
    assert rows.shape == dense.shape and rows.size(-1) == 8 and rows.size() == dense.size()
    close.assert_bitwise(rows.reshape(2, rows.size(1), 4, -1), dense.reshape(2, 3, 4, 2))
    close.assert_bitwise(rows.view(2, 3, 4, 2), dense.view(2, 3, 4, 2))
    close.assert_bitwise(torch.ones(8) + rows, dense + 1)
    close.assert_bitwise(torch.cat([rows, dense]), torch.cat([dense, dense]))


def test_what_stays():
    model = ltx.ltx()
    first, second = model.transformer_blocks
    first.norm2 = nn.RMSNorm(44, elementwise_affine=False)
    second.adapter = nn.Linear(44, 44)
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "text padding (a 0/1 mask over the keys)": 1,
        "output norm (modulated by the model)": 1,
    }
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


@pytest.mark.parametrize("rows", [False, True], ids=["", "rows"])
@torch.no_grad()
def test_compiled_block(rows):
    model = ltx.ltx(num_layers=1)
    fastdit.accelerate(model)
    block = model.transformer_blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for grid, text, lengths in (((2, 3, 5), 7, [3, 5]), ((2, 4, 6), 9, [9, 2])):
            tokens = grid[0] * grid[1] * grid[2]
            x, context, temb = torch.randn(2, tokens, 44), torch.randn(2, text, 44), torch.randn(2, 1, 6 * 44)
            if rows:
                temb = PerToken(torch.randn(3, 6 * 44), torch.arange(2 * tokens).remainder(3).view(2, tokens))
            call = x, context, temb, model.rope(x, *grid), torch.tensor(lengths, dtype=torch.int32)
            close.assert_bitwise(compiled(*call), block(*call))


@torch.no_grad()
def test_compiled_model():
    """Tokens of valid text are put in front inside the graph."""
    model, given = ltx.ltx(num_layers=1), ltx.inputs()
    fastdit.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close.assert_bitwise(compiled(**given).sample, model(**given).sample)


@torch.no_grad()
def test_compiled_model_keeps_a_row_per_token():
    """Counting timesteps would stop the graph."""
    model, entry = ltx.ltx(num_layers=1), ltx.MODELS[1]
    given = entry.given(torch.float32)
    truth, before = exact(model)(**entry.given(torch.float64)).sample, model(**given).sample
    fastdit.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close.assert_close(compiled(**given).sample, truth, before)
