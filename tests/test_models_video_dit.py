"""fastdit.models.VideoDiT: every conditioning in plain PyTorch, packing, given frames, token dropping, layouts."""

import copy
import dataclasses
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastdit
from fastdit import ops
from fastdit.models import (
    DIT_CONFIGS,
    DiT,
    Text,
    VideoDiT,
    VideoDiTConfig,
    WordEncoder,
    drop_tokens,
    video_layout,
)
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
    if "sincos" in cfg.positions:
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
        if "rope" in cfg.positions:
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


@pytest.mark.parametrize("positions", ["rope", "sincos", "rope+sincos"])
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
    (queries over a single key) is measured against the largest."""
    assert actual.keys() == truth.keys()
    rms = {name: float(grad.square().mean().sqrt()) for name, grad in truth.items()}
    largest = max(rms.values())
    scale = {name: size if size > 1e-9 * largest else largest for name, size in rms.items()}
    scaled = [flat(grads[name] / scale[name] for name in truth) for grads in (actual, truth, baseline)]
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


@each_variant
def test_native_kernels_equal_the_reference(conditioning, text):
    """One video after the other is plain PyTorch; here the whole packed model is, forward and backward."""
    model = small(conditioning=conditioning, text=text)
    x, t, text = batch(model)
    keep = drop_tokens(model.grids(x), 0.3, torch.Generator().manual_seed(2))
    known = (2, 1, 0) if model.config.modulated else 0

    def run(model, x):
        out = flat(model(x, t, text, known_frames=known, keep=keep))
        return out, gradients(model, out.square().mean())

    actual, actual_grads = run(model, x)
    with fastdit.use_backend("reference"):
        baseline, baseline_grads = run(model, x)
        if text is not None:
            text = Text.pack(text.tokens.double(), text.pooled.double(), text.lengths)
        truth, truth_grads = run(copy.deepcopy(model).double(), [v.double() for v in x])
    close.assert_close(actual, truth, baseline)
    assert_gradients(actual_grads, truth_grads, baseline_grads)


@torch.no_grad()
def test_tensor_and_list_of_one_size_are_the_same():
    model = small()
    x, text = torch.randn(3, 4, 3, 6, 4), prompts()
    options = {"known_frames": 1, "keep": drop_tokens(model.grids(x), 0.4)}
    for given in ({}, options):
        out = model(x, torch.tensor(TIMES), text, **given)
        assert isinstance(out, torch.Tensor) and out.shape == x.shape
        close.assert_bitwise(torch.stack(model(list(x), torch.tensor(TIMES), text, **given)), out)
    assert isinstance(model(tuple(x), torch.tensor(TIMES), text), list)


@each_variant
@torch.no_grad()
def test_samples_do_not_see_each_other(conditioning, text):
    model = small(conditioning=conditioning, text=text)
    x, t, text = batch(model)
    before = model(x, t, text)
    x[1].fill_(torch.nan)
    t[1] = 3.0
    if text is not None:
        text.tokens.split(text.lengths)[1].fill_(torch.nan)
    after = model(x, t, text)
    close.assert_bitwise(after[0], before[0])
    close.assert_bitwise(after[2], before[2])
    assert after[1].isnan().all()


@torch.no_grad()
def test_known_frames_have_timestep_zero():
    """Without blocks a token knows its own timestep only."""
    model = small(depth=0, text=None)
    wide = copy.deepcopy(model).double()
    x, t, clean = torch.randn(2, 4, 5, 4, 4), torch.tensor([700.0, 30.0]), torch.zeros(2)
    (truth, baseline), (truth_clean, baseline_clean) = ((wide(x.double(), s), model(x, s)) for s in (t, clean))
    for known in (1, 3, 5):
        out = model(x, t, known_frames=known)
        close.assert_close(out[:, :, :known], truth_clean[:, :, :known], baseline_clean[:, :, :known])
        if known < 5:
            close.assert_close(out[:, :, known:], truth[:, :, known:], baseline[:, :, known:])
    mixed = model(x, t, known_frames=(2, 0))
    close.assert_close(mixed[0, :, :2], truth_clean[0, :, :2], baseline_clean[0, :, :2])
    close.assert_close(mixed[1], truth[1], baseline[1])


def test_modulation_tables_have_few_rows():
    """A row per sample, two where frames are given: never one per token."""
    model, rows = small(), []
    x, t, text = batch(model)
    model.blocks[0].adaLN_modulation.register_forward_hook(lambda module, args, out: rows.append(len(out)))
    model(x, t, text)
    model(x, t, text, known_frames=(1, 0, 1))
    assert rows == [3, 6]


@torch.no_grad()
def test_dropped_tokens_are_never_used():
    model = small()
    x, t, text = batch(model)
    keep = drop_tokens(model.grids(x), 0.5)
    mask = model.kept(x, keep)
    assert [m.shape for m in mask] == [(1, *v.shape[1:]) for v in x]
    assert [int(m.sum()) for m in mask] == [4 * len(k) for k in keep]
    before = model(x, t, text, keep=keep)
    for v, m in zip(x, mask, strict=True):
        v.masked_fill_(m == 0, torch.nan)
    for out, m, expected in zip(model(x, t, text, keep=keep), mask, before, strict=True):
        close.assert_bitwise(out, expected)
        assert torch.equal((out != 0).all(0), m[0] == 1)


def test_drop_tokens():
    grids = [(2, 3, 4), (1, 1, 1)]
    keep = drop_tokens(grids, 0.75, torch.Generator().manual_seed(0))
    assert [len(k) for k in keep] == [6, 1]
    assert all((k[1:] > k[:-1]).all() for k in keep)
    again = drop_tokens(grids, 0.75, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(keep, again, strict=True))
    assert torch.equal(drop_tokens(grids, 0.0)[0], torch.arange(24))
    assert not torch.equal(keep[0], drop_tokens(grids, 0.75, torch.Generator().manual_seed(1))[0])


@each_variant
def test_starts_at_zero(conditioning, text):
    model = VideoDiT(VideoDiTConfig(**SMALL, conditioning=conditioning, text=text))
    x, t, text = batch(model)
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append((args[0], out)))
    assert not flat(model(x, t, text)).any()
    assert all(torch.equal(*pair) for pair in seen) == (conditioning == "adaln_zero")


@each_variant
def test_training_reaches_every_parameter(conditioning, text):
    """But for queries over a single key."""
    model = small(conditioning=conditioning, text=text)
    x, t, text = batch(model)
    flat(model(x, t, text)).square().mean().backward()
    single = conditioning == "cross_attention" and model.config.text != "cross"
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent <= {n for n, _ in model.named_parameters() if single and ".cross." in n and "_kv" not in n}


def test_gradient_checkpointing_changes_nothing():
    model = small()
    x, t, text = batch(model)
    expected = gradients(model, flat(model(x, t, text, known_frames=(1, 1, 0))).square().mean())
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    model.gradient_checkpointing = True
    found = gradients(model, flat(model(x, t, text, known_frames=(1, 1, 0))).square().mean())
    for name, grad in found.items():
        close.assert_bitwise(grad, expected[name], name)
    assert len(calls) == 2  # forward, and again in the backward
    with torch.no_grad():
        model(x, t, text)
    assert len(calls) == 3
    assert VideoDiT(VideoDiTConfig(**SMALL, gradient_checkpointing=True)).gradient_checkpointing


def test_layouts_are_built_once_and_serve_training_after_inference(monkeypatch):
    model, calls = small(), []
    original = video_layout.build
    monkeypatch.setattr(video_layout, "build", lambda *args: calls.append(args) or original(*args))
    text = prompts((3, 3, 3))
    x = [torch.randn(4, 1, 2, 2 * n) for n in (7, 8, 9)]  # no other test has these
    with torch.inference_mode():
        model(x, torch.tensor(TIMES), text)
    model(x, torch.tensor(TIMES) / 2, text)[0].sum().backward()
    assert len(calls) == 1
    model(x[::-1], torch.tensor(TIMES), text)
    assert len(calls) == 2


@torch.no_grad()
def test_autocast():
    """Residual stream in fp32, projections in bf16."""
    model = small()
    x, t, text = batch(model)
    truth = one_by_one(copy.deepcopy(model).double(), [v.double() for v in x], t, text)
    with torch.autocast("cpu", torch.bfloat16):
        actual = flat(model(x, t, text)).bfloat16()
        with fastdit.use_backend("reference"):
            baseline = flat(model(x, t, text)).bfloat16()
    close.assert_close(actual, flat(truth), baseline)


@torch.no_grad()
def test_compiles_without_graph_breaks():
    """The sizes of a second batch are no constants of the graph: their layout is still built inside it."""
    model = small(depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x, t, text = batch(model)
    for sizes in (x, [torch.randn(4, 2, 8, 4), *x[1:]]):
        given = {"text": text, "known_frames": (1, 0, 1)}
        close.assert_bitwise(flat(compiled(sizes, t, **given)), flat(model(sizes, t, **given)))


def test_tubelets_of_two_frames():
    """A patch of several frames; at the start with "central" it is the image embedding of its central frame."""
    model = VideoDiT(VideoDiTConfig(**SMALL, patch_size=(2, 2, 2), tubelet="central"))
    weight = model.x_embedder.proj.weight
    assert weight[:, :, 1].any() and not weight[:, :, 0].any()
    x = torch.randn(1, 4, 4, 4, 6)
    frames = F.conv2d(x[0, :, 1::2].transpose(0, 1), weight[:, :, 1], stride=2)  # (2, C, 2, 3)
    truth = F.conv2d(x[0, :, 1::2].transpose(0, 1).double(), weight[:, :, 1].double(), stride=2)
    close.assert_close(model.x_embedder(x)[0], *(f.transpose(0, 1).flatten(1).T for f in (truth, frames)))

    model, text = small(patch_size=(2, 2, 2)), prompts((2,))
    t = torch.tensor([400.0])
    with torch.no_grad():
        truth = plain(copy.deepcopy(model).double(), x[0].double(), t[0], text, known=2)
        close.assert_close(model(x, t, text, known_frames=2)[0], truth, plain(model, x[0], t[0], text, known=2))


@pytest.mark.parametrize("name", DIT_CONFIGS)
def test_named_sizes_are_those_of_dit(name):
    """Without text, with positions added and plain queries and keys it has DiT's parameters, but for the labels."""
    with torch.device("meta"):
        ours = VideoDiT.from_name(name, in_channels=4, text=None, positions="sincos", qk_norm=None, learn_sigma=True)
        theirs = DiT.from_name(name)
    expected = {n: p.shape for n, p in theirs.named_parameters() if not n.startswith(("y_embedder", "pos_embed"))}
    found = {n: p.shape for n, p in ours.named_parameters()}
    assert {n: s.numel() for n, s in found.items()} == {n: s.numel() for n, s in expected.items()}
    assert ours.patch_size == (1, *theirs.patch_size)


def test_default_fits_the_shipped_checkpoint():
    """With the word encoder less than 4.5 million parameters: 9 MB in half precision."""
    count = sum(p.numel() for model in (VideoDiT(), WordEncoder(["word"] * 100)) for p in model.parameters())
    assert count < 4_500_000


def test_config_survives_json():
    config = VideoDiTConfig(patch_size=4, text=None)
    assert config.patch_size == (1, 4, 4)
    assert VideoDiTConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert VideoDiTConfig.from_name("DiT-B/4", depth=3) == VideoDiTConfig(
        hidden_size=768, depth=3, num_heads=12, patch_size=4, cond_size=768
    )


@pytest.mark.parametrize("head, axes", [(64, (16, 24, 24)), (128, (32, 48, 48)), (24, (6, 10, 8)), (8, (2, 4, 2))])
def test_axes_of_a_head(head, axes):
    assert VideoDiTConfig(hidden_size=3 * head, num_heads=3).rope_axes == axes


def call(**changes):
    model = small(**changes.pop("config", {}))
    given = {"x": torch.randn(2, 4, 2, 4, 4), "t": torch.ones(2), "text": prompts((1, 2))} | changes
    return model(given.pop("x"), given.pop("t"), given.pop("text"), **given)


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: VideoDiTConfig(conditioning="film"), "conditioning is unknown; got 'film'"),
        (lambda: VideoDiTConfig(text="both"), "text is unknown; got 'both'"),
        (lambda: VideoDiTConfig(positions="learned"), "positions is unknown; got 'learned'"),
        (lambda: VideoDiTConfig(patch_size=(2, 2)), r"patch_size must be \(pt, ph, pw\); got \(2, 2\)"),
        (lambda: VideoDiTConfig(num_heads=5), "got hidden_size 192 for 5 heads, expected a multiple of 10"),
        (lambda: VideoDiTConfig(num_heads=48), "too narrow to rotate over three axes; got 4 channels"),
        (lambda: VideoDiTConfig(hidden_size=24, positions="sincos"), "needs hidden_size % 16 == 0; got 24"),
        (lambda: VideoDiT.from_name("DiT-XXL/2"), "unknown name; got 'DiT-XXL/2'"),
        (lambda: call(x=torch.randn(2, 4, 2, 4, 5)), r"wrong size; got \[4, 2, 4, 5\]"),
        (lambda: call(x=[torch.randn(4, 1, 4, 4), torch.randn(3, 1, 4, 4)]), r"got \[3, 1, 4, 4\].* C = 4"),
        (lambda: call(x=torch.randn(2, 4, 4, 4)), r"wrong size; got \[4, 4, 4\]"),
        (lambda: call(t=torch.ones(3)), r"one timestep per sample; got \[3\] for 2 samples"),
        (lambda: call(x=[], t=torch.ones(0)), r"got \[0\] for 0 samples"),
        (lambda: call(text=None), "text does not fit the model; got NoneType with text='joint'"),
        (lambda: call(config={"text": None}), "got Text with text=None"),
        (lambda: call(text=prompts((1, 2, 3))), "got 3 prompts of 12 channels, expected 2 of 12"),
        (lambda: call(text=prompts((1, 2), width=8)), "got 2 prompts of 8 channels, expected 2 of 12"),
        (lambda: call(known_frames=3), "got 3 of 2 frames, expected 0 to 2 in steps of 1"),
        (lambda: call(known_frames=(1, 0, 0)), "one known_frames per sample; got 3, expected 2"),
        (lambda: call(config={"patch_size": 2, "conditioning": "in_context"}, known_frames=1), "got conditioning 'in_"),
        (lambda: call(config={"patch_size": (2, 2, 2)}, known_frames=1), "got 1 of 2 frames.* steps of 2"),
        (lambda: call(keep=[torch.arange(3)]), "one keep per sample; got 1, expected 2"),
        (lambda: call(keep=[torch.arange(3), torch.arange(9)]), "increasing places in a sample; got .* 0 .. 7"),
        (lambda: call(keep=[torch.arange(3), torch.tensor([1, 0])]), r"got \[1, 0\]"),
        (lambda: call(keep=[torch.arange(3), torch.arange(0)]), r"got \[\], expected at least one"),
        (lambda: drop_tokens([(1, 2, 2)], 1.0), r"rate must lie in \[0, 1\); got 1.0"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_module_tree_is_readable():
    """Every parameter sits in a plain torch layer: LoRA and quantisation find what they look for."""
    owners = {type(m) for m in small().modules() if any(True for _ in m.parameters(recurse=False))}
    assert owners == {nn.Linear, nn.Conv3d, nn.RMSNorm}
