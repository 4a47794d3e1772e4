"""Plain MAE (--method mae): the public implementation's tensors and checkpoints."""

import json
import pickle
from pathlib import Path

import pytest
import torch

import coma_dyvit as cd
import common
import engine
from data import UserError
from tools.export import export

GOLDEN = Path(__file__).parent / "golden" / "mae_tiny.pt"


def config(*flags, model="tiny"):
    flags = [*(("--embed-dim", "32") if model == "tiny" else ()), *flags]
    return engine.parse(cd.Config, cd.PRESETS, "", ["--model", model, *flags])


@pytest.fixture
def golden():
    return torch.load(GOLDEN, weights_only=True)


def golden_model(*flags):
    mae = """--method mae --backbone vit --patch-size 8 --depth 3 --num-heads 4
        --decoder-embed-dim 24 --decoder-depth 2 --decoder-num-heads 4"""
    return cd.CoMA(config(*mae.split(), *flags))


def test_mae__equals_the_public_implementation(golden, tmp_path):
    torch.save({"model": golden["state_dict"]}, tmp_path / "mae.pth")
    model = golden_model("--init", str(tmp_path / "mae.pth"))
    imgs, mask = model.normalize(golden["rgb"]), common.random_mask(golden["noise"], 48)
    assert torch.equal(mask, golden["mask"].bool()) and model.cfg.num_visible == 16
    model.make_mask = lambda seed: mask
    ids_keep, _, _ = common.split(mask, 16)
    latent = model.encode(imgs, mask, ids_keep)
    at = 1 + golden["ids_restore"].gather(1, ids_keep)  # MAE shuffles its visible tokens
    loss, _ = model({"rgb": golden["rgb"], "seed": torch.arange(2)}, torch.tensor(0.0))
    for ours, theirs in (
        (latent[:, 1:], common.gather(golden["latent"], at)),
        (latent[:, 0], golden["latent"][:, 0]),
        (model.predict(imgs, mask, 16), golden["pred"]),
        (loss, golden["loss"]),
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    loss.backward()
    names = {n.removeprefix("encoder."): p.grad.norm() for n, p in model.named_parameters()}
    for name, norm in golden["grad_norms"].items():
        if not name.endswith("pos_embed"):
            torch.testing.assert_close(names[name], norm, atol=1e-5, rtol=1e-4)


def test_load_init__reports_and_refuses(golden, tmp_path, capsys):
    def load(state, *flags):
        torch.save(state, tmp_path / "x.pth")
        return golden_model("--init", str(tmp_path / "x.pth"), *flags)

    state = golden["state_dict"]
    encoder = {k: v for k, v in state.items() if not k.startswith(("decoder", "mask"))}
    load({"model": encoder | {"head.bias": torch.ones(3)}})
    report = capsys.readouterr().out
    assert "41 tensors loaded" in report
    assert "left out: pos_embed, head; missing, so fresh: mask_token, decoder_embed (2)" in report
    for bad, words in (
        ({k: v for k, v in state.items() if k != "norm.bias"}, "missing norm.bias"),
        (state | {"pos_embed": state["pos_embed"] + 0.1}, "pos_embed was learned.* pre-trained"),
        (state | {"blocks.3.norm1.bias": torch.zeros(32)}, "unexpected blocks.3.norm1.bias"),
        (state | {"norm.bias": torch.zeros(5)}, "norm.bias has shape"),
        ([1, 2], "holds no state dict"),
    ):
        with pytest.raises(UserError, match=words):
            load(bad)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="missing stem.weight"):
        cd.CoMA(config("--init", str(tmp_path / "x.pth")))  # into a DyViT
    (tmp_path / "x.pth").write_bytes(pickle.dumps(Path("x")))
    with pytest.raises(UserError, match="read safely"):
        golden_model("--init", str(tmp_path / "x.pth"))
    with pytest.raises(UserError, match="no such file"):
        golden_model("--init", str(tmp_path / "absent.pth"))


def test_load_init__finds_wrapped_weights_and_safetensors(golden, tmp_path, capsys):
    state = golden["state_dict"]
    ema = {k: v + 1 if k == "norm.bias" else v for k, v in state.items()}
    torch.save({"model": state, "model_ema": ema}, tmp_path / "both.pth")
    for key, expected in ((), state), (("--init-key", "model_ema"), ema):
        model = golden_model("--init", str(tmp_path / "both.pth"), *key)
        assert torch.equal(model.encoder.norm.bias, expected["norm.bias"])
    assert "model taken, not model_ema" in capsys.readouterr().out
    with pytest.raises(UserError, match="no 'teacher', but model, model_ema"):
        golden_model("--init", str(tmp_path / "both.pth"), "--init-key", "teacher")
    header, body = {}, b""
    for k, v in state.items():
        raw = v.contiguous().numpy().tobytes()
        header[k] = {"dtype": "F32", "shape": list(v.shape)}
        header[k]["data_offsets"] = [len(body), len(body) + len(raw)]
        body += raw
    header = json.dumps(header).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + body)
    model = golden_model("--init", str(path))
    assert torch.equal(model.decoder_pred.weight, state["decoder_pred.weight"])


def dyvit_flags(out):
    return """--embed-dim 32 --dims 8-16-32-64 --heads 1-1-2-4 --blocks 1-1-1-1
        --decoder-embed-dim 16 --decoder-depth 1 --batch-size 4 --val-samples 2 --workers 0
        --device cpu --precision fp32 --output""".split() + [str(out)]


def test_load_init__starts_from_an_exported_dyvit(tmp_path, capsys):
    model, flags = cd.CoMA(config(*dyvit_flags(tmp_path))), dyvit_flags(tmp_path)
    checkpoint = {"format": engine.FORMAT, "method": "coma_dyvit", "step": 1, "window": {}}
    checkpoint |= {"config": vars(model.cfg), "model": model.state_dict(), "optimizer": {}}
    engine.save(tmp_path / "whole.pt", checkpoint)
    export(tmp_path / "whole.pt", tmp_path / "encoder.pt")
    for name, fresh in ("encoder", True), ("whole", False):
        started = cd.CoMA(config("--init", str(tmp_path / f"{name}.pt"), *flags))
        for own, source in zip(started.encoder.parameters(), model.encoder.parameters()):
            assert torch.equal(own, source)
        ours, theirs = started.fusion.convs[0].proj.weight, model.fusion.convs[0].proj.weight
        assert torch.equal(ours, theirs) != fresh
        for own, copy in zip(started.encoder.parameters(), started.evaluation.encoder.parameters()):
            assert torch.equal(own, copy)
    assert "missing, so fresh: fusion (6), mask_token" in capsys.readouterr().out.replace(
        "mask_token, fusion (6)", "fusion (6), mask_token")  # fmt: skip


def test_init__is_not_read_again_when_a_run_goes_on(tmp_path):
    flags = dyvit_flags(tmp_path / "run")
    source = tmp_path / "source.pt"
    torch.save({"ema": cd.CoMA(config(*flags)).state_dict()}, source)

    def run(*more):
        cfg = config(*flags, *more)
        return engine.train("coma_dyvit", cfg, engine.World(cfg), cd.CoMA)

    assert run("--init", str(source), "--init-key", "ema", "--steps", "1") == 0
    source.unlink()
    assert run("--init", str(source), "--resume", "--steps", "2") == 0
    assert run("--resume", "--steps", "3") == 0
    with pytest.raises(UserError, match="no such file"):  # it is, where a run starts afresh
        cd.CoMA(config(*dyvit_flags(tmp_path / "new"), "--init", str(source), "--resume"))


@pytest.mark.parametrize("model, size, trained, visible", [
    # numel of models_mae.mae_vit_{base,large,huge}_patch* of facebookresearch/mae: its parameters,
    # less pos_embed and decoder_pos_embed, which are fixed
    ("mae-base", (768, 12, 12, 16), 111_655_680, 49),
    ("mae-large", (1024, 24, 16, 16), 329_239_296, 49),
    ("mae-huge", (1280, 32, 16, 14), 656_613_964, 64),
])  # fmt: skip
def test_presets__mae_is_the_public_codes(model, size, trained, visible):
    cfg = config(model=model)
    assert (cfg.embed_dim, cfg.depth, cfg.num_heads, cfg.patch_size) == size
    with torch.device("meta"):
        net = cd.Autoencoder(cfg)
    assert sum(p.numel() for p in net.parameters()) == trained
    assert [b.attn.num_heads for b in net.decoder_blocks] == [16] * 8
    assert (cfg.decoder_embed_dim, cfg.decoder_depth, cfg.num_visible) == (512, 8, visible)
    recipe = (cfg.mask_ratio, cfg.norm_pix_loss, cfg.evaluation, cfg.epochs, cfg.warmup_epochs)
    assert recipe == (0.75, True, "none", 800, 40)  # PRETRAIN.md
    assert (cfg.base_lr, cfg.batch_size, cfg.weight_decay, cfg.min_lr) == (1.5e-4, 4096, 0.05, 0)
    assert (cfg.beta1, cfg.beta2, cfg.crop_scale_min) == (0.9, 0.95, 0.2)  # main_pretrain.py
