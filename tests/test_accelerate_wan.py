"""accelerate and restore on diffusers' WanTransformer3DModel: T2V, I2V, a timestep per token, fused projections."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.integrations.wan_block import Rows
from fastdit.testing import close
from fastdit.testing.accelerated import check_one_graph, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.models import diffusers_wan
from fastdit.testing.zoo import wan

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def inputs(dtype, **options):
    return {k: v if k == "timestep" or v is None else v.to(dtype) for k, v in wan.inputs(**options).items()}


def run(model, given, dtype=None):
    given = {k: v.to(dtype) if dtype and torch.is_tensor(v) and k != "timestep" else v for k, v in given.items()}
    return model(**given, return_dict=False)[0]


def truth_of(model, given):
    with no_rounding():
        return run(exact(model), given, torch.float64)


@torch.no_grad()
def test_fused_projections():
    for config, options in (({}, {}), (wan.I2V, dict(image=True))):
        model, given = diffusers_wan(**config), inputs(torch.float32, **options)
        truth, before = truth_of(model, given), run(model, given)
        fastdit.accelerate(model)
        for block in model.blocks:
            block.attn1.fuse_projections()
            block.attn2.fuse_projections()
        close.assert_close(run(model, given), truth, before)


@each_dtype
@torch.no_grad()
def test_block_at_full_width(dtype):
    """One Wan2.1-1.3B block: 12 heads of 128, feed-forward 8960."""
    config = dict(num_attention_heads=12, attention_head_dim=128, ffn_dim=8960, num_layers=1)
    model, given = diffusers_wan(**config).to(dtype), inputs(dtype)
    truth, before = truth_of(model, given), run(model, given)
    fastdit.accelerate(model)
    close.assert_close(run(model, given), truth, before)


def test_what_stays():
    model = diffusers_wan()
    model.blocks[0].norm1 = nn.RMSNorm(48)
    model.blocks[1].attn1.processor = copy.copy(model.blocks[1].attn1.processor)
    model.blocks[1].attn1.processor._attention_backend = "native"
    model.patch_embedding = nn.Conv3d(4, 48, (1, 2, 2), stride=(1, 2, 2), padding=(0, 1, 1))
    report = fastdit.accelerate(model)
    assert layers(report) == {
        "Wan block": 1,
        "attention (WanAttnProcessor)": 1,
        "feed-forward activation": 1,
        "Wan output layer (norm, modulation, unpatchify)": 1,
    }
    assert "its norm is a RMSNorm, not a LayerNorm" in reasons(report)
    assert "another attention backend was chosen for it" in reasons(report)
    assert "its convolution is not a plain nn.Conv3d" in reasons(report)


@torch.no_grad()
def test_masks_go_to_the_original():
    model = diffusers_wan()
    attn, h, context = model.blocks[0].attn2, torch.randn(2, 5, 48), torch.randn(2, 7, 48)
    mask = torch.arange(7).ge(4).expand(2, 1, 1, 7)
    before = attn(h, context, mask)
    fastdit.accelerate(model)
    close.assert_bitwise(attn(h, context, mask), before)


@torch.no_grad()
def test_compiled_block():
    model = diffusers_wan()
    fastdit.accelerate(model)
    block = model.blocks[0]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for grid in ((1, 2, 4), (2, 3, 5)):
        tokens = grid[0] * grid[1] * grid[2]
        rope = model.rope(torch.empty(1, 4, grid[0], 2 * grid[1], 2 * grid[2]))
        h, context, temb = torch.randn(2, tokens, 48), torch.randn(2, 9, 48), torch.randn(2, 6, 48)
        close.assert_bitwise(compiled(h, context, temb, rope), block(h, context, temb, rope))


# A timestep per token -----------------------------------------------------------------------------


def given_to(model):
    """What each block is called with as temb, while the model runs."""
    seen = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    return seen


@torch.no_grad()
def test_few_timesteps_are_few_rows():
    model, given = diffusers_wan(), inputs(torch.float32, per_token=True)
    truth, before = truth_of(model, given), run(model, given)
    fastdit.accelerate(model, exclude=["blocks.1"])
    seen = given_to(model)
    close.assert_close(run(model, given), truth, before)
    rows, dense = seen
    assert isinstance(rows, Rows) and rows.table.shape == (3, 6, 48) and rows.row_index.shape == (2, 48)
    assert dense.shape == (2, 48, 6, 48)  # a block that is left gets what the original gives it
    close.assert_bitwise(dense, rows.dense(48))


@torch.no_grad()
def test_compiled_models_keep_a_row_per_token():
    """The number of rows would be read back from the device in the middle of the graph."""
    model, given = diffusers_wan(num_layers=1), inputs(torch.float32, per_token=True)
    truth, before = truth_of(model, given), run(model, given)
    fastdit.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close.assert_close(run(compiled, given), truth, before)


@torch.no_grad()
def test_compiled_block_takes_rows():
    model = diffusers_wan()
    fastdit.accelerate(model)

    def call(grid):
        tokens = grid[0] * grid[1] * grid[2]
        rope = model.rope(torch.empty(1, 4, grid[0], 2 * grid[1], 2 * grid[2]))
        rows = Rows(torch.randn(3, 6, 48), torch.arange(2 * tokens).remainder(3).view(2, tokens))
        h, context = torch.randn(2, tokens, 48), torch.randn(2, 9, 48)
        return h, context, rows, rope

    # no size equals another one, which would be a guard
    check_one_graph(model.blocks[0], map(call, ((4, 5, 7), (3, 8, 5), (6, 4, 9))))


@torch.no_grad()
def test_lora_scale_reaches_the_model(monkeypatch):
    from diffusers.utils import peft_utils

    scales = []
    monkeypatch.setattr("diffusers.utils.USE_PEFT_BACKEND", True)
    monkeypatch.setattr(peft_utils, "scale_lora_layers", lambda model, weight: scales.append(weight))
    monkeypatch.setattr(peft_utils, "unscale_lora_layers", lambda model, weight: scales.append(-weight))
    model, given = diffusers_wan(), inputs(torch.float32)
    fastdit.accelerate(model)
    close.assert_bitwise(run(model, given | {"attention_kwargs": {"scale": 0.5}}), run(model, given))
    assert scales == [0.5, -0.5]


def test_a_cache_that_replaces_the_forward_of_the_class_stays(monkeypatch):
    """TeaCache and its like keep their state in attributes of the class."""
    model = diffusers_wan()

    def forward(self, hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image=None,
                return_dict=True, attention_kwargs=None):  # fmt: skip
        return self.steps_seen

    monkeypatch.setattr(type(model), "forward", forward)
    monkeypatch.setattr(type(model), "steps_seen", 0, raising=False)
    report = fastdit.accelerate(model)
    assert any(row.why.startswith("has steps_seen") for row in report.rows)
    assert "forward" not in model.__dict__ and "forward" in model.blocks[0].__dict__
