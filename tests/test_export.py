"""Exported encoders compute what the model does; timm, where installed, loads them strictly."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import common
from downstream import encoders
from downstream.encoders import METHODS, UserError, open_encoder
from test_encoders import KINDS, TIMM, our_checkpoint, pretraining_model
from tools.export import export, timm_constructor, timm_state

PLAIN = [kind for kind in KINDS if kind[0] != "mcmae" and kind != ("coma_dyvit", {})]
IMGS = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def features(encoder):
    with torch.no_grad():
        return torch.cat(encoder.eval().forward_features(IMGS)[0][::-1], 1)  # prefix, patches


@pytest.mark.parametrize("method, changes", KINDS)
def test_encoder__is_a_checkpoint_of_the_encoder_alone(method, changes, tmp_path):
    our_checkpoint(tmp_path / "last.pt", method, **changes)
    said = export(tmp_path / "last.pt", tmp_path / "encoder.pt")
    wanted = features(open_encoder(checkpoint=tmp_path / "last.pt")[0])
    encoder, _, report = open_encoder(checkpoint=tmp_path / "encoder.pt")
    assert torch.equal(features(encoder), wanted) and "fresh: nothing" in report
    assert torch.equal(features(METHODS[method].load_encoder(tmp_path / "encoder.pt")), wanted)
    numbers = sum(p.numel() for p in encoder.parameters())
    assert f"{len(encoder.state_dict())} tensors, {numbers:,} parameters" in said
    assert "decoder_pred (" in said.split("left out")[1].splitlines()[0]
    assert (tmp_path / "encoder.pt").stat().st_size < (tmp_path / "last.pt").stat().st_size
    if method == "semanticmim":
        assert "the final norm is a fresh one" in said


@pytest.mark.parametrize("method, changes", PLAIN)
def test_timm__is_read_as_a_public_vit(method, changes, tmp_path):
    our_checkpoint(tmp_path / "last.pt", method, **changes)
    said = export(tmp_path / "last.pt", tmp_path / "vit.pth", "timm")
    ours = open_encoder(checkpoint=tmp_path / "last.pt")[0]
    heads = ours.blocks[0].attn.num_heads
    theirs, description, report = open_encoder(init=tmp_path / "vit.pth", num_heads=heads)
    assert description["method"] == "vit" and "left out: nothing" in report
    assert_close(features(theirs), features(ours), rtol=1e-5, atol=1e-5)
    state = torch.load(tmp_path / "vit.pth", weights_only=True)
    assert state["pos_embed"].shape == (1, ours.num_prefix + 64,
                                        ours.embed_dim)  # fmt: skip
    assert not any("instance" in k or "semantic" in k for k in state)
    assert ("semantic_embed (2)" in said) == (method == "cfmae")


@pytest.mark.parametrize("method, changes", PLAIN)
def test_timm__the_line_it_prints_gives_the_same_features(method, changes, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is optional; its names are checked without it")
    our_checkpoint(tmp_path / "last.pt", method, **changes)
    said = export(tmp_path / "last.pt", tmp_path / "vit.pth", "timm")
    names = {"timm": timm, "torch": torch}
    exec(re.search(r"loads by +(.*)", said)[1], names)  # strict
    with torch.no_grad():
        theirs = names["model"].eval().forward_features(IMGS)
    ours = features(open_encoder(checkpoint=tmp_path / "last.pt")[0])
    assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_timm_constructor__names_the_usual_sizes():
    with torch.device("meta"):
        base = common.ViT()
        wide = common.ViT((384, 256), class_token=False, reg_tokens=8, init_values=0.1)
        odd = common.ViT((64, 64), 8, 32, 2, 2, mlp_ratio=2)
    assert timm_constructor(base) == (
        'timm.create_model("vit_base_patch16_224", global_pool="", num_classes=0)')  # fmt: skip
    assert timm_constructor(wide) == (
        'timm.create_model("vit_base_patch16_224", class_token=False, reg_tokens=8, '
        'init_values=1e-05, global_pool="", num_classes=0, img_size=(384, 256))')  # fmt: skip
    assert timm_constructor(odd) == (
        "timm.models.VisionTransformer(img_size=(64, 64), embed_dim=32, depth=2, num_heads=2, "
        'patch_size=8, mlp_ratio=2.0, global_pool="", num_classes=0)')  # fmt: skip
    assert timm_state(wide)["pos_embed"].shape == (1, 8 + 24 * 16, 768)
    timm = pytest.importorskip("timm", reason="timm is optional")
    for encoder in (base, wide, odd):
        with torch.device("meta"):
            model = eval(timm_constructor(encoder), {"timm": timm})
        shapes = {k: v.shape for k, v in timm_state(encoder).items()}
        assert {k: v.shape for k, v in model.state_dict().items()} == shapes


@pytest.mark.parametrize("method", METHODS)
def test_full__loads_strictly_into_the_model(method, tmp_path):
    model = our_checkpoint(tmp_path / "last.pt", method)
    export(tmp_path / "last.pt", tmp_path / "full.pth", "full")
    fresh = pretraining_model(method, encoders.describe(checkpoint=tmp_path / "last.pt")["config"])
    fresh.load_state_dict(torch.load(tmp_path / "full.pth", weights_only=True))
    assert_close(dict(fresh.state_dict()), dict(model.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["vit_reg", "beit"])
def test_export__a_transfer_of_a_public_encoder(name, tmp_path):
    torch.save(TIMM[name]["state_dict"], tmp_path / "public.pth")
    encoder, description, _ = open_encoder(init=tmp_path / "public.pth", num_heads=2)
    config = {"image_size": 32, "description": json.dumps(description)}
    model = {f"encoder.{k}": v for k, v in encoder.state_dict().items()} | {"head": torch.ones(3)}
    content = {"format": 1, "method": "classify", "step": 7, "config": config, "model": model}
    torch.save(content, tmp_path / "last.pt")
    assert "left out    head (1)" in export(tmp_path / "last.pt", tmp_path / "encoder.pt")
    again = open_encoder(checkpoint=tmp_path / "encoder.pt")[0]
    assert torch.equal(features(again), features(encoder))
    if name == "beit":
        with pytest.raises(UserError, match="no plain ViT"):
            export(tmp_path / "last.pt", tmp_path / "vit.pth", "timm")
    else:
        export(tmp_path / "last.pt", tmp_path / "vit.pth", "timm")
        again = open_encoder(init=tmp_path / "vit.pth", num_heads=2)[0]
        assert_close(features(again), features(encoder), rtol=1e-5, atol=1e-5)


def test_export__refusals(tmp_path):
    our_checkpoint(tmp_path / "last.pt", "mcmae")
    before = (tmp_path / "last.pt").read_bytes()
    for out, form, message in (
        ("last.pt", "encoder", "exists; name a new file"),
        ("none/x.pt", "encoder", "there is no folder"),
        ("x.pt", "timm", "no plain ViT.*--format encoder"),
    ):
        with pytest.raises(UserError, match=message):
            export(tmp_path / "last.pt", tmp_path / out, form)
    assert (tmp_path / "last.pt").read_bytes() == before and not (tmp_path / "x.pt").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_command__one_line_and_status_2(tmp_path):
    command = [sys.executable, "-m", "tools.export", str(tmp_path / "none.pt"), str(tmp_path / "x")]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"export: error: --checkpoint {tmp_path / 'none.pt'}: no such file\n"
