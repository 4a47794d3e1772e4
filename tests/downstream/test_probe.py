"""Frozen features: how heads are trained, what a feature is, cached passes, whole runs."""

import fcntl
import json
import math
import os
import threading
from unittest import mock

import numpy as np
import pytest
import tiny_run
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_finetune import FLAGS, Ranks, build, parse, write_checkpoint
from test_finetune import run as finetune
from tiny_run import short_epochs

import data
import shapes
import engine
from common import init_weights
from downstream import encoders, features, probe, scores
from downstream.heads import knn, score_heads
from engine import UserError
from vit import ViT

CPU = torch.device("cpu")


def run(*flags) -> None:
    with short_epochs():
        probe.main([*FLAGS[:-2], *map(str, flags)])


def test_tally__counts_by_hand():
    logits = torch.eye(7)[[0, 1, 2, 2]] * 2 + torch.arange(7) * -0.1
    counts = scores.tally(logits, torch.tensor([0, 1, 3, -1]))
    assert counts.tolist()[:4] == [[1, 1, 1], [1, 1, 1], [0, 0, 0], [1, 0, 1]]
    assert scores.tally(logits[:1], torch.tensor([6]))[6].tolist() == [1, 0, 0]
    assert scores.shares(counts) == {"top1": pytest.approx(200 / 3), "top5": 100, "images": 3}


def settings(**changes):
    with short_epochs():
        flags = [*FLAGS[:-2], "--method", "cfmae", "--encoder", "tiny"]
        cfg = engine.parse(probe.Config, probe.PRESETS, "", flags)
    for name, value in ({"epochs": 5, "warmup_epochs": 0, "batch_size": 32} | changes).items():
        setattr(cfg, name, value)
    return cfg


def toy(n=96, d=6, classes=4):
    rng = np.random.default_rng(1)
    labels = rng.integers(0, classes, n)
    rows = 100 + 40 * rng.normal(size=(n, d)).astype(np.float32)
    rows[np.arange(n), labels] += 120  # neither centred nor scaled
    return rows, labels


@pytest.mark.parametrize("kind", ["lars", "adamw"])
def test_train_heads__together_equals_each_alone(kind):
    rows, labels = toy()
    rates = [0.01, 30.0] if kind == "lars" else [0.01, 0.3]
    together = probe.train_heads(rows, labels, 4, rates, settings(probe=kind), CPU)
    for i, rate in enumerate(rates):
        alone = probe.train_heads(rows, labels, 4, [rate], settings(probe=kind), CPU)
        assert torch.allclose(together.weights[i], alone.weights[0], atol=1e-5)
        assert torch.allclose(together.biases[i], alone.biases[0], atol=1e-5)
    assert not torch.allclose(together.weights[0], together.weights[1], atol=1e-3)


def test_train_heads__first_step_by_hand():
    rows, labels = toy(32)
    cfg = settings(probe="lars", epochs=1)
    heads = probe.train_heads(rows, labels, 4, [0.1], cfg, CPU)
    torch.manual_seed(cfg.seed)
    w = torch.nn.init.trunc_normal_(torch.empty(6, 4), std=0.01)
    x = torch.from_numpy(rows)
    x = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
    p = (x @ w).softmax(1) - F.one_hot(torch.from_numpy(labels), 4)
    g, lr = x.T @ p / 32, 0.1 * 32 / 256
    assert torch.allclose(heads.weights[0], w - lr * g * 0.001 * w.norm() / g.norm(), atol=1e-7)
    assert torch.allclose(heads.biases[0], -lr * p.mean(0), atol=1e-7)
    rows = torch.from_numpy(rows)  # a row alone is scored as among others
    assert torch.allclose(heads(rows[:1]), heads(rows)[:, :1], atol=1e-6)


def test_train_heads__rates_warm_up_and_fall_along_a_cosine(monkeypatch):
    seen = []

    class Spy(probe.LARS):
        def step(self):
            seen.append([group["lr"] for group in self.param_groups])
            super().step()

    monkeypatch.setattr(probe, "LARS", Spy)
    rows, labels = toy(64)  # two steps an epoch
    cfg = settings(probe="lars", epochs=4, warmup_epochs=1)
    probe.train_heads(rows, labels, 4, [0.1, 3.0], cfg, CPU)
    shares = [1 / 2, 1, *((1 + math.cos(math.pi * n / 6)) / 2 for n in range(6))]
    for rate, rates in zip((0.1, 3.0), zip(*seen)):
        assert rates == pytest.approx([rate * 32 / 256 * x for x in shares])


def test_train_heads__adamw_has_a_layer_norm():
    """SemanticMIM's public code: LayerNorm as it starts, then a linear layer; no BatchNorm."""
    rows, labels = toy(32)
    cfg = settings(probe="adamw", epochs=1, head_std=0.02)
    heads = probe.train_heads(rows, labels, 4, [0.1], cfg, CPU)
    assert {n for n, _ in heads.named_parameters()} == {"weights.0", "biases.0"}
    torch.manual_seed(cfg.seed)
    w = torch.nn.init.trunc_normal_(torch.empty(6, 4), std=0.02)
    x = layer_norm(torch.from_numpy(rows))
    g = x.T @ ((x @ w).softmax(1) - F.one_hot(torch.from_numpy(labels), 4)) / 32
    lr = 0.1 * 32 / 256
    first = w * (1 - lr * cfg.weight_decay) - lr * g / (g.abs() + 1e-8)  # AdamW's first step
    assert torch.allclose(heads.weights[0], first, atol=1e-6)
    scores_one = heads(torch.from_numpy(rows[:1]))  # alone as in a batch: nothing is shared
    assert torch.allclose(scores_one, heads(torch.from_numpy(rows))[:, :1], atol=1e-5)


@pytest.mark.slow
def test_train_heads__learns_ignores_unlabelled_and_takes_views_in_turn():
    rows, labels = toy(256)
    cfg = settings(probe="adamw", epochs=40)
    heads = probe.train_heads(rows, labels, 4, [0.1], cfg, CPU)
    counts = score_heads(heads, rows, labels, CPU)[0]
    assert scores.shares(counts)["top1"] > 90  # a guess: 25
    spoiled, hidden = rows.copy(), labels.copy()
    spoiled[:64], hidden[:64] = np.nan, -1
    heads = probe.train_heads(spoiled, hidden, 4, [0.1], cfg, CPU)
    assert all(w.isfinite().all() for w in heads.parameters())
    views = [rows, np.full_like(rows, np.nan)]  # the second epoch's would spoil it
    for epochs in (1, 2):
        cfg.epochs = epochs
        weight = probe.train_heads(views, labels, 4, [0.1], cfg, CPU).weights[0]
        assert weight.isfinite().all() == (epochs == 1)


# --------------------------------------------------------------------------------------- features


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cfmae", "semanticmim", "mcmae", "coma_dyvit"])
def test_features__are_means_of_what_the_encoder_gives(method, tmp_path):
    path = write_checkpoint(tmp_path, method)
    encoder = build(parse("--checkpoint", path)).encoder.eval()
    torch.nn.init.normal_(encoder.norm.weight)
    imgs, depth = torch.randn(3, 3, 32, 32), encoder.num_layers
    assert depth == {"coma_dyvit": 4}.get(method, 2)
    with torch.no_grad():
        found = dict(features.features(encoder, imgs, [str(depth), "1", "norm"]))
        ((tokens, prefix),) = encoder.forward_features(imgs)
        ((first, _),) = encoder.forward_features(imgs, [1])
    assert torch.allclose(found["norm/patch"], tokens.mean(1), atol=1e-5)
    assert torch.allclose(found["1/patch"], first.mean(1), atol=1e-5)
    assert ("norm/prefix" in found) == bool(prefix.shape[1])
    if prefix.shape[1]:
        assert torch.allclose(found["norm/prefix"], prefix.mean(1), atol=1e-5)
    where, width = features.columns(encoder, 32, ["1", "norm"], None)
    assert sum(s.stop - s.start for n, s in where.items() if "both" not in n) == width
    if "1/both" in where:
        assert where["1/both"] == slice(where["1/patch"].start, where["1/prefix"].stop)
    else:
        with pytest.raises(engine.UserError, match="patch alone"):
            features.columns(encoder, 32, ["1"], "both")


class Unreadable(shapes.ShapeScenes):
    def __getitem__(self, place):
        return super().__getitem__(place) | {"bad": torch.tensor(place[1] if place[1] == 3 else -1)}


def test_extract__an_unreadable_image_has_no_label_and_what_is_too_large_is_said(tmp_path):
    cfg, scenes = settings(micro_batch=2, workers=0), Unreadable("val", 32, 2, ("rgb",), length=5)
    encoder = encoders.build(cfg.described, 32)
    _, width = features.columns(encoder, 32, ["1"], None)
    world = engine.World("cpu", "fp32")
    features.extract(encoder, scenes, 0, ["1"], width, tmp_path / "val", cfg, world)
    _, labels = features.read(tmp_path / "val", slice(None))
    want = [scenes[0, i]["label"].item() for i in range(5)]
    assert labels.tolist() == [*want[:3], -1, want[4]]
    with torch.no_grad():
        encoder.patch_embed.proj.weight.mul_(1e7)  # float16 ends at 65504
    with pytest.raises(engine.UserError, match="val are not finite; try --cache-dtype float32"):
        features.extract(encoder, scenes, 0, ["1"], width, tmp_path / "val", cfg, world)


def test_extract__ranks_share_rows_that_they_do_not_divide(tmp_path):
    cfg, scenes = settings(micro_batch=2, workers=0), shapes.ShapeScenes("val", 32, 2, length=5)
    encoder, rows = encoders.build(cfg.described, 32), []
    _, width = features.columns(encoder, 32, ["1"], None)
    for size in (1, 3):
        for rank in range(size):
            world = Ranks(rank, size)
            features.extract(encoder, scenes, 0, ["1"], width, tmp_path / "val", cfg, world)
        rows.append(features.read(tmp_path / "val", slice(None)))
    assert np.allclose(rows[0][0], rows[1][0], atol=1e-3) and rows[0][0].any(1).all()
    assert np.array_equal(rows[0][1], rows[1][1])


@pytest.mark.parametrize("views", [0, 2])
def test_cached__opens_the_splits_as_told(views, tmp_path, monkeypatch):
    seen, opening = {}, data.open_dataset

    def spy(root, split, **options):
        seen[split] = options
        return opening(root, split, **options)

    monkeypatch.setattr(data, "open_dataset", spy)
    monkeypatch.setattr(features, "extract", lambda *args: None)
    cfg = settings(views=views, crop_pct=0.5, seed=3, crop_scale_min=0.7)
    features.cached(None, ["1"], 8, tmp_path, cfg, engine.World("cpu", "fp32"), None)
    assert [seen[split]["train"] for split in ("train", "val")] == [views > 0, False]
    for options in seen.values():
        wanted = {"crop_pct": 0.5, "seed": 3, "scale": (0.7, 1.0)}
        assert wanted.items() <= options.items()


def encoder_of(method):
    description = encoders.describe(method=method, model="base")
    with torch.device("meta"):
        return encoders.build(description)


@pytest.mark.slow
def test_layers__defaults_and_bad_ones(tmp_path):
    defaults = {m: features.choose_layers(None, encoder_of(m)) for m in encoders.METHODS}
    assert defaults.pop("semanticmim") == ["7"]  # SemanticMIM Sec. 4.2
    assert set(map(tuple, defaults.values())) == {("norm",)}
    small = build(parse("--checkpoint", write_checkpoint(tmp_path, "cfmae"))).encoder
    assert features.choose_layers("all", small) == ["1", "2", "norm"]
    for text in ("0", "3", "x", "1,,2"):
        with pytest.raises(engine.UserError, match="--layers"):
            features.choose_layers(text, small)


def layer_norm(x, weight=1.0, bias=0.0):
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return x * weight + bias


@pytest.mark.slow
@pytest.mark.parametrize("method", ["semanticmim", "mcmae", "coma_dyvit"])
def test_pooled_norm__is_fresh_where_pretraining_had_another_input(method, tmp_path):
    encoder = build(parse("--checkpoint", write_checkpoint(tmp_path, method))).encoder
    torch.nn.init.normal_(encoder.norm.weight)  # as trained on what a feature is not
    imgs, depth = torch.randn(3, 3, 32, 32), encoder.num_layers
    norm = features.pooled_norm(encoder, {})
    with torch.no_grad():
        found = dict(features.features(encoder.eval(), imgs, [str(depth), "norm"], norm))
        ((tokens, _),) = encoder.forward_features(imgs, [depth])
    assert torch.allclose(found["norm/patch"], layer_norm(tokens.mean(1)), atol=1e-5)
    assert torch.allclose(found[f"{depth}/patch"], tokens.mean(1), atol=1e-6)


def test_pooled_norm__is_the_encoders_where_it_was_trained():
    assert features.pooled_norm(encoder_of("cfmae"), {}) is None


@pytest.mark.slow
def test_knn__of_a_finetuned_encoder_takes_the_norm_that_was_trained(tmp_path):
    finetune("--checkpoint", write_checkpoint(tmp_path, "cfmae"), "--batch-size", 8, "--steps", 1,
             "--output", tmp_path / "run")  # fmt: skip
    path = tmp_path / "run/last.pt"
    checkpoint = torch.load(path, weights_only=True)
    weight, bias = torch.randn(2, 16)
    checkpoint["model"] |= {"fc_norm.weight": weight, "fc_norm.bias": bias}
    engine.save(path, checkpoint)
    flags = ["--checkpoint", path, "--protocol", "knn", "--cache-dtype", "float32"]
    run(*flags, "--layers", "2,norm", "--output", tmp_path / "knn")
    rows = np.load(tmp_path / "knn/features/val.npy")
    assert rows.shape[1] == 64
    patch, prefix, normed, normed_prefix = torch.from_numpy(rows).split(16, dim=1)
    assert torch.allclose(normed, layer_norm(patch, weight, bias), atol=1e-4)
    assert torch.allclose(normed_prefix, layer_norm(prefix, weight, bias), atol=1e-4)
    run(*flags, "--random", "--output", tmp_path / "random")  # its own norm again


def test_knn__of_a_public_classifier_takes_its_norm(tmp_path):
    torch.manual_seed(0)
    vit = ViT((32, 32), 8, embed_dim=64, depth=1, num_heads=1)
    init_weights(vit)
    position = torch.cat([torch.zeros(1, 1, 64), vit.pos_embed[None]], dim=1)
    weight, bias = torch.randn(2, 64)
    state = {k: v for k, v in vit.state_dict().items() if not k.startswith("norm.")}
    state |= {"pos_embed": position, "fc_norm.weight": weight, "fc_norm.bias": bias}
    torch.save({"model": state}, tmp_path / "public.pth")
    run("--init", tmp_path / "public.pth", "--protocol", "knn", "--layers", "1,norm",
               "--cache-dtype", "float32", "--output", tmp_path / "knn")  # fmt: skip
    rows = torch.from_numpy(np.load(tmp_path / "knn/features/val.npy"))
    patch, _, normed, _ = rows.split(64, dim=1)
    assert torch.allclose(normed, layer_norm(patch, weight, bias), atol=1e-4)


# ------------------------------------------------------------------------------------- whole runs


@pytest.mark.slow
def test_run__a_cache_is_filled_by_one_command_at_a_time(tmp_path, capsys):
    flags = ["--method", "mae", "--encoder", "tiny", "--protocol", "knn", "--layers", "1"]
    flags += ["--cache", tmp_path, "--output", tmp_path / "b"]
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # as another one has it
        other, said = threading.Thread(target=run, args=flags), ""
        other.start()
        while other.is_alive() and "; waiting" not in said:
            other.join(timeout=0.1)
            said += capsys.readouterr().out
        filled = [*tmp_path.glob("*.npy")]
    other.join()
    assert "; waiting" in said and not filled and (tmp_path / "features.json").exists()


@pytest.mark.slow
def test_run__one_pass_serves_linear_and_knn(tmp_path, monkeypatch):
    path, cache = write_checkpoint(tmp_path, "semanticmim"), tmp_path / "cache"
    calls, extract = [], features.extract
    monkeypatch.setattr(features, "extract", lambda *a: (calls.append(a[5].name), extract(*a)))
    flags = ["--checkpoint", path, "--layers", "1,2", "--cache", cache, "--micro-batch", 16]
    linear = ["--protocol", "linear", "--rates", "0.01,0.1", "--steps", 2, *flags]
    run(*linear, "--output", tmp_path / "a")
    assert calls == ["train-0", "val"]
    run("--protocol", "knn", "--k", 3, "--temperature", 1, *flags, "--output", tmp_path / "b")
    assert len(calls) == 2  # read again
    a, b = (json.loads((tmp_path / x / "result.json").read_text()) for x in "ab")
    assert len(a["sweep"]) == 12 and len(b["sweep"]) == 6 and a["images"] == b["images"] == 40
    assert a["top1"] == max(row["top1"] for row in a["sweep"]) and "optimistic" in a["note"]
    assert a["first"]["features"] == "1/patch" and a["first"]["rate"] == 0.01
    model = build(parse("--checkpoint", path)).eval()
    for split, name in (("train", "train-0"), ("val", "val")):
        dataset = shapes.ShapeScenes(split, 32, 2, ("rgb",), False, length=40)
        one = model.normalize(dataset[0, 39]["rgb"][None])
        with torch.no_grad():
            found = features.features(model.encoder, one, ["1", "2"])
        expected = torch.cat([x for _, x in found], 1)
        assert np.allclose(np.load(cache / f"{name}.npy")[39], expected, atol=2e-3)  # float16
    where, _ = features.columns(model.encoder, 32, ["1", "2"], None)
    for row in b["sweep"]:
        (bank, names), (queries, labels) = (
            features.read(cache / x, where[row["features"]]) for x in ("train-0", "val")
        )
        votes = knn(bank, names, queries, len(shapes.SHAPES), 3, 1)
        found = scores.shares(scores.tally(votes, torch.from_numpy(labels)))
        assert {k: row[k] for k in found} == found and found["top1"] != found["top5"]
    with pytest.raises(engine.UserError, match="another run .*bf16.* differ"):
        run(*linear, "--precision", "bf16", "--output", tmp_path / "c")
    for flag, value in (("seed", 1), ("views", 1), ("crop-scale-min", 0.5), ("crop-pct", 0.5)):
        with pytest.raises(engine.UserError, match=f"another run .*{flag.replace('-', '_')}.* dif"):
            run(*linear, f"--{flag}", value, "--output", tmp_path / flag)
    with pytest.raises(engine.UserError, match="another run .*random differ"):
        run(*linear, "--random", "--output", tmp_path / "d")
    with pytest.raises(engine.UserError, match="holds a run"):
        run(*linear, "--output", tmp_path / "a")
    os.utime(path, (0, 0))  # the same name, but written at another time
    with pytest.raises(engine.UserError, match="another run .*file differ"):
        run(*linear, "--output", tmp_path / "e")


def probe_alone(out):
    score = probe.score

    def alone(*args):
        assert not dist.is_initialized()
        return score(*args)

    with mock.patch.object(probe, "score", alone):
        run("--method", "mae", "--encoder", "tiny", "--protocol", "knn", "--output", out)


@pytest.mark.slow
def test_run__other_ranks_do_not_wait_for_the_first_ones_heads(tmp_path):
    # torch lets them wait for half an hour; then they fail, and all are ended
    tiny_run.launch(2, tmp_path / "store", probe_alone, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text())["images"] == 40


@pytest.mark.slow
def test_run__normalises_as_told(tmp_path):
    path = write_checkpoint(tmp_path, "cfmae")
    flags = ["--checkpoint", path, "--protocol", "knn", "--cache-dtype", "float32", "--cache",
             tmp_path / "cache", "--mean", "0.2,0.4,0.6", "--layers", "2"]  # fmt: skip
    run(*flags, "--std", "0.5,1,0.25", "--output", tmp_path / "a")
    model = build(parse("--checkpoint", path)).eval()
    rgb = shapes.ShapeScenes("val", 32, 2, ("rgb",), False, length=40)[0, 7]["rgb"][None] / 255
    mean, std = torch.tensor([[0.2, 0.4, 0.6], [0.5, 1.0, 0.25]])[..., None, None]
    with torch.no_grad():
        ((tokens, _),) = model.encoder.forward_features((rgb - mean) / std, [2])
    rows = torch.from_numpy(np.load(tmp_path / "cache/val.npy"))
    assert torch.allclose(rows[7, :16], tokens[0].mean(0), atol=1e-5)
    with pytest.raises(engine.UserError, match="another run .*std differ"):
        run(*flags, "--std", "0.5,1,0.5", "--output", tmp_path / "b")


@pytest.mark.slow
def test_run__views_are_different_crops(tmp_path):
    path = write_checkpoint(tmp_path, "cfmae")
    out = tmp_path / "a"
    run("--checkpoint", path, "--protocol", "linear", "--views", 2, "--steps", 2, "--rates",
               "0.1", "--output", out)  # fmt: skip
    first, second = (np.load(out / f"features/train-{v}.npy") for v in (0, 1))
    assert first.shape == (40, 32) and (first != second).any(1).all()
    assert "optimistic" in json.loads((out / "result.json").read_text())["note"]  # three features


@pytest.mark.parametrize("rates", ["", "0.1,-1", "nan", "fast"])
def test_bad_input__one_line(rates):
    with pytest.raises(UserError, match=f"--rates {rates}: numbers above 0"):
        run("--method", "cfmae", "--encoder", "tiny", "--rates", rates)


def test_reserve__a_full_disk_is_one_line_before_the_features_are_made(tmp_path, monkeypatch):
    path = tmp_path / "train-0.npy"
    features.reserve(path, (1000, 8), np.dtype(np.float32))
    assert np.load(path, mmap_mode="r+").shape == (1000, 8)
    assert os.stat(path).st_blocks * 512 >= 32_000  # not a hole

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=f"cannot write {path}: No space left"):
        features.reserve(path, (1000, 8), np.dtype(np.float32))
