"""Fine-tuning: gradients, resume, evaluation, bad input."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_run import short_epochs

import data
import shapes
import engine
from common import Normalize
from noise import AUGMENT, DROP_PATH, uniform
from downstream import encoders, finetune, scores, transfer
from downstream import evaluate as testing
from downstream.classifier import Classifier
from engine.ranks import World
from tools.models import model_class

SMALL = {
    "mae": dict(image_size=32, embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=16,
                decoder_num_heads=2, decoder_depth=1),
    "cfmae": dict(image_size=32, embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=16,
                  decoder_num_heads=2, decoder_depth=1),
    "semanticmim": dict(image_size=32, embed_dim=16, depth=2, num_heads=2, proxies=2),
    "mcmae": dict(image_size=32, embed_dims="8,16,32", depths="1,1,2", num_heads=2,
                  decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
    "coma_dyvit": dict(image_size=32, dims="8-16-32-64", blocks="1-1-1-1", decoder_embed_dim=16,
                       decoder_depth=1, decoder_num_heads=2),
}  # fmt: skip
FLAGS = "--data shapes --model tiny --workers 0 --device cpu --precision fp32 --val-samples 8"
FLAGS = FLAGS.split()


def write_checkpoint(folder: Path, method: str, **changes) -> Path:
    """A checkpoint of a small model that has not been trained."""
    script = encoders.METHODS[method]
    cfg = script.Config(**{**script.PRESETS["tiny"], **SMALL[method], **changes})
    cfg.resolve()
    torch.manual_seed(1)
    model = model_class(method)(cfg)
    state = {"format": engine.FORMAT, "method": method, "step": 1, "window": {}, "optimizer": {}}
    path = folder / f"{method}.pt"
    engine.save(path, state | {"config": dataclasses.asdict(cfg), "model": model.state_dict()})
    return path


def parse(*flags: str) -> finetune.Config:
    return engine.parse(finetune.Config, finetune.PRESETS, "", [*FLAGS, *map(str, flags)])


def build(cfg: finetune.Config) -> Classifier:
    return finetune.build(cfg, transfer.class_names(cfg.data))[0]


def naive_mix(imgs, seed, mixup, cutmix, switch):
    """One sample at a time, with slices and numbers, in numpy's terms."""
    out, lams = imgs.clone(), []
    for i, s in enumerate(seed.tolist()):
        u = uniform(torch.tensor([s]), 67, AUGMENT)[0].double().tolist()
        cut = u[0] < switch if mixup and cutmix else bool(cutmix)
        a = cutmix if cut else mixup
        for x, y in zip(u[3:35], u[35:]):
            x, y = x ** (1 / a), y ** (1 / a)
            if x + y <= 1:
                lam = x / (x + y)
                break
        partner = imgs[len(imgs) - 1 - i]
        if cut:
            H, W = imgs.shape[2:]
            h, w = int(H * math.sqrt(1 - lam)), int(W * math.sqrt(1 - lam))
            cy, cx = int(u[1] * H), int(u[2] * W)
            y0, y1 = max(cy - h // 2, 0), min(cy + h // 2, H)
            x0, x1 = max(cx - w // 2, 0), min(cx + w // 2, W)
            out[i, :, y0:y1, x0:x1] = partner[:, y0:y1, x0:x1]
            lam = 1 - (y1 - y0) * (x1 - x0) / (H * W)
        else:
            out[i] = lam * imgs[i] + (1 - lam) * partner
        lams.append(lam)
    return out, torch.tensor(lams)


def batch_of(cfg: finetune.Config, n: int = 4) -> dict:
    dataset = data.open_dataset("shapes", "train", cfg.image_size, cfg.patch_size, cfg.names,
                                (0.5, 1.0), True, 0)  # fmt: skip
    return data.collate([dataset[0, i] for i in range(n)])


# ---------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("method", [*SMALL, "cfmae R+I+S"])
@pytest.mark.slow
def test_classifier__gradients(method, tmp_path):
    method, *granularities = method.split()
    extra = ["--granularities", *granularities] if granularities else ["--mixup", 0.8]
    path = write_checkpoint(tmp_path, method)
    cfg = parse("--checkpoint", path, "--cutmix", 1, "--drop-path", 0.2, *extra)
    model = build(cfg)
    torch.nn.init.normal_(model.head.weight)  # at 2e-5 nothing but the head sees much
    model(batch_of(cfg), torch.zeros(()))[0].backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().any()]
    assert not missing


def test_classifier__norm_after_the_mean(tmp_path):
    cfg = parse("--checkpoint", write_checkpoint(tmp_path, "cfmae"))
    model = build(cfg).eval()
    torch.nn.init.normal_(model.head.weight)
    batch = batch_of(cfg)
    ((tokens, _),) = model.encoder.forward_features(model.normalize(batch["rgb"]), [2])
    x = torch.stack([t.mean(0) for t in tokens])
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(model.classify(model.inputs(batch)), model.head(x), atol=1e-5)


def test_classifier__drop_path_comes_from_the_seed(tmp_path):
    cfg = parse("--checkpoint", write_checkpoint(tmp_path, "cfmae"), "--drop-path", 0.9)
    model, batch = build(cfg), batch_of(cfg, 16)
    torch.nn.init.normal_(model.head.weight)
    inputs = model.inputs(batch)
    draws = uniform(batch["seed"], 4, DROP_PATH)  # of two blocks with two branches
    dropped = (draws[:, 2:] < 0.9).all(1)
    assert 8 < dropped.sum() < 16
    without = model.classify({"rgb": inputs["rgb"]}, batch["seed"])
    ((x, _),) = model.encoder.forward_features(inputs["rgb"], [1])
    skipped = model.head(model.fc_norm(x.mean(1)))
    assert torch.equal(torch.isclose(without, skipped, atol=1e-4).all(1), dropped)


def test_forward__mixes_and_smooths_as_asked(tmp_path):
    """The loss by hand; mixup and cutmix with other parameters, so that none passes for another."""
    path = write_checkpoint(tmp_path, "cfmae")
    cfg = parse("--checkpoint", path, "--mixup", 0.8, "--cutmix", 0.3, "--smoothing", 0.2)
    model, batch = build(cfg), batch_of(cfg, 12)
    torch.nn.init.normal_(model.head.weight)
    loss, _ = model(batch, torch.zeros(()))
    imgs, lam = naive_mix(model.normalize(batch["rgb"]), batch["seed"], 0.8, 0.3, 0.5)
    logits, target = model.classify({"rgb": imgs}), torch.zeros(12, 10)
    for i in range(12):
        for j, weight in ((i, lam[i]), (11 - i, 1 - lam[i])):
            target[i] += weight * 0.2 / 10
            target[i, batch["label"][j]] += weight * 0.8
    assert loss.item() == pytest.approx(-(target * logits.log_softmax(1)).sum(1).mean().item())


def test_build__head_and_input_as_asked(tmp_path):
    cfg = parse("--checkpoint", write_checkpoint(tmp_path, "cfmae"), "--head-std", 0.5,
                "--mean", "0.5,0.25,0.5", "--std", "0.5,0.25,1")  # fmt: skip
    model = build(cfg)
    assert abs(model.head.weight.std() - 0.5) < 0.1
    white = model.inputs({"rgb": torch.full((1, 3, 32, 32), 255, dtype=torch.uint8)})["rgb"]
    assert white[0, :, 0, 0].tolist() == [1, 3, 0.5]


# ----------------------------------------------------------------------------------- whole runs


def run(*flags) -> None:
    with short_epochs():
        finetune.main([*FLAGS, *map(str, flags)])


def evaluate(*flags) -> None:
    flags = ["--data", "shapes", "--workers", 0, "--device", "cpu", *flags]
    with short_epochs():
        finetune.main(["evaluate", *map(str, flags)])


@pytest.mark.slow
def test_finetune__resumes_bit_for_bit_and_is_evaluated_without_the_source(tmp_path):
    path = write_checkpoint(tmp_path, "coma_dyvit")
    flags = ["--checkpoint", path, "--batch-size", 8, "--micro-batch", 4, "--epochs", 1,
             "--warmup-epochs", 0.2, "--mixup", 0.8, "--cutmix", 1, "--drop-path", 0.2]  # fmt: skip
    a, b, c = (tmp_path / x for x in "abc")
    run(*flags, "--output", a)
    run(*flags, "--output", b, "--steps", 2)
    path.rename(tmp_path / "gone.pt")
    run(*flags, "--output", b, "--resume")
    x, y = (torch.load(d / "last.pt", weights_only=True) for d in (a, b))
    assert x["step"] == y["step"] == 5
    assert all(torch.equal(v, y["model"][k]) for k, v in x["model"].items())
    assert any((v != torch.load(tmp_path / "gone.pt", weights_only=True)["model"][k]).any()
               for k, v in x["model"].items() if k.startswith("encoder."))  # fmt: skip
    assert x["facts"]["classes"] == list(shapes.SHAPES) and "description" not in x["config"]
    assert x["facts"]["description"]["method"] == "coma_dyvit"
    del x["config"]["num_heads"]  # as a run from before that field
    engine.save(a / "last.pt", x)
    evaluate("--finetuned", a / "last.pt", "--output", c)
    first, again = (json.loads((d / "result.json").read_text()) for d in (a, c))
    assert first["images"] == 40 and {k: first[k] for k in ("top1", "top5")} == {
        k: again[k] for k in ("top1", "top5")
    }
    rows = (a / "per_class.csv").read_text().splitlines()
    assert len(rows) == 11 and sum(int(r.split(",")[2]) for r in rows[1:]) == 40
    with pytest.raises(engine.UserError, match="--image-size: for --init"):
        evaluate("--finetuned", a / "last.pt", "--image-size", 64)


@pytest.mark.slow
def test_finetune__mixing_fixes_the_micro_batch(tmp_path, capsys):
    """mixup's partner is the micro-batch's, so a run goes on with its own or not at all."""
    flags = ["--checkpoint", write_checkpoint(tmp_path, "cfmae"), "--batch-size", 8, "--epochs", 1]
    flags += ["--warmup-epochs", 0.1]
    mixed, plain = ([*flags, "--cutmix", x, "--output", tmp_path / name]
                    for x, name in ((1, "mixed"), (0, "plain")))  # fmt: skip
    for run_flags in (mixed, plain):
        run(*run_flags, "--micro-batch", 4, "--steps", 2)
    kept = torch.load(tmp_path / "mixed/last.pt", weights_only=True)["facts"]
    assert kept["mix_batch"] == 4
    message = "mixed 4 samples .* be 8; .* --micro-batch 4, on a number of ranks that divides 2"
    with pytest.raises(engine.UserError, match=message):
        run(*mixed, "--micro-batch", 8, "--resume")
    run(*mixed, "--micro-batch", 5, "--resume")  # 4 again: 5 does not divide 8
    run(*plain, "--micro-batch", 8, "--resume")  # nothing depends on it
    out = capsys.readouterr().out
    assert "pixels      mean 0.485,0.456,0.406, deviation 0.229,0.224,0.225: ImageNet's" in out


@pytest.mark.slow
def test_finetune__empty_class_folders_are_no_classes(tmp_path, capsys):
    root = tmp_path / "data"
    for split in ("train", "val"):
        for name in ("bat", "cat", "eel"):
            (root / split / name).mkdir(parents=True)
            for i in range(2 * (name != "bat")):
                Image.new("RGB", (32, 32), (100 * i, 0, 0)).save(root / split / name / f"{i}.png")
    assert transfer.class_names(str(root)) == ["cat", "eel"]
    path = write_checkpoint(tmp_path, "cfmae")
    run("--checkpoint", path, "--data", root, "--batch-size", 4, "--epochs",
               1, "--warmup-epochs", 0, "--output", tmp_path / "o")  # fmt: skip
    rows = (tmp_path / "o/per_class.csv").read_text().splitlines()
    assert [row.split(",")[1:3] for row in rows[1:]] == [["cat", "2"], ["eel", "2"]]
    assert "warning     1 steps teach little" in capsys.readouterr().out


def test_finetune__val_is_the_centre_crop(tmp_path, monkeypatch):
    for split in ("train", "val"):
        for i in range(4):
            (tmp_path / f"d/{split}/{i % 2}").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 48)).save(tmp_path / f"d/{split}/{i % 2}/{i}.png")
    seen = []
    monkeypatch.setattr(finetune, "test", lambda model, dataset, *rest: seen.append(dataset))
    path = write_checkpoint(tmp_path, "cfmae")
    run("--checkpoint", path, "--data", tmp_path / "d", "--crop-pct", 0.75, "--batch-size", 4,
        "--steps", 1, "--output", tmp_path / "o")  # fmt: skip
    monkeypatch.setattr(testing, "test", lambda model, dataset, *rest: seen.append(dataset))
    evaluate("--finetuned", tmp_path / "o/last.pt", "--data", tmp_path / "d")
    assert [(dataset.crop_pct, dataset.train) for dataset in seen] == [(0.75, False)] * 2


def test_main__every_setting_reaches_what_it_is_for(tmp_path, monkeypatch):
    wrapped, made = [], []

    class Spy(finetune.Augmented):
        def __init__(self, dataset, cfg, mean, std):
            wrapped.append((dataset.train, dataset.seed, mean, std))
            super().__init__(dataset, cfg, mean, std)

    def adamw(groups, **kwargs):
        made.append((groups, kwargs))
        raise engine.UserError("enough")

    monkeypatch.setattr(finetune, "Augmented", Spy)
    monkeypatch.setattr(torch.optim, "AdamW", adamw)
    flags = "--weight-decay 0.07 --layer-decay 0.5 --beta1 0.8 --beta2 0.7 --seed 3 --std 1,1,0.5"
    with pytest.raises(engine.UserError, match="enough"):
        run("--checkpoint", write_checkpoint(tmp_path, "mae"), *flags.split(), "--batch-size", 8,
            "--output", tmp_path / "o")  # fmt: skip
    assert wrapped == [(True, 3, [0.485, 0.456, 0.406], [1, 1, 0.5])]  # train's alone
    ((groups, kwargs),) = made
    assert kwargs["betas"] == (0.8, 0.7) and {g["weight_decay"] for g in groups} == {0, 0.07}
    assert {g["lr_scale"] for g in groups} == {1, 0.5, 0.25, 0.125}  # two blocks
    assert sum(len(g["params"]) for g in groups if g["lr_scale"] == 1) == 4  # norm and classifier


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cfmae", "mcmae"])
def test_build__positions_are_trained_as_in_public_fine_tuning(method, tmp_path):
    flags = ["--checkpoint", write_checkpoint(tmp_path, method)]
    trained = build(parse(*flags))
    fixed = build(parse(*flags, "--no-train-position"))
    assert not any("pos_embed" in name for name, _ in fixed.named_parameters())
    position = trained.encoder.pos_embed
    assert isinstance(position, torch.nn.Parameter)
    assert torch.equal(position[0], fixed.encoder.pos_embed)


@pytest.mark.slow
def test_evaluate__a_run_from_before_positions_were_trained(tmp_path):
    path, out = write_checkpoint(tmp_path, "cfmae"), tmp_path / "old"
    flags = ["--checkpoint", path, "--no-train-position", "--batch-size", 8, "--steps", 1]
    run(*flags, "--output", out)
    old = torch.load(out / "last.pt", weights_only=True)
    for name in ("train_position", "mean", "std", "init_key", "color_jitter"):
        del old["config"][name]
    kept = {k: json.dumps(v) for k, v in old.pop("facts").items()}  # there, in words
    old["config"] |= {"protocol": "finetune", "layers": None, **kept}
    engine.save(out / "last.pt", old)
    evaluate("--finetuned", out / "last.pt", "--output", tmp_path / "new")
    first, again = (json.loads((d / "result.json").read_text()) for d in (out, tmp_path / "new"))
    assert first["top1"] == again["top1"] and first["top5"] == again["top5"]
    path.rename(tmp_path / "gone.pt")  # and a run of then goes on
    old["config"] |= {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225", "color_jitter": 0.0}
    old["config"] |= {"train_position": False, "init_key": None}
    engine.save(out / "last.pt", old)
    flags[-1] = 2
    run(*flags, "--output", out, "--resume")
    new = torch.load(out / "last.pt", weights_only=True)
    assert new["step"] == 2 and new["facts"]["classes"] == list(shapes.SHAPES)


@pytest.mark.parametrize("norm", ["fc_norm", "norm"])
@pytest.mark.slow
def test_evaluate__a_public_classifier(norm, tmp_path, monkeypatch, capsys):
    """A head that comes with its encoder: after the mean of patches, or on the class token."""
    path = write_checkpoint(tmp_path, "cfmae")
    reference = build(parse("--checkpoint", path, "--no-train-position")).encoder.eval()
    described = encoders.describe(path, granularities="R")
    torch.manual_seed(5)
    head = {f"{norm}.weight": torch.randn(16), f"{norm}.bias": torch.randn(16),
            "head.weight": torch.randn(10, 16), "head.bias": torch.randn(10)}  # fmt: skip

    def open_classifier(init, image_size, key=None, **changes):
        assert (init, image_size, key) == ("public.pth", 32, "model_ema")
        encoder = encoders.build(described, image_size)
        encoder.load_state_dict(reference.state_dict())
        pool = {"fc_norm": "patch", "norm": "prefix"}[norm]
        return encoder, {**described, "pool": pool, "report": "read"}, dict(head)

    monkeypatch.setattr(encoders, "open_classifier", open_classifier)
    monkeypatch.setattr(encoders, "describe", lambda *args, **kwargs: described)
    flags = ["--init", "public.pth", "--init-key", "model_ema", "--image-size", 32]
    evaluate(*flags, "--output", tmp_path / "out")
    found = json.loads((tmp_path / "out/result.json").read_text())
    assert found["source"] == "public.pth" and found["images"] == 40 and "epochs" not in found
    model, words = testing.open_public("public.pth", "shapes", 32, init_key="model_ema")
    assert words == "read" and not model.eval().training
    hits, dataset = 0, shapes.ShapeScenes("val", 32, 2, ("rgb",), False, length=40)
    for i in range(40):
        one = data.collate([dataset[0, i]])
        imgs = Normalize()(one["rgb"])
        with torch.no_grad():
            ((tokens, prefix),) = reference.forward_features(imgs, [2])
        x = tokens.mean(1) if norm == "fc_norm" else prefix[:, 0]
        x = torch.nn.functional.layer_norm(x, (16,), *(head[f"{norm}.{k}"] for k in
                                                       ("weight", "bias")), 1e-6)  # fmt: skip
        logits = x @ head["head.weight"].T + head["head.bias"]
        with torch.no_grad():
            assert torch.allclose(model.classify(model.inputs(one)), logits, atol=1e-4)
        hits += logits.argmax(1).eq(one["label"]).item()
    assert found["top1"] == pytest.approx(100 * hits / 40) and 0 < hits < 40
    head |= {"head.weight": torch.randn(7, 16), "head.bias": torch.randn(7)}
    with pytest.raises(engine.UserError, match="classifies 7 classes, shapes has 10"):
        evaluate(*flags, "--output", tmp_path / "o")


class Ranks(World):
    """A world of which only one rank runs; sums over ranks are left to the test."""

    def __init__(self, rank, size):
        super().__init__("cpu", "fp32")
        self.rank, self.size, self.local_size = rank, size, size

    def raise_error(self, batch):
        return batch

    def maximum(self, *values):
        return list(values)

    def mean(self, x):
        return x / self.size


@pytest.mark.slow
def test_count_hits__every_image_once_on_any_number_of_ranks(tmp_path):
    cfg = parse("--checkpoint", write_checkpoint(tmp_path, "mcmae"), "--micro-batch", 4)
    model = build(cfg).eval()
    torch.nn.init.normal_(model.head.weight)
    dataset = shapes.ShapeScenes("val", 32, 2, ("rgb",), False, length=17)
    naive = torch.zeros(10, 3)
    for i in range(17):
        one = data.collate([dataset[0, i]])
        row, label = model.classify(model.inputs(one))[0], int(one["label"])
        better = int((row > row[label]).sum())
        naive[label] += torch.tensor([1, better < 1, better < 5])
    for size in (1, 3):
        counts = sum(scores.count_hits(model, dataset, cfg, Ranks(r, size))[0] for r in range(size))
        assert torch.equal(counts.float(), naive)
    among = torch.tensor([2, 5])
    counts, _ = scores.count_hits(model, dataset, cfg, Ranks(0, 1), among=among)
    assert counts[[2, 5], 2].equal(counts[[2, 5], 0])  # of two classes both are in the top five


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.slow
def test_bad_input__one_line(tmp_path):
    path = write_checkpoint(tmp_path, "cfmae")
    for name in ("one/train/cat/1.png", "more/train/cat/1.png", "more/train/bat/1.png",
                 "more/val/cat/1.png", "more/val/owl/a/1.png", "more/val/dog/1.JPEG",
                 "none/train/cat/notes.txt", "none/train/dog/.hidden.png",
                 "photos/1.jpg"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for name in ("one/train/dog", "more/train/dog", "more/val/empty"):
        (tmp_path / name).mkdir()
    cases = {
        "one of --checkpoint, --init, --method": [],
        "--encoder huge is a preset of --method": ["--checkpoint", path, "--encoder", "huge"],
        "no class folders with images": ["--checkpoint", path, "--data", tmp_path / "none"],
        f"no class folders with images in {tmp_path}/photos;": [
            "--checkpoint", path, "--data", tmp_path / "photos",
        ],
        "one class alone, cat,": ["--checkpoint", path, "--data", tmp_path / "one"],
        "2 classes of .*/more/val have no image in .*/more/train.*: dog, owl": [
            "--checkpoint", path, "--data", tmp_path / "more",
        ],
        "there is no folder .*nowhere": ["--checkpoint", path, "--data", tmp_path / "nowhere"],
        "nothing.pt": ["--checkpoint", tmp_path / "nothing.pt"],
        "--granularities is CFMAE's": ["--method", "mcmae", "--encoder", "tiny",
                                         "--granularities", "R"],
        "--mixup is undefined": ["--checkpoint", path, "--granularities", "R+I+S", "--mixup", 0.8],
        "--mean 1,2: three numbers": ["--checkpoint", path, "--mean", "1,2"],
        r"--std 0,1,1: three numbers in \(0, 1\]": ["--checkpoint", path, "--std", "0,1,1"],
        "--head-std -1": ["--checkpoint", path, "--head-std", -1],
        "--color-jitter 2": ["--checkpoint", path, "--color-jitter", 2],
        "--layer-decay 1.5": ["--checkpoint", path, "--layer-decay", 1.5],
        "--recipe table3 is SemanticMIM's": ["--checkpoint", path, "--recipe", "table3"],
        "--image-size 60": ["--checkpoint", path, "--image-size", 60],
        "--cutmix": ["--checkpoint", path, "--cutmix", 2],
    }  # fmt: skip
    for message, flags in cases.items():
        with pytest.raises(engine.UserError, match=message):
            run(*flags, "--output", tmp_path / "out")
    for message, flags in {
        "needs --finetuned.* or --init": [],
        "--finetuned, last.pt of a run, or --init": ["--init", "x.pth", "--finetuned", path],
        "is of method cfmae, not a fine-tuning run's": ["--finetuned", path],
    }.items():
        with pytest.raises(engine.UserError, match=message):
            evaluate(*flags, "--output", tmp_path / "out")
    (tmp_path / "other").mkdir()
    content = torch.load(path, weights_only=True) | {"method": "classify"}
    engine.save(tmp_path / "other/last.pt", content)
    with pytest.raises(engine.UserError, match="a checkpoint of classify describes no encoder"):
        run("--resume", "--output", tmp_path / "other")
    with pytest.raises(engine.UserError, match="--pool prefix"):
        run("--method", "mcmae", "--encoder", "tiny", "--pool", "prefix", "--batch-size", 8,
            "--output", tmp_path / "o")  # fmt: skip


def test_bad_input__images_outside_class_folders(tmp_path):
    for name in ("a/1.png", "b/2.png", "loose.png"):
        (tmp_path / "d/train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "d/train" / name)
    path = write_checkpoint(tmp_path, "cfmae")
    with pytest.raises(engine.UserError, match="loose.png lies in no class folder"):
        run("--checkpoint", path, "--data", tmp_path / "d", "--output", tmp_path / "o",
            "--batch-size", 1)  # fmt: skip


@pytest.mark.slow
def test_resume__refuses_other_classes(tmp_path, monkeypatch):
    flags = ["--checkpoint", write_checkpoint(tmp_path, "mae"), "--batch-size", 8, "--steps"]
    run(*flags, 1, "--output", tmp_path / "o")
    other = [*shapes.SHAPES[:-1], "blob"]
    monkeypatch.setattr(transfer, "class_names", lambda root: other)
    with pytest.raises(engine.UserError, match="shapes has other classes than when .*o was begun"):
        run(*flags, 2, "--output", tmp_path / "o", "--resume")
