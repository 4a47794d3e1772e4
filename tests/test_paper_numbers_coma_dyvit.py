"""Numbers of the CoMA paper that need no training: Tables 1-3, Figure 2, ratios."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import coma_dyvit as cd
import common
import engine


def config(*flags):
    return engine.parse(cd.Config, cd.PRESETS, "", list(flags))


def encoder(*flags):
    with torch.device("meta"):
        return cd.make_encoder(config(*flags), image_size=(224, 224))


def millions(module):
    return sum(p.numel() for p in module.parameters()) / 1e6


def gmacs(net):
    """Multiply-adds of a 224 x 224 image in 1e9: (in layers with weights, with attention)."""
    with FlopCounterMode(display=False) as counter:
        net.forward_features(torch.empty(1, 3, 224, 224, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    by_op = {op.__name__.split(".")[0]: n / 2e9 for op, n in counts.items()}
    layers = sum(n for op, n in by_op.items() if op in ("addmm", "mm", "convolution"))
    return layers, sum(by_op.values())


def test_table_1__channels_blocks_heads():
    for model, dims, blocks in (("small", (96, 192, 384, 768), (1, 2, 11, 2)),
                                ("base", (112, 224, 448, 896), (2, 3, 16, 3))):  # fmt: skip
        net = encoder("--model", model)
        assert (net.dims, net.depths, net.strides) == (dims, blocks, (4, 8, 16, 32))
        assert [s[0].attn.num_heads for s in net.stages] == [2, 4, 8, 16]
        assert [len(s) for s in net.stages] == list(blocks)
        assert [type(s[0]).__name__ for s in net.stages] == ["WindowBlock"] * 2 + ["Block"] * 2
        windows = [[c.kernel_size[0] for c in s[0].attn.convs] for s in net.stages[:2]]
        assert windows == [[8, 4, 2], [4, 2]]
        stem = (net.stem.kernel_size[0], net.stem.stride[0], net.stem.padding[0])
        assert stem == (7, 4, 3)


def test_table_2__parameters():
    small, base = millions(encoder("--model", "small")), millions(encoder())
    assert round(small) == 35 and round(base) == 70
    assert (small, base) == (pytest.approx(35.1, abs=0.05), pytest.approx(70.3, abs=0.05))
    vit = millions(encoder("--backbone", "vit"))
    assert 85 < vit < 87  # Table 2 has 87, with a head; fixed positions are no parameters here
    assert 1 - base / 87 == pytest.approx(0.20, abs=0.015)  # "approximately 20 %"


def test_table_2__flops():
    """12, 6 and 18 G: layers alone give 11.4, 5.6, 16.8; with attention it is 13.7, 6.8, 17.6."""
    (small, small_all), (base, base_all), (vit, vit_all) = map(
        gmacs, (encoder("--model", "small"), encoder(), encoder("--backbone", "vit")))  # fmt: skip
    assert (base, base_all) == (pytest.approx(11.44, abs=0.01), pytest.approx(13.74, abs=0.01))
    assert (small, small_all) == (pytest.approx(5.64, abs=0.01), pytest.approx(6.75, abs=0.01))
    assert abs(base - 12) < 0.6 and abs(small - 6) < 0.6
    assert 1 - base / vit == pytest.approx(0.33, abs=0.015)  # "33 % in FLOPs"
    assert vit_all == pytest.approx(17.56, abs=0.01)
    assert 1 - base_all / vit_all == pytest.approx(0.22, abs=0.005)  # not 33 %


def test_windows__with_k_1_flops_are_not_the_papers():
    assert gmacs(encoder("--windows", "8,4,2,1"))[1] > 18


def test_implementation_details__mask_ratio_60_and_40():
    cfg = config()
    assert (cfg.patch_size, cfg.mask_ratio, cfg.num_patches) == (32, 0.6, 49)
    assert cfg.num_visible == 19  # 29.4 hidden by the text; 30 by MAE's rounding
    assert (cfg.batch_size, cfg.decoder_depth, cfg.decoder) == (4096, 8, "vit")
    assert cfg.evaluation == "frozen" and config("--backbone", "vit").num_visible == 78
    mae = config("--method", "mae", "--backbone", "vit")
    assert (mae.num_visible, mae.num_patches, mae.norm_pix_loss) == (49, 196, True)
    for ratio in range(10, 91):  # every per cent gives MAE's count
        cfg = config("--mask-ratio", str(ratio / 100))
        assert cfg.num_visible == 49 * (100 - ratio) // 100


def test_figure_2__masking_frequency_over_1600_iterations():
    maps = cd.masking_frequency(config(), 1600)
    random = maps["random"].double()
    assert random.mean() == pytest.approx(1600 * 30 / 49)  # every draw hides exactly 30
    deviation = (1600 * 30 / 49 * 19 / 49) ** 0.5  # 19.5, of a fair draw
    assert 0.7 * deviation < random.std() < 1.3 * deviation
    assert (random - random.mean()).abs().max() < 4.5 * deviation
    assert (maps["complementary"] == 1600).all() and random.shape == (7, 7)
    assert torch.equal(maps["gradient"], maps["random"])  # the frozen branch does not teach
    shared = cd.masking_frequency(config("--evaluation", "shared"), 100)
    assert (shared["gradient"] == 100).all() and shared["random"].unique().numel() > 1


def test_step__every_patch_is_predicted_exactly_once():
    cfg = config()
    noise = common.uniform(torch.arange(64), cfg.num_patches, common.MASK)
    mask = common.random_mask(noise, cfg.num_patches - cfg.num_visible)
    adaptive, evaluation = mask, ~mask  # each predicts what it does not see
    assert (adaptive.int() + evaluation.int() == 1).all()
    assert (adaptive.sum(1) == 30).all() and (evaluation.sum(1) == 19).all()


def test_decoder__eight_blocks_of_global_attention():
    with torch.device("meta"):
        model = cd.Autoencoder(config())
    assert len(model.decoder_blocks) == 8
    fused = [tuple(c.proj.weight.shape) for c in model.fusion.convs]
    assert fused == [(896, 112, 8, 8), (896, 224, 4, 4), (896, 448, 2, 2)]  # Eq. (6), as printed
    convnext = cd.ConvNeXtBlock(512, (7, 7))
    assert convnext(torch.zeros(1, 49, 512)).shape == (1, 49, 512)
    assert convnext.dwconv.kernel_size == (7, 7)


def test_text__arithmetic_that_does_not_hold():
    """Table 3 and the abstract, as printed: what the tables' own numbers give."""
    assert round(46.5 - 46.3, 1) == 0.2 != 1.2  # AP^mask over Hiera
    assert round(46.5 - 44.9, 1) == 1.6 != 2.6  # AP^mask over MAE
    assert 300 / 1600 == 0.1875 != 0.12  # "12 % of the pre-training epochs"
