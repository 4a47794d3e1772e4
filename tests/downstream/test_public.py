"""Public encoders: timm's ViT and BEiT, MAE, ConvMAE.

`golden/timm_tiny.pt` holds small random models of timm 1.0.31 (VisionTransformer, Beit): their
state dicts, an input, the features of it, and a table of relative positions that timm resized.
"""

import json
import struct

import pytest
import torch
import torch.nn.functional as F
from test_encoders import GOLDEN, TIMM, WIDE, public_file, seeded  # noqa: F401
from torch.testing import assert_close

import common
import engine
import mcmae
from downstream import encoders, finetune, probe, public_vit, segment
from downstream.encoders import UserError, open_encoder
import vit

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", ["vit", "vit_reg", "vit_reg_free", "beit", "beit_shared"])
def test_public__computes_what_timm_does(name, tmp_path):
    state = {f"module.{k}": v for k, v in TIMM[name]["state_dict"].items()}
    path = public_file(tmp_path, {"model": state})
    encoder, description, report = open_encoder(init=path, num_heads=2)
    assert description["method"] == name.split("_")[0] and "fresh: nothing" in report
    assert "left out: head (2)" in report
    assert ("2 heads, which the file does not tell" in report) == (name[:3] == "vit")
    for layers, wanted in ((None, "features"), ([1], "block1")):
        tokens, prefix = encoder.forward_features(TIMM["imgs"], layers)[0]
        assert tokens.shape == (2, 16, 32) and prefix.shape[1] == (4 if "reg" in name else 1)
        assert_close(torch.cat([prefix, tokens], 1), TIMM[name][wanted], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "beit_shared"])
def test_public__other_sizes(name, tmp_path):
    path = public_file(tmp_path, TIMM[name]["state_dict"])
    kept, _, _ = open_encoder(init=path, num_heads=2)
    made, description, report = open_encoder(init=path, num_heads=2, image_size=(96, 64))
    assert "positions resized from 4x4 to 12x8" in report
    assert description["config"]["image_size"] == [96, 64] and made.grid == (12, 8)
    for a, b in zip(kept.forward_pyramid(WIDE), made.forward_pyramid(WIDE)):
        assert a.shape == (2, 32, 12, 8)
        assert_close(a, b, rtol=1e-4, atol=1e-4)  # resized when used, or when loaded
    old = TIMM[name]["state_dict"]["pos_embed"][:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    wanted = F.interpolate(old, (12, 8), mode="bicubic", antialias=True).flatten(2).mT
    assert_close(made.pos_embed, wanted)
    made.forward_features(WIDE)[0][0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


def test_relative_attention__bias_is_that_of_the_offset():
    attention, (h, w) = public_vit.RelativeAttention(8, 2, (2, 3)), (2, 3)
    table = attention.relative_position_bias_table.data.normal_()
    bias, row = attention.bias(), {}
    for dy in range(1 - h, h):  # rows by raster order of the offset
        for dx in range(1 - w, w):
            row[dy, dx] = len(row)
    for i in range(h * w):
        for j in range(h * w):
            offset = (i // w - j // w, i % w - j % w)
            assert torch.equal(bias[:, 1 + i, 1 + j], table[row[offset]])
    assert torch.equal(bias[:, 0, 1:], table[-3][:, None].expand(2, h * w))  # class to patch
    assert torch.equal(bias[:, 1:, 0], table[-2][:, None].expand(2, h * w))
    assert torch.equal(bias[:, 0, 0], table[-1])
    x = torch.randn(1, 7, 8)
    values = attention.heads(x)[2]
    wanted = attention.proj((attention.weights(x) @ values).transpose(1, 2).flatten(2))
    assert_close(attention(x), wanted)


@pytest.mark.parametrize("grid", [(9, 6), (3, 4)])
def test_resize_table__equals_timms(grid):
    table = TIMM["beit"]["state_dict"]["blocks.0.attn.relative_position_bias_table"]
    assert_close(public_vit.resize_table(table, (4, 4), grid), TIMM["table_{}x{}".format(*grid)])


def test_public__mae_is_computed_as_its_own(tmp_path):
    golden = torch.load(GOLDEN / "mae_tiny.pt", weights_only=True)
    path = public_file(tmp_path, {"model": golden["state_dict"], "epoch": 3})
    encoder, _, report = open_encoder(init=path, num_heads=4)
    assert "42 tensors loaded; left out: mask_token, decoder_pos_embed, decoder_embed (2)" in report
    fixed = vit.ViT((64, 64), 8, 32, 3, 4)  # MAE's positions are the fixed ones
    fixed.load_state_dict({k: golden["state_dict"][k] for k in fixed.state_dict()})
    imgs = torch.randn(1, 3, 64, 64)
    for a, b in zip(encoder.forward_features(imgs)[0], fixed.forward_features(imgs)[0]):
        assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_public__convmae_loads_as_mcmae_does(tmp_path):
    golden = torch.load(GOLDEN / "convmae_tiny.pt", weights_only=True)
    path = public_file(tmp_path, golden["state_dict"])
    encoder, description, report = open_encoder(init=path, num_heads=4)
    sizes = dict(embed_dims="16,24,32", depths="2,1,2", patch_size=16, num_heads=4, image_size=224)
    assert sizes.items() <= description["config"].items() and "fresh: nothing" in report
    decoder = dict(decoder_embed_dim=24, decoder_depth=2, decoder_num_heads=4)
    model = mcmae.MCMAE(mcmae.Config(**sizes, **decoder))
    mcmae.load_init(model, path)  # test_mcmae.py: equal to the public implementation
    assert_close(encoder.state_dict(), dict(model.encoder.state_dict()), rtol=0, atol=0)
    kept = open_encoder(init=path, num_heads=4, image_size=256)
    assert kept[1]["trained_size"] == [224, 224] and kept[0].trained_grid == (14, 14)
    assert torch.equal(kept[0].pos_embed, common.sincos_2d(32, 16, 16, trained=(14, 14)))


def test_public__convmae_fine_tuned(tmp_path):
    """As its main_finetune.py saves it: trained positions, `fc_norm` and `head`, no `norm`."""
    state = torch.load(GOLDEN / "convmae_tiny.pt", weights_only=True)["state_dict"]
    fixed = open_encoder(init=public_file(tmp_path, state), num_heads=4)[0]
    parts = ("decoder", "stage", "mask_token", "norm.")
    state = {k: v for k, v in state.items() if not k.startswith(parts)}
    change = torch.randn(1, 196, 32)
    state["pos_embed"] = fixed.pos_embed[None] + change
    head = {"fc_norm.weight": torch.randn(32), "fc_norm.bias": torch.randn(32),
            "head.weight": torch.randn(7, 32), "head.bias": torch.randn(7)}  # fmt: skip
    path = public_file(tmp_path, {"model": state | head, "epoch": 99})
    encoder, description, found = encoders.open_classifier(path, num_heads=4)
    assert description["method"] == "mcmae" and description["learned_position"]
    assert description["pool"] == "patch"
    assert "mean of the patches, norm, 7 classes" in description["report"]
    assert_close(found, head, rtol=0, atol=0)
    assert isinstance(encoder.pos_embed, torch.nn.Parameter)
    imgs = torch.randn(1, 3, 224, 224)
    a, b = (e.tokens(imgs) for e in (encoder, fixed))
    assert_close(a - b, change, rtol=1e-4, atol=1e-4)
    wide, found, report = open_encoder(init=path, num_heads=4, image_size=256)
    assert "resized from 14x14 to 16x16" in report and found["trained_size"] == [256, 256]
    old = state["pos_embed"].unflatten(1, (14, 14)).permute(0, 3, 1, 2)
    wanted = F.interpolate(old, (16, 16), mode="bicubic", antialias=True).flatten(2).mT
    assert_close(wide.pos_embed, wanted)
    assert_close(encoder.position(16, 16), wanted)  # resized when used


def test_open_classifier__of_mae_and_timm(tmp_path):
    vit = dict(TIMM["vit"]["state_dict"])
    encoder, description, head = encoders.open_classifier(public_file(tmp_path, vit), num_heads=2)
    assert description["pool"] == "prefix" and "class token, norm" in description["report"]
    assert_close(head, {k: vit[k] for k in vit if k.split(".")[0] in ("norm", "head")})
    tuned = {k.replace("norm.", "fc_norm.") if k.startswith("norm.") else k: v
             for k, v in vit.items()}  # fmt: skip
    path = public_file(tmp_path, {"model": tuned, "args": 1})  # MAE's, --global_pool
    encoder, description, head = encoders.open_classifier(path, num_heads=2)
    assert description["pool"] == "patch" and "fc_norm.bias" in head and len(head) == 4
    assert "fresh: norm (2)" in description["report"]
    none = {k: v for k, v in vit.items() if not k.startswith("head")}
    pooled = {k: v for k, v in vit.items() if k != "cls_token"}
    pooled["pos_embed"] = vit["pos_embed"][:, 1:]
    wide = vit | {"head.weight": torch.ones(5, 64)}
    for state, message in ((none, "has no head"), (pooled, "its head reads neither"),
                           (wide, "reads 64 numbers of an encoder of width 32")):  # fmt: skip
        with pytest.raises(UserError, match=message):
            encoders.open_classifier(public_file(tmp_path, state), num_heads=2)


def test_key__chooses_of_several_models(tmp_path):
    vit = TIMM["vit"]["state_dict"]
    states = {n: {k: v + i for k, v in vit.items()} for i, n in enumerate(("model", "model_ema"))}
    path = public_file(tmp_path, states)
    for key, name in ((None, "model"), ("model_ema", "model_ema")):
        encoder, _, report = open_encoder(init=path, key=key, num_heads=2)
        assert torch.equal(encoder.norm.bias, states[name]["norm.bias"])
        other = ({"model", "model_ema"} - {name}).pop()
        assert f"{name} taken, not {other}" in report
    moco = {f"module.{e}.{k}": v + (e == "momentum_encoder")
            for e in ("base_encoder", "momentum_encoder") for k, v in vit.items()}  # fmt: skip
    path = public_file(tmp_path, {"state_dict": moco})
    encoder, _, report = open_encoder(init=path, num_heads=2)
    assert torch.equal(encoder.norm.bias, vit["norm.bias"]) and "head (2), module (32)" in report
    assert "module.base_encoder taken, not module.momentum_encoder" in report
    encoder, _, report = open_encoder(init=path, num_heads=2, key="momentum_encoder")
    assert torch.equal(encoder.norm.bias, vit["norm.bias"] + 1)
    assert "module.momentum_encoder taken, not module.base_encoder" in report
    with pytest.raises(UserError, match="has no 'student'"):
        open_encoder(init=path, num_heads=2, key="student")
    with pytest.raises(UserError, match="--init-key is for --init"):
        open_encoder(method="cfmae", key="model")


HALF, IMAGENET = ([0.5] * 3, [0.5] * 3), ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
OTHER = ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])


@pytest.mark.parametrize("kind, name, wanted", [
    ("vit", "mae_pretrain_vit_base.pth", IMAGENET),
    ("vit", "deit_base_patch16_224-b5f2ef4d.pth", IMAGENET),
    ("vit", "vit_base_patch16_224.augreg_in21k.pth", HALF),  # timm's configuration of each
    ("vit", "vit_base_patch16_224.orig_in21k.pth", HALF),
    ("vit", "vit_base_patch16_siglip_224/pytorch_model.bin", HALF),
    ("beit", "beit_base_patch16_224_pt22k_ft22k.pth", HALF),
    ("beit", "x.pth", HALF),
    ("beit", "beitv2_base_patch16_224.in1k_ft_in1k.pth", IMAGENET),
])  # fmt: skip
def test_statistics__from_the_name(kind, name, wanted, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    torch.save(TIMM[kind]["state_dict"], tmp_path / name)
    _, description, report = open_encoder(init=tmp_path / name, num_heads=2)
    assert (description["mean"], description["std"]) == wanted
    assert f"images less ({', '.join(f'{x:g}' for x in wanted[0])})" in report
    assert description["input"] and description["input"] in report


@pytest.mark.parametrize("file, content", [
    ("config.json", {"mean": OTHER[0], "std": OTHER[1], "num_heads": 2}),
    ("config.json", {"architecture": "vit", "model_args": {"num_heads": 2},
                     "pretrained_cfg": {"mean": OTHER[0], "std": OTHER[1]}}),
    ("preprocessor_config.json", {"image_mean": OTHER[0], "image_std": OTHER[1],
                                  "num_attention_heads": 2}),
])  # fmt: skip
def test_told__by_the_json_beside_the_file(file, content, tmp_path):
    """Input statistics and the number of heads, which no flag gives here."""
    path = tmp_path / "augreg/pytorch_model.bin"  # what is told goes before the name
    path.parent.mkdir()
    torch.save(TIMM["vit"]["state_dict"], path)
    (path.parent / file).write_text(json.dumps(content))
    encoder, description, report = open_encoder(init=path)
    assert (description["mean"], description["std"]) == OTHER
    assert "config.json beside it says" in report and "does not tell" not in report
    assert encoder.blocks[0].attn.num_heads == 2
    (path.parent / file).write_text("[]")
    with pytest.raises(UserError, match="is no JSON object"):
        open_encoder(init=path, num_heads=2)
    (path.parent / file).write_text('{"hidden_act": "quick_gelu"}')
    with pytest.raises(UserError, match="computes with quick_gelu"):
        open_encoder(init=path, num_heads=2)


def test_read__safetensors(tmp_path):
    state, header, body = TIMM["vit"]["state_dict"], {"__metadata__": {"format": "pt"}}, b""
    for k, v in state.items():
        raw = v.numpy().tobytes()
        header[k] = {"dtype": "F32", "shape": list(v.shape),
                     "data_offsets": [len(body), len(body) + len(raw)]}  # fmt: skip
        body += raw
    head = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + body)
    assert_close(engine.read(tmp_path / "m.safetensors", "--init"), dict(state), rtol=0, atol=0)


@pytest.mark.parametrize("script", [finetune, probe, segment])
def test_num_heads__from_the_command_line(script, tmp_path):
    path = public_file(tmp_path, TIMM["vit"]["state_dict"])
    flags = ["--data", "shapes", "--model", "tiny", "--image-size", "64", "--init", str(path)]
    cfg = engine.parse(script.Config, script.PRESETS, "", [*flags, "--num-heads", "2"])
    described = cfg.described
    assert encoders.build(described).blocks[0].attn.num_heads == 2
    with pytest.raises(engine.UserError, match="--num-heads N"):
        engine.parse(script.Config, script.PRESETS, "", flags)
