"""Robustness of a public classifier, whose classes are the class folders of --data."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_robustness import write_images

import common
import data
import shapes
import engine
from downstream import encoders, robustness

TIMM = torch.load(Path(__file__).parents[1] / "golden/timm_tiny.pt", weights_only=True)


def test_main__of_a_public_classifier(tmp_path):
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
    normalize, classes, hits = common.Normalize([0.5] * 3, [0.25] * 3), sorted(shapes.SHAPES), []
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
