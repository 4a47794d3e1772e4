"""Own photographs: a folder without splits or maps, from the first try to the picture."""

import numpy as np
import pytest
from PIL import Image

import cfmae
import data
import files
import mae
import pictures
from engine import UserError

FLAGS = "--model tiny --image-size 32 --embed-dim 16 --depth 1 --num-heads 2 --batch-size 2 "
FLAGS += "--epochs 1 --warmup-epochs 0 --workers 0 --device cpu --precision fp32 --val-samples 2 "


def photographs(folder, names):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 36), (60 * i, 200, 30)).save(folder / name)
    return folder


@pytest.fixture
def captions(monkeypatch):
    found = []
    monkeypatch.setattr(
        pictures, "contact_sheet", lambda columns, path, caption, side: found.append(caption)
    )
    return found


def train(script, folder, tmp_path, *flags):
    script.main(["--data", str(folder), *FLAGS.split(), "--output", str(tmp_path / "o"), *flags])


@pytest.mark.parametrize("script, flags", [(mae, ()), (cfmae, ("--granularities", "R"))])
def test_flat_folder__is_trained_on_and_its_picture_says_so(
    script, flags, tmp_path, captions, capsys
):
    folder = photographs(tmp_path / "album", ["a.jpg", "b.png", "in/c.jpg", "d.jpg"])
    (folder / "notes.txt").write_text("no image")
    train(script, folder, tmp_path, *flags)
    assert "train 4 images, val none" in capsys.readouterr().out
    (caption,) = captions
    assert caption.endswith(f"{folder} train: images that it was trained on")


def test_val__is_what_a_picture_shows_where_there_is_one(tmp_path, captions):
    names = ["train/a.jpg", "train/b.jpg", "val/c.jpg"]
    train(mae, photographs(tmp_path / "album", names), tmp_path)
    assert len(captions) == 1 and captions[0].endswith("album val")


def test_flat_folder__same_images_as_a_train_split(tmp_path):
    flat = photographs(tmp_path / "a", ["x/1.jpg", "2.jpg", ".hidden/3.jpg"])
    split = photographs(tmp_path / "b", ["train/x/1.jpg", "train/2.jpg"])
    sets = [data.FolderDataset(str(root), "train", None, 32) for root in (flat, split)]
    assert [s.classes for s in sets] == [["x"], ["x"]] and [len(s) for s in sets] == [2, 2]
    for i in range(2):
        one, other = sets[0][0, i], sets[1][0, i]
        assert one["label"] == other["label"] and np.array_equal(one["rgb"], other["rgb"])


def test_flat_folder__only_without_splits_and_with_images_in_it(tmp_path):
    both = photographs(tmp_path / "both", ["cover.jpg", "val/1.jpg"])
    deep = photographs(tmp_path / "deep", ["x/1.jpg"])
    none = photographs(tmp_path / "hidden", [".cover.jpg"])
    for root in (both, deep, none, tmp_path / "nowhere"):
        assert files.layout(str(root), "train") == {}
    assert files.layout(str(both), "val") == {"rgb": "val"}
    assert files.layout(str(photographs(tmp_path / "f", ["1.jpg"])), "val") == {}


@pytest.mark.parametrize("names", [["a.jpg", "b.jpg"], ["train/a.jpg", "val/b.jpg"]])
def test_cfmae__names_the_flag_that_images_alone_need(names, tmp_path):
    folder = photographs(tmp_path / "album", names)
    with pytest.raises(UserError, match="no instance, semantic.*--granularities R\\b"):
        train(cfmae, folder, tmp_path)
    with pytest.raises(UserError) as semantic:
        files.scan(str(folder), "train", ("rgb", "semantic"))
    assert "--granularities" not in str(semantic.value)
