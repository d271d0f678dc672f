"""The modulation reference against the modules of diffusers, per dtype law.

Where the original runs the same elementary operations, the reference must give its very bits in every dtype. Where it
is a hybrid of the two laws (Mochi), the reference must be no further from fp64 than the original.
"""

import pytest
import torch
from diffusers.models.normalization import (
    AdaLayerNormContinuous,
    AdaLayerNormZero,
    CogVideoXLayerNormZero,
    FP32LayerNorm,
    RMSNorm,
)
from diffusers.models.transformers.transformer_mochi import MochiModulatedRMSNorm, MochiRMSNormZero

from fastdit.reference import modulation as ref
from fastdit.testing import close

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
B, N, C = 2, 48, 1152


def _seeded(module, dtype):
    generator = torch.Generator().manual_seed(1)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.05
        if p.dim() == 1 and p.shape[0] == C:
            p.data += 1
    return module.to(dtype)


def _x(dtype, n=N, c=C):
    return (torch.randn(B, n, c) * 2 + 0.3).to(dtype)


@each_dtype
def test_dit_ada_layer_norm_zero(dtype):
    original = _seeded(AdaLayerNormZero(C), dtype)
    x, emb = _x(dtype), torch.randn(B, C).to(dtype)
    expected, gate_msa, shift_mlp, scale_mlp, gate_mlp = original(x, emb=emb)
    shift, scale, *_ = original.linear(original.silu(emb)).chunk(6, dim=1)
    close.assert_bitwise(ref.norm_modulate(x, shift=shift, scale=scale, precision="native"), expected)
    # the seam of BasicTransformerBlock (ada_norm_zero): gate, add, norm3, modulate
    y = _x(dtype)
    residual = gate_msa.unsqueeze(1) * y + x
    h = torch.nn.functional.layer_norm(residual, (C,), eps=1e-6) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    r, seam = ref.gate_residual_norm_modulate(x, y, gate_msa, shift=shift_mlp, scale=scale_mlp, precision="native")
    close.assert_bitwise(r, residual)
    close.assert_bitwise(seam, h)
    close.assert_bitwise(ref.gate_residual(x, y, gate_mlp, precision="native"), gate_mlp.unsqueeze(1) * y + x)


@each_dtype
@pytest.mark.parametrize("affine", [True, False])
def test_ada_layer_norm_continuous(dtype, affine):
    original = _seeded(AdaLayerNormContinuous(C, C, elementwise_affine=affine, eps=1e-6), dtype)
    x, emb = _x(dtype), torch.randn(B, C).to(dtype)
    scale, shift = original.linear(original.silu(emb)).chunk(2, dim=1)
    weight, bias = (original.norm.weight, original.norm.bias) if affine else (None, None)
    ours = ref.norm_modulate(x, shift=shift, scale=scale, weight=weight, bias=bias, precision="native")
    close.assert_bitwise(ours, original(x, emb))


@each_dtype
def test_ada_layer_norm_continuous_rms(dtype):
    original = _seeded(AdaLayerNormContinuous(C, C, eps=1e-5, norm_type="rms_norm"), dtype)
    x, emb = _x(dtype), torch.randn(B, C).to(dtype)
    scale, shift = original.linear(original.silu(emb)).chunk(2, dim=1)
    ours = ref.norm_modulate(
        x, shift=shift, scale=scale, weight=original.norm.weight, norm="rms", eps=1e-5, precision="native"
    )
    close.assert_bitwise(ours, original(x, emb))


@each_dtype
def test_cogvideox_layer_norm_zero(dtype):
    original = _seeded(CogVideoXLayerNormZero(512, C), dtype)
    video, text, temb = _x(dtype), _x(dtype, 7), torch.randn(B, 512).to(dtype)
    expected = original(video, text, temb)
    rows = original.linear(original.silu(temb)).chunk(6, dim=1)
    affine = dict(weight=original.norm.weight, bias=original.norm.bias, eps=1e-5, precision="native")
    close.assert_bitwise(ref.norm_modulate(video, shift=rows[0], scale=rows[1], **affine), expected[0])
    close.assert_bitwise(ref.norm_modulate(text, shift=rows[3], scale=rows[4], **affine), expected[1])


@each_dtype
def test_wan_block_is_the_fp32_law(dtype):
    norm1 = FP32LayerNorm(C, 1e-6, elementwise_affine=False)
    norm2 = _seeded(FP32LayerNorm(C, 1e-6, elementwise_affine=True), torch.float32)
    x, y = _x(dtype), _x(dtype)
    table, temb = torch.randn(1, 6, C), torch.randn(B, 6, C)
    shift, scale, gate, c_shift, c_scale, c_gate = (table + temb).chunk(6, dim=1)
    expected = (norm1(x.float()) * (1 + scale) + shift).type_as(x)
    close.assert_bitwise(ref.norm_modulate(x, shift=shift, scale=scale), expected)
    # gate, then the affine norm before cross-attention, un-modulated
    residual = (x.float() + y * gate).type_as(x)
    r, h = ref.gate_residual_norm_modulate(x, y, gate, weight=norm2.weight, bias=norm2.bias)
    close.assert_bitwise(r, residual)
    close.assert_bitwise(h, norm2(residual.float()).type_as(x))
    # un-gated add, then the modulated norm before the feed-forward
    added = residual + y
    r, h = ref.gate_residual_norm_modulate(residual, y, shift=c_shift, scale=c_scale)
    close.assert_bitwise(r, added)
    close.assert_bitwise(h, (norm1(added.float()) * (1 + c_scale) + c_shift).type_as(x))
    close.assert_bitwise(ref.gate_residual(added, y, c_gate), (added.float() + y.float() * c_gate).type_as(x))


@each_dtype
@pytest.mark.parametrize("rows", ["one", "per-token"])
def test_ltx_rms(dtype, rows):
    norm = RMSNorm(C, eps=1e-6, elementwise_affine=False)
    x, y = _x(dtype), _x(dtype)
    ada = torch.randn(B, 1 if rows == "one" else N, 6, C).to(dtype)
    shift, scale, gate, shift_mlp, scale_mlp, _ = ada.unbind(dim=2)
    ours = ref.norm_modulate(x, shift=shift, scale=scale, norm="rms", precision="native")
    close.assert_bitwise(ours, norm(x) * (1 + scale) + shift)
    residual = x + y * gate
    r, h = ref.gate_residual_norm_modulate(x, y, gate, shift=shift_mlp, scale=scale_mlp, norm="rms", precision="native")
    close.assert_bitwise(r, residual)
    close.assert_bitwise(h, norm(residual) * (1 + scale_mlp) + shift_mlp)


@each_dtype
def test_mochi_rms_norm_zero(dtype):
    original = _seeded(MochiRMSNormZero(256, 4 * C), dtype)
    x, emb = _x(dtype), torch.randn(B, 256).to(dtype)
    expected, *_ = original(x, emb)
    scale = original.linear(original.silu(emb)).chunk(4, dim=1)[0]
    close.assert_bitwise(ref.norm_modulate(x, scale=scale, norm="rms", eps=1e-5), expected)


@each_dtype
def test_mochi_tanh_gate(dtype):
    norm = MochiModulatedRMSNorm(eps=1e-5)
    x, y, gate = _x(dtype), _x(dtype), torch.randn(B, C).to(dtype)
    original = x + norm(y, torch.tanh(gate).unsqueeze(1))
    options = dict(gate_act="tanh", post_norm="rms", post_norm_eps=1e-5)
    truth = ref.gate_residual(x.double(), y.double(), gate.double(), **options)
    close.assert_close(ref.gate_residual(x, y, gate, **options), truth, original)


@each_dtype
def test_z_image_tanh_gate_is_native(dtype):
    norm = _seeded(RMSNorm(C, eps=1e-5), dtype)
    x, y, gate = _x(dtype), _x(dtype), torch.randn(B, C).to(dtype)
    original = x + gate.tanh().unsqueeze(1) * norm(y)
    ours = ref.gate_residual(
        x, y, gate, gate_act="tanh", post_norm="rms", post_norm_weight=norm.weight, post_norm_eps=1e-5,
        precision="native",
    )  # fmt: skip
    close.assert_bitwise(ours, original)


def test_row_index_is_the_two_segment_select():
    """HunyuanVideo token_replace and Qwen-Image edit choose one of two rows per token with torch.where."""
    x, rows = _x(torch.bfloat16), torch.randn(2, C).bfloat16()
    first = torch.arange(N).expand(B, N) < 16
    chosen = torch.where(first[..., None], rows[0], rows[1])
    expected = torch.nn.functional.layer_norm(x, (C,), eps=1e-6) * (1 + chosen) + chosen
    index = (~first).to(torch.int32)
    close.assert_bitwise(ref.norm_modulate(x, shift=rows, scale=rows, row_index=index, precision="native"), expected)
