"""Every number of the MCMAE paper that needs no training, and its statements that do not hold.

What needs 200 epochs or more is taken as printed; here only sums, differences, counts and costs are
done again. Detection's and segmentation's parameters and FLOPs (Tables 2, 3) include their heads.
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

TABLE_1 = {  # fine-tuning, linear probing
    "BEiT": (83.0, 37.6), "MAE": (83.6, 67.8), "SimMIM": (84.0, None), "MCMAE": (85.0, 70.9)
}  # fmt: skip
TABLE_2 = {  # box AP, mask AP
    "Benchmarking": (50.3, 44.9), "ViTDet": (51.2, 45.5), "MIMDet": (51.5, 46.0),
    "Swin": (49.2, 43.5), "MViTv2": (51.0, 45.7), "MCMAE": (53.2, 47.1),
}  # fmt: skip
TABLE_3 = {"MAE": 48.1, "MCMAE": 51.7}
TABLE_4 = {200: (84.1, 62.5, 50.2, 44.8, 48.1), 1600: (84.6, 69.4, 52.5, 46.5, 50.7)}
TABLE_6 = {  # without and with the multi-scale decoder: fine-tuning, linear, box, mask, mIoU
    200: ((84.1, None, 50.2, 44.8, 48.1), (84.4, None, 50.8, 45.4, 48.5)),
    1600: ((84.6, 69.4, 52.5, 46.5, 50.7), (85.0, 70.9, 53.2, 47.1, 51.7)),
}
FIGURE_4 = {"linear": (69.4, 67.8), "box": (52.4, 50.4)}  # MCMAE, MAE


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


def minus(a: tuple, b: tuple) -> list:
    return [None if y is None else pytest.approx(round(x - y, 6), abs=1e-6) for x, y in zip(a, b)]


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
    with pytest.raises(engine.UserError):
        parse("--decoder-num-heads", "12")


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


# -------------------------------------------------------------------------------- sums in the text


def test_text__differences_between_tables():
    ours, theirs = TABLE_1["MCMAE"], TABLE_1
    assert minus(ours, theirs["MAE"])[0] == 1.4  # Sec. 3.1
    assert minus(ours, theirs["BEiT"]) == [2.0, 33.3]  # Sec. 3.1
    assert minus(ours, theirs["SimMIM"])[0] == 1.0  # Sec. 3.1
    ours = TABLE_2["MCMAE"]
    assert minus(ours, TABLE_2["Benchmarking"]) == [2.9, 2.2]  # abstract, Sec. 3.2
    assert minus(ours, TABLE_2["ViTDet"])[0] == 2.0 and minus(ours, TABLE_2["MIMDet"])[0] == 1.7
    assert minus(ours, TABLE_2["Swin"]) == [4.0, 3.6]
    assert minus(ours, TABLE_2["MViTv2"]) == [2.2, 1.4]
    assert TABLE_3["MCMAE"] - TABLE_3["MAE"] == pytest.approx(3.6)  # abstract, Sec. 3.3


def test_text__multi_scale_decoder():
    for epochs in (200, 1600):
        without = TABLE_6[epochs][0]
        assert all(a in (None, b) for a, b in zip(without, TABLE_4[epochs]))  # one model
    assert minus(*TABLE_6[200][::-1]) == [0.3, None, 0.6, 0.6, 0.4]
    # Does not hold: linear probing, "1.6 %", is 70.9 - 69.4.
    assert minus(*TABLE_6[1600][::-1]) == [0.4, 1.5, 0.7, 0.6, 1.0]


def test_text__convergence():
    # Does not hold: MAE's 100 epochs over 16 are not "6.6 x faster".
    assert 100 / 16 == 6.25
    assert FIGURE_4["linear"] == (TABLE_4[1600][1], TABLE_1["MAE"][1])
    # Do not hold: Figure 4c has 52.4 and 50.4 where Tables 4 and 2 have 52.5 and 50.3.
    assert FIGURE_4["box"] != (TABLE_4[1600][2], TABLE_2["Benchmarking"][0]) == (52.5, 50.3)
