"""CFMAE's command lines (the paper's ablation rows, refusals) and the encoder of a checkpoint."""

import dataclasses
from unittest import mock

import pytest
import torch
from test_cfmae import parse
from torch.testing import assert_close

import cfmae
import engine


@pytest.mark.parametrize("line, expected", [
    ("", dict(num_visible=98, masking="SG-IG-RD", decoder="cascaded", order="S-I-R",
              granularities="R+I+S", lambda_s=1, lambda_i=1, lambda_r=1)),
    ("--mask-ratio 0.833", dict(num_visible=98)),  # Table 6a
    ("--mask-ratio 0.75", dict(num_visible=147)),
    ("--mask-ratio 0.667", dict(num_visible=196)),
    *((f"--masking {k}", dict(masking=k, num_visible=98)) for k in (
        "RD", "IG", "SG", "IG-SG-RD", "RD-IG-SG", "SG-IG-RD")),  # Tables 6b, 6c
    ("--decoder parallel", dict(decoder="parallel", masking="SG-IG-RD")),  # Table 6d
    ("--decoder no-cross-attention", dict(decoder="no-cross-attention")),
    ("--order R-I-S", dict(order="R-I-S", decoder="cascaded")),
    ("--granularities R", dict(num_visible=49, masking="RD")),  # Table 6e
    ("--granularities R+S", dict(num_visible=98, masking="RD")),
    ("--granularities R+I", dict(num_visible=98, masking="RD")),
    ("--granularities R+I+S --masking RD", dict(num_visible=98, masking="RD")),
    ("--granularities R+I --masking IG", dict(num_visible=98, masking="IG")),  # one map is enough
    ("--granularities R+S --masking SG", dict(num_visible=98, masking="SG")),
    ("--lambda-r 2", dict(lambda_s=1, lambda_i=1, lambda_r=2)),  # Table 6f
    ("--lambda-i 2", dict(lambda_s=1, lambda_i=2, lambda_r=1)),
    ("--lambda-s 2", dict(lambda_s=2, lambda_i=1, lambda_r=1)),
    ("--decoder parallel --masking RD", dict(decoder="parallel", masking="RD")),  # Table 5, row 2
])  # fmt: skip
def test_config__ablation_rows_are_command_lines(line, expected):
    cfg = parse(line)
    assert {k: getattr(cfg, k) for k in expected} == expected
    assert cfg.num_patches == 196 and cfg.semantic_classes == 133


@pytest.mark.parametrize("line, words", [
    ("--mask-ratio 0", "1 to 196"), ("--mask-ratio 0.6657", "1 to 196, as 0.75"),
    ("--mask-ratio 1", "leaves 0"), ("--granularities R --mask-ratio 0", "1 to 195, as 0.75"),
    ("--mask-ratio 0.9999", "leaves 0"), ("--semantic-classes 256", "[1, 255]"),
    ("--data shapes --semantic-classes 15", "[16, 255]"), ("--alpha 0.5", "Eq. 8"),
    ("--granularities R --masking SG", "as RD"), ("--e2 0.1", "--e1"),
    ("--granularities R+I --masking SG", "semantic maps"),
    ("--granularities R+S --masking SG-IG-RD", "instance maps"),
    ("--e4 1.1", "--e4"), ("--e1 -0.1", "--e1"), ("--alpha 1.1", "Eq. 8"),
    ("--masking SG-SG-RD", "three different"), ("--masking SG-RD", "three different"),
    ("--decoder-embed-dim 6 --decoder-num-heads 2", "divisible by 4"),
    ("--image-size 225", "224 or 240"), ("--num-heads 7", "--num-heads 7"),
    ("--decoder-num-heads 7", "252 or 259"), ("--order S-S-R", "S-I-R"), ("--mix max", "sample"),
    ("--granularities R+D", "R+S"), ("--decoder serial", "cascaded"),
    ("--model huge", "large"), ("--mask-rat 0.75", "--mask-rat"),
])  # fmt: skip
def test_config__refuses_with_values_that_work(line, words):
    with pytest.raises(engine.UserError) as e:
        parse(line)
    assert words in str(e.value)


def test_main__the_maps_and_their_classes_reach_the_data():
    line = "--model tiny --granularities R+S --semantic-classes 40"
    with mock.patch.object(engine, "Run", side_effect=engine.UserError("enough")) as run:
        with pytest.raises(engine.UserError, match="enough"):
            cfmae.main(line.split())
    wanted = {"granularities": ("rgb", "semantic"), "semantic_classes": 40}
    assert run.call_args.kwargs == wanted


def test_load_encoder__round_trip(tmp_path):
    cfg, path = parse("--model tiny --embed-dim 32 --depth 2"), tmp_path / "last.pt"
    model = cfmae.CFMAE(cfg).eval()
    checkpoint = {"format": engine.FORMAT, "method": "cfmae", "config": dataclasses.asdict(cfg)}
    checkpoint |= {"model": model.state_dict(), "step": 7, "optimizer": {}, "window": {}}
    engine.save(path, checkpoint)
    encoder = cfmae.load_encoder(path).eval()
    other = cfmae.load_encoder(path, image_size=(32, 96), drop_path=0.2).eval()
    assert encoder.grid == (8, 8) and other.grid == (4, 12) and other.drop_path == 0.2
    wide, labels = torch.randn(2, 3, 32, 96), torch.randint(0, 17, (2, 32, 32)).byte()
    for imgs in (torch.randn(2, 3, 64, 64), wide, {"instance": labels}):
        (expected, _), (got, _) = (e.forward_features(imgs)[0] for e in (model.encoder, encoder))
        assert torch.equal(got, expected)
    assert_close(other.forward_features(wide), encoder.forward_features(wide))
    state = {k: v for k, v in model.state_dict().items() if k != "encoder.cls_token"}
    engine.save(path, checkpoint | {"model": state})
    with pytest.raises(engine.UserError, match="missing cls_token"):
        cfmae.load_encoder(path)
