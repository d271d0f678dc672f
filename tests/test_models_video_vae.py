"""fastdit.models.VideoVAE: chunks equal to the whole in flat memory, native equal to reference, fit to be trained."""

import dataclasses
import json
import math

import pytest
import torch
from test_models_vae import Peak
from torch import nn

import fastdit
from fastdit.models import Posterior, VideoVAE, VideoVAEConfig
from fastdit.testing import close

SMALL = VideoVAEConfig(latent_channels=4, widths=(8, 12))
MINUTE = VideoVAEConfig(latent_channels=2, patch_size=1, widths=(2, 3))
each_config = pytest.mark.parametrize("config", [SMALL, VideoVAEConfig()], ids=["small", "default"])
each_backend = pytest.mark.parametrize("backend", ["reference", "cpu"])
whole_and_parts = pytest.mark.parametrize("cuts", [(1,) * 5, (1, 2, 2), (2, 3), (4, 1)], ids=str)


def vae(config=SMALL, dtype=torch.float32):
    """Weights that make every layer matter, evaluated; the same for every dtype."""
    torch.manual_seed(0)
    model = VideoVAE(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter) / math.sqrt(parameter[0].numel()))
    return model.to(dtype).eval()


def clip(frames=9, height=16, width=24, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, frames, height, width).clamp(-1, 1).to(dtype)


def groups(cuts):
    """Frames of consecutive parts with so many latent frames."""
    return [4 * n - 3 * (i == 0) for i, n in enumerate(cuts)]


# -- what goes in and out -----------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("frames, height, width", [(1, 8, 8), (1, 40, 24), (5, 16, 24), (17, 8, 56)])
def test_shapes(frames, height, width):
    model, x = vae(), clip(frames, height, width)
    posterior = model.encode(x)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 1 + frames // 4, height // 8, width // 8)
    y = model.decode(posterior.mean)
    assert y.shape == x.shape and y.is_contiguous() and posterior.mean.is_contiguous()
    close.assert_bitwise(model(x), y)


@torch.no_grad()
def test_patch_size_and_blocks_of_the_config():
    model = vae(VideoVAEConfig(3, patch_size=2, widths=(4, 6), encoder_blocks=(0, 2), decoder_blocks=(2, 0)))
    x = clip(5, 12, 8)
    assert model.encode(x).mean.shape == (2, 3, 2, 3, 2) and model(x).shape == x.shape
    assert [type(b).__name__ for b in model.encoder.blocks] == ["Down", "ResidualBlock", "ResidualBlock"]
    assert [type(b).__name__ for b in model.decoder.blocks] == ["Up", "ResidualBlock", "ResidualBlock"]


@torch.no_grad()
def test_an_image_is_the_first_frame_of_a_video():
    model, x = vae(), clip(9)
    posterior = model.encode(x)
    close.assert_bitwise(model.encode(x[:, :, :1]).mean, posterior.mean[:, :, :1])
    close.assert_bitwise(model.decode(posterior.mean[:, :, :1]), model.decode(posterior.mean)[:, :, :1])


@torch.no_grad()
def test_later_frames_do_not_matter():
    model, x = vae(), clip(13)
    later = x.clone()
    later[:, :, 9:] = float("nan")
    mean = model.encode(x).mean
    close.assert_bitwise(model.encode(later).mean[:, :, :3], mean[:, :, :3])
    changed = mean.clone()
    changed[:, :, 2:] = float("nan")
    close.assert_bitwise(model.decode(changed)[:, :, :5], model.decode(mean)[:, :, :5])


@torch.no_grad()
def test_frames_of_long_ago_do_not_matter():
    """How far layers look back: crops of 17 frames in training show them all that a video of any length does."""
    model, x = vae(), clip(25)
    past = x.clone()
    past[:, :, 0] += 1
    mean = model.encode(x).mean
    assert not torch.equal(model.encode(past).mean[:, :, 1], mean[:, :, 1])
    close.assert_bitwise(model.encode(past).mean[:, :, 2:], mean[:, :, 2:])
    past = mean.clone()
    past[:, :, 0] += 1
    assert not torch.equal(model.decode(past)[:, :, 9:11], model.decode(mean)[:, :, 9:11])
    close.assert_bitwise(model.decode(past)[:, :, 11:], model.decode(mean)[:, :, 11:])


@torch.no_grad()
def test_samples_of_a_batch_do_not_mix():
    model, x = vae(), clip(5, batch=3)
    for i, one in enumerate(x.split(1)):
        close.assert_bitwise(model.encode(one).mean, model.encode(x).mean[i : i + 1])


def test_decode_clamps_when_it_is_not_trained():
    model, z = vae(), torch.randn(1, 4, 2, 2, 2)
    model.decoder.conv_out.weight.data.mul_(30.0)
    with torch.no_grad():
        clamped, free = model.decode(z), model.train().decode(z)
    assert free.abs().max() > 1.0
    close.assert_bitwise(clamped, free.clamp(-1.0, 1.0))


# -- in chunks ----------------------------------------------------------------------------------------------


@torch.no_grad()
@each_config
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_equal_the_whole(config, chunk):
    model, x = vae(config), clip(17)
    whole, parts = model.encode(x), list(model.encode_chunks(x, chunk))
    assert [p.mean.shape[2] for p in parts] == {1: [1, 1, 1, 1, 1], 2: [1, 2, 2], 3: [1, 3, 1]}[chunk]
    close.assert_bitwise(torch.cat([p.mean for p in parts], dim=2), whole.mean)
    close.assert_bitwise(torch.cat([p.logvar for p in parts], dim=2), whole.logvar)
    close.assert_bitwise(torch.cat(list(model.decode_chunks(whole.mean, chunk)), dim=2), model.decode(whole.mean))


@torch.no_grad()
@whole_and_parts
def test_given_parts_equal_the_whole(cuts):
    model, x = vae(), clip(17)
    whole = model.encode(x)
    parts = model.encode_chunks(iter(x.split(groups(cuts), dim=2)))
    close.assert_bitwise(torch.cat([p.mean for p in parts], dim=2), whole.mean)
    frames = list(model.decode_chunks(iter(whole.mean.split(cuts, dim=2))))
    assert [f.shape[2] for f in frames] == groups(cuts)
    close.assert_bitwise(torch.cat(frames, dim=2), model.decode(whole.mean))


@torch.no_grad()
@whole_and_parts
def test_chunks_equal_the_whole_on_the_reference(cuts):
    """torch's convolutions add in an order that depends on the length: close instead of bitwise."""
    model, truth, x = vae(), vae(dtype=torch.float64), clip(17)
    with fastdit.use_backend("reference"):
        whole, exact = model.encode(x).mean, truth.encode(x.double()).mean
        parts = torch.cat([p.mean for p in model.encode_chunks(x.split(groups(cuts), dim=2))], dim=2)
        close.assert_close(parts, exact, whole, "mean")
        frames = torch.cat(list(model.decode_chunks(whole.split(cuts, dim=2))), dim=2)
        close.assert_close(frames, truth.decode(whole.double()), model.decode(whole), "video")


def test_gradients_flow_through_chunks():
    model, x = vae(), clip(9)
    grads = []
    for run in (lambda: model(x), lambda: torch.cat(list(model.decode_chunks(latents(model, x))), dim=2)):
        model.zero_grad()
        run().square().mean().backward()
        grads.append({name: p.grad.double() for name, p in model.named_parameters()})
    truth = vae(dtype=torch.float64)
    with fastdit.use_backend("reference"):
        truth(x.double()).square().mean().backward()
    compare_gradients(grads[1], {name: p.grad for name, p in truth.named_parameters()}, grads[0])


def latents(model, x):
    return torch.cat([p.mean for p in model.encode_chunks(x)], dim=2)


@torch.no_grad()
@pytest.mark.parametrize("fps", [8, 24])
@pytest.mark.parametrize("what", ["encode", "decode"])
def test_memory_of_a_minute_is_that_of_seconds(what, fps):
    """Live bytes, counted: parts come from an iterator and go, so the whole never exists."""
    model, later = vae(), 3  # latent frames of every part after the first
    channels, size = (3, 16) if what == "encode" else (4, 2)

    def parts(count):
        for n in [1, *[later] * count]:
            frames = n if what == "decode" or n == 1 else 4 * n
            yield torch.zeros(1, channels, frames, size, size)

    given = torch.empty(0)  # what Peak does not count; it must stay alive

    def peak(count):
        with Peak(given) as mode:
            made = sum(1 for _ in getattr(model, f"{what}_chunks")(parts(count)))
        assert made == 1 + count
        return mode.peak

    assert peak(60 * fps // 4 // later) == peak(4) > 0


# -- native and reference -----------------------------------------------------------------------------------


@torch.no_grad()
@each_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_native_equals_reference(config, dtype):
    model, truth, x = vae(config, dtype), vae(config, dtype).double(), clip(5, dtype=dtype)
    with fastdit.use_backend("reference"):
        exact, plain = truth.encode(x.double()), model.encode(x)
        video, baseline = truth.decode(plain.mean.double()), model.decode(plain.mean)
    mine = model.encode(x)
    assert mine.mean.dtype == dtype
    close.assert_close(mine.mean, exact.mean, plain.mean, "mean")
    close.assert_close(mine.logvar, exact.logvar, plain.logvar, "logvar")
    close.assert_close(model.decode(plain.mean), video, baseline, "video")


def loss(model, x):
    """What training minimises, with the noise as a part of x."""
    x, noise = x.to(next(model.parameters()).dtype), torch.linspace(-1, 1, 4 * 2 * 2 * 3).reshape(1, 4, 2, 2, 3)
    posterior = model.encode(x)
    z = posterior.mean + (0.5 * posterior.logvar).exp() * noise.to(x)
    return (model.decode(z) - x).square().mean() + 1e-2 * posterior.kl()


def gradients(model, x):
    model.train().zero_grad()
    loss(model, x).backward()
    return {name: p.grad.double() for name, p in model.named_parameters()}


def compare_gradients(mine, truth, baseline):
    """All parameters in one comparison, each in units of its own gradient: vectors alone are too short for a rms."""
    scales = {name: g.square().mean().sqrt() for name, g in truth.items()}
    flat = [torch.cat([(g[n] / scales[n]).flatten() for n in scales]) for g in (mine, truth, baseline)]
    close.assert_close(flat[0].float(), flat[1], flat[2].float(), "gradients")


def test_gradients_equal_the_reference():
    x = clip(5, batch=1)
    with fastdit.use_backend("reference"):
        truth, baseline = gradients(vae(dtype=torch.float64), x), gradients(vae(), x)
    compare_gradients(gradients(vae(), x), truth, baseline)


@each_backend
def test_checkpointing_changes_no_gradient(backend):
    model, x = vae(), clip(5, batch=1)
    with fastdit.use_backend(backend):
        plain = gradients(model, x)
        model.gradient_checkpointing = True
        assert model.gradient_checkpointing and model.encoder.gradient_checkpointing
        for name, grad in gradients(model, x).items():
            close.assert_bitwise(grad, plain[name], name)


def test_checkpointing_keeps_less():
    deep = dataclasses.replace(SMALL, encoder_blocks=(3, 1), decoder_blocks=(3, 1))
    model, x = vae(deep).train(), clip(17, 32, 32)
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def kept():
        storages = {}

        def keep(t):
            if t.untyped_storage()._cdata not in weights:
                storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = model(x)
        del y
        return sum(storages.values())

    plain = kept()
    model.gradient_checkpointing = True
    assert kept() < 0.75 * plain


@each_backend
def test_gradcheck(backend):
    model = vae(MINUTE, torch.float64).train()
    x = torch.rand(1, 3, 5, 2, 4, dtype=torch.float64, requires_grad=True)

    def run(x, *parameters):
        names = [name for name, _ in model.named_parameters()]
        return torch.func.functional_call(
            Moments(model), {f"model.{n}": p for n, p in zip(names, parameters, strict=True)}, x
        )

    with fastdit.use_backend(backend):
        parameters = [p.detach().requires_grad_() for p in model.parameters()]
        assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True)


class Moments(nn.Module):
    """Everything that comes out: mean, log-variance and reconstruction."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        posterior = self.model.encode(x)
        return posterior.mean, posterior.logvar, self.model.decode(posterior.mean)


def test_compiles_as_one_graph():
    model, x = vae().train(), clip(5, batch=1)
    close.assert_bitwise(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))


# -- training -----------------------------------------------------------------------------------------------


def test_every_parameter_learns_from_the_start():
    torch.manual_seed(0)
    for name, grad in gradients(VideoVAE(SMALL), clip(5, batch=1)).items():
        assert grad.abs().max() > 0, name
    posterior = VideoVAE().encode(clip(5))
    assert posterior.logvar.exp().sqrt().mean() < 0.5 * posterior.mean.std()  # noise does not drown the mean


def squares(count, frames=5, size=24):
    """Coloured squares moving to the right over another colour."""
    video = torch.rand(count, 3, 1, 1, 1).mul(2).sub(1).repeat(1, 1, frames, size, size)
    for one in video:
        colour, y = torch.rand(3, 1, 1) * 2 - 1, int(torch.randint(size - 8, ()))
        for t in range(frames):
            one[:, t, y : y + 8, 2 + 2 * t : 10 + 2 * t] = colour
    return video


def test_it_learns_a_batch_by_heart():
    torch.manual_seed(0)
    model, x = VideoVAE(VideoVAEConfig(widths=(16, 24))).train(), squares(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    errors = []
    for _ in range(60):
        posterior = model.encode(x)
        error = (model.decode(posterior.sample()) - x).square().mean()
        optimizer.zero_grad()
        (error + 1e-4 * posterior.kl()).backward()
        optimizer.step()
        errors.append(float(error.detach()))
    assert errors[-1] < errors[0] / 8


def test_posterior():
    mean, logvar = torch.randn(2, 3, 1, 2, 2), torch.randn(2, 3, 1, 2, 2)
    posterior = Posterior(mean, logvar)
    normal = torch.distributions.Normal(mean.double(), logvar.double().mul(0.5).exp())
    truth = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).mean()
    torch.testing.assert_close(posterior.kl().double(), truth)
    samples = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    close.assert_bitwise(samples[0], samples[1])
    assert not torch.equal(samples[0], samples[2])
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    close.assert_bitwise(samples[0], mean + (0.5 * logvar).exp() * noise)


def test_normalized_latents():
    model, z = vae(), 3.0 + 5.0 * torch.randn(4, 4, 3, 8, 8)
    model.latent_mean.copy_(z.mean(dim=(0, 2, 3, 4)))
    model.latent_std.copy_(z.std(dim=(0, 2, 3, 4)))
    normal = model.normalize(z)
    assert normal.mean(dim=(0, 2, 3, 4)).abs().max() < 1e-5
    assert (normal.std(dim=(0, 2, 3, 4)) - 1).abs().max() < 1e-5
    torch.testing.assert_close(model.denormalize(normal), z)
    close.assert_bitwise(model.normalize(z[0]), normal[0])  # a list's items have no batch


# -- what is where ------------------------------------------------------------------------------------------


def test_parameters_and_cost():
    """The counts of the class docstring, and its formula against what the layers do."""
    model = VideoVAE().eval()
    assert sum(p.numel() for p in model.parameters()) == 682_336
    flops = {"encoder": 0, "decoder": 0}
    for part in flops:
        for module in getattr(model, part).modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d)):

                def count(module, args, y, part=part):
                    flops[part] += 2 * y.numel() * module.weight[0].numel()

                module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, 3, 17, 64, 64))
    p, z, (f, c), (n, m) = 4, 8, model.config.widths, model.config.encoder_blocks
    fine, coarse = 17 * (64 // p) ** 2, 5 * (64 // (2 * p)) ** 2
    at_fine, at_coarse = 81 * p * p * f + 18 * n * f * f, 36 * f * c + 18 * m * c * c + 18 * z * c
    assert flops["encoder"] == 2 * (at_fine * fine + at_coarse * coarse)
    n, m = model.config.decoder_blocks
    at_fine, at_coarse = 9 * c * f + 18 * n * f * f + 81 * p * p * f, 9 * z * c + 18 * m * c * c + 12 * c * c
    assert flops["decoder"] == 2 * (at_fine * fine + at_coarse * coarse)
    assert sum(flops.values()) < 6e9


def test_state_and_config_round_trip():
    model, x = vae(), clip(5)
    model.latent_mean.normal_()
    config = VideoVAEConfig(**json.loads(json.dumps(dataclasses.asdict(model.config))))
    assert config == model.config
    other = VideoVAE(config).eval()
    other.load_state_dict(model.state_dict(), strict=True)
    close.assert_bitwise(other(x), model(x))
    close.assert_bitwise(other.normalize(other.encode(x).mean), model.normalize(model.encode(x).mean))


# -- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, message",
    [
        ((1, 3, 8, 16, 16), r"frames must be 1 \+ a multiple of 4; got 8, expected e.g. 5; cut"),
        ((1, 3, 0, 16, 16), r"frames must be 1 \+ a multiple of 4; got 0, expected e.g. 1"),
        ((1, 3, 5, 16, 20), "multiples of 8; got 16 x 20, expected e.g. 16 x 16; crop or resize"),
        ((1, 3, 5, 4, 16), "multiples of 8; got 4 x 16, expected e.g. 8 x 16"),
        ((1, 3, 5, 0, 16), "multiples of 8; got 0 x 16, expected e.g. 8 x 16"),
        ((1, 4, 5, 16, 16), r"\(B, 3, T, H, W\); got \[1, 4, 5, 16, 16\]"),
        ((3, 5, 16, 16), r"\(B, 3, T, H, W\); got \[3, 5, 16, 16\].*a single video a batch of one"),
    ],
)
def test_bad_videos(shape, message):
    with pytest.raises(ValueError, match=f"VideoVAE: .*{message}"):
        vae().encode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(1, 3, 2, 2, 2), (4, 2, 2, 2), (1, 4, 0, 2, 2)])
def test_bad_latents(shape):
    with pytest.raises(ValueError, match=r"VideoVAE: latents must be \(B, 4, T, h, w\); got"):
        vae().decode(torch.zeros(shape))


def test_bad_parts():
    parts = [clip(5), clip(5)]
    with pytest.raises(ValueError, match=r"a multiple of 4 after the first part; got 5, expected e\.g\. 4"):
        list(vae().encode_chunks(parts))
    with pytest.raises(ValueError, match=r"frames must be 1 \+ a multiple of 4; got 4"):
        list(vae().encode_chunks([clip(4)]))
    with pytest.raises(ValueError, match="chunk must be at least 1; got 0"):
        list(vae().encode_chunks(clip(9), chunk=0))
    with pytest.raises(ValueError, match="cache differs from x in more than T"):
        list(vae().encode_chunks([clip(5), clip(4, 24, 24)]))


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(widths=(8, 8, 8)), r"widths must have one number for each of the two stages; got \(8, 8, 8\)"),
        (dict(widths=(0, 8)), r"widths .* got \(0, 8\), expected two ints of at least 1"),
        (dict(encoder_blocks=3), "encoder_blocks .* got 3, expected two ints of at least 0"),
        (dict(decoder_blocks=("1", 1)), "decoder_blocks .* got"),
        (dict(latent_channels=0), "latent_channels must be a positive int; got 0, expected e.g. 8"),
        (dict(patch_size=4.0), "patch_size must be a positive int; got 4.0, expected e.g. 4"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=f"VideoVAEConfig: {message}"):
        VideoVAEConfig(**options)
