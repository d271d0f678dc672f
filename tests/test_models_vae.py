"""fastdit.models.CausalVAE against diffusers' AutoencoderKLWan on the same weights, whole and in chunks."""

import copy

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastdit
from fastdit.models import CausalVAE
from fastdit.models.vae import Stream
from fastdit.testing import close
from fastdit.testing.models import WAN21, WAN22, diffusers_wan_vae

CONFIGS = {"wan2.1": WAN21, "wan2.2": WAN22}
each_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


def pair(config, dtype=torch.float32):
    theirs = diffusers_wan_vae(**config)
    ours = CausalVAE.from_config(theirs.config)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours.to(dtype).eval(), theirs.to(dtype)


def exact(theirs):
    """The original in fp64; its upsampling would round to fp32."""
    double = copy.deepcopy(theirs).double()
    for module in double.modules():
        if isinstance(module, nn.Upsample):
            module.forward = lambda x, module=module: nn.Upsample.forward(module, x)
    return double


def video(frames=9, size=32, batch=2, dtype=torch.float32):
    return torch.randn(batch, 3, frames, size, size).clamp(-1, 1).to(dtype)


@pytest.mark.parametrize("backend", [None, "reference"])
@each_dtype
@each_config
@torch.no_grad()
def test_equals_diffusers(config, dtype, backend):
    ours, theirs = pair(config, dtype)
    truth, x = exact(theirs), video(dtype=dtype)
    latents, expected = theirs.encode(x).latent_dist, truth.encode(x.double()).latent_dist
    z = torch.randn(2, ours.decoder.conv_in.in_channels, 3, 4, 4).to(dtype)
    with fastdit.use_backend(backend) if backend else torch.no_grad():
        mean, logvar = ours.encode(x)
        decoded = ours.decode(z)
    close.assert_close(mean, expected.mean, latents.mean, "mean")
    close.assert_close(logvar, expected.logvar, latents.logvar, "logvar")
    close.assert_close(decoded, truth.decode(z.double()).sample, theirs.decode(z).sample, "video")
    assert mean.dtype == decoded.dtype == dtype and decoded.is_contiguous()


@torch.no_grad()
def test_full_width():
    """Wan 2.1's own widths (96 to 384 channels), one residual block a stage, two latent frames of 4 x 4."""
    for dtype in (torch.float32, torch.bfloat16):
        ours, theirs = pair({"num_res_blocks": 0}, dtype)
        z = torch.randn(1, 16, 2, 4, 4).to(dtype)
        close.assert_close(ours.decode(z), exact(theirs).decode(z.double()).sample, theirs.decode(z).sample)


@each_config
@torch.no_grad()
def test_chunks_equal_the_whole(config):
    ours, _ = pair(config)
    x, z = video(frames=13), torch.randn(2, ours.decoder.conv_in.in_channels, 4, 4, 4)
    whole, decoded = ours.encode(x, chunk=3), ours.decode(z, chunk=3)
    for chunk in (1, 2):
        close.assert_bitwise(ours.encode(x, chunk=chunk)[0], whole[0])
        close.assert_bitwise(ours.encode(x, chunk=chunk)[1], whole[1])
        close.assert_bitwise(ours.decode(z, chunk=chunk), decoded)
    parts = list(ours.decode_chunks(z, chunk=2))
    assert [p.shape[2] for p in parts] == [1, 8, 4]
    close.assert_bitwise(torch.cat(parts, dim=2), decoded)


@torch.no_grad()
@each_config
def test_large_pictures_go_a_few_frames_at_a_time(config, monkeypatch):
    ours, theirs = pair(config)
    fastdit.accelerate(theirs)
    z = torch.randn(2, ours.decoder.conv_in.in_channels, 3, 4, 4)
    whole, decoded = ours.decode(z), theirs.decode(z).sample
    monkeypatch.setattr("fastdit.models.vae.LARGE", 0)
    monkeypatch.setattr("fastdit.nn.conv.LARGE", 0)
    close.assert_bitwise(ours.decode(z), whole)
    close.assert_bitwise(ours.decode(z, chunk=2), whole)
    close.assert_bitwise(theirs.decode(z).sample, decoded)


@torch.no_grad()
def test_later_frames_do_not_matter():
    ours, _ = pair(WAN21)
    z = torch.randn(1, 4, 4, 4, 4)
    changed = z.clone()
    changed[:, :, 2:] = float("nan")
    close.assert_bitwise(ours.decode(changed)[:, :, :5], ours.decode(z)[:, :, :5])


class Peak(TorchDispatchMode):
    """Most bytes alive at once among the tensors made inside the mode; views of `given` are not counted."""

    def __init__(self, given):
        super().__init__()
        self.given, self.alive, self.peak = given.untyped_storage()._cdata, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata != self.given:
                    self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: item for key, item in self.alive.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


@torch.no_grad()
def test_memory_does_not_grow_with_the_length():
    ours, _ = pair(WAN21)

    def peak(run, x):
        with Peak(x) as mode:
            for _ in run(x):
                pass
        return mode.peak

    decode = [peak(ours.decode_chunks, torch.randn(1, 4, frames, 4, 4)) for frames in (4, 12)]
    encode = [peak(ours.encode_chunks, video(frames=frames, batch=1)) for frames in (17, 45)]
    assert decode[0] == decode[1] > 0
    assert encode[0] == encode[1] > 0


@torch.no_grad()
def test_stream_holds_at_most_two_frames_of_each_layer():
    ours, _ = pair(WAN21)
    stream = Stream()
    for first in (True, False, False):
        stream.first = first
        ours.decoder(torch.randn(1, 4, 1, 4, 4), stream)
    assert {v.shape[2] for v in stream.values()} == {2}
    assert all(v.untyped_storage().nbytes() == v.numel() * v.element_size() for v in stream.values())


def test_gradients_equal_diffusers():
    ours, theirs = pair(WAN21)
    truth = exact(theirs)
    x, grads = video(frames=5, batch=1), []
    for model, run in ((ours, ours.forward), (truth, lambda v: truth(v).sample), (theirs, lambda v: theirs(v).sample)):
        model.zero_grad()
        run(x.to(next(model.parameters()).dtype)).square().mean().backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == grads[2].keys()
    # all parameters in one comparison, each in units of its own gradient: the vectors alone are too short for a rms
    scales = {name: grad.square().mean().sqrt() for name, grad in grads[1].items()}
    mine, expected, baseline = (torch.cat([(g[n].double() / scales[n]).flatten() for n in scales]) for g in grads)
    close.assert_close(mine.float(), expected, baseline.float())


def test_bad_input():
    ours, _ = pair(WAN21)
    with pytest.raises(ValueError, match="1 \\+ a multiple of 4; got 8; drop the last 3"):
        ours.encode(video(frames=8))
    with pytest.raises(ValueError, match="attn_scales"):
        CausalVAE.from_config({"attn_scales": [1.0]})
