"""Numbers in the SemanticMIM paper that need no training, on the real modules.

Do not hold: App. C's "2.8 % less FLOPs" and "equal at 11 proxies" (see the cost tests). Garbled in
the copy at hand: Table 2's epochs and stochastic depth. Table 3 repeats Table 5's numbers.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import engine
import semanticmim

D, DEPTH = 768, 12


def config(*flags):
    return engine.parse(semanticmim.Config, semanticmim.PRESETS, "", list(map(str, flags)))


def plain_cost(L):
    """App. C, a standard block, in multiply-adds."""
    return 12 * L * D**2 + 2 * L**2 * D


def printed_cost(L0, L1, L2):
    """App. C's last formula, as printed: 3 L2 + L1 projections in the cross-attention."""
    own = 12 * (L0 + L1) * D**2 + 2 * (L0 + L1) ** 2 * D
    return own + 11 * L2 * D**2 + L1 * D**2 + 2 * L1 * L2 * D + 2 * L2**2 * D


def full_cost(L0, L1, L2):
    """The same with what q, k, v and the output need: 4 L2 + 2 L1 projections."""
    return printed_cost(L0, L1, L2) + L2 * D**2 + L1 * D**2


@functools.cache
def training_flops(*flags):
    """Multiply-adds of both stacks for one image, without head and target, on the module."""
    cfg = config(*flags)
    with torch.device("meta"):
        model = semanticmim.SemanticMIM(cfg)
        mask = torch.zeros(1, 196, dtype=torch.bool)
        with FlopCounterMode(display=False) as counter:
            model.tokens(torch.zeros(1, 3, 224, 224), mask)
    return counter.get_total_flops() // 2 - cfg.num_visible * D * D  # less the patch embedding


def test_tokens__78_visible_118_masked_8_proxies():
    cfg = config()  # App. C
    assert (cfg.num_visible, cfg.num_patches - cfg.num_visible, cfg.proxies) == (78, 118, 8)


def test_tokens__of_plain_mim_at_40_percent():
    cfg = config("--proxies", 0)  # Sec. 4.1; 78.4 rounds up
    assert (cfg.mask_ratio, cfg.num_visible, cfg.num_patches - cfg.num_visible) == (0.4, 117, 79)
    with torch.device("meta"):
        encoder = semanticmim.make_encoder(cfg)
    assert encoder.cls_token.shape == (1, 1, D) and not hasattr(encoder, "reg_token")


@pytest.mark.parametrize("target, peak, low, warmup, clip, crop, jitter, depth", [
    ("dvae", 1.5e-3, 1e-5, 10, 3.0, 0.08, 0.4, 0.1),
    ("hog", 1.6e-3, 1e-6, 30, 0.02, 0.5, 0.0, 0.0),
])  # fmt: skip
def test_table_2__recipes(target, peak, low, warmup, clip, crop, jitter, depth):
    flags = ["--target", target, *(["--tokenizer", __file__] if target == "dvae" else [])]
    cfg = config(*flags)
    steps = (SimpleNamespace(number=n * 625, per_epoch=625) for n in (warmup, 300))
    assert [engine.cosine(cfg, step) for step in steps] == pytest.approx([peak, low])
    assert (cfg.warmup_epochs, cfg.clip_grad, cfg.crop_scale_min) == (warmup, clip, crop)
    assert (cfg.color_jitter, cfg.drop_path) == (jitter, depth)
    assert (cfg.batch_size, cfg.epochs, cfg.weight_decay) == (2048, 300, 0.05)
    assert (cfg.beta1, cfg.beta2) == (0.9, 0.999)
    assert torch.optim.AdamW([torch.zeros(1)]).defaults["eps"] == 1e-8  # what the engine uses
    assert config(*flags, "--proxies", 0).base_lr == cfg.base_lr  # "exactly the same recipe"


def test_appendix_c__printed_formula():
    """-2.8 % holds against 197 tokens; equality comes at 13, not 11, or at 12 against 196."""
    saved = printed_cost(78, 8, 118) / plain_cost(197) - 1
    assert round(100 * saved, 1) == -2.8

    def first(L):
        return next(n for n in range(20) if printed_cost(78, n + 1, 118) > plain_cost(L))

    assert first(197) == 13 and first(196) == 12


def test_appendix_c__counted_in_full():
    """8 proxies cost 2.3 % more than plain MIM; equality comes at 4."""
    assert round(100 * (full_cost(78, 8, 118) / plain_cost(197) - 1), 1) == 2.3
    assert full_cost(78, 4, 118) < plain_cost(197) < full_cost(78, 5, 118)


@pytest.mark.parametrize("proxies", [0, 4, 8, 11, 13, 16])
@pytest.mark.slow
def test_training_flops__are_the_corrected_formulas(proxies):
    counted = training_flops("--proxies", proxies, "--mask-ratio", 0.6, "--no-skip-last")
    cost = full_cost(78, proxies, 118) if proxies else plain_cost(197)
    assert counted == DEPTH * cost


@pytest.mark.slow
def test_training_flops__skipping_the_last_img_rows_saves_2_6_percent():
    whole, skipped = training_flops("--no-skip-last"), training_flops()
    assert round(100 * (1 - skipped / whole), 1) == 2.6
    # against plain MIM with its 197 tokens the difference then is nil: -0.4 %
    assert round(100 * (skipped / training_flops("--proxies", 0) - 1), 1) == -0.4


@pytest.mark.slow
def test_inference__costs_3_7_percent_more():
    flops = []
    for proxies in (8, 0):
        with torch.device("meta"):
            encoder = semanticmim.make_encoder(config("--proxies", proxies))
            with FlopCounterMode(display=False) as counter:
                encoder.forward_features(torch.zeros(1, 3, 224, 224))
        flops.append(counter.get_total_flops() // 2 - 196 * D * D)
    assert flops == [DEPTH * plain_cost(204), DEPTH * plain_cost(197)]
    assert round(100 * (flops[0] / flops[1] - 1), 1) == 3.7


def test_parameters__kept_are_a_vit_b_and_8_proxies():
    with torch.device("meta"):
        model = semanticmim.SemanticMIM(config())
    kept = sum(p.numel() for p in model.encoder.parameters())
    block = 12 * D * D + 9 * D + 4 * D  # weights, biases, norms
    vit_b = DEPTH * block + 2 * D + (768 + 1) * D + 196 * D  # final norm, patches, position
    assert vit_b + D + D == 85_798_656  # with a class token and its position: timm's ViT-B/16
    assert kept == vit_b + 8 * D
    thrown_away = sum(p.numel() for p in model.parameters()) - kept
    assert thrown_away == DEPTH * block + 2 * D + D + 108 * D + 108  # stack, norm, [MASK], head
