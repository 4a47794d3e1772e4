"""CFMAE's masks against loops (naive_cfmae_masks.py), and the properties the paper asks for."""

import math
from collections import Counter

import pytest
import torch

import cfmae
import engine
from noise import DIRICHLET, INSTANCES, MASK, MIX, uniform
from data import collate
from shapes import ShapeScenes
from naive_cfmae_masks import naive_mask, naive_on_objects, scenes

SEEDS = torch.arange(40) * 2**33 + torch.arange(40) * 17
KINDS = ("SG", "IG", "RD")
PROGRESS = (0.0, 0.1, 0.25, 0.29, 0.31, 0.45, 0.65, 0.69, 0.71, 0.9, 1.0)


def config(*argv: str) -> cfmae.Config:
    return engine.parse(cfmae.Config, cfmae.PRESETS, "", ["--data", "shapes", *argv])


def label_map(region: torch.Tensor) -> torch.Tensor:
    """A map (B, 4h, 4w) uint8 whose patches have the labels (B, h*w)."""
    rows = region.unflatten(1, (math.isqrt(region.shape[1]), -1)).byte()
    return rows.repeat_interleave(4, 1).repeat_interleave(4, 2)


def masks_and_logs(cfg, seed, progress, instance, semantic):
    batch = {"seed": seed, "instance": label_map(instance), "semantic": label_map(semantic)}
    return cfmae.make_mask(cfg, batch, torch.tensor(progress))


def masks(*args):
    return masks_and_logs(*args)[0]


# ------------------------------------------------------------------------------------ whole masks


@pytest.mark.parametrize("masking, mix", [
    *((a, mix) for a in ("SG-IG-RD", "IG-SG-RD", "RD-IG-SG") for mix in ("score", "sample")),
    ("RD", "score"), ("IG", "sample"), ("SG", "score"),  # of one kind nothing is mixed
])  # fmt: skip
@pytest.mark.parametrize("model, ratio", [("base", "0.8333"), ("tiny", "0.667")])
@pytest.mark.slow
def test_make_mask__equals_naive_loop(model, ratio, masking, mix):
    cfg = config("--model", model, "--mask-ratio", ratio, "--masking", masking, "--mix", mix)
    N, M, B = cfg.num_patches, 3, 12
    instance, semantic = scenes(B, int(N**0.5))
    seed = SEEDS[:B].clone()
    if N == 64:  # two samples in which a granularity is wholly visible
        many = torch.arange(30000)
        whole = (cfmae.visible_counts(many, cfg.num_visible, M) == N).any(1)
        seed[-2:] = many[whole][:2]
    n = N - cfmae.visible_counts(seed, cfg.num_visible, M)
    noise = uniform(seed, M * N, MASK).view(B, M, N).tolist()
    chosen, mixing = uniform(seed, 17, INSTANCES).tolist(), uniform(seed, 2, MIX).tolist()
    for progress in PROGRESS if "-" in masking else (0.0, 1.0):
        mask, logs = masks_and_logs(cfg, seed, progress, instance, semantic)
        assert mask.dtype == torch.bool and ((~mask).sum((1, 2)) == cfg.num_visible).all()
        whole = 0
        for b in range(B):
            u = {"noise": noise[b], "instances": chosen[b], "mix": mixing[b]}
            maps = instance[b].tolist(), semantic[b].tolist()
            hidden, objects = naive_mask(cfg, u, n[b].tolist(), progress, *maps)
            for m in range(M):
                assert set(mask[b, m].nonzero().flatten().tolist()) == hidden[m], (b, m, progress)
                whole += bool(objects) and objects <= hidden[m]
        if masking != "RD":
            assert logs["objects_hidden_whole"].item() == pytest.approx(whole / (B * M))


def test_make_mask__depends_on_its_sample_alone():
    cfg = config("--mix", "sample")
    instance, semantic = scenes(8, 14)
    whole = masks(cfg, SEEDS[:8], 0.3, instance, semantic)
    some = torch.tensor([6, 1, 3])
    assert torch.equal(masks(cfg, SEEDS[some], 0.3, instance[some], semantic[some]), whole[some])
    assert not torch.equal(masks(cfg, SEEDS[8:16], 0.3, instance, semantic), whole)


@pytest.mark.parametrize("ratio, visible", [("0.833", 98), ("0.75", 147), ("0.667", 196)])
@pytest.mark.parametrize("masking", ["RD", "IG", "SG"])
def test_pure_masks__counts_of_eqs_6_8_10(masking, ratio, visible):
    cfg = config("--mask-ratio", ratio, "--masking", masking)
    instance, semantic = scenes(40, 14)
    mask = masks(cfg, SEEDS, 0.5, instance, semantic)
    n = 196 - cfmae.visible_counts(SEEDS, visible, 3)  # r_m N
    assert torch.equal(mask.sum(-1), n) and ((~mask).sum((1, 2)) == visible).all()
    objects = cfmae.choose_objects(SEEDS, instance)
    for b in range(40):
        for m in range(3):
            hidden, count = mask[b, m], int(n[b, m])
            if masking == "SG":
                for c in semantic[b].unique():
                    region = semantic[b] == c
                    extra = int((hidden & region).sum()) - count * int(region.sum()) // 196
                    assert extra in (0, 1)  # Eq. 10's floor, or one more
            if masking == "IG" and objects[b].any():
                area, on = int(objects[b].sum()), int((hidden & objects[b]).sum())
                assert on * (196 - area) >= (count - on) * area  # as densely as the background
                assert on >= min(math.floor(0.75 * count), area)  # Eq. 8 or all there is


def test_equation_10__its_floor_alone_hides_too_few():
    """So by that alone Eq. 11 would not be a switch, and the total not 98."""
    _, semantic = scenes(40, 14)
    n = 196 - cfmae.visible_counts(SEEDS, 98, 3)
    short = []
    for b in range(40):
        sizes = Counter(semantic[b].tolist()).values()
        short += [k - sum(k * size // 196 for size in sizes) for k in n[b].tolist()]
        assert max(short[-3:]) < len(sizes)
    assert sum(short) / len(short) > 1


@pytest.mark.slow
def test_objects_hidden_whole__always_in_shape_scenes():
    """5/6 hidden and alpha = 0.75 leave nothing of small objects."""
    cfg, dataset = config("--model", "tiny", "--masking", "IG"), ShapeScenes("train", 64, 2)
    batch = collate([dataset[0, i] for i in range(100)])
    mask, logs = cfmae.make_mask(cfg, batch, torch.tensor(0.5))
    region = cfmae.patch_region(cfmae.patch_labels(batch["instance"]))
    objects = cfmae.choose_objects(batch["seed"], region)
    assert logs["objects_hidden_whole"] == 1 and (mask | ~objects[:, None]).all()


def test_instance_mask__is_the_random_one_without_objects():
    instance, semantic = scenes(40, 14)
    guided, random = (masks(config("--masking", k), SEEDS, 0.5, instance, semantic)
                      for k in ("IG", "RD"))  # fmt: skip
    same = (guided == random).all((1, 2))  # no instance, all unlabelled, one that fills the image
    assert same[:3].all() and same[5:].float().mean() < 0.2


@pytest.mark.parametrize("sizes", [(64,), (40, 24), (1, 2, 61), (5,) * 12 + (4,)])
@pytest.mark.slow
def test_semantic_mask__is_uniform_within_a_region(sizes):
    """A region's patches are hidden equally often; one region alone gives a random mask."""
    B = 20000
    region = torch.tensor([c for c, k in enumerate(sizes) for _ in range(k)]).expand(B, -1)
    order, n = uniform(torch.arange(B), 64, MASK).argsort(1).argsort(1)[:, None], 53
    every = torch.full((B, 1, 1), n)
    hidden = cfmae.semantic_mask(None, torch.arange(B), region, every, order)[:, 0].double()
    assert (hidden.sum(1) == n).all()
    for c, k in enumerate(sizes):
        inside, share = hidden[:, region[0] == c], n / 64  # whatever the region's number and size
        assert (inside.sum(1) - n * k / 64).abs().max() < 1
        bound = 5 * math.sqrt(share * (1 - share) / B) + 1e-12
        assert (inside.mean(0) - share).abs().max() < bound


# ----------------------------------------------------------------------------------- the schedule


@pytest.mark.parametrize("masking", ["SG-IG-RD", "IG-SG-RD", "RD-IG-SG"])
def test_schedule__corners_of_figure_5(masking):
    cfg, (first, second, third) = config("--masking", masking), masking.split("-")
    corners = {0: (1, 0, 0), 0.2: (1, 0, 0), 0.25: (0.75, 0.25, 0), 0.4: (0, 1, 0),
               0.6: (0, 1, 0), 0.7: (0, 0.5, 0.5), 0.8: (0, 0, 1), 1: (0, 0, 1)}  # fmt: skip
    for progress, expected in corners.items():
        got = cfmae.schedule(cfg, torch.tensor(float(progress)))
        assert [got[k].item() for k in (first, second, third)] == pytest.approx(expected, abs=1e-6)
    for progress in torch.linspace(0, 1, 501):
        got = cfmae.schedule(cfg, progress)
        assert min(got.values()) >= 0 and got["IG"] + got["SG"] <= 1 + 1e-6  # Eq. 4's condition
    step = config("--masking", masking, "--e1", "0.5", "--e2", "0.5")  # no ramp at all
    assert cfmae.schedule(step, torch.tensor(0.5001))[second] == 1


@pytest.mark.slow
def test_mix_score__is_a_switch_where_coefficients_cross():
    instance, semantic = scenes(40, 14)
    pure = {k: masks(config("--masking", k), SEEDS, 0, instance, semantic) for k in KINDS}
    for progress, kind in {0.299: "SG", 0.301: "IG", 0.399: "IG", 0.699: "IG", 0.701: "RD"}.items():
        assert torch.equal(masks(config(), SEEDS, progress, instance, semantic), pure[kind])


@pytest.mark.slow
def test_mix_score__breaks_ties_by_the_random_order():
    """Where both weights are alike, what either mask hides is hidden in that order."""
    cfg = config("--e1", "0", "--e2", "0.5", "--e3", "0.5", "--e4", "1")
    instance, semantic = scenes(40, 14)
    mask = masks(cfg, SEEDS, 0.25, instance, semantic)
    a, b = (masks(config("--masking", k), SEEDS, 0, instance, semantic) for k in ("SG", "IG"))
    assert mask[a & b].all() and not mask[~a & ~b].any() and (a ^ b).any()
    order = uniform(SEEDS, 3 * 196, MASK).view(40, 3, 196).argsort(-1).argsort(-1)
    last = order.where((a ^ b) & mask, -1).amax(-1)
    assert (last < order.where((a ^ b) & ~mask, 999).amin(-1)).all()


@pytest.mark.slow
def test_mix_sample__frequencies_are_the_coefficients(monkeypatch):
    # a patch of these maps has one label: faster
    monkeypatch.setattr(cfmae, "patch_region", lambda labels: labels[..., 0])
    B, cfg = 1500, config("--mix", "sample", "--model", "tiny")
    seed = torch.arange(B)
    instance, semantic = (x[5:6].expand(B, -1) for x in scenes(6, 8))
    tiny = {k: config("--model", "tiny", "--masking", k) for k in KINDS}
    pure = {k: masks(tiny[k], seed, 0, instance, semantic) for k in KINDS}
    shares_at = {0.25: (0.75, 0.25, 0), 0.35: (0.25, 0.75, 0), 0.65: (0, 0.75, 0.25)}
    for progress, shares in shares_at.items():
        mask = masks(cfg, seed, progress, instance, semantic)
        same = torch.stack([(mask == pure[k]).all((1, 2)) for k in pure])
        alone = same[:, same.sum(0) == 1]  # two kinds seldom agree by chance
        assert alone.shape[1] > 0.95 * B and (same.sum(0) > 0).all()
        for got, share in zip(alone.float().mean(1), shares):
            assert abs(got - share) <= 5 * math.sqrt(share * (1 - share) / B)


# -------------------------------------------------------------------------------------- the parts


def test_visible_counts__are_dirichlet_shares_rounded():
    seed, counts = torch.arange(20000), cfmae.visible_counts(torch.arange(20000), 98, 3)
    assert (counts.sum(1) == 98).all() and (counts >= 0).all()
    draws = -uniform(seed, 3, DIRICHLET).double().log()
    assert ((counts - 98 * draws / draws.sum(1, keepdim=True)).abs() < 1).all()
    share = counts[:, 0] / 98  # Beta(1, 2): mean 1/3, variance 1/18, P(share > t) = (1 - t)^2
    assert abs(share.mean() - 1 / 3) < 0.01 and abs(share.var() - 1 / 18) < 0.003
    assert abs((share > 0.5).float().mean() - 0.25) < 0.02
    assert (cfmae.visible_counts(seed, 49, 1) == 49).all()


@pytest.mark.slow
def test_random_mask__is_uniform_over_patches_and_granularities():
    cfg = config("--masking", "RD", "--model", "tiny")
    nothing = torch.zeros(20000, 64, dtype=torch.int64)
    hidden = masks(cfg, torch.arange(20000), 0.5, nothing, nothing).double().mean(0)
    assert (hidden - 5 / 6).abs().max() < 5 * math.sqrt(5 / 36 / 20000)


def test_patch_region__is_the_majority_ties_to_the_smaller_id():
    g = torch.Generator().manual_seed(0)
    label_map = torch.tensor([0, 3, 7, 255])[torch.randint(0, 4, (3, 8, 20), generator=g)].byte()
    label_map[0, :4, :4] = 255
    label_map[1, :4, :4] = torch.tensor([255, 7, 7, 255])  # a tie
    region = cfmae.patch_region(cfmae.patch_labels(label_map))
    for b in range(3):
        for row in range(2):
            for col in range(5):
                patch = label_map[b, 4 * row : 4 * row + 4, 4 * col : 4 * col + 4]
                count = Counter(patch.flatten().tolist())
                best = min(k for k in count if count[k] == max(count.values()))
                assert region[b, 5 * row + col] == best
    assert region[0, 0] == 255 and region[1, 0] == 7


@pytest.mark.slow
def test_choose_objects__draws_large_ones_more_often():
    B = 20000
    region = torch.tensor([0] * 14 + [3] * 40 + [9] * 8 + [255] * 2).expand(B, -1)
    objects = cfmae.choose_objects(torch.arange(B), region)
    assert not objects[:, region[0] == 0].any() and not objects[:, region[0] == 255].any()
    large, small = objects[:, 14].double().mean(), objects[:, 54].double().mean()
    # one of the two (by area, 5 to 1) or both, as often
    assert abs(large - (0.5 + 0.5 * 5 / 6)) < 0.013 and abs(small - (0.5 + 0.5 / 6)) < 0.018
    assert (objects[:, 14] | objects[:, 54]).all()  # never none of them
    assert torch.equal(objects[:, 14:54].all(1), objects[:, 14:54].any(1))  # instances are whole


@pytest.mark.parametrize("alpha", [0.51, 0.6, 0.75, 1.0])
def test_instance_mask__equals_naive_count_for_every_size(alpha):
    N = 25
    order = uniform(torch.arange(N + 1), N, MASK).argsort(1).argsort(1)[None].expand(1, -1, -1)
    cfg, n = config("--alpha", str(alpha)), torch.arange(N + 1)[None, :, None]
    for area in range(N + 1):
        region = (torch.arange(N)[None] < area).long()  # one instance, which is then the chosen one
        hidden = cfmae.instance_mask(cfg, torch.zeros(1, dtype=torch.long), region, n, order)[0]
        on = [naive_on_objects(k, area, N, alpha) for k in range(N + 1)]
        assert hidden[:, :area].sum(1).tolist() == on
        assert hidden.sum(1).tolist() == list(range(N + 1))
