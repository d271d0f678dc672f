"""The laws of conv beside the contract on its samples, for the tests of every compiled backend, and what they draw."""

import pytest
import torch

from fastdit import ops
from fastdit.backends.registry import NoBackend
from fastdit.reference.conv import output_shape
from fastdit.testing import close
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker

LAST, WAN = torch.channels_last_3d, dict(norm="channel_l2", act="silu")
each_format = pytest.mark.parametrize("last", [True, False], ids=["ndhwc", "ncdhw"])
each_empty = pytest.mark.parametrize("shape", [(0, 8, 3, 4, 4), (1, 8, 0, 4, 4), (0, 8, 0, 4, 4)], ids=str)
# keywords of the convolution, and the taps along T that its cache must serve
GEOMETRIES = {
    "stride": (dict(stride=(2, 1, 1)), 3),
    "first": (dict(time_pad="first", space_pad="reflect"), 3),
    "dilation": (dict(dilation=(2, 1, 1), padding=(4, 0, 1, 1, 1, 1)), 5),
}


def wan(device, dtype, T: int, last: bool, C: int = 16, size=(4, 5)):
    """x, weight and the keywords of a convolution of Wan's VAE."""
    m = Maker(dtype, device)
    x = m.randn(1, C, T, *size).to(memory_format=LAST if last else torch.contiguous_format)
    return x, m.randn(24, C, 3, 3, 3) * 0.05, dict(norm_weight=m.randn(C), **WAN)


# ---- fuzz -------------------------------------------------------------------------------------------------
def small_geometry(draw):
    """kernel, stride and dilation, few and small, for a simulator or an interpreter."""
    return (
        draw((3, 3, 3), (3, 1, 1), (1, 3, 3), (1, 1, 1), (2, 3, 1), (1, 2, 2), (2, 1, 3)),
        draw((1, 1, 1), (1, 2, 2), (2, 1, 1), (2, 3, 2)),
        draw((1, 1, 1), (1, 1, 1), (2, 1, 2), (1, 2, 1)),
    )


def draw_conv(draw, m: Maker, kernel, stride, dilation, extents=((1, 2, 3), (1, 2, 5), (1, 3, 7)), fewest=8):
    """Any padding, cache, layout and prologue whose windows fit. fewest: channels under a norm; the gradient of one is
    all rounding."""
    time_pad, space_pad = draw("zeros", "first"), draw("zeros", "replicate", "reflect")
    sizes, padding = [draw(*values) for values in extents], []
    for i in range(3):
        reach = dilation[i] * (kernel[i] - 1)
        most = sizes[i] - 1 if i and space_pad == "reflect" else 3
        before, after = min(draw(0, 1, 2, reach), most), min(draw(0, 0, 1, 3), most)
        sizes[i] = max(sizes[i], reach + 1 - before - after)
        padding += [before, after]
    cached = min(draw(0, 0, 1, 2), padding[0])
    if cached:
        sizes[0] = -(-sizes[0] // stride[0]) * stride[0]
    B, C, Cout = draw(1, 2), draw(1, 3, 8, 16, 19, 34), draw(1, 7, 16, 50)
    if m.dtype == torch.float32:  # of a handful of values the largest error is luck
        C, Cout, sizes[2] = max(C, 8), max(Cout, 16), max(sizes[2], 7)

    def video(channels, *size):
        cut, last = draw(0, 0, 1), draw(True, False)  # a slice of something larger, in either layout
        t = m.randn(B, channels + cut, *size[:2], size[2] + cut)
        t = t.to(memory_format=LAST) if last else t
        return t[:, cut:, :, :, : size[2]]

    norm = draw(None, "channel_l2", "channel_rms") if C >= fewest else None
    kwargs = dict(stride=stride, dilation=dilation, padding=tuple(padding), time_pad=time_pad, space_pad=space_pad)
    kwargs |= dict(norm=norm, act=draw(None, "silu"), cache=video(C, cached, *sizes[1:]) if cached else None)
    kwargs |= dict(norm_weight=m.randn(C) if norm and draw(True, False) else None, bias=draw(None, m.randn(Cout)))
    x, weight = video(C, *sizes), m.randn(Cout, C, *kernel) * (C * kernel[0] * kernel[1] * kernel[2]) ** -0.5
    weight = weight.to(memory_format=LAST) if draw(True, False) else weight
    if draw(True, False):
        kwargs["residual"] = video(Cout, *output_shape(x.shape, weight.shape, stride, dilation, padding)[2:])
    return (x, weight), {k: v for k, v in kwargs.items() if v is not None}


# ---- laws -------------------------------------------------------------------------------------------------
def chunked(backend, x, weight, chunks, k_t: int = 3, **kwargs):
    """The convolution chunk by chunk, each with the cache that the ones before it left."""
    cache, parts = None, []
    for chunk in x.split(chunks, dim=2):
        parts.append(ops.causal_conv3d(chunk, weight, cache=cache, **kwargs, backend=backend))
        cache = ops.next_cache(chunk, cache, k_t, backend=backend)
    return torch.cat(parts, 2)


def chunked_equals_whole(backend, x, weight, chunks, k_t: int = 3, **kwargs) -> None:
    whole = ops.causal_conv3d(x, weight, **kwargs, backend=backend)
    close.assert_bitwise(chunked(backend, x, weight, chunks, k_t, **kwargs), whole)


def missing_frames_are_not_convolved(backend, x, weight, **kwargs) -> None:
    """Infinite weights at taps that only ever see missing frames change nothing, forward or backward. x: one frame."""

    def run():
        leaf = x.detach().requires_grad_()
        y = ops.causal_conv3d(leaf, weight, **kwargs, backend=backend)
        return y.detach(), torch.autograd.grad(y.sum(), leaf)[0]

    expected = run()
    weight[:, :, :2] = float("inf")
    close.assert_all_bitwise(run(), expected)


def bad_pixel_stays_in_its_window(backend, device, dtype, bad: float, **kwargs) -> None:
    """Every channel of the 27 outputs that see it, nothing else; positive weights, so that infinity stays infinity."""
    m = Maker(dtype, device)
    x, weight = m.randn(1, 16, 4, 4, 5).to(memory_format=LAST), m.randn(40, 16, 3, 3, 3).abs()
    x[0, 3, 1, 2, 3] = bad
    y = ops.causal_conv3d(x, weight, **kwargs, backend=backend)
    hit = (y.isnan() if bad != bad else y.isposinf()).all(1)[0]
    assert hit[1:4, 1:4, 2:5].all() and int(hit.sum()) == 27 and int((~y.isfinite()).sum()) == 27 * 40


def gradient_alone(backend, device, dtype, alone: int) -> None:
    """Each gradient asked for alone has the bits that it has among all six."""
    m = Maker(dtype, device)
    x, cache, residual = m.randn(1, 9, 2, 3, 4), m.randn(1, 9, 1, 3, 4), m.randn(1, 20, 2, 3, 4)
    tensors = [x, m.randn(20, 9, 3, 3, 3), m.randn(20), cache, m.randn(9), residual]

    def gradients(wanted):
        t = [v.detach().requires_grad_(i in wanted) for i, v in enumerate(tensors)]
        prologue = dict(norm="channel_rms", norm_weight=t[4], act="silu")
        y = ops.causal_conv3d(*t[:3], cache=t[3], **prologue, residual=t[5], backend=backend)
        return torch.autograd.grad(y, [t[i] for i in wanted], torch.cos(y.detach()))

    close.assert_bitwise(gradients([alone])[0], gradients(range(6))[alone])


def zero_size(backend, device, shape) -> None:
    """Nothing in, nothing out; zeros for the weight."""
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(16, 8, 3, 3, 3, device=device, requires_grad=True)
    cache = torch.randn(shape[0], 8, 2, 4, 4, device=device)
    with poisoned():
        y = ops.causal_conv3d(x, weight, torch.randn(16, device=device), norm="channel_l2", backend=backend)
        c = ops.next_cache(x, cache, 3, backend=backend)
        n = ops.norm_silu(x, norm="group", weight=None, groups=4, backend=backend)
        (y.sum() + c.sum() + n.sum()).backward()
    assert y.shape == (shape[0], 16, *shape[2:]) and c.shape[2] == 2 and n.shape == shape
    assert x.grad.shape == shape and weight.grad.shape == weight.shape and not weight.grad.any()


def winograd_is_refused_and_auto_goes_direct(backend, device, dtype) -> None:
    x, weight, _ = wan(device, dtype, 1, last=True)
    for algo in ("winograd", "winograd2d"):
        with pytest.raises(NoBackend, match="has no winograd; algo='auto' takes direct"):
            ops.causal_conv3d(x, weight, algo=algo, backend=backend)
    close.assert_bitwise(*(ops.causal_conv3d(x, weight, algo=a, backend=backend) for a in ("auto", "direct")))


def offsets_beyond_32_bits(backend, dtype, algo: str = "auto") -> None:
    """Frames 2^31 elements apart: reserved memory of the CPU, of which only the frames themselves are ever touched."""
    m = Maker(dtype)
    x, weight, grad = m.randn(1, 16, 3, 2, 4), m.randn(24, 16, 3, 3, 3), m.randn(1, 24, 3, 2, 4)

    def run(apart):
        def spaced(t):
            memory = torch.empty(2 * apart + 512, dtype=dtype)
            return memory.as_strided(t.shape, (0, 1, apart, 4 * t.shape[1], t.shape[1])).copy_(t)

        leaves = [spaced(x).requires_grad_(), weight.detach().requires_grad_()]
        y = ops.causal_conv3d(*leaves, algo=algo, backend=backend)
        n = ops.norm_silu(leaves[0].detach(), weight=None, norm="group", groups=2, backend=backend)
        return y.detach(), n, *torch.autograd.grad(y, leaves, spaced(grad))

    close.assert_all_bitwise(run(2**31), run(512))
