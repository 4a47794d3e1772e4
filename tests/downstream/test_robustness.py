"""ImageNet-A, -R, -Sketch, -C: arithmetic, folders, restricted logits, bad input."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_encoders import TIMM
from test_finetune import run, write_checkpoint

import data
import shapes
import engine
from common import Normalize
from downstream import encoders, evaluate, robustness

pytestmark = pytest.mark.slow

TABLE_4 = {  # CFMAE: IN-A, IN-R, IN-S, mCE, score
    "MAE": (35.9, 48.3, 34.5, 51.7, 41.8), "MFM": (32.7, 48.6, 34.8, 47.5, 42.2),
    "MultiMAE": (33.2, 49.9, 37.2, 49.6, 42.7), "CFMAE": (35.2, 50.6, 37.4, 48.8, 43.6),
}  # fmt: skip


def test_score__table_4():
    for *values, printed in TABLE_4.values():
        assert robustness.score(*values) == pytest.approx(printed, abs=0.0501)


def test_mean_corruption_error__by_hand():
    errors = {"fog": 0.5, "snow": 0.3, "spatter": 0.9}
    mce, alexnet = robustness.mean_corruption_error, robustness.ALEXNET
    assert mce(errors, {"fog": 1.0, "snow": 0.4}) == pytest.approx(62.5)
    assert mce(alexnet, alexnet) == 100


def test_baseline__json_csv_and_bad_files(tmp_path):
    (tmp_path / "b.json").write_text('{"fog": 0.8}')
    (tmp_path / "b.csv").write_text("corruption,error\nfog,0.8\nsnow,0.5\n")
    assert robustness.read_baseline(str(tmp_path / "b.json")) == {"fog": 0.8}
    assert robustness.read_baseline(str(tmp_path / "b.csv")) == {"fog": 0.8, "snow": 0.5}
    for text in ('{"fog": 81.9}', "[1]", "{", '{"fog": "x"}', "{}"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(engine.UserError, match="--baseline"):
            robustness.read_baseline(str(tmp_path / "bad.json"))


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> Path:
    """A fine-tuned model of ShapeScenes, with random logits; val is the middle of an image."""
    folder = tmp_path_factory.mktemp("model")
    path = write_checkpoint(folder, "cfmae")
    run("--checkpoint", path, "--batch-size", 8, "--steps", 1, "--crop-pct", 0.75,
        "--output", folder / "run")  # fmt: skip
    checkpoint = torch.load(folder / "run/last.pt", weights_only=True)
    torch.manual_seed(0)
    checkpoint["model"]["head.weight"].normal_()
    engine.save(folder / "run/last.pt", checkpoint)
    return folder / "run/last.pt"


def write_images(folder: Path, classes: list[str], count: int = 3) -> None:
    dataset = shapes.ShapeScenes("val", 48, 2, ("rgb",), False, length=60)
    number = 0
    for name in classes:
        (folder / name).mkdir(parents=True)
        for _ in range(count):
            rgb = dataset[0, number]["rgb"].permute(1, 2, 0).numpy()
            Image.fromarray(rgb).save(folder / name / f"{number}.png")
            number += 1


def test_main__all_four_sets(finetuned, tmp_path, capsys):
    write_images(tmp_path / "a", ["ring", "bar"])
    (tmp_path / "val/zebra").mkdir(parents=True)  # a sibling that is no class of the model
    write_images(tmp_path / "s", list(shapes.SHAPES), 1)
    for group, corruption in (("noise", "shot"), ("blur", "zoom")):
        for severity in range(1, 6):
            folder = tmp_path / "c" / group / corruption / str(severity)
            write_images(folder, list(shapes.SHAPES), 1 + (severity == 5))
    (tmp_path / "b.json").write_text('{"shot": 0.5, "zoom": 0.8}')
    sets = {"a": "a", "r": "a", "sketch": "s", "c": "c"}
    flags = [x for k, v in sets.items() for x in (f"--imagenet-{k}", str(tmp_path / v))]
    common = ["--finetuned", str(finetuned), "--workers", "0", "--device", "cpu", "--output"]
    robustness.main([*common, str(tmp_path / "out"), "--baseline", str(tmp_path / "b.json"),
                            *flags])  # fmt: skip
    said = capsys.readouterr().out
    assert "imagenet_a has 2 class folders, the published set 200" in said
    assert "imagenet_r has 2 class folders" in said and "imagenet_sketch has" not in said
    text = (tmp_path / "out/robustness.json").read_text()
    with pytest.raises(engine.UserError, match="out/robustness.json is a finished result"):
        robustness.main([*common, str(tmp_path / "out"), *flags[:2]])
    assert (tmp_path / "out/robustness.json").read_text() == text
    found = json.loads(text)

    model = evaluate.open_finetuned(finetuned).eval()

    def top1(folder: Path, among: list[str], edge: int) -> float:
        """One image at a time, without the `edge` of its 48 pixels, the best of `among`."""
        hits = []
        for path in sorted(folder.glob("*/*.png")):
            rgb = data.decode_image(data.read_bytes(str(path)))[None, :, edge : 48 - edge]
            rgb = rgb[..., edge : 48 - edge]
            rgb = F.interpolate(rgb, (32, 32), mode="bicubic", antialias=True)
            with torch.no_grad():
                row = model.classify(model.inputs({"rgb": rgb}))[0]
            best = max(among, key=lambda name: row[shapes.SHAPES.index(name)])
            hits.append(best == path.parent.name)
        return 100 * sum(hits) / len(hits)

    result = found["result"]
    assert result["imagenet_a"] == result["imagenet_r"] == top1(tmp_path / "a", ["ring", "bar"], 6)
    assert result["imagenet_sketch"] == top1(tmp_path / "s", list(shapes.SHAPES), 6)
    errors = {}
    for name, group in (("shot", "noise"), ("zoom", "blur")):
        folders = [tmp_path / "c" / group / name / str(s) for s in range(1, 6)]
        errors[name] = sum(100 - top1(f, list(shapes.SHAPES), 0) for f in folders) / 500
    assert found["corruption_errors"] == pytest.approx(errors)
    mce = 50 * (errors["shot"] / 0.5 + errors["zoom"] / 0.8)
    assert result["mce"] == pytest.approx(mce)
    expected = (result["imagenet_a"] * 2 + result["imagenet_sketch"] + 100 - mce) / 4
    assert result["score"] == pytest.approx(expected)
    images = {name: row["images"] for name, row in found["sets"].items()}
    expected = {"imagenet_a": 6, "imagenet_r": 6, "imagenet_sketch": 10}
    for name in errors:
        expected |= {f"{name}/{s}": 20 if s == 5 else 10 for s in range(1, 6)}
    assert images == expected
    assert len((tmp_path / "out/robustness.csv").read_text().splitlines()) == 1 + 3 + 10
    with pytest.raises(engine.UserError, match="lacking gaussian_noise"):
        robustness.main([*common, str(tmp_path / "o"), "--imagenet-c", str(tmp_path / "c")])


def test_bad_input__one_line(finetuned, tmp_path):
    write_images(tmp_path / "x", ["ring", "zebra"], 1)
    write_images(tmp_path / "c/fog/1", ["ring"], 1)
    fewer = [name for name in shapes.SHAPES if name != "heart"]
    for place in ("fewer/s", *(f"d/fog/{severity}" for severity in range(1, 6))):
        write_images(tmp_path / place, fewer, 1)
    (tmp_path / "b.csv").write_text("fog,0.5")
    (tmp_path / "empty").mkdir()
    model = ["--finetuned", str(finetuned), "--workers", "0", "--device", "cpu"]
    fog = [*model, "--baseline", str(tmp_path / "b.csv"), "--imagenet-c"]
    cases = {
        "nothing to test": model,
        "folders zebra": [*model, "--imagenet-a", str(tmp_path / "x")],
        "no images": [*model, "--imagenet-a", str(tmp_path / "empty")],
        "there is no folder": [*model, "--imagenet-r", str(tmp_path / "nowhere")],
        "fewer/s .*lack.* heart": [*model, "--imagenet-sketch", str(tmp_path / "fewer/s")],
        "d/fog/1 .*lack.* heart": [*fog, str(tmp_path / "d")],
        "lacks severity 2, 3, 4, 5": [*model, "--imagenet-c", str(tmp_path / "c")],
        "no <corruption>": [*model, "--imagenet-c", str(tmp_path / "x")],
        "none.pt: no such file": ["--finetuned", "none.pt", "--imagenet-a", str(tmp_path / "x")],
        "which model": ["--imagenet-a", str(tmp_path / "x")],
        "with --data ROOT": ["--init", "x.pth", "--imagenet-a", str(tmp_path / "x")],
    }
    for message, flags in cases.items():
        with pytest.raises(engine.UserError, match=message):
            robustness.main([*flags, "--output", str(tmp_path / "out")])
    robustness.main([*model, "--imagenet-a", str(tmp_path / "fewer/s"), "--output",
                            str(tmp_path / "out")])  # fmt: skip


def test_main__makes_its_output_before_the_first_test(finetuned, tmp_path, monkeypatch, capsys):
    write_images(tmp_path / "a", ["ring"], 1)
    (tmp_path / "file").touch()
    seen = []

    def test(*args):
        seen.append((tmp_path / "out").is_dir())
        raise engine.UserError("tested")

    monkeypatch.setattr(robustness, "test_folder", test)
    flags = ["--finetuned", str(finetuned), "--device", "cpu", "--imagenet-a", str(tmp_path / "a")]
    for out, message in ((tmp_path / "file/out", "file/out"), (tmp_path / "out", "tested")):
        with pytest.raises(SystemExit) as end:
            engine.command("x", lambda out=out: robustness.main([*flags, "--output", str(out)]))
        assert end.value.code == 2 and message in capsys.readouterr().err
    assert seen == [True]


def test_main__of_a_public_classifier(tmp_path):
    """Its classes are the class folders of --data."""
    torch.manual_seed(0)
    (tmp_path / "vit").mkdir()
    state = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v
             for k, v in TIMM["vit"]["state_dict"].items()}  # fmt: skip
    head = {"head.weight": torch.randn(len(shapes.SHAPES), 32), "head.bias": torch.zeros(10)}
    torch.save({"model": state | head}, tmp_path / "vit/pytorch_model.bin")
    told = {"num_heads": 2, "mean": [0.5] * 3, "std": [0.25] * 3}
    (tmp_path / "vit/config.json").write_text(json.dumps(told))
    write_images(tmp_path / "root/val", sorted(shapes.SHAPES), 1)
    write_images(tmp_path / "a", ["ring", "bar"])
    init = str(tmp_path / "vit/pytorch_model.bin")
    flags = ["--init", init, "--data", str(tmp_path / "root"), "--workers", "0", "--device", "cpu",
             "--imagenet-a", str(tmp_path / "a")]  # fmt: skip
    robustness.main([*flags, "--output", str(tmp_path / "out")])
    found = json.loads((tmp_path / "out/robustness.json").read_text())
    encoder, description, head = encoders.open_classifier(init)
    normalize, classes, hits = Normalize([0.5] * 3, [0.25] * 3), sorted(shapes.SHAPES), []
    for path in sorted((tmp_path / "a").glob("*/*.png")):
        rgb = data.decode_image(data.read_bytes(str(path)))[None]
        rgb = F.interpolate(rgb, (32, 32), mode="bicubic", antialias=True)
        with torch.no_grad():
            x = encoder.forward_features(normalize(rgb), [2])[0][0].mean(1)
            x = F.layer_norm(x, (32,), head["fc_norm.weight"], head["fc_norm.bias"], 1e-6)
            row = F.linear(x, head["head.weight"])[0]
        hits.append(max(("ring", "bar"), key=lambda c: row[classes.index(c)]) == path.parent.name)
    assert found["result"]["imagenet_a"] == pytest.approx(100 * sum(hits) / len(hits))
    assert found["init"] == init and found["finetuned"] is None
    write_images(tmp_path / "few/val", ["ring", "bar"], 1)
    flags[3] = str(tmp_path / "few")
    with pytest.raises(engine.UserError, match="10 classes.* has 2|2 .*classes"):
        robustness.main([*flags, "--output", str(tmp_path / "o")])
