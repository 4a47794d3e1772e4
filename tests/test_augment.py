"""Augmentation of fine-tuning: mixing against loops over samples, draws from the seed alone."""

import math

import pytest
import torch
from test_classify import parse
from tiny_run import short_epochs

import data
import engine
from common import AUGMENT, uniform
from downstream import augment


def naive_mix(imgs, seed, mixup, cutmix, switch):
    """One sample at a time, with slices and numbers, in numpy's terms."""
    out, lams = imgs.clone(), []
    for i, s in enumerate(seed.tolist()):
        u = uniform(torch.tensor([s]), 67, AUGMENT)[0].double().tolist()
        cut = u[0] < switch if mixup and cutmix else bool(cutmix)
        a = cutmix if cut else mixup
        for x, y in zip(u[3:35], u[35:]):
            x, y = x ** (1 / a), y ** (1 / a)
            if x + y <= 1:
                lam = x / (x + y)
                break
        partner = imgs[len(imgs) - 1 - i]
        if cut:
            H, W = imgs.shape[2:]
            h, w = int(H * math.sqrt(1 - lam)), int(W * math.sqrt(1 - lam))
            cy, cx = int(u[1] * H), int(u[2] * W)
            y0, y1 = max(cy - h // 2, 0), min(cy + h // 2, H)
            x0, x1 = max(cx - w // 2, 0), min(cx + w // 2, W)
            out[i, :, y0:y1, x0:x1] = partner[:, y0:y1, x0:x1]
            lam = 1 - (y1 - y0) * (x1 - x0) / (H * W)
        else:
            out[i] = lam * imgs[i] + (1 - lam) * partner
        lams.append(lam)
    return out, torch.tensor(lams)


@pytest.mark.parametrize("mixup, cutmix", [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_mix__equals_a_loop(mixup, cutmix):
    imgs, seed = torch.randn(33, 3, 24, 16), torch.arange(33) * 7919 + 5
    lam, blend, box = augment.draw_mix(seed, (24, 16), mixup, cutmix, 0.5)
    expected, lams = naive_mix(imgs, seed, mixup, cutmix, 0.5)
    assert torch.allclose(lam, lams, atol=1e-5)
    assert torch.allclose(augment.mix(imgs, blend, box), expected, atol=1e-5)
    assert box.any() == (cutmix > 0) and (blend < 1).any() == (mixup > 0)


def test_mix__depends_on_the_own_seed_alone():
    a = augment.draw_mix(torch.arange(8), (8, 8), 0.8, 1.0, 0.5)
    b = augment.draw_mix(torch.arange(3, 8), (8, 8), 0.8, 1.0, 0.5)
    assert all(torch.equal(x[3:], y) for x, y in zip(a, b))


def test_draw_mix__lambda_is_beta():
    lam, _, _ = augment.draw_mix(torch.arange(40000), (1, 1), 0.8, 0.0, 0.5)
    assert abs(lam.mean() - 0.5) < 0.005
    assert abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.001  # of Beta(a, a)


def test_mix__cuts_maps_and_image_alike():
    seed, rgb = torch.arange(6), torch.randn(6, 3, 32, 32)
    maps = torch.arange(6, dtype=torch.uint8)[:, None, None].expand(6, 16, 16)
    _, blend, box = augment.draw_mix(seed, (16, 16), 0.0, 1.0, 0.5)
    cut, image = augment.mix(maps, blend, box), augment.mix(rgb, blend, box)
    assert cut.dtype == torch.uint8
    for i in range(6):
        pasted = (cut[i] == 5 - i).repeat_interleave(2, 0).repeat_interleave(2, 1)
        assert torch.equal(image[i], torch.where(pasted, rgb[5 - i], rgb[i]))


def test_soft_targets__sum_to_one():
    label, lam = torch.tensor([0, 1, 4]), torch.tensor([0.25, 1.0, 0.5])
    y = augment.soft_targets(label, lam, 5, 0.1)
    assert torch.allclose(y.sum(1), torch.ones(3)) and (y >= 0).all()
    assert y[0].tolist() == pytest.approx([0.25 * 0.9 + 0.02, 0.02, 0.02, 0.02, 0.75 * 0.9 + 0.02])
    assert augment.soft_targets(label, None, 5, 0.0).argmax(1).tolist() == [0, 1, 4]


def test_augmented__depends_on_the_sample_alone():
    cfg = parse("--method", "cfmae", "--encoder", "tiny", "--reprob", 0.5)
    with short_epochs():
        plain = engine.data.open_dataset("shapes", "train", 64, 8, ("rgb",), (0.1, 1), True, 0)
    dataset = cfg.wrap(plain, True)
    runs = []
    for workers in (0, 2):
        torch.manual_seed(workers)
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=[[(e, i) for i in range(8)] for e in (0, 1)],
            collate_fn=data.collate, num_workers=workers,
        )  # fmt: skip
        runs.append([b["rgb"] for b in loader])
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    original = [data.collate([plain[e, i] for i in range(8)])["rgb"] for e in (0, 1)]
    changed = [(a != b).flatten(1).any(1).sum() for a, b in zip(runs[0], original)]
    assert min(changed) >= 4 and runs[0][0].dtype == torch.uint8  # 1/8 would keep all of it
    torch.manual_seed(3)
    before = torch.get_rng_state()
    dataset[0, 1]
    assert torch.equal(before, torch.get_rng_state())
