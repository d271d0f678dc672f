"""data.folder: which clips a folder gives, their captions, and what is said of files that are no good."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastdit.data import Scene, VideoFolder, collate, detect, folder, render, write
from fastdit.data.detect import describe
from fastdit.data.media import BrokenMedia
from fastdit.testing import close

pytest.importorskip("av")
pytest.importorskip("PIL")

SCENE = Scene("red", "circle", "right", "big", "white")


def fill(path, **captions):
    """a.mp4 (17 frames), b.mp4 (36 frames: two clips), sub/c.png, d.gif (17 frames, portrait), and notes to ignore."""
    write(path / "a.mp4", render(SCENE), 8)
    write(path / "b.mp4", render(SCENE, (48, 96), 72), 16)
    write(path / "sub" / "c.png", render(SCENE, (100, 80), 1))
    write(path / "d.gif", render(SCENE, (96, 48), 17), 8)
    (path / "notes.md").write_text("not a clip")
    (path / "._a.mp4").write_bytes(b"what some systems leave behind")
    texts = {"a.mp4": "one", "b.mp4": "two", "sub/c.png": "three", "d.gif": "four", **captions}
    for name, text in texts.items():
        if text is not None:
            (path / name).with_suffix(".txt").write_text(text)
    return path


def test_clips_of_a_folder(tmp_path):
    data = VideoFolder(fill(tmp_path), size=(32, 32), frames=17, fps=8)
    assert [(c.caption, c.size) for c in data] == [
        ("one", (17, 32, 32)),
        ("two", (17, 32, 32)),
        ("two", (17, 32, 32)),
        ("four", (17, 32, 32)),
        ("three", (1, 32, 32)),
    ]
    assert data.skipped == 0 and data[-1].caption == "three" and data[0].fps == 8
    found = detect(data[0].frames)
    assert (found.colour, found.shape, found.motion, found.background) == ("red", "circle", "right", "white")
    close.assert_bitwise(data[2].frames, data[2].frames)
    assert not torch.equal(data[1].frames, data[2].frames)  # the second clip of b goes on where the first ends
    with pytest.raises(IndexError, match="no clip 5"):
        data[5]


def test_clips_follow_one_another(tmp_path):
    write(tmp_path / "a.gif", render(SCENE, (32, 32), 20), 10)
    (tmp_path / "a.txt").write_text("red")
    data = VideoFolder(tmp_path, size=(32, 32), frames=5, fps=10)
    assert len(data) == 4
    close.assert_bitwise(torch.cat([c.frames for c in data]), render(SCENE, (32, 32), 20))


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loader(tmp_path, workers):
    data = VideoFolder(fill(tmp_path), size=(32, 48), frames=9, fps=8)
    loader = DataLoader(data, batch_size=3, num_workers=workers, collate_fn=collate)
    batches = list(loader)
    assert [c for b in batches for c in b[1]] == [c.caption for c in data]
    assert batches[0][0].shape == (3, 3, 9, 32, 48)


@pytest.mark.parametrize("shape", [(30, 90), (90, 30), (45, 45), (17, 3)])
def test_fit_covers_and_keeps_the_middle(shape):
    h, w = shape
    picture = np.zeros((h, w, 3), np.uint8)
    picture[..., 0] = np.linspace(0, 255, w)
    picture[..., 1] = np.linspace(0, 255, h)[:, None]
    small = folder.fit(picture, (12, 24)).astype(float)
    assert small.shape == (12, 24, 3)
    centre = small[5:7, 11:13].mean((0, 1))
    assert abs(centre[0] - 127.5) < 12 and abs(centre[1] - 127.5) < 12
    scale = min(h / 12, w / 24)  # what is cut off is the same on both sides
    across = np.ptp(small[..., 0]) / (255 * scale * 24 / w)
    assert 0.8 < across < 1.05


# Captions -----------------------------------------------------------------------------------------------------------


def test_captions_in_tables(tmp_path):
    none = {"a.mp4": None, "b.mp4": None, "sub/c.png": None, "d.gif": None}
    fill(tmp_path, **none)
    rows = 'file,caption,licence\na.mp4,"one, with a comma\nand a new line",x\n./b.mp4,two,x\nsub/c.png,three,x\n'
    (tmp_path / "captions.csv").write_text(rows, encoding="utf-8-sig")
    (tmp_path / "captions.jsonl").write_text(json.dumps({"file": "d.gif", "caption": "vier · 四"}) + "\n\n")
    data = VideoFolder(tmp_path, size=(16, 16))
    assert {p.name: c for p, c in data.captions.items()} == {
        "a.mp4": "one, with a comma and a new line",
        "b.mp4": "two",
        "c.png": "three",
        "d.gif": "vier · 四",
    }
    (tmp_path / "a.txt").write_text("its own")
    assert VideoFolder(tmp_path, size=(16, 16))[0].caption == "its own"


@pytest.mark.parametrize("text", [None, "", " \n"])
def test_missing_caption(tmp_path, text):
    fill(tmp_path, **{"sub/c.png": text})
    with pytest.raises(
        FileNotFoundError, match=r"1 of 4 files in .* have no caption; got none for sub/c\.png; expected"
    ):
        VideoFolder(tmp_path)


def test_a_captioner_tells_what_is_missing(tmp_path):
    fill(tmp_path, **{"a.mp4": None})
    data = VideoFolder(tmp_path, captioner=describe)
    assert data[1].caption == "two"
    assert all(word in data[0].caption.split() for word in ("red", "circle", "white"))


@pytest.mark.parametrize(
    "name, text, match",
    [
        ("captions.csv", "name,text\na.mp4,one\n", r"captions\.csv, line 2: a row has a file and a caption"),
        ("captions.csv", "file,caption\na.mp4\n", r"captions\.csv, line 2"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": "one"}\nnonsense\n', r"captions\.jsonl, line 2: no JSON"),
        ("captions.jsonl", "[1]\n", r"captions\.jsonl, line 1: a row has"),
        ("captions.jsonl", '{"file": "a.mp4", "caption": 3}\n', r"captions\.jsonl, line 1: a row has"),
    ],
)
def test_bad_tables(tmp_path, name, text, match):
    (fill(tmp_path) / name).write_text(text)
    with pytest.raises(ValueError, match=match):
        VideoFolder(tmp_path)


def test_caption_in_another_encoding(tmp_path):
    (fill(tmp_path) / "a.txt").write_bytes("größer".encode("latin-1"))
    with pytest.raises(ValueError, match=r"a\.txt: a caption is UTF-8 text"):
        VideoFolder(tmp_path)


# Files that are no good ---------------------------------------------------------------------------------------------


def break_some(path):
    """A video without its index, an image that is cut off, a video that is too short."""
    (path / "x.mp4").write_bytes((path / "a.mp4").read_bytes()[:900])
    (path / "y.png").write_bytes((path / "sub" / "c.png").read_bytes()[:200])
    write(path / "z.mp4", render(SCENE, frames=5), 8)
    for name in "xyz":
        (path / f"{name}.txt").write_text(name)


@pytest.mark.parametrize("name", ["x.mp4", "y.png", "z.mp4"])
def test_bad_file_is_named(tmp_path, name):
    break_some(fill(tmp_path))
    for other in {"x.mp4", "y.png", "z.mp4"} - {name}:
        (tmp_path / other).unlink()
    with pytest.raises(BrokenMedia, match=rf"{name}: (cannot be decoded|lasts 0\.62 seconds)"):
        list(VideoFolder(tmp_path))


def test_bad_files_are_left_out_and_counted(tmp_path):
    break_some(fill(tmp_path))
    with pytest.warns(UserWarning, match="left out: .*[xyz]"):
        data = VideoFolder(tmp_path, on_error="skip")
        assert {c.caption for c in data} == {"one", "two", "three", "four"} and data.skipped == 3


@pytest.mark.filterwarnings("ignore:VideoFolder. left out")
def test_workers_count_together(tmp_path):
    fill(tmp_path)
    data = VideoFolder(tmp_path, size=(16, 16), on_error="skip")
    (tmp_path / "a.mp4").write_bytes(b"broken since")
    (tmp_path / "d.gif").write_bytes(b"broken since")
    loader = DataLoader(data, batch_size=1, num_workers=2, collate_fn=collate)
    captions = [b[1][0] for b in loader]
    assert captions == ["two", "two", "two", "three", "three"] and data.skipped == 2


def test_nothing_that_can_be_used(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"broken")
    (tmp_path / "a.txt").write_text("a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(BrokenMedia, match="none of the 1 files"):
            VideoFolder(tmp_path, on_error="skip")


def test_empty_and_missing_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no videos or images"):
        VideoFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        VideoFolder(tmp_path / "none")


@pytest.mark.parametrize("settings", [{"frames": 0}, {"fps": 0.0}, {"size": (0, 64)}, {"on_error": "hope"}])
def test_bad_settings(tmp_path, settings):
    with pytest.raises(ValueError, match=r"expected (positive numbers|'raise' or 'skip')"):
        VideoFolder(fill(tmp_path), **settings)
