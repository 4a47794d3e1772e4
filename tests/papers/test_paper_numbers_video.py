"""VideoMCMAE: the numbers of Secs. 2.4, 3.4, of its authors' README, and of VideoMAE's commands.

Results are taken as printed; here only counts, costs and settings are done again. Sec. 3.4's
"more than 2.9 %" are 82.7 - 79.8 = 2.9; its other comparisons are as its authors' README has them.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import engine
import videomcmae
from downstream import finetune_clips
from tools.videomae import VideoMAE


def parse(*argv: str) -> videomcmae.Config:
    return engine.parse(videomcmae.Config, videomcmae.PRESETS, "", list(argv))


def finetuning(*argv: str) -> finetune_clips.Config:
    flags = [*argv, "--encoder", "base"]
    return engine.parse(finetune_clips.Config, finetune_clips.PRESETS, "", flags)


def on_meta(*argv: str, make: type = videomcmae.VideoMCMAE) -> videomcmae.VideoMCMAE:
    with torch.device("meta"):
        return make(parse(*argv))


def million(module: torch.nn.Module) -> float:
    return sum(p.numel() for p in module.parameters()) / 1e6


def flops(model: torch.nn.Module) -> float:
    """GFLOP of one clip, forward."""
    batch = {"rgb": torch.zeros(1, 16, 3, 224, 224, dtype=torch.uint8, device="meta")}
    batch["seed"] = torch.zeros(1, dtype=torch.int64, device="meta")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(batch, torch.zeros(()))
    return counter.get_total_flops() / 1e9


# -------------------------------------------------------------------------------------- the method


def test_section_3_4__tokens_and_tubes():
    cfg = parse()
    assert cfg.grid == (8, 14, 14) and 8 * 14 * 14 == 1568
    assert cfg.mask_ratio == 0.9 and cfg.num_visible == 20 == 196 - int(0.9 * 196)
    assert cfg.num_visible * 8 == 160
    mask = videomcmae.make_mask(cfg, {"seed": torch.arange(8)}, None)
    assert ((~mask).sum(1) == 20).all()
    model = on_meta()
    E1, E2, x = model.encoder.stages(torch.zeros(1, 16, 3, 224, 224, device="meta"))
    # 8 x 56^2, 8 x 28^2, 8 x 14^2
    assert E1.shape == (1, 196, 8, 16, 256) and 196 * 16 == 56**2
    assert E2.shape == (1, 196, 8, 4, 384) and 196 * 4 == 28**2
    assert x.shape == (1, 196, 8, 768)
    assert model.decoder_pred.out_features == 2 * 16 * 16 * 3 == 1536
    assert [b.attn.num_heads for b in model.encoder.blocks3] == [12] * 11
    assert [b.attn.num_heads for b in model.decoder_blocks] == [6] * 4


def test_settings__of_pre_training():
    cfg = parse()
    assert (cfg.epochs, cfg.warmup_epochs, cfg.batch_size) == (800, 40, 1024)  # Secs. 3.4, 3.1
    assert (cfg.base_lr, cfg.weight_decay, cfg.beta1, cfg.beta2) == (1.5e-4, 0.05, 0.9, 0.95)
    # VideoMAE: --num_frames 16 --sampling_rate 4, tubelet 2, --decoder_depth 4, B's 384 and 6
    assert (cfg.frames, cfg.stride, cfg.cube_frames, cfg.image_size) == (16, 4, 2, 224)
    assert (cfg.decoder_depth, cfg.decoder_embed_dim, cfg.decoder_num_heads) == (4, 384, 6)
    assert cfg.kernel_size == 5 and cfg.norm_pix_loss and cfg.multi_scale and cfg.sparse
    # Table 7, and VideoMAE's decoders of S and L
    assert (cfg.embed_dims, cfg.depths, cfg.mlp_ratios) == ("256,384,768", "2,2,11", "4,4,4")
    small, large = parse("--model", "small"), parse("--model", "large")
    assert (small.embed_dims, small.depths, small.num_heads) == ("128,256,384", "2,2,11", 6)
    assert (large.embed_dims, large.depths, large.num_heads) == ("384,768,1024", "2,2,23", 16)
    assert (small.decoder_embed_dim, small.decoder_num_heads) == (192, 3)
    assert (large.decoder_embed_dim, large.decoder_num_heads) == (512, 8)
    assert (small.decoder_depth, large.decoder_depth) == (4, 12)  # --decoder_depth
    assert large.mlp_ratios == "8,8,4"


def test_settings__of_fine_tuning():
    k400, ssv2 = finetuning(), finetuning("--model", "ssv2")
    assert (k400.epochs, ssv2.epochs) == (100, 50)  # Secs. 3.1, 3.4
    assert (k400.flip, ssv2.flip) == (True, False)
    assert k400.test_views == (5, 3) and ssv2.test_views == (2, 3)  # time, space
    assert (k400.base_lr, ssv2.base_lr) == (1e-3, 5e-4)
    assert (k400.sampling, ssv2.sampling, k400.stride) == ("dense", "segments", 4)
    for cfg in (k400, ssv2):  # VideoMAE's FINETUNE.md and defaults
        assert (cfg.frames, cfg.image_size, cfg.batch_size) == (16, 224, 64 * 8)
        assert (cfg.weight_decay, cfg.layer_decay, cfg.drop_path) == (0.05, 0.75, 0.1)
        assert (cfg.warmup_epochs, cfg.min_lr, cfg.beta1, cfg.beta2) == (5, 2e-6, 0.9, 0.999)
        assert (cfg.rand_augment, cfg.rand_augment_std, cfg.reprob) == (7, 0.5, 0.25)
        assert (cfg.mixup, cfg.cutmix, cfg.switch_prob, cfg.smoothing) == (0.8, 1.0, 0.5, 0.1)
        assert cfg.crop_scale_min == 0.08 and cfg.head_std == pytest.approx(0.02 * 0.001)


# ---------------------------------------------------------------------------------- size and cost


@pytest.mark.slow
def test_readme__86_million_are_846_with_stride_1_in_time():
    """Does not hold with these strides; with 2 in time before stages 2 and 3 it would."""
    encoder = on_meta().encoder
    assert million(encoder) == pytest.approx(84.596, abs=1e-3) and round(million(encoder)) != 86
    doubled = (4 * 256 * 384 + 4 * 384 * 768) / 1e6
    assert round(million(encoder) + doubled, 1) == 86.2
    assert million(on_meta()) == pytest.approx(96.908, abs=1e-3)  # with the decoder
    assert million(on_meta(make=VideoMAE).encoder) == pytest.approx(86.236, abs=1e-3)
    assert million(on_meta(make=VideoMAE)) == pytest.approx(94.222, abs=1e-3)


@pytest.mark.slow
def test_flops__sparse_dense_and_videomae():
    sparse, dense = flops(on_meta()), flops(on_meta("--no-sparse"))
    assert sparse == pytest.approx(79.265, abs=1e-3) and dense == pytest.approx(197.480, abs=1e-3)
    assert flops(on_meta(make=VideoMAE)) == pytest.approx(67.746, abs=1e-3)
