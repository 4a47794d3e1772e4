"""tools/pack.py: what lies in the shards, kills and full disks, --check (reading: test_shards)."""

import fcntl
import io
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import ALL, smooth, write, write_triplet

import data
from data import FolderDataset, UserError
from tools import pack

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
FLAGS = ("--workers", "0", "--shard-size", "0.02")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 9), ("val", 2)):
        for i in range(count):
            ids = rng.integers(0, 9, (2, 40, 60), np.uint8)
            name = f"{'ab'[i % 2]}/{i}" if i else "loose"
            write_triplet(tmp_path / "in", name, smooth(40, 60, i), *ids, split, ".jpg")
    return tmp_path / "in"


def run(*args):
    pack.main([*map(str, args[:2]), *FLAGS, *args[2:]])


def contents(out):
    """Every file below a folder, as bytes."""
    return {str(p.relative_to(out)): p.read_bytes() for p in Path(out).rglob("*") if p.is_file()}


def tar_members(out, split="train"):
    """(name, bytes) of all members of a split's shards, as tarfile reads them."""
    for path in sorted(Path(out, split).glob("*.tar")):
        with tarfile.open(path) as tar:
            yield from ((m.name, tar.extractfile(m).read()) for m in tar)


# what lies in the shards


def test_pack__keeps_bytes_and_classes_in_plain_tar_files(folder, tmp_path):
    run(folder, tmp_path / "out")
    found = dict(tar_members(tmp_path / "out"))
    listed = data.scan(str(folder), "train", ALL)
    expected = {}
    for i in range(len(listed)):
        stem, key = listed.name(i).removesuffix(".jpg"), f"{i:09d}"
        expected[f"{key}.jpg"] = (folder / f"train/rgb/{stem}.jpg").read_bytes()
        for g in ("instance", "semantic"):
            expected[f"{key}.{g}.png"] = (folder / f"train/{g}/{stem}.png").read_bytes()
        if "/" in stem:
            expected[f"{key}.cls"] = b"%d" % "ab".index(stem[0])
    assert found == expected and list(found) == list(expected)
    names = sorted(p.name for p in (tmp_path / "out/train").iterdir())
    shards = [name for name in names if name.endswith(".tar")]
    assert len(shards) > 2 and names[len(shards) :] == [
        "files.json", "labels.npy", "members.npy", "names.npy"
    ]  # fmt: skip
    sizes = [(tmp_path / "out/train" / name).stat().st_size for name in shards]
    assert max(sizes) <= 0.02 * 2**20 + 1024 and max(sizes) > 0.01 * 2**20
    for name in shards:  # as tar ends a file
        assert (tmp_path / "out/train" / name).read_bytes().endswith(bytes(1024))
    assert not (tmp_path / "out/classes.txt").exists()


def test_pack__copies_the_names_of_classes(folder, tmp_path):
    (folder / "classes.txt").write_text("wall\nsky\n")
    run(folder, tmp_path / "out")
    assert (tmp_path / "out/classes.txt").read_text() == "wall\nsky\n"


def test_pack__does_not_depend_on_processes(folder, tmp_path):
    for workers in ("0", "2"):
        run(folder, tmp_path / workers, "--short-side", "32", "--workers", workers)
    assert contents(tmp_path / "0") == contents(tmp_path / "2")


def test_pack__takes_an_image_larger_than_a_shard(folder, tmp_path):
    run(folder, tmp_path / "out", "--shard-size", "0.001")
    assert len(list((tmp_path / "out/train").glob("*.tar"))) == 9


def test_pack__reduces_image_and_maps_alike(folder, tmp_path):
    write(f"{folder}/train/rgb/a/2.jpg", smooth(30, 20))  # already small
    for g in ("instance", "semantic"):
        write(f"{folder}/train/{g}/a/2.png", np.zeros((30, 20), np.uint8))
    os.truncate(folder / "train/rgb/b/3.jpg", 200)  # unreadable: kept, so that numbers stay
    run(folder, tmp_path / "out", "--short-side", "30", "--quality", "70")
    before = FolderDataset(str(folder), "train", None, 32, 4, ALL)
    after = FolderDataset(str(tmp_path / "out"), "train", None, 32, 4, ALL)
    assert len(before) == len(after) == 9
    for i in range(9):
        name = before.files.name(i)
        if name in ("a/2.jpg", "b/3.jpg"):
            for g in ALL:
                pair = [d.files.read(d.root, g, i) for d in (before, after)]
                assert np.array_equal(*pair)
            continue
        (rgb, maps), (small, reduced) = before.load(i), after.load(i)
        assert small.shape == (3, 30, 45)
        for g in maps:  # a pixel takes the id under its middle: 4/3 of its place
            at = [[int((k + 0.5) * 4 / 3) for k in range(n)] for n in (30, 45)]
            assert np.array_equal(reduced[g], maps[g][at[0]][:, at[1]])
        wanted = Image.fromarray(rgb.permute(1, 2, 0).numpy()).resize((45, 30), Image.BICUBIC)
        small, wanted = small.permute(1, 2, 0).numpy().astype(int), np.asarray(wanted)
        assert np.abs(small - wanted).mean() < 8 < np.abs(small - wanted[::-1]).mean() / 2  # JPEG
    with Image.open(io.BytesIO(dict(tar_members(tmp_path / "out"))["000000008.jpg"])) as image:
        table = image.quantization[0]
    wanted = io.BytesIO()
    Image.new("RGB", (8, 8)).save(wanted, "JPEG", quality=70)
    assert table == Image.open(wanted).quantization[0]


def test_pack__reduces_what_was_packed_before(folder, tmp_path):
    run(folder, tmp_path / "whole")
    for name, source in (("direct", folder), ("twice", tmp_path / "whole")):
        run(source, tmp_path / name, "--short-side", "30")
    assert contents(tmp_path / "direct") == contents(tmp_path / "twice")


def test_pack__shards_open_in_webdataset(folder, tmp_path):
    wds = pytest.importorskip("webdataset")
    run(folder, tmp_path / "out")
    urls = sorted(map(str, (tmp_path / "out/train").glob("*.tar")))
    keys = ("jpg", "instance.png", "semantic.png")
    found = list(wds.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", *keys))
    ours = FolderDataset(str(tmp_path / "out"), "train", None, 32, 4, ALL)
    assert [key for key, *_ in found] == [f"{i:09d}" for i in range(9)]
    labels = [x.get("cls") for x in wds.WebDataset(urls, shardshuffle=False).decode()]
    assert labels == [0, 0, 0, 0, 1, 1, 1, 1, None]  # the loose one is the last
    for i, (_, rgb, *maps) in enumerate(found):
        wanted, own = ours.load(i)
        assert np.abs(rgb.astype(int) - wanted.permute(1, 2, 0).numpy()).max() < 4
        for got, g in zip(maps, own):
            assert np.array_equal(got[..., 0], own[g])


# killed, continued, repaired


def forked(work):
    """Run `work` in a child process, which may end it at once; its exit status."""
    if (pid := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except UserError as error:
            os.write(2, str(error).encode())
            os._exit(2)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_pack__killed_before_any_change_of_a_file_continues_to_the_same_bytes(tmp_path):
    torch.set_num_threads(1)
    folder = tmp_path / "in"
    for name in "abc":
        write(f"{folder}/train/{name}/1.jpg", smooth(90, 90))
    small = ("--shard-size", "0.006")
    run(folder, tmp_path / "whole", *small)
    whole = contents(tmp_path / "whole")
    assert "train/000002.tar" in whole
    kills = 0
    for moment in itertools.count():
        out = tmp_path / f"out{moment}"

        def killed(out=out, moment=moment):
            count = itertools.count()

            def hook(event, args):
                changes = event in ("os.rename", "os.remove", "os.mkdir", "os.truncate")
                changes |= event == "open" and args[1] not in (None, "r", "rb")
                if changes and str(out) in str(args[0]) and next(count) == moment:
                    os._exit(9)

            sys.addaudithook(hook)
            run(folder, out, *small)

        status = forked(killed)
        for path in Path(out, "train").glob("*.tar"):
            assert path.read_bytes() == whole[f"train/{path.name}"]  # whole, or absent
        if Path(out, "train/files.json").exists():
            assert data.scan(str(out), "train").verify(str(out)) is None
        times = {p: p.stat().st_mtime_ns for p in out.rglob("*.tar")}
        run(folder, out, *small)
        assert contents(out) == whole
        assert sum(p.stat().st_mtime_ns != t for p, t in times.items()) <= 1  # the last, at most
        kills += status == 9
        if status == 0:
            break
    assert kills > 30


def test_pack__killed_by_the_system_and_continued(folder, tmp_path):
    command = [sys.executable, "-m", "tools.pack", str(folder)]
    flags = ["--shard-size", "0.02", "--workers", "2"]
    run(folder, tmp_path / "whole", *flags)
    out = tmp_path / "out"
    child = subprocess.Popen([*command, str(out), *flags], cwd=ROOT)
    while not (out / "train/000000.tar").exists() and child.poll() is None:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.wait()
    run(folder, out, *flags)
    assert contents(out) == contents(tmp_path / "whole")


def test_pack__continues_after_a_torn_write(folder, tmp_path):
    run(folder, out := tmp_path / "out")
    whole, listed = contents(out), data.scan(str(out), "train", ALL)
    known = listed.members[: listed.shards[0]["samples"]].tobytes()
    (out / "train/members").write_bytes(known + b"torn")
    (out / "train/packing.json").write_text(json.dumps([listed.packing, listed.shards[:1]]))
    (out / "train/files.json").unlink()
    run(folder, out)
    assert contents(out) == whole


def test_pack__makes_damaged_shards_again(folder, tmp_path, capsys):
    run(folder, tmp_path / "out")
    whole = contents(tmp_path / "out")
    run(folder, tmp_path / "out")
    assert "9 samples in" in (told := capsys.readouterr().out) and "packed before" in told
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.tar")}
    os.truncate(tmp_path / "out/train/000001.tar", 700)
    os.remove(tmp_path / "out/val/000000.tar")
    run(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    first = tmp_path / "out/train/000000.tar"
    assert first.stat().st_mtime_ns == times[first]  # what stands before is left alone


def test_pack__refuses_another_packing_in_the_same_place(folder, tmp_path):
    out = tmp_path / "out"
    run(folder, out)
    before = contents(out)
    for flags, words in [
        (["--short-side", "30"], "short_side was 0, is 30"),
        (["--shard-size", "0.03"], "shard_bytes was 20971, is 31457"),
    ]:
        with pytest.raises(UserError, match=f"out/train was begun otherwise, {words}"):
            run(folder, out, *flags)
    write(f"{folder}/train/rgb/b/9.jpg", smooth(40, 60))
    for g in ("instance", "semantic"):
        write(f"{folder}/train/{g}/b/9.png", np.zeros((40, 60), np.uint8))
    with pytest.raises(UserError, match="ROOT held other images or maps"):
        run(folder, out)
    with pytest.raises(UserError, match="in/train holds .*, which is no shard: choose another OUT"):
        run(folder, folder)
    assert contents(out) == before
    (out / "train/files.json").unlink()  # and so while it is not finished
    shards = [{"name": "000000.tar", "bytes": 0, "samples": 1, "sha256": ""}]
    (out / "train/packing.json").write_text(json.dumps([{"short_side": 7}, shards]))
    (out / "train/members").touch()
    with pytest.raises(UserError, match="short_side was 7, is 0"):
        run(folder, out)
    (out / "train/packing.json").unlink()
    with pytest.raises(UserError, match="out/train holds shards of which nothing is known"):
        run(folder, out)
    assert {k: v for k, v in contents(out).items() if k.endswith("tar")} == {
        k: v for k, v in before.items() if k.endswith("tar")
    }


def test_pack__is_alone_in_a_folder(folder, tmp_path, capfd):
    (tmp_path / "out/train").mkdir(parents=True)
    with open(tmp_path / "out/train/lock", "w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        assert forked(lambda: run(folder, tmp_path / "out")) == 2
    assert "another process is packing into" in capfd.readouterr().err
    run(folder, tmp_path / "out")  # it left the lock behind, as one that was killed


def test_pack__says_that_the_disk_is_full(folder, tmp_path, capfd):
    run(folder, tmp_path / "whole")
    torch.set_num_threads(1)

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))
        run(folder, tmp_path / "out")

    assert forked(limited) == 2
    words = "File too large; the shards that are whole stay, and the same command continues"
    assert words in capfd.readouterr().err
    assert not {p.suffix for p in (tmp_path / "out").rglob("*")} & {".tmp", ".tar"}
    run(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_pack__stops_at_maps_that_do_not_fit(folder, tmp_path):
    write(f"{folder}/train/semantic/b/5.png", np.zeros((40, 61), np.uint8))
    with pytest.raises(UserError, match="semantic/b/5.png: 61 x 40, but its image .* 60 x 40"):
        run(folder, tmp_path / "out", "--short-side", "30")
    os.remove(folder / "train/semantic/b/5.png")
    os.symlink("nowhere", folder / "train/semantic/b/5.png")
    with pytest.raises(UserError, match="semantic/b/5.png: No such file"):
        run(folder, tmp_path / "other")
    os.remove(folder / "train/semantic/b/5.png")
    with pytest.raises(UserError, match="1 of 9 images have no map"):
        run(folder, tmp_path / "out", "--short-side", "30")
    write(f"{folder}/train/semantic/b/5.png", np.zeros((40, 60), np.uint8))
    run(folder, tmp_path / "out", "--short-side", "30")
    assert len(data.scan(str(tmp_path / "out"), "train", ALL)) == 9


# --check, and the command line


def test_check__finds_every_kind_of_damage(folder, tmp_path, capsys):
    out = tmp_path / "out"
    run(folder, out)
    pack.main(["--check", str(out)])
    told = capsys.readouterr().out
    assert "train: 9 samples in" in told and "val: 2 samples in 1 shards checked" in told
    shards = sorted((out / "train").glob("*.tar"))
    for shard in shards:
        shard.rename(f"{shard}.away")
    with pytest.raises((UserError, OSError), match="000000.tar"):  # a split without any is missed
        pack.main(["--check", str(out)])
    for shard in shards:
        Path(f"{shard}.away").rename(shard)

    def flip(path, at):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)

    for name, words in [
        ("train/000001.tar", "out/train/000001.tar differs from its checksum"),
        ("val/000000.tar", "out/val/000000.tar differs from its checksum"),
        ("train/members.npy", "out/train: the index differs from its checksum"),
        ("train/labels.npy", "out/train: the index differs from its checksum"),
        ("val/names.npy", "out/val: the index differs from its checksum"),
    ]:
        flip(out / name, -9)
        with pytest.raises(UserError, match=words):
            pack.check(str(out))
        flip(out / name, -9)
    os.truncate(out / "train/000000.tar", 512)
    (out / "train/000002.tar").rename(out / "gone")
    with pytest.raises(UserError, match="000000.tar has 512 bytes of .*000002.tar: No such file"):
        pack.check(str(out))
    (out / "train/files.json").unlink()
    with pytest.raises(UserError, match="out/train holds shards without their index"):
        pack.check(str(out))
    with pytest.raises(UserError, match="in holds no packed split"):
        pack.check(str(folder))


@pytest.mark.parametrize(
    "args, words",
    [
        (["in"], "wanted: ROOT OUT, or --check OUT"),
        (["in", "out", "--check"], "wanted: ROOT OUT, or --check OUT"),
        (["none", "out"], "no folder none"),
        (["in", "out", "--quality", "0"], "--quality 0: wanted 1 to 100"),
        (["in", "out", "--shard-size", "0"], "--shard-size 0.0: wanted"),
        (["in", "out", "--short-side", "-1"], "--short-side -1: wanted 0 to"),
        (["in", "in/train/rgb/loose.jpg"], "loose.jpg/train: Not a directory"),
    ],
)
def test_main__refuses_in_words(folder, monkeypatch, args, words):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(UserError, match=words):
        pack.main(args)
    assert not (folder.parent / "out").exists()
