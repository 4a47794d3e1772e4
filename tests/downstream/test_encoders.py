"""Encoders for transfer: of our checkpoints, fresh ones, bad input; public ones: test_public.py."""

import json
import os
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import engine
from downstream import encoders, public_vit
from downstream.encoders import METHODS, UserError, build, describe, open_encoder
from tools.models import model_class

GOLDEN = Path(__file__).parents[1] / "golden"
TIMM = torch.load(GOLDEN / "timm_tiny.pt", weights_only=True)
WIDE = torch.randn(2, 3, 96, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def public_file(tmp_path, state, name="x.pth"):
    torch.save(state, tmp_path / name)
    return tmp_path / name


def pretraining_model(method, config):
    return model_class(method)(METHODS[method].Config(**config))


def our_checkpoint(path, method, **changes):
    """Write a checkpoint of an untrained `tiny` model with every parameter perturbed."""
    config = describe(method=method, model="tiny", **changes)["config"]
    model = pretraining_model(method, config)
    for p in model.parameters():
        p.data += 0.02 * torch.randn(p.shape)
    engine.save(path, {"format": 1, "method": method, "step": 0, "config": config,
                       "model": model.state_dict(), "optimizer": {}, "window": {}})  # fmt: skip
    return model.eval()


# --------------------------------------------------------------------------------- our checkpoints

KINDS = [("mae", {}), ("cfmae", {}), ("semanticmim", {}), ("semanticmim", {"proxies": 0}),
         ("mcmae", {}), ("coma_dyvit", {})]  # fmt: skip


@pytest.mark.parametrize("method, changes", KINDS)
@pytest.mark.slow
def test_ours__features_of_the_model(method, changes, tmp_path):
    model = our_checkpoint(tmp_path / "a.pt", method, **changes)
    encoder, description, report = open_encoder(checkpoint=tmp_path / "a.pt")
    assert "left out: nothing" in report and json.loads(json.dumps(description)) == description
    if method == "semanticmim":  # the norm of pre-training is not the encoder's: it starts afresh
        assert "fresh: norm (2)" in report and (encoder.norm.weight == 1).all()
        model.encoder.norm = nn.LayerNorm(128, eps=1e-6)
    imgs = torch.randn(2, 3, 64, 64)
    for a, b in zip(encoder.forward_features(imgs)[0], model.encoder.forward_features(imgs)[0]):
        assert torch.equal(a, b)
    assert all(p.requires_grad for p in encoder.parameters())
    again = build(description)  # resumes without the file
    again.load_state_dict(encoder.state_dict())
    for a, b in zip(again.forward_pyramid(imgs), encoder.forward_pyramid(imgs)):
        assert torch.equal(a, b)
    random, same, report = open_encoder(checkpoint=tmp_path / "a.pt", random=True)
    assert same == description and "fresh weights" in report
    pair = [e.forward_features(imgs)[0][0] for e in (random, encoder)]
    assert pair[0].shape == pair[1].shape and not torch.equal(*pair)
    made = open_encoder(checkpoint=tmp_path / "a.pt", image_size=(96, 64), drop_path=0.1)[0]
    assert made.drop_path == 0.1
    for a, b in zip(made.forward_pyramid(WIDE), encoder.forward_pyramid(WIDE)):
        assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_ours__cfmae_without_maps(tmp_path):
    our_checkpoint(tmp_path / "a.pt", "cfmae")
    encoder, _, report = open_encoder(checkpoint=tmp_path / "a.pt", granularities="R")
    assert "left out: instance_embed (2), semantic_embed (2)" in report
    encoder.forward_features(torch.randn(1, 3, 64, 64))[0][0].sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_ours__checkpoint_of_a_transfer(tmp_path):
    """Its description says what the encoder is, its config at which size it was trained."""
    our_checkpoint(tmp_path / "a.pt", "semanticmim")
    encoder, description, _ = open_encoder(checkpoint=tmp_path / "a.pt", image_size=(96, 64))
    encoder.norm.weight.data += 1
    description["config"]["image_size"] = 64  # as it is where only `build` was told the crop
    transfer_of(tmp_path / "b.pt", encoder, description, 96, crop_width=64)
    again, description, report = open_encoder(checkpoint=tmp_path / "b.pt")
    assert description["method"] == "semanticmim"
    assert description["config"]["image_size"] == [96, 64]
    assert "fresh: nothing" in report and again.grid == (6, 4)
    assert_close(again.state_dict(), dict(encoder.state_dict()), rtol=0, atol=0)


def transfer_of(path, encoder, description, image_size, **config):
    """Write a checkpoint of a transfer with this encoder, trained at `image_size`."""
    config |= {"image_size": image_size, "description": json.dumps(description)}
    state = {"head.bias": torch.ones(3)}
    state |= {f"encoder.{k}": v for k, v in encoder.state_dict().items()}
    engine.save(path, {"format": 1, "method": "segment", "config": config, "model": state})


@pytest.mark.parametrize("method, changes", KINDS)
@pytest.mark.slow
def test_ours__positions_refer_to_the_trained_grid_through_a_transfer(method, changes, tmp_path):
    """Pre-trained at 64, fine-tuned at 96, opened at 128: as the pre-trained one at 128."""
    our_checkpoint(tmp_path / "a.pt", method, **changes)
    description = describe(checkpoint=tmp_path / "a.pt", image_size=96)  # as finetune calls it
    tuned = build(description, 96)
    encoders.load(tuned, description, tmp_path / "a.pt")
    transfer_of(tmp_path / "b.pt", tuned, description, 96)
    kept, _, _ = open_encoder(checkpoint=tmp_path / "a.pt", image_size=128)
    again, found, _ = open_encoder(checkpoint=tmp_path / "b.pt", image_size=128)
    imgs = torch.randn(1, 3, 128, 128)
    if method == "semanticmim":  # learned: the transfer's 12 x 12 are resized, not the 8 x 8
        assert found["trained_size"] == [128, 128] and found["learned_position"]
        assert describe(checkpoint=tmp_path / "b.pt")["trained_size"] == [96, 96]
    else:
        assert description["trained_size"] == found["trained_size"] == [64, 64]
        assert not found["learned_position"] and torch.equal(again.pos_embed, kept.pos_embed)
        for a, b in zip(again.forward_pyramid(imgs), kept.forward_pyramid(imgs)):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_ours__mae_weights_as_from_the_public_file(tmp_path):
    """At another size, too: sine-cosine on the trained grid is a bicubic resize within 1.4 %."""
    base = dict(patch_size=16, image_size=224, embed_dim=768, depth=1)
    model = our_checkpoint(tmp_path / "a.pt", "mae", **base)
    state = dict(model.encoder.state_dict())
    fixed = model.encoder.pos_embed
    state["pos_embed"] = torch.cat([torch.zeros(1, fixed.shape[1]), fixed])[None]
    path = public_file(tmp_path, {"model": state})
    for size, off in ((192, 0.014), (512, 0.014)):
        ours = open_encoder(checkpoint=tmp_path / "a.pt", image_size=size)[0]
        public, description, _ = open_encoder(init=path, num_heads=4, image_size=size)
        n = ours.grid[0]
        a, b = ours.position(n, n), public.position(n, n)[0]
        assert (a - b).norm() <= off * b.norm()
        imgs = torch.randn(1, 3, size, size)
        with torch.no_grad():
            a, b = (e.embed(imgs) if size > 224 else e.forward_features(imgs)[0][0]
                    for e in (ours, public))  # fmt: skip
        assert (a - b).norm() <= off * b.norm()
        assert description["trained_size"] == [size, size]  # resized, they belong to this grid


@pytest.mark.slow
def test_train_position__of_fixed_ones(tmp_path):
    our_checkpoint(tmp_path / "a.pt", "cfmae")
    fixed, _, _ = open_encoder(checkpoint=tmp_path / "a.pt", image_size=96)
    made, description, report = open_encoder(
        checkpoint=tmp_path / "a.pt", image_size=96, train_position=True
    )
    assert "missing, so fresh: pos_embed" in report  # the file has none, being fixed
    assert description["learned_position"] and description["trained_size"] == [96, 96]
    assert torch.equal(made.pos_embed[0], fixed.pos_embed)
    imgs = torch.randn(1, 3, 96, 96)
    assert torch.equal(made.forward_features(imgs)[0][0], fixed.forward_features(imgs)[0][0])
    made.forward_features(imgs)[0][0].sum().backward()
    assert made.pos_embed.grad.abs().sum() > 0 and made.layer_ids()["pos_embed"] == 0
    groups = engine.layer_decay_groups(made, [], 0.05, 0.5)
    (group,) = [g for g in groups if any(p is made.pos_embed for p in g["params"])]
    assert group["weight_decay"] == 0 and group["lr_scale"] == 0.5**5
    made.pos_embed.data += torch.randn(made.pos_embed.shape)
    # a description that was written before `build` was told so, as a run's is
    described = describe(checkpoint=tmp_path / "a.pt", image_size=96)
    assert not described["learned_position"]
    transfer_of(tmp_path / "b.pt", made, described, 96)
    again, found, report = open_encoder(checkpoint=tmp_path / "b.pt")
    assert "fresh: nothing" in report and found["learned_position"]
    assert torch.equal(again.forward_features(imgs)[0][0], made.forward_features(imgs)[0][0])
    wider, found, report = open_encoder(checkpoint=tmp_path / "b.pt", image_size=(96, 64))
    assert "positions resized from 12x12 to 12x8" in report and found["trained_size"] == [96, 64]
    assert_close(wider.pos_embed, made.position(12, 8))
    assert (wider.position(12, 12) - made.pos_embed).norm() > 0.1
    with pytest.raises(UserError, match="cannot be trained in DyViT"):
        build(describe(method="coma_dyvit", model="tiny"), train_position=True)


def test_options__of_a_transfer_stay_with_its_encoder(tmp_path):
    """What a transfer adds starts afresh; the description carries it to whoever reads it next."""
    our_checkpoint(tmp_path / "a.pt", "mae")
    description = describe(checkpoint=tmp_path / "a.pt")
    assert description["options"] == {}
    description["options"] = {"init_values": 1.0}
    encoder = build(description)
    report = encoders.load(encoder, description, tmp_path / "a.pt")
    assert "missing, so fresh: blocks (" in report
    encoder.blocks[0].ls1.gamma.data.fill_(3)
    transfer_of(tmp_path / "b.pt", encoder, description, 64)
    again, _, report = open_encoder(checkpoint=tmp_path / "b.pt")
    assert "fresh: nothing" in report and (again.blocks[0].ls1.gamma == 3).all()
    assert hasattr(build(describe(method="cfmae", model="tiny"), init_values=1.0).blocks[0].ls1,
                   "gamma")  # fmt: skip


@pytest.mark.slow
def test_options__of_mcmae(tmp_path):
    """What a transfer adds to MCMAE's encoder goes through checkpoints, trained positions too."""
    our_checkpoint(tmp_path / "a.pt", "mcmae")
    options = {"relative_bias": True, "init_values": 1.0, "fourth": "conv"}
    description = describe(checkpoint=tmp_path / "a.pt") | {"options": options}
    encoder = build(description, 96, train_position=True)
    report = encoders.load(encoder, description, tmp_path / "a.pt")
    assert "left out: nothing" in report and "fresh: pos_embed, blocks3 (9), fourth (7)" in report
    ids = encoder.layer_ids()
    assert ids["pos_embed"] == 0 and set(ids) == {k for k, _ in encoder.named_parameters()}
    for p in encoder.parameters():
        p.data += 0.02 * torch.randn(p.shape)
    transfer_of(tmp_path / "b.pt", encoder, description, 96)
    again, found, report = open_encoder(checkpoint=tmp_path / "b.pt")
    assert "fresh: nothing" in report and found["options"] == options
    assert found["learned_position"] and found["trained_size"] == [96, 96]
    imgs = torch.randn(1, 3, 96, 96)
    for a, b in zip(again.eval().forward_pyramid(imgs), encoder.eval().forward_pyramid(imgs)):
        assert torch.equal(a, b)
    wide, found, report = open_encoder(checkpoint=tmp_path / "b.pt", image_size=128)
    assert "positions resized from 12x12 to 16x16" in report and "fresh: nothing" in report
    wide.forward_pyramid(torch.randn(1, 3, 128, 128))  # biases are for the new grid, too


@pytest.mark.slow
def test_statistics__of_our_encoders(tmp_path):
    imagenet = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    our_checkpoint(tmp_path / "a.pt", "mcmae")
    encoder, description, report = open_encoder(checkpoint=tmp_path / "a.pt")
    assert imagenet.items() <= description.items()
    assert imagenet.items() <= describe(method="cfmae", model="tiny").items()
    assert "images less (0.485, 0.456, 0.406), by (0.229, 0.224, 0.225): ImageNet's" in report
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    content["config"] |= {"mean": (0.1, 0.2, 0.3), "std": [1, 2, 3]}  # of a checkpoint that tells
    engine.save(tmp_path / "told.pt", content)
    assert describe(checkpoint=tmp_path / "told.pt")["mean"] == [0.1, 0.2, 0.3]
    given = describe(checkpoint=tmp_path / "a.pt", mean=(0.5, 0.5, 0.5))
    assert given["mean"] == [0.5] * 3 and given["std"] == imagenet["std"]
    assert "mean as given" in given["input"]
    transfer_of(tmp_path / "b.pt", encoder, given, 64)  # and so it goes on
    assert describe(checkpoint=tmp_path / "b.pt")["mean"] == [0.5] * 3
    old = {k: given[k] for k in ("method", "config")}  # of a run that did not keep them
    transfer_of(tmp_path / "c.pt", encoder, old, 64)
    found = describe(checkpoint=tmp_path / "c.pt")
    assert imagenet.items() <= found.items() and found["trained_size"] == [64, 64]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_build__draws_weights_as_the_method(method):
    description = describe(method=method, model="tiny")
    theirs = pretraining_model(method, description["config"])
    ours = build(description).state_dict()
    for name, wanted in theirs.encoder.state_dict().items():
        assert ours[name].shape == wanted.shape
        if wanted.numel() >= 96 and wanted.std() > 0:
            assert_close(ours[name].std(), wanted.std(), rtol=0.25, atol=0, msg=name)
        elif wanted.std() == 0:
            assert torch.equal(ours[name], wanted), name


@pytest.mark.slow
def test_describe__all_presets():
    for method, script in METHODS.items():
        for model in script.PRESETS:  # also the one whose pre-training needs a tokenizer
            description = describe(method=method, model=model)
            with torch.device("meta"):
                encoder = build(description)
            assert set(encoder.layer_ids()) == {name for name, _ in encoder.named_parameters()}
    config = describe(method="semanticmim", model="base-beit")["config"]
    assert config["layer_scale"] == 0.1 and config["proxies"] == 8 and config["target"] == "dvae"


# --------------------------------------------------------------------------------------- bad input


class Bomb:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["BOMB"])),)


@pytest.mark.slow
def test_bad_input__one_line_that_says_what_to_do(tmp_path, monkeypatch):
    vit = dict(TIMM["vit"]["state_dict"])
    ours = tmp_path / "ours.pt"
    our_checkpoint(ours, "mcmae")
    content = torch.load(ours, weights_only=True)
    (tmp_path / "noise.pth").write_bytes(os.urandom(200))
    monkeypatch.setenv("BOMB", str(tmp_path / "bomb"))

    def file(name, state):
        return public_file(tmp_path, state, name)

    less = {k: v for k, v in vit.items() if k != "blocks.1.mlp.fc2.bias"}
    cases = [
        (dict(), "one of --checkpoint, --init, --method"),
        (dict(init="a", method="mcmae"), "one of --checkpoint, --init, --method"),
        (dict(method="simmim"), "choose from mae, cfmae, semanticmim"),
        (dict(method="mcmae", model="giant"), "mcmae has tiny, small"),
        (dict(method="mcmae", model="tiny", color="red"), "no field color"),
        (dict(checkpoint=ours, num_heads=2), "--num-heads is for --init"),
        (dict(method="mcmae", model="tiny", image_size=(64, 60)), "nearest that works: 64 x 64"),
        (dict(init=tmp_path / "none.pth"), "no such file"),
        (dict(checkpoint=tmp_path / "none.pt"), "^/.*none.pt: no such file"),
        (dict(init=tmp_path / "noise.pth"), "cannot be read safely"),
        (dict(init=file("bomb.pth", Bomb())), "cannot be read safely"),
        (dict(checkpoint=file("bomb.pt", Bomb())), "cannot be read safely"),
        (dict(init=file("list.pth", [1, 2])), "holds no state dict"),
        (dict(init=file("resnet.pth", {"conv1.weight": torch.ones(3), "fc.bias": torch.ones(1)})),
         "known kind: ViT .*BEiT .*ConvMAE .*first keys: conv1.weight, fc.bias"),
        (dict(init=ours), "--checkpoint"),
        (dict(checkpoint=file("vit.pth", vit)), "--init"),
        (dict(init=tmp_path / "vit.pth"), "--num-heads N"),
        (dict(init=tmp_path / "vit.pth", num_heads=5), "--num-heads N"),
        (dict(init=tmp_path / "vit.pth", num_heads=2, depth=3), "missing blocks.2.norm1.weight"),
        (dict(init=file("less.pth", less), num_heads=2), "missing blocks.1.mlp.fc2.bias"),
        (dict(init=file("clip.pth", vit | {"norm_pre.bias": torch.ones(32)}), num_heads=2),
         "unexpected norm_pre.bias"),
        (dict(init=file("qk.pth", vit | {"blocks.0.attn.q_norm.bias": torch.ones(16)}),
              num_heads=2), "unexpected blocks.0.attn.q_norm"),
        (dict(init=file("pos.pth", vit | {"pos_embed": torch.ones(1, 19, 32)}), num_heads=2),
         "19 rows, which are no square"),
        (dict(checkpoint=ours, embed_dims="32,64,64"), "nothing was loaded: .*has shape"),
        (dict(checkpoint=file("old.pt", content | {"format": 0})), "format 0; wanted 1"),
        (dict(checkpoint=file("probe.pt", content | {"method": "probe", "config": {}})),
         "describes no encoder"),
    ]  # fmt: skip
    for source, message in cases:
        with pytest.raises(UserError, match=message) as error:
            open_encoder(**source)
        assert "\n" not in str(error.value), source
    assert not (tmp_path / "bomb").exists()
    encoder = build(describe(checkpoint=ours))
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    content["model"].pop("encoder.norm.bias")
    with pytest.raises(UserError, match="missing norm.bias"):
        encoders.load(encoder, describe(checkpoint=ours), file("less.pt", content))
    assert_close(dict(encoder.state_dict()), before, rtol=0, atol=0)


# ------------------------------------------------------------------------------------- fine-tuning


def mae_layer(name, num_layers):
    """MAE's rule (its fine-tuning code, as a table): the layer of a parameter by name."""
    if name.split(".")[0] in ("cls_token", "pos_embed", "patch_embed"):
        return 0
    return int(name.split(".")[1]) + 1 if name.startswith("blocks") else num_layers


def test_layer_decay_groups__as_mae():
    sizes = dict(image_size=(32, 32), patch_size=8, embed_dim=32, depth=3, num_heads=2)
    encoder, head = public_vit.PublicViT(relative=True, **sizes), nn.Linear(32, 5)
    encoder.norm.bias.requires_grad_(False)
    groups = engine.layer_decay_groups(encoder, [head], 0.05, 0.5)
    found = {id(p): (g["lr_scale"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert sum(len(g["params"]) for g in groups) == len(found)
    assert id(encoder.norm.bias) not in found
    for name, p in encoder.named_parameters():
        embedding = name in ("cls_token", "pos_embed") or "bias_table" in name
        if p.requires_grad:
            wanted = 0.5 ** (4 - mae_layer(name, 4)), 0.0 if p.ndim == 1 or embedding else 0.05
            assert found[id(p)] == wanted, name
    assert (found[id(head.weight)], found[id(head.bias)]) == ((1, 0.05), (1, 0.0))


@pytest.mark.parametrize("method", METHODS)
def test_layer_decay_groups__every_method(method):
    encoder = build(describe(method=method, model="tiny"))
    groups = engine.layer_decay_groups(encoder, [], 0.05, 0.5)
    assert sum(len(g["params"]) for g in groups) == len(list(encoder.parameters()))
    blocks = {"mcmae": 3, "coma_dyvit": 1 + 1 + 2 + 1}.get(method, 4)
    assert {g["lr_scale"] for g in groups} == {0.5**i for i in range(blocks + 2)}
