"""shards.py: a packed split reads as its folder; what damaged shards get (packing: test_pack)."""

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_data import ALL, smooth, write, write_triplet

import cfmae
import data
import engine
import files
import shards
from data import FileList, FolderDataset, UserError
from downstream import transfer
from shards import MEMBER, ShardList
from tools import check_data, pack

pytestmark = pytest.mark.slow


def packed(root, out, *flags):
    """Pack into shards of a few images, in this process."""
    pack.main([str(root), str(out), "--workers", "0", "--shard-size", "0.03", *flags])
    return str(out)


@pytest.fixture
def folder(tmp_path):
    """12 images of class folders with maps, one of them broken, one empty; and a val split."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 3)):
        for i in range(count):
            h, w = 40 + 5 * i, 90 - 4 * i
            instance, semantic = rng.integers(0, 9, (2, h, w), np.uint8)
            name = f"{'abc'[i % 3 if split == 'train' else 2]}/{i}.x"
            write_triplet(tmp_path / "in", name, smooth(h, w, i), instance, semantic, split, ".jpg")
    write(f"{tmp_path}/in/train/rgb/a/3.x.jpg", smooth(55, 78, 3), format="PNG")
    os.truncate(f"{tmp_path}/in/train/rgb/b/4.x.jpg", 300)
    os.truncate(f"{tmp_path}/in/train/rgb/c/5.x.jpg", 0)
    os.remove(f"{tmp_path}/in/train/rgb/c/8.x.jpg")
    os.symlink("nowhere", f"{tmp_path}/in/train/rgb/c/8.x.jpg")
    return str(tmp_path / "in")


@pytest.fixture
def out(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("files.time.sleep", lambda seconds: None)
    return packed(folder, tmp_path / "out")


def samples(root, split="train", granularities=ALL, **options):
    dataset = FolderDataset(root, split, None, 32, 4, granularities, seed=3, **options)
    return [dataset[epoch, i] for epoch in (0, 5) for i in range(len(dataset))]


def same(a, b):
    return all(list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x) for x, y in zip(a, b))


def test_shard_list__gives_the_folder_s_samples(folder, out):
    for split, granularities in (("train", ALL), ("train", ("rgb", "semantic")), ("val", ("rgb",))):
        theirs, ours = (samples(root, split, granularities) for root in (folder, out))
        assert len(theirs) == len(ours) > 5 and same(theirs, ours)
    bad = [int(x["bad"]) for x in samples(out)[:12]]
    assert sum(b >= 0 for b in bad) == 3  # cut short, empty, not there: replaced by the next one
    listed, was = (data.scan(root, "train", ALL) for root in (out, folder))
    assert len(listed.shards) > 3 and type(listed) is ShardList
    assert [listed.name(i) for i in range(12)] == [was.name(i) for i in range(12)]
    assert listed.classes == ["a", "b", "c"] and listed.labels.tolist() == was.labels.tolist()


def test_shard_list__has_the_folder_s_classes_and_layout(folder, out, capsys):
    assert files.layout(out, "train") == dict.fromkeys(ALL, "train") and not files.layout(out, "x")
    assert transfer.class_names(out) == transfer.class_names(folder) == ["a", "b", "c"]
    assert files.class_folders(f"{out}/val") == ["c"]
    assert transfer.in_classes(FolderDataset(out, "val", None)).classes == ["a", "b", "c"]
    lines = []
    for root in (folder, out):
        assert check_data.main([root]) == 0
        lines.append(capsys.readouterr().out)
    first = lines[1].splitlines()[0]
    assert first == "train: 12 images, 3 class folders, rgb, instance, semantic"
    assert [x.split(":")[0] for x in lines[0].splitlines()] == [
        x.split(":")[0] for x in lines[1].splitlines()
    ]


def test_shard_list__is_frozen_in_a_run_s_folder_and_mapped(out, tmp_path):
    listed = data.scan(out, "train", ALL)
    saved = listed.save(tmp_path / "run")
    copies = [saved, FileList.open(tmp_path / "run")]
    copies += [pickle.loads(pickle.dumps(x)) for x in (listed, saved)]
    content = listed.read(out, "semantic", 7)
    for copy in copies:
        assert type(copy) is ShardList and copy.shards == listed.shards
        assert np.array_equal(copy.read(out, "semantic", 7), content) and len(content) > 60
    fresh = ShardList(*(np.array(getattr(listed, k)) for k in ShardList.ARRAYS),
                      *(getattr(listed, k) for k in ShardList.FACTS))  # fmt: skip
    assert np.array_equal(pickle.loads(pickle.dumps(fresh)).members, listed.members)
    assert len(pickle.dumps(saved)) < 300  # its path: a worker maps the files itself
    with open("/proc/self/maps") as maps:
        assert f"{tmp_path}/run/members.npy" in maps.read()


def test_read__keeps_few_shards_open_and_threads_apart(out, monkeypatch):
    monkeypatch.setattr(shards, "OPEN", 1)
    dataset = FolderDataset(out, "train", None, 32, 4, ALL)
    contents = [dataset.files.read(out, g, i) for i in range(12) for g in ALL]
    fresh = ShardList(*(getattr(dataset.files, k) for k in (*ShardList.ARRAYS, *ShardList.FACTS)))
    handles, real = len(os.listdir("/proc/self/fd")), os.preadv

    def slow(*args):
        time.sleep(0.001)  # for others to close what this one reads
        return real(*args)

    monkeypatch.setattr(os, "preadv", slow)
    places = [(out, g, i) for i in range(12) for g in ALL]
    with ThreadPoolExecutor(8) as pool:
        for got, wanted in zip(pool.map(lambda place: fresh.read(*place), places), contents):
            assert np.array_equal(got, wanted)
    assert data.check(dataset).startswith("12 of 12 samples checked, 3 unreadable")
    assert len(os.listdir("/proc/self/fd")) <= handles + 1 and len(dataset.files.opened) == 1
    again = [fresh.read(out, g, i) for i in reversed(range(12)) for g in reversed(ALL)]
    assert all(np.array_equal(a, b) for a, b in zip(contents, reversed(again)))
    assert all(x.flags.writeable for x in contents)  # torch warns of others
    os.close(*fresh.opened.values())  # a handle that the file server forgot
    assert np.array_equal(fresh.read(out, "rgb", 0), contents[0])


def test_read__tries_again_on_a_network_file_system(out, monkeypatch):
    listed, calls, real = data.scan(out, "train"), [], os.preadv

    def flaky(*args):
        calls.append(args)
        if len(calls) < 3:
            raise OSError(5, "Input/output error")
        return real(*args)

    monkeypatch.setattr(os, "preadv", flaky)
    assert len(listed.read(out, "rgb", 0)) > 300 and len(calls) == 3


# what damaged shards get


def test_verify__names_the_shard(out):
    path = f"{out}/train/000001.tar"
    size = os.path.getsize(path)
    os.truncate(path, size - 512)
    with pytest.raises(UserError, match=f"{path} has {size - 512} bytes of {size}; .*tools.pack"):
        FolderDataset(out, "train", None)
    os.remove(path)
    with pytest.raises(UserError, match=f"{path}: No such file or directory; .*tools.pack"):
        FolderDataset(out, "train", None)
    FolderDataset(out, "val", None)


def test_load__stops_at_a_shard_cut_short_while_it_is_read(out):
    dataset = FolderDataset(out, "train", None, 32, 4, ALL)
    os.truncate(f"{out}/train/000000.tar", 1000)
    assert list(dataset[0, 0]) == ["error"]
    with pytest.raises(UserError, match=r"000000.tar: 000000000 \(a/0.x.jpg\): the shard is cut"):
        dataset.load(0)
    row = dataset.files.members[3]  # an image that is whole with a map that is not
    os.truncate(f"{out}/train/{row['shard'][0]:06d}.tar", int(row["at"][1]))
    with pytest.raises(UserError, match=r"000000003.instance .*: the shard is cut short"):
        FolderDataset.load(dataset, 3)


def test_load__names_the_member_of_a_map_that_does_not_fit(folder, tmp_path):
    write(f"{folder}/train/semantic/a/0.x.png", np.full((40, 90), 200, np.uint8))
    out = packed(folder, tmp_path / "out")
    words = r"out/train/000000.tar: 000000000.semantic \(a/0.x.jpg\): id 200 is neither"
    with pytest.raises(UserError, match=words):
        data.check(FolderDataset(out, "train", None, 32, 4, ALL))


def test_scan__refuses_shards_without_a_whole_index(out):
    with pytest.raises(UserError, match="only rgb found in .*, no instance"):
        listed = data.scan(out, "train")
        bare = ShardList(listed.names, listed.labels, listed.members[:, :1], {"rgb": "train"},
                         listed.classes, listed.shards, {}, "")  # fmt: skip
        bare.save(f"{out}/train")
        data.scan(out, "train", ALL)
    listed.save(f"{out}/train")
    noise = np.random.default_rng(0).bytes(500)
    for name in ("names.npy", "labels.npy", "members.npy", "files.json"):
        path = f"{out}/train/{name}"
        with open(path, "rb") as file:
            whole = file.read()
        for content in (b"", whole[:20], whole[:-3], noise):
            with open(path + ".new", "wb") as file:
                file.write(content)
            os.replace(path + ".new", path)
            with pytest.raises(UserError, match="cannot read the list of files in .*out/train"):
                data.scan(out, "train")
        os.remove(path)
        words = "cannot read the list" if name != "files.json" else "holds shards without .* index"
        with pytest.raises(UserError, match=words):
            data.scan(out, "train")
        with open(path, "wb") as file:
            file.write(whole)
    facts = {k: getattr(listed, k) for k in ShardList.FACTS}
    for members in (np.zeros((11, 3), MEMBER), np.zeros((12, 2), MEMBER), np.zeros((12, 3))):
        with pytest.raises(ValueError, match="names and members"):
            ShardList(listed.names, listed.labels, members, **facts)
    facts["shards"] = listed.shards[1:]
    with pytest.raises(ValueError, match="members and shards"):
        ShardList(listed.names, listed.labels, listed.members, **facts)


# whole runs


TINY = (
    "--model tiny --image-size 32 --embed-dim 32 --depth 1 --num-heads 2 --decoder-embed-dim 32 "
    "--decoder-num-heads 2 --decoder-depth 1 --batch-size 4 --epochs 3 --workers 0 --device cpu "
    "--precision fp32 --val-samples 2 --semantic-classes 9"
).split()


def test_run__trains_from_shards_as_from_the_folder(folder, out, tmp_path):
    torch.set_num_threads(1)
    weights = []
    for root, stop in ((folder, ()), (out, ("--steps", "4"))):
        flags = ["--data", root, *TINY, "--output", str(tmp_path / f"run{len(weights)}")]
        cfmae.main([*flags, *stop])
        if stop:  # the index is frozen there: the resumed run reads no other
            os.rename(f"{root}/train/files.json", f"{root}/train/gone.json")
            os.rename(f"{root}/val/files.json", f"{root}/val/gone.json")
            cfmae.main([*flags, "--resume"])
        weights.append(engine.load(tmp_path / f"run{len(weights)}/last.pt", "cfmae"))
    a, b = weights
    assert a["step"] == b["step"] == 9
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for i in (0, 1):
        names = (tmp_path / f"run{i}/bad_files.txt").read_text().split()
        assert sorted(names) == ["b/4.x.jpg"] * 3 + ["c/5.x.jpg"] * 3 + ["c/8.x.jpg"] * 3
    with pytest.raises(UserError, match="run with other settings: --data was .*in, is .*out"):
        cfmae.main(["--data", out, *TINY, "--output", str(tmp_path / "run0"), "--resume"])
