"""accelerate and restore on diffusers' DiT and Wan VAE: same outputs and gradients, nothing left behind."""

import copy
import dataclasses
import io
import types

import pytest
import torch
from torch import nn

import fastdit
from fastdit.integrations.registry import RECORD
from fastdit.testing import close
from fastdit.testing.accelerated import check_autocast, reasons
from fastdit.testing.exact import exact
from fastdit.testing.models import WAN21, WAN22, diffusers_dit, diffusers_wan_vae

each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
each_vae = pytest.mark.parametrize("config", [WAN21, WAN22], ids=["wan2.1", "wan2.2"])


def dit_inputs(dtype=torch.float32, size=16):
    return torch.randn(2, 4, size, size).to(dtype), torch.tensor([3, 987]), torch.tensor([1, 999])


def traces(model):
    """Instance attributes that differ from an untouched model's: names of patched methods and records."""
    methods = ("forward", "_encode", "_decode", RECORD)
    return [(name, a) for name, module in model.named_modules() for a in methods if a in module.__dict__]


def layers(report, replaced=True):
    return {row.layer.split(" (")[0]: row.count for row in report.rows if row.replaced is replaced}


DIT_LAYERS = {"adaLN-Zero block": 2, "attention": 2, "feed-forward activation": 2, "patch embedding": 1}
DIT_LAYERS |= {"DiT output layer": 1}
VAE_LAYERS = {"causal residual block", "causal resampling", "frame attention of a VAE", "causal encoder"}
VAE_LAYERS |= {"causal decoder", "loop over time"}


# Outputs and gradients ----------------------------------------------------------------------------


@each_dtype
@torch.no_grad()
def test_dit_at_full_width(dtype):
    """One DiT-XL/2 block at 256 x 256."""
    model = diffusers_dit(layers=1, heads=16, head_dim=72, size=32).to(dtype)
    x, t, y = dit_inputs(dtype, 32)
    truth, before = exact(model)(x.double(), t, y).sample, model(x, t, y).sample
    fastdit.accelerate(model)
    close.assert_close(model(x, t, y).sample, truth, before)


@each_dtype
@each_vae
@torch.no_grad()
def test_vae_output(config, dtype):
    model = diffusers_wan_vae(**config).to(dtype)
    x = torch.randn(2, 3, 9, 32, 32).clamp(-1, 1).to(dtype)
    z = torch.randn(2, 4, 3, 4, 4).to(dtype)
    run = {
        "encode": lambda m, d: m.encode(x.to(d)).latent_dist.parameters,
        "decode": lambda m, d: m.decode(z.to(d)).sample,
    }
    truth = {k: f(exact(model), torch.float64) for k, f in run.items()}
    before = {k: f(model, dtype) for k, f in run.items()}
    report = fastdit.accelerate(model)
    assert layers(report).keys() == VAE_LAYERS
    for k, f in run.items():
        after = f(model, dtype)
        close.assert_close(after, truth[k], before[k], k)
        assert after.dtype == dtype and after.stride() == before[k].stride()
    fastdit.restore(model)
    for k, f in run.items():
        close.assert_bitwise(f(model, dtype), before[k], k)


@each_dtype
@torch.no_grad()
def test_vae_at_full_width(dtype):
    model = diffusers_wan_vae(num_res_blocks=0).to(dtype)
    z = torch.randn(1, 16, 2, 4, 4).to(dtype)
    truth, before = exact(model).decode(z.double()).sample, model.decode(z).sample
    fastdit.accelerate(model)
    close.assert_close(model.decode(z).sample, truth, before)


@torch.no_grad()
def test_vae_tiling_and_slicing():
    model = diffusers_wan_vae(**WAN21)
    z, x = torch.randn(2, 4, 2, 12, 12), torch.randn(2, 3, 5, 96, 96)
    truth = exact(model)
    for m in (model, truth):
        m.enable_slicing()
        m.enable_tiling(64, 64, 48, 48)
    before, encoded = model.decode(z).sample, model.encode(x).latent_dist.mean
    fastdit.accelerate(model)
    close.assert_close(model.decode(z).sample, truth.decode(z.double()).sample, before)
    close.assert_close(model.encode(x).latent_dist.mean, truth.encode(x.double()).latent_dist.mean, encoded)


@torch.no_grad()
def test_vae_drops_frames_that_fill_no_latent_as_before():
    model = diffusers_wan_vae(**WAN21)
    x = torch.randn(1, 3, 7, 32, 32)
    truth, before = exact(model).encode(x.double()).latent_dist.mean, model.encode(x).latent_dist.mean
    fastdit.accelerate(model)
    close.assert_close(model.encode(x).latent_dist.mean, truth, before)


def gradients(model, run):
    model.zero_grad()
    run(model).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_gradients(model, run):
    """All parameters in one comparison, each gradient in units of its own rms."""
    dtype = next(model.parameters()).dtype
    truth, before = gradients(exact(model), run), gradients(model, run)
    fastdit.accelerate(model)
    after = gradients(model, run)
    assert after.keys() == before.keys() == truth.keys()
    scales = {name: g.square().mean().sqrt() for name, g in truth.items() if g.any()}
    pooled = [torch.cat([(g[n].double() / s).flatten() for n, s in scales.items()]) for g in (after, truth, before)]
    close.assert_close(pooled[0].to(dtype), pooled[1], pooled[2].to(dtype))


@each_dtype
def test_vae_gradients(dtype):
    model = diffusers_wan_vae(**WAN21).to(dtype)
    x = torch.randn(1, 3, 5, 32, 32)
    assert_gradients(model, lambda m: m(x.to(next(m.parameters()).dtype)).sample)


@torch.no_grad()
def test_autocast():
    model = diffusers_dit()
    x, t, y = dit_inputs()
    check_autocast(model, lambda m: m(x, t, y).sample, exact(model)(x.double(), t, y).sample)


# What stays, and the way back ---------------------------------------------------------------------


@pytest.mark.parametrize("make", [diffusers_dit, lambda: diffusers_wan_vae(**WAN22)], ids=["dit", "vae"])
def test_restore_leaves_nothing(make):
    model = make()
    attributes = {name: {k: id(v) for k, v in m.__dict__.items()} for name, m in model.named_modules()}
    classes = [type(m) for m in model.modules()]
    keys, signature = list(model.state_dict()), repr(model)
    fastdit.accelerate(model)
    assert traces(model) and list(model.state_dict()) == keys
    assert [type(m) for m in model.modules()] == classes and repr(model) == signature
    fastdit.restore(model)
    assert {name: {k: id(v) for k, v in m.__dict__.items()} for name, m in model.named_modules()} == attributes
    fastdit.restore(model)  # nothing to do


@torch.no_grad()
def test_idempotent():
    model = diffusers_dit()
    x, t, y = dit_inputs()
    before = model(x, t, y).sample
    first, after = fastdit.accelerate(model), model(x, t, y).sample
    second = fastdit.accelerate(model)
    assert first.rows == second.rows
    close.assert_bitwise(model(x, t, y).sample, after)
    assert layers(fastdit.accelerate(model, exclude=["transformer_blocks"])).keys() == {
        "patch embedding",
        "DiT output layer",
    }
    fastdit.restore(model)
    close.assert_bitwise(model(x, t, y).sample, before)
    assert traces(model) == []


@torch.no_grad()
def test_copies_and_pickles():
    model = diffusers_dit()
    x, t, y = dit_inputs()
    before = model(x, t, y).sample
    fastdit.accelerate(model)
    after = model(x, t, y).sample
    clone = copy.deepcopy(model)
    close.assert_bitwise(clone(x, t, y).sample, after)
    assert clone.transformer_blocks[0].forward.__self__ is clone.transformer_blocks[0]
    fastdit.restore(clone)
    close.assert_bitwise(clone(x, t, y).sample, before)
    close.assert_bitwise(model(x, t, y).sample, after)  # the original is untouched

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    fastdit.accelerate(loaded)  # methods do not travel through pickle
    close.assert_bitwise(loaded(x, t, y).sample, after)
    fastdit.restore(loaded)
    close.assert_bitwise(loaded(x, t, y).sample, before)
    assert traces(loaded) == []


@torch.no_grad()
def test_state_dict_round_trip(tmp_path):
    model, other = diffusers_wan_vae(**WAN21), diffusers_wan_vae(seed=1, **WAN21)
    z = torch.randn(1, 4, 2, 4, 4)
    fastdit.accelerate(model)
    fastdit.accelerate(other)
    other.load_state_dict(model.state_dict(), strict=True)
    close.assert_bitwise(other.decode(z).sample, model.decode(z).sample)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    fastdit.accelerate(again)
    close.assert_bitwise(again.decode(z).sample, model.decode(z).sample)


@torch.no_grad()
def test_weights_may_change_afterwards():
    """Linear layers are called, never read: what wraps or replaces them later takes part."""
    model = diffusers_dit()
    x, t, y = dit_inputs()
    fastdit.accelerate(model)
    before = model(x, t, y).sample
    to_q = model.transformer_blocks[0].attn1.to_q
    calls = []
    to_q.register_forward_hook(lambda module, args, output: calls.append(1) or output * 2)
    assert not torch.equal(model(x, t, y).sample, before) and calls == [1]
    model.transformer_blocks[1].ff.net[2] = nn.Identity()
    with pytest.raises((RuntimeError, ValueError)):
        model(x, t, y)


# Options ------------------------------------------------------------------------------------------


@torch.no_grad()
def test_exclude():
    model = diffusers_wan_vae(**WAN21)
    z = torch.randn(1, 4, 2, 4, 4)
    truth, before = exact(model).decode(z.double()).sample, model.decode(z).sample
    report = fastdit.accelerate(model, exclude=["decoder.up_blocks.1", "decoder.*attentions*", "encoder"])
    left = layers(report, replaced=False)
    assert left["causal encoder"] == 1 and left["frame attention of a VAE"] == 2
    block = model.decoder.up_blocks[1]
    assert not traces(block) and not traces(model.encoder) and traces(model.decoder.up_blocks[0])
    close.assert_close(model.decode(z).sample, truth, before)
    report = fastdit.accelerate(model, exclude=["*"])
    assert report.replaced == 0 and traces(model) == []


@torch.no_grad()
def test_ops():
    model = diffusers_dit()
    x, t, y = dit_inputs()
    truth, before = exact(model)(x.double(), t, y).sample, model(x, t, y).sample
    assert layers(fastdit.accelerate(model, ops={"attention"})) == {"attention": 2}
    close.assert_close(model(x, t, y).sample, truth, before)
    modulation = {"norm_modulate", "gate_residual", "gate_residual_norm_modulate"}
    report = fastdit.accelerate(model, ops=modulation)
    assert layers(report) == {"adaLN-Zero block": 2}
    assert any("needs patch_embed3d, which ops= leaves out" in row.why for row in report.rows)
    close.assert_close(model(x, t, y).sample, truth, before)
    assert layers(fastdit.accelerate(model)) == DIT_LAYERS


@torch.no_grad()
def test_precision():
    model = diffusers_dit().bfloat16()
    x, t, y = dit_inputs(torch.bfloat16)
    truth = exact(model)(x.double(), t, y).sample
    fastdit.accelerate(model)
    native = model(x, t, y).sample
    fastdit.accelerate(model, precision="fp32")
    wide = model(x, t, y).sample
    assert not torch.equal(native, wide)
    close.assert_close(wide, truth, native)


@torch.no_grad()
def test_conv_algo(monkeypatch):
    """The algo goes to the convolutions that it fits, and to no others; outputs stay as near the truth."""
    model, z = diffusers_wan_vae(num_res_blocks=0).bfloat16(), torch.randn(1, 16, 2, 4, 4).bfloat16()
    truth, before = exact(model).decode(z.double()).sample, model.decode(z).sample
    asked = {}

    def spy(x, weight, *args, algo, **kwargs):
        asked.setdefault((min(weight.shape[:2]) >= 32, tuple(weight.shape[3:])), set()).add(algo)
        return causal_conv3d(x, weight, *args, algo=algo, **kwargs)

    causal_conv3d = fastdit.ops.causal_conv3d
    fastdit.accelerate(model, conv_algo="winograd2d")
    monkeypatch.setattr(fastdit.ops, "causal_conv3d", spy)
    close.assert_close(model.decode(z).sample, truth, before)
    assert asked[True, (3, 3)] == {"winograd2d"}
    assert {algo for fits, algos in asked.items() if fits != (True, (3, 3)) for algo in algos} == {"auto"}
    with pytest.raises(ValueError, match="unknown conv_algo; got 'fft'"):
        fastdit.accelerate(model, conv_algo="fft")


@torch.no_grad()
def test_attention_masks_go_to_the_original():
    model = diffusers_dit()
    attn, h = model.transformer_blocks[0].attn1, torch.randn(2, 16, 64)
    mask = torch.zeros(2, 1, 16).masked_fill_(torch.arange(16) > 10, -10000.0)
    before = attn(h, attention_mask=mask)
    fastdit.accelerate(model)
    close.assert_bitwise(attn(h, attention_mask=mask), before)
    assert len({id(block.attn1.processor) for block in model.transformer_blocks}) == 1


# Blocks that have to stay -------------------------------------------------------------------------


def test_blocks_known_in_part_are_left_whole():
    model = diffusers_dit()
    model.transformer_blocks[0].norm3 = nn.RMSNorm(64)
    model.transformer_blocks[1].norm1.register_forward_hook(lambda *_: None)
    model.pos_embed.proj = nn.Conv2d(4, 64, 2, stride=2, padding=1)
    report = fastdit.accelerate(model)
    assert layers(report) == {"attention": 1, "DiT output layer": 1, "feed-forward activation": 1}
    assert reasons(report) >= {
        "its norm is not nn.LayerNorm",
        "AdaLayerNormZero carries a hook, which would no longer run",
        "its convolution is not a plain nn.Conv2d without padding",
    }
    assert not traces(model.pos_embed) and "forward" not in model.transformer_blocks[0].__dict__

    vae = diffusers_wan_vae(**WAN21)
    vae.decoder.mid_block.resnets[0].nonlinearity = nn.GELU()
    vae.decoder.mid_block.resnets[1].dropout.p = 0.1
    report = fastdit.accelerate(vae)
    assert {"its activation is GELU, not SiLU", "dropout p=0.1 between its norm and its convolution"} <= {
        row.why for row in report.rows
    }
    assert not traces(vae.decoder.mid_block.resnets) and traces(vae.decoder.mid_block.attentions)


def test_wrapped_methods_are_respected():
    model = diffusers_dit()
    block = model.transformer_blocks[0]
    original = block.forward
    block.forward = lambda *args, **kwargs: original(*args, **kwargs)  # as a hook does
    report = fastdit.accelerate(model)
    assert layers(report)["adaLN-Zero block"] == 1 and "wrapped already" in str(report)
    placed = model.transformer_blocks[1].forward
    model.transformer_blocks[1].forward = lambda *args, **kwargs: placed(*args, **kwargs)
    with pytest.raises(RuntimeError, match="remove the hooks"):
        fastdit.restore(model)
    assert traces(model)  # nothing was undone
    model.transformer_blocks[1].forward = placed
    fastdit.restore(model)
    assert traces(model) == [("transformer_blocks.0", "forward")]


def test_unknown_models_are_not_touched():
    model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(8, 2), nn.Conv2d(3, 3, 3))
    report = fastdit.accelerate(model)
    assert report.replaced == 0 and traces(model) == []
    assert layers(report, replaced=False)["Conv2d"] == 1
    assert "Looked for: " in str(report) and "adaLN-Zero block" in str(report)


def test_pipelines_and_lists():
    models = [diffusers_dit(), diffusers_wan_vae(**WAN21)]
    others = {"text_encoder": nn.Linear(2, 2), "scheduler": object()}
    pipeline = types.SimpleNamespace(components={"transformer": models[0], "vae": models[1], **others})
    report = fastdit.accelerate(pipeline)
    assert layers(report).keys() == DIT_LAYERS.keys() | VAE_LAYERS
    assert report.models == models  # the text encoder is not looked at
    fastdit.restore(pipeline)
    assert all(traces(model) == [] for model in models)
    assert layers(fastdit.accelerate(models)) == layers(report)


@pytest.mark.parametrize(
    "call, error, match",
    [
        (lambda m: fastdit.accelerate(42), TypeError, "got int, expected an nn.Module"),
        (lambda m: fastdit.accelerate([]), TypeError, "nothing of torch"),
        (lambda m: fastdit.restore("model"), TypeError, "got str"),
        (lambda m: fastdit.accelerate(m, ops=["flash"]), ValueError, "unknown op; got flash"),
        (lambda m: fastdit.accelerate(m, precision="bf16"), ValueError, "unknown precision"),
        (lambda m: fastdit.accelerate(m, exclude=["blocks.0"]), ValueError, "matches no submodule; got 'blocks.0'"),
    ],
)
def test_bad_input(call, error, match):
    model = diffusers_dit()
    with pytest.raises(error, match=match):
        call(model)
    assert traces(model) == []


# Report, verify, compile --------------------------------------------------------------------------


def test_report():
    model = diffusers_dit().bfloat16()
    report = fastdit.accelerate(model)
    text = str(report)
    for expected in ("DiTTransformer2DModel", "replaced", "left", "gate_residual_norm_modulate", "vendor's GEMM"):
        assert expected in text
    blocks = next(row for row in report.rows if row.layer == "adaLN-Zero block")
    assert (blocks.saving, blocks.unit) == (2 * 13 * 64 * 2, "token")
    assert report.replaced == sum(DIT_LAYERS.values())


def test_verify(capsys):
    model = diffusers_dit()
    report = fastdit.accelerate(model)
    found = report.verify(*dit_inputs())
    assert found.rms_before > 0.1 and found.max_error < 1e-4 and found.speedup > 0
    assert str(found) in capsys.readouterr().out
    assert traces(model)  # accelerated again
    vae = diffusers_wan_vae(**WAN21)
    found = fastdit.accelerate(vae).verify(torch.randn(1, 4, 2, 4, 4), call="decode", rounds=1)
    assert 0 < found.rms_error < 1e-4
    both = fastdit.accelerate([model, vae], exclude=["decoder.conv_in"])
    with pytest.raises(ValueError, match="got of=none for a report on DiTTransformer2DModel, AutoencoderKLWan"):
        both.verify(*dit_inputs())
    with pytest.raises(ValueError, match="got of=Linear"):
        both.verify(of=nn.Linear(1, 1))
    assert both.verify(*dit_inputs(), of=model, rounds=1).rms_error > 0  # the pattern is the other model's
    found = both.verify(torch.randn(1, 3, 5, 32, 32), of=vae, call="encode", rounds=1)
    assert 0 < found.max_error < 1e-4 and traces(vae) and traces(model)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: {"video": y, "audio": [y * 2, None]},
        lambda y: (y, (y * 2,)),
        lambda y: [{"sample": y, "step": torch.tensor([1])}, y * 2],
        lambda y: BothOutputs(y, y * 2),
    ],
    ids=["dict", "tuple", "list", "dataclass"],
)
def test_verify_of_any_output(wrap):
    """All of it counts: the second part, with twice the error, too."""

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = diffusers_dit()

        def forward(self, *inputs, **options):
            return wrap(self.model(*inputs, **options).sample)

    wrapped, inputs = Wrapped(), dit_inputs()
    found = fastdit.accelerate(wrapped).verify(*inputs, rounds=1)
    plain = fastdit.accelerate(wrapped.model).verify(*inputs, rounds=1)
    assert found.max_error == 2 * plain.max_error > 0
    assert found.rms_before == pytest.approx(plain.rms_before * 2.5**0.5)


@dataclasses.dataclass
class BothOutputs:
    video: torch.Tensor
    audio: torch.Tensor


def test_verify_needs_something_to_compare():
    class Silent(nn.Module):
        def forward(self):
            return "nothing"

    with pytest.raises(ValueError, match="nothing to compare; got str"):
        fastdit.accelerate(Silent()).verify(rounds=1)


@torch.no_grad()
def test_compiled_block():
    model = diffusers_dit()
    _, t, y = dit_inputs()
    fastdit.accelerate(model)
    block = model.transformer_blocks[1]
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (16, 40, 64):
        h = torch.randn(2, tokens, 64)
        close.assert_bitwise(compiled(h, timestep=t, class_labels=y), block(h, timestep=t, class_labels=y))


@torch.no_grad()
def test_compiled_vae_block():
    model = diffusers_wan_vae(**WAN21)
    fastdit.accelerate(model)
    block = model.decoder.up_blocks[0]
    x = torch.randn(1, 16, 2, 8, 8).contiguous(memory_format=torch.channels_last_3d)
    close.assert_bitwise(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
