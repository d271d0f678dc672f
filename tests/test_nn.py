"""fastdit.nn: outputs and gradients of every layer against plain PyTorch in fp64, packed input, keys, dtype, device."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdit import ops
from fastdit.nn import (
    AdaLNAttention,
    AdaLNMlp,
    AdaLNZeroBlock,
    CausalConv3d,
    ChannelRMSSiLU,
    CrossAttention,
    DiTBlock,
    FinalLayer,
    PatchEmbed3d,
    QKNormRope,
)
from fastdit.packing import pack, unpack
from fastdit.testing import close
from fastdit.testing.models import randomize

C, HEADS, GRID = 48, 3, (2, 3, 5)
N, GRID_PIXELS = 30, (2, 6, 10)
PARTS = ("weight", "bias")
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def modulate(x, shift, scale):
    if shift.ndim == 2:
        shift, scale = shift.unsqueeze(1), scale.unsqueeze(1)
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def gated(x, gate, y):
    return x + (gate.unsqueeze(1) if gate.ndim == 2 else gate) * y


def rotated(x, cos, sin):
    """Pairs (2i, 2i + 1) of (B, N, H, D), in x's dtype after the products as diffusers writes it."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (t.to(wide)[:, None] for t in (cos, sin))
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


def plain_attention(m, x, shift, scale, gate, cos=None, sin=None):
    heads = m.num_heads + 2 * m.num_kv_heads
    q, k, v = (
        m.qkv(modulate(x, shift, scale))
        .unflatten(-1, (heads, -1))
        .split([m.num_heads, m.num_kv_heads, m.num_kv_heads], dim=-2)
    )
    if m.q_norm is not None:
        q, k = m.q_norm(q), m.k_norm(k)
    if cos is not None:
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    o = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    return gated(x, gate, m.proj(o))


def plain_mlp(m, x, shift, scale, gate):
    return gated(x, gate, m.fc2(F.gelu(m.fc1(modulate(x, shift, scale)), approximate="tanh")))


def plain_block(m, x, c, cos=None, sin=None):
    tables = m.adaLN_modulation(c).chunk(6, dim=-1)
    return plain_mlp(m.mlp, plain_attention(m.attn, x, *tables[:3], cos, sin), *tables[3:])


def plain_ungated_block(m, x, c):
    """Whatever it is conditioned by but gates."""
    if c is None:
        before = [m.norm1, m.norm2]
    else:
        tables = m.adaLN_modulation(c).chunk(4, dim=-1)
        before = [
            partial(modulate, shift=tables[0], scale=tables[1]),
            partial(modulate, shift=tables[2], scale=tables[3]),
        ]
    q, k, v = m.attn.qkv(before[0](x)).unflatten(-1, (3, m.attn.num_heads, -1)).transpose(1, 3).unbind(2)
    x = x + m.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    return x + m.mlp.fc2(F.gelu(m.mlp.fc1(before[1](x)), approximate="tanh"))


def plain_cross(m, x, context):
    q = m.q_norm(m.to_q(m.norm(x)).unflatten(-1, (m.num_heads, -1))).transpose(1, 2)
    k, v = m.to_kv(context).unflatten(-1, (2, m.num_heads, -1)).unbind(2)
    o = F.scaled_dot_product_attention(q, m.k_norm(k).transpose(1, 2), v.transpose(1, 2))
    return x + m.proj(o.transpose(1, 2).flatten(2))


def plain_final(m, x, c):
    return m.linear(modulate(x, *m.adaLN_modulation(c).chunk(2, dim=-1)))


def plain_qk(m, q, k, cos, sin):
    def normed(x, norm):
        return norm(x.flatten(-2)).unflatten(-1, x.shape[-2:]) if m.scope == "hidden" else norm(x)

    q, k = (q, k) if m.norm is None else (normed(q, m.norm_q), normed(k, m.norm_k))
    return rotated(q, cos, sin), rotated(k, cos, sin)


def plain_patches(m, x, pos):
    conv = F.conv3d if x.ndim == 5 else F.conv2d
    return conv(x, m.proj.weight, m.proj.bias, stride=m.proj.stride).flatten(2).transpose(1, 2) + pos


def plain_channel_silu(m, x):
    return F.silu(F.normalize(x, dim=1) * x.shape[1] ** 0.5 * m.gamma)


def plain_causal(m, x):
    k_t, k_h, k_w = m.kernel_size
    pads = (k_w // 2, k_w // 2, k_h // 2, k_h // 2, (k_t - 1) * m.dilation[0], 0)
    return F.conv3d(F.pad(x, pads), m.weight, m.bias, m.stride, 0, m.dilation)


def randn(*shapes):
    return lambda: [torch.randn(shape) for shape in shapes]


@dataclass
class Layer:
    """A layer of the package, its inputs, and what it does in plain PyTorch (the module, the inputs, cos and sin)."""

    make: Callable[..., nn.Module]
    inputs: Callable[[], list[torch.Tensor]]
    plain: Callable[..., object]
    rope: bool = False


TOKENS, ROWS, HEADED = (2, N, C), (2, C), (2, N, HEADS, 16)
LAYERS = {
    "block": Layer(partial(AdaLNZeroBlock, C, HEADS), randn(TOKENS, ROWS), plain_block),
    "block, qk_norm, rope, GQA, a row per frame": Layer(
        partial(AdaLNZeroBlock, C, HEADS, 2.5, qk_norm="rms", num_kv_heads=1, qkv_bias=False),
        randn(TOKENS, (2, GRID[0], C)),
        lambda m, x, c, cos, sin: plain_block(m, x, c.repeat_interleave(N // GRID[0], 1), cos, sin),
        rope=True,
    ),
    "block without gates, narrow conditions": Layer(
        partial(DiTBlock, C, HEADS, conditioning="adaln", cond_size=20), randn(TOKENS, (2, 20)), plain_ungated_block
    ),
    "block without conditions": Layer(
        partial(DiTBlock, C, HEADS, conditioning=None), randn(TOKENS), lambda m, x: plain_ungated_block(m, x, None)
    ),
    "cross-attention": Layer(
        partial(CrossAttention, C, HEADS, 28, qk_norm="rms"), randn(TOKENS, (2, 7, 28)), plain_cross
    ),
    "attention, layer norm": Layer(
        partial(AdaLNAttention, C, HEADS, qk_norm="layer"), randn(TOKENS, ROWS, ROWS, ROWS), plain_attention
    ),
    "mlp": Layer(partial(AdaLNMlp, C, 100), randn(TOKENS, ROWS, ROWS, ROWS), plain_mlp),
    "final layer": Layer(partial(FinalLayer, C, 24), randn(TOKENS, ROWS), plain_final),
    "final layer, narrow conditions": Layer(
        partial(FinalLayer, C, 24, cond_size=20), randn(TOKENS, (2, 20)), plain_final
    ),
    "final layer without conditions": Layer(
        partial(FinalLayer, C, 24, modulated=False), randn(TOKENS), lambda m, x: m.linear(m.norm(x))
    ),
    "final layer, a row per token": Layer(partial(FinalLayer, C, 24), randn(TOKENS, TOKENS), plain_final),
    "qk, rms over all heads": Layer(
        partial(QKNormRope, HEADS * 16, scope="hidden", k_dim=16), randn(HEADED, (2, N, 1, 16)), plain_qk, rope=True
    ),
    "qk, layer": Layer(partial(QKNormRope, 16, norm="layer"), randn(HEADED, HEADED), plain_qk, rope=True),
    "qk, no norm": Layer(partial(QKNormRope, 16, norm=None), randn(HEADED, HEADED), plain_qk, rope=True),
    "patches": Layer(partial(PatchEmbed3d, 4, C, (1, 2, 2)), randn((2, 4, *GRID_PIXELS), (1, N, C)), plain_patches),
    "patches of images": Layer(
        partial(PatchEmbed3d, 4, C, (2, 3), bias=False), randn((2, 4, 6, 9), (9, C)), plain_patches
    ),
    "channel norm and SiLU": Layer(partial(ChannelRMSSiLU, 20), randn((2, 20, 3, 5, 7)), plain_channel_silu),
    "channel norm and SiLU of a frame": Layer(
        partial(ChannelRMSSiLU, 20, axes=2), randn((2, 20, 5, 7)), plain_channel_silu
    ),
    "causal convolution": Layer(
        partial(CausalConv3d, 6, 10, (3, 3, 1), stride=(1, 2, 1)), randn((2, 6, 4, 8, 7)), plain_causal
    ),
    "causal convolution, dilated in time": Layer(
        partial(CausalConv3d, 6, 10, (3, 1, 1), dilation=(2, 1, 1), bias=False), randn((2, 6, 7, 4, 3)), plain_causal
    ),
}
each_layer = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def judge(call, module, args, rope):
    """Outputs, and the gradients of all parameters and inputs."""
    module.zero_grad()
    leaves = [a.detach().requires_grad_() for a in args]
    outputs = close.flat(call(module, *leaves, **rope))
    sum(o.double().square().mean() for o in outputs).backward()
    named = {**dict(module.named_parameters()), **{f"input {i}": leaf for i, leaf in enumerate(leaves)}}
    return [o.detach() for o in outputs], {n: p.grad for n, p in named.items() if p.grad is not None}


@each_layer
@each_dtype
def test_outputs_and_gradients(layer, dtype):
    """All gradients in one comparison, each in units of its own rms."""
    module = randomize(layer.make()).to(dtype)
    args = [a.to(dtype) for a in layer.inputs()]
    rope = dict(zip(("cos", "sin"), ops.rope_table(GRID, (4, 6, 6)), strict=True)) if layer.rope else {}
    truth, exact = judge(layer.plain, copy.deepcopy(module).double(), [a.double() for a in args], rope)
    before, rough = judge(layer.plain, copy.deepcopy(module), args, rope)
    after, found = judge(lambda m, *a, **k: m(*a, **k), module, args, rope)
    for a, t, b in zip(after, truth, before, strict=True):
        assert a.dtype == dtype
        close.assert_close(a, t, b)
    assert len(exact) == len(list(module.parameters())) + len(args)
    assert {n: g.dtype for n, g in found.items()} == {n: g.dtype for n, g in rough.items()}
    scales = {n: g.square().mean().sqrt() for n, g in exact.items() if g.any()}
    pooled = [torch.cat([(g[n].double() / s).flatten() for n, s in scales.items()]) for g in (found, exact, rough)]
    close.assert_close(pooled[0].to(dtype), pooled[1], pooled[2].to(dtype))


@each_layer
def test_factory_arguments(layer):
    """As every layer of torch: dtype and device of the parameters, and nothing stored on "meta"."""
    made = layer.make(dtype=torch.bfloat16, device="meta")
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in layer.make().named_parameters()}
    assert all(p.dtype == torch.bfloat16 and p.device.type == "meta" for p in made.parameters())


# Keys, starts, packs, autocast, compile ----------------------------------------------------------------------------


def test_keys_are_the_originals():
    keys = set(AdaLNZeroBlock(C, HEADS, qk_norm="rms").state_dict())
    linear = {f"{n}.{p}" for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1") for p in PARTS}
    assert keys == linear | {"attn.q_norm.weight", "attn.k_norm.weight"}
    assert set(FinalLayer(C, 8).state_dict()) == {f"{n}.{p}" for n in ("linear", "adaLN_modulation.1") for p in PARTS}
    assert set(QKNormRope(16, norm="layer").state_dict()) == {f"{n}.{p}" for n in ("norm_q", "norm_k") for p in PARTS}
    assert set(PatchEmbed3d(4, C, (1, 2, 2)).state_dict()) == {"proj.weight", "proj.bias"}
    assert {k: tuple(v.shape) for k, v in ChannelRMSSiLU(20).state_dict().items()} == {"gamma": (20, 1, 1, 1)}


def test_starts_as_the_identity():
    x, c = torch.randn(2, N, C), torch.randn(2, C)
    close.assert_bitwise(AdaLNZeroBlock(C, HEADS)(x, c), x)
    assert not FinalLayer(C, 8)(x, c).any()


def test_packed_is_one_by_one():
    """Videos of different sizes and conditions in one sequence: each as if it were alone, gradients too."""
    model = nn.ModuleList([PatchEmbed3d(4, C, (1, 2, 2)), AdaLNZeroBlock(C, HEADS), FinalLayer(C, 8)])
    embed, block, final = randomize(model)
    videos, c = [torch.randn(4, t, 6, 2 * w) for t, w in ((2, 5), (1, 3), (3, 1))], torch.randn(3, C)

    def packed(c):
        p = embed(videos)
        tokens = block(p.tokens, c, row_index=p.segment_ids, cu_seqlens=p.cu_seqlens, max_seqlen=p.max_seqlen)
        return final(tokens, c, row_index=p.segment_ids)

    def alone(c):
        embed, block, final = model.to(c.dtype)
        return torch.cat([final(block(embed(v.to(c)[None]), r), r)[0] for v, r in zip(videos, c.split(1), strict=True)])

    results = []
    for run, dtype in ((packed, torch.float32), (alone, torch.float64), (alone, torch.float32)):
        model.zero_grad()
        leaf = c.to(dtype, copy=True).requires_grad_()
        output = run(leaf)
        output.square().mean().backward()
        results.append([output.detach(), leaf.grad, block.attn.qkv.weight.grad.clone()])
        model.float()
    for actual, truth, baseline in zip(*results, strict=True):
        close.assert_close(actual, truth, baseline)


def test_packed_heads():
    rotate = randomize(QKNormRope(16))
    grids = [(2, 3, 5), (1, 3, 3), (3, 3, 1)]
    heads = pack([torch.randn(t * h * w, 2 * C) for t, h, w in grids])
    both = rotate(*heads.tokens.unflatten(-1, (2, HEADS, 16)).unbind(1), *ops.rope_table(grids, (4, 6, 6)))
    for i, (tokens, grid) in enumerate(zip(unpack(heads), grids, strict=True)):
        one = rotate(*tokens.unflatten(-1, (2, HEADS, 16)).unbind(1), *ops.rope_table(grid, (4, 6, 6)))
        for joint, own in zip(both, one, strict=True):
            close.assert_bitwise(joint.split(heads.lengths)[i], own)


@torch.no_grad()
def test_autocast():
    """Parameters and residual stream in fp32, tables and projections in bf16."""
    block, rotate = randomize(AdaLNZeroBlock(C, HEADS, qk_norm="layer")), randomize(QKNormRope(16))
    x, c, qk = torch.randn(2, N, C), torch.randn(2, C), [torch.randn(2, N, HEADS, 16).bfloat16() for _ in "qk"]
    cos, sin = ops.rope_table(GRID, (4, 6, 6))
    truth = plain_block(copy.deepcopy(block).double(), x.double(), c.double())
    exact = plain_qk(copy.deepcopy(rotate).double(), *(t.double() for t in qk), cos, sin)
    with torch.autocast("cpu", torch.bfloat16):
        actual, baseline = block(x, c), plain_block(block, x, c)
        q, k = rotate(*qk, cos, sin)
        rough = plain_qk(copy.deepcopy(rotate).bfloat16(), *qk, cos, sin)
    assert actual.dtype == torch.float32
    close.assert_close(actual.bfloat16(), truth, baseline.bfloat16())
    close.assert_close(q, exact[0], rough[0])
    close.assert_close(k, exact[1], rough[1])


@torch.no_grad()
def test_compiles_once_for_all_lengths():
    block = randomize(AdaLNZeroBlock(C, HEADS, qk_norm="rms"))
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for t, stance in ((2, "default"), (3, "fail_on_recompile"), (5, "fail_on_recompile")):
        x, c, rope = torch.randn(2, 15 * t, C), torch.randn(2, C), ops.rope_table((t, 3, 5), (4, 6, 6))
        with torch.compiler.set_stance(stance):
            actual = compiled(x, c, cos=rope[0], sin=rope[1])
        close.assert_bitwise(actual, block(x, c, cos=rope[0], sin=rope[1]))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: AdaLNAttention(C, 5), "num_heads must divide hidden_size; got 5 heads"),
        (lambda: DiTBlock(C, HEADS, conditioning="film"), "unknown conditioning; got 'film'"),
        (lambda: QKNormRope(16, norm="batch"), "unknown norm; got 'batch'"),
        (lambda: PatchEmbed3d(4, C, (2,)), r"patch must be \(pt, ph, pw\)"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises(ValueError, match=match):
        make()
