"""accelerate on diffusers' HunyuanVideo and HunyuanVideo-1.5: masks as key lengths, what stays, compiled blocks."""

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.accelerated import check_autocast, layers, reasons
from fastdit.testing.exact import exact, no_rounding
from fastdit.testing.zoo import call_model, hunyuan_video as zoo, randn

C, TEXT = 48, zoo.TEXT
TOKENS = 45
OTHERS = {"norm_modulate", "gate_residual_norm_modulate", "gate_residual", "activation", "unpatchify3d"}


def outputs(model, given):
    with no_rounding():
        double = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
        return call_model(exact(model), double), call_model(model, given)


def keys(*lengths):
    """The model's own mask: all of the video, then the valid text."""
    return torch.cat([torch.ones(len(lengths), TOKENS).bool(), zoo.mask(*lengths).bool()], dim=1)[:, None, None]


@torch.no_grad()
def test_padding_is_never_read():
    """What stands in padded text changes no bit, not even NaN, which eager's masks let through."""
    for build, given in ((zoo.hunyuan, zoo.inputs()), (zoo.hunyuan15, zoo.inputs15())):
        model = build()
        fastdit.accelerate(model)
        block = model.transformer_blocks[0]
        x, context, temb = randn(2, TOKENS, C), randn(2, TEXT, C, seed=2), randn(2, C)
        mask = keys(3, 6) if build is zoo.hunyuan else zoo.mask(3, 6)
        rope = model.rope(given["hidden_states"])
        before = block(x, context, temb, mask, rope)
        context = context.masked_fill(zoo.mask(3, 6)[..., None] == 0, float("nan"))
        after = block(x, context, temb, mask, rope)
        close.assert_bitwise(after[0], before[0])
        close.assert_bitwise(after[1][0, :3], before[1][0, :3])


@torch.no_grad()
def test_masks_of_another_form_go_to_the_original():
    model = zoo.hunyuan()
    attn, x, context = model.transformer_blocks[0].attn, randn(2, TOKENS, C), randn(2, TEXT, C)
    dense = keys(3, 6).expand(2, 1, TOKENS + TEXT, TOKENS + TEXT).clone()
    before = attn(x, encoder_hidden_states=context, attention_mask=dense)
    fastdit.accelerate(model)
    for a, b in zip(attn(x, encoder_hidden_states=context, attention_mask=dense), before, strict=True):
        close.assert_bitwise(a, b)


@pytest.mark.parametrize("build, given", [(zoo.hunyuan, zoo.inputs), (zoo.hunyuan15, zoo.inputs15)])
@torch.no_grad()
def test_blocks_around_a_left_attention(build, given):
    """The blocks hand diffusers' own processor what it expects."""
    model = build()
    truth, before = outputs(model, given())
    report = fastdit.accelerate(model, ops=OTHERS)
    assert "HunyuanVideo dual block" in layers(report)
    assert not any("attention" in layer for layer in layers(report))
    close.assert_close(call_model(model, given()), truth, before)


@torch.no_grad()
def test_another_backend_afterwards():
    """diffusers' attention is back, and gets from the single blocks the two streams that it expects."""
    model, given = zoo.hunyuan(), zoo.inputs()
    truth, before = outputs(model, given)
    fastdit.accelerate(model)
    model.set_attention_backend("native")
    close.assert_close(call_model(model, given), truth, before)


@torch.no_grad()
def test_masks_of_hunyuan15_need_no_host():
    """No boolean index and no question to the host: the whole model traces without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    model, given = zoo.hunyuan15(), zoo.inputs15()
    fastdit.accelerate(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {k: mode.from_tensor(v) for k, v in given.items()}
        assert call_model(model, fake).shape == (2, 4, 3, 3, 5)


@pytest.mark.parametrize("build, given", [(zoo.hunyuan, zoo.inputs()), (zoo.hunyuan15, zoo.inputs15())])
@torch.no_grad()
def test_autocast(build, given):
    model = build()
    truth, _ = outputs(model, given)
    check_autocast(model, lambda m: call_model(m, given), truth)


def test_what_stays():
    model = zoo.hunyuan(num_layers=3)
    dual, single = model.transformer_blocks, model.single_transformer_blocks
    dual[0].norm2 = nn.LayerNorm(C)
    dual[1].attn.processor._attention_backend = "native"
    dual[2].ip_adapter = nn.Linear(C, C)
    single[0].act_mlp = nn.GELU()
    single[1].attn.norm_k.eps = 1e-5
    model.x_embedder.proj = nn.Conv3d(4, C, (1, 2, 2), stride=(1, 2, 2), padding=(0, 1, 1))
    report = fastdit.accelerate(model)
    found = layers(report)
    assert found["HunyuanVideo dual block"] == found["HunyuanVideo single block"] == 1
    assert "attention (HunyuanVideoAttnProcessor2_0)" not in found
    assert "patch embedding (Conv3d, kernel = stride)" not in found
    assert {
        "its norm is a LayerNorm, not a LayerNorm without parameters",
        "another attention backend was chosen for it",
        "has ip_adapter, which the HunyuanVideoTransformerBlock that is known does not have",
        "its activation is not GELU (tanh)",
        "its query and key norms differ",
        "its convolution is not a plain nn.Conv3d",
    } <= reasons(report)


@torch.no_grad()
@torch._dynamo.config.patch(error_on_recompile=True)
def test_compiled_blocks():
    model = zoo.hunyuan(image_condition_type="token_replace", num_layers=1, num_single_layers=1)
    fastdit.accelerate(model)
    for block in (model.transformer_blocks[0], model.single_transformer_blocks[0]):
        compiled = torch.compile(block, fullgraph=True, backend="eager", dynamic=True)
        for grid, text in (((2, 3, 5), 7), ((3, 4, 6), 11)):
            frame = grid[1] * grid[2]
            x, context, temb, first = randn(2, grid[0] * frame, C), randn(2, text, C), randn(2, C), randn(2, C, seed=2)
            mask = torch.arange(grid[0] * frame + text) < torch.tensor([[grid[0] * frame + 3], [grid[0] * frame + 6]])
            given = (x, context, temb, mask[:, None, None], model.rope(randn(1, 4, grid[0], 2 * grid[1], 2 * grid[2])))
            given = (*given, first, frame)
            for a, b in zip(compiled(*given), block(*given), strict=True):
                close.assert_bitwise(a, b)
