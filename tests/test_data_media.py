"""data.media: what is written is read back, at any rate and size; broken files and full disks say so."""

import os
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch

from fastdit.data import Scene, media, read, render, to_frames, to_video, write
from fastdit.testing import close

av = pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

SCENE = Scene("white", "star", "right", "small", "black")
SIZES = [(17, 64, 64), (5, 33, 47), (1, 32, 33), (33, 48, 16)]


def psnr(a, b):
    return 10 * torch.log10(255**2 / (a.float() - b.float()).square().mean().clamp(min=1e-9)).item()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_mp4_round_trip(tmp_path, size):
    frames = render(SCENE, size[1:], size[0])
    write(tmp_path / "clip.mp4", frames, 8)
    clip = read(tmp_path / "clip.mp4")
    t, h, w = size
    assert clip.size == (t, h + h % 2, w + w % 2) and clip.fps == pytest.approx(8)
    assert psnr(clip.frames[:, :h, :w], frames) > 38
    assert media.duration(tmp_path / "clip.mp4") == pytest.approx(t / 8)
    if h % 2:
        assert psnr(clip.frames[:, h], clip.frames[:, h - 1]) > 30


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("motion", ["down", "still"])
def test_gif_round_trip(tmp_path, size, motion):
    frames = render(replace(SCENE, motion=motion, colour="red"), size[1:], size[0])
    write(tmp_path / "clip.gif", frames, 8)
    clip = read(tmp_path / "clip.gif", fps=8)  # GIF joins equal frames: the times tell how many there were
    if size[0] > 1:
        close.assert_bitwise(clip.frames, frames)
    else:
        close.assert_bitwise(clip.frames[:1], frames)


@pytest.mark.parametrize("fps", [8, 12.5, 24, 29.97, 30])
def test_rates_survive(tmp_path, fps):
    frames = render(SCENE, (32, 32), 33)
    for name in ("a.mp4", "a.gif"):
        write(tmp_path / name, frames, fps)
        clip = read(tmp_path / name)
        assert clip.fps == pytest.approx(fps, rel=0.01) and clip.size[0] == 33
        again = read(tmp_path / name, fps=fps)
        assert again.size[0] in (33, 34) and psnr(again.frames[:33], frames) > 38


def test_png_round_trip(tmp_path):
    frames = render(SCENE, (33, 47), 1)
    write(tmp_path / "deep" / "er" / "a.PNG", frames)
    clip = read(tmp_path / "deep" / "er" / "a.PNG")
    close.assert_bitwise(clip.frames, frames)
    assert clip.fps == 1.0 and os.listdir(tmp_path / "deep" / "er") == ["a.PNG"]


@pytest.mark.parametrize("name", ["a.mp4", "a.gif"])
def test_chunks_are_the_whole(tmp_path, name):
    frames = render(SCENE, (32, 32), 17)
    write(tmp_path / name, frames)
    whole = (tmp_path / name).read_bytes()
    write(tmp_path / name, iter(frames.split(5)))
    assert (tmp_path / name).read_bytes() == whole


def test_layouts_round_trip():
    frames = torch.randint(0, 256, (3, 5, 7, 3), dtype=torch.uint8)
    video = to_video(frames)
    assert video.shape == (3, 3, 5, 7) and video.dtype == torch.float32 and video.is_contiguous()
    assert video.min() >= -1 and video.max() <= 1
    close.assert_bitwise(video[1, 2, 3, 4], frames[2, 3, 4, 1].float() / 127.5 - 1)
    for dtype in (torch.float32, torch.float64):
        close.assert_bitwise(to_frames(video.to(dtype)), frames)
    close.assert_bitwise(to_frames(video * 9)[frames == 255], torch.full_like(frames[frames == 255], 255))


# Files of the world -------------------------------------------------------------------------------------------------


def vary(path, times, size=(32, 32), codec="libx264"):
    """A video whose frame k is grey 10 + 5 k from times[k] (seconds) on."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec if codec in av.codecs_available else "mpeg4", rate=30)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for k, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((*size, 3), 10 + 5 * k, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_variable_frame_rate(tmp_path):
    times = [0, 0.04, 0.08, 0.5, 0.55, 1.2, 1.25, 1.3, 2.0, 2.1]
    vary(tmp_path / "a.mp4", times)
    clip = read(tmp_path / "a.mp4", fps=10)
    shown = ((clip.frames.float().mean((1, 2, 3)) - 10) / 5).round().int().tolist()
    expected = [sum(t <= k / 10 + 1e-6 for t in times) - 1 for k in range(22)]
    assert shown[:22] == expected


@pytest.mark.parametrize("start", [0.0, 1.0, 2.3])
def test_starting_later_shows_the_same(tmp_path, start):
    write(tmp_path / "a.mp4", render(SCENE, (32, 32), 65), 16)
    later = list(media.at_rate(media.decode(tmp_path / "a.mp4", start), 8, start))
    close.assert_bitwise(torch.from_numpy(np.stack(later)), read(tmp_path / "a.mp4").frames[int(start * 16) :: 2])


def test_turned_by_the_camera(tmp_path):
    picture = np.zeros((32, 64, 3), np.uint8)
    picture[:16, :32] = 250  # top left, as the sensor sees it
    write(tmp_path / "a.mp4", torch.from_numpy(picture)[None].repeat(3, 1, 1, 1))
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and ids, layer and volume
    assert data[at : at + 4] == (1 << 16).to_bytes(4, "big")
    turned = [0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30]  # by 90 degrees, clockwise
    data[at : at + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in turned)
    (tmp_path / "a.mp4").write_bytes(data)
    frames = read(tmp_path / "a.mp4").frames
    assert frames.shape[1:3] == (64, 32)
    assert frames[0, :32, 16:].float().mean() > 230 and frames[0, :32, :16].float().mean() < 20


def test_pixels_that_are_not_square(tmp_path):
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(2, 1)
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 99, np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert read(tmp_path / "a.mkv").size == (1, 32, 64)


def test_transparent_grey_and_turned_images(tmp_path):
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, :3] = (200, 10, 20, 255)
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    frames = read(tmp_path / "alpha.png").frames
    assert frames[0, 0, 0].tolist() == [200, 10, 20] and frames[0, 0, 5].tolist() == [255, 255, 255]
    Image.fromarray(rgba).convert("P").save(tmp_path / "palette.png", transparency=0)
    assert read(tmp_path / "palette.png").size == (1, 4, 6)
    grey = np.full((4, 6), 77, np.uint8)
    Image.fromarray(grey).save(tmp_path / "grey.jpg")
    assert read(tmp_path / "grey.jpg").frames[0, 0, 0].tolist() == [77, 77, 77]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "deep.png")
    assert read(tmp_path / "deep.png").frames[0, 0, 0].tolist() == [77, 77, 77]
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "print.jpg")
    assert read(tmp_path / "print.jpg").size == (1, 4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(grey).save(tmp_path / "turned.jpg", exif=exif)
    assert read(tmp_path / "turned.jpg").size == (1, 6, 4)


# Broken files, full disks -------------------------------------------------------------------------------------------


def test_broken_files(tmp_path):
    write(tmp_path / "a.mp4", render(SCENE, (64, 64), 33))
    write(tmp_path / "a.gif", render(SCENE, (64, 64), 33))
    write(tmp_path / "a.png", render(SCENE, (64, 64), 1))
    for name in ("a.mp4", "a.gif", "a.png"):
        whole = (tmp_path / name).read_bytes()
        for part in (b"", b"no picture at all", whole[: len(whole) // 2]):
            (tmp_path / name).write_bytes(part)
            with pytest.raises(media.BrokenMedia, match=rf"{name}: .*; replace the file"):
                read(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no such file"):
        read(tmp_path / "none.mp4")


@pytest.mark.parametrize("suffix, codec", [(".mkv", "mpeg4"), (".avi", "mpeg4"), (".webm", "libvpx")])
def test_cut_off_files(tmp_path, suffix, codec):
    """These formats open without their end; what is missing shows when it is read."""
    path = tmp_path / f"a{suffix}"
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        for picture in torch.randint(0, 256, (40, 64, 64, 3), dtype=torch.uint8).numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    whole = path.read_bytes()
    assert read(path).size == (40, 64, 64)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(media.BrokenMedia, match=r"is cut off after|is damaged|cannot be decoded"):
        read(path)


def test_sound_only(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(media.BrokenMedia, match="has no video stream"):
        read(tmp_path / "a.mp4")


SMALL_DISK = """
import resource, signal, sys
from pathlib import Path
import torch
from fastdit.data import write
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for path in sys.argv[1:]:
    try:
        write(path, torch.randint(0, 256, (9, 64, 64, 3), dtype=torch.uint8))
    except OSError as error:
        print(error)
"""


def test_no_room_on_the_disk(tmp_path):
    pytest.importorskip("resource")
    paths = [tmp_path / "a.mp4", tmp_path / "a.gif"]
    for path in paths:
        write(path, render(SCENE, (32, 32), 1))
    before = [path.read_bytes() for path in paths]
    run = [sys.executable, "-c", SMALL_DISK, *map(str, paths)]
    told = subprocess.run(run, capture_output=True, text=True, check=True).stdout
    for path, old in zip(paths, before, strict=True):
        assert f"{path.name} cannot be saved: File too large; the file that was there is as it was" in told
        assert path.read_bytes() == old
    assert sorted(os.listdir(tmp_path)) == ["a.gif", "a.mp4"]


def test_folders_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "a.png").mkdir()
    for path in (tmp_path / "file" / "a.png", tmp_path / "a.png"):
        with pytest.raises(OSError, match=r"a\.png cannot be saved: (Not a directory|File exists|Is a directory)"):
            write(path, FRAMES[:1])
    assert sorted(os.listdir(tmp_path)) == ["a.png", "file"]


def test_nothing_is_left_behind(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("good")
    with pytest.raises(KeyboardInterrupt), media.atomic(path) as part:
        part.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "good" and os.listdir(tmp_path) == ["a.json"]
    with media.atomic(path) as part:
        part.write_text("better")
        assert path.read_text() == "good"
    assert path.read_text() == "better" and os.listdir(tmp_path) == ["a.json"]


FRAMES = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda d: write(d / "a.webm", FRAMES), "unknown suffix; got 'a.webm'"),
        (lambda d: write(d / "a.mp4", FRAMES, fps=0), "frames per second; got 0"),
        (lambda d: write(d / "a.gif", FRAMES, fps=60), "50 frames a second at most"),
        (lambda d: write(d / "a.png", FRAMES), "a PNG holds one frame; got more"),
        (lambda d: write(d / "a.mp4", []), "no frames"),
        (lambda d: write(d / "a.mp4", [FRAMES, FRAMES[:, :2]]), r"differ in size; got \[2, 4\]"),
        (lambda d: write(d / "a.mp4", FRAMES[..., :1]), r"frames are \(T, H, W, 3\).*got \[2, 4, 4, 1\]"),
        (lambda d: write(d / "a.mp4", FRAMES[:0]), r"T, H, W >= 1; got \[0, 4, 4, 3\]"),
        (lambda d: to_frames(torch.full((3, 1, 2, 2), float("nan"))), "NaN or infinite"),
        (lambda d: to_frames(torch.zeros(1, 3, 1, 2, 2)), r"a video is \(3, T, H, W\)"),
    ],
)
def test_bad_arguments(tmp_path, call, match):
    with pytest.raises(ValueError, match=match):
        call(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "call, match",
    [
        (lambda: to_video(FRAMES.float()), "frames are bytes; got torch.float32"),
        (lambda: to_frames(FRAMES), "a video is floating; got torch.uint8"),
    ],
)
def test_bad_types(call, match):
    with pytest.raises(TypeError, match=match):
        call()


def test_missing_packages_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r"av is missing.*fastdit\[video\]"):
        write(tmp_path / "a.mp4", FRAMES)
