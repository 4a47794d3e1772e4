"""Every number of classification's recipes, and of ImageNet-C's baseline, against its source."""

import dataclasses
import re
from types import SimpleNamespace
from unittest import mock

import pytest

import engine
from downstream import encoders, finetune, probe, robustness, segment, transfer

pytestmark = pytest.mark.slow

FINETUNE = (
    "epochs warmup_epochs batch_size base_lr min_lr weight_decay beta1 beta2 layer_decay drop_path "
    "reprob color_jitter head_std train_position mixup cutmix switch_prob smoothing rand_augment "
    "rand_augment_std crop_scale_min crop_pct"
).split()
# The same in all sources that name them: AdamW's betas, drop path, mixing, RandAugment, crops.
REST = dict(
    beta1=0.9, beta2=0.999, drop_path=0.1, mixup=0.8, cutmix=1.0, switch_prob=0.5, smoothing=0.1,
    rand_augment=9.0, rand_augment_std=0.5, crop_scale_min=0.08, crop_pct=224 / 256,
    weight_decay=0.05, color_jitter=0.0, epochs=100, train_position=True,
)  # fmt: skip
# MAE, FINETUNE.md and main_finetune.py: --epochs 100 --blr 5e-4 --layer_decay 0.65
# --weight_decay 0.05 --drop_path 0.1 --reprob 0.25 --mixup 0.8 --cutmix 1.0, 1024 images; defaults:
# warmup_epochs 5, min_lr 1e-6, smoothing 0.1; trunc_normal_(head, std=2e-5); models_vit.py leaves
# pos_embed the parameter that it is in timm.
MAE = REST | dict(
    warmup_epochs=5, batch_size=1024, base_lr=5e-4, min_lr=1e-6, layer_decay=0.65, reprob=0.25,
    head_std=2e-5,
)  # fmt: skip
# The same for ViT-L: --epochs 50 --blr 1e-3 --layer_decay 0.75 --drop_path 0.2; ViT-H: 0.3.
MAE_L = MAE | dict(epochs=50, base_lr=1e-3, layer_decay=0.75, drop_path=0.2)
# CFMAE Table 8, columns 400e and 1600e; it names no erasing.
CFMAE = MAE | dict(batch_size=2048, base_lr=1e-3, layer_decay=0.7, reprob=0.0)
# SemanticMIM, configs/beit/beit_cls_ft.py: lr 4e-3 at 8 x 128, layer_decay_rate 0.65, 20 epochs of
# warm-up, eta_min 1e-6, erase_prob 0.25, TruncNormal 0.02.
BEIT = MAE | dict(warmup_epochs=20, base_lr=4e-3 * 256 / 1024, head_std=0.02)
# SemanticMIM, configs/maskfeat/maskfeat_cls_ft.py: lr 8e-3 at 8 x 256, ColorJitter 0.4,
# TruncNormal 2e-5; else the same.
MASKFEAT = BEIT | dict(
    batch_size=2048, base_lr=8e-3 * 256 / 2048, color_jitter=0.4, head_std=2e-5
)  # fmt: skip
# SemanticMIM Table 3: peak 4e-3 at 1024, minimum 0, no warm-up, decay 1e-4.
TABLE_3 = dict(batch_size=1024, base_lr=4e-3 * 256 / 1024, min_lr=0, warmup_epochs=0,
               weight_decay=1e-4)  # fmt: skip
VIT = dict(image_size=224, patch_size=16, embed_dim=64, num_heads=4)
CASES = {
    "cfmae base": CFMAE,
    "cfmae base epochs=1600": CFMAE | dict(base_lr=5e-4, layer_decay=0.65),
    "semanticmim base": MASKFEAT,
    "semanticmim base recipe=table3": MASKFEAT | TABLE_3,
    "semanticmim base target=dvae": BEIT,
    "semanticmim base target=dvae recipe=table3": BEIT | TABLE_3,
    "beit depth=12": BEIT,
    "mcmae base": MAE,  # its FINETUNE.md: MAE's command, word for word
    "mcmae large": MAE_L | dict(epochs=100),  # MAE's (Sec. 3.1) but for the decay, not given
    "mcmae huge": MAE_L | dict(epochs=100, drop_path=0.3),
    "coma_dyvit small": MAE | dict(train_position=False),  # not given; fixed by design
    "coma_dyvit base": MAE | dict(train_position=False, layer_decay=0.75),
    "mae base": MAE,
    "mae large": MAE_L,
    "mae huge": MAE_L | dict(drop_path=0.3),
    "vit depth=12": MAE,
    "vit depth=24": MAE_L,
    "vit depth=32": MAE_L | dict(drop_path=0.3),
}


def resolved(case: str, script=finetune, **given) -> transfer.Config:
    """The Config of one line of CASES: method, preset, and what is changed."""
    method, *words = case.split()
    changes = dict(w.split("=") for w in words if "=" in w)
    if (recipe := changes.pop("recipe", None)) and script is finetune:
        given["recipe"] = recipe
    changes = {k: int(v) if v.isdigit() else v for k, v in changes.items()}
    if method in encoders.METHODS:
        target = {"target": changes.pop("target", None)}
        description = encoders.describe(method=method, model=words[0], **changes)
        description["config"] |= {k: v for k, v in target.items() if v}
    else:
        description = {"method": method, "config": VIT | changes}
    return described_as(description, script, **given)


def described_as(description: dict, script=finetune, **given) -> transfer.Config:
    given = script.PRESETS[given.get("model", "paper")] | given
    cfg = script.Config(data="shapes", checkpoint="x", **given)
    changes = {n: transfer.three(n, given[n]) for n in ("mean", "std") if n in given}
    with mock.patch.object(encoders, "describe", lambda *_, **__: {**description, **changes}):
        cfg.resolve()
    return cfg


@pytest.mark.parametrize("case", CASES)
def test_finetune__every_value(case):
    cfg, expected = resolved(case), {k: CASES[case][k] for k in FINETUNE}
    assert {k: getattr(cfg, k) for k in FINETUNE} == pytest.approx(expected)


# MAE's FINETUNE.md and main_linprobe.py: 16384 images, --epochs 90 --blr 0.1 --weight_decay 0.0,
# warm-up 10, min_lr 0, trunc_normal_ 0.01. MCMAE's: the same at 4 x 8 x 128 images. SemanticMIM
# Table 5 and its configs: AdamW, 4e-3 at 1024, decay 1e-4, 100 epochs, no warm-up, TruncNormal .02.
LARS = dict(probe="lars", epochs=90, warmup_epochs=10, batch_size=16384, weight_decay=0, rate=0.1,
            head_std=0.01, crop_scale_min=0.08, crop_pct=224 / 256)  # fmt: skip
ADAMW = dict(probe="adamw", epochs=100, warmup_epochs=0, batch_size=1024, weight_decay=1e-4,
             rate=4e-3 * 256 / 1024, head_std=0.02, crop_scale_min=0.08,
             crop_pct=224 / 256)  # fmt: skip


@pytest.mark.parametrize("case, expected", [
    ("cfmae base", LARS), ("mae base", LARS), ("vit depth=24", LARS), ("coma_dyvit base", LARS),
    ("beit depth=12", LARS), ("mcmae base", LARS | dict(batch_size=4096)),
    ("semanticmim base", ADAMW), ("semanticmim base recipe=table3", ADAMW),
])  # fmt: skip
def test_linear__every_value(case, expected):
    cfg = resolved(case, probe)
    found = {k: getattr(cfg, k, None) for k in expected} | {"rate": float(cfg.rates.split(",")[0])}
    assert found == expected


def test_linear__adamw_is_semanticmim_s_on_any_encoder():
    assert (cfg := resolved("mcmae base", probe, probe="adamw")).batch_size == 1024
    assert cfg.rates.split(",")[0] == "1e-3"


def test_label_maps__cutmix_alone():
    cfg = resolved("cfmae base", granularities="R+I+S")
    assert (cfg.mixup, cfg.cutmix) == (0, 1)


@pytest.mark.parametrize("size, share", [(224, 224 / 256), (448, 1.0), (240, 1.0), (64, 1.0)])
def test_crop_pct__mae_above_224(size, share):
    """util/datasets.py: 224 / 256 up to 224, else 1; below 224 ours, which cuts no border."""
    assert resolved("cfmae base", image_size=size).crop_pct == share


def test_tiny__ours():
    """What README's figures were measured with."""
    cfg = resolved("mcmae tiny", model="tiny")
    expected = dict(
        epochs=10, warmup_epochs=1, batch_size=64, base_lr=8e-3, layer_decay=0.75, drop_path=0,
        mixup=0, cutmix=0, reprob=0, color_jitter=0, head_std=2e-5, crop_pct=1,
    )  # fmt: skip
    assert {k: getattr(cfg, k) for k in expected} == expected
    cfg = resolved("mcmae tiny", probe, model="tiny")
    assert (cfg.epochs, cfg.warmup_epochs, cfg.batch_size) == (30, 3, 512)


# ----------------------------------------------------------------------------- input statistics


def test_statistics__what_the_encoder_was_trained_with():
    cfg = resolved("cfmae base")
    assert cfg.statistics == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])  # torchvision's
    described = {"method": "vit", "config": VIT | {"depth": 12}}
    described |= {"mean": [0.5] * 3, "std": [0.5] * 3}
    found = described_as(described)
    assert found.statistics == ([0.5] * 3, [0.5] * 3)
    given = resolved("cfmae base", mean="0.1,0.2,0.3", std="1,1,0.5")
    assert given.statistics == ([0.1, 0.2, 0.3], [1, 1, 0.5])
    for bad in ("0.5", "a,b,c", "1,1,2", "0,0,0", "nan,0,0"):
        with pytest.raises(engine.UserError, match="--std"):
            resolved("cfmae base", std=bad)


# -------------------------------------------------------------------------------------- ImageNet-C


def test_alexnet__the_published_errors():
    """Of arXiv 1903.12261's public code, in its order, as wrong images of 5 x 50,000."""
    wrong = dict(
        gaussian_noise=221607, shot_noise=223617, impulse_noise=230660, defocus_blur=204970,
        glass_blur=206567, motion_blur=196487, zoom_blur=199590, snow=216704, frost=206643,
        fog=204831, brightness=141148, contrast=213301, elastic_transform=161514, pixelate=179460,
        jpeg_compression=151625,
    )  # fmt: skip
    assert robustness.ALEXNET == pytest.approx({k: n / 250_000 for k, n in wrong.items()}, abs=1e-9)


# --------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("script", [finetune, probe, segment])
def test_help__at_most_forty_flags_in_groups_and_none_that_only_the_program_sets(script, capsys):
    with pytest.raises(SystemExit):
        engine.parse(script.Config, script.PRESETS, script.__doc__, ["--help"])
    said = capsys.readouterr().out
    shown = [line.split()[0].strip(",") for line in said.splitlines() if line.startswith("  --")]
    assert 20 < len(shown) <= 40 and len(set(shown)) == len(shown)
    fields = {engine.flag(f.name) for f in dataclasses.fields(script.Config)}
    rare = set(script.Config.FURTHER) - set(script.Config.SET)
    further = {engine.flag(name) for name in rare}
    hidden = fields - set(shown) - further
    assert hidden == {engine.flag(name) for name in script.Config.SET} and further <= fields
    for name in ("--description", "--patch-size", "--mix-batch", "--norm-batch"):
        assert name not in said
    assert ("--classes" in shown) == (script is segment)
    for group in ("data:", "model:", "optimisation:", "run:"):
        assert group in said
    assert further <= set(said.split())  # at the end; and they are taken
    if "--min-lr" in further:
        given = engine.parse(script.Config, script.PRESETS, "", ["--data", "shapes", "--method",
                             "mae", "--encoder", "tiny", "--min-lr", "0.5"])  # fmt: skip
        assert given.min_lr == 0.5


@pytest.mark.parametrize(
    "images, batch, epochs, words",
    [
        (500, 64, 10, "70 steps .*: try --batch-size 16 --epochs 33, 1023 steps"),
        (3000, 64, 10, "460 steps .*: try --batch-size 16 --epochs 10, 1870 steps"),
        (20, 8, 3, "6 steps .*: try --batch-size 8 --epochs 500, 1000 steps"),
    ],
)
def test_few_steps__says_what_would_be_enough(images, batch, epochs, words):
    cfg = SimpleNamespace(batch_size=batch, epochs=epochs, steps=None)
    run = dict(cfg=cfg, total=images // batch * epochs, checkpoint=None, train_set=range(images))
    assert re.search(words, finetune.few_steps(SimpleNamespace(**run)))
    for change in ({"total": 1000}, {"checkpoint": {"step": 1}}):
        assert not finetune.few_steps(SimpleNamespace(**run | change))
    cfg.steps = 5  # a quick look
    assert not finetune.few_steps(SimpleNamespace(**run))
