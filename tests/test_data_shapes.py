"""data.shapes: what is drawn, where it goes, and which clips there are."""

import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastdit.data import Scene, Shapes, collate, render, shapes
from fastdit.data.clip import ATTRIBUTES
from fastdit.testing import close

RIGHT = Scene("red", "circle", "right", "small", "blue")
SIZES = [(17, 64, 64), (5, 16, 16), (1, 33, 47), (81, 64, 48), (2, 128, 64), (9, 31, 200)]


def covered(frames: torch.Tensor, scene: Scene) -> np.ndarray:
    """The coverage of each pixel, read back from its colour: (T, H, W)."""
    front, back = (np.array(shapes.COLOURS[c], float) for c in (scene.colour, scene.background))
    return (frames.numpy() - back) @ (front - back) / np.square(front - back).sum()


def centres(frames: torch.Tensor, scene: Scene) -> np.ndarray:
    mass = covered(frames, scene)
    y, x = (np.arange(n) + 0.5 for n in mass.shape[1:])
    return np.stack([mass.sum(1) @ x, mass.sum(2) @ y], 1) / mass.sum((1, 2))[:, None]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("motion", shapes.MOTIONS)
def test_the_whole_path_is_inside(size, shape, motion):
    for zoom in shapes.SIZES:
        for x, y in ((0, 0), (1, 1), (0.3, 0.8)):
            scene = Scene("white", shape, motion, zoom, "black", x, y, speed=9.0)
            frames = render(scene, size[1:], size[0])
            assert frames.shape == (*size, 3) and frames.dtype == torch.uint8
            border = torch.cat([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], 1)
            close.assert_bitwise(border, torch.tensor(shapes.COLOURS["black"], dtype=torch.uint8).expand_as(border))
            assert frames.max() == shapes.COLOURS["white"][0]


AREAS = {  # in squared radii
    "circle": np.pi,
    "square": 4 * 0.89**2,
    "triangle": 0.75 * 3**0.5 * 1.25**2,
    "star": 5 * 1.2 * 0.54 * np.sin(np.pi / 5),
}


@pytest.mark.parametrize("shape", shapes.SHAPES)
@pytest.mark.parametrize("zoom", shapes.SIZES)
def test_area_and_centre_are_those_of_the_geometry(shape, zoom):
    scene = Scene("white", shape, "left", zoom, "black", 0.4, 0.7)
    frames = render(scene, (96, 96), 9)
    radius = shapes.RADII[zoom] * 96
    found = covered(frames, scene).sum((1, 2)) / radius**2
    assert np.abs(found / AREAS[shape] - 1).max() < 0.02
    assert np.abs(centres(frames, scene) - shapes.centres(scene, (96, 96), 9)).max() < 0.1  # pixels


def test_edges_are_soft_and_the_inside_is_flat():
    alpha = covered(render(replace(RIGHT, y=0.31), frames=1), RIGHT)
    levels = np.unique(alpha.round(2))
    assert len(levels) > 10 and (alpha > 0.99).sum() > 150


def test_small_and_big_differ_clearly():
    areas = [covered(render(replace(RIGHT, size=size)), RIGHT).sum() for size in shapes.SIZES]
    assert areas[1] > 2.5 * areas[0]


@pytest.mark.parametrize("motion", shapes.MOTIONS)
@pytest.mark.parametrize("size", [(17, 64, 64), (33, 64, 64), (9, 128, 64)], ids=str)
@pytest.mark.parametrize("zoom", shapes.SIZES)
def test_motion_is_straight_even_and_long(motion, size, zoom):
    scene = replace(RIGHT, motion=motion, size=zoom, x=0.2, y=0.6)
    path = centres(render(scene, size[1:], size[0]), scene)
    moved = (path[-1] - path[0]) / (size[2], size[1])
    axis = np.abs(moved).argmax()
    if motion == "still":
        assert np.abs(path - path[0]).max() < 1e-9
        return
    assert np.sign(moved[axis]) == sum(shapes.STEPS[motion]) and shapes.STEPS[motion][axis] != 0
    assert np.ptp(path[:, 1 - axis]) < 0.05
    steps = np.diff(path[:, axis])
    assert np.abs(steps - steps.mean()).max() < 0.15  # pixels
    wanted = 2 * (size[0] - 1) / 64
    room = 1 - (2 * 1.25 * shapes.RADII[zoom] * 64 + 4) / size[2 - axis]
    assert abs(moved[axis]) > 0.95 * min(wanted, room)


def test_speed_is_pixels_per_frame():
    path = shapes.centres(replace(RIGHT, speed=1.75), (64, 64), 9)
    np.testing.assert_allclose(np.diff(path[:, 0]), 1.75)
    path = shapes.centres(replace(RIGHT, speed=1.75), (64, 128), 9)
    np.testing.assert_allclose(np.diff(path[:, 0]), 3.5)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"colour": "pink"}, "unknown colour; got 'pink'"),
        ({"motion": "sideways"}, "unknown motion"),
        ({"colour": "blue"}, "cannot be seen on blue"),
        ({"x": 1.2}, "parts of the room"),
        ({"speed": float("nan")}, "expected a positive number"),
    ],
)
def test_bad_scenes(change, match):
    with pytest.raises(ValueError, match=match):
        replace(RIGHT, **change)


@pytest.mark.parametrize("size, frames", [((8, 64), 17), ((64, 64), 0), ((64, 64.5), 1)])
def test_bad_sizes(size, frames):
    with pytest.raises(ValueError, match=r"render: a clip is \(frames, height, width\)"):
        render(RIGHT, size, frames)


def test_splits_are_disjoint_and_cover_everything():
    train, held, every = (set(shapes.combinations(split)) for split in ("train", "held_out", "all"))
    assert not train & held and train | held == every and len(every) == 8 * 7 * 4 * 5
    assert 0.08 < len(held) / len(every) < 0.12
    for split in (train, held):  # every value is seen in training, and asked for in the test
        assert [len({c[k] for c in split}) for k in range(4)] == [8, 4, 5, 8]


def test_items_are_of_their_split():
    for split in ("train", "held_out"):
        among = set(shapes.combinations(split))
        scenes = [Shapes(split, length=300).scene(i) for i in range(300)]
        assert all((s.colour, s.shape, s.motion, s.background) in among for s in scenes)
        assert {s.size for s in scenes} == set(ATTRIBUTES["size"])
    for name in ("x", "y"):
        values = [getattr(s, name) for s in scenes]
        assert min(values) < 0.05 and max(values) > 0.95


def _fingerprint(queue):
    data = Shapes("held_out", sizes=((5, 32, 32), (1, 48, 32)), length=50, seed=7)
    queue.put(([(data[i].caption, int(data[i].frames.sum())) for i in range(50)], shapes.combinations("held_out")))


def test_the_same_in_every_process():
    context = multiprocessing.get_context("spawn")  # other hash seed, nothing inherited
    queue = context.Queue()
    process = context.Process(target=_fingerprint, args=(queue,))
    process.start()
    other = queue.get(timeout=120)
    process.join()
    _fingerprint(queue)
    assert queue.get(timeout=10) == other


def test_pinned():
    # A change here changes what a trained checkpoint was tested on.
    assert shapes.combinations("held_out")[:2] == PINNED
    assert Shapes("held_out", seed=1).scene(5) == PINNED_SCENE


PINNED = (("red", "circle", "left", "orange"), ("red", "circle", "left", "black"))
PINNED_SCENE = Scene(
    "white", "triangle", "up", "small", "black", 0.9180019172771402, 0.8694779080569397, 1.9316896517060076
)


@pytest.mark.parametrize("split, share", [("train", 0.7), ("held_out", 0.5)])
def test_training_shows_more_small_shapes(split, share):
    """What is judged is drawn evenly."""
    data = Shapes(split, length=2000)
    assert sum(data.scene(i).size == "small" for i in range(2000)) / 2000 == pytest.approx(share, abs=0.04)


def test_items_depend_on_seed_and_index_alone():
    data, longer = Shapes(length=10, seed=3), Shapes(length=1000, seed=3)
    close.assert_bitwise(data[4].frames, longer[4].frames)
    assert data[4].caption == longer[4].caption and data[-6].caption == data[4].caption
    assert data.scene(4) != Shapes(seed=4).scene(4) and data.scene(4) != data.scene(5)
    with pytest.raises(IndexError, match="no clip 10"):
        data[10]
    assert len(list(data)) == 10


def test_pictures_tell_motion_half_of_the_time():
    told = ["moving" in c.caption or "standing" in c.caption for c in Shapes(sizes=((1, 16, 16),), length=200)]
    assert 0.35 < sum(told) / 200 < 0.65


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(workers):
    data = Shapes(length=12, sizes=((5, 32, 32),))
    batches = list(DataLoader(data, batch_size=4, num_workers=workers, collate_fn=collate))
    assert [b[0].shape for b in batches] == [(4, 3, 5, 32, 32)] * 3
    assert [c for b in batches for c in b[1]] == [data[i].caption for i in range(12)]


def test_mixed_sizes_stay_apart():
    sizes = ((5, 32, 32), (1, 32, 48), (9, 48, 32))
    videos, _ = collate([Shapes(length=20, sizes=sizes)[i] for i in range(20)])
    assert isinstance(videos, list) and {tuple(v.shape[1:]) for v in videos} == set(sizes)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"split": "test"}, "unknown split"),
        ({"sizes": ()}, "no sizes"),
        ({"sizes": ((0, 64, 64),)}, "at least one frame"),
        ({"length": 0}, "length >= 1"),
        ({"seed": -1}, "seed >= 0"),
    ],
)
def test_bad_settings(arguments, match):
    with pytest.raises(ValueError, match=match):
        Shapes(**arguments)
