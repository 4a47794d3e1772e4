"""MCMAE's command lines, the encoder after pre-training, and checkpoints: the authors' and ours."""

import argparse
import dataclasses
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import engine
import mcmae
from data import ShapeScenes, collate

MINI = (
    "--model tiny --embed-dims 8,12,16 --depths 2,1,2 --num-heads 2 --decoder-embed-dim 16 "
    "--decoder-num-heads 2 --decoder-depth 1"
)
PUBLIC = (
    "--embed-dims 16,24,32 --depths 2,1,2 --num-heads 4 --decoder-embed-dim 24 --decoder-depth 2 "
    "--decoder-num-heads 4"
)


def parse(line: str) -> mcmae.Config:
    return engine.parse(mcmae.Config, mcmae.PRESETS, "", line.split())


# ----------------------------------------------------------------------------------- command line


@pytest.mark.parametrize("line, expected", [
    ("", dict(sparse=True, masked_conv=True, kernel_size=5, multi_scale=True, num_visible=49)),
    ("--no-sparse", dict(sparse=False)),
    ("--masking token", dict(sparse=False, num_positions=3136, num_visible=784)),  # Table 5
    ("--no-masked-conv", dict(sparse=False, num_visible=49)),
    ("--kernel-size 7", dict(sparse=True, kernel_size=7)),
    ("--no-multi-scale", dict(multi_scale=False)),  # Table 6
    ("--model tiny", dict(image_size=64, patch_size=8, num_visible=16)),
])  # fmt: skip
def test_config__ablation_rows_are_command_lines(line, expected):
    cfg = parse(line)
    assert {k: getattr(cfg, k) for k in expected} == expected


@pytest.mark.parametrize("line, words", [
    ("--mask-ratio 0", "0.0051 to 0.995"), ("--mask-ratio 1", "0.0051 to 0.995"),
    ("--mask-ratio nan", "--mask-ratio nan"), ("--mask-ratio 0.999", "must hide some"),
    ("--sparse --masking token", "--no-sparse"), ("--sparse --no-masked-conv", "--no-sparse"),
    ("--embed-dims 256,384", "e.g. 256,384,768"), ("--depths 2,2,x", "e.g. 2,2,11"),
    ("--depths 2,0,11", "e.g. 2,2,11"), ("--mlp-ratios 4,4,-4", "e.g. 4,4,4"),
    ("--num-heads 7", "763 or 770"), ("--num-heads 0", "--num-heads 0"),
    ("--embed-dims 8,8,18 --num-heads 1", "16 or 20"), ("--decoder-num-heads 12", "504 or 516"),
    ("--decoder-embed-dim 18 --decoder-num-heads 1", "16 or 20"),
    ("--decoder-depth -1", "0 or more"),
    ("--patch-size 14", "12 or 16"), ("--image-size 225", "224 or 240"), ("--kernel-size 3", "9"),
    ("--masking random", "token"), ("--model giant", "base-star"),
    ("--init nowhere.pth", "no such file"),
])  # fmt: skip
def test_config__refuses_with_values_that_work(line, words):
    with pytest.raises(engine.UserError) as e:
        parse(line)
    assert words in str(e.value)


# ------------------------------------------------------------------------------ encoder afterwards


def make(line: str = MINI, **overrides) -> mcmae.Encoder:
    torch.manual_seed(0)
    return mcmae.make_encoder(parse(line), **overrides).eval()


def test_forward_pyramid__sizes_strides_and_pooling():
    encoder, imgs = make(), torch.randn(2, 3, 48, 96)
    assert encoder.strides == (2, 4, 8, 16) and make(PUBLIC).strides == (4, 8, 16, 32)
    maps = encoder.forward_pyramid(imgs)
    shapes = [(2, C, 48 // s, 96 // s) for C, s in zip((8, 12, 16, 16), encoder.strides)]
    assert [tuple(m.shape) for m in maps] == shapes
    assert_close(maps[3][1, 5, 2, 4], maps[2][1, 5, 4:6, 8:10].max())
    (last, prefix), = encoder.forward_features(imgs, [2])  # fmt: skip
    assert torch.equal(maps[2].flatten(2).transpose(1, 2), last) and prefix.shape == (2, 0, 16)
    one, two = (t for t, _ in encoder.forward_features(imgs, [2, 1]))
    assert torch.equal(one, last) and torch.equal(encoder.blocks[1](two), one)
    assert torch.equal(encoder.forward_features(imgs)[0][0], encoder.norm(last))
    with pytest.raises(ValueError, match="16"):
        encoder.forward_pyramid(torch.randn(1, 3, 40, 96))
    assert encoder.forward_features(torch.randn(1, 3, 40, 96))[0][0].shape == (1, 60, 16)
    with pytest.raises(ValueError, match="patch size 8"):
        encoder.forward_features(torch.randn(1, 3, 44, 96))


def test_stages__equal_plain_convolutions():
    """Stage 1, channels first, written out."""
    encoder, imgs = make(), torch.randn(2, 3, 32, 32)
    e = encoder.patch_embed1

    def norm(m, x):
        x = F.layer_norm(x.permute(0, 2, 3, 1), m.normalized_shape, m.weight, m.bias, 1e-5)
        return x.permute(0, 3, 1, 2)

    def conv(m, x, **kwargs):
        return F.conv2d(x, m.weight, m.bias, **kwargs)

    x = F.gelu(norm(e.norm, conv(e.proj, imgs, stride=2)))
    for b in encoder.blocks1:
        y = conv(b.attn, conv(b.conv1, norm(b.norm1, x)), padding=2, groups=8)
        x = x + conv(b.conv2, y)
        x = x + conv(b.mlp.fc2, F.gelu(conv(b.mlp.fc1, norm(b.norm2, x))))
    assert_close(encoder.forward_pyramid(imgs)[0], x, atol=1e-5, rtol=1e-5)


def test_drop_path__depends_on_the_sample_alone_and_averages_out():
    encoder, plain = make(drop_path=0.5), make()
    seed, imgs = torch.arange(6) * 101, torch.randn(1, 3, 32, 32).expand(6, -1, -1, -1)
    assert torch.equal(encoder.forward_features(imgs)[0][0], plain.forward_features(imgs)[0][0])
    dropped = encoder.forward_pyramid(imgs, seed)
    for i, m in enumerate(dropped):
        assert not torch.equal(m, plain.forward_pyramid(imgs)[i])  # all stages, the first included
        assert_close(m[4:5], encoder.forward_pyramid(imgs[4:5], seed[4:5])[i], atol=1e-5, rtol=1e-5)


def test_layer_ids__rise_through_the_stages():
    encoder = make()
    ids = encoder.layer_ids()
    assert ids.keys() == dict(encoder.named_parameters()).keys()
    order = [
        "patch_embed1.proj.weight", "blocks1.0.attn.weight", "blocks1.1.mlp.fc1.bias",
        "blocks2.0.conv1.weight", "blocks3.0.attn.qkv.weight", "blocks3.1.norm2.bias",
        "norm.weight",
    ]  # fmt: skip
    assert [ids[k] for k in order] == list(range(7))
    assert ids["patch_embed2.norm.weight"] == 3 and ids["patch_embed4.weight"] == 4


def test_evaluate_and_preview__on_every_masking(tmp_path):
    scenes = ShapeScenes("val", 64, 8, ("rgb",))
    batch = collate([scenes[0, i] for i in range(2)])
    for line in ("", "--masking token --no-norm-pix-loss"):
        model = mcmae.MCMAE(parse(f"{MINI} {line}")).eval()
        with torch.no_grad():
            terms = mcmae.evaluate(model, batch)
            mcmae.preview(model, batch, tmp_path / "p.png", 3)
        assert_close(terms["loss"], model(batch, torch.tensor(1.0))[0].detach())
        if not line:  # unit variance, unbiased: the mean square is 1 - 1 / (3 * 8 * 8)
            assert_close(terms["loss_flat"], torch.tensor(1 - 1 / 192), atol=1e-3, rtol=0)
        assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"


# ------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def public() -> dict[str, torch.Tensor]:
    path = Path(__file__).parent / "golden/convmae_tiny.pt"
    return torch.load(path, weights_only=True)["state_dict"]


def test_load_init__whole_and_encoder_alone(public, tmp_path):
    path, decoder = tmp_path / "x.pth", ("decoder", "mask_token", "stage", "norm.")
    encoder = {k: v for k, v in public.items() if not k.startswith(decoder)}
    for state, loaded, left, missing in (
        ({"model": public, "args": argparse.Namespace(lr=1e-3), "epoch": 7}, 117,
         "pos_embed, decoder_pos_embed", "nothing"),
        (encoder | {"fc_norm.weight": torch.zeros(32), "head.weight": torch.zeros(5, 32)}, 80,
         "pos_embed, fc_norm, head", "norm (2), stage1_output_decode (2)"),
    ):  # fmt: skip
        torch.save(state, path)
        model = mcmae.MCMAE(parse(PUBLIC))
        before = {k: v.clone() for k, v in model.state_dict().items()}
        report = mcmae.load_init(model, path)
        assert f"{loaded} tensors loaded; left out: {left}; missing, so fresh: " in report
        assert missing in report
        state = state.get("model", state)
        for k, v in model.state_dict().items():
            assert torch.equal(v, state.get(k.removeprefix("encoder."), before[k])), k
    assert loaded == len(encoder) - 1  # all but pos_embed


class Attack:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/mcmae-test-attack"),))


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("blocks2.0.attn.weight"), "missing blocks2.0.attn.weight"),
    (lambda s: s.pop("decoder_blocks.1.norm1.bias"), "missing decoder_blocks.1.norm1.bias"),
    (lambda s: s.update({"blocks3.2.norm1.bias": s["norm.bias"]}), "unexpected blocks3.2"),
    (lambda s: (s.pop("norm.bias"), s.update({"encoder.norm.weight": s.pop("norm.weight")})),
     "missing norm.bias"),
    (lambda s: s.update({"norm.bias": torch.zeros(7)}), "norm.bias has shape (7,), the model (32"),
    (lambda s: s.update(pos_embed=s["pos_embed"] + 0.1), "pos_embed was learned"),
    (lambda s: (s.clear(), s.update(x=torch.zeros(3)))[0], "missing patch_embed1.proj.weight"),
    (lambda s: (s.clear(), s.update(model=3))[0], "holds no state dict"),
    (lambda s: s.update(extra=Attack()), "cannot be read safely"),
    (None, "cannot be read safely"),
])  # fmt: skip
def test_load_init__refuses_and_loads_nothing(public, tmp_path, change, words):
    path, state = tmp_path / "x.pth", dict(public)
    path.write_bytes(b"random bytes")
    if change:
        change(state)
        torch.save(state, path)
    model = mcmae.MCMAE(parse(PUBLIC))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(engine.UserError) as e:
        mcmae.load_init(model, path)
    assert words in str(e.value) and str(path) in str(e.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not Path("/tmp/mcmae-test-attack").exists()


def test_load_encoder__round_trip(tmp_path):
    cfg, path = parse(MINI), tmp_path / "last.pt"
    model = mcmae.MCMAE(cfg).eval()
    checkpoint = {"format": engine.FORMAT, "method": "mcmae", "config": dataclasses.asdict(cfg)}
    checkpoint |= {"model": model.state_dict(), "step": 7, "optimizer": {}, "window": {}}
    engine.save(path, checkpoint)
    other = mcmae.load_encoder(path, image_size=(32, 96), drop_path=0.2).eval()
    assert other.grid == (4, 12) and other.drop_path == 0.2
    for size in ((64, 64), (32, 96)):
        imgs = torch.randn(2, 3, *size)
        expected = model.encoder.forward_features(imgs)[0][0]
        assert torch.equal(mcmae.load_encoder(path).forward_features(imgs)[0][0], expected)
        assert_close(other.forward_features(imgs)[0][0], expected)
    engine.save(path, checkpoint | {"method": "cfmae"})
    with pytest.raises(engine.UserError, match="cfmae"):
        mcmae.load_encoder(path)
    state = {k: v for k, v in model.state_dict().items() if k != "encoder.norm.bias"}
    engine.save(path, checkpoint | {"model": state})
    with pytest.raises(engine.UserError, match="missing norm.bias"):
        mcmae.load_encoder(path)
