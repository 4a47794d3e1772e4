"""Segmentation runs: resume, ranks, methods, bad input, preparation of data sets."""

import json
import sys
from unittest import mock

import data
import engine
import numpy as np
import pytest
import tiny_run
import torch
from common import sincos_2d
from data import UserError
from downstream import encoders, pixels, prepare, segment
from PIL import Image
from test_finetune import run as finetune
from test_finetune import write_checkpoint
from test_pixels import write_voc
from test_segment import SMALL, config, folder
from tiny_run import lines, same_result
from tools.export import export

pytestmark = pytest.mark.slow


def train(out, *flags, source=()):
    """Train on 40 scenes in this process, then evaluate on 40."""
    flags = [*SMALL, "--output", out, *flags]
    if source:
        at = flags.index("--method")
        flags[at : at + 4] = source
    with tiny_run.short_epochs():
        segment.main([str(f) for f in flags])


def run(out, *flags, source=()):
    train(out, *flags, source=source)
    return json.loads((out / "result.json").read_text())


def evaluate(out, *flags):
    with tiny_run.short_epochs():
        segment.main(["evaluate", str(out), "--workers", "0", "--device", "cpu", *flags])
    return json.loads((out / "evaluation/result.json").read_text())


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    at = tmp_path_factory.mktemp("pretrained")
    tiny_run.train(at, "--steps", 4)
    return at / "last.pt"


@pytest.mark.parametrize("protocol", ["upernet", "linear"])
def test_run__resumes_bit_for_bit_without_the_pretraining_file(pretrained, tmp_path, protocol):
    copy, flags = tmp_path / "copy.pt", ("--protocol", protocol, "--save-epochs", 1)
    copy.write_bytes(pretrained.read_bytes())
    source = ("--checkpoint", copy)
    whole = run(tmp_path / "whole", *flags, source=source)
    run(tmp_path / "parts", *flags, "--steps", 8, source=source)
    copy.unlink()
    parts = run(tmp_path / "parts", *flags, "--resume", source=source)
    assert same_result(tmp_path / "whole", tmp_path / "parts") and whole == parts
    assert lines(tmp_path / "whole") == lines(tmp_path / "parts")
    assert (tmp_path / "parts" / "preview-0000020.png").exists()
    assert evaluate(tmp_path / "parts") == whole
    assert evaluate(tmp_path / "parts", "--evaluation", "whole")["evaluation"] == "whole"
    trained, old = (tiny_run.checkpoint(p.parent)["model"] for p in
                    (tmp_path / "whole" / "last.pt", pretrained))  # fmt: skip
    same = torch.equal(trained["encoder.blocks.0.attn.qkv.weight"],
                       old["encoder.blocks.0.attn.qkv.weight"])  # fmt: skip
    assert same == (protocol == "linear")


def test_run__random_weights_in_a_checkpoints_architecture(pretrained, tmp_path):
    flags = ("--protocol", "linear", "--steps", 1, "--random")
    run(tmp_path, *flags, source=("--checkpoint", pretrained))
    new, old = (tiny_run.checkpoint(p)["model"] for p in (tmp_path, pretrained.parent))
    key = "encoder.blocks.0.attn.qkv.weight"
    assert new[key].shape == old[key].shape and not torch.equal(new[key], old[key])


@pytest.mark.parametrize("method", ["semanticmim", "mcmae", "coma_dyvit"])
def test_run__any_method_on_a_crop_that_is_not_square(tmp_path, method):
    size = ("--image-size", 32, "--crop-width", 64, "--iterations", 3)
    result = run(tmp_path, *size, source=("--method", method, "--encoder", "tiny"))
    assert result["images"] == 40 and result["crop"] == [32, 64] and 0 < result["mIoU"] < 1


def test_trained_size__through_classification_upernet_and_export(tmp_path):
    """The grid that pre-training saw goes through a chain of runs."""
    path = write_checkpoint(tmp_path, "cfmae")
    pre, description, _ = encoders.open_encoder(checkpoint=path)
    trained = tuple(description["trained_size"])
    finetune("--checkpoint", path, "--image-size", 48, "--batch-size", 8, "--steps", 1,
             "--no-train-position", "--output", tmp_path / "a")  # fmt: skip
    tuned, description, _ = encoders.open_encoder(checkpoint=tmp_path / "a/last.pt")
    assert tuned.grid == (6, 6) and tuple(description["trained_size"]) == trained == (32, 32)
    assert torch.equal(tuned.pos_embed, sincos_2d(pre.embed_dim, 6, 6, trained=(4, 4)))
    source = ("--checkpoint", tmp_path / "a/last.pt")
    train(tmp_path / "b", "--steps", 1, "--image-size", 64, "--crop-width", 80, source=source)
    export(tmp_path / "b/last.pt", tmp_path / "c.pt")
    for name in ("b/last.pt", "c.pt"):
        encoder, description, _ = encoders.open_encoder(checkpoint=tmp_path / name)
        assert encoder.grid == (8, 10) and tuple(description["trained_size"]) == trained
        assert torch.equal(encoder.pos_embed, sincos_2d(pre.embed_dim, 8, 10, trained=(4, 4)))


def test_run__mcmaes_relative_bias_goes_to_another_crop(tmp_path):
    """A bias that is its offset: near ones keep theirs to the digit, the farthest its own."""
    flags = ("--image-size", 64, "--relative-bias", "--no-train-position", "--iterations", 1)
    train(tmp_path / "a", *flags, source=("--method", "mcmae", "--encoder", "tiny"))
    content = tiny_run.checkpoint(tmp_path / "a")
    tables = [k for k in content["model"] if k.endswith("relative_position_bias_table")]
    offsets = torch.arange(-7.0, 8)  # on the crop's grid, 8 x 8: 10 a row down, 1 a column
    for k in tables:
        content["model"][k][:] = (10 * offsets[:, None] + offsets).view(-1, 1)
    engine.save(tmp_path / "a" / "last.pt", content)
    assert len(tables) == 3
    source = {"checkpoint": tmp_path / "a" / "last.pt"}
    for h, w in ((12, 8), (8, 8), (6, 10), (16, 5)):
        encoder, _, _ = encoders.open_encoder(**source, image_size=(8 * h, 8 * w))
        for block in encoder.blocks3:
            found = block.attn.relative_position_bias_table.detach()
            for x in found.view(2 * h - 1, 2 * w - 1, -1).unbind(2):
                near = x[h - 2 : h + 1, w - 2 : w + 1]
                torch.testing.assert_close(near, 10 * offsets[6:9, None] + offsets[6:9])
                down, along = x[:, w - 1] / 10, x[h - 1]
                for line, n in ((down, h), (along, w)):
                    assert (line.diff() > 0).all()
                    assert n < 8 or line[-1] == pytest.approx(7, abs=0.25)
                assert not (x - down[:, None] * 10 - along).abs().gt(1e-3).any()
    flags = ("--image-size", 96, "--crop-width", 64, "--iterations", 1)
    result = run(tmp_path / "b", *flags, source=("--checkpoint", tmp_path / "a" / "last.pt"))
    assert result["crop"] == [96, 64]


def test_run__batchnorms_samples_are_said_and_kept(tmp_path):
    flags = ("--iterations", 2, "--steps", 1)
    train(tmp_path, *flags, "--micro-batch", 4)
    assert tiny_run.checkpoint(tmp_path)["facts"]["norm_batch"] == 4
    with pytest.raises(UserError, match="BatchNorm saw 4 samples at a time in .* would see 8"):
        train(tmp_path, *flags, "--resume", "--steps", 2)
    train(tmp_path, *flags, "--resume", "--steps", 2, "--micro-batch", 5)  # of 8: 4 at a time
    assert tiny_run.checkpoint(tmp_path)["step"] == 2


def test_run__the_probe_may_change_its_micro_batch(tmp_path):
    flags = ("--protocol", "linear", "--iterations", 2)
    train(tmp_path, *flags, "--steps", 1, "--micro-batch", 4)
    train(tmp_path, *flags, "--steps", 2, "--resume")
    assert tiny_run.checkpoint(tmp_path)["step"] == 2


@pytest.mark.parametrize("source", ["shapes", "folder"])
def test_main__trains_on_random_crops_at_the_recipes_rate_and_looks_at_centres(
    tmp_path, monkeypatch, source
):
    seen = {True: [], False: []}  # by `training`; predict is what both call
    forward, predict = segment.Segmenter.forward, segment.evaluate
    monkeypatch.setattr(
        segment.Segmenter, "forward", lambda *a: seen[True].append(a[1]) or forward(*a)
    )
    monkeypatch.setattr(segment, "evaluate", lambda *a: seen[False].append(a[1]) or predict(*a))
    flags = ["--iterations", 8, "--steps", 2, "--log-every", 1, "--crop-width", 48]
    if source == "folder":
        for split, n in (("train", 8), ("val", 4)):
            folder(tmp_path, [(60, 40 + 8 * i) for i in range(n)], split)
            for i in range(n):
                noise = np.random.default_rng(i).integers(0, 256, (60, 40 + 8 * i, 3), np.uint8)
                Image.fromarray(noise).save(tmp_path / split / "rgb" / f"{i}.png")
        flags += ["--data", tmp_path, "--classes", 3]
    train(tmp_path / "out", *flags)
    for batch in seen[True] + seen[False]:
        assert batch["rgb"].shape[2:] == batch["semantic"].shape[1:] == (32, 48)
    if source == "folder":
        cfg = config(*flags[6:])
        for split, training in (("train", True), ("val", False)):
            dataset, found = (
                data.FolderDataset(
                    str(tmp_path),
                    split,
                    None,
                    granularities=("rgb", "semantic"),
                    semantic_classes=3,
                ),
                seen[training][0],
            )
            for k, seed in enumerate(found["seed"].tolist()):
                views = (pixels.Augment(cfg, training)(*dataset.load(i), seed)
                         for i in range(len(dataset)))  # fmt: skip
                assert any(torch.equal(v["rgb"], found["rgb"][k]) for v in views)
    log = [json.loads(x) for x in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    peak = config().lr  # no warm-up: a tenth of 8 steps is none
    assert [r["lr"] for r in log if "lr" in r] == pytest.approx([peak, peak * 7 / 8])
    assert set(log[0]["val"]) == {"loss", "loss_main", "pixel_accuracy"}


def test_run__learns_labels_that_colours_tell(tmp_path):
    folder(tmp_path, [(40, 40)] * 12, "train")
    folder(tmp_path, [(40, 60), (60, 40), (40, 40)])
    flags = ("--data", tmp_path, "--classes", 3, "--batch-size", 12, "--iterations", 30)
    assert run(tmp_path / "out", *flags)["mIoU"] > 0.9


def train_both(out):
    train(out / "linear", "--protocol", "linear", "--iterations", 8)
    train(out / "upernet", "--iterations", 4)


def test_run__two_ranks(tmp_path):
    tiny_run.launch(2, tmp_path / "store", train_both, tmp_path)
    one = run(tmp_path / "one", "--protocol", "linear", "--iterations", 8)
    two = json.loads((tmp_path / "linear" / "result.json").read_text())
    assert one["mIoU"] == pytest.approx(two["mIoU"], rel=1e-3) and two["images"] == 40
    a, b = ([r["loss"] for r in lines(tmp_path / n)] for n in ("one", "linear"))
    assert a == pytest.approx(b, rel=1e-5)
    counts = [v for k, v in tiny_run.checkpoint(tmp_path / "upernet")["model"].items()
              if k.endswith("num_batches_tracked")]  # fmt: skip
    assert counts and all(n == 4 for n in counts)  # DDP's passes before the first step left no mark
    # each rank has its own means in BatchNorm; those that are saved, rank 0's, are what is scored
    two = json.loads((tmp_path / "upernet" / "result.json").read_text())
    saved = evaluate(tmp_path / "upernet")
    assert two["images"] == saved["images"] == 40
    for name in ("mIoU", "pixel_accuracy", "mean_accuracy"):
        assert two[name] == pytest.approx(saved[name], rel=1e-3), name


def make_older(out):
    """Rewrite a run's checkpoint as earlier versions wrote it: all in the config, no facts."""
    path = out / "last.pt"
    content = torch.load(path, weights_only=True)
    facts = content.pop("facts")
    content["config"] |= {"description": json.dumps(facts["description"]), "patch_size": 4}
    content["config"] |= {"norm_batch": facts.get("norm_batch")}
    engine.save(path, content)


def test_run__older_checkpoints_go_on_are_evaluated_and_are_sources(pretrained, tmp_path):
    copy, flags = tmp_path / "copy.pt", ("--iterations", 4, "--mean", "0.5,0.4,0.3")
    copy.write_bytes(pretrained.read_bytes())
    source = ("--checkpoint", copy)
    whole = run(tmp_path / "whole", *flags, source=source)
    run(tmp_path / "parts", *flags, "--steps", 2, source=source)
    copy.unlink()
    make_older(tmp_path / "parts")
    with pytest.raises(UserError, match="BatchNorm saw 8 samples at a time in .* would see 4"):
        train(tmp_path / "parts", *flags, "--resume", "--micro-batch", 4, source=source)
    assert run(tmp_path / "parts", *flags, "--resume", source=source) == whole
    assert same_result(tmp_path / "whole", tmp_path / "parts")
    content = tiny_run.checkpoint(tmp_path / "parts")
    assert content["facts"]["description"]["mean"] == [0.5, 0.4, 0.3]
    assert "description" not in content["config"] and "norm_batch" not in content["config"]
    make_older(tmp_path / "parts")
    assert evaluate(tmp_path / "parts") == whole
    flags = ("--iterations", 1, "--protocol", "linear")
    train(tmp_path / "next", *flags, source=("--checkpoint", tmp_path / "parts" / "last.pt"))
    assert "facts" not in torch.load(tmp_path / "parts" / "last.pt", weights_only=True)


@pytest.mark.parametrize("content", [{}, [1], {"config": {"description": "{"}}, {"facts": 3}])
def test_run__a_folder_whose_checkpoint_is_of_something_else(tmp_path, content):
    torch.save(content, tmp_path / "last.pt")
    with pytest.raises(UserError, match="last.pt is no checkpoint of this project"):
        train(tmp_path, "--resume")


# ---------------------------------------------------------------------------------- bad input, data


@pytest.mark.parametrize("flags, words", [
    ("--method cfmae --encoder huge", "--encoder huge: cfmae has tiny"),
    ("--checkpoint none.pt --method cfmae", "one of --checkpoint, --init, --method"),
    ("--image-size 36", "--image-size 36 .* stride, 8, .* nearest: 32 or 40"),
    ("--crop-width 8", "--crop-width 8 .* nearest: 16"),
    ("--protocol linear --layer 5", "--layer 5: this encoder has layers 1 to 4"),
    ("--epochs 3", "--iterations and --epochs"),
    ("--classes 10", r"--classes 10 is outside \[16, 255\]"),
    ("--batch-size 1", "two samples at a time"),
    ("--layer-decay 1.5", r"outside \[0, 1\]"),
    ("--base-lr 1", "unrecognized arguments: --base-lr 1"),
    ("--patch-size 16", "unrecognized arguments: --patch-size 16"),
    ("--description {}", "unrecognized arguments: --description"),
    ("--scale-min 3", "--scale-min is above --scale-max"),
    ("--loss-size 0", "--loss-size 0 must be above 0"),
    ("--iterations 0", "--iterations 0 must be above 0"),
    ("--data nowhere", "there is no folder nowhere"),
    ("--evaluation half", "invalid choice: 'half'"),
])  # fmt: skip
def test_run__bad_input_is_one_message(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        segment.main([*SMALL, "--output", str(tmp_path / "out"), *flags.split()])


@pytest.mark.parametrize("split", ["train", "val"])
def test_run__maps_that_do_not_fit_are_one_message(tmp_path, split):
    """By the run's own --classes; the other kinds of misfits are test_data_files.py's."""
    for part in ("train", "val"):
        folder(tmp_path, [(40, 40)] * 4, part)
    wrong = tmp_path / split / "semantic" / "1.png"
    Image.fromarray(np.full((40, 40), 9, np.uint8)).save(wrong)
    flags = ["--data", str(tmp_path), "--classes", "3", "--output", str(tmp_path / "out")]
    words = "1.png: id 9 is neither below semantic_classes = 3 nor 255"
    with pytest.raises(UserError, match=words):
        segment.main([*SMALL, *flags, "--batch-size", "4", "--iterations", "1"])


def test_run__val_alone_is_one_message(tmp_path):
    folder(tmp_path, [(40, 40)] * 4, "val")
    flags = ["--data", str(tmp_path), "--classes", "3", "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="train"):
        segment.main([*SMALL, *flags])


def test_evaluate__bad_input_exits_with_2(tmp_path, capsys):
    root, run, odd = (tmp_path / name for name in ("root", "run", "odd"))
    folder(root, [(40, 40)] * 4, "train")
    train(run, "--data", root, "--classes", 3, "--batch-size", 4, "--iterations", 1)
    checkpoint = tiny_run.checkpoint(run)
    odd.mkdir()
    engine.save(odd / "last.pt", checkpoint | {"config": checkpoint["config"] | {"colour": 1}})
    for argv, words in (
        ([tmp_path / "nowhere"], "no such file"),
        ([run], f"{root} has no val split"),
        ([run, "--data", root], f"{root} has no val split"),
        ([run, "--data", "shapes"], "classes"),
        ([run, "--workers", "-1"], "--workers -1 must be 0 or"),
        ([odd], "unknown here: colour"),
    ):
        with mock.patch.object(sys, "argv", ["segment", "evaluate", *map(str, argv)]):
            with pytest.raises(SystemExit) as end:
                engine.command("segment", segment.main)
        assert end.value.code == 2 and words in capsys.readouterr().err, argv
        assert not list(tmp_path.glob("*/evaluation/result.json")), argv


def test_prepare_ade__and_voc_give_our_layout(tmp_path):
    ade, voc = tmp_path / "ade", tmp_path / "voc"
    for part in ("training", "validation"):
        for kind in ("images", "annotations"):
            (ade / kind / part).mkdir(parents=True)
        Image.new("RGB", (3, 2)).save(ade / "images" / part / "a.jpg")
        ids = np.array([[0, 1, 150], [2, 0, 3]], np.uint8)
        Image.fromarray(ids).save(ade / "annotations" / part / "a.png")
    (ade / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tbuilding, edifice\n")
    write_voc(voc, aug=False)
    for split in ("train", "val"):
        ids = Image.fromarray(np.array([[0, 1, 20], [2, 255, 3]], np.uint8), mode="P")
        ids.putpalette(list(range(256)) * 3)
        ids.save(voc / "SegmentationClass" / f"{split}_1.png")
    jobs = ((prepare.prepare_ade, ade, 150), (prepare.prepare_voc, voc, 21))
    for function, source, classes in jobs:
        for _ in range(2):  # a second time changes nothing
            assert function([str(source), str(tmp_path / "out" / source.name)]) == 0
        for split in ("train", "val"):
            dataset = data.open_dataset(
                str(tmp_path / "out" / source.name), split, 32, 4, ("rgb", "semantic"), (1, 1),
                False, 0, label_stride=1, semantic_classes=classes)  # fmt: skip
            _, maps = dataset.load(0)
            first = [[255, 0, 149], [1, 255, 2]] if classes == 150 else [[0, 1, 20], [2, 255, 3]]
            assert maps["semantic"].tolist() == first
    names = (tmp_path / "out" / "ade" / "classes.txt").read_text()
    assert names == "wall\nbuilding, edifice\n"
    with pytest.raises(UserError, match="there is no folder"):
        prepare.prepare_voc([str(ade), str(tmp_path / "no")])
