"""Figures: attention and distance against naive loops; masks that the flags ask for."""

import dataclasses
import math

import pytest
import torch

import common
import engine
import semanticmim
from engine import UserError
from pictures import hide
from tools import figures, model_figures, visualize

TINY = {
    "cfmae": "--image-size 32 --embed-dim 32 --depth 2 --num-heads 2 --decoder-embed-dim 32",
    "semanticmim": "--image-size 32 --embed-dim 48 --depth 3 --num-heads 3 --proxies 2",
    "mcmae": "--image-size 32 --embed-dims 16,16,32 --num-heads 2 --decoder-depth 1",
    "coma_dyvit": "--image-size 32 --decoder-depth 1",
    "mae": "--image-size 32 --depth 2 --decoder-depth 1",
}


def fresh(folder):
    """Write a checkpoint of fresh weights, step 7, of each method: {method: path}."""
    paths = {}
    for name, (script, build) in model_figures.MODELS.items():
        flags = ["--model", "tiny", *TINY[name].split()]
        cfg = engine.parse(script.Config, script.PRESETS, "", flags)
        torch.manual_seed(0)
        state = {"format": engine.FORMAT, "method": name, "step": 7, "optimizer": {}, "window": {}}
        state |= {"config": dataclasses.asdict(cfg), "model": build(cfg).state_dict()}
        paths[name] = str(folder / f"{name}.pt")
        engine.save(folder / f"{name}.pt", state)
    return paths


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return fresh(tmp_path_factory.mktemp("checkpoints"))


def options(**changes):
    given = dict(mask_ratio=None, patches=None, visible=False, only=(), hide=(), seed=0)
    return visualize.argparse.Namespace(**{**given, **changes})


# ------------------------------------------------------------------------------- attention


def naive_attention(vit, imgs, layer):
    """Softmax of scaled products, query by query, from the weights alone; heads of one image."""
    x = vit.add_prefix(vit.embed(imgs))
    for block in vit.blocks[: layer - 1]:
        x = block(x)
    attn = vit.blocks[layer - 1].attn
    y, D, d = vit.blocks[layer - 1].norm1(x)[0], x.shape[2], x.shape[2] // attn.num_heads
    out = torch.zeros(attn.num_heads, len(y), len(y))
    for head in range(attn.num_heads):
        rows = slice(head * d, (head + 1) * d)
        q = y @ attn.qkv.weight[:D][rows].T + attn.qkv.bias[:D][rows]
        k = y @ attn.qkv.weight[D : 2 * D][rows].T + attn.qkv.bias[D : 2 * D][rows]
        for i in range(len(y)):
            score = torch.stack([(q[i] * k[j]).sum() / math.sqrt(d) for j in range(len(y))])
            out[head, i] = score.exp() / score.exp().sum()
    return out


def test_attentions__naive_softmax(checkpoints):
    encoder = semanticmim.load_encoder(checkpoints["semanticmim"]).eval()
    args = options(data="shapes", split="val", images="5", image_size=None)
    ((name, rgb, grid, maps),) = model_figures.attentions(args, encoder, [1, 3])
    imgs = common.Normalize()(rgb[None])
    assert name == "scene 5" and grid == (4, 4) and list(maps) == [1, 3]
    for layer, found in maps.items():
        torch.testing.assert_close(found[0], naive_attention(encoder, imgs, layer).detach())


def test_attention_distance__naive_loop():
    h, w, p, P = 3, 4, 8, 2
    a = torch.rand(2, 3, P + h * w, P + h * w, generator=torch.Generator().manual_seed(0))
    found = model_figures.attention_distance(a.softmax(-1), (h, w), p)
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
    found = model_figures.queries(options(query=["proxies", "1,2"]), encoder, (4, 4))
    assert found == {"proxy 0": 0, "proxy 1": 1, "patch 1,2": 2 + 4 + 2}
    for wrong in ("cls", "4,0", "1", "one,two"):
        with pytest.raises(UserError, match="--query"):
            model_figures.queries(options(query=[wrong]), encoder, (4, 4))


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
    monkeypatch.setattr(common.ViT, "attention",
                        lambda self, x, i: torch.eye(18)[:1].expand(1, 3, 18, 18))  # fmt: skip
    words = ["attention", "--checkpoint", checkpoints["semanticmim"], "--images", "0"]
    assert visualize.main([*words, "--output", str(tmp_path / "x.png")]) == 0


# ----------------------------------------------------------------------------- reconstruct


def test_choose_mask__chosen_patches(checkpoints):
    seed = torch.tensor([3])
    for name, path in checkpoints.items():
        cfg = model_figures.load_model(path)[1].cfg
        N = cfg.num_positions if name == "mcmae" else cfg.num_patches
        chosen = {0, 2, 3}
        hidden = model_figures.choose_mask(options(patches="0,2-3"), cfg, seed)
        assert all({i for i in range(N) if row[i]} == chosen for row in hidden)
        shown = model_figures.choose_mask(options(patches="0,2-3", visible=True), cfg, seed)
        assert torch.equal(shown, ~hidden)
        random = model_figures.choose_mask(options(), cfg, seed)
        assert random.shape == hidden.shape and (~random).sum() == cfg.num_visible
        with pytest.raises(UserError, match="there are"):
            model_figures.choose_mask(options(patches=f"0,{N}"), cfg, seed)


def test_choose_mask__whole_granularities(checkpoints):
    cfg, seed = model_figures.load_model(checkpoints["cfmae"])[1].cfg, torch.tensor([3])
    mask = model_figures.choose_mask(options(only=("instance",)), cfg, seed)
    assert mask.all(1).tolist() == [True, False, True] and not mask[1].any()
    mask = model_figures.choose_mask(options(hide=("semantic",), mask_ratio=0.25), cfg, seed)
    assert mask.sum(1).tolist() == [4, 4, 16] and not torch.equal(mask[0], mask[1])
    with pytest.raises(UserError, match="hides everything"):
        model_figures.choose_mask(options(only=("rgb",), hide=("rgb",)), cfg, seed)


def test_predict__reads_visible_patches_alone(checkpoints):
    """What the flags hide cannot change a prediction; what they leave visible does."""
    for path in checkpoints.values():
        model = model_figures.load_model(path)[1]
        names = getattr(model.cfg, "names", ("rgb",))
        args = options(data="shapes", split="val", images="1")
        size = (model.cfg.image_size, model.cfg.patch_size)
        ((_, batch),) = figures.open_images(args, *size, names)
        args, (H, p) = options(patches="1", visible=True), size
        mask = model_figures.choose_mask(args, model.cfg, batch["seed"])
        hidden = figures.enlarge(mask[0].view(H // p, -1), (H, H))
        # mirrored inside patches: hidden ones keep the mean and deviation that they get back
        mirrored = batch["rgb"].unflatten(3, (-1, p)).flip(4).flatten(3)
        views = batch["rgb"], batch["rgb"].where(~hidden, mirrored), batch["rgb"].where(hidden, 0)
        what = "hog" if "proxies" in vars(model.cfg) else "rgb"
        pred = [model_figures.predict(model, {**batch, "rgb": x}, mask)[what][1] for x in views]
        first, same, other = (x.float() * figures.enlarge(hidden, x.shape[1:]) for x in pred)
        assert (same - first).abs().max() <= 1 < (other - first).abs().max(), path


def test_predict__pixels_get_their_statistics_back(checkpoints):
    """A perfect prediction of normalised patches is the picture itself."""
    model = model_figures.load_model(checkpoints["mcmae"])[1]
    rgb = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    patches = common.patchify(model.normalize(rgb), 8)
    mean, std = common.patch_statistics(patches)
    target = (patches - mean) / std
    assert torch.equal(model_figures.pixels(model, target, rgb), rgb[0])
    assert torch.equal(model_figures.pixels(model, None, rgb), rgb[0])
    alone = model_figures.pixels(model, target, rgb, True)  # as if the image were brighter
    other = model_figures.pixels(model, target, rgb // 2 + 100, True)
    assert torch.equal(alone, other) and not torch.equal(alone, rgb[0])


def test_reconstruct__columns(checkpoints, monkeypatch):
    """Input, visible, prediction, both: the last is the truth where patches are visible."""
    shown = {}
    keep = lambda *args: shown.update(rows=args[3], caption=args[1])  # noqa: E731
    monkeypatch.setattr(model_figures, "sheet", keep)
    visualize.main(["reconstruct", "--checkpoint", checkpoints["cfmae"], "--images", "2",
                    "--patches", "5-9", "--output", "x.png"])  # fmt: skip
    truth, visible, pred, both = shown["rows"][2]  # semantic
    hidden = torch.zeros(16, dtype=torch.bool).index_fill(0, torch.arange(5, 10), True).view(4, 4)
    hidden = hidden.repeat_interleave(4, 0).repeat_interleave(4, 1)
    assert torch.equal(both, torch.where(hidden, pred, truth)) and not torch.equal(pred, truth)
    assert torch.equal(visible, hide(truth, hidden)) and not torch.equal(visible, truth)
    for words in (checkpoints["cfmae"], "step 7", "patches 5-9 hidden", "true mean"):
        assert words in shown["caption"]
