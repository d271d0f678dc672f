"""conv's Hopper kernel (csrc/cuda/conv_hopper.cu), in the block simulator or on a card of sm_90.

What it shares with the kernels for every card is in test_conv_cuda.py, the gradient of the weight in
test_conv_weight_hopper_cuda.py.
"""

import re

import conv_laws as laws
import pytest
import torch
from conv_laws import LAST, each_format
from cuda_place import DEVICE, HERE, both, machine, on_card, pytestmark, same_bits_on_every_schedule, where  # noqa: F401

import fastdit
from fastdit import ops
from fastdit.backends.cuda import _launch, conv as adapter
from fastdit.testing import close, contract, simt
from fastdit.testing.poison import poisoned
from fastdit.testing.workloads import Maker, Sample, samples

SAMPLES = [s for s in samples("causal_conv3d") if not s.id.startswith("winograd")]
QUICK = ("wan", "direct-odd", "strided", "down-time", "pointwise", "cogvideox")  # the others are slow, or not served


@pytest.fixture(autouse=True)
def _hopper(machine):  # noqa: F811
    with on_card(90):
        yield


def _cases():
    for sample in SAMPLES:
        for dtype in (torch.bfloat16, torch.float16):
            quick = sample.id in QUICK and dtype == torch.bfloat16
            yield pytest.param(sample, dtype, id=f"{sample}-{dtype}", marks=() if quick else pytest.mark.full)


@pytest.mark.parametrize("sample, dtype", _cases())
def test_samples(sample, dtype):
    both(sample, dtype)


# ---- tiles ------------------------------------------------------------------------------------------------
class Tiles(list):
    """Of each convolution launched: None on mma.sync, else (Cout, frames, lines, columns, shared taps, tiles, blocks of
    a cluster)."""

    peers = 0  # blocks of a cluster from now on; 0: as the model picks


@pytest.fixture
def tiles(monkeypatch):
    found = Tiles()

    def launch(entry, op, x, arguments, *rest):
        if entry == "conv_forward_hopper":
            shared, taps, _, _, y = arguments
            found.append(_launch.ask("conv_hopper_tile", x, shared, taps, y, found.peers))
            arguments = (*arguments, found.peers)
        elif entry == "conv_forward":
            found.append(None)
        _launch.launch(entry, op, x, arguments, *rest)

    monkeypatch.setattr(adapter, "launch", launch)
    return found


def _video(C, Cout, kernel, size, cache=0, residual=False, last=True, batch=1, **kwargs) -> Sample:
    def make(m: Maker):
        layout = LAST if last else torch.contiguous_format
        video = lambda channels, *size: m.randn(batch, channels, *size).to(memory_format=layout)  # noqa: E731
        given = dict(kwargs, bias=m.randn(Cout))
        if cache:
            given["cache"] = video(C, cache, *size[1:])
        if residual:
            given["residual"] = video(Cout, *size)
        scale = (C * kernel[0] * kernel[1] * kernel[2]) ** -0.5
        return (video(C, *size), m.randn(Cout, C, *kernel) * scale), given

    return Sample("causal_conv3d", f"{C}-{Cout}", make)


def _spread(lines: int) -> dict:
    return dict(dilation=(1, lines, 5), padding=(0, 0, lines, lines, 5, 5))


_HALF = dict(stride=(2, 1, 1), padding=(1, 0, 0, 0, 0, 0))
# name: ((Cout, frames, lines, columns, shared taps) of the forward on a device of four processors, without clusters;
# sample)
TILES = {
    "192": ((192, 1, 1, 256, 1), _video(40, 192, (1, 1, 1), (1, 16, 60), residual=True)),
    "128-ragged": ((128, 1, 1, 256, 1), _video(40, 122, (1, 1, 1), (4, 15, 16), residual=True)),
    "96-half-a-chunk": ((96, 1, 16, 16, 3), _video(96, 96, (1, 3, 1), (4, 14, 15), residual=True)),
    "frames-of-cache-and-x": ((64, 2, 8, 8, 3), _video(40, 48, (3, 3, 3), (4, 5, 6), cache=1, residual=True)),
    "time": ((64, 2, 1, 64, 1), _video(40, 64, (3, 1, 1), (5, 6, 8), cache=2)),
    "rings": ((64, 2, 1, 64, 1), _video(160, 40, (3, 1, 1), (5, 6, 8), cache=2)),
    "many-rounds": ((96, 1, 2, 128, 3), _video(40, 40, (1, 3, 1), (1, 2, 600))),
    "dilated": ((96, 1, 32, 8, 3), _video(40, 48, (1, 3, 3), (1, 20, 29), **_spread(5))),
    "a-patch-a-tap": ((96, 1, 8, 32, 1), _video(40, 48, (1, 3, 3), (1, 20, 29), **_spread(40))),
    "ncdhw": ((64, 1, 16, 8, 3), _video(40, 48, (3, 3, 3), (2, 5, 6), cache=2, residual=True, last=False)),
    "stride-in-time": ((64, 2, 1, 64, 1), _video(40, 48, (3, 1, 1), (6, 4, 7), **_HALF)),
}  # fmt: skip


CLUSTERED = ("192", "128-ragged", "96-half-a-chunk", "time")  # every width of weights; their other paths: PEERS


@pytest.mark.parametrize(
    "name, peers",
    [
        *((name, 1) for name in TILES), *((name, 2) for name in CLUSTERED),
        *(pytest.param(name, 2, marks=pytest.mark.full) for name in TILES if name not in CLUSTERED),
    ],
)  # fmt: skip
def test_tiles(name, peers, tiles):
    """Each kernel and kind of tile, ragged in every dimension; the input's gradient takes it too."""
    expected, sample = TILES[name]
    tiles.peers = peers
    dtype = torch.float16 if name == "time" else torch.bfloat16
    contract.forward(sample, dtype, *HERE)
    assert len(tiles) == 1
    if DEVICE == "cpu" and peers == 1:
        assert tiles[0][:5] == expected
    contract.backward(sample, dtype, *HERE)
    assert None not in tiles and len(tiles) >= 3 and {tile[6] for tile in tiles} == {peers}


@pytest.mark.parametrize("peers", [1, 2])
@pytest.mark.parametrize("name", ["rings", "many-rounds", "192"])
def test_schedules(name, peers, tiles):
    """More steps than the rings hold, with a patch a tap, where only its own barrier guards it; several tiles a block,
    whose rings go on from one to the next."""
    (x, weight), kwargs = TILES[name][1].make(Maker(torch.bfloat16, DEVICE))
    tiles.peers = peers

    def run():
        with poisoned():
            return [ops.causal_conv3d(x, weight, **kwargs, backend="cuda")]

    same_bits_on_every_schedule(run)


# ---- clusters ---------------------------------------------------------------------------------------------
# name: (tiles of a plane, slabs of Cout and groups of frames in a cluster of two, sample)
PEERS = {
    "even": ((6, 1, 2), _video(40, 48, (2, 1, 3), (2, 2, 280), cache=1)),
    "odd": ((5, 1, 2), _video(40, 48, (3, 3, 1), (2, 3, 130), residual=True)),
    "one": ((1, 1, 2), _video(160, 40, (3, 1, 1), (4, 6, 8))),
    "slabs": ((5, 2, 1), _video(40, 200, (2, 1, 1), (2, 10, 60), cache=1, residual=True)),
    "samples": ((5, 1, 1), _video(40, 48, (2, 1, 1), (2, 10, 60), batch=2)),
    "repeated-frame": ((3, 1, 2), _video(40, 48, (3, 1, 1), (2, 2, 280), time_pad="first")),
    "stride-in-time": ((2, 1, 3), _video(40, 48, (3, 1, 1), (6, 4, 80), **_HALF)),
    "one-tap": ((5, 1, 1), _video(40, 96, (1, 1, 1), (1, 4, 300), residual=True)),
}  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_clusters_do_not_change_a_bit(name, tiles):
    """Of y and of the input's gradient, on every schedule. Rings go round many times; the last tile of an odd plane has
    a neighbour without a pixel; frames that a tile does not meet are other ones in other groups."""
    (x, weight), kwargs = PEERS[name][1].make(Maker(torch.bfloat16, DEVICE))

    def run(peers):
        tiles.peers = peers
        given = x.detach().requires_grad_()
        with poisoned():
            y = ops.causal_conv3d(given, weight, **kwargs, backend="cuda")
            return y, *torch.autograd.grad(y, given, torch.ones_like(y))

    expected = run(1)
    close.assert_all_bitwise(run(2), expected)
    peers = [tile[6] for tile in tiles if tile]  # a gradient that repeats frames is not wgmma's
    assert peers == sorted(peers) and 2 * sum(peers) == 3 * len(peers)
    if DEVICE == "cpu":
        cout, frames, *_, count, _ = tiles[len(tiles) // 2]
        B, channels, T = expected[0].shape[:3]
        slabs, groups = -(-channels // cout), -(-T // frames)
        assert (count // (B * slabs * groups), slabs, groups) == PEERS[name][0]
        for schedule, seed in (("lazy", 1), ("random", 1), ("random", 2)):
            with where(schedule, seed):
                close.assert_all_bitwise(run(2), expected)


@pytest.mark.skipif(DEVICE == "cuda", reason="a card has more processors")
@pytest.mark.parametrize(
    "name, peers", [("192", 2), ("many-rounds", 2), ("a-patch-a-tap", 1), ("frames-of-cache-and-x", 1)]
)
def test_who_shares_weights(name, peers, tiles):
    """Not fewer tiles than processors, nor planes of one tile."""
    (x, weight), kwargs = TILES[name][1].make(Maker(torch.bfloat16, DEVICE))
    ops.causal_conv3d(x, weight, **kwargs, backend="cuda")
    assert [tile[6] for tile in tiles] == [peers]


def test_clusters_are_of_two(tiles):
    (x, weight), kwargs = TILES["time"][1].make(Maker(torch.bfloat16, DEVICE))
    tiles.peers = 3
    with pytest.raises(ValueError, match="causal_conv3d: blocks that share weights; got 3, expected 1 or 2"):
        ops.causal_conv3d(x, weight, **kwargs, backend="cuda")


# ---- laws -------------------------------------------------------------------------------------------------
def _wan(T: int, last: bool = True):
    x, weight, kwargs = laws.wan(DEVICE, torch.bfloat16, T, last)
    return x, torch.cat([weight, weight.flip(1)]), kwargs  # 48 output channels: 24 are not served


@each_format
@pytest.mark.parametrize("chunks", [(1, 1, 2), (3, 0, 1)], ids=str)
def test_chunked_equals_whole(last, chunks):
    """In whatever tiles: chunks of one frame do not take those of the whole."""
    x, weight, kwargs = _wan(4, last)
    laws.chunked_equals_whole("cuda", x, weight, chunks, **kwargs)


def test_missing_frames_are_not_convolved():
    x, weight, kwargs = _wan(1)
    laws.missing_frames_are_not_convolved("cuda", x, weight, **kwargs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_pixel_stays_in_its_window(bad):
    laws.bad_pixel_stays_in_its_window(*HERE, torch.bfloat16, bad)


# ---- what it serves ---------------------------------------------------------------------------------------
REFUSED = {
    "needs sm_90": {},
    "16-bit": dict(dtype=torch.float32),
    "33 to 8192": dict(Cout=32),
    "no stride": dict(stride=(1, 2, 2)),
    "pads with zeros": dict(space_pad="replicate"),
    "pixels are all there": dict(expand=True),
    "": dict(space_pad="reflect", padding=(2, 0, 0, 0, 0, 0)),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_wgmma_serves(reason, tiles):
    """Everything else is left to mma.sync, and `explain` says why."""
    kwargs = dict(REFUSED[reason])
    m = Maker(kwargs.pop("dtype", torch.bfloat16), DEVICE)
    weight = m.randn(kwargs.pop("Cout", 40), 16, 3, 3, 3)
    x = m.randn(1, 16, 2, 6, 6).to(memory_format=LAST)
    if kwargs.pop("expand", False):
        x = x[:, :, :1].expand(-1, -1, 2, -1, -1)
    with simt.as_card(80 if reason == "needs sm_90" else 90):
        ops.causal_conv3d(x, weight, **kwargs, backend="cuda")
        said = fastdit.explain("causal_conv3d", x, weight, **kwargs, backend="cuda")
    assert (tiles == [None]) == bool(reason)
    assert re.search(f"mma.sync: wgmma.*{reason}" if reason else "forward on wgmma", said)


@pytest.mark.skipif(DEVICE == "cuda", reason="counts what the simulator is asked")
def test_the_module_is_asked_once(monkeypatch):
    """Whether it has kernels of sm_90a; it stays what it is."""
    asked, simulator = [], _launch.simulator
    monkeypatch.setattr(_launch, "simulator", lambda entry, *rest: asked.append(entry) or simulator(entry, *rest))
    _launch.hopper_built.cache_clear()
    (x, weight), kwargs = TILES["time"][1].make(Maker(torch.bfloat16, DEVICE))
    for _ in range(3):
        ops.causal_conv3d(x, weight, **kwargs, backend="cuda")
    assert asked.count("hopper_built") == 1 and asked.count("conv_forward_hopper") == 3
