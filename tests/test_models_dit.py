"""fastdit.models.DiT: the paper's sizes, facebookresearch's names, the math in plain PyTorch and diffusers' DiT."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fastdit
from fastdit.models import DIT_CONFIGS, DiT
from fastdit.models.dit import sincos_pos_embed
from fastdit.testing import close
from fastdit.testing.models import diffusers_dit, randomize

TINY = dict(input_size=16, hidden_size=64, depth=2, num_heads=2, num_classes=10)
KINDS = [{**TINY, "conditioning": kind} for kind in ("adaln", "cross_attention", "in_context")]
VIDEO = {**TINY, "input_size": (4, 8, 12), "patch_size": (2, 2, 4)}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def inputs(model, dtype=torch.float32, batch=2):
    x = torch.randn(batch, model.in_channels, *model.input_size).to(dtype)
    return x, torch.tensor([3, 987])[:batch], torch.tensor([1, 7])[:batch]


# arXiv 2212.09748, table 4 (millions); 675,129,632 is what the authors' training script prints for XL/2
PUBLISHED = {
    "DiT-S/8": 33, "DiT-S/4": 33, "DiT-S/2": 33, "DiT-B/8": 131, "DiT-B/4": 130, "DiT-B/2": 130,
    "DiT-L/8": 459, "DiT-L/4": 458, "DiT-L/2": 458, "DiT-XL/8": 676, "DiT-XL/4": 675, "DiT-XL/2": 675,
}  # fmt: skip


@pytest.mark.parametrize("name", DIT_CONFIGS)
def test_published_parameter_counts(name):
    with torch.device("meta"):
        model = DiT.from_name(name)
    count = sum(p.numel() for p in model.parameters())
    assert abs(count / 1e6 - PUBLISHED[name]) < 1.0, count
    if name == "DiT-XL/2":
        assert count == 675_129_632


# Table 4, Gflops of a 256 x 256 image (multiply and add count as one), and figure 5, XL/2 by conditioning
GFLOPS = {
    "DiT-S/8": 0.36, "DiT-S/4": 1.41, "DiT-S/2": 6.06, "DiT-B/8": 1.42, "DiT-B/4": 5.56, "DiT-B/2": 23.01,
    "DiT-L/8": 5.01, "DiT-L/4": 19.70, "DiT-L/2": 80.71, "DiT-XL/8": 7.39, "DiT-XL/4": 29.05, "DiT-XL/2": 118.64,
}  # fmt: skip
XL2_GFLOPS = {"in_context": 119.37, "cross_attention": 137.62, "adaln": 118.57}


@pytest.mark.parametrize(
    "name, conditioning, published",
    [(name, "adaln_zero", g) for name, g in GFLOPS.items()] + [("DiT-XL/2", c, g) for c, g in XL2_GFLOPS.items()],
)
@torch.no_grad()
def test_published_gflops(name, conditioning, published):
    """Of the matrix products alone: the authors' counter gives the norms a share too, 0.02 % at most."""
    with torch.device("meta"):
        model = DiT.from_name(name, conditioning=conditioning).eval()
        x, t, y = torch.empty(1, 4, 32, 32), torch.empty(1), torch.empty(1, dtype=torch.long)
        with fastdit.use_backend("reference"), FlopCounterMode(display=False) as counter:
            model(x, t, y)
    assert abs(counter.get_total_flops() / 2e9 - published) < 0.006 + 0.0002 * published


def facebook_shapes(size, p, channels, c, depth, mlp, classes, learn_sigma=True):
    """Names and shapes of a facebookresearch/DiT checkpoint."""
    linear = {"t_embedder.mlp.0": (c, 256), "t_embedder.mlp.2": (c, c)}
    for i in range(depth):
        block = {"attn.qkv": (3 * c, c), "attn.proj": (c, c), "mlp.fc1": (mlp, c), "mlp.fc2": (c, mlp)}
        block["adaLN_modulation.1"] = (6 * c, c)
        linear |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    linear["final_layer.linear"] = (p * p * channels * (2 if learn_sigma else 1), c)
    linear["final_layer.adaLN_modulation.1"] = (2 * c, c)
    shapes = {"pos_embed": (1, (size // p) ** 2, c), "y_embedder.embedding_table.weight": (classes + 1, c)}
    shapes |= {"x_embedder.proj.weight": (c, channels, p, p), "x_embedder.proj.bias": (c,)}
    for name, (out, inp) in linear.items():
        shapes |= {f"{name}.weight": (out, inp), f"{name}.bias": (out,)}
    return shapes


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_loads_a_facebookresearch_state_dict_strictly(patch):
    model = DiT.from_name(f"DiT-S/{patch}", depth=1)
    shapes = facebook_shapes(32, patch, 4, 384, 1, 1536, 1000)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == shapes
    model.load_state_dict({k: torch.randn(s) for k, s in shapes.items()}, strict=True)


def plain_forward(model, x, t, y):
    """The model in torch's own functions, as facebookresearch/DiT writes it; any number of axes."""
    width, kind = model.pos_embed.shape[-1], model.conditioning

    def modulate(h, shift, scale):
        return F.layer_norm(h, (width,), eps=1e-6) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)

    def attend(q, k, v):
        q, k, v = (u.unflatten(-1, (model.blocks[0].attn.num_heads, -1)).transpose(1, 2) for u in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def halves(block):
        """(what comes before, the gate) of both."""
        if block.norm1 is not None:
            return (block.norm1, 1.0), (block.norm2, 1.0)
        tables = block.adaLN_modulation(c).chunk(6 if kind == "adaln_zero" else 4, dim=1)
        if kind == "adaln":
            tables = (*tables[:2], torch.ones_like(c), *tables[2:], torch.ones_like(c))
        shift1, scale1, gate1, shift2, scale2, gate2 = tables
        return (
            (lambda h: modulate(h, shift1, scale1), gate1.unsqueeze(1)),
            (lambda h: modulate(h, shift2, scale2), gate2.unsqueeze(1)),
        )

    proj = model.x_embedder.proj
    conv = F.conv3d if x.ndim == 5 else F.conv2d
    h = conv(x, proj.weight, proj.bias, stride=proj.stride).flatten(2).transpose(1, 2) + model.pos_embed
    freqs = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    args = t[:, None].float() * freqs[None]
    embedded = model.t_embedder.mlp(torch.cat([args.cos(), args.sin()], dim=-1).to(x.dtype))
    label = model.y_embedder.embedding_table(y)
    c, context, patches = embedded + label, torch.stack([embedded, label], dim=1), h.shape[1]
    if kind == "in_context":
        h = torch.cat([h, context], dim=1)
    for block in model.blocks:
        (before1, gate1), (before2, gate2) = halves(block)
        h = h + gate1 * block.attn.proj(attend(*block.attn.qkv(before1(h)).chunk(3, dim=-1)))
        if kind == "cross_attention":
            cross = block.cross
            q, (k, v) = cross.to_q(cross.norm(h)), cross.to_kv(context).chunk(2, dim=-1)
            h = h + cross.proj(attend(q, k, v))
        h = h + gate2 * block.mlp.fc2(F.gelu(block.mlp.fc1(before2(h)), approximate="tanh"))
    final, h = model.final_layer, h[:, :patches]
    if final.norm is None:
        h = final.linear(modulate(h, *final.adaLN_modulation(c).chunk(2, dim=1)))
    else:
        h = final.linear(final.norm(h))
    if x.ndim == 4:
        h = h.reshape(len(h), *model.grid, *model.patch_size, model.out_channels)
        return torch.einsum("nhwpqc->nchpwq", h).reshape(len(h), model.out_channels, *model.input_size)
    h = h.reshape(len(h), *model.grid, *model.patch_size, model.out_channels)
    return torch.einsum("nthwrpqc->nctrhpwq", h).reshape(len(h), model.out_channels, *model.input_size)


@pytest.mark.parametrize("backend", [None, "reference"])
@each_dtype
@pytest.mark.parametrize(
    "config",
    [TINY, VIDEO, {**TINY, "learn_sigma": False}, *KINDS],
    ids=["image", "video", "no-sigma", *(k["conditioning"] for k in KINDS)],
)
@torch.no_grad()
def test_equals_plain_pytorch(config, dtype, backend):
    model = randomize(DiT(**config)).to(dtype)
    x, t, y = inputs(model, dtype)
    truth = plain_forward(copy.deepcopy(model).double(), x.double(), t, y)
    baseline = plain_forward(model, x, t, y)
    if backend is None:
        actual = model(x, t, y)
    else:
        with fastdit.use_backend(backend):
            actual = model(x, t, y)
    assert actual.shape == (2, model.out_channels, *model.input_size) and actual.dtype == dtype
    close.assert_close(actual, truth, baseline)


def from_diffusers(theirs):
    """facebookresearch keys from a DiTTransformer2DModel whose blocks share one embedder."""
    state = theirs.state_dict()
    take = {"x_embedder.proj": "pos_embed.proj", "final_layer.adaLN_modulation.1": "proj_out_1"}
    take["final_layer.linear"] = "proj_out_2"
    embedder = "transformer_blocks.0.norm1.emb"
    take |= {"t_embedder.mlp.0": f"{embedder}.timestep_embedder.linear_1"}
    take |= {"t_embedder.mlp.2": f"{embedder}.timestep_embedder.linear_2"}
    out = {"pos_embed": theirs.pos_embed.pos_embed}
    out["y_embedder.embedding_table.weight"] = state[f"{embedder}.class_embedder.embedding_table.weight"]
    for i in range(len(theirs.transformer_blocks)):
        block = f"transformer_blocks.{i}"
        take |= {f"blocks.{i}.adaLN_modulation.1": f"{block}.norm1.linear"}
        take |= {f"blocks.{i}.attn.proj": f"{block}.attn1.to_out.0"}
        take |= {f"blocks.{i}.mlp.fc1": f"{block}.ff.net.0.proj", f"blocks.{i}.mlp.fc2": f"{block}.ff.net.2"}
        for part in ("weight", "bias"):
            qkv = [state[f"{block}.attn1.to_{name}.{part}"] for name in "qkv"]
            out[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(qkv)
    return out | {f"{a}.{part}": state[f"{b}.{part}"] for a, b in take.items() for part in ("weight", "bias")}


@each_dtype
@torch.no_grad()
def test_equals_diffusers_on_the_same_weights(dtype):
    theirs = diffusers_dit()
    for block in theirs.transformer_blocks:
        # diffusers gives each block its own embedder and divides the frequencies by 127 instead of 128
        block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6  # 1e-5 there
    ours = DiT(**{**TINY, "num_classes": 1000})
    ours.load_state_dict(from_diffusers(theirs), strict=True)
    ours, theirs = ours.to(dtype).eval(), theirs.to(dtype)
    x, t, y = inputs(ours, dtype)
    truth = copy.deepcopy(theirs).double()(x.double(), t, y).sample
    close.assert_close(ours(x, t, y), truth, theirs(x, t, y).sample)


@torch.no_grad()
def test_full_width_block():
    """One DiT-XL/2 block, 256 x 256."""
    model = randomize(DiT.from_name("DiT-XL/2", depth=1)).bfloat16()
    x, t, y = inputs(model, torch.bfloat16)
    truth = plain_forward(copy.deepcopy(model).double(), x.double(), t, y)
    close.assert_close(model(x, t, y), truth, plain_forward(model, x, t, y))


def test_positions_are_the_originals():
    from diffusers.models.embeddings import get_2d_sincos_pos_embed, get_3d_sincos_pos_embed

    close.assert_bitwise(
        sincos_pos_embed(96, (8, 8)), get_2d_sincos_pos_embed(96, 8, base_size=8, output_type="pt").float()
    )
    theirs = get_3d_sincos_pos_embed(96, (5, 4), 3, output_type="pt").flatten(0, 1)
    close.assert_bitwise(sincos_pos_embed(96, (3, 4, 5)), theirs.float())


def test_video_of_one_frame_is_an_image():
    image = randomize(DiT(**TINY))
    video = DiT(**{**TINY, "input_size": (1, 16, 16)})
    state = image.state_dict()
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].unsqueeze(2)
    video.load_state_dict(state, strict=True)
    x, t, y = inputs(image)
    close.assert_bitwise(video.eval()(x.unsqueeze(2), t, y).squeeze(2), image(x, t, y))


@pytest.mark.parametrize("config", KINDS, ids=lambda config: config["conditioning"])
def test_other_conditionings_start_at_zero_and_train_every_parameter(config):
    model = DiT(**config)
    x, t, y = inputs(model)
    assert not model(x, t, y).any()
    randomize(model).train()
    model(x, t, y).square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_starts_as_the_identity():
    """adaLN-Zero: blocks pass their input on, the output is zero."""
    model = DiT(**TINY)
    x, t, y = inputs(model)
    tokens = model.x_embedder(x, model.pos_embed)
    close.assert_bitwise(model.blocks[0](tokens, model.t_embedder(t)), tokens)
    assert not model(x, t, y).any()


def test_guidance():
    model = randomize(DiT(**TINY))
    x, t, y = inputs(model)
    t, y = t[:1].expand(2), torch.tensor([1, 10])
    out = model.forward_with_cfg(x, t, y, 4.0)
    cond, uncond = model(torch.cat([x[:1], x[:1]]), t, y)
    close.assert_bitwise(out[0, :3], uncond[:3] + 4.0 * (cond[:3] - uncond[:3]))
    close.assert_bitwise(out[0, :3], out[1, :3])
    close.assert_bitwise(out[1, 3:], uncond[3:])


def test_training_reaches_every_parameter():
    model = randomize(DiT(**TINY)).train()
    x, t, y = inputs(model)
    model(x, t, y).square().mean().backward()
    silent = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert silent == []


def test_dropped_labels_are_the_null_class():
    model = randomize(DiT(**TINY, class_dropout_prob=1.0))
    x, t, y = inputs(model)
    expected = model(x, t, torch.full_like(y, 10))
    close.assert_bitwise(model.train()(x, t, y), expected)


def test_autocast():
    """Residual stream in fp32, modulation in bf16: the mixture of autocast."""
    model = randomize(DiT(**TINY))
    x, t, y = inputs(model)
    truth = plain_forward(copy.deepcopy(model).double(), x.double(), t, y)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, baseline = model(x, t, y), plain_forward(model, x, t, y)
    close.assert_close(actual.bfloat16(), truth, baseline.bfloat16())


def test_compiles_without_graph_breaks():
    model = randomize(DiT(**TINY))
    x, t, y = inputs(model)
    with torch.no_grad():
        close.assert_bitwise(torch.compile(model, fullgraph=True, backend="aot_eager")(x, t, y), model(x, t, y))


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: DiT(**{**TINY, "patch_size": 3}), "patch_size must divide"),
        (lambda: DiT(**{**TINY, "patch_size": (1, 2, 2)}), "patch_size must divide"),
        (lambda: DiT(**{**TINY, "num_heads": 3}), "num_heads must divide"),
        (lambda: DiT(**TINY, conditioning="film"), "conditioning is unknown; got 'film'"),
        (lambda: DiT.from_name("DiT-XXL/2"), "unknown name; got 'DiT-XXL/2'"),
        (lambda: DiT(**TINY)(torch.randn(1, 4, 8, 8), torch.ones(1), torch.ones(1).long()), "input_size=\\(8, 8\\)"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_module_tree_is_readable():
    """Every parameter sits in a plain torch layer: LoRA and quantisation find what they look for."""
    model = DiT(**TINY)
    plain = (nn.Linear, nn.Embedding, nn.Conv2d)
    owners = {type(m) for m in model.modules() if any(True for _ in m.parameters(recurse=False))}
    assert owners == {*plain, DiT}
