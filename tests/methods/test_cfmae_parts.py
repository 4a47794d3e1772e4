"""CFMAE's smaller parts: which map and moment a mask has, tokens, first weights, evaluation."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cfmae
import common
import data
from data import UserError, collate
from shapes import ShapeScenes
from test_cfmae import SOLE, build, cut, parse

MAPS = ("instance", "semantic")


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    scenes = ShapeScenes("train", 64, 2)
    return collate([scenes[0, i] for i in range(4)])


def masks_of(model, batch, progress, monkeypatch):
    """The mask that `forward` gives to `predict`, and the logs."""
    seen, predict = [], model.predict
    monkeypatch.setattr(model, "predict", lambda x, m: seen.append(m) or predict(x, m))
    logs = model(batch, torch.tensor(progress))[1]
    return seen[-1], logs


# ------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("line, read", [
    ("--masking IG", "instance"), ("--masking SG", "semantic"),
    ("--granularities R+I --masking IG", "instance"),
    ("--granularities R+S --masking SG", "semantic"),
    ("--masking RD", None),
])  # fmt: skip
def test_make_mask__follows_one_map(batch, line, read):
    cfg, progress = parse(f"--model tiny {line}"), torch.tensor(0.5)
    mask, logs = cfmae.make_mask(cfg, batch, progress)
    for t in SOLE:
        other = batch | {t: batch[t].flip(-1)}
        assert torch.equal(cfmae.make_mask(cfg, other, progress)[0], mask) == (t != read), t
    if read:  # hidden as the paper says, by that map
        region = cfmae.patch_region(cfmae.patch_labels(batch[read]))
        hidden = mask.sum(-1)
        for b, m in ((b, m) for b in range(4) for m in range(mask.shape[1])):
            if read == "semantic":
                for c in region[b].unique():
                    inside = region[b] == c
                    share = int((mask[b, m] & inside).sum()) - hidden[b, m] * inside.sum() / 64
                    assert abs(share) < 1
            else:
                objects = cfmae.choose_objects(batch["seed"], region)[b]
                on = int((mask[b, m] & objects).sum())
                assert on >= min(int(0.75 * hidden[b, m]), int(objects.sum())) > 0
        if "instance" in cfg.names:
            assert 0 <= logs["objects_hidden_whole"] <= 1
        else:  # nothing to say about objects
            assert "objects_hidden_whole" not in logs


def test_forward__masks_follow_progress(batch, monkeypatch):
    """Semantic-guided first, random last, through everything that stands between."""
    model, pure = build(), {}
    for kind in ("SG", "IG", "RD"):
        pure[kind], _ = masks_of(build(f"--masking {kind}"), batch, 0.5, monkeypatch)
    assert not torch.equal(pure["SG"], pure["RD"])
    for progress, kind in {0.0: "SG", 0.1: "SG", 0.45: "IG", 0.55: "IG", 0.9: "RD"}.items():
        mask, logs = masks_of(model, batch, progress, monkeypatch)
        assert torch.equal(mask, pure[kind])
        assert {k: v.item() for k, v in logs.items() if k.startswith("a_")} == {
            f"a_{k}": float(k == kind) for k in pure
        }


# ---------------------------------------------------------------------------------- model, weights


def test_images__are_normalised_pixels_and_maps_as_they_are(batch):
    imgs = build().images(batch)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for i, y, x, c in ((0, 0, 0, 0), (1, 9, 30, 1), (2, 63, 63, 2), (3, 40, 7, 2)):
        value = (batch["rgb"][i, c, y, x].item() / 255 - mean[c]) / std[c]
        assert imgs["rgb"][i, c, y, x].item() == pytest.approx(value, rel=1e-4, abs=1e-5)
    assert all(imgs[t] is batch[t] for t in MAPS) and list(imgs) == list(SOLE)


def test_embed__every_granularity_has_positions(batch):
    """Equal patches give tokens that differ by the position embedding, and by nothing else."""
    encoder = build().encoder
    imgs = {"rgb": torch.randn(1, 3, 8, 8).repeat(1, 1, 8, 8)}
    imgs |= {m: torch.randint(0, 16, (1, 4, 4)).repeat(1, 8, 8) for m in MAPS}
    tokens = encoder.embed(imgs).view(3, 64, 32)
    position = common.sincos_2d(32, 8, 8)
    for x in tokens:
        assert_close(x - x[:1], position - position[:1], rtol=1e-4, atol=1e-5)
    alone = encoder.embed({"instance": imgs["instance"][:, :16].repeat(1, 1, 3)})[0]  # 4 x 24
    position = common.sincos_2d(32, 4, 24, (8, 8))
    assert_close(alone - alone[:1], position - position[:1], rtol=1e-4, atol=1e-5)


def test_decoder__sizes():
    """Each MLP is four times as wide as its tokens, as MAE's and MultiMAE's."""
    model = build("--decoder-depth 2")
    for block in model.decoder_blocks.values():
        assert len(block.blocks) == 2 and block.cross_attn.num_heads == 2
        assert {b.attn.num_heads for b in block.blocks} == {2}
        for part in (block, *block.blocks):
            assert part.mlp.fc1.weight.shape == (64, 16) and part.mlp.fc2.weight.shape == (16, 64)
    assert list(model.decoder_blocks) == ["semantic", "instance", "rgb"]


def test_init__is_maes():
    """Xavier-uniform matrices, no biases, tokens N(0, 0.02); label rows as docs/decisions.md."""
    torch.manual_seed(0)
    model, seen = cfmae.CFMAE(parse("--model tiny")), set()
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear | common.PatchEmbed):
            layer = getattr(m, "proj", m)
            w = layer.weight.flatten(1)
            bound = (6 / sum(w.shape)) ** 0.5
            assert 0.97 * bound < w.abs().max() <= bound and not layer.bias.any(), name
            seen |= {id(layer.weight), id(layer.bias)}
        elif isinstance(m, cfmae.LabelEmbed):
            bound = (6 / (16 + 128)) ** 0.5
            assert 0.99 * bound < m.weight.abs().max() <= bound and not m.bias.any()
            assert abs(m.weight.std() / (bound / 3**0.5) - 1) < 0.02
            seen |= {id(m.weight), id(m.bias)}
        elif isinstance(m, nn.LayerNorm):
            assert (m.weight == 1).all() and not m.bias.any()
            seen |= {id(m.weight), id(m.bias)}
    tokens = {n: p for n, p in model.named_parameters() if id(p) not in seen}
    assert set(tokens) == {"mask_token", "task_embed", "encoder.cls_token"}
    for p in tokens.values():
        assert 0.014 < p.std() < 0.027


def test_label_embed__tokens_at_vit_base():
    """The deviations that docs/decisions.md names: of 16 rows, had all inputs counted, position."""
    torch.manual_seed(0)
    embed = cfmae.LabelEmbed(133, 768)
    token = embed(torch.randint(0, 133, (1, 50, 16))).std().item()
    assert round(token, 2) == 0.20
    assert round((16 * 6 / (16 * 134 + 768) / 3) ** 0.5, 2) == 0.10
    assert round(common.sincos_2d(768, 14, 14).square().mean().sqrt().item(), 2) == 0.71


def test_predict__equals_encoder_a_sample_at_a_time(batch, monkeypatch):
    """Eq. 1: class token, visible tokens, blocks, norm once; the decoder gets no class token."""
    model, encoded = build(), []
    e = model.encoder
    nn.init.normal_(e.norm.weight), nn.init.normal_(e.norm.bias), nn.init.normal_(e.cls_token)
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda x, ids: encoded.append(x) or decode(x, ids))
    mask, _ = cfmae.make_mask(model.cfg, batch, torch.tensor(0.5))
    model.predict(model.images(batch), mask)
    patches, V = cut(model.images(batch)), model.cfg.num_visible
    embeds = {"rgb": e.patch_embed, "instance": e.instance_embed, "semantic": e.semantic_embed}
    for b in range(4):
        tokens = [e.cls_token[0, 0]]
        for t, m in SOLE.items():
            z = embeds[t](patches[t][b : b + 1])[0] + common.sincos_2d(32, 8, 8)
            tokens += [z[i] for i in range(64) if not mask[b, m, i]]
        x = torch.stack(tokens)[None]
        for block in e.blocks:
            x = block(x)
        mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
        x = (x - mean) / (var + 1e-6).sqrt() * e.norm.weight + e.norm.bias
        x = x[0, 1:] @ model.decoder_embed.weight.T + model.decoder_embed.bias
        assert x.shape == (V, 16)
        assert_close(encoded[0][b], x, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------- evaluate


def test_evaluate__equals_naive_loop(batch, monkeypatch):
    model, seen, side = build(), [], 8
    batch = batch | {"instance": batch["instance"].clone()}
    batch["instance"][0, :8] = 255
    predict = model.predict

    def spy(imgs, mask):
        seen.append((imgs, mask, predict(imgs, mask)))
        return seen[-1][-1]

    monkeypatch.setattr(model, "predict", spy)
    terms = cfmae.evaluate(model, batch)
    (imgs, mask, pred), = seen  # fmt: skip
    assert torch.equal(mask.sum(-1), 64 - cfmae.visible_counts(batch["seed"], 32, 3))
    assert torch.equal(mask, cfmae.make_mask(parse("--model tiny --masking RD"), batch, None)[0])
    total, losses = model.loss(pred, imgs, mask)
    patches = cut(imgs)
    assert_close(terms["loss"], total)
    assert all(terms[k] == v for k, v in losses.items())
    for t in MAPS:
        labels, hidden = patches[t].tolist(), mask[:, SOLE[t]].tolist()
        places = [[(i, p) for i in range(64) for p in range(16)
                   if hidden[b][i] and labels[b][i][p] != 255] for b in range(4)]  # fmt: skip
        count = {}
        for b in range(4):
            for i, p in places[b]:
                count[labels[b][i][p]] = count.get(labels[b][i][p], 0) + 1
        frequent = max(count, key=lambda k: count[k])
        assert list(count.values()).count(count[frequent]) == 1
        means = dict.fromkeys(("", "_frequent", "_nearest"), 0.0)
        for b in range(4):
            visible = [j for j in range(64) if not hidden[b][j]]
            guess = pred[t][b].view(64, 16, -1).argmax(-1).tolist()
            for i, p in places[b]:

                def far(j, i=i):
                    return (j // side - i // side) ** 2 + (j % side - i % side) ** 2, j

                copied = labels[b][min(visible, key=far)][p] if visible else frequent
                answers = guess[i][p], frequent, copied
                for k, answer in zip(means, answers):
                    means[k] += (answer == labels[b][i][p]) / len(places[b]) / 4
        for k, mean in means.items():
            assert terms[f"accuracy_{t}{k}"].item() == pytest.approx(mean, rel=1e-5), (t, k)
        assert terms[f"accuracy_{t}_nearest"] < 1  # it does not read what is hidden


# ------------------------------------------------------------------------------------ reconstruct


@pytest.mark.parametrize("norm", ["--norm-pix-loss", "--no-norm-pix-loss"])
def test_reconstruct__draws_a_perfect_prediction_as_the_truth(batch, norm, monkeypatch):
    model, side = build(norm), 8  # SG-IG-RD: at the end another mask than at the start
    batch = {k: v[:2] for k, v in batch.items()}

    def perfect(imgs, mask):
        patches = cut(imgs)
        mean, std = common.patch_statistics(patches["rgb"])
        pred = {"rgb": (patches["rgb"] - mean) / std if "no-" not in norm else patches["rgb"]}
        for t, n in ((t, model.encoder.sizes[t]) for t in MAPS):
            pred[t] = nn.functional.one_hot(patches[t].clamp(max=n - 1), n).flatten(2).float()
        return pred

    monkeypatch.setattr(model, "predict", perfect)
    found = cfmae.reconstruct(model, batch)
    mask, _ = cfmae.make_mask(model.cfg, batch, torch.tensor(1.0))
    assert list(found) == list(SOLE)
    for t, (truth, hidden, pred) in found.items():
        assert torch.equal(hidden, mask[:, SOLE[t]].view(2, side, side))
        assert truth is batch[t] and pred.shape == truth.shape
        same = pred == truth.clamp(max=model.encoder.sizes[t] - 1) if t in MAPS else pred == truth
        assert same.all() if t in MAPS else same.float().mean() > 0.999


# ------------------------------------------------------------------------------------- how to add


def test_masks__a_new_kind_is_a_function_and_an_entry(batch, monkeypatch):
    def first(cfg, seed, region, n, order):  # the first n patches of those with the lowest label
        return (region * 64 + torch.arange(64)).argsort(-1).argsort(-1)[:, None] < n

    with pytest.raises(UserError, match="--masking FI"):
        parse("--model tiny --masking FI")
    monkeypatch.setitem(cfmae.MASKS, "FI", (first, "semantic"))
    with pytest.raises(UserError, match="FI with semantic maps"):
        parse("--model tiny --granularities R+I --masking FI")
    cfg = parse("--model tiny --masking SG-FI-RD")
    mask, logs = cfmae.make_mask(cfg, batch, torch.tensor(0.5))
    region = cfmae.patch_region(cfmae.patch_labels(batch["semantic"]))
    n = 64 - cfmae.visible_counts(batch["seed"], 32, 3)[..., None]
    assert logs["a_FI"] == 1 and torch.equal(mask, first(cfg, None, region, n, None))


def test_granularities__a_new_one_is_a_row_and_a_weight(batch, monkeypatch):
    @dataclasses.dataclass
    class Config(cfmae.Config):
        lambda_d: float = 2.0

    row = data.Granularity("pixels", lambda pixels: pixels)
    monkeypatch.setitem(data.GRANULARITIES, "depth", row)
    monkeypatch.setitem(cfmae.NAMES, "D", "depth")  # made of that table
    monkeypatch.setitem(cfmae.SIZES, "depth", 1)
    values = dataclasses.asdict(parse("--model tiny --image-size 64 --embed-dim 32 --depth 1"))
    values |= {"granularities": "R+I+S+D", "order": "S-I-D-R"}
    torch.manual_seed(0)
    model = cfmae.CFMAE(Config(**values))
    batch = batch | {"depth": torch.randn(4, 1, 64, 64)}
    loss, logs = model(batch, torch.tensor(0.5))
    loss.backward()
    expected = sum(logs[f"loss_{t}"] for t in SOLE) + 2 * logs["loss_depth"]
    assert_close(loss.detach(), expected)
    assert all(p.grad.abs().max() > 0 for p in model.parameters())
    assert model.encoder.depth_embed.proj.weight.shape == (32, 1, 8, 8)
    assert model.decoder_pred["depth"].out_features == 64
    assert list(model.decoder_blocks) == ["semantic", "instance", "depth", "rgb"]
