"""fastdit.models.VideoVAE: shapes, chunks equal to the whole, gradients of the native and the reference backends."""

import pytest
import torch

from fastdit.models import VideoVAE, VideoVAEConfig
from fastdit.testing import close

SMALL = VideoVAEConfig(latent_channels=4, widths=(8, 12))


def vae(config=SMALL, seed=0, **to):
    torch.manual_seed(seed)
    return VideoVAE(config).to(**to)


def clip(frames=9, height=16, width=24, batch=2, **options):
    return torch.randn(batch, 3, frames, height, width, **options).clamp(-1, 1)


@torch.no_grad()
@pytest.mark.parametrize("frames, height, width", [(1, 8, 8), (5, 16, 24), (17, 40, 8)])
def test_shapes(frames, height, width):
    model, x = vae().eval(), clip(frames, height, width)
    posterior = model.encode(x)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 1 + frames // 4, height // 8, width // 8)
    assert model.decode(posterior.mean).shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_equal_the_whole(chunk):
    model, x = vae().eval(), clip(17)
    whole, parts = model.encode(x), list(model.encode_chunks(x, chunk))
    close.assert_bitwise(torch.cat([p.mean for p in parts], dim=2), whole.mean)
    close.assert_bitwise(torch.cat([p.logvar for p in parts], dim=2), whole.logvar)
    close.assert_bitwise(torch.cat(list(model.decode_chunks(whole.mean, chunk)), dim=2), model.decode(whole.mean))
