"""data.py: lists of files, and what bad input gets (decoding: test_decoding.py)."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import ALL, smooth, write, write_triplet

import data
from tools import check_data
from data import FileList, FolderDataset, UserError


def ids(value, height=40, width=60, dtype=np.uint8):
    return np.full((height, width), value, dtype)


@pytest.fixture
def good(tmp_path):
    for i in range(6):
        write_triplet(tmp_path, f"{i}", smooth(40, 60, i), ids(i), ids(10 + i))
    return str(tmp_path)


def sample(root, index=0, granularities=ALL, **options):
    return FolderDataset(root, "train", None, 32, 4, granularities, **options)[0, index]


def test_scan__orders_labels_links_and_skips(tmp_path):
    for name in ("b/2.JPEG", "b/10.jpg", "a/deep/x.PNG", "a/y.webp", "top.jpeg"):
        write(f"{tmp_path}/train/{name}", smooth(8, 8), format="PNG")
    write(f"{tmp_path}/val/c/z.jpg", smooth(8, 8))
    for name in (".hidden.jpg", "b/notes.txt", "b/.DS_Store", ".cache/1.jpg", "d/jpg"):
        os.makedirs(os.path.dirname(f"{tmp_path}/train/{name}"), exist_ok=True)
        open(f"{tmp_path}/train/{name}", "w").close()
    os.mkfifo(f"{tmp_path}/train/b/pipe.jpg")
    os.symlink(f"{tmp_path}/train/b/10.jpg", f"{tmp_path}/train/b/link.jpg")
    os.symlink(f"{tmp_path}/train/b", f"{tmp_path}/train/linked")
    os.symlink(f"{tmp_path}/train", f"{tmp_path}/train/b/loop")
    files = data.scan(str(tmp_path), "train", ("rgb",))
    names = "a/deep/x.PNG a/y.webp b/10.jpg b/2.JPEG b/link.jpg linked/10.jpg linked/2.JPEG"
    wanted = [*names.split(), "linked/link.jpg", "top.jpeg"]
    assert [files.name(i) for i in range(len(files))] == wanted
    assert files.classes == ["a", "b", "c", "linked"]  # of train and val together
    assert files.labels.tolist() == [0, 0, 1, 1, 1, 3, 3, 3, -1]
    assert data.scan(str(tmp_path), "val").labels.tolist() == [2]


def test_scan__semseg_stands_for_semantic(good):
    os.rename(f"{good}/train/semantic", f"{good}/train/semseg")
    assert sample(good, 3)["semantic"].unique().tolist() == [13]
    for i in range(6):
        write(f"{good}/train/semantic/{i}.png", ids(99))
    assert sample(good, 3)["semantic"].unique().tolist() == [99]  # where both are there


def test_file_list__round_trips(good, tmp_path):
    files = data.scan(good, "train", ALL)
    names = [files.name(i) for i in range(6)]
    saved = files.save(f"{tmp_path}/list")
    copies = [saved, FileList.open(f"{tmp_path}/list")]
    copies += [pickle.loads(pickle.dumps(f)) for f in (files, saved)]
    for copy in copies:
        assert [copy.name(i) for i in range(len(copy))] == names and copy.folders == files.folders
    assert len(pickle.dumps(saved)) < 200  # its path: a worker maps the file itself
    with open("/proc/self/maps") as maps:
        assert f"{tmp_path}/list/names.npy" in maps.read()
    odd = ["a\nb.jpg", "é/ü.png", os.fsdecode(b"\xff\xfe.jpg")]
    names, labels = np.array([os.fsencode(n) for n in odd]), np.array([-1, 0, -1], np.int32)
    built = FileList(names, labels, {}, ["é"]).save(good)
    assert [built.name(i) for i in range(3)] == odd and built.classes == ["é"]
    assert built.labels.tolist() == [-1, 0, -1]


def test_file_list__refuses_what_it_did_not_write(good, tmp_path):
    data.scan(good, "train", ALL).save(f"{tmp_path}/list")
    noise = np.random.default_rng(0).bytes(500)
    for name in ("names.npy", "labels.npy", "files.json"):
        path = f"{tmp_path}/list/{name}"
        whole = open(path, "rb").read()
        for content in (b"", whole[:20], whole[:-3], noise, None):
            os.remove(path)
            if content is not None:
                with open(path, "wb") as file:
                    file.write(content)
            with pytest.raises(UserError, match="cannot read the list"):
                FileList.open(f"{tmp_path}/list")
            open(path, "wb").close()
        with open(path, "wb") as file:
            file.write(whole)
    np.save(f"{tmp_path}/list/labels.npy", np.zeros(5, np.int32))  # of another folder
    with pytest.raises(UserError, match="cannot read the list"):
        FileList.open(f"{tmp_path}/list")


# what bad input gets


def test_scan__says_what_it_looked_for(tmp_path, good):
    empty = f"{tmp_path}/empty"
    os.makedirs(f"{empty}/train/rgb")
    for root, split, words in [
        (f"{tmp_path}/none", "train", "no folder .*none"),
        (good, "val", "no folder .*val .in .*: empty, train"),
        (empty, "train", "no images .jpg .* in .*train/rgb"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            data.scan(root, split)
        assert "--data shapes" in str(error.value) and "ROOT/{train,val}/rgb" in str(error.value)
    open(f"{tmp_path}/images.tar", "w").close()
    with pytest.raises(UserError, match="images.tar is a file, a folder was wanted\nExpected"):
        data.scan(f"{tmp_path}/images.tar", "train")
    write(f"{tmp_path}/plain/train/x.jpg", smooth(8, 8))
    with pytest.raises(UserError, match="only rgb found in .*train, no instance, semantic"):
        data.scan(f"{tmp_path}/plain", "train", ALL)
    os.rename(f"{good}/train/rgb", f"{good}/train/images")
    with pytest.raises(UserError, match="only instance, semantic found in .*train, no rgb"):
        data.scan(good, "train", ("rgb",))


def test_scan__counts_images_without_maps(good):
    for name in ("semantic/0.png", "semantic/4.png", "instance/4.png"):
        os.remove(f"{good}/train/{name}")
    with pytest.raises(UserError, match="2 of 6 images have no map") as error:
        data.scan(good, "train", ALL)
    assert f"0.png: not in {good}/train/semantic" in str(error.value)
    assert len(data.scan(good, "train", ("rgb",))) == 6


def turned(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    write(f"{folder}/rgb/2.png", smooth(40, 60), exif=exif)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda f: write(f"{f}/instance/2.png", ids(1, 40, 61)), "2.png: 61 x 40, .* 60 x 40"),
        (turned, "2.png: 60 x 40, .* 40 x 60; .*EXIF"),
        (lambda f: write(f"{f}/semantic/2.png", ids(133)), "id 133 .* semantic_classes = 133"),
        (lambda f: write(f"{f}/semantic/2.png", ids(65535, dtype=np.uint16)), "id 65535"),
        (lambda f: write(f"{f}/semantic/2.png", smooth(40, 60)), "2.png: 8-bit RGB"),
        (lambda f: write(f"{f}/semantic/2.png", ids(0) > 0), "2.png: 1-bit grey"),
        (lambda f: open(f"{f}/instance/2.png", "wb").close(), "instance/2.png: not a PNG file"),
    ],
)
def test_check__and_loading_stop_at_maps_that_do_not_fit(good, spoil, words, capsys):
    assert data.check(FolderDataset(good, "train", None, 32, 4, ALL)).startswith("6 of 6")
    spoil(f"{good}/train")
    dataset = FolderDataset(good, "train", None, 32, 4, ALL)
    with pytest.raises(UserError, match=f"1 of 6 .*\n.*{words}"):
        data.check(dataset)
    batch = data.collate([dataset[0, i] for i in range(4)])
    assert list(batch) == ["error"] and good in batch["error"]
    assert check_data.main([good]) == 2
    out = capsys.readouterr()
    assert "train: 6 images" in out.out and out.err.startswith("error: 1 of 6")


def test_check__takes_ids_up_to_semantic_classes(good):
    checks = np.where(np.indices((40, 60)).sum(0) % 2, 255, 199).astype(np.uint8)
    write(f"{good}/train/semantic/2.png", checks)
    dataset = FolderDataset(good, "train", None, 32, 4, ALL, semantic_classes=200)
    assert data.check(dataset, None).startswith("6 of 6 samples checked, 0 unreadable")
    assert 199 in dataset[0, 2]["semantic"]
    with pytest.raises(UserError, match="semantic_classes 256"):
        FolderDataset(good, "train", None, 32, 4, ALL, semantic_classes=256)


def test_check__looks_at_samples_from_the_first_to_the_last(good):
    dataset, seen = FolderDataset(good, "train", None, 32, 4, ALL), []
    assert data.check(dataset, 3, seen.append).startswith("3 of 6")
    assert sorted(seen) == [0, 2, 5]


def test_folder__an_instance_of_a_wide_map_may_be_255(good):
    wide = ids(65535, dtype=np.uint16)
    wide[:, :40], wide[:, :20] = 255, 0
    write(f"{good}/train/instance/0.png", wide)
    write(f"{good}/train/instance/1.png", ids(255))
    got = sample(good, 0, train=False)["instance"][0]  # columns 10 to 50 of the image
    assert got.tolist() == [0, 0, 1, 1, 1, 1, 255, 255]
    assert sample(good, 1)["instance"].unique().tolist() == [255]


def test_folder__labels_a_replacement_as_what_it_is(tmp_path):
    for name in ("a/1", "b/2"):
        write(f"{tmp_path}/train/{name}.png", smooth(20, 20))
    dataset = FolderDataset(str(tmp_path), "train", None, 32, 4)
    open(f"{tmp_path}/train/a/1.png", "wb").close()
    assert dataset[0, 0]["label"] == dataset[0, 1]["label"] == 1 and dataset[0, 0]["bad"] == 0


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_load__says_that_a_file_is_no_image(good, content):
    """Pillow's message names the address of a buffer in memory."""
    for name in ("rgb/1.png", "semantic/2.png"):
        with open(f"{good}/train/{name}", "wb") as file:
            file.write(b"\x89PNG\r\n\x1a\n" * name.startswith("semantic") + content)
    dataset = FolderDataset(good, "train", None, 32, 4, ALL)
    with pytest.raises(data.Unreadable) as error:
        dataset.load(1)
    assert str(error.value) == "1.png: not an image that Pillow or torchvision reads"
    with pytest.raises(UserError, match="semantic/2.png: (not an image|Truncated)") as error:
        dataset.load(2)
    assert "BytesIO" not in str(error.value)


def test_folder__replaces_unreadable_images_under_the_same_seed(good, monkeypatch):
    clean = [sample(good, i) for i in range(6)]
    calls = []
    monkeypatch.setattr("files.time.sleep", calls.append)
    with open(f"{good}/train/rgb/1.png", "rb+") as file:
        file.truncate(700)
    open(f"{good}/train/rgb/2.png", "wb").close()
    got = sample(good, 1)
    assert got["bad"] == 1 and got["seed"] == clean[1]["seed"] and clean[3]["bad"] == -1
    assert got["semantic"].unique().tolist() == [13]  # the next readable one, its maps
    other = FolderDataset(good, "train", None, 32, 4, ALL)
    assert torch.equal(got["rgb"], other.crop(*other.load(3), int(clean[1]["seed"]))["rgb"])
    assert not calls
    os.remove(f"{good}/train/rgb/5.png")
    os.symlink("nowhere", f"{good}/train/rgb/5.png")
    assert sample(good, 5)["bad"] == 5 and len(calls) == 3  # three more tries, then number 0
    assert data.check(other).startswith("6 of 6 samples checked, 3 unreadable\n  1.png")
    for i in (0, 3, 4):
        os.remove(f"{good}/train/rgb/{i}.png")
    assert "6 images in a row cannot be read" in other[0, 1]["error"]
    with pytest.raises(UserError, match="none of 6 samples"):
        data.check(other)


def test_open_dataset__maps_want_a_patch_size_of_four_labels(good):
    for root in (good, "shapes"):
        with pytest.raises(UserError, match="patch_size 6: use a multiple of 4"):
            data.open_dataset(root, "train", 30, 6, ALL, (0.2, 1.0), True, 0)
        sample = data.open_dataset(root, "train", 28, 14, ("rgb",), (0.2, 1.0), True, 0)[0, 0]
        assert sample["rgb"].shape == (3, 28, 28) and "semantic" not in sample


def test_open_dataset__opens_shapes_or_a_folder(good):
    options = (32, 16, ("rgb",), (0.2, 1.0), True, 0)
    shapes, folder = (data.open_dataset(d, "train", *options) for d in ("shapes", good))
    assert list(shapes[0, 0]) == list(folder[0, 0]) == ["rgb", "label", "seed", "bad"]
    assert folder[0, 0]["rgb"].shape == shapes[0, 0]["rgb"].shape == (3, 32, 32)
    for root in ("shapes", good):
        dataset = data.open_dataset(root, "train", 32, 16, ("rgb",), (0.5, 0.6), False, 7)
        assert dataset.seed == 7 and not dataset.train
    assert dataset.scale == (0.5, 0.6)
    only_rgb = data.scan(good, "train")
    with pytest.raises(UserError, match="has rgb alone"):
        FolderDataset(good, "train", only_rgb, 32, 16, ALL)
