"""Figures: attention and distance against naive loops; masks that the flags ask for."""

import math

import pytest
import torch

import common
import engine
import mae
import semanticmim
from downstream.encoders import METHODS
from engine import UserError
from pictures import hide
from tools import attention, figures, models, reconstruct, visualize
import vit

pytestmark = pytest.mark.slow


pytest_plugins = ["fresh_weights"]


def options(**changes):
    given = dict(mask_ratio=None, patches=None, visible=False, only=(), hide=(), seed=0)
    return visualize.argparse.Namespace(**{**given, **changes})


# ------------------------------------------------------------------------------- attention


def test_attentions__are_the_encoder_s_of_normalised_pixels(checkpoints):
    encoder = semanticmim.load_encoder(checkpoints["semanticmim"]).eval()
    encoder.normalize = common.Normalize()
    args = options(data="shapes", split="val", images="5", image_size=None)
    ((name, rgb, grid, maps),) = attention.attentions(args, encoder, [1, 3])
    imgs = common.Normalize()(rgb[None])
    assert name == "scene 5" and grid == (4, 4) and list(maps) == [1, 3]
    for layer, found in maps.items():
        torch.testing.assert_close(found, encoder.attention(imgs, layer))


def test_open_encoders__each_gets_its_own_pixels(monkeypatch):
    made = mae.make_encoder(engine.parse(mae.Config, mae.PRESETS, "", ["--model", "tiny"]))
    description = {"method": "beit", "mean": [0.5] * 3, "std": [0.25] * 3}
    monkeypatch.setattr(models, "open_encoder", lambda **_: (made, description, ""))
    args = options(checkpoint=None, init=["x"], method=None, num_heads=None, random=False)
    (encoder,) = models.open_encoders(args).values()
    white = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    assert encoder.normalize(white).unique().tolist() == [2.0]


def test_attention_distance__naive_loop():
    h, w, p, P = 3, 4, 8, 2
    a = torch.rand(2, 3, P + h * w, P + h * w, generator=torch.Generator().manual_seed(0))
    found = attention.attention_distance(a.softmax(-1), (h, w), p)
    for head in range(3):
        total = 0.0
        for image in range(2):
            for i in range(h * w):
                weights, far = 0.0, 0.0
                for j in range(h * w):
                    weight = a[image, head].softmax(-1)[P + i, P + j].item()
                    weights += weight
                    far += weight * p * math.hypot(i // w - j // w, i % w - j % w)
                total += far / weights
        assert found[head].item() == pytest.approx(total / (2 * h * w), rel=1e-5)


def test_queries__tokens_by_name(checkpoints):
    encoder = semanticmim.load_encoder(checkpoints["semanticmim"])
    found = attention.queries(options(query=["proxies", "1,2"]), encoder, (4, 4))
    assert found == {"proxy 0": 0, "proxy 1": 1, "patch 1,2": 2 + 4 + 2}
    for wrong in ("cls", "4,0", "1", "one,two"):
        with pytest.raises(UserError, match="--query"):
            attention.queries(options(query=[wrong]), encoder, (4, 4))


def test_open__weights_that_are_not_finite(checkpoints, tmp_path):
    """A run that diverged is named, with the weight, whatever the picture."""
    for name, weight in (("semanticmim", "blocks.1.attn.qkv.weight"), ("mcmae", "norm.bias")):
        state = torch.load(checkpoints[name], weights_only=True)
        state["model"][f"encoder.{weight}"].flatten()[3] = math.nan
        path = tmp_path / f"{name}.pt"
        engine.save(path, state)
        for command in ("attention", "features", "reconstruct"):
            words = [command, "--checkpoint", str(path), "--output", str(tmp_path / "x.png")]
            with pytest.raises(UserError, match=f"{name}.pt.*{weight} holds NaN or infinity"):
                visualize.main(words)


def test_attention__no_weight_on_patches(checkpoints, tmp_path, monkeypatch):
    """Where all of a query's attention is on prefix tokens, its map is black, not an error."""
    monkeypatch.setattr(vit.ViT, "attention",
                        lambda self, x, i: torch.eye(18)[:1].expand(1, 3, 18, 18))  # fmt: skip
    words = ["attention", "--checkpoint", checkpoints["semanticmim"], "--images", "0"]
    assert visualize.main([*words, "--output", str(tmp_path / "x.png")]) == 0


# ----------------------------------------------------------------------------- reconstruct


def opened(path, images="3", **changes):
    """A model of a checkpoint and a scene: method, model, batch."""
    method, model, _ = models.load_model(path)
    args, cfg = options(data="shapes", split="val", images=images), model.cfg
    names = reconstruct.granularities(cfg)
    ((_, batch),) = figures.open_images(args, cfg.image_size, cfg.patch_size, names)
    return method, model, batch


def test_model_class__is_what_the_script_trains():
    found = [models.model_class(method).__name__ for method in METHODS]
    assert found == ["MAE", "CFMAE", "SemanticMIM", "MCMAE", "CoMA"]


def test_choose_mask__chosen_patches(checkpoints):
    for name, path in checkpoints.items():
        method, model, batch = opened(path)
        cfg = model.cfg
        choose = lambda **flags: reconstruct.choose_mask(options(**flags), method, cfg, batch)  # noqa: E731, B023
        own, hidden = choose(), choose(patches="0,2-3")
        N = own.shape[-1]
        assert method == name and own.shape == hidden.shape and (~own).sum() == cfg.num_visible
        for row in hidden.view(-1, N):
            assert {i for i in range(N) if row[i]} == {0, 2, 3}
        assert torch.equal(choose(patches="0,2-3", visible=True), ~hidden)
        assert 4 * (~choose(mask_ratio=0.75)).sum() == own.numel()
        with pytest.raises(UserError, match="there are"):
            choose(patches=f"0,{N}")


def test_choose_mask__whole_granularities(checkpoints):
    method, model, batch = opened(checkpoints["cfmae"])
    choose = lambda **flags: reconstruct.choose_mask(options(**flags), method, model.cfg, batch)[0]  # noqa: E731
    mask = choose(only=("instance",))
    assert mask.all(1).tolist() == [True, False, True] and not mask[1].any()
    mask = choose(hide=("semantic",), mask_ratio=0.25)
    assert mask.sum(1).tolist() == [4, 4, 16] and not torch.equal(mask[0], mask[1])
    with pytest.raises(UserError, match="hides everything"):
        choose(only=("rgb",), hide=("rgb",))
    method, model, batch = opened(checkpoints["mae"])
    with pytest.raises(UserError, match="nothing of rgb is hidden: add --mask-ratio 0.75"):
        reconstruct.choose_mask(options(only=("rgb",)), method, model.cfg, batch)


def test_predict__reads_visible_patches_alone(checkpoints):
    """What the flags hide cannot change a prediction; what they leave visible does."""
    for path in checkpoints.values():
        method, model, batch = opened(path, "1")
        before, (H, p) = model.cfg, (model.cfg.image_size, model.cfg.patch_size)
        mask = reconstruct.choose_mask(options(patches="1", visible=True), method, before, batch)
        hidden = mask.view(-1, mask.shape[-1])[0].view(H // p, -1)
        pixels = figures.enlarge(hidden, (H, H))
        # mirrored inside patches: hidden ones keep the mean and deviation that they get back
        mirrored = batch["rgb"].unflatten(3, (-1, p)).flip(4).flatten(3)
        views = batch["rgb"], batch["rgb"].where(~pixels, mirrored), batch["rgb"].where(pixels, 0)
        found = [reconstruct.predict(method, model, {**batch, "rgb": x}, mask) for x in views]
        what = next(k for k in ("HOG", "adaptive", "rgb") if k in found[0])
        shown = [entry[what][2][0].float() for entry in found]
        first, same, other = (x * figures.enlarge(hidden, x.shape[1:]) for x in shown)
        assert torch.equal(found[0][what][1][0], hidden)
        assert (same - first).abs().max() <= 1 < (other - first).abs().max(), path
        assert model.cfg is before and METHODS[method].make_mask.__module__ == method


def test_predict__normalised_is_what_the_model_makes_alone(checkpoints):
    """Neither the prediction nor the truth tells a hidden patch's mean and deviation."""
    for name in ("mae", "mcmae", "cfmae"):
        method, model, batch = opened(checkpoints[name])
        mask = reconstruct.choose_mask(options(patches="1", visible=True), method, model.cfg, batch)
        hidden = mask.view(-1, mask.shape[-1])[0].view(4, 4)
        hidden, rgb = figures.enlarge(hidden, (32, 32)), batch["rgb"]
        views = [rgb, rgb.where(~hidden, rgb // 2 + 100)]  # as if the hidden ones were brighter
        for normalised in (True, False):
            pair = [reconstruct.predict(method, model, {**batch, "rgb": x}, mask, normalised)["rgb"]
                    for x in views]  # fmt: skip
            preds = [pred.where(hidden, 0).float() for _, _, pred in pair]
            assert torch.equal(*preds) == normalised
        truth = reconstruct.predict(method, model, batch, mask, True)["rgb"][0]
        imgs = (rgb[0] / 255).permute(1, 2, 0) - torch.tensor(common.IMAGENET_MEAN)
        x = (imgs / torch.tensor(common.IMAGENET_STD))[8:16, 24:32]  # in row 1, column 3
        x = (x - x.mean()) / (x.var() + 1e-6).sqrt()
        x = x * torch.tensor(common.IMAGENET_STD) + torch.tensor(common.IMAGENET_MEAN)
        wanted = (255 * x).round().clamp(0, 255)
        assert (truth[0, :, 8:16, 24:32].permute(1, 2, 0) - wanted).abs().max() <= 1


def test_reconstruct__columns(checkpoints, monkeypatch):
    """Input, visible, prediction, both: the last is the truth where patches are visible."""
    shown = {}
    keep = lambda *args: shown.update(rows=args[3], caption=args[1], labels=args[4])  # noqa: E731
    monkeypatch.setattr(reconstruct, "sheet", keep)
    visualize.main(["reconstruct", "--checkpoint", checkpoints["cfmae"], "--images", "2",
                    "--patches", "5-9", "--output", "x.png"])  # fmt: skip
    truth, visible, pred, both = dict(zip(shown["labels"], shown["rows"]))["scene 2 semantic"]
    hidden = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.arange(5, 10), True).view(4, 4)
    hidden = hidden.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(both, torch.where(hidden, pred, truth)) and not torch.equal(pred, truth)
    assert torch.equal(visible, hide(truth, hidden)) and not torch.equal(visible, truth)
    for words in (checkpoints["cfmae"], "step 7", "patches 5-9 hidden", "true mean"):
        assert words in shown["caption"]
