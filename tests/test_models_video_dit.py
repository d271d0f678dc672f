"""fastdit.models.VideoDiT: every conditioning in plain PyTorch, packing, given frames, token dropping, layouts."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdit import ops
from fastdit.models import Text, VideoDiT, VideoDiTConfig, drop_tokens
from fastdit.models.dit import sincos_pos_embed, timestep_embedding
from fastdit.testing import close
from fastdit.testing.models import randomize

SMALL = dict(in_channels=4, hidden_size=48, depth=2, num_heads=2, text_size=12, cond_size=20)
SHAPES = ((4, 3, 6, 4), (4, 1, 4, 8), (4, 2, 2, 2))  # two videos and an image
TIMES = (10.0, 500.5, 999.0)
VARIANTS = list(itertools.product(("adaln_zero", "adaln", "in_context", "cross_attention"), ("joint", "cross", None)))
each_variant = pytest.mark.parametrize("conditioning, text", VARIANTS, ids=[f"{c}-{t}" for c, t in VARIANTS])
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def small(**config):
    model = randomize(VideoDiT(VideoDiTConfig(**{**SMALL, **config})))
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            module.weight.data += 1.0
    return model


def prompts(lengths=(4, 1, 6), width=12):
    return Text.pack(torch.randn(sum(lengths), width), torch.randn(len(lengths), width), lengths)


def batch(model, dtype=torch.float32):
    """Videos of several sizes, timesteps and prompts."""
    x = [torch.randn(shape).to(dtype) for shape in SHAPES]
    text = prompts() if model.config.text else None
    if text is not None:
        text = Text.pack(text.tokens.to(dtype), text.pooled.to(dtype), text.lengths)
    return x, torch.tensor(TIMES), text


def alone(text, i):
    """Prompt i of a Text."""
    if text is None:
        return None
    return Text.pack(text.tokens.split(text.lengths)[i], text.pooled[i : i + 1], [text.lengths[i]])


def plain(model, x, t, text, known=0, keep=None):
    """One sample (C, T, H, W) in torch's own functions, without packing: t of every token is written out."""
    cfg, dtype, width = model.config, x.dtype, model.config.hidden_size
    grid = tuple(n // p for n, p in zip(x.shape[1:], model.patch_size, strict=True))
    n, patch_frames = grid[0] * grid[1] * grid[2], known // model.patch_size[0]

    def vector(t):
        c = model.t_embedder.mlp(timestep_embedding(t, 256).to(dtype))
        return c if text is None else c + model.pooled_embedder(text.pooled.to(dtype))

    def attend(q, k, v):
        q, k, v = (u.transpose(0, 1)[None] for u in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)

    def rotate(u):
        a, b = u.to(torch.promote_types(dtype, torch.float32)).unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(dtype)

    proj = model.x_embedder.proj
    h = F.conv3d(x[None], proj.weight, proj.bias, stride=proj.stride).flatten(2)[0].T
    if cfg.positions == "sincos":
        h = h + sincos_pos_embed(width, grid).to(dtype)
    cos, sin = ops.rope_table(grid, cfg.rope_axes, theta=cfg.rope_theta)
    given = torch.arange(n) < patch_frames * grid[1] * grid[2]
    if keep is not None:
        h, cos, sin, given = h[keep], cos[keep], sin[keep], given[keep]
    video = len(h)
    c, after, context = vector(t[None]), [], []
    words = None if text is None else model.text_embedder(text.tokens.to(dtype))
    after += [words] if cfg.text == "joint" else []
    after += [c] if cfg.conditioning == "in_context" else []
    context += [c] if cfg.conditioning == "cross_attention" else []
    context += [words] if cfg.text == "cross" else []
    h = torch.cat([h, *after])
    extra = len(h) - video
    cos = torch.cat([cos, torch.ones(extra, cos.shape[1])])[:, None].to(torch.promote_types(dtype, torch.float32))
    sin = torch.cat([sin, torch.zeros(extra, sin.shape[1])])[:, None].to(cos.dtype)
    given = torch.cat([given, torch.zeros(extra, dtype=torch.bool)])[:, None]
    each = torch.where(given, vector(torch.zeros(1)), c) if cfg.modulated else None

    def norm(h, shift=None, scale=None, module=None):
        wide = h.to(torch.promote_types(dtype, torch.float32))  # one rounding, Wan's law
        y = F.layer_norm(wide, (width,), eps=1e-6)
        if module is not None:
            return (y * module.weight + module.bias).to(dtype)
        return (y * (1 + scale) + shift).to(dtype)

    for block in model.blocks:
        shift1 = scale1 = shift2 = scale2 = None
        gate1 = gate2 = 1.0
        if cfg.modulated:
            tables = block.adaLN_modulation(each).chunk(6 if cfg.conditioning == "adaln_zero" else 4, dim=1)
            if len(tables) == 6:
                shift1, scale1, gate1, shift2, scale2, gate2 = tables
            else:
                shift1, scale1, shift2, scale2 = tables
        q, k, v = block.attn.qkv(norm(h, shift1, scale1, block.norm1)).unflatten(1, (3, cfg.num_heads, -1)).unbind(1)
        q, k = block.attn.q_norm(q), block.attn.k_norm(k)
        if cfg.positions == "rope":
            q, k = rotate(q), rotate(k)
        h = h + gate1 * block.attn.proj(attend(q, k, v))
        if block.cross is not None:
            m = block.cross
            q = m.q_norm(m.to_q(norm(h, module=m.norm)).unflatten(1, (cfg.num_heads, -1)))
            k, v = m.to_kv(torch.cat(context)).unflatten(1, (2, cfg.num_heads, -1)).unbind(1)
            h = h + m.proj(attend(q, m.k_norm(k), v))
        hidden = F.gelu(block.mlp.fc1(norm(h, shift2, scale2, block.norm2)), approximate="tanh")
        h = h + gate2 * block.mlp.fc2(hidden)
    final = model.final_layer
    tables = final.adaLN_modulation(each).chunk(2, dim=1) if cfg.modulated else (None, None)
    out = final.linear(norm(h, *tables, final.norm))[:video]
    if keep is not None:
        out = torch.zeros(n, out.shape[1], dtype=dtype).index_put((keep,), out)
    out = out.reshape(*grid, *model.patch_size, model.out_channels)
    return torch.einsum("thwpqrc->ctphqwr", out).reshape(model.out_channels, *x.shape[1:])


def one_by_one(model, x, t, text, known=(0, 0, 0), keep=(None, None, None)):
    return [plain(model, x[i], t[i], alone(text, i), known[i], keep[i]) for i in range(len(x))]


def flat(outputs):
    return torch.cat([out.flatten() for out in outputs])


@pytest.mark.parametrize("positions", ["rope", "sincos"])
@each_dtype
@each_variant
@torch.no_grad()
def test_packed_equals_plain_pytorch_one_by_one(conditioning, text, dtype, positions):
    model = small(conditioning=conditioning, text=text, positions=positions).to(dtype)
    x, t, text = batch(model, dtype)
    wide = [v.double() for v in x]
    truth = one_by_one(copy.deepcopy(model).double(), wide, t, text)
    actual = model(x, t, text)
    assert [(a.shape, a.dtype) for a in actual] == [(v.shape, dtype) for v in x]
    close.assert_close(flat(actual), flat(truth), flat(one_by_one(model, x, t, text)))


def gradients(model, loss):
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return found


def assert_gradients(actual, truth, baseline):
    """All gradients in one comparison, each tensor scaled to one: a fault in any of them stands out. What vanishes
    (queries over a single key) is measured against the others."""
    assert actual.keys() == truth.keys()
    rms = {name: float(grad.square().mean().sqrt()) for name, grad in truth.items()}
    least = max(rms.values()) / 1000
    scaled = [flat(grads[n] / max(rms[n], least) for n in truth) for grads in (actual, truth, baseline)]
    close.assert_close(*scaled, "gradients")


@pytest.mark.parametrize("known, share", [((0, 0, 0), None), ((2, 0, 1), None), ((2, 1, 1), 0.5)])
@each_variant
def test_packed_loss_and_gradients_are_those_of_one_by_one(conditioning, text, known, share):
    """With given frames and token dropping too."""
    model = small(conditioning=conditioning, text=text)
    if not model.config.modulated:
        known = (0, 0, 0)
    x, t, text = batch(model)
    dropped = None if share is None else drop_tokens(model.grids(x), share, torch.Generator().manual_seed(1))
    keep = dropped or (None, None, None)
    wide, wide_x = copy.deepcopy(model).double(), [v.double() for v in x]
    targets = torch.randn(sum(v.numel() for v in x))

    def loss(outputs):
        return (flat(outputs) - targets).square()  # of each pixel: a sum of roundings would be compared by luck

    actual = loss(model(x, t, text, known_frames=known, keep=dropped))
    truth = loss(one_by_one(wide, wide_x, t, text, known, keep))
    baseline = loss(one_by_one(model, x, t, text, known, keep))
    close.assert_close(actual, truth, baseline, "loss")
    assert_gradients(gradients(model, actual.mean()), gradients(wide, truth.mean()), gradients(model, baseline.mean()))
