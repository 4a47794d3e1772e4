"""Every value of segmentation's recipes against its source; and what the flags make of them.

Sources: the papers' tables as named, and the public configurations: SemanticMIM's
configs_seg/*/*-base_upernet_8xb2-160k_ade20k-640x640.py and seg_linear_probing.py, ConvMAE's
SEG/configs/convmae/upernet_convmae_base_512_slide_160k_ade20k.py, mmsegmentation's
configs/mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py.
"""

import engine
import pytest
import tiny_run
import torch
from data import UserError
from downstream import encoders, segment
from downstream.segment_recipes import PRESETS, RECIPES, Config
from downstream.upernet import Segmenter
from downstream.windows import Windows
from test_segment import SMALL, config

pytestmark = pytest.mark.slow


def parse(argv):
    return engine.parse(Config, PRESETS, "", argv.split())


@pytest.mark.parametrize("method, size, lr, decay, drop_path", [
    ("cfmae", 512, 4e-4, 0.65, 0.1),  # CFMAE Table 10; Sec. E.4
    ("semanticmim", 640, 3e-5, 0.9, 0.1),  # SemanticMIM Table 4; decay: public configuration
    ("mcmae", 512, 1e-4, 0.75, 0.2),  # MCMAE Sec. 3.3; size, drop path: public configuration
    ("coma_dyvit --encoder small", 512, 1e-4, 0.65, 0.1),  # CoMA Table 3; mmsegmentation's MAE
    ("coma_dyvit", 512, 1e-4, 0.75, 0.1),  # of 24 blocks: MAE's decay for ViT-L
])  # fmt: skip
def test_Config__has_the_papers_upernet(method, size, lr, decay, drop_path):
    cfg = parse(f"--method {method} --data x")
    assert (cfg.crop, cfg.lr, cfg.layer_decay) == ((size, size), lr, decay)
    assert cfg.drop_path == drop_path and cfg.train_position == (method == "mcmae")
    # CFMAE Table 10, SemanticMIM Table 4, MCMAE Sec. 3.3; both public configurations and MAE's
    assert (cfg.batch_size, cfg.weight_decay, cfg.beta1, cfg.beta2) == (16, 0.05, 0.9, 0.999)
    assert (cfg.iterations, cfg.epochs, cfg.clip_grad, cfg.classes) == (160_000, None, None, 150)
    assert (cfg.dim, cfg.aux_dim, cfg.aux_weight, cfg.dropout) == (768, 256, 0.4, 0.1)
    assert (cfg.scale_min, cfg.scale_max, cfg.crop_scale_min) == (0.5, 2.0, None)
    assert cfg.photometric and cfg.evaluation == "slide" and cfg.layer is None
    steps = (0, 749, 1499, 80_000, 159_999)
    rates = [segment.learning_rate(cfg, step, 160_000) for step in steps]
    shares = [1 / 1500, 0.5 * (1 - 749 / 160_000), 1 - 1499 / 160_000, 0.5, 1 / 160_000]
    assert rates == pytest.approx([lr * share for share in shares])  # up 1,500 steps, a line to 0
    encoder = encoders.build(encoders.describe(method="cfmae", model="tiny"))
    optimizer = segment.make_optimizer(cfg, Segmenter(encoder, 5, dim=8, aux_dim=8))
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["eps"] == 1e-8
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    assert min(g["lr_scale"] for g in optimizer.param_groups) == pytest.approx(decay**5)
    assert cfg.options == {}  # MCMAE's pyramid is the paper's


def test_RECIPES__public_encoders_have_their_families():
    rates = {k: (v["lr"], v["layer_decay"]) for k, v in RECIPES.items()}
    assert (rates["vit"], rates["beit"]) == ((1e-4, 0.65), (3e-5, 0.9))
    assert rates["vit 24"] == rates["vit 32"] == (1e-4, 0.75)
    assert all(rates[k.replace("vit", "mae")] == rates[k] for k in ("vit", "vit 24", "vit 32"))
    assert RECIPES["beit"]["image_size"] == 640


@pytest.mark.parametrize("recipe, lr, decay, layer", [
    ("public", 0.02, 1e-4, 8),  # 0.01 x 120 / 60; layer_indices -5
    ("table6", 0.01, 0.0, 6),  # and Sec. 4.2
])  # fmt: skip
def test_Config__has_semanticmims_linear_probe(recipe, lr, decay, layer):
    cfg = parse(f"--method semanticmim --protocol linear --data x --recipe {recipe}")
    assert (cfg.crop, cfg.batch_size) == ((448, 448), 120)  # Table 6
    assert (cfg.epochs, cfg.iterations) == (25, None)
    assert (cfg.lr, cfg.weight_decay, cfg.layer, cfg.loss_size) == (lr, decay, layer, 100)
    assert (cfg.crop_scale_min, cfg.photometric, cfg.evaluation) == (0.8, False, "crop")
    assert (cfg.drop_path, cfg.classes, cfg.train_position) == (0, 21, False)
    encoder = encoders.build(encoders.describe(method="cfmae", model="tiny"))
    model = Segmenter(encoder, 5, layer=2)
    optimizer = segment.make_optimizer(cfg, model)
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups  # one, in which biases decay, too
    assert group["weight_decay"] == decay and "lr_scale" not in group
    assert [id(p) for p in group["params"]] == [id(p) for p in model.head.classifier.parameters()]
    assert (optimizer.defaults["momentum"], optimizer.defaults["nesterov"]) == (0.9, False)
    steps = [epoch * 88 + i for epoch in range(25) for i in (0, 87)]
    rates = [segment.learning_rate(cfg, step, 25 * 88) for step in steps]
    assert rates == pytest.approx(20 * [lr] + 20 * [lr / 10] + 10 * [lr / 100])  # StepLR(10)


def test_Config__the_probes_rate_grows_with_the_batch_unless_it_is_given():
    probe = "--method semanticmim --protocol linear --data x --batch-size 480"
    assert parse(probe).lr == pytest.approx(0.08)  # its own command: 8 ranks of 60
    assert parse(probe + " --lr 0.3").lr == 0.3
    assert parse(probe + " --recipe table6").lr == 0.01


@pytest.mark.parametrize("model, layer", [("tiny", 3), ("base", 16)])  # of 4, of 24
def test_Config__the_probe_reads_two_thirds_of_any_depth(model, layer):
    method = "cfmae" if model == "tiny" else "coma_dyvit"
    cfg = parse(f"--method {method} --encoder {model} --protocol linear --data x")
    depth = encoders.build(cfg.described).num_layers if model == "tiny" else 24
    assert cfg.layer == layer == round(depth * 2 / 3)


def test_Config__tiny_is_the_laptops():
    cfg = parse("--model tiny --method cfmae --encoder tiny")
    assert (cfg.data, cfg.crop, cfg.batch_size, cfg.dim, cfg.aux_dim) == (
        "shapes", (64, 64), 16, 64, 32)  # fmt: skip
    assert (cfg.lr, cfg.drop_path, cfg.photometric, cfg.iterations) == (1e-3, 0, False, 400)
    assert (cfg.classes, cfg.layer_decay, segment.learning_rate(cfg, 39, 400)) == (
        16, 0.65, pytest.approx(1e-3 * (1 - 39 / 400)))  # fmt: skip
    probe = parse("--model tiny --method cfmae --encoder tiny --protocol linear")
    assert (probe.lr, probe.iterations, probe.epochs) == (0.01, 400, None)


# ------------------------------------------------------------------------------ pixels' statistics


def said_of_pixels(capsys, out, *flags):
    """The line that a run of one step prints."""
    with tiny_run.short_epochs():
        segment.main([*SMALL, "--steps", "1", "--output", str(out), *flags])
    return next(x for x in capsys.readouterr().out.splitlines() if x.startswith("pixels"))


def test_parse__a_crop_has_two_flags():
    with pytest.raises(engine.UserError, match="invalid int value: '64x96': --crop-width is the"):
        engine.parse(Config, PRESETS, "", ["--image-size", "64x96"])


def test_build__normalises_as_told_and_says_so(tmp_path, capsys):
    imgs = torch.randint(256, (1, 3, 32, 32), dtype=torch.uint8)
    for i, (flags, mean, std, words) in enumerate((
        ((), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "ImageNet's"),
        (("--mean", "0.5,0.4,0.3", "--std", ".5,.5,.25"), (0.5, 0.4, 0.3), (0.5, 0.5, 0.25),
         "mean and std as given"),
        (("--std", "1,1,1"), (0.485, 0.456, 0.406), (1.0, 1.0, 1.0), "std as given"),
    )):  # fmt: skip
        found = segment.build(config(*flags)).normalize(imgs)
        for c in range(3):
            expected = (imgs[:, c] / 255 - mean[c]) / std[c]
            torch.testing.assert_close(found[:, c], expected)
        line = said_of_pixels(capsys, tmp_path / str(i), *flags)
        assert words in line and str(list(mean)) in line and str(list(std)) in line


def test_build__every_setting_reaches_the_model(monkeypatch):
    seen, original = {}, encoders.build
    monkeypatch.setattr(encoders, "build", lambda *a: seen.update(a=a[1:]) or original(*a))
    flags = "--aux-weight 0.7 --loss-size 20 --dropout 0.3 --drop-path 0.25 --crop-width 48"
    model = segment.build(config(*flags.split()))
    assert seen["a"] == ((32, 48), 0.25, False)
    assert (model.aux_weight, model.head.dropout, model.layer) == (0.7, 0.3, None)
    assert model.loss_size == 0  # mmsegmentation's loss is taken at the labels' own size
    assert model.head.classifier.weight.shape[:2] == (16, 16)  # classes; --dim of SMALL
    assert model.head.aux_classifier.weight.shape[:2] == (16, 8)
    probe = segment.build(config("--protocol", "linear", "--layer", 2, "--loss-size", 20))
    assert (probe.layer, probe.loss_size) == (2, 20)


def test_Config__what_is_known_of_the_encoder_comes_before_imagenets(monkeypatch, capsys, tmp_path):
    original = encoders.describe
    known = {"mean": [0.5] * 3, "std": [0.5] * 3, "input": "its config's"}
    monkeypatch.setattr(encoders, "describe", lambda *a, **k: original(*a, **k) | known)
    cfg = config()
    assert cfg.statistics == ([0.5] * 3, [0.5] * 3) and cfg.colour == (128, 128, 128)
    assert "[0.5, 0.5, 0.5]: its config's" in said_of_pixels(capsys, tmp_path)


# ---------------------------------------------------------------------------- encoders, positions


def test_Config__init_key_reaches_the_reader(monkeypatch, tmp_path):
    seen = []
    original = encoders.describe

    def describe(*sources, **changes):
        seen.append(("describe", changes.pop("key", None)))
        return original(method="cfmae", model="tiny")

    monkeypatch.setattr(encoders, "describe", describe)
    monkeypatch.setattr(encoders, "load", lambda *a: seen.append(("load", a[-1])) or "")
    argv = [*SMALL, "--init", str(tmp_path / "x.pt"), "--init-key", "model_ema"]
    at = argv.index("--method")
    del argv[at : at + 4]
    assert engine.parse(Config, PRESETS, "", argv).described["method"] == "cfmae"
    with tiny_run.short_epochs():
        segment.main([*argv, "--steps", "1", "--output", str(tmp_path / "out")])
    assert set(seen[:-1]) == {("describe", "model_ema")} and seen[-1] == ("load", "model_ema")


@pytest.mark.parametrize("flags, words", [
    ("--relative-bias", "--relative-bias: for UperNet on MCMAE's encoder alone"),
    ("--fourth conv --init-values 1", "--init-values, --fourth: for UperNet on MCMAE's"),
    ("--recipe table6", "of the linear probe"),
    ("--window 4 --protocol linear", "--window is UperNet's"),
    ("--window 4 --method coma_dyvit", "--window DyViT has windows of its own"),
    ("--window 4 --everywhere 5", "--everywhere 5: want blocks from 1 to 4"),
    ("--window -1", "--window -1 must be 0 or above"),
    ("--mean 127.5,127.5,127.5", "--mean 127.5,127.5,127.5: three numbers in "),
])  # fmt: skip
def test_Config__options_that_do_not_fit(flags, words):
    with pytest.raises(UserError, match=words):
        config(*flags.split())


MCMAE = "--data shapes --model tiny --method mcmae --encoder tiny --image-size 64 --device cpu"


def mcmae_model(flags=""):
    return segment.build(parse(f"{MCMAE} {flags}"))


@pytest.mark.parametrize("flags", ["", "--relative-bias --init-values 1 --fourth conv"])
def test_build__mcmaes_options_are_in_the_encoder_and_trained(flags):
    model = mcmae_model(flags)
    found = {n.removeprefix("encoder.") for n, p in model.named_parameters() if p.requires_grad}
    table = "blocks3.0.attn.relative_position_bias_table"
    wanted = {table, "blocks3.0.ls1.gamma", "blocks3.2.ls2.gamma", "fourth.0.weight"}
    assert found & wanted == (wanted if flags else set()) and "pos_embed" in found
    if flags:
        own = dict(model.encoder.named_parameters())
        assert not own[table].any() and (own["blocks3.0.ls1.gamma"] == 1).all()
        assert own[table].shape[0] == (2 * 8 - 1) ** 2  # offsets on the crop's grid, 8 x 8
        assert own["fourth.0.weight"].shape[2:] == (3, 3)
        assert parse(f"{MCMAE} {flags}").described["options"] == {
            "relative_bias": True, "init_values": 1.0, "fourth": "conv"}  # fmt: skip
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    batch = {"rgb": images, "semantic": images[:, 0] % 16, "seed": torch.arange(2)}
    model(batch, torch.zeros(()))[0].backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("flags", ["", "--relative-bias"])
def test_build__a_window_as_large_as_the_map_is_global_attention(flags):
    """MCMAE's stage 3 has no prefix tokens; its grid here is 8 x 8."""
    imgs, models = torch.randn(2, 3, 64, 64), {}
    for window in (0, 4, 8):
        torch.manual_seed(0)
        models[window] = mcmae_model(f"{flags} --window {window}")
        for block in models[window].encoder.blocks if flags else ():
            torch.nn.init.normal_(block.attn.relative_position_bias_table)
    assert models[0].windows is None
    assert models[0].state_dict().keys() == models[4].state_dict().keys()
    seed = torch.tensor([3, 4])
    whole, halves, same = (models[w].features(imgs, seed) for w in (0, 4, 8))
    for a, b in zip(whole, same):
        torch.testing.assert_close(a, b)
    assert torch.equal(whole[1], halves[1]) and (whole[2] - halves[2]).abs().max() > 1e-3
    wide = torch.randn(1, 3, 64, 96)  # a window of the sliding ones at another size
    models[0].features(wide)
    assert [m.shape[2:] for m in models[4].features(wide)] == [
        (32, 48), (16, 24), (8, 12), (4, 6)]  # fmt: skip


def test_build__windows_of_a_plain_encoder_leave_its_class_token_out():
    model = segment.build(config("--method", "mae", "--window", 2, "--everywhere", 4, "--shifted"))
    assert model.windows.plan == [(True, 0), (True, 1), (True, 0), (False, 0)]
    assert not model.encoder.cls_token.requires_grad  # DDP waits for every gradient
    blocks, imgs = model.encoder.blocks, torch.randn(1, 3, 32, 32)
    maps, x = model.features(imgs), model.encoder.embed(imgs)
    (first,) = Windows(blocks[:1], (4, 4), 2).run(blocks[:1], x, (4, 4), [None])
    torch.testing.assert_close(maps[0].flatten(2).transpose(1, 2), first)
    maps = maps[2:]
    torch.testing.assert_close(
        blocks[3](maps[0].flatten(2).transpose(1, 2)), maps[1].flatten(2).transpose(1, 2)
    )


def test_Config__attention_is_global_unless_asked():
    assert config().windows is None and config("--everywhere", 1).windows is None
    asked = {"window": 4, "everywhere": [1, 2, 3, 4], "shifted": False}
    assert config("--window", 4, "--everywhere", "quarters").windows == asked


def test_build__mcmaes_layers_decay_as_its_public_code_has_them():
    """Stems, stages 1 and 2, positions at level 0; stage 3 from 1; the head and what follows: 1."""
    model = mcmae_model("--fourth conv")
    depth, scale = len(model.encoder.blocks3), {}
    cfg = parse(f"{MCMAE} --layer-decay 0.75")
    for group in segment.make_optimizer(cfg, model).param_groups:
        scale |= {id(p): group["lr_scale"] for p in group["params"]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            level, name = 0, name.removeprefix("encoder.")
            if name.startswith("blocks3."):
                level = 1 + int(name.split(".")[1])
            elif name.startswith(("fourth.", "head.")):
                level = depth + 1
            assert scale[id(p)] == pytest.approx(0.75 ** (depth + 1 - level)), name
