"""tools.pseudo_label: folders, ranks, faults; the recipe is a stand-in or regions at its least."""

import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_pack import contents as tree

import cfmae
import data
import engine
import files
from tools import labelling, map_files, pseudo_label
from tools.labelling import MAPS

pytestmark = pytest.mark.slow


def photographs(root, names, size=(24, 32)):
    """Write images: a grey ground, a coloured square whose place depends on the number."""
    for i, name in enumerate(names):
        pixels = np.full((*size, 3), 90 + 2 * i, np.uint8)
        pixels[4:14, 4 + i % 8 : 16 + i % 8] = (250, 40 * (i % 5), 20)
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)


class Fake:
    """A recipe: brightness is the class; the first pixel is background."""

    def __init__(self, after=lambda names: None):
        self.prepare, self.after, self.seen = fake_maps, after, []

    def label(self, prepared):
        self.seen += [name for name, _ in prepared]
        self.after(self.seen)
        return [maps for _, maps in prepared]


def fake_maps(rgb, name):
    semantic = (rgb.float().mean(0) / 2).byte().numpy()
    instance = np.ones_like(semantic)
    instance[0, 0] = 0
    return name, (instance, semantic)


class Quiet(labelling.Signals):
    number = 0


def run(root, output=None, recipe=None, rank=0, size=1, batch_size=2, signals=None, settings=None):
    """Label in this process as one of several ranks."""
    world = engine.World("cpu", "fp32")
    world.rank, world.size = rank, size
    splits = labelling.open_splits(str(root), output and str(output))
    out = os.path.abspath(output or root)
    labelling.place(out, splits, settings or {"recipe": "fake"}, rank == 0)
    labeller = labelling.Labeller(world, signals or Quiet(), batch_size, 0)
    recipe = recipe or Fake()
    for split in splits:
        labeller.run(split, recipe)
    return recipe


# ------------------------------------------------------------------------------- folders and ranks


def test_run__writes_maps_beside_rgb_that_cfmae_reads(tmp_path):
    photographs(tmp_path, [f"train/rgb/{c}/{i}.jpg" for c in "ab" for i in range(3)])
    photographs(tmp_path, ["val/rgb/a/x.png"])
    run(tmp_path)
    for split, n in (("train", 6), ("val", 1)):
        dataset = data.FolderDataset(str(tmp_path), split, None, granularities=tuple(files.FOLDERS))
        assert len(dataset) == n and data.check(dataset, None).startswith(f"{n} of {n} samples")
    rgb, maps = dataset.load(0)
    assert np.array_equal(maps["semantic"], fake_maps(rgb, "")[1][1])
    assert maps["instance"][0, 0] == 0 and maps["instance"][1, 1] == 1


@pytest.mark.parametrize("prefix, root", [("in/train/n0/", "in"), ("in/", "in"), ("in/c/", "in")])
def test_run__bare_images_get_maps_in_another_folder(prefix, root, tmp_path):
    names = [f"{prefix}{i}.JPEG" for i in range(3)]
    photographs(tmp_path, names)
    before = tree(tmp_path / root)
    with pytest.raises(engine.UserError, match=f"--output {tmp_path}/in_maps"):
        run(tmp_path / root)
    run(tmp_path / root, tmp_path / "out")
    assert tree(tmp_path / root) == before
    found = data.scan(str(tmp_path / "out"), "train", tuple(files.FOLDERS))
    assert len(found) == 3 and (tmp_path / "out/train/rgb").is_symlink()
    dataset = data.FolderDataset(str(tmp_path / "out"), "train", found)
    assert dataset[0, 0]["bad"] == -1
    with pytest.raises(engine.UserError, match="lies among the images"):
        run(tmp_path / root, tmp_path / prefix / "maps")


def test_run__ranks_share_the_images_without_overlap(tmp_path):
    photographs(tmp_path, [f"train/rgb/{i}.png" for i in range(11)])
    seen = [run(tmp_path, tmp_path / "out", rank=r, size=3).seen for r in range(3)]
    assert sorted(sum(seen, [])) == sorted(f"{i}.png" for i in range(11))
    assert sorted(map(len, seen)) == [3, 4, 4]
    run(tmp_path, tmp_path / "alone")
    assert tree(tmp_path / "alone") == tree(tmp_path / "out")


def test_run__skips_what_is_there_and_does_the_rest(tmp_path):
    photographs(tmp_path, [f"train/rgb/c/{i}.png" for i in range(6)])
    run(tmp_path)
    whole = tree(tmp_path)
    assert run(tmp_path).seen == []
    (tmp_path / "train/instance/c/2.png").unlink()
    (tmp_path / "train/semantic/c/4.png").unlink()
    (tmp_path / "train/semantic/c/.4.png.tmp").write_bytes(b"what a killed run left")
    assert sorted(run(tmp_path).seen) == ["c/2.png", "c/4.png"] and tree(tmp_path) == whole


def test_run__unreadable_images_are_listed_and_training_replaces_them(tmp_path, capsys):
    photographs(tmp_path, [f"train/rgb/{i}.png" for i in range(4)])
    (tmp_path / "train/rgb/1.png").write_bytes(b"no image")
    run(tmp_path)
    assert "1 of them unreadable" in capsys.readouterr().out
    listed = (tmp_path / "train/unreadable.txt").read_text().splitlines()
    assert listed == ["1.png: not an image that Pillow or torchvision reads"]
    dataset = data.FolderDataset(str(tmp_path), "train", None, granularities=tuple(files.FOLDERS))
    assert dataset[0, 1]["bad"] == 1 and "1 unreadable" in data.check(dataset, None)
    for g in MAPS:
        (tmp_path / f"train/{g}/1.png").unlink()
    run(tmp_path)
    assert (tmp_path / "train/unreadable.txt").read_text().splitlines() == listed
    photographs(tmp_path / "all", ["train/rgb/0.png"])
    (tmp_path / "all/train/rgb/0.png").write_bytes(b"")
    assert run(tmp_path / "all").seen == []


def test_place__maps_of_another_origin_stay(tmp_path):
    photographs(tmp_path, ["train/rgb/0.png", "train/rgb/1.png"])
    (tmp_path / "train/instance").mkdir()
    map_files.write(tmp_path / "train/instance/0.png", b"mine")
    with pytest.raises(engine.UserError, match="maps of another origin"):
        run(tmp_path)
    run(tmp_path, tmp_path / "out")
    with pytest.raises(engine.UserError, match="recipe was fake, is regions"):
        run(tmp_path, tmp_path / "out", settings={"recipe": "regions"})
    assert (tmp_path / "train/instance/0.png").read_bytes() == b"mine"
    (tmp_path / "out/train/rgb").unlink()
    (tmp_path / "out/train/rgb").mkdir()
    with pytest.raises(engine.UserError, match="is there and is not"):
        run(tmp_path, tmp_path / "out")


def test_open_splits__refuses_two_images_with_one_map(tmp_path):
    photographs(tmp_path, ["train/rgb/a.png", "train/rgb/a.x.png", "train/rgb/a.jpg"])
    with pytest.raises(engine.UserError, match="share the map a.png"):
        run(tmp_path)
    with pytest.raises(engine.UserError, match="there is no folder"):
        run(tmp_path / "none", tmp_path / "out")


# ------------------------------------------------------------------------------------------ faults


def test_run__after_a_signal_the_batch_is_written_and_the_rest_follows(tmp_path):
    photographs(tmp_path, [f"train/rgb/{i}.png" for i in range(7)])
    run(tmp_path, tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM)
    with labelling.Signals() as signals:
        recipe = Fake(lambda seen: len(seen) == 4 and os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(labelling.Stopped, match="15"):
            run(tmp_path, tmp_path / "out", recipe, signals=signals)
    assert len(recipe.seen) == 4
    for g in MAPS:
        assert len(list((tmp_path / f"out/train/{g}").glob("*.png"))) == 4
    assert signal.getsignal(signal.SIGTERM) == before
    run(tmp_path, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


@pytest.mark.parametrize("call", ["replace", "write"])
def test_run__a_full_disk_is_one_line_and_leaves_nothing_half_written(call, tmp_path, monkeypatch):
    photographs(tmp_path, [f"train/rgb/{i}.png" for i in range(6)])
    run(tmp_path, tmp_path / "whole")

    class Full(io.FileIO):
        def write(self, data):
            super().write(data[:20])
            raise OSError(28, "No space left on device")

    def full(path, *args):
        if "3.png" in str(path):
            raise OSError(28, "No space left on device")
        return replace(path, *args)

    replace, real = os.replace, open
    with monkeypatch.context() as patch:
        if call == "replace":
            patch.setattr(os, "replace", full)
        else:
            broken = lambda p, m="r": Full(p, m) if "3.png" in str(p) else real(p, m)  # noqa: E731
            patch.setattr(map_files, "open", broken, raising=False)
        with pytest.raises(OSError, match=r"cannot write \S*3.png: No space left on device. All"):
            run(tmp_path, tmp_path / "out")
    there = tree(tmp_path / "out")
    whole = tree(tmp_path / "whole")
    assert not [name for name in there if name.endswith(".tmp")]
    assert there.items() <= whole.items() and "train/instance/3.png" not in there
    run(tmp_path, tmp_path / "out")
    assert tree(tmp_path / "out") == whole


def test_main__a_folder_that_cannot_be_made_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_label.regions, "require", lambda: None)
    photographs(tmp_path, ["train/rgb/0.png"])
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", "/proc/nothing"):
        argv = [str(tmp_path), "--recipe", "regions", "--output", str(out), "--device", "cpu"]
        with pytest.raises(OSError, match=f"cannot write {out}/pseudo_label.json: ") as error:
            pseudo_label.main(argv)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_run__killed_at_ten_random_moments_and_continued_is_undisturbed(kind, tmp_path):
    torch.set_num_threads(1)
    photographs(tmp_path, [f"train/rgb/c/{i}.png" for i in range(60)])
    (tmp_path / "train/rgb/c/17.png").write_bytes(b"no image")
    run(tmp_path, tmp_path / "whole")

    def child(slow):
        with labelling.Signals() as signals:
            try:
                run(tmp_path, tmp_path / "out", Fake(lambda _: time.sleep(slow)), signals=signals)
            except labelling.Stopped as stop:
                os._exit(stop.args[0])
        os._exit(0)

    draw, ends = random.Random(0), []
    for kill in range(11):
        process = multiprocessing.get_context("fork").Process(target=child, args=(0.02,))
        process.start()
        if kill < 10:
            time.sleep(draw.uniform(0.01, 0.08))
            os.kill(process.pid, kind)
        process.join(60)
        ends.append(abs(process.exitcode))
    assert ends[-1] == 0 and ends.count(kind) >= 8, ends
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


# ---------------------------------------------------------------------------------- command line


def test_main__regions_of_bare_photographs_train_cfmae(tmp_path, capsys):
    pytest.importorskip("skimage")
    photographs(tmp_path / "in", [f"{i}.png" for i in range(8)])
    (tmp_path / "in/8.png").write_bytes(b"no image")
    out, few = str(tmp_path / "out"), ["--workers", "0", "--clusters", "4", "--device", "cpu"]
    argv = [str(tmp_path / "in"), "--output", out, "--recipe", "regions", *few]
    assert pseudo_label.main(argv) == 0
    said = capsys.readouterr().out
    assert "train: 9 images labelled" in said and "1 of them unreadable" in said
    assert json.loads((tmp_path / "out/pseudo_label.json").read_text()) == {
        "recipe": "regions", "clusters": 4, "cluster_images": 10000,
    }  # fmt: skip
    assert pseudo_label.main(argv) == 0 and "nothing left" in capsys.readouterr().out
    with pytest.raises(engine.UserError, match="clusters was 4, is 5"):
        pseudo_label.main([*argv, "--clusters", "5"])
    torch.set_num_threads(1)
    cfmae.main(
        f"--data {out} --model tiny --steps 1 --batch-size 4 --image-size 32 --workers 0 "
        f"--epochs 2 --device cpu --output {tmp_path}/run".split()
    )
    assert (tmp_path / "run/last.pt").exists()


def test_main__after_a_signal_the_status_and_a_line_say_so(tmp_path, monkeypatch, capsys):
    photographs(tmp_path, [f"train/rgb/{i}.png" for i in range(4)])
    stop = Fake(lambda seen: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr(pseudo_label, "open_recipe", lambda *args: stop)
    argv = [str(tmp_path), "--workers", "0", "--device", "cpu", "--batch-size", "2"]
    assert pseudo_label.main(argv) == 128 + 15 and len(stop.seen) == 2
    assert capsys.readouterr().out == "stopped; the same command continues\n"


def test_main__two_ranks_give_what_one_gives(tmp_path):
    pytest.importorskip("skimage")
    photographs(tmp_path, [f"train/rgb/{i}.png" for i in range(9)])
    flags = ["--recipe", "regions", "--clusters", "4", "--workers", "0", "--device", "cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = [sys.executable, *torchrun, "-m", "tools.pseudo_label", str(tmp_path), *flags]
    done = subprocess.run(
        [*argv, "--output", str(tmp_path / "two")], cwd=Path(__file__).parents[2], text=True,
        capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "rank 0: 5 images labelled" in done.stdout and "rank 1: 4 images" in done.stdout
    assert pseudo_label.main([str(tmp_path), *flags, "--output", str(tmp_path / "one")]) == 0
    assert tree(tmp_path / "one") == tree(tmp_path / "two")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--clusters", "256"], "--clusters takes 1 to 255"),
        (["--batch-size", "0"], "--batch-size and --cluster-images at least 1"),
        (["--recipe", "seem"], "invalid choice: 'seem'"),
        (["--clusters", "200", "--recipe", "regions"], "--clusters 200 is more than that"),
    ],
)
def test_main__refuses(flags, words, tmp_path):
    if "regions" in flags:
        pytest.importorskip("skimage")
    photographs(tmp_path, ["train/rgb/0.png"])
    with pytest.raises(engine.UserError, match=words):
        pseudo_label.main([str(tmp_path), "--workers", "0", "--device", "cpu", *flags])


@pytest.mark.parametrize("recipe, package, pip", [
    ("regions", "skimage", "scikit-image"), ("panoptic", "transformers", "transformers"),
])  # fmt: skip
def test_main__names_the_package_a_recipe_needs_and_leaves_no_trace(
    recipe, package, pip, tmp_path, monkeypatch
):
    photographs(tmp_path / "in", ["0.png"])
    monkeypatch.setitem(sys.modules, package, None)
    argv = [str(tmp_path / "in"), "--recipe", recipe, "--output", str(tmp_path / "out")]
    with pytest.raises(engine.UserError, match=f"pip install {pip}"):
        pseudo_label.main([*argv, "--device", "cpu"])
    assert not (tmp_path / "out").exists()


def test_parser__names_of_the_models_and_numbers():
    args = pseudo_label.parser().parse_args(["x"])
    assert args.recipe == "panoptic" and args.things == 80  # CFMAE App. B: 80 things, 53 stuff
    assert args.clusters == 133  # as many as cfmae.py takes a folder to have
