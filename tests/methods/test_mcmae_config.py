"""MCMAE's command lines, the encoder after pre-training, and checkpoints: the authors' and ours."""

import argparse
import dataclasses
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from test_mcmae import MINI, parse
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import engine
import mcmae
import pictures
from common import Attention, drop_path, patchify, pixel_target
from data import collate
from downstream import convmae
from shapes import ShapeScenes

PUBLIC = (
    "--embed-dims 16,24,32 --depths 2,1,2 --num-heads 4 --decoder-embed-dim 24 --decoder-depth 2 "
    "--decoder-num-heads 4"
)


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


def test_docs__every_command_of_the_ablations_parses():
    text = (Path(__file__).parents[2] / "docs/ablations.md").read_text()
    section = re.search(r"\n## MCMAE\n(.*?)(\n## |$)", text, re.S).group(1)
    rows = [line.split("|")[2] for line in section.splitlines() if line.startswith("| Table")]
    flags = [f for row in rows for f in re.findall(r"`(--[^`]*)`", row)]
    assert len(rows) == 9 and len(flags) == 14
    for line in flags:
        parse(line)
    for table, epochs in (("4", "200 400 800 1600"), ("5", "800"), ("6", "200 1600")):
        rows = "".join(x for x in section.splitlines() if x.startswith(f"| Table {table}"))
        assert set(re.findall(r"--epochs (\d+)", rows)) == set(epochs.split())


@pytest.mark.parametrize("line, words", [
    ("--mask-ratio 0", "0.00510204 to 0.994898"), ("--mask-ratio 1", "0.00510204 to 0.994898"),
    ("--mask-ratio nan", "--mask-ratio nan"), ("--mask-ratio 0.999", "must hide some"),
    ("--sparse --masking token", "--no-sparse"), ("--sparse --no-masked-conv", "--no-sparse"),
    ("--embed-dims 256,384", "e.g. 256,384,768"), ("--depths 2,2,x", "e.g. 2,2,11"),
    ("--depths 2,0,11", "e.g. 2,2,11"), ("--mlp-ratios 4,4,-4", "e.g. 4,4,4"),
    ("--num-heads 7", "763 or 770"), ("--num-heads 0", "--num-heads 0"),
    ("--embed-dims 8,8,18 --num-heads 1", "16 or 20"), ("--decoder-num-heads 12", "504 or 516"),
    ("--decoder-embed-dim 18 --decoder-num-heads 1", "16 or 20"),
    ("--decoder-depth -1", "0 or above"),
    ("--patch-size 14", "12 or 16"), ("--image-size 225", "224 or 240"), ("--kernel-size 3", "9"),
    ("--masking random", "token"), ("--model giant", "base-star"),
    ("--init-key model_ema", "--init-key is for --init"),
])  # fmt: skip
def test_config__refuses_with_values_that_work(line, words):
    with pytest.raises(engine.UserError) as e:
        parse(line)
    assert words in str(e.value)


# ------------------------------------------------------------------------------ encoder afterwards


def make(line: str = MINI, **kwargs) -> mcmae.Encoder:
    torch.manual_seed(0)
    return convmae.make_encoder(parse(line), **kwargs).eval()


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


def test_encoder__each_stage_has_its_own_widths_and_the_kernel():
    encoder = make(f"{MINI} --mlp-ratios 2,3,5 --kernel-size 7")
    stages = encoder.blocks1, encoder.blocks2, encoder.blocks3
    assert [len(s) for s in stages] == [2, 1, 2]
    assert [s[-1].mlp["fc1"].out_channels for s in stages[:2]] == [2 * 8, 3 * 12]
    assert stages[2][-1].mlp.fc1.out_features == 5 * 16
    assert {b.attn.kernel_size for s in stages[:2] for b in s} == {(7, 7)}


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


def test_drop_path__each_block_has_its_own_draws():
    """Blocks of all stages in one row, along which the rate grows."""
    encoder, seed = make(drop_path=0.5), torch.arange(8) * 77
    imgs, scales = torch.randn(8, 3, 32, 32), drop_path(seed, 5, 0.5)  # depths 2, 1, 2
    assert len(scales.flatten(1).unique(dim=0)) == 5
    ids = torch.arange(16).expand(8, -1)
    x = encoder.patch_embed1(patchify(imgs, 8).unflatten(-1, (-1, 3)))
    for k, block, scale in zip((4, 4, 2), [*encoder.blocks1, *encoder.blocks2], scales):
        x = encoder.patch_embed2(x) if k == 2 else x
        x = block(x, mcmae.masked_convolution((4, 4), k, ids, None), scale)
    x = encoder.patch_embed4(encoder.patch_embed3(x)).squeeze(2) + encoder.position(4, 4)
    assert_close(encoder.tokens(imgs, seed), x)
    for block, scale in zip(encoder.blocks3, scales[3:]):
        x = block(x, scale)
    assert_close(encoder.forward_features(imgs, [2], seed)[0][0], x)


def test_ConvBlock__drops_its_branches_apart():
    block, x, strided = make().blocks1[0], torch.randn(4, 9, 4, 8), mcmae.strided
    convolve = mcmae.masked_convolution((3, 3), 2, torch.arange(9).expand(4, -1), None)
    drop = torch.tensor([[0.0, 2, 0, 2], [0, 0, 2, 2]])[..., None, None]  # (2, B, 1, 1)
    y = strided(block.conv2, convolve(block.attn, strided(block.conv1, block.norm1(x))))
    mid = torch.stack([x[0], x[1] + 2 * y[1], x[2], x[3] + 2 * y[3]])
    z = strided(block.mlp.fc2, F.gelu(strided(block.mlp.fc1, block.norm2(mid))))
    expected = torch.stack([mid[0], mid[1], mid[2] + 2 * z[2], mid[3] + 2 * z[3]])
    assert_close(block(x, convolve, drop), expected)
    assert torch.equal(block(x, convolve, drop)[0], x[0])


def test_layer_ids__are_the_public_codes():
    """util/lr_decay.py: 12 levels above the first in B, which all before stage 3 shares."""
    with torch.device("meta"):
        cfg = parse("--learned-position")
        encoder = convmae.make_encoder(cfg, relative_bias=True, fourth="conv")
    ids = encoder.layer_ids()
    assert ids.keys() == dict(encoder.named_parameters()).keys()
    for name, level in ids.items():
        part, number = name.split(".")[:2] if "." in name else (name, "")
        if part == "blocks3":
            assert level == int(number) + 1 and 1 <= level <= 11, name
        elif part in ("norm", "fourth"):
            assert level == 12, name
        else:
            early = {f"{p}{i}" for p in ("patch_embed", "blocks") for i in (1, 2, 3, 4)}
            assert level == 0 and part in {"pos_embed", *early}, name
    with torch.device("meta"):  # 208 tensors, of which stage 3 has 11 x 12
        levels = list(mcmae.make_encoder(parse("")).layer_ids().values())
    assert [levels.count(i) for i in range(13)] == [70, *[12] * 11, 2]


# ------------------------------------------------------------------------ options for segmentation


def test_RelativeAttention__equals_naive_loop():
    torch.manual_seed(0)
    attn, x = convmae.RelativeAttention(8, 2, (2, 3)), torch.randn(2, 6, 8)
    assert attn.relative_position_bias_table.shape == (15, 2)
    assert_close(attn(x), Attention.forward(attn, x))  # the bias starts at nothing
    nn.init.normal_(attn.relative_position_bias_table)
    table = attn.relative_position_bias_table.view(3, 5, 2)  # rows down, columns along, head
    for attn.now in ((2, 3), (3, 2), (1, 6)):  # offsets that the table lacks: the nearest
        expected, (q, k, v), w = torch.zeros(2, 6, 8), attn.heads(x), attn.now[1]
        for head in range(2):
            logits = q[:, head] @ k[:, head].transpose(1, 2) / 2
            for i in range(6):
                for j in range(6):
                    dy, dx = i // w - j // w, i % w - j % w
                    logits[:, i, j] += table[max(-1, min(dy, 1)) + 1, max(-2, min(dx, 2)) + 2, head]
            expected[..., 4 * head : 4 * head + 4] = logits.softmax(-1) @ v[:, head]
        assert_close(attn(x), attn.proj(expected))
        heads = (attn.weights(x) @ v).transpose(1, 2).flatten(2)
        assert_close(heads, expected)


def test_make_encoder__options_change_what_they_name_alone():
    imgs, plain = torch.randn(2, 3, 64, 96), make(image_size=(64, 96))
    options = dict(image_size=(64, 96), relative_bias=True, init_values=1.0, fourth="conv")
    encoder = make(**options)
    added = encoder.state_dict().keys() - plain.state_dict().keys()
    parts = {".".join(k.split(".")[-2:]) for k in added if k.startswith("blocks3.")}
    assert parts == {"attn.relative_position_bias_table", "ls1.gamma", "ls2.gamma"}
    assert {k.split(".")[0] for k in added} == {"blocks3", "fourth"}
    encoder.load_state_dict(plain.state_dict(), strict=False)
    assert encoder.forward_pyramid(imgs[..., :32])[3].shape == (2, 16, 4, 2)
    assert encoder.blocks3[0].attn.now == (8, 4)
    ours, theirs = plain.forward_pyramid(imgs), encoder.forward_pyramid(imgs)
    assert_close(theirs[:3], ours[:3])
    conv, norm, _ = encoder.fourth
    y = F.conv2d(ours[2], conv.weight, conv.bias, stride=2, padding=1)
    assert y.shape == ours[3].shape == (2, 16, 4, 6)
    assert_close(theirs[3], F.gelu(y / (1 + norm.eps) ** 0.5), atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        encoder.blocks3[1].ls2.gamma.zero_(), encoder.blocks3[1].ls1.gamma.zero_()
    (one, _), (two, _) = encoder.forward_features(imgs, [1, 2])
    assert torch.equal(one, two)


@pytest.mark.slow
def test_evaluate_and_reconstruct__on_every_masking(tmp_path):
    scenes = ShapeScenes("val", 64, 2, ("rgb",))
    batch = collate([scenes[0, i] for i in range(2)])
    for line in ("", "--no-norm-pix-loss", "--masking token --no-norm-pix-loss"):
        model = mcmae.MCMAE(parse(f"{MINI} {line}")).eval()
        terms, shown = mcmae.evaluate(model, batch), mcmae.reconstruct(model, batch)
        assert_close(terms["loss"], model(batch, torch.tensor(1.0))[0].detach())
        if not line:  # unit variance, unbiased: the mean square is 1 - 1 / (3 * 8 * 8)
            assert_close(terms["loss_flat"], torch.tensor(1 - 1 / 192), atol=1e-3, rtol=0)
        imgs, mask = model.normalize(batch["rgb"]), mcmae.make_mask(model.cfg, batch, None)
        if line == "--no-norm-pix-loss":
            spread = patchify(imgs, 8).var(-1, unbiased=False)[mask].mean()
            assert_close(terms["loss_flat"], spread, rtol=1e-4, atol=0)
        target = pixel_target(imgs, 8, model.cfg.norm_pix_loss)
        with mock.patch.object(model, "predict", lambda *_, target=target: target):
            drawn = mcmae.reconstruct(model, batch)["rgb"][2]
        assert (drawn.int() - batch["rgb"].int()).abs().max() <= 1
        truth, hidden, pred = shown["rgb"]
        assert truth is batch["rgb"] and pred.shape == truth.shape and pred.dtype == torch.uint8
        assert torch.equal(hidden.flatten(1), mcmae.make_mask(model.cfg, batch, None))
        pictures.contact_sheet(pictures.columns(shown), tmp_path / "p.png", "")
        assert (tmp_path / "p.png").read_bytes()[1:4] == b"PNG"


# ------------------------------------------------------------------------------------ checkpoints


@pytest.fixture(scope="module")
def public() -> dict[str, torch.Tensor]:
    path = Path(__file__).parents[1] / "golden/convmae_tiny.pt"
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


def test_load_init__trained_positions(public, tmp_path):
    """A fine-tuned classifier of the authors: its positions are parameters, of any values."""
    path, torch_seed = tmp_path / "x.pth", torch.manual_seed(0)
    decoder = ("decoder", "mask_token", "stage", "norm.")
    state = {k: v for k, v in public.items() if not k.startswith(decoder)}
    state["pos_embed"] = torch.randn(1, 196, 32, generator=torch_seed)
    torch.save({"model": state | {"fc_norm.weight": torch.ones(32)}}, path)
    model = mcmae.MCMAE(parse(f"{PUBLIC} --learned-position"))
    assert "left out: fc_norm;" in mcmae.load_init(model, path)
    assert torch.equal(model.encoder.pos_embed, state["pos_embed"])
    plain, imgs = mcmae.MCMAE(parse(PUBLIC)).encoder, torch.randn(2, 3, 224, 224)
    plain.load_state_dict({k: v for k, v in model.encoder.state_dict().items() if k != "pos_embed"})
    plain.pos_embed = state["pos_embed"][0]
    assert torch.equal(*(e.forward_features(imgs)[0][0] for e in (plain, model.encoder)))
    # a run at another size, and images of another one
    larger = mcmae.MCMAE(parse(f"{PUBLIC} --learned-position --image-size 256"))
    mcmae.load_init(larger, path)
    maps = F.interpolate(state["pos_embed"].view(1, 14, 14, 32).permute(0, 3, 1, 2), (16, 16),
                         mode="bicubic", antialias=True)  # fmt: skip
    expected = maps.flatten(2).transpose(1, 2)
    assert_close(larger.encoder.pos_embed, expected)
    assert_close(model.encoder.position(16, 16), expected)
    # without a position in the file: the fixed one, to begin with
    torch.save({k: v for k, v in state.items() if k != "pos_embed"}, path)
    model = mcmae.MCMAE(parse(f"{PUBLIC} --learned-position"))
    assert "pos_embed" in mcmae.load_init(model, path).split("missing")[1]
    assert_close(model.encoder.pos_embed, public["pos_embed"], atol=1e-5, rtol=0)
    state["pos_embed"] = state["pos_embed"][:, 1:]
    torch.save(state, path)
    with pytest.raises(engine.UserError, match="pos_embed has shape"):
        mcmae.load_init(model, path)


def test_learned_position__is_trained_without_decay():
    scenes = ShapeScenes("train", 64, 2, ("rgb",))
    model = mcmae.MCMAE(parse(f"{MINI} --learned-position"))
    batch, position = collate([scenes[0, i] for i in range(2)]), model.encoder.pos_embed
    model(batch, torch.tensor(0.5))[0].backward()
    seen = (~mcmae.make_mask(model.cfg, batch, None)).any(0)
    assert torch.equal(position.grad[0].any(-1), seen) and 16 < seen.sum() < 64
    decayed, free = engine.decay_groups(model, 0.05)
    assert any(p is position for p in free["params"]) and decayed["weight_decay"] == 0.05


def test_init_key__chooses_among_several_models(public, tmp_path):
    other = {k: v + 1 if "embed4" in k else v for k, v in public.items()}
    torch.save({"model": public, "model_ema": other}, tmp_path / "x.pth")
    model = mcmae.MCMAE(parse(PUBLIC))
    for key, expected in ((None, public), ("model_ema", other)):
        report = mcmae.load_init(model, tmp_path / "x.pth", key)
        assert torch.equal(model.encoder.patch_embed4.weight, expected["patch_embed4.weight"])
        taken, left = ("model_ema", "model") if key else ("model", "model_ema")
        assert f"{taken} taken, not {left}" in report
    with pytest.raises(engine.UserError, match="'teacher'"):
        mcmae.load_init(model, tmp_path / "x.pth", "teacher")


@pytest.mark.slow
def test_main__reads_init_at_the_start_of_a_run_alone(public, tmp_path, capsys):
    """A run goes on when the file is gone, and when the command no longer names it."""
    run, path = tmp_path / "run", tmp_path / "x.pth"
    torch.save({"model": public, "model_ema": public}, path)
    line = f"{PUBLIC} --data shapes --image-size 224 --device cpu --precision fp32 --workers 0 "
    line += f"--batch-size 2 --val-samples 2 --base-lr 1e-9 --output {run}"
    with pytest.raises(engine.UserError, match="no such file"):  # no checkpoint yet: it is needed
        mcmae.main(f"{line} --resume --init {tmp_path / 'gone.pth'}".split())
    mcmae.main(f"{line} --steps 1 --init {path} --init-key model_ema".split())
    state = engine.load(run / "last.pt", "mcmae")["model"]
    assert_close(state["decoder_pred.weight"], public["decoder_pred.weight"], atol=1e-4, rtol=0)
    assert f"init        {path}" in capsys.readouterr().out
    path.unlink()
    for step, init in enumerate((f"--init {path} --init-key model_ema", "", f"--init {path}"), 2):
        mcmae.main(f"{line} --resume --steps {step} {init}".split())
        assert engine.load(run / "last.pt", "mcmae")["step"] == step


@pytest.mark.slow
@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("blocks2.0.attn.weight"), "missing blocks2.0.attn.weight"),
    (lambda s: s.pop("decoder_blocks.1.norm1.bias"), "missing decoder_blocks.1.norm1.bias"),
    (lambda s: s.update({"blocks3.2.norm1.bias": s["norm.bias"]}), "unexpected blocks3.2"),
    (lambda s: (s.pop("norm.bias"), s.update({"encoder.norm.weight": s.pop("norm.weight")})),
     "missing norm.bias"),
    (lambda s: s.update({"norm.bias": torch.zeros(7)}), "norm.bias has shape (7,), the model (32"),
    (lambda s: s.update(pos_embed=s["pos_embed"] + 0.1), "--learned-position"),
    (lambda s: s.update({"encoder.pos_embed": s.pop("pos_embed") + 0.1}), "--learned-position"),
    (lambda s: s.update(decoder_pos_embed=s["decoder_pos_embed"] + 0.1),
     "decoder_pos_embed was learned"),
    (lambda s: [s.pop(f"patch_embed4.{k}") for k in ("weight", "bias")],
     "missing patch_embed4.weight; missing patch_embed4.bias"),
    (lambda s: (s.clear(), s.update(x=torch.zeros(3)))[0], "missing patch_embed1.proj.weight"),
    (lambda s: (s.clear(), s.update(model=3))[0], "holds no state dict"),
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


@pytest.mark.slow
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
    learned = mcmae.MCMAE(parse(f"{MINI} --learned-position"))
    nn.init.normal_(learned.encoder.pos_embed)
    config = dataclasses.asdict(learned.cfg)
    engine.save(path, checkpoint | {"config": config, "model": learned.state_dict()})
    other = mcmae.load_encoder(path, image_size=(32, 96))
    assert other.grid == (4, 12) and other.trained_grid == (8, 8)
    for size in ((64, 64), (32, 96)):
        imgs = torch.randn(2, 3, *size)
        expected = learned.encoder.forward_features(imgs)[0][0]
        assert torch.equal(mcmae.load_encoder(path).forward_features(imgs)[0][0], expected)
    assert_close(other.forward_features(imgs)[0][0], expected)
    model_again = mcmae.MCMAE(learned.cfg)
    mcmae.load_init(model_again, path)
    assert torch.equal(model_again.encoder.pos_embed, learned.encoder.pos_embed)
    state = {k: v for k, v in model.state_dict().items() if k != "encoder.norm.bias"}
    engine.save(path, checkpoint | {"model": state})
    with pytest.raises(engine.UserError, match="missing norm.bias"):
        mcmae.load_encoder(path)
