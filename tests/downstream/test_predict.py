"""Predictions of photographs: what the run's own test says of them, nothing lost or mixed up."""

import csv
import dataclasses
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from test_finetune import parse, write_checkpoint
from test_segment import config as segment_config

import data
import engine
from downstream import finetune, photos, predict, segment, transfer
from downstream import evaluate as testing
from downstream.upernet import resize
from engine import UserError
from shapes import ShapeScenes

pytestmark = pytest.mark.slow


def save(folder, method, model, cfg, **facts):
    folder.mkdir(parents=True)
    state = {"format": 1, "method": method, "step": 1, "window": {}, "optimizer": {}}
    state |= {"config": dataclasses.asdict(cfg), "model": model.state_dict()}
    engine.save(folder / "last.pt", state | {"facts": {"description": cfg.described, **facts}})
    return folder


@pytest.fixture
def classifier(tmp_path):
    """A run whose head has large random weights, so that classes differ."""
    cfg = parse("--checkpoint", write_checkpoint(tmp_path, "mae"), "--crop-pct", "0.8")
    names = transfer.class_names("shapes")
    torch.manual_seed(3)
    model = finetune.build(cfg, names)[0]
    torch.nn.init.normal_(model.head.weight, std=3)
    return save(tmp_path / "run", "classify", model, cfg, classes=names)


@pytest.fixture
def segmenter(tmp_path):
    cfg = segment_config()
    torch.manual_seed(3)
    model = segment.build(cfg)
    return save(tmp_path / "run", "segment", model, cfg)


@pytest.fixture
def album(tmp_path):
    """Photographs of several sizes, two of one name, one of them turned by EXIF, and noise."""
    rng = np.random.default_rng(0)
    for name, (w, h) in {"a.jpg": (70, 50), "in/a.png": (50, 90), "in/b.jpg": (64, 64)}.items():
        (tmp_path / "album" / name).parent.mkdir(parents=True, exist_ok=True)
        cells = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
        image = Image.fromarray(cells).resize((w, h), Image.Resampling.BICUBIC)
        exif = Image.Exif()
        exif[0x0112] = 6 if name == "a.jpg" else 1  # a quarter turn
        image.save(tmp_path / "album" / name, quality=95, exif=exif)
    (tmp_path / "album" / "noise.jpg").write_bytes(b"noise")
    return tmp_path / "album"


def table(out):
    with open(out / "predictions.csv", newline="") as f:
        return list(csv.reader(f))


def run(*words):
    predict.main([*map(str, words), "--device", "cpu"])


def test_classify__probabilities_of_the_centre_crop(classifier, album, tmp_path, capsys):
    run(classifier, album, "--output", tmp_path / "out", "--micro-batch", 2)
    head, *rows = table(tmp_path / "out")
    assert head[:5] == ["image", "class_1", "probability_1", "class_2", "probability_2"]
    assert [row[0] for row in rows] == ["a.jpg", "in/a.png", "in/b.jpg"] and len(head) == 11
    said = capsys.readouterr()
    assert "predicted   3 images" in said.out and said.err.startswith("left out: noise.jpg: ")
    assert f"a.jpg: {rows[0][1]} {rows[0][2]}, {rows[0][3]}" in said.out
    model = testing.open_finetuned(classifier / "last.pt").eval()
    assert model.cfg.crop_pct == 0.8
    for name, *found in rows:
        root, listed = photos.photographs([album / name])
        whole = data.FolderDataset(root, "", listed, 32, train=False, crop_pct=0.8)
        rgb = whole[0, 0]["rgb"][None]
        assert rgb.shape == (1, 3, 32, 32)
        with torch.no_grad():
            p = model.classify({"rgb": model.normalize(rgb)}).softmax(1)[0]
        best = p.argsort(descending=True)[:5]
        assert found[::2] == [model.classes[i] for i in best]
        assert found[1::2] == [f"{x:.4f}" for x in p[best].tolist()]
    assert len({row[1] for row in rows}) > 1  # classes differ, so a mix-up would show


@pytest.mark.parametrize("few", [2, 8])
def test_likeliest__argmax_of_the_resized_logits(few):
    logits = torch.randn(1, 21, 9, 7, generator=torch.Generator().manual_seed(0))
    found = predict.likeliest(logits, (40, 33), few)
    assert found.dtype == torch.uint8 and found.unique().numel() > 15
    assert torch.equal(found.long(), resize(logits, (40, 33)).argmax(1)[0])


def test_segment__maps_at_the_size_of_the_photograph(segmenter, album, tmp_path, capsys):
    out = tmp_path / "out"
    run(segmenter, album / "a.jpg", album / "in", "--output", out)
    head, *rows = table(out)
    assert head[:3] == ["image", *ShapeScenes.SEMANTIC_NAMES[:2]] and len(rows) == 3
    model, cfg = segment.open_run(segmenter / "last.pt")
    for (name, *shares), size in zip(rows, [(50, 70), (50, 90), (64, 64)]):  # width, height
        with Image.open((out / name).with_suffix(".png")) as image:
            ids = np.asarray(image)
            assert image.mode == "P" and image.size == size
            colour = image.convert("RGB").getpixel((0, 0))
        wanted = predict.pictures.colorize(torch.tensor([[int(ids[0, 0])]]))[:, 0, 0]
        assert colour == tuple(wanted.tolist())
        counts = np.bincount(ids.ravel(), minlength=cfg.classes) / ids.size
        assert shares == [f"{x:.4f}" for x in counts]
        stem = (out / name).stem
        with Image.open((out / name).with_name(f"{stem}-overlay.jpg")) as over:
            assert over.size == size
    assert len(np.unique(ids)) > 1
    rgb = torch.from_numpy(np.asarray(Image.open(album / "in/a.png")).copy()).permute(2, 0, 1)
    size = predict.pixels.cover((90, 50), cfg.crop)  # not square, so windows slide over it
    assert cfg.evaluation == "slide" and size[0] > cfg.crop[0]
    with torch.no_grad():
        imgs = predict.pixels.scaled(rgb, size)[None]
        y = resize(predict.pixels.slide(model.eval().logits, imgs, cfg.crop), (90, 50))
    assert torch.equal(y.argmax(1)[0], torch.from_numpy(np.array(Image.open(out / "in/a.png"))))
    assert data.decode_map(np.fromfile(out / "in/b.png", np.uint8)).shape == (64, 64)
    content = torch.load(segmenter / "last.pt", weights_only=True)
    content["config"]["evaluation"] = "whole"  # the image at the crop's size, no windows
    engine.save(segmenter / "last.pt", content)
    run(segmenter, album / "in/a.png", "--output", tmp_path / "whole")
    with torch.no_grad():
        y = resize(model.logits(predict.pixels.scaled(rgb, cfg.crop)[None]), (90, 50))
    found = np.array(Image.open(tmp_path / "whole/a.png"))
    assert torch.equal(y.argmax(1)[0], torch.from_numpy(found))


def test_pixels_predict__each_image_gets_its_own_logits(segmenter):
    """Images of one size go through the network together."""
    model, cfg = segment.open_run(segmenter / "last.pt")
    generator = torch.Generator().manual_seed(0)
    sizes = ((40, 32), (32, 32), (40, 32))
    samples = [
        {"rgb": torch.randint(0, 256, (3, *s), dtype=torch.uint8, generator=generator)}
        for s in sizes
    ]
    world = engine.World("cpu", "fp32")
    found = list(predict.pixels.predict(model.eval(), samples, cfg, world))
    assert len(found) == 3
    for sample, logits in found:
        ((_, alone),) = predict.pixels.predict(model, [sample], cfg, world)
        assert logits.shape == (1, cfg.classes, *sample["rgb"].shape[1:])
        torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found[0][1], found[1][1], atol=1e-3)


def test_segment__refuses_two_images_of_one_name(segmenter, album, tmp_path):
    (album / "a.png").write_bytes((album / "in/a.png").read_bytes())
    with pytest.raises(UserError, match="a.jpg and a.png would both become"):
        run(segmenter, album, "--output", tmp_path / "out")


def test_segment__never_overwrites_a_file(segmenter, album):
    """A photograph, say, beside which its map would lie."""
    before = (album / "in/a.png").read_bytes()
    with pytest.raises(UserError, match="a.png exists: choose another --output"):
        run(segmenter, album / "in", "--output", album / "in")
    assert (album / "in/a.png").read_bytes() == before


@pytest.mark.parametrize("task", ["classifier", "segmenter"])
def test_predict__photographs_go_to_processes_that_start_afresh(
    task, album, tmp_path, monkeypatch, request
):
    def batches(photos, size, workers):
        pickle.dumps(photos)
        return iter(())

    monkeypatch.setattr(predict, "batches", batches)
    run(request.getfixturevalue(task), album, "--output", tmp_path / "out")


def test_predict__bad_input_is_one_line(classifier, album, tmp_path):
    write_checkpoint(tmp_path, "cfmae")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "predictions.csv").write_text("")
    out = ("--output", tmp_path / "out")
    for words, message in (
        ((tmp_path / "none.pt", album, *out), "none.pt: no such file"),
        ((tmp_path / "cfmae.pt", album, *out), "is of cfmae; wanted a run of finetune or segment"),
        ((classifier, tmp_path / "none", *out), "none: no such file or folder"),
        ((classifier, tmp_path / "full", *out), "no images .* in .*full"),
        ((classifier, album / "noise.jpg", *out), "none of 1 images can be read"),
        ((classifier, album, "--output", tmp_path / "full"), "choose another --output"),
        ((classifier, album, *out, "--micro-batch", "0"), "must be above 0"),
    ):
        with pytest.raises(UserError, match=message):
            run(*words)
    assert not (tmp_path / "out").exists()


def test_photographs__files_and_folders_once_in_order(album, monkeypatch):
    monkeypatch.chdir(album)
    root, listed = photos.photographs(["in/b.jpg", ".", "a.jpg"])
    assert root == str(album) and (listed.labels == -1).all()
    found = [listed.name(i) for i in range(len(listed))]
    assert [n.removeprefix("./") for n in found] == ["in/b.jpg", "a.jpg", "in/a.png", "noise.jpg"]
    assert photos.photographs(["in/b.jpg"])[0] == str(album / "in")
