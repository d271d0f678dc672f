"""accelerate and restore on diffusers' WanTransformer3DModel: T2V, I2V, a timestep per token, fused projections."""

import copy

import pytest
import torch
from torch import nn

import fastdit
from fastdit.testing import close
from fastdit.testing.models import cast, diffusers_wan

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
LAYERS = {"Wan block": 2, "attention (WanAttnProcessor)": 4, "patch embedding (Conv3d, kernel = stride)": 1}
I2V = dict(image_dim=20, added_kv_proj_dim=48)


def inputs(dtype, *, image=False, per_token=False, text=512):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 2, 8, 12, generator=g).to(dtype)
    t = torch.tensor([3.0, 987.0])
    if per_token:
        t = t[:, None] * torch.arange(2 * 4 * 6).remainder(2)
    context = torch.randn(2, text, 32, generator=g).to(dtype)
    return dict(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=context,
        encoder_hidden_states_image=torch.randn(2, 257, 20, generator=g).to(dtype) if image else None,
    )


def run(model, given, dtype=None):
    given = {k: v.to(dtype) if dtype and v is not None and k != "timestep" else v for k, v in given.items()}
    return model(**given, return_dict=False)[0]


class Exact(nn.LayerNorm):
    def forward(self, x):
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)


def exact(model):
    """The model in fp64: `.float()` and `.to(float32)` of the original are kept from rounding."""
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if type(module).__name__ == "FP32LayerNorm":
            module.__class__ = Exact
    return double


class NoFloat(torch.overrides.TorchFunctionMode):
    """Tensor.float() on fp64 tensors is the identity: the originals round to fp32 there."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.float and args[0].dtype is torch.float64:
            return args[0]
        return func(*args, **(kwargs or {}))


def truth_of(model, given):
    with NoFloat():
        return run(exact(model), given, torch.float64)


def layers(report, replaced=True):
    return {row.layer: row.count for row in report.rows if row.replaced is replaced}


@each_dtype
@pytest.mark.parametrize(
    "config, options",
    [
        ({}, {}),
        (I2V, dict(image=True)),
        ({}, dict(per_token=True)),
        (dict(cross_attn_norm=False), {}),
    ],
    ids=["t2v", "i2v", "per-token", "no-cross-norm"],
)
@torch.no_grad()
def test_output(config, options, dtype):
    model, given = diffusers_wan(**config).to(dtype), inputs(dtype, **options)
    truth, before = truth_of(model, given), run(model, given)
    assert truth.dtype is torch.float64
    report = fastdit.accelerate(model)
    mlps = 2 + (config is I2V)  # the image embedder has one
    assert layers(report) == {**LAYERS, "feed-forward activation": mlps}
    after = run(model, given)
    assert after.dtype == before.dtype and after.shape == before.shape
    close.assert_close(after, truth, before)
    fastdit.restore(model)
    close.assert_bitwise(run(model, given), before)


@torch.no_grad()
def test_tables_and_norms_in_fp32_beside_bf16_tokens():
    """What from_pretrained(torch_dtype=bfloat16) gives: _keep_in_fp32_modules."""
    model, given = cast(diffusers_wan(), torch.bfloat16), inputs(torch.bfloat16)
    assert model.blocks[0].norm2.weight.dtype is model.scale_shift_table.dtype is torch.float32
    assert model.blocks[0].attn1.norm_q.weight.dtype is torch.bfloat16
    truth, before = truth_of(model, given), run(model, given)
    fastdit.accelerate(model)
    close.assert_close(run(model, given), truth, before)


@torch.no_grad()
def test_fused_projections():
    for config, options in (({}, {}), (I2V, dict(image=True))):
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


@each_dtype
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients(dtype, checkpointing):
    model, given = diffusers_wan().to(dtype), inputs(dtype, text=13)
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()

    def gradients(model, dtype=None):
        model.zero_grad()
        run(model, given, dtype).square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    double = exact(model)
    double.disable_gradient_checkpointing()
    with NoFloat():
        truth = gradients(double, torch.float64)
    before = gradients(model)
    fastdit.accelerate(model)
    after = gradients(model)
    assert after.keys() == before.keys() == truth.keys()
    scales = {name: g.square().mean().sqrt() for name, g in truth.items() if g.any()}
    pooled = [torch.cat([(g[n].double() / s).flatten() for n, s in scales.items()]) for g in (after, truth, before)]
    close.assert_close(pooled[0].to(dtype), pooled[1], pooled[2].to(dtype))


def test_what_stays():
    model = diffusers_wan()
    model.blocks[0].norm1 = nn.RMSNorm(48)
    model.blocks[1].attn1.processor = copy.copy(model.blocks[1].attn1.processor)
    model.blocks[1].attn1.processor._attention_backend = "native"
    model.patch_embedding = nn.Conv3d(4, 48, (1, 2, 2), stride=(1, 2, 2), padding=(0, 1, 1))
    report = fastdit.accelerate(model)
    assert layers(report) == {"Wan block": 1, "attention (WanAttnProcessor)": 3, "feed-forward activation": 2}
    reasons = {row.why for row in report.rows}
    assert "its norm is a RMSNorm, not a LayerNorm" in reasons
    assert "an attention backend or context parallelism was chosen for it" in reasons
    assert "its convolution is not a plain nn.Conv3d" in reasons


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
