"""CFMAE's smaller parts: which map and moment a mask has, tokens, first weights, evaluation."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cfmae
import common
from data import collate
from shapes import ShapeScenes
from test_cfmae import SOLE, build, parse

MAPS = ("instance", "semantic")


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    scenes = ShapeScenes("train", 64, 2)
    return collate([scenes[0, i] for i in range(4)])


def masks_of(model, batch, progress, monkeypatch):
    """The mask that `forward` gives to `predict`, and the logs."""
    seen, predict = [], model.predict
    monkeypatch.setattr(model, "predict", lambda p, m, v: seen.append(m) or predict(p, m, v))
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
    model, progress = build(line), torch.tensor(0.5)
    patches = model.patches(batch)
    mask, logs = model.make_mask(patches, batch["seed"], progress)
    for t in patches:
        other = patches | {t: patches[t].flip(1)}
        same = torch.equal(model.make_mask(other, batch["seed"], progress)[0], mask)
        assert same == (t != read), t
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
        assert 0 <= logs["objects_hidden_whole"] <= 1


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


def test_patches__are_normalised_pixels(batch):
    rgb = build().patches(batch)["rgb"]  # (4, 64, 8 * 8 * 3)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for i, y, x, c in ((0, 0, 0, 0), (1, 9, 30, 1), (2, 63, 63, 2), (3, 40, 7, 2)):
        value = (batch["rgb"][i, c, y, x].item() / 255 - mean[c]) / std[c]
        got = rgb[i, y // 8 * 8 + x // 8, (y % 8 * 8 + x % 8) * 3 + c].item()
        assert got == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_embed__every_granularity_has_positions(batch):
    """Equal patches give tokens that differ by the position embedding, and by nothing else."""
    encoder = build().encoder
    patches = {"rgb": torch.randn(1, 1, 192).expand(1, 64, -1)}
    patches |= {m: torch.randint(0, 16, (1, 1, 16)).expand(1, 64, -1) for m in MAPS}
    tokens = encoder.embed_patches(patches, 8, 8).view(3, 64, 32)
    position = common.sincos_2d(32, 8, 8)
    for x in tokens:
        assert_close(x - x[:1], position - position[:1], rtol=1e-4, atol=1e-5)


def test_decoder__sizes():
    """Each MLP is four times as wide as its tokens, as MAE's and MultiMAE's."""
    model = build("--decoder-depth 2")
    for block in model.decoder_blocks.values():
        assert len(block.blocks) == 2 and block.cross_attn.num_heads == 2
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
    patches, V = model.patches(batch), model.cfg.num_visible
    mask, _ = model.make_mask(patches, batch["seed"], torch.tensor(0.5))
    model.predict(patches, mask, V)
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

    def spy(patches, mask, num_visible):
        seen.append((patches, mask, predict(patches, mask, num_visible)))
        return seen[-1][-1]

    monkeypatch.setattr(model, "predict", spy)
    terms = cfmae.evaluate(model, batch)
    (patches, mask, pred), = seen  # fmt: skip
    assert torch.equal(mask.sum(-1), 64 - cfmae.visible_counts(batch["seed"], 32, 3))
    total, losses = model.loss(pred, patches, mask)
    assert_close(terms["loss"], total) and all(terms[k] == v for k, v in losses.items())
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
