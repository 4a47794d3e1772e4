"""CFMAE's model: leaks, gradients, cascade, loss; and that the tiny preset learns."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import cfmae
import common
import engine
from data import collate
from shapes import ShapeScenes
import vit

MINI = (
    "--model tiny --embed-dim 32 --depth 2 --num-heads 2 --decoder-embed-dim 16 "
    "--decoder-num-heads 2 --decoder-depth 1"
)
HALF = torch.tensor(0.5)  # of training: instance-guided masks
SOLE = {"rgb": 0, "instance": 1, "semantic": 2}  # rows of a mask


def parse(line: str) -> cfmae.Config:
    return engine.parse(cfmae.Config, cfmae.PRESETS, "", line.split())


def build(line: str = "") -> cfmae.CFMAE:
    torch.manual_seed(0)
    return cfmae.CFMAE(parse(f"{MINI} {line}"))


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    scenes = ShapeScenes("train", 64, 2)
    return collate([scenes[0, i] for i in range(4)])


def enlarged(where: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A mask of patches (B, N) as one of the pixels or labels of x."""
    side = math.isqrt(where.shape[1])
    scale = x.shape[-1] // side
    where = where.unflatten(1, (side, -1)).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    return where[:, None] if x.ndim == 4 else where


def altered(imgs: dict, where: torch.Tensor) -> dict:
    """Other pixels and labels at the patches of a mask (B, M, N)."""
    new = {}
    for m, (t, x) in enumerate(imgs.items()):
        noise = torch.randn_like(x) if t == "rgb" else torch.randint_like(x, 16)
        new[t] = torch.where(enlarged(where[:, m], x), noise, x)
    return new


def cut(imgs: dict, p: int = 8) -> dict:
    """Patches (B, N, numbers) of images and maps."""
    return {
        t: common.patchify(x, p) if t == "rgb" else cfmae.patch_labels(x) for t, x in imgs.items()
    }


# ------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("decoder", ["cascaded", "parallel", "no-cross-attention"])
def test_predict__does_not_see_hidden_patches(batch, decoder, monkeypatch):
    model, encoded = build(f"--decoder {decoder}"), []
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda x, ids: encoded.append(x) or decode(x, ids))
    imgs = model.images(batch)
    mask, _ = cfmae.make_mask(model.cfg, batch, HALF)
    V = model.cfg.num_visible
    pred, same = model.predict(imgs, mask, V), model.predict(altered(imgs, mask), mask, V)
    assert torch.equal(encoded[0], encoded[1])
    for t in imgs:
        assert torch.equal(pred[t], same[t])
    for m in range(3):  # but what is visible matters, for every prediction
        visible = ~mask & (torch.arange(3) == m)[:, None]
        other = model.predict(altered(imgs, visible), mask, V)
        assert not any(torch.allclose(pred[t], other[t]) for t in imgs)


@pytest.mark.parametrize("source", SOLE)
def test_predict__from_one_granularity_alone(batch, source):
    """Figs. 4, 8 to 10."""
    model = build()
    imgs, N = model.images(batch), model.cfg.num_patches
    mask = (torch.arange(3) != SOLE[source])[None, :, None].expand(4, 3, N)
    pred = model.predict(imgs, mask, N)
    assert pred["rgb"].shape == (4, N, 192) and pred["instance"].shape == (4, N, 16 * 17)
    assert pred["semantic"].shape == (4, N, 16 * ShapeScenes.SEMANTIC_CLASSES)
    same, other = (model.predict(altered(imgs, w), mask, N) for w in (mask, ~mask))
    for t in imgs:
        assert torch.equal(pred[t], same[t]) and not torch.allclose(pred[t], other[t])


@pytest.mark.parametrize("line, chain", [
    ("", "semantic instance rgb"),
    ("--order R-I-S", "rgb instance semantic"),
    ("--decoder no-cross-attention", "semantic instance rgb"),
    ("--decoder parallel", ""),
])  # fmt: skip
def test_decode__a_task_depends_on_those_before_it(batch, line, chain):
    model, chain = build(line), chain.split()
    mask, _ = cfmae.make_mask(model.cfg, batch, HALF)
    pred = model.predict(model.images(batch), mask)
    for t in SOLE:
        before = set(chain[: chain.index(t) + 1]) if chain else {t}
        for s in SOLE:
            p = list(model.decoder_blocks[s].parameters())
            grads = torch.autograd.grad(pred[t].sum(), p, retain_graph=True, allow_unused=True)
            reached = [g is not None and bool(g.abs().max() > 0) for g in grads]
            assert all(reached) if s in before else not any(reached), (t, s)
    cross = [n for n, _ in model.named_parameters() if "cross_attn" in n]
    assert bool(cross) == ("no-cross" not in line)


@pytest.mark.parametrize("line", ["", "--order R-S-I", "--decoder parallel"])
def test_decode__equals_naive_loop(line):
    """Eq. 2, a sample at a time: Q a slice of H, K = V = H with F_{k-1} on its task's slice."""
    model, D, N = build(line), 16, 64
    nn.init.normal_(model.mask_token), nn.init.normal_(model.task_embed)
    mask = common.random_mask(torch.rand(2, 3 * N), 3 * N - 40)
    x, tasks = torch.randn(2, 40, D), model.cfg.order.split("-")
    got = model.decode(x, common.split(mask, 40)[2])
    for b in range(2):
        visible, H = iter(x[b]), torch.zeros(3, N, D)
        for m in range(3):
            for i in range(N):
                token = model.mask_token[0, 0] if mask[b, m * N + i] else next(visible)
                H[m, i] = token + model.decoder_pos_embed[i] + model.task_embed[m, 0]
        previous, F = None, None
        for t in (cfmae.NAMES[t] for t in tasks):
            context, block, y = H.clone(), model.decoder_blocks[t], H[SOLE[t]][None]
            if previous and "parallel" not in line:
                context[SOLE[previous]] += F
            context = block.norm_kv(context.reshape(1, 3 * N, D))
            y = y + block.cross_attn(block.norm_q(y), context)
            y = y + block.mlp(block.norm2(y))
            previous, F = t, block.blocks[0](y)[0]
            assert_close(got[t][b], F, rtol=1e-4, atol=1e-5)


def test_decode__without_cross_attention_adds_to_the_query():
    model, N, F = build("--decoder no-cross-attention"), 64, 0  # docs/decisions.md: "w/o CA"
    nn.init.normal_(model.mask_token), nn.init.normal_(model.task_embed)
    mask = common.random_mask(torch.rand(2, 3 * N), 3 * N - 40)
    x, ids = torch.randn(2, 40, 16), common.split(mask, 40)[2]
    H = common.fill(x, model.mask_token, ids).view(2, 3, N, 16)
    H, found = H + model.decoder_pos_embed + model.task_embed, model.decode(x, ids)
    for t in ("semantic", "instance", "rgb"):
        F = model.decoder_blocks[t].blocks(H[:, SOLE[t]] + F)
        assert_close(found[t], F, rtol=1e-4, atol=1e-5)


def test_label_embed__equals_one_hot_product():
    embed = cfmae.LabelEmbed(5, 8)
    nn.init.normal_(embed.bias)
    labels = torch.randint(0, 5, (2, 7, 16))
    labels[0, 3], labels[1, :, 4] = 255, 255
    one_hot = nn.functional.one_hot(labels.where(labels != 255, 5), 6).flatten(2).float()
    assert_close(embed(labels), one_hot @ embed.weight + embed.bias, rtol=1e-5, atol=1e-6)


def test_encoder__rgb_alone_is_the_plain_vit(batch):
    model = build().encoder.eval()
    names = {n for n in model.state_dict() if not n.startswith(("instance_", "semantic_"))}
    plain = vit.ViT((64, 64), 8, 32, 2, 2)  # its names are timm's: test_common_vit.py
    assert names == set(plain.state_dict())
    plain.load_state_dict({n: model.state_dict()[n] for n in names})
    imgs = torch.randn(2, 3, 32, 48)
    for got, expected in zip(model.forward_features(imgs)[0], plain.forward_features(imgs)[0]):
        assert torch.equal(got, expected)
    maps = {t: batch[t] for t in ("semantic", "instance")} | {"rgb": torch.randn(4, 3, 64, 64)}
    ((tokens, prefix),) = model.forward_features(maps)  # whatever the order given,
    assert tokens.shape == (4, 3 * 64, 32) and prefix.shape == (4, 1, 32)
    x = torch.cat([model.embed({t: maps[t]}) for t in SOLE], 1)  # rgb, instance, semantic
    assert_close(tokens, model.norm(model.run(model.add_prefix(x))[-1])[:, 1:])
    assert model.forward_features({"semantic": batch["semantic"]})[0][0].shape == (4, 64, 32)


# ------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("norm", ["--norm-pix-loss", "--no-norm-pix-loss"])
def test_loss__equals_naive_loop(batch, norm):
    model = build(f"--lambda-s 2 --lambda-i 3 --lambda-r 5 {norm}")
    patches, mask = cut(model.images(batch)), torch.rand(4, 3, 64) < 0.8
    patches["instance"][0], patches["semantic"][1] = 255, 255  # nothing to predict ...
    mask[2, 1], mask[3, 0] = False, False  # ... nor where all is visible
    patches["semantic"][2, ::3, 5:9] = 255
    shapes = {t: model.decoder_pred[t].out_features for t in SOLE}
    pred = {t: torch.randn(4, 64, shapes[t]) for t in SOLE}
    imgs = {t: common.unpatchify(patches[t], 4, (8, 8))[:, 0] for t in ("instance", "semantic")}
    total, logs = model.loss(pred, model.images(batch) | imgs, mask)
    means = dict.fromkeys(SOLE, 0.0)
    for t, m in SOLE.items():
        for b in range(4):
            errors = []
            for i in mask[b, m].nonzero().flatten().tolist():
                guess, truth = pred[t][b, i], patches[t][b, i]
                if t == "rgb":
                    if "no-" not in norm:
                        truth = (truth - truth.mean()) / (truth.var() + 1e-6).sqrt()
                    errors.append(((guess - truth) ** 2).mean().item())
                    continue
                for logits, label in zip(guess.reshape(16, -1).tolist(), truth.tolist()):
                    if label != 255:
                        errors.append(math.log(sum(map(math.exp, logits))) - logits[label])
            means[t] += sum(errors) / max(len(errors), 1) / 4
        assert logs[f"loss_{t}"].item() == pytest.approx(means[t], rel=1e-5)
    expected = 2 * means["semantic"] + 3 * means["instance"] + 5 * means["rgb"]
    assert total.item() == pytest.approx(expected, rel=1e-5)


def test_forward_and_evaluate__are_finite_when_nothing_is_labelled(batch):
    model = build()
    empty = batch | {t: torch.full_like(batch[t], 255) for t in ("instance", "semantic")}
    loss, logs = model(empty, HALF)
    loss.backward()
    assert logs["loss_instance"] == logs["loss_semantic"] == 0 and loss > 0
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert all(x.isfinite() for x in cfmae.evaluate(model, empty).values())


def test_loss__is_in_fp32(batch):
    model = build()
    imgs, (mask, _) = model.images(batch), cfmae.make_mask(model.cfg, batch, torch.tensor(0.5))
    half = {t: x.bfloat16() for t, x in model.predict(imgs, mask).items()}
    full = {t: x.float() for t, x in half.items()}
    assert torch.equal(model.loss(half, imgs, mask)[0], model.loss(full, imgs, mask)[0])


@pytest.mark.slow
def test_training__tiny_preset_learns():
    """Invariant 6: in 25 steps of 16 scenes the loss falls below 0.6 of where it began."""
    cfg, scenes = parse("--model tiny"), ShapeScenes("train", 64, 2)
    torch.manual_seed(0)
    model, losses = cfmae.CFMAE(cfg), []
    optimizer = torch.optim.AdamW(engine.decay_groups(model, 0.05), lr=1.5e-3, betas=(0.9, 0.95))
    for step in range(25):
        batch = collate([scenes[0, 16 * step + i] for i in range(16)])
        loss, logs = model(batch, torch.tensor(step / 25))
        loss.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(torch.stack([loss.detach(), logs["loss_rgb"], logs["loss_semantic"]]))
    total, rgb, semantic = torch.stack(losses[-5:]).mean(0)
    assert total < 0.6 * losses[0][0]
    assert rgb < 0.5 * losses[0][1] and semantic < math.log(16)  # better than a constant guess
