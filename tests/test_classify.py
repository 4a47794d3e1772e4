"""Fine-tuning: recipes, gradients, layer-wise decay, resume, evaluation, bad input."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tiny_run import short_epochs

import data
import engine
from common import DROP_PATH, uniform
from downstream import classify, encoders, scores

SMALL = {
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
    names = {"cfmae": "CFMAE", "semanticmim": "SemanticMIM", "coma_dyvit": "CoMA"}
    model = getattr(script, names.get(method, "build"))(cfg)
    state = {"format": engine.FORMAT, "method": method, "step": 1, "window": {}, "optimizer": {}}
    path = folder / f"{method}.pt"
    engine.save(path, state | {"config": dataclasses.asdict(cfg), "model": model.state_dict()})
    return path


def parse(*flags: str) -> classify.Config:
    return engine.parse(classify.Config, classify.PRESETS, "", [*FLAGS, *map(str, flags)])


def batch_of(cfg: classify.Config, n: int = 4) -> dict:
    dataset = data.open_dataset("shapes", "train", cfg.image_size, cfg.patch_size, cfg.names,
                                (0.5, 1.0), True, 0)  # fmt: skip
    return data.collate([dataset[0, i] for i in range(n)])


# -------------------------------------------------------------------------------------- recipes


def test_recipes__the_papers_numbers():
    def made(method, **given):
        cfg = classify.Config(method=method, encoder="base", data="shapes", **given)
        cfg.resolve()
        return cfg

    c = made("cfmae")  # Table 8, 400 epochs
    assert (c.base_lr, c.layer_decay, c.batch_size) == (1e-3, 0.7, 2048)
    assert (c.epochs, c.warmup_epochs, c.rand_augment, c.rand_augment_std) == (100, 5, 9, 0.5)
    assert (c.weight_decay, c.beta1, c.beta2, c.drop_path) == (0.05, 0.9, 0.999, 0.1)
    assert (c.mixup, c.cutmix, c.smoothing) == (0.8, 1, 0.1)
    described = encoders.describe(method="cfmae", model="base", epochs=1600)
    c = classify.Config(description=json.dumps(described), method="cfmae", data="shapes")
    c.resolve()
    assert (c.base_lr, c.layer_decay) == (5e-4, 0.65)  # Table 8, 1600 epochs
    c = made("cfmae", granularities="R+I+S")
    assert (c.mixup, c.cutmix) == (0, 1)
    c = made("semanticmim")  # 4e-3 at 1024
    assert (c.base_lr * 1024 / 256, c.layer_decay, c.warmup_epochs) == (4e-3, 0.65, 20)
    c = made("semanticmim", recipe="table3")
    assert (c.base_lr * c.batch_size / 256, c.weight_decay, c.warmup_epochs) == (4e-3, 1e-4, 0)
    c = made("semanticmim", protocol="linear")  # Table 5
    assert (c.epochs, c.batch_size, c.weight_decay, c.warmup_epochs) == (100, 1024, 1e-4, 0)
    assert float(c.rates.split(",")[0]) * 1024 / 256 == 4e-3
    assert made("mcmae").layer_decay in (0.65, 0.75, 0.85)  # Sec. 3.1
    c = made("coma_dyvit", protocol="linear")  # MAE's
    assert (c.epochs, c.batch_size, c.warmup_epochs, c.weight_decay) == (90, 16384, 10, 0)
    assert c.rates.split(",")[0] == "0.1"


# ---------------------------------------------------------------------------------------- model


@pytest.mark.parametrize("method", [*SMALL, "cfmae R+I+S"])
def test_classifier__gradients_and_layer_decay(method, tmp_path):
    method, *granularities = method.split()
    extra = ["--granularities", *granularities] if granularities else ["--mixup", 0.8]
    path = write_checkpoint(tmp_path, method)
    cfg = parse("--checkpoint", path, "--cutmix", 1, "--drop-path", 0.2, *extra)
    model = classify.build(cfg)
    torch.nn.init.normal_(model.head.weight)  # at 2e-5 nothing but the head sees much
    batch = batch_of(cfg)
    loss, _ = model(batch, torch.zeros(()))
    loss.backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and not p.grad.abs().any()]
    assert not missing
    groups = model.parameter_groups(0.05)
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(scale) == len(trainable) == sum(len(g["params"]) for g in groups)
    assert scale[id(model.head.weight)] == scale[id(model.fc_norm.weight)] == 1
    if method == "cfmae":  # MAE's rule for two blocks: head 0, blocks 1 and 2, embedding 3 times
        d = cfg.layer_decay
        assert scale[id(model.encoder.patch_embed.proj.weight)] == pytest.approx(d**3)
        assert scale[id(model.encoder.blocks[0].mlp.fc1.weight)] == pytest.approx(d**2)
        assert scale[id(model.encoder.blocks[1].mlp.fc1.weight)] == pytest.approx(d)


def test_classifier__norm_after_the_mean(tmp_path):
    cfg = parse("--checkpoint", write_checkpoint(tmp_path, "cfmae"))
    model = classify.build(cfg).eval()
    torch.nn.init.normal_(model.head.weight)
    batch = batch_of(cfg)
    ((tokens, _),) = model.encoder.forward_features(model.normalize(batch["rgb"]), [2])
    x = torch.stack([t.mean(0) for t in tokens])
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    assert torch.allclose(model.classify(model.inputs(batch)), model.head(x), atol=1e-5)


def test_classifier__drop_path_comes_from_the_seed(tmp_path):
    cfg = parse("--checkpoint", write_checkpoint(tmp_path, "cfmae"), "--drop-path", 0.9)
    model, batch = classify.build(cfg), batch_of(cfg, 16)
    torch.nn.init.normal_(model.head.weight)
    inputs = model.inputs(batch)
    draws = uniform(batch["seed"], 4, DROP_PATH)  # of two blocks with two branches
    dropped = (draws[:, 2:] < 0.9).all(1)
    assert 8 < dropped.sum() < 16
    without = model.classify({"rgb": inputs["rgb"]}, batch["seed"])
    ((x, _),) = model.encoder.forward_features(inputs["rgb"], [1])
    skipped = model.head(model.fc_norm(x.mean(1)))
    assert torch.equal(torch.isclose(without, skipped, atol=1e-4).all(1), dropped)


# ----------------------------------------------------------------------------------- whole runs


def run(*flags) -> int:
    with short_epochs():
        return classify.main([*FLAGS, *map(str, flags)])


def test_finetune__resumes_bit_for_bit_and_is_evaluated_without_the_source(tmp_path):
    path = write_checkpoint(tmp_path, "coma_dyvit")
    flags = ["--checkpoint", path, "--batch-size", 8, "--micro-batch", 4, "--epochs", 1,
             "--warmup-epochs", 0.2, "--mixup", 0.8, "--cutmix", 1, "--drop-path", 0.2]  # fmt: skip
    a, b, c = (tmp_path / x for x in "abc")
    assert run(*flags, "--output", a) == 0
    assert run(*flags, "--output", b, "--steps", 2) == 0
    path.rename(tmp_path / "gone.pt")
    assert run(*flags, "--output", b, "--resume") == 0
    x, y = (torch.load(d / "last.pt", weights_only=True) for d in (a, b))
    assert x["step"] == y["step"] == 5
    assert all(torch.equal(v, y["model"][k]) for k, v in x["model"].items())
    assert any((v != torch.load(tmp_path / "gone.pt", weights_only=True)["model"][k]).any()
               for k, v in x["model"].items() if k.startswith("encoder."))  # fmt: skip
    del x["config"]["num_heads"]  # as a run from before that field
    engine.save(a / "last.pt", x)
    assert run("--protocol", "evaluate", "--finetuned", a / "last.pt", "--output", c) == 0
    first, again = (json.loads((d / "result.json").read_text()) for d in (a, c))
    assert first["images"] == 40 and {k: first[k] for k in ("top1", "top5")} == {
        k: again[k] for k in ("top1", "top5")
    }
    rows = (a / "per_class.csv").read_text().splitlines()
    assert len(rows) == 11 and sum(int(r.split(",")[2]) for r in rows[1:]) == 40
    with pytest.raises(engine.UserError, match="--layer-decay is 0.75"):
        run("--protocol", "evaluate", "--finetuned", a / "last.pt", "--layer-decay", 0.1)


class Ranks:
    """A world of which only one rank runs; sums over ranks are left to the test."""

    def __init__(self, rank, size):
        self.rank, self.size, self.device, self.local_size = rank, size, torch.device("cpu"), size

    def autocast(self):
        return torch.autocast("cpu", enabled=False)

    def mean(self, x):
        return x / self.size


def test_count_hits__every_image_once_on_any_number_of_ranks(tmp_path, monkeypatch):
    cfg = parse("--checkpoint", write_checkpoint(tmp_path, "mcmae"), "--micro-batch", 4)
    model = classify.build(cfg).eval()
    torch.nn.init.normal_(model.head.weight)
    dataset = data.ShapeScenes("val", 32, 8, ("rgb",), False, length=17)
    monkeypatch.setattr(engine, "raise_error", lambda batch, world=None: batch)
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


def test_bad_input__one_line(tmp_path):
    path = write_checkpoint(tmp_path, "cfmae")
    for name in ("one/train/cat/1.png", "more/train/cat/1.png", "more/train/bat/1.png",
                 "more/val/cat/1.png", "more/val/owl/a/1.png", "more/val/dog/1.JPEG",
                 "none/train/cat/notes.txt", "none/train/dog/.hidden.png"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    for name in ("one/train/dog", "more/train/dog", "more/val/empty"):
        (tmp_path / name).mkdir()
    cases = {
        "one of --checkpoint, --init, --method": [],
        "--encoder huge is a preset of --method": ["--checkpoint", path, "--encoder", "huge"],
        "no class folders with images": ["--checkpoint", path, "--data", tmp_path / "none"],
        "one class alone, cat,": ["--checkpoint", path, "--data", tmp_path / "one"],
        "2 classes of .*/more/val have no image in .*/more/train.*: dog, owl": [
            "--checkpoint", path, "--data", tmp_path / "more",
        ],
        "there is no folder .*nowhere": ["--checkpoint", path, "--data", tmp_path / "nowhere"],
        "nothing.pt": ["--checkpoint", tmp_path / "nothing.pt"],
        "--granularities is CFMAE's": ["--method", "mcmae", "--encoder", "tiny",
                                         "--granularities", "R"],
        "--mixup is undefined": ["--checkpoint", path, "--granularities", "R+I+S", "--mixup", 0.8],
        "reads RGB alone": ["--checkpoint", path, "--granularities", "R+S", "--protocol", "knn"],
        "needs --finetuned": ["--protocol", "evaluate"],
        "is of method and format": ["--protocol", "evaluate", "--finetuned", path],
        "--layer-decay 1.5": ["--checkpoint", path, "--layer-decay", 1.5],
        "--recipe table3 is SemanticMIM's": ["--checkpoint", path, "--recipe", "table3"],
        "--image-size 60": ["--checkpoint", path, "--image-size", 60],
        "--cutmix": ["--checkpoint", path, "--cutmix", 2],
    }  # fmt: skip
    for message, flags in cases.items():
        with pytest.raises(engine.UserError, match=message):
            run(*flags, "--output", tmp_path / "out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text("{}")
    with pytest.raises(engine.UserError, match="is not the configuration of such a run"):
        run("--resume", "--output", tmp_path / "other")
    with pytest.raises(engine.UserError, match="--pool prefix"):
        run("--method", "mcmae", "--encoder", "tiny", "--pool", "prefix", "--batch-size", 8,
            "--output", tmp_path / "o")  # fmt: skip


def test_bad_input__images_outside_class_folders(tmp_path):
    from PIL import Image

    for name in ("a/1.png", "b/2.png", "loose.png"):
        (tmp_path / "d/train" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "d/train" / name)
    path = write_checkpoint(tmp_path, "cfmae")
    with pytest.raises(engine.UserError, match="loose.png lies in no class folder"):
        run("--checkpoint", path, "--data", tmp_path / "d", "--output", tmp_path / "o",
            "--batch-size", 1)  # fmt: skip
