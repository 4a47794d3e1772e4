"""Fine-tuning on clips: gradients, augmentation, views, runs, bad input."""

import dataclasses
import json
import math
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from test_clips import write_clip
from tiny_run import checkpoint, lines, same_result
from torch.testing import assert_close

import clips
import engine
import videomcmae
from data import collate
from downstream import finetune_clips as tuning
from motion import MovingScenes

pytestmark = pytest.mark.slow

SMALL = dict(image_size=16, frames=4, embed_dims="8,12,16", depths="1,1,2", num_heads=2,
             decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)  # fmt: skip
FLAGS = "--model tiny --workers 0 --device cpu --precision fp32 --val-samples 4 --log-every 1"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """A checkpoint of a small model that has not been trained."""
    cfg = videomcmae.Config(**{**videomcmae.PRESETS["tiny"], **SMALL})
    torch.manual_seed(1)
    model = videomcmae.VideoMCMAE(cfg)
    state = {"format": 1, "method": "videomcmae", "step": 1, "window": {}, "optimizer": {}}
    path = tmp_path_factory.mktemp("source") / "last.pt"
    engine.save(path, state | {"config": dataclasses.asdict(cfg), "model": model.state_dict()})
    return str(path)


def parse(*flags) -> tuning.Config:
    return engine.parse(tuning.Config, tuning.PRESETS, "", [*FLAGS.split(), *map(str, flags)])


def build(cfg) -> tuning.ClipClassifier:
    torch.manual_seed(0)
    model = tuning.build(cfg, tuning.class_names("shapes"))[0]
    torch.nn.init.normal_(model.head.weight)  # of small ones nothing but the head sees much
    return model


def batch_of(n: int = 4) -> dict:
    scenes = MovingScenes("train", 16, 4)
    return collate([scenes[0, i] for i in range(n)])


# ---------------------------------------------------------------------------------------- model


def test_classifier__gradients(source):
    flags = ("--mixup", 0.8, "--cutmix", 1, "--drop-path", 0.2)
    model = build(parse("--checkpoint", source, *flags))
    model(batch_of(), torch.zeros(()))[0].backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.any()]
    assert not missing


def test_build__takes_the_encoder_or_fresh_weights(source):
    own = engine.load(source, "videomcmae")["model"]
    model, words = tuning.build(parse("--checkpoint", source), ["a", "b"])
    state = model.encoder.state_dict()
    assert all(torch.equal(v, own[f"encoder.{k}"]) for k, v in state.items())
    assert "tensors loaded" in words
    other, words = tuning.build(parse("--checkpoint", source, "--random"), ["a", "b"])
    assert not torch.equal(other.encoder.patch_embed4.weight, model.encoder.patch_embed4.weight)
    assert "fresh weights" in words
    larger = parse("--checkpoint", source, "--image-size", 32, "--frames", 8)
    assert tuning.build(larger, ["a", "b"])[0].encoder.grid == (4, 4, 4)
    fresh = parse("--encoder", "tiny", "--drop-path", 0.3, "--head-std", 2e-5)
    assert (fresh.image_size, fresh.frames, fresh.patch_size) == (48, 8, 8)
    model = tuning.build(fresh, ["a", "b"])[0]
    weight, bound = model.encoder.patch_embed4.weight, (6 / (96 + 96)) ** 0.5  # Xavier's
    assert 0.97 * bound < weight.abs().max() <= bound and model.encoder.drop_path == 0.3
    assert model.head.weight.std().item() == pytest.approx(2e-5, rel=0.2)  # 192 numbers


def test_classifier__norm_after_the_mean_and_mean_of_probabilities(source):
    model, batch = build(parse("--checkpoint", source)).eval(), batch_of(6)
    x = model.encoder.run(model.encoder.tokens(model.normalize(batch["rgb"])))[0].mean(1)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    logits = model.classify(model.inputs(batch))
    assert_close(logits, model.head(x), atol=1e-4, rtol=1e-4)
    views = model.classify({"rgb": batch["rgb"].unflatten(0, (2, 3))})
    assert_close(views.exp(), logits.softmax(-1).unflatten(0, (2, 3)).mean(1))


def test_classifier__mixes_all_frames_alike_and_drops_paths_by_seed(source):
    model, batch = build(parse("--checkpoint", source, "--mixup", 0, "--cutmix", 1)), batch_of()
    seen = []
    with mock.patch.object(
        model, "classify", lambda x, seed: seen.append(x["rgb"]) or x["rgb"].new_ones(4, 7)
    ):
        model(batch, None)
    imgs = model.normalize(batch["rgb"])
    pasted = (seen[0] != imgs).any(2)  # (B, T, H, W)
    inside = (seen[0] == imgs.flip(0)).all(2)
    assert (pasted <= inside).all() and pasted.any()
    boxes = pasted.any(1)
    for b in range(4):
        rows, cols = boxes[b].any(1).nonzero(), boxes[b].any(0).nonzero()
        if len(rows):
            whole = inside[b, :, rows.min() : rows.max() + 1, cols.min() : cols.max() + 1]
            assert whole.all()  # one box for all frames
    dropping = build(parse("--checkpoint", source, "--drop-path", 0.9))
    x, seed = dropping.inputs(batch), batch["seed"]
    assert torch.equal(dropping.classify(x, seed), dropping.classify(x, seed))
    assert not torch.equal(dropping.classify(x, seed), dropping.classify(x))


def test_augmented__frames_alike_and_from_the_seed(source):
    cfg = parse("--checkpoint", source, "--rand-augment", 7, "--reprob", 1)

    class Still(MovingScenes):
        def __getitem__(self, key):
            sample = super().__getitem__(key)
            sample["rgb"] = sample["rgb"][:1].expand(4, -1, -1, -1)
            return sample

    plain, state = Still("train", 16, 4), torch.get_rng_state()
    dataset = tuning.Augmented(plain, cfg)
    changed = []
    for i in range(12):
        sample = dataset[0, i]
        rgb = sample["rgb"]
        assert rgb.shape == (4, 3, 16, 16) and rgb.dtype == torch.uint8
        assert torch.equal(rgb, rgb[:1].expand_as(rgb))
        assert torch.equal(rgb, dataset[0, i]["rgb"])
        changed.append(not torch.equal(rgb, plain[0, i]["rgb"]))
    assert all(changed) and torch.equal(torch.get_rng_state(), state)
    assert (dataset.rand_augment.std, dataset.rand_augment.count) == (0.5, 4)  # n4
    assert dataset.rand_augment.fill == (128, 128, 128)
    assert (dataset.erase.scale, dataset.erase.ratio) == ((0.02, 1 / 3), (0.3, 1 / 0.3))
    with mock.patch.object(Still, "__getitem__", lambda self, key: {"error": "gone"}):
        assert dataset[0, 0] == {"error": "gone"}


# ------------------------------------------------------------------------------------------ runs


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> str:
    """Two classes of clips, of which one becomes brighter; one clip of val is broken."""
    place = tmp_path_factory.mktemp("clips")
    for split, count in (("train", 4), ("val", 3)):
        for i in range(count):
            write_clip(f"{place}/{split}/up/{i}", 6 + i)
            write_clip(f"{place}/{split}/down/{i}", 6 + i)
            for n in range(6 + i):
                array = np.full((40, 56, 3), 100, np.uint8)
                array[..., 0] = 100 - 10 * n
                Image.fromarray(array).save(f"{place}/{split}/down/{i}/{n + 1:06d}.png")
    open(f"{place}/val/up/2/000001.png", "w").close()
    return str(place)


def train(out, *flags) -> None:
    line = [*FLAGS.split(), "--output", out, "--batch-size", 4, "--epochs", 3, *flags]
    tuning.main([*map(str, line)])


def test_run__result_resume_and_all_views(source, root, tmp_path):
    path = tmp_path / "source.pt"
    path.write_bytes(open(source, "rb").read())
    flags = ("--data", root, "--checkpoint", path, "--views", "2x3", "--mixup", 0.8)
    flags += ("--rand-augment", 7, "--reprob", 0.25)
    train(tmp_path / "one", *flags)
    result = json.loads((tmp_path / "one/result.json").read_text())
    assert (result["images"], result["unreadable"], result["views"]) == (5, 1, "2x3")
    assert result["random"] is False and result["source"] == str(path)
    assert checkpoint(tmp_path / "one")["facts"]["classes"] == ["down", "up"]
    train(tmp_path / "two", *flags, "--steps", 2)
    path.unlink()  # a run needs the encoder's file no more
    with pytest.raises(engine.UserError, match="mixed 4 clips with one another, now it would be 2"):
        train(tmp_path / "two", *flags, "--resume", "--micro-batch", 2)
    train(tmp_path / "two", *flags, "--resume", "--workers", 1)
    assert same_result(tmp_path / "one", tmp_path / "two")
    assert lines(tmp_path / "one") == lines(tmp_path / "two")


def test_test__averages_what_the_views_say(source, root, tmp_path):
    """The result of a run is that of its own weights over all views, one clip at a time."""
    flags = ("--data", root, "--checkpoint", source, "--views", "2x3", "--steps", 1)
    train(tmp_path / "run", *flags, "--micro-batch", 2)
    result = json.loads((tmp_path / "run/result.json").read_text())
    cfg = parse(*flags)
    model = tuning.build(cfg, ["down", "up"])[0].eval()
    model.load_state_dict(checkpoint(tmp_path / "run")["model"])
    views = clips.open_dataset(root, "val", 16, 8, ("rgb",), (1, 1), False, 0, frames=4, stride=1,
                               views=(2, 3))  # fmt: skip
    hits = []
    for i in range(6):
        sample = views[0, i]
        if sample["bad"] < 0:
            rgb = model.normalize(sample["rgb"])
            probability = sum(model.classify({"rgb": view[None]}).softmax(-1) for view in rgb)
            hits.append(int(probability.argmax()) == int(sample["label"]))
    assert len(hits) == 5 and result["top1"] == pytest.approx(100 * sum(hits) / 5)


def test_main__every_setting_reaches_what_it_is_for(root, tmp_path):
    opened, wrapped, open_dataset = [], [], clips.open_dataset

    def opening(*args, **options):  # once to look for bad clips, once to train
        opened.append(options | {"split": args[1]})
        return open_dataset(*args, **options)

    class Spy(tuning.Augmented):
        def __init__(self, dataset, cfg):
            wrapped.append(dataset)
            super().__init__(dataset, cfg)

    flags = "--sampling segments --no-flip --stride 3 --frames 4 --image-size 16 --views 2x1"
    flags += " --reprob 1 --crop-scale-min 0.3 --weight-decay 0.07 --layer-decay 0.5 --beta2 0.98"
    flags += " --drop-path 0.2 --warmup-epochs 1 --epochs 4 --base-lr 0.64 --min-lr 0.001"
    with (
        mock.patch.object(clips, "open_dataset", opening),
        mock.patch.object(tuning, "Augmented", Spy),
    ):
        train(tmp_path / "run", "--data", root, "--encoder", "tiny", *flags.split())
    wanted = {"frames": 4, "stride": 3, "sampling": "segments", "crop": "resized", "flip": False}
    for options in opened:
        assert (wanted | {"scale": (0.3, 1.0)}).items() <= options.items()
        assert options["train"] == (options["split"] == "train")
    assert [o.get("views") for o in opened] == [None] * 4 + [(2, 1)]
    assert len(wrapped) == 1 and wrapped[0].train
    groups = checkpoint(tmp_path / "run")["optimizer"]["param_groups"]
    assert {g["lr_scale"] for g in groups} == {1, 0.5, 0.25, 0.125, 0.0625}
    assert {g["weight_decay"] for g in groups} == {0, 0.07}
    assert all(g["betas"] == (0.9, 0.98) for g in groups)
    assert sum(len(g["params"]) for g in groups if g["lr_scale"] == 1) == 4  # norm and classifier
    # 8 steps of 4 of 256 clips: two of warm-up, then a cosine
    rates = [0.005, 0.01]
    rates += [0.001 + 0.009 * (1 + math.cos(math.pi * n / 6)) / 2 for n in range(6)]
    assert [r["lr"] for r in lines(tmp_path / "run")] == pytest.approx(rates)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["random"] is True and result["source"] == "tiny"


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("line, words", [
    ("", "where is the encoder from"),
    ("--encoder tiny --checkpoint x.pt", "where is the encoder from"),
    ("--checkpoint none.pt", "none.pt"),
    ("--encoder tiny --frames 5", "--frames 5 must be a multiple of the encoder's 2"),
    ("--encoder tiny --image-size 50", "--image-size 50 is not divisible by --patch-size 8"),
    ("--encoder tiny --views 5", "--views 5: two numbers above 0, as 5x3"),
    ("--encoder tiny --views 0x3", "two numbers above 0"),
    ("--encoder tiny --views 1x2x3", "two numbers above 0"),
    ("--encoder tiny --sampling some", "invalid choice"),
])  # fmt: skip
def test_config__refuses_what_cannot_work(line, words):
    with pytest.raises(engine.UserError, match=words):
        parse(*line.split())


def test_main__refuses_data_without_classes(root, source, tmp_path):
    with pytest.raises(engine.UserError, match="there is no folder .*none/train"):
        train(tmp_path / "run", "--data", tmp_path / "none", "--checkpoint", source)
    write_clip(f"{tmp_path}/train/one", 4)
    with pytest.raises(engine.UserError, match="no two class folders"):
        train(tmp_path / "run", "--data", tmp_path, "--checkpoint", source)
    for split, names in (("train", ("a/x", "b/y", "loose")), ("val", ("a/x", "c/z"))):
        for name in names:
            write_clip(f"{tmp_path}/more/{split}/{name}", 4)
    line = ("--data", tmp_path / "more", "--checkpoint", source, "--batch-size", 1)
    with pytest.raises(engine.UserError, match="loose lies in no class folder"):
        train(tmp_path / "run", *line)
    (tmp_path / "more/train/loose").rename(tmp_path / "more/train/b/loose")
    with pytest.raises(engine.UserError, match="1 classes have no clip in .*train: c"):
        train(tmp_path / "again", *line)
