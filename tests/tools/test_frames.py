"""tools/frames.py: rates, folders that are whole or absent, broken videos, going on."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
from PIL import Image

import clips
from tools import frames
from tools.frames import SETTINGS, at_rate, main

ROOT = Path(__file__).parents[2]


def write_video(path, count=12, rate=10, size=(64, 48)):
    """Frame n is plain, of brightness 20 n."""
    av = pytest.importorskip("av")
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for n in range(count):
            array = np.full((size[1], size[0], 3), 20 * min(n, 12), np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def shades(folder) -> list[int]:
    """Which frames of `write_video`'s lie in a folder."""
    pictures = [Image.open(f"{folder}/{name}") for name in sorted(os.listdir(folder))]
    return [round(np.asarray(picture).mean() / 20) for picture in pictures]


def run(*words) -> int:
    return main([*map(str, words), "--workers", "1"])


# rates


def test_at_rate__takes_the_last_frame_that_has_begun():
    times = [(0.1 * n + 5, n) for n in range(10)]  # 10 a second, from second 5 on
    assert list(at_rate(times, None)) == list(range(10))
    assert list(at_rate(times, 10)) == list(range(10))
    assert list(at_rate(times, 5)) == [0, 2, 4, 6, 8]
    assert list(at_rate(times, 20)) == [n for n in range(10) for _ in range(2)]
    for fps in (3, 7, 24):
        naive = []
        while len(naive) / fps < 1 - 1e-6:  # the tenth frame ends at second 6
            naive.append(int(len(naive) / fps / 0.1 + 1e-6))
        assert list(at_rate(times, fps)) == naive
    uneven = [(0.0, "a"), (0.5, "b"), (0.6, "c")]
    assert list(at_rate(uneven, 10)) == ["a"] * 5 + ["b", "c"]
    assert list(at_rate([(3.0, "alone")], 25)) == ["alone"] and list(at_rate([], 25)) == []


# folders


def test_main__makes_the_layout_of_clips(tmp_path, capsys):
    write_video(tmp_path / "videos/a/x.mp4")
    write_video(tmp_path / "videos/b/deep/y.mkv", 6, size=(48, 96))
    out = tmp_path / "data/train"
    assert run(tmp_path / "videos", out, "--short-side", 32) == 0
    assert "2 clips written, 0 videos" in capsys.readouterr().out
    files = clips.scan(str(tmp_path / "data"), "train")
    assert [files.name(i) for i in range(2)] == ["a/x", "b/deep/y"]
    assert files.labels.tolist() == [0, 1]
    assert shades(out / "a/x") == list(range(12)) and shades(out / "b/deep/y") == list(range(6))
    assert sorted(os.listdir(out / "a/x"))[0] == "000001.jpg"
    assert Image.open(out / "a/x/000001.jpg").size == (43, 32)
    assert Image.open(out / "b/deep/y/000001.jpg").size == (32, 64)
    assert run(tmp_path / "videos", tmp_path / "slow", "--fps", 5) == 0
    assert shades(tmp_path / "slow/a/x") == [0, 2, 4, 6, 8, 10]
    first = Image.open(tmp_path / "slow/a/x/000001.jpg")
    assert first.size == (64, 48)  # never enlarged
    assert run(tmp_path / "videos", tmp_path / "coarse", "--quality", 30) == 0
    coarse = Image.open(tmp_path / "coarse/a/x/000001.jpg")
    assert max(coarse.quantization[0]) > 3 * max(first.quantization[0])  # 90, if not said


def test_main__goes_on_where_it_was_interrupted(tmp_path, capsys):
    for name in "abc":
        write_video(tmp_path / f"videos/{name}.mp4", 4)
    out = tmp_path / "out"
    assert run(tmp_path / "videos", out) == 0
    first = os.stat(out / "a/000001.jpg").st_mtime_ns
    for name in os.listdir(out / "b"):  # as a kill leaves it: hidden, in part
        os.makedirs(out / ".b.part", exist_ok=True)
        os.rename(out / "b" / name, out / ".b.part" / f"9{name}")
    os.rmdir(out / "b")
    capsys.readouterr()
    assert run(tmp_path / "videos", out) == 0
    assert "3 videos, 2 done before" in capsys.readouterr().out
    assert shades(out / "b") == [0, 1, 2, 3] and not (out / ".b.part").exists()
    assert os.stat(out / "a/000001.jpg").st_mtime_ns == first
    (out / SETTINGS).rename(out / f"{SETTINGS}.part")  # a kill at the very start
    for name in "abc":
        os.rename(out / name, tmp_path / name)
    assert run(tmp_path / "videos", out) == 0 and shades(out / "a") == [0, 1, 2, 3]
    capsys.readouterr()
    assert run(tmp_path / "videos", out, "--fps", 3) == 2
    assert "was begun with" in capsys.readouterr().err


@pytest.mark.slow
def test_main__processes_are_stopped_and_go_on(tmp_path):
    """Ctrl-C amid two processes: one line, status 130; what is there is whole; the same again."""
    names = [f"{i:02}" for i in range(40)]  # so many that the signal comes before the last
    write_video(tmp_path / "videos/00.mp4", 60, size=(320, 240))
    for name in names[1:]:
        shutil.copy(tmp_path / "videos/00.mp4", tmp_path / f"videos/{name}.mp4")
    line = [sys.executable, "-m", "tools.frames", tmp_path / "videos", tmp_path / "out"]
    line = [*map(str, line), "--workers", "2"]
    options = dict(cwd=ROOT, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    first = subprocess.Popen(line, start_new_session=True, **options)
    end = time.monotonic() + 60
    while not (tmp_path / "out/00").exists():
        assert first.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGINT)  # as a terminal does
    assert first.wait(60) == 130
    said = first.communicate()[1]
    assert "stopped; the same command continues" in said and "Traceback" not in said
    done = [name for name in os.listdir(tmp_path / "out") if name[0] != "."]
    assert 0 < len(done) < 40 and all(len(shades(tmp_path / "out" / n)) == 60 for n in done)
    assert subprocess.run(line, **options).returncode == 0
    assert all(len(shades(tmp_path / "out" / name)) == 60 for name in names)
    assert sorted(os.listdir(tmp_path / "out")) == [SETTINGS, *names]


def test_write__an_interruption_leaves_no_half_clip(tmp_path, monkeypatch):
    write_video(tmp_path / "x.mp4")
    job, save = (tmp_path / "x.mp4", tmp_path / "x"), Image.Image.save

    def stop(self, path, **options):
        if path.name == "000005.jpg":
            raise KeyboardInterrupt
        save(self, path, **options)

    with monkeypatch.context() as m:
        m.setattr(Image.Image, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            frames.write(job, None, None, 90)
    assert not (tmp_path / "x").exists()
    assert frames.write(job, None, None, 90) == "" and shades(tmp_path / "x") == list(range(12))


def test_write__an_error_without_words_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "decode", mock.Mock(side_effect=EOFError))
    assert frames.write((Path("x.mp4"), tmp_path / "x"), None, None, 90) == "x.mp4: EOFError"


def test_main__names_broken_videos_and_leaves_them_out(tmp_path, capsys):
    for name in ("good", "cut", "empty", "text"):
        write_video(tmp_path / f"videos/{name}.avi", 60)
    size = os.path.getsize(tmp_path / "videos/cut.avi")
    os.truncate(tmp_path / "videos/cut.avi", size // 3)
    os.truncate(tmp_path / "videos/empty.avi", 0)
    (tmp_path / "videos/text.avi").write_text("not a video " * 50)
    assert run(tmp_path / "videos", tmp_path / "out") == 1
    said = capsys.readouterr().out
    assert "1 clips written, 3 videos cannot be read" in said
    assert all(f"{name}.avi: " in said for name in ("cut", "empty", "text"))
    assert sorted(os.listdir(tmp_path / "out")) == [SETTINGS, "good"]


def test_main__a_full_disk_ends_it(tmp_path, capsys, monkeypatch):
    write_video(tmp_path / "videos/x.mp4", 3)

    def full(self, path, **options):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Image.Image, "save", full)
    assert run(tmp_path / "videos", tmp_path / "out") == 2
    said = capsys.readouterr()
    assert "No space left" in said.err and "cannot be read" not in said.out
    assert os.listdir(tmp_path / "out") == [SETTINGS]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("times, corrupt, seconds, words", [
    ([0, 0.1, 0.2], None, 0.3, ""),
    ([None] * 3, None, 0.3, ""),  # a file that does not tell: by its rate
    ([0, 0.1, 0.2], 1, 0.3, "frame 1 is damaged"),
    ([0, 0.1, 0.2], None, 9.0, "ends after 0.3 of 9.0 s"),
    ([5, 5.1, 5.2], None, 0.3, ""),  # begins late, and is whole
    ([], None, 0.3, "no frames"),
])  # fmt: skip
def test_decode__frames_and_what_is_broken(times, corrupt, seconds, words, whole, monkeypatch):
    stream = SimpleNamespace(duration=int(seconds * 10), time_base=Fraction(1, 10),
                             average_rate=Fraction(10))  # fmt: skip
    found = [SimpleNamespace(time=t, is_corrupt=n == corrupt) for n, t in enumerate(times)]
    video = SimpleNamespace(streams=SimpleNamespace(video=[stream]), duration=None,
                            decode=lambda stream: iter(found))  # fmt: skip
    if whole:  # Matroska: the file tells, in microseconds, what the stream does not
        stream.duration, video.duration = None, int(seconds * 1e6)
    monkeypatch.setitem(
        sys.modules, "av", SimpleNamespace(open=lambda path: contextlib.nullcontext(video))
    )
    if words:
        with pytest.raises(ValueError, match=words):
            list(frames.decode(Path("x.mp4")))
    else:
        seen = [time for time, _ in frames.decode(Path("x.mp4"))]
        assert seen == pytest.approx([0, 0.1, 0.2] if times[0] is None else times)


class Turned:
    """A frame as PyAV has it, wider than high, which is to be displayed upright."""

    rotation = -90  # counter-clockwise

    def to_image(self):
        array = np.zeros((20, 40, 3), np.uint8)
        array[:, :10] = 200  # the left end
        return Image.fromarray(array)


def test_picture__is_turned_as_displayed():
    found = np.asarray(frames.picture(Turned(), None))
    assert found.shape == (40, 20, 3) and found[:10].min() == 200 and found[10:].max() == 0
    assert frames.picture(Turned(), 10).size == (10, 20)
    assert frames.picture(Turned(), 30).size == (20, 40)  # never enlarged


def test_videos__follows_links_but_not_to_a_folder_above(tmp_path):
    for name in ("v/real/a.mp4", "other/b.webm"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "v/linked").symlink_to(tmp_path / "other")
    (tmp_path / "v/real/loop").symlink_to(tmp_path / "v")
    assert [*map(str, frames.videos(tmp_path / "v"))] == ["linked/b.webm", "real/a.mp4"]


# bad input


def test_main__says_what_is_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda name: object())
    (tmp_path / "none").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("x.mp4", "x.avi"):
        (tmp_path / "two" / name).touch()
    (tmp_path / "nested/x").mkdir(parents=True)
    (tmp_path / "nested/x.mp4").touch()
    (tmp_path / "nested/x/y.mp4").touch()
    (tmp_path / "none/.trash").mkdir()
    (tmp_path / "none/.trash/x.mp4").touch()
    (tmp_path / "full/thing").mkdir(parents=True)
    (tmp_path / "one").mkdir()
    (tmp_path / "one/x.mp4").touch()
    for line, words in (
        ((tmp_path / "gone", tmp_path / "out"), "is no folder of videos"),
        ((tmp_path / "none", tmp_path / "out"), "no videos (mp4 "),
        ((tmp_path / "two", tmp_path / "out"), "x.avi and x.mp4 would be one clip"),
        ((tmp_path / "nested", tmp_path / "out"), "x/y.mp4 would lie in the clip of x.mp4"),
        ((tmp_path / "one", tmp_path / "full"), "holds something else"),
        ((tmp_path / "one", tmp_path / "out", "--fps", 0), "--fps 0.0 must be above 0"),
        ((tmp_path / "one", tmp_path / "out", "--short-side", -1), "--short-side -1 must be"),
    ):
        assert run(*line) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(frames.importlib.util, "find_spec", lambda name: None)
    assert run(tmp_path / "one", tmp_path / "out") == 2
    assert "pip install av" in capsys.readouterr().err
