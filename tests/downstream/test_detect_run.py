"""Detection runs: resume, ranks, micro-batches, bad input, folders of COCO's format."""

import engine  # first: it sets how threads wait

import json
from unittest import mock

import pytest
import torch

import tiny_run
from coco_folder import content, write
from data import UserError
from downstream import detect, encoders, objects
from engine.ranks import World
from shapes import ShapeScenes
from tiny_run import lines, same_result

pytest.importorskip("pycocotools")
pytestmark = pytest.mark.slow

SMALL = (
    "--data shapes --model tiny --method mae --encoder tiny --image-size 32 --batch-size 4 "
    "--iterations 8 --dim 8 --proposals 20 --boxes 8 --workers 0 --device cpu --precision fp32 "
    "--log-every 2 --val-samples 4 --window 2 --everywhere 2 --shifted --relative-bias"
).split()
CURVE = ("loss", "loss_objectness", "loss_proposals", "loss_class", "loss_box", "loss_mask")


def few(*args):
    """ShapeScenes with eight samples, so that an epoch has two steps."""
    return ShapeScenes(*args[:6], 8)


def train(out, *flags, source=(), remove=()):
    argv = [f for f in SMALL if f not in remove]
    if source:
        at = argv.index("--method")
        argv[at : at + 4] = source
    with mock.patch.object(objects, "ShapeScenes", few):
        detect.main([*map(str, argv), "--output", str(out), *map(str, flags)])


def run(out, *flags, **kwargs):
    train(out, *flags, **kwargs)
    return json.loads((out / "result.json").read_text())


def curve(out):
    """Losses of the first four steps. Scores are nearly tied at the start, and rounding, which the
    optimizer makes larger, may turn the order of two boxes and with it which ones are trained.
    """
    return [[r[k] for k in CURVE] for r in lines(out)[:2]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    return out, run(out)


def test_run__leaves_scores_predictions_and_a_picture(whole):
    out, result = whole
    assert list(result["box"]) == list(result["mask"]) and len(result["box"]) == 12
    assert result["images"] == 8 and result["unreadable"] == 0 and result["method"] == "mae"
    assert set(result["categories"]) == set(detect.Scenes("val", 32, False).classes)
    found = json.loads((out / "predictions.json").read_text())
    assert len(found) == result["predictions"]
    assert (out / "preview-0000008.png").exists()
    assert len((out / "categories.csv").read_text().splitlines()) == 11
    assert engine.load(out / "last.pt", "detect")["facts"]["categories"][0] == [1, "disc"]


def test_run__resumes_bit_for_bit_without_the_pretraining_file(tmp_path):
    tiny_run.train(tmp_path / "pre", "--steps", 2)
    source = ("--checkpoint", tmp_path / "pre/last.pt")
    flags = ("--drop-path", 0.2)
    first = run(tmp_path / "whole", *flags, source=source)
    train(tmp_path / "parts", *flags, "--steps", 4, source=source)
    (tmp_path / "pre/last.pt").unlink()
    second = run(tmp_path / "parts", *flags, "--resume", source=source)
    assert same_result(tmp_path / "whole", tmp_path / "parts")
    same = ("box", "mask", "predictions")
    assert [first[k] for k in same] == [second[k] for k in same]
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    with mock.patch.object(objects, "ShapeScenes", few):
        detect.main(["evaluate", str(tmp_path / "parts"), "--device", "cpu", "--workers", "0"])
    again = json.loads((tmp_path / "parts/evaluation/result.json").read_text())
    assert [again[k] for k in same] == [second[k] for k in same]
    # the run is a source itself, at its own size, and its positions are still pre-training's
    encoder, described, _ = encoders.open_encoder(tmp_path / "parts/last.pt", image_size=64)
    assert described["trained_size"] == [32, 32] and encoder.grid == (8, 8)
    with pytest.raises(UserError, match="--window was 2, is 4"):
        train(tmp_path / "parts", *flags, "--resume", "--window", 4, source=source)


def test_run__starts_from_the_checkpoint_or_from_random_weights(tmp_path):
    tiny_run.train(tmp_path / "pre", "--steps", 2)
    source, key = ("--checkpoint", tmp_path / "pre/last.pt"), "encoder.blocks.0.attn.qkv.weight"
    old = tiny_run.checkpoint(tmp_path / "pre")["model"][key]
    for name, flags in (("loaded", ()), ("random", ("--random",))):
        train(tmp_path / name, "--steps", 1, "--lr", 1e-9, *flags, source=source)
        new = tiny_run.checkpoint(tmp_path / name)["model"][key]
        assert torch.allclose(new, old, atol=1e-6) == (name == "loaded")


def test_run__micro_batches_give_the_same_curve(whole, tmp_path):
    train(tmp_path, "--micro-batch", 1)
    want = torch.tensor(curve(whole[0]))
    torch.testing.assert_close(torch.tensor(curve(tmp_path)), want, rtol=1e-4, atol=1e-6)


def test_run__two_ranks_give_the_same_curve_and_scores(whole, tmp_path):
    tiny_run.launch(2, tmp_path / "store", train, tmp_path / "two")
    found, want = (torch.tensor(curve(out)) for out in (tmp_path / "two", whole[0]))
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)
    result = json.loads((tmp_path / "two/result.json").read_text())
    assert result["images"] == 8 and abs(result["predictions"] - whole[1]["predictions"]) <= 8


# ------------------------------------------------------------------------------------ COCO's format

FOLDER = ("--image-size", 64, "--batch-size", 2, "--iterations", 4, "--micro-batch", 2)


def test_folder__an_odd_one_trains_and_is_scored(tmp_path):
    write(tmp_path / "coco")
    val = content()
    val["images"] = val["images"][:3]
    val["annotations"] = [a for a in val["annotations"] if a["image_id"] >= 498]
    write(tmp_path / "coco", val, "val")
    result = run(tmp_path / "a", "--data", tmp_path / "coco", *FOLDER, "--workers", 1)
    assert result["images"] == 3 and list(result["categories"]) == ["dot", "bar", "disc"]
    assert result["categories"]["bar"]["objects"] == 2  # without the crowd
    (tmp_path / "coco/annotations/instances_train2017.json").unlink()  # the list is frozen
    train(tmp_path / "a", "--data", tmp_path / "coco", *FOLDER, "--resume")
    flags = ("--val-images", tmp_path / "coco/val2017")
    flags += ("--val-json", tmp_path / "coco/annotations/instances_val2017.json")
    detect.main(["evaluate", str(tmp_path / "a"), *map(str, flags), "--device", "cpu"])
    again = json.loads((tmp_path / "a/evaluation/result.json").read_text())
    assert again["box"] == result["box"]


def test_evaluate__another_folder_s_own_val_split(tmp_path):
    """Not the files that the run was told to take."""
    for name, split in (("coco", "train"), ("coco", "val"), ("other", "val")):
        write(tmp_path / name, split=split)
    path = tmp_path / "other/annotations/instances_val2017.json"
    few = json.loads(path.read_text())
    few["images"] = few["images"][:3]
    kept = {image["id"] for image in few["images"]}
    few["annotations"] = [a for a in few["annotations"] if a["image_id"] in kept]
    path.write_text(json.dumps(few))
    own = tmp_path / "coco/annotations/instances_val2017.json"
    named = ("--val-images", tmp_path / "coco/val2017", "--val-json", own)
    train(tmp_path / "a", "--data", tmp_path / "coco", *named, *FOLDER, "--steps", 1)
    flags = ("--data", tmp_path / "other", "--device", "cpu", "--workers", "0")
    detect.main(["evaluate", str(tmp_path / "a"), *map(str, flags)])
    found = json.loads((tmp_path / "a/evaluation/result.json").read_text())
    assert found["images"] == 3 and found["val_json"] is None


def test_open_split__every_setting_reaches_the_crops(tmp_path):
    write(tmp_path / "coco")
    write(tmp_path / "coco", split="val")
    flags = "--method cfmae --encoder tiny --image-size 64 --scale-min 0.4 --scale-max 1.5 --seed 3"
    flags += f" --mean 0.5,0.4,0.3 --data {tmp_path / 'coco'}"
    for kind in ("lsj", "short"):
        argv = [*flags.split(), "--augmentation", kind]
        cfg = engine.parse(detect.Config, detect.PRESETS, "", argv)
        for split in ("train", "val"):
            found = detect.open_split(cfg, World("cpu", "fp32"), tmp_path / kind, split)
            jitter = found.jitter
            assert (jitter.size, jitter.kind, jitter.scales) == (64, kind, (0.4, 1.5))
            assert jitter.train == (split == "train") and jitter.colour == (128, 102, 76)
            assert found.folder.endswith(f"{split}2017") and found.seed == 3 and len(found) == 5


def test_folder__named_files_without_val(tmp_path, capsys):
    write(tmp_path / "coco")
    path = tmp_path / "coco/annotations/instances_train2017.json"
    flags = ("--train-images", tmp_path / "coco/train2017", "--train-json", path)
    train(tmp_path / "a", "--data", tmp_path / "coco", *flags, *FOLDER)
    assert "has no val split: nothing is evaluated" in capsys.readouterr().out
    assert not (tmp_path / "a/result.json").exists()


def test_folder__mistakes_are_one_line_before_training(tmp_path):
    write(tmp_path / "coco")
    (tmp_path / "coco/train2017/2.png").unlink()
    with pytest.raises(UserError, match=r"1 of 5 images are not in .*: 2.png"):
        train(tmp_path / "a", "--data", tmp_path / "coco", *FOLDER)
    given = content()
    given["images"][0]["width"] = 61  # and the file will have 64
    first = given["images"][0]["id"]
    given["annotations"] = [a for a in given["annotations"] if a["image_id"] != first]
    write(tmp_path / "coco", given)
    (tmp_path / "coco/train2017/0.png").write_bytes(
        (tmp_path / "coco/train2017/2.png").read_bytes()
    )
    with pytest.raises(UserError, match=r"1 of 5 checked samples do not fit"):
        train(tmp_path / "b", "--data", tmp_path / "coco", *FOLDER)
    with pytest.raises(UserError, match="cannot read .*instances_train2017.json"):
        train(tmp_path / "c", "--data", tmp_path / "nowhere", *FOLDER)
