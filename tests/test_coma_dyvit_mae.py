"""Plain MAE (--method mae): the public implementation's tensors and checkpoints."""

import pickle
from pathlib import Path

import pytest
import torch

import coma_dyvit as cd
import common
import engine
from data import UserError

GOLDEN = Path(__file__).parent / "golden" / "mae_tiny.pt"


def config(*flags):
    return engine.parse(cd.Config, cd.PRESETS, "", ["--model", "tiny", "--embed-dim", "32", *flags])


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
        (state | {"pos_embed": state["pos_embed"] + 0.1}, "pos_embed was learned"),
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
