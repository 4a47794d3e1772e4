"""Exported encoders compute what the model does; timm, where installed, loads them strictly."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import common
import engine
from downstream import encoders
from downstream.encoders import METHODS, UserError, open_encoder
from engine import reader
from test_encoders import KINDS, TIMM, our_checkpoint, pretraining_model
from tools import charts
from tools.export import export, timm_constructor, timm_state
import vit

pytestmark = pytest.mark.slow

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
    patches = math.prod(ours.grid)
    assert state["pos_embed"].shape == (1, ours.num_prefix + patches, ours.embed_dim)
    assert not any("instance" in k or "semantic" in k for k in state)
    assert ("semantic_embed (2)" in said) == (method == "cfmae")


@pytest.mark.parametrize("method, changes", PLAIN)
def test_timm__the_line_it_prints_gives_the_same_features(method, changes, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is optional; its names are checked without it")
    our_checkpoint(tmp_path / "last.pt", method, **changes)
    said = export(tmp_path / "last.pt", tmp_path / "vit.pth", "timm")
    with torch.no_grad():
        theirs = loads_by(said, timm).forward_features(IMGS)
    ours = features(open_encoder(checkpoint=tmp_path / "last.pt")[0])
    assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_timm_constructor__names_the_usual_sizes():
    with torch.device("meta"):
        base = vit.ViT()
        wide = vit.ViT((384, 256), class_token=False, reg_tokens=8, init_values=0.1)
        odd = vit.ViT((64, 64), 8, 32, 2, 2, mlp_ratio=2)
    assert timm_constructor(base) == (
        'timm.create_model("vit_base_patch16_224", global_pool="", num_classes=0)')  # fmt: skip
    assert timm_constructor(wide) == (
        'timm.create_model("vit_base_patch16_224", img_size=(384, 256), class_token=False, '
        'reg_tokens=8, init_values=1e-05, global_pool="", num_classes=0)')  # fmt: skip
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


def transfer(path, encoder, description, image_size=32, method="classify", **config):
    """Write a checkpoint of a fine-tuned classifier of five classes."""
    D = encoder.norm.normalized_shape[0]
    head = {"fc_norm.weight": torch.rand(D) + 0.5, "fc_norm.bias": torch.randn(D),
            "head.weight": torch.randn(5, D), "head.bias": torch.randn(5)}  # fmt: skip
    config |= {"image_size": image_size, "description": json.dumps(description)}
    model = {f"encoder.{k}": v for k, v in encoder.state_dict().items()} | head
    engine.save(path, {"format": 1, "method": method, "step": 7, "config": config, "model": model})
    return head


@pytest.mark.parametrize("name", ["vit_reg", "beit", "beit_shared"])
def test_export__a_transfer_of_a_public_encoder(name, tmp_path):
    torch.save(TIMM[name]["state_dict"], tmp_path / "public.pth")
    encoder, description, _ = open_encoder(init=tmp_path / "public.pth", num_heads=2)
    transfer(tmp_path / "last.pt", encoder, description, method="segment")
    said = export(tmp_path / "last.pt", tmp_path / "encoder.pt")
    assert "left out    fc_norm (2), head (2)" in said
    again, same, _ = open_encoder(checkpoint=tmp_path / "encoder.pt")
    assert torch.equal(features(again), features(encoder)) and same == description
    said = export(tmp_path / "last.pt", tmp_path / "vit.pth", "timm")
    assert f"less ({0.5 if 'beit' in name else 0.485}, " in said
    state = torch.load(tmp_path / "vit.pth", weights_only=True)
    if "beit" in name:  # timm's own names, which the file it came from has; tables for each block
        shared = "rel_pos_bias.relative_position_bias_table"
        own = {k for k in TIMM[name]["state_dict"] if k != shared and k.split(".")[0] != "head"}
        assert own <= state.keys()
    again = open_encoder(init=tmp_path / "vit.pth", num_heads=2)[0]
    assert_close(features(again), features(encoder), rtol=1e-5, atol=1e-5)
    timm = pytest.importorskip("timm", reason="timm is optional")
    model = loads_by(said, timm)
    with torch.no_grad():
        theirs = model.forward_features(TIMM["imgs"])
        ours = encoder.eval().forward_features(TIMM["imgs"])[0]
    assert_close(theirs, torch.cat(ours[::-1], 1), rtol=1e-5, atol=1e-5)


def loads_by(said, timm):
    names = {"timm": timm, "torch": torch}
    exec(re.search(r"loads by +(.*)", said)[1], names)  # strict
    return names["model"].eval()


@pytest.mark.parametrize("name, pool", [("vit", "patch"), ("vit", "prefix"), ("vit_reg", "patch"),
                                        ("beit", "patch"), ("beit", "prefix")])  # fmt: skip
def test_export__a_fine_tuned_classifier_keeps_norm_and_head(name, pool, tmp_path):
    torch.save(TIMM[name]["state_dict"], tmp_path / "public.pth")
    encoder, description, _ = open_encoder(init=tmp_path / "public.pth", num_heads=2)
    head = transfer(tmp_path / "last.pt", encoder, description, pool=pool)
    said = export(tmp_path / "last.pt", tmp_path / "vit.pth", "timm")
    assert f'global_pool="{"avg" if pool == "patch" else "token"}", num_classes=5' in said
    assert "left out    norm (2)" in said and "classifier under timm's names" in said
    tokens, prefix = encoder.eval().forward_features(TIMM["imgs"], [2])[0]
    x = (tokens if pool == "patch" else prefix).mean(1)
    x = F.layer_norm(x, (32,), head["fc_norm.weight"], head["fc_norm.bias"], 1e-6)
    wanted = F.linear(x, head["head.weight"], head["head.bias"]).detach()
    again, found, state = encoders.open_classifier(tmp_path / "vit.pth", num_heads=2)
    assert found["pool"] == pool and "5 classes" in found["report"]
    x = again.forward_features(TIMM["imgs"], [2])[0][pool == "prefix"].mean(1)
    norm = "fc_norm" if pool == "patch" else "norm"
    x = F.layer_norm(x, (32,), state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-6)
    got = F.linear(x, state["head.weight"], state["head.bias"]).detach()
    assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    timm = pytest.importorskip("timm", reason="timm is optional")
    with torch.no_grad():
        assert_close(loads_by(said, timm)(TIMM["imgs"]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("config, why", [({"granularities": "R+S"}, "reads label maps"),
                                         ({"pool": "prefix"}, "no mean over prefix")])  # fmt: skip
def test_export__a_head_that_timm_cannot_have_is_left_out(config, why, tmp_path):
    our_checkpoint(tmp_path / "a.pt", "semanticmim")
    encoder, description, _ = open_encoder(checkpoint=tmp_path / "a.pt")
    transfer(tmp_path / "last.pt", encoder, description, 64, **config)
    said = export(tmp_path / "last.pt", tmp_path / "vit.pth", "timm")
    assert why in said and "fc_norm (2), head (2)" in said and "num_classes=0" in said


def test_export__positions_refer_to_the_grid_that_was_trained(tmp_path):
    """A run at 96 x 64 of an encoder pre-trained at 64: the positions written are those in use."""
    our_checkpoint(tmp_path / "a.pt", "cfmae")
    encoder, description, _ = open_encoder(checkpoint=tmp_path / "a.pt", image_size=(96, 64))
    transfer(tmp_path / "last.pt", encoder, description, 96, "segment", crop_width=64)
    export(tmp_path / "last.pt", tmp_path / "vit.pth", "timm")
    written = torch.load(tmp_path / "vit.pth", weights_only=True)["pos_embed"]
    D = encoder.embed_dim
    assert torch.equal(written[0, 1:], common.sincos_2d(D, 12, 8, trained=(8, 8)))
    assert not torch.equal(written[0, 1:], common.sincos_2d(D, 12, 8))
    export(tmp_path / "last.pt", tmp_path / "encoder.pt")
    again, same, _ = open_encoder(checkpoint=tmp_path / "encoder.pt")
    assert same == description | {"learned_position": False}
    assert again.grid == (12, 8) and torch.equal(again.pos_embed, encoder.pos_embed)
    script = METHODS["cfmae"].load_encoder(tmp_path / "encoder.pt", image_size=(96, 64))
    assert torch.equal(script.pos_embed, encoder.pos_embed)


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
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"export: error: {tmp_path / 'none.pt'}: no such file\n"


# -------------------------------------------------------------------------------- safetensors


@pytest.mark.parametrize("method, changes", [("semanticmim", {}), ("coma_dyvit", {})])
def test_safetensors__an_encoder_is_a_checkpoint(method, changes, tmp_path):
    """The same as a file of torch's: by --checkpoint, by the script, in a picture's caption."""
    our_checkpoint(tmp_path / "last.pt", method, **changes)
    for name in ("e.pt", "e.safetensors"):
        export(tmp_path / "last.pt", tmp_path / name)
    (ours, one, _), (theirs, other, report) = (
        open_encoder(checkpoint=tmp_path / f"e.{suffix}") for suffix in ("pt", "safetensors")
    )
    assert one == other and "fresh: nothing" in report
    assert torch.equal(features(theirs), features(ours))
    script = METHODS[method].load_encoder(tmp_path / "e.safetensors")
    assert torch.equal(features(script), features(ours))
    assert charts.peek(tmp_path / "e.safetensors") == charts.peek(tmp_path / "e.pt") != {}
    with pytest.raises(UserError, match="--checkpoint"):
        open_encoder(init=tmp_path / "e.safetensors")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_timm__init_reads_heads_mean_and_deviation_off_the_file(suffix, tmp_path):
    """Four heads of 32: a width of 128 alone would not tell."""
    our_checkpoint(tmp_path / "a.pt", "semanticmim")
    encoder, description, _ = open_encoder(checkpoint=tmp_path / "a.pt", mean=(0.5, 0.4, 0.3))
    transfer(tmp_path / "last.pt", encoder, description, 64)
    said = export(tmp_path / "last.pt", tmp_path / f"vit.{suffix}", "timm")
    assert encoder.blocks[0].attn.num_heads == 4 and f"vit.{suffix}" in said
    theirs, found, report = open_encoder(init=tmp_path / f"vit.{suffix}")
    assert theirs.blocks[0].attn.num_heads == 4 and "does not tell" not in report
    assert found["mean"] == [0.5, 0.4, 0.3] and found["std"] == description["std"]
    wanted = features(open_encoder(checkpoint=tmp_path / "last.pt")[0])
    assert_close(features(theirs), wanted, rtol=1e-5, atol=1e-5)


def test_full__into_safetensors(tmp_path):
    model = our_checkpoint(tmp_path / "last.pt", "mcmae")
    export(tmp_path / "last.pt", tmp_path / "full.safetensors", "full")
    state = engine.read(tmp_path / "full.safetensors")
    model.load_state_dict(state)  # strict
    assert list(state)[0] in dict(model.state_dict())
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is optional")
    theirs = safetensors.load_file(tmp_path / "full.safetensors")
    assert theirs.keys() == state.keys()
    assert all(torch.equal(theirs[k], v) for k, v in model.state_dict().items())


def test_write_safetensors__every_dtype_bit_for_bit(tmp_path):
    """Also what is empty, has no axes, is transposed or has a name in another script."""
    state = {f"x.{k}": (100 * torch.rand(3, 5) - 20).to(v) for k, v in reader.DTYPES.items()}
    state |= {"none": torch.zeros(0, 4), "one": torch.tensor(7), "Überlänge": torch.rand(4, 6).T}
    state["odd"] = torch.arange(3, dtype=torch.uint8)  # the next one would not be aligned
    reader.write_safetensors(tmp_path / "x.safetensors", state)
    found = engine.read(tmp_path / "x.safetensors")
    assert found.keys() == state.keys() and len(reader.DTYPES) == 10
    for k, v in state.items():
        assert found[k].dtype == v.dtype and torch.equal(found[k], v), k
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") % 8 == 0
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is optional")
    theirs = safetensors.load_file(tmp_path / "x.safetensors")
    assert theirs.keys() == state.keys()
    assert all(theirs[k].dtype == v.dtype and torch.equal(theirs[k], v) for k, v in state.items())
    whole = {k: v.contiguous() for k, v in state.items()}
    words = {"format": "pt", reader.OURS: "{}"}
    assert theirs_and_ours_differ_by(safetensors.save(whole, words), tmp_path) == 0


def theirs_and_ours_differ_by(raw, tmp_path):
    """Bytes of the tensors that differ, and entries of the header."""
    ours = (tmp_path / "x.safetensors").read_bytes()
    starts = [8 + int.from_bytes(x[:8], "little") for x in (raw, ours)]
    headers = [json.loads(x[8:n]) for x, n in zip((raw, ours), starts)]
    return (headers[0] != headers[1]) + (raw[starts[0] :] != ours[starts[1] :])


def test_safetensors__a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    our_checkpoint(tmp_path / "last.pt", "mae")

    def full(*args):
        args[0].write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tools.export.write_safetensors", full)
    with pytest.raises(UserError, match="cannot write .*No space left"):
        export(tmp_path / "last.pt", tmp_path / "x.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
