"""SemanticMIM around training: masks, the encoder that survives, checkpoints, flags, bad input."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from test_semanticmim import SMALL, config, make_batch

import common
import engine
import pictures
import semanticmim
import targets
from data import UserError
from noise import AUGMENT, DROP_PATH, DROP_PATH_2, uniform
from shapes import ShapeScenes


def make(*flags):
    torch.manual_seed(0)
    return semanticmim.SemanticMIM(config(*flags)).eval()


def images(B=2, H=64, W=64):
    return torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three steps."""
    out = tmp_path_factory.mktemp("run") / "out"
    flags = "--steps 3 --batch-size 8 --workers 0 --val-samples 8 --device cpu --precision fp32"
    semanticmim.main([*SMALL, *flags.split(), "--output", str(out)])
    return out


# ------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("flags, hidden", [
    ([], 39), (["--proxies", 0], 26), (["--mask-ratio", 0.75], 48), (["--mask-ratio", 0.001], 1),
])  # fmt: skip
def test_make_mask__hides_the_exact_number(flags, hidden):
    batch = {"seed": torch.arange(500) * 7919}
    mask = semanticmim.make_mask(config(*flags), batch, None)
    assert mask.dtype == torch.bool and mask.sum(1).unique().tolist() == [hidden]
    share = mask.float().mean(0)  # every patch alike: 5 standard deviations of a binomial
    p = hidden / 64
    assert (share - p).abs().max() < 5 * (p * (1 - p) / 500) ** 0.5
    for stream in (AUGMENT, DROP_PATH, DROP_PATH_2):  # what else is drawn from that seed
        pair = torch.stack([mask.flatten(), uniform(batch["seed"], 64, stream).flatten()])
        assert pair.corrcoef()[0, 1].abs() < 5 / 32000**0.5
    whole = config("--mask-ratio", 0.9, "--image-size", 80, "--patch-size", 8)
    assert whole.num_visible == 10  # of 100: (1 - 0.9) * 100 is a little less


# ---------------------------------------------------------------------------------------- encoder


TIMM = {  # names in timm's VisionTransformer(class_token=False, reg_tokens=8, no_embed_class=True)
    "reg_token": (1, 8, 768), "pos_embed": (1, 196, 768), "norm.weight": (768,),
    "norm.bias": (768,), "patch_embed.proj.bias": (768,),
    "patch_embed.proj.weight": (768, 3, 16, 16),
}  # fmt: skip
for i in range(12):
    for name, n_out, n_in in (("attn.qkv", 2304, 768), ("attn.proj", 768, 768),
                              ("mlp.fc1", 3072, 768), ("mlp.fc2", 768, 3072)):  # fmt: skip
        TIMM |= {f"blocks.{i}.{name}.weight": (n_out, n_in), f"blocks.{i}.{name}.bias": (n_out,)}
    TIMM |= {f"blocks.{i}.norm{k}.{w}": (768,) for k in (1, 2) for w in ("weight", "bias")}


def test_encoder__has_timms_names_and_shapes():
    cfg = engine.parse(semanticmim.Config, semanticmim.PRESETS, "", [])
    with torch.device("meta"):
        encoder = semanticmim.make_encoder(cfg)
    assert {k: tuple(v.shape) for k, v in encoder.state_dict().items()} == TIMM


def test_forward_features__are_the_states_of_training_when_all_is_visible():
    """Eq. 3 alone: [PROXY] and [IMG] of any layer, without [MASK]."""
    model, imgs, states = make(), images(), []
    for block in model.encoder.blocks:
        block.register_forward_hook(lambda _, x, y: states.append(y))
    features = model.encoder.forward_features(imgs, [1, 2, 3])
    assert [(t.shape, p.shape) for t, p in features] == [((2, 64, 32), (2, 4, 32))] * 3
    for (tokens, proxies), state in zip(features, states):
        assert torch.equal(torch.cat([proxies, tokens], 1), state)


@pytest.mark.parametrize("proxies", [4, 0])
def test_attention__is_what_the_layer_uses(proxies):
    encoder, imgs = make("--proxies", proxies).encoder, images()
    P = max(proxies, 1)
    for layer in (1, 2, 3):
        weights = encoder.attention(imgs, layer)
        assert weights.shape == (2, 4, P + 64, P + 64)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, P + 64))
        block, x = encoder.blocks[layer - 1], encoder.add_prefix(encoder.embed(imgs))
        x = block.norm1(encoder.run(x, [layer - 1])[0] if layer > 1 else x)
        attended = (weights @ block.attn.heads(x)[2]).transpose(1, 2).flatten(2)
        torch.testing.assert_close(block.attn.proj(attended), block.attn(x), atol=1e-5, rtol=1e-4)


def test_position__follows_other_image_sizes():
    encoder = make().encoder
    with torch.no_grad():  # a plane is what interpolation keeps, away from the border
        plane = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0)).sum(1)
        encoder.pos_embed.copy_(plane[None, :, None].expand(1, 64, 32))
    grid = encoder.position(16, 24)[0, :, 0].view(16, 24)
    rows, cols = (torch.arange(16) + 0.5) / 2 - 0.5, (torch.arange(24) + 0.5) / 3 - 0.5
    expected = (rows[:, None] + cols)[5:11, 7:17]
    torch.testing.assert_close(grid[5:11, 7:17], expected, atol=0.05, rtol=0)
    tokens, proxies = encoder.forward_features(images(1, 128, 192))[0]
    assert tokens.shape == (1, 384, 32) and proxies.shape == (1, 4, 32)
    assert [m.shape for m in encoder.forward_pyramid(images(1, 128, 192))] == [(1, 32, 16, 24)] * 4


# ----------------------------------------------------------------------- evaluate and reconstruct


def test_evaluate__guesses_match_a_loop():
    model, batch, B = make(), make_batch(3), 3
    errors = {"visible": 0.0, "position": 0.0, "nearest": 0.0, "other": 0.0}
    mask, target = semanticmim.make_mask(model.cfg, batch, None), model.make_target(batch["rgb"])
    for b in range(B):
        visible = [n for n in range(64) if not mask[b, n]]
        # the model where it sees the visible patches of another image, one image by itself
        other = model.normalize(batch["rgb"][[b - 1]])
        pred = iter(model.decoder_pred(model.tokens(other, mask[[b]]))[0])
        seen = sum(target[b, v] for v in visible) / len(visible)
        for n in sorted(set(range(64)) - set(visible)):
            near = min(visible, key=lambda v: (v // 8 - n // 8) ** 2 + (v % 8 - n % 8) ** 2)
            mean = sum(target[i, n] for i in range(B) if i != b) / (B - 1)
            for name, guess in (("visible", seen), ("position", mean),
                                ("nearest", target[b, near]), ("other", next(pred))):  # fmt: skip
                errors[name] += (target[b, n] - guess).square().mean().item() / (39 * B)
    result = semanticmim.evaluate(model, batch)
    assert set(result) == {"loss", *(f"loss_{name}" for name in errors)}
    for name, error in errors.items():
        assert result[f"loss_{name}"].item() == pytest.approx(error, rel=1e-4)
    assert result["loss"] == model(batch, torch.tensor(1.0))[0] != result["loss_other"]
    alone = semanticmim.evaluate(model, {k: v[:1] for k, v in batch.items()})
    assert alone["loss_other"] == alone["loss"] and alone["loss_position"].isfinite()


def test_evaluate__and_reconstruct_label_random_codes():
    model, batch = make("--target", "dvae", "--tokenizer", "random"), make_batch(2)
    names = set(semanticmim.evaluate(model, batch))
    kinds = ("accuracy", "accuracy_frequent", "accuracy_nearest")
    assert names == {"loss", "loss_other", *(f"random_codes_{k}" for k in kinds)}
    assert set(model(batch, torch.tensor(1.0))[1]) == {"random_codes_accuracy"}
    drawn = pictures.columns(semanticmim.reconstruct(model, batch))
    assert list(drawn)[2:] == [f"random codes{k}" for k in ("", ": visible", ": prediction")]
    hidden = semanticmim.make_mask(model.cfg, batch, None).view(2, 1, 8, 8).expand(2, 3, 8, 8)
    truth, visible, guess = list(drawn.values())[2:]
    assert torch.equal(guess[~hidden], truth[~hidden])
    assert set(visible[hidden].unique().tolist()) <= {160, 240}  # hatched
    assert (guess[hidden] != truth[hidden]).float().mean() > 0.5
    mask = semanticmim.make_mask(model.cfg, batch, None)
    codes = model.predict(model.normalize(batch["rgb"]), mask).argmax(-1)
    *_, guess = semanticmim.reconstruct(model, batch)["random codes"]
    assert torch.equal(guess.flatten(1)[mask], codes.flatten() % 254 + 1)


def test_evaluate__accuracies_of_codes_match_a_loop():
    model, batch = make("--target", "dvae", "--tokenizer", "random"), make_batch(2)
    mask = semanticmim.make_mask(model.cfg, batch, None)
    codes, right = model.make_target(batch["rgb"])[..., 0], []
    for b, n in mask.nonzero().tolist():
        visible = [v for v in range(64) if not mask[b, v]]
        near = min(visible, key=lambda v: (v // 8 - n // 8) ** 2 + (v % 8 - n % 8) ** 2)
        right.append((codes[b, near] == codes[b, n]).item())
    found, n = semanticmim.evaluate(model, batch), len(right)
    assert found["random_codes_accuracy_nearest"].item() == pytest.approx(sum(right) / n)
    often = codes[mask].bincount().max().item() / n
    assert found["random_codes_accuracy_frequent"].item() == pytest.approx(often)


def test_reconstruct__shows_the_truth_where_visible_and_the_prediction_elsewhere():
    model, batch = make(), make_batch(2)
    _, visible, truth, _, guess = pictures.columns(semanticmim.reconstruct(model, batch)).values()
    mask = semanticmim.make_mask(model.cfg, batch, None).view(2, 1, 8, 8)
    hidden = mask.repeat_interleave(8, 2).repeat_interleave(8, 3).expand_as(visible)
    assert set(visible[hidden].unique().tolist()) <= {160, 240}  # hatched
    assert torch.equal(visible[~hidden], batch["rgb"][~hidden])
    hidden = mask.repeat_interleave(24, 2).repeat_interleave(24, 3).expand_as(truth)
    assert torch.equal(guess[~hidden], truth[~hidden])
    assert (guess[hidden] != truth[hidden]).float().mean() > 0.2
    mask, (*_, guess) = mask.flatten(1), semanticmim.reconstruct(model, batch)["HOG"]
    pred = model.predict(model.normalize(batch["rgb"]), mask)
    hog = model.make_target(batch["rgb"]).masked_scatter(mask[..., None], pred)
    assert torch.equal(guess[:, :1], (255 * targets.draw_hog(hog, (8, 8))).byte())


# ------------------------------------------------------------------------------------ checkpoints


@pytest.mark.slow
def test_load_encoder__has_the_kept_stack_alone(run):
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    encoder = semanticmim.load_encoder(run / "last.pt")
    assert not any(k.startswith("decoder") for k in encoder.state_dict())
    kept = {k[8:]: v for k, v in checkpoint["model"].items() if k.startswith("encoder.")}
    assert set(kept) == set(encoder.state_dict())
    assert all(p.requires_grad for p in encoder.parameters())
    assert all(torch.equal(v, kept[k]) for k, v in encoder.state_dict().items())
    assert encoder.norm.weight.eq(1).all() and encoder.norm.bias.eq(0).all()  # a fresh one
    assert not torch.equal(checkpoint["model"]["decoder_norm.weight"], torch.ones(32))
    larger = semanticmim.load_encoder(run / "last.pt", image_size=(96, 128), drop_path=0.1)
    assert larger.pos_embed.shape == (1, 12 * 16, 32) and larger.drop_path == 0.1
    a, b = (e.eval().forward_features(images(1, 96, 128))[0][0] for e in (encoder, larger))
    torch.testing.assert_close(a, b)
    ids = encoder.layer_ids()
    assert set(ids) == set(encoder.state_dict()) and ids["reg_token"] == ids["pos_embed"] == 0


def test_run__leaves_numbers_and_a_picture(run):
    lines = (run / "log.jsonl").read_text()
    assert '"loss_position"' in lines and '"loss_other"' in lines
    assert (run / "preview-0000003.png").stat().st_size > 10_000


def test_picture__is_no_smaller_than_what_is_drawn(tmp_path):
    """Of a HOG at 224 pixels, drawn at 336, lines would get lost."""
    run = SimpleNamespace(
        out=tmp_path, number=1, val_set=ShapeScenes("val", 32), method="m", cfg=config(),
        model=None, world=SimpleNamespace(to_device=lambda x: x), autocast=nullcontext, say=print,
        collate=engine.Run.collate,
    )  # fmt: skip
    engine.validate.picture(run, lambda *_: {"x": (torch.zeros(4, 3, 336, 336).byte(), None, None)})
    assert Image.open(tmp_path / "preview-0000001.png").size == (336 + 2 * 4, 30 + 4 * (336 + 4))


def test_run__decays_what_no_decay_does_not_spare(run):
    decayed, plain = torch.load(run / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    trained = [p for p in make().parameters() if p.requires_grad]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0)
    assert len(plain["params"]) == sum(p.ndim == 1 for p in trained) + 1  # and [MASK]
    assert len(decayed["params"]) == len(trained) - len(plain["params"])


def test_load_encoder__refuses_other_files(run, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        semanticmim.load_encoder(tmp_path / "nothing.pt")
    checkpoint = torch.load(run / "last.pt", weights_only=True)
    for name in ("reg_token", "pos_embed"):
        model = {k: v for k, v in checkpoint["model"].items() if k != f"encoder.{name}"}
        engine.save(tmp_path / "less.pt", checkpoint | {"model": model})
        with pytest.raises(UserError, match=f"missing {name}"):
            semanticmim.load_encoder(tmp_path / "less.pt")


# ------------------------------------------------------------------------------------------ flags


@pytest.mark.parametrize("flags, message", [
    (["--target", "dvae"], "--target dvae needs --tokenizer PATH.*--target hog needs no file"),
    (["--target", "dvae", "--tokenizer", "/no/such"], "no file /no/such; --tokenizer random tries"),
    (["--tokenizer", __file__], "--target hog needs none"),
    (["--target", "dvae", "--tokenizer", "random", "--loss", "l1"], "--loss is for --target hog"),
    (["--proxies", -1], "--proxies -1 must be 0 or above"),
    (["--mask-ratio", 1], "--mask-ratio 1.0 must leave some of 64"),
    (["--mask-ratio", 0.0], "--mask-ratio 0.0 must leave some of 64"),
    (["--mask-ratio", 0.99], "--mask-ratio 0.99 must leave some of 64 patches visible"),
    (["--patch-size", 24], "--image-size 64 is not divisible by --patch-size 24.*48 or 72"),
    (["--patch-size", 1], "--patch-size 1 is odd"),
    (["--embed-dim", 30, "--num-heads", 3], "--embed-dim 30 is not divisible by 4"),
    (["--num-heads", 5], "--embed-dim 32 is not divisible by --num-heads 5.*30 or 35"),
    (["--drop-path", 1], "--drop-path 1.0 is outside .0, 1."),
    (["--color-jitter", -0.1], "--color-jitter -0.1 is outside .0, 1."),
    (["--target", "pixels"], "invalid choice: 'pixels'"),
    (["--model", "huge"], "invalid choice: 'huge'"),
    (["--loss", "l3"], "invalid choice: 'l3'"),
])  # fmt: skip
def test_config__names_what_cannot_work(flags, message):
    with pytest.raises(UserError, match=message) as e:
        config(*flags)
    assert "\n" not in str(e.value)


def test_main__dvae_without_a_tokenizer_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["semanticmim.py", *SMALL, "--target", "dvae"])
    with pytest.raises(SystemExit) as e:
        engine.command("semanticmim", semanticmim.main)
    out = capsys.readouterr()
    assert e.value.code == 2 and out.err.count("\n") == 1
    assert "https://download.openmmlab.com" in out.err and "dalle_encoder.pth" in out.err


def test_config__is_the_recipe_of_the_target_however_it_is_named():
    path = str(Path(__file__).parents[1] / "golden" / "dalle_encoder.pt")
    parse = lambda *a: engine.parse(semanticmim.Config, semanticmim.PRESETS, "", list(a))  # noqa: E731
    a = parse("--model", "base-beit", "--tokenizer", path)
    b = parse("--target", "dvae", "--tokenizer", path)
    b.model = "base-beit"
    assert a == b and a.layer_scale == 0.1
    assert parse("--clip-grad", "0").clip_grad == 0 and parse("--base-lr", "1").base_lr == 1


@pytest.mark.parametrize("flags", [
    [], ["--clip-grad", 0], ["--target", "dvae", "--tokenizer", "random", "--clip-grad", 0],
    ["--proxies", 0], ["--model", "base"],
])  # fmt: skip
def test_config__resolved_twice_is_what_it_is_once(flags):
    cfg = config(*flags)
    once = dataclasses.asdict(cfg)
    cfg.resolve()
    assert dataclasses.asdict(cfg) == once and ("--clip-grad" not in flags or cfg.clip_grad == 0)


def test_resume__another_place_of_the_tokenizer_is_no_other_setting():
    a, b = (config("--target", "dvae", "--tokenizer", f) for f in ("random", __file__))
    engine.refuse_changes(b, dataclasses.asdict(a), Path("last.pt"))
    c = config("--target", "dvae", "--tokenizer", "random", "--tokenizer-precision", "fp32")
    with pytest.raises(UserError, match="--tokenizer-precision was auto, is fp32"):
        engine.refuse_changes(c, dataclasses.asdict(a), Path("last.pt"))


def test_help__says_where_the_tokenizer_comes_from(capsys):
    with pytest.raises(SystemExit):
        engine.parse(semanticmim.Config, semanticmim.PRESETS, semanticmim.__doc__, ["--help"])
    out = capsys.readouterr().out
    assert targets.DALLE in out and "--tokenizer random tries BEiT without it" in out


def test_encoder__positions_are_learned_and_start_as_maes():
    encoder = semanticmim.Encoder(image_size=(32, 48), patch_size=8, embed_dim=32, depth=1,
                                  num_heads=2)  # fmt: skip
    assert encoder.pos_embed.requires_grad and "pos_embed" in dict(encoder.named_parameters())
    assert torch.equal(encoder.pos_embed[0], common.sincos_2d(32, 4, 6))
