"""Numbers of the MCMAE paper that need no training, and its statements that do not hold.

Detection's and segmentation's parameters and FLOPs (Tables 2, 3) include their heads. What no code
decides, the sums and differences of printed results, was done by hand. Not as its tables have it:
- Linear probing gains "1.6 %" by the multi-scale decoder: Table 6 has 70.9 - 69.4.
- "6.6 x faster" than MAE: its 100 epochs over 16 are 6.25.
- Figure 4c has 52.4 and 50.4 where Tables 4 and 2 have 52.5 and 50.3.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import engine
import mcmae
from downstream import convmae
from downstream.upernet import Segmenter


def parse(*argv: str) -> mcmae.Config:
    return engine.parse(mcmae.Config, mcmae.PRESETS, "", list(argv))


def on_meta(*argv: str) -> mcmae.MCMAE:
    with torch.device("meta"):
        return mcmae.MCMAE(parse(*argv))


@functools.cache
def flops(*argv: str) -> float:
    """Of one image, forward. (The counter takes the backward of grouped convolutions for dense.)"""
    model = on_meta(*argv)
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        batch = {"rgb": torch.zeros(1, 3, 224, 224, dtype=torch.uint8)}
        model(batch | {"seed": torch.zeros(1, dtype=torch.int64)}, torch.zeros(()))
    return counter.get_total_flops() / 1e9


# -------------------------------------------------------------------------------------- the method


def test_section_3_1__defaults():
    cfg = parse()
    assert (cfg.epochs, cfg.warmup_epochs, cfg.batch_size) == (1600, 40, 1024)
    assert (cfg.base_lr, cfg.weight_decay) == (1.5e-4, 0.05)
    assert (cfg.decoder_depth, cfg.decoder_embed_dim) == (8, 512)
    warm = SimpleNamespace(number=40 * 1251 - 1, per_epoch=1251)
    assert engine.cosine(cfg, warm) == pytest.approx(6e-4)
    # Does not hold: 12 decoder heads do not divide 512 features.
    assert 512 % 12 and 512 % cfg.decoder_num_heads == 0
    model = on_meta()
    assert [b.attn.num_heads for b in model.decoder_blocks] == [cfg.decoder_num_heads] * 8
    assert [b.attn.num_heads for b in model.encoder.blocks3] == [12] * 11
    with pytest.raises(engine.UserError):
        parse("--decoder-num-heads", "12")


@pytest.mark.slow
def test_section_2_2__visible_tokens_and_resolutions():
    model = on_meta()
    assert (model.cfg.num_visible, model.cfg.num_positions) == (49, 196) and 49 / 196 == 0.25
    maps = model.encoder.forward_pyramid(torch.zeros(1, 3, 224, 224, device="meta"))
    # Table 7, [E1, E2, E3]; Sec. 2.3: E4 has 1/32 of the input's resolution
    assert [tuple(m.shape[1:]) for m in maps] == [
        (256, 56, 56), (384, 28, 28), (768, 14, 14), (768, 7, 7)
    ]  # fmt: skip
    assert model.encoder.strides == (4, 8, 16, 32)
    assert len(model.encoder.blocks3) == 11  # Sec. 2.3
    drawn = mcmae.make_mask(model.cfg, {"seed": torch.arange(8)}, None)
    assert ((~drawn).sum(1) == 49).all()


@pytest.mark.parametrize("name, dims, depths, ratios, heads, printed, millions", [
    ("small", "128,256,384", "2,2,11", "4,4,4", 6, 22, 21.867),
    ("base", "256,384,768", "2,2,11", "4,4,4", 12, 84, 84.455),
    ("base-star", "256,384,768", "2,2,11", "8,8,4", 12, 88, 87.868),
    ("large", "384,768,1024", "2,2,23", "8,8,4", 16, 322, 321.752),
    ("huge", "768,1024,1280", "2,2,31", "8,8,4", 16, 666, 679.207),
])  # fmt: skip
@pytest.mark.slow
def test_table_7__sizes(name, dims, depths, ratios, heads, printed, millions):
    model = on_meta("--model", name)
    cfg = model.cfg
    assert (cfg.embed_dims, cfg.depths, cfg.mlp_ratios) == (dims, depths, ratios)
    assert cfg.num_heads == heads
    count = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    assert count == pytest.approx(millions, abs=1e-3)
    # Does not hold for H: the table's own widths and depths give 679 M.
    assert (round(count) == printed) == (name != "huge")


@pytest.mark.slow
def test_table_1__base_does_not_have_88_million():
    """Not with the fusion convolutions either; base-star has, in Table 7 as in Table 1."""
    model = on_meta()
    convs = model.stage1_output_decode, model.stage2_output_decode
    fusion = sum(p.numel() for m in convs for p in m.parameters()) / 1e6
    encoder = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    assert encoder + fusion == pytest.approx(88.782, abs=1e-3)
    assert (round(encoder), round(encoder + fusion)) == (84, 89)
    star = on_meta("--model", "base-star").encoder
    assert round(sum(p.numel() for p in star.parameters()) / 1e6) == 88
    assert not hasattr(on_meta("--no-multi-scale"), "stage1_output_decode")


@pytest.mark.slow
def test_table_3__parameters_with_upernet():
    """Does not hold to the digit: 153 M is 153.54. The public options give more by far."""
    for options, million in (
        ({}, 153.539), (dict(relative_bias=True, init_values=1.0, fourth="conv"), 159.391),
    ):  # fmt: skip
        with torch.device("meta"):
            encoder = convmae.make_encoder(parse(), image_size=(512, 512), **options)
            model = Segmenter(encoder, 150)
        count = sum(p.numel() for p in model.parameters()) / 1e6
        assert count == pytest.approx(million, abs=1e-3) and round(count) != 153


# ------------------------------------------------------------------------------------------- cost


@pytest.mark.parametrize("decoder", ["--multi-scale", "--no-multi-scale"])
@pytest.mark.slow
def test_table_5__flops(decoder):
    """All rows against the dense form, with either decoder (Sec. 3.5: not the multi-scale one)."""
    dense = flops("--no-sparse", decoder)
    assert round(flops("--masking", "token", decoder) / dense, 1) == 1.7
    assert flops("--no-masked-conv", decoder) == dense  # 1x
    seven, nine = (flops("--no-sparse", "--kernel-size", k, decoder) / dense for k in "79")
    assert round(seven, 3) == 1.003
    # Does not hold: the 1.007 of 9 x 9 is 1.0072 with the multi-scale decoder, 1.0076 without.
    assert round(nine, 4) == (1.0072 if decoder == "--multi-scale" else 1.0076)
    # The row of 0.997 carries the first row's ticks; it is what no depthwise convolution gives.
    blocks = 2 * 25 * (2 * 56**2 * 256 + 2 * 28**2 * 384) / 1e9
    assert round(1 - blocks / dense, 3) == 0.997


@pytest.mark.slow
def test_flops__sparse_does_at_most_067_of_dense():
    dense, sparse = flops("--no-sparse"), flops()
    assert dense == pytest.approx(34.436, abs=1e-3) and sparse == pytest.approx(22.491, abs=1e-3)
    assert sparse <= 0.67 * dense
