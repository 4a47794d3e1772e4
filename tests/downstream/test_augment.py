"""Augmentation of fine-tuning: operations against arithmetic, mixing against loops over samples."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_finetune import naive_mix, parse
from tiny_run import short_epochs

import data
from downstream import augment


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_augmented__depends_on_the_sample_alone():
    cfg = parse("--method", "cfmae", "--encoder", "tiny", "--reprob", 0.5)
    with short_epochs():
        plain = data.open_dataset("shapes", "train", 64, 8, ("rgb",), (0.1, 1), True, 0)
    dataset = augment.Augmented(plain, cfg, *cfg.statistics)
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


# ---------------------------------------------------------------------------------- RandAugment

FILL = (124, 116, 104)


def picture(h=24, w=20, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


def operate(name, pixels, level, sign=1):
    return np.array(augment.OPERATIONS[name](Image.fromarray(pixels), level / 10, sign, FILL))


# timm's "increasing" operations, pixel by pixel; level 0 to 10.
POINTWISE = {
    "Invert": lambda v, level: 255 - v,
    "Posterize": lambda v, level: v >> 4 + int(level * 0.4) << 4 + int(level * 0.4),
    "Solarize": lambda v, level: 255 - v if v >= 256 - int(level * 25.6) else v,
    "SolarizeAdd": lambda v, level: min(v + int(level * 11), 255) if v < 128 else v,
}


@pytest.mark.parametrize("level", [1, 5, 9, 10])
@pytest.mark.parametrize("name", POINTWISE)
def test_operations__pointwise(name, level):
    pixels = picture()
    expected = [POINTWISE[name](v, level) for v in pixels.ravel().tolist()]
    assert operate(name, pixels, level).ravel().tolist() == expected


def test_operations__posterize_at_9_keeps_one_bit():
    assert set(operate("Posterize", picture(), 9).ravel()) == {0, 128}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", ["Brightness", "Color", "Contrast", "Sharpness"])
def test_operations__enhance_by_09_a_level_of_10(name, sign):
    """A blend with black, with its greys, with their mean, with its neighbours' mean."""
    pixels, level = picture(), 9
    x = pixels.astype(float)
    luma = (x @ [19595, 38470, 7471] + 32768) // 65536  # Rec. 601
    if name == "Brightness":
        base = 0 * x
    elif name == "Color":
        base = np.repeat(luma[..., None], 3, axis=2)
    elif name == "Contrast":
        base = np.full_like(x, int(luma.mean() + 0.5))
    else:  # the centre counts five times; the border stays
        base = x.copy()
        for i in range(1, 23):
            for j in range(1, 19):
                base[i, j] = (x[i - 1 : i + 2, j - 1 : j + 2].sum((0, 1)) + 4 * x[i, j]) / 13
    expected = (base + (1 + sign * 0.81) * (x - base)).clip(0, 255)
    slack = 1.9 if name == "Sharpness" else 1.01  # the base is rounded before
    assert np.abs(operate(name, pixels, level, sign) - expected).max() < slack
    assert np.abs(expected - x).max() > 20
    assert (operate(name, pixels, 10, -1) == operate(name, pixels, 11, -1)).all()  # not below 0.1


def test_operations__equalize_and_autocontrast():
    ramp = np.repeat(np.arange(100, 140, dtype=np.uint8)[None, :, None], 3, axis=2).repeat(80, 0)
    spread = np.linspace(0, 255, 40)
    for name in ("AutoContrast", "Equalize"):
        found = operate(name, ramp, 5)[0, :, 0]
        assert found[0] < 4 and found[-1] >= 249 and np.abs(found - spread).max() < 8


@pytest.mark.parametrize("sign", [1, -1])
def test_operations__geometry_at_10(sign):
    """Translation by 0.45 of the side, shear by 0.3 of the distance, rotation by 30 degrees."""
    pixels = picture(40, 20)
    wide, high = operate("TranslateX", pixels, 10, sign), operate("TranslateY", pixels, 10, sign)
    here, there = (slice(0, 11), slice(9, 20))[::sign]
    assert np.abs(wide[:, here].astype(int) - pixels[:, there]).max() <= 1
    assert ((wide[:, 11:] if sign > 0 else wide[:, :9]) == FILL).all()
    here, there = (slice(0, 22), slice(18, 40))[::sign]
    assert np.abs(high[here].astype(int) - pixels[there]).max() <= 1

    def spot(name, row, col):
        """Where a white blob on grey goes, (row, column) from the centre of 81 x 81."""
        image = np.full((81, 81, 3), FILL, np.uint8)
        image[40 + row - 2 : 43 + row, 40 + col - 2 : 43 + col] = 255
        weight = operate(name, image, 10, sign)[..., 0].astype(float) - FILL[0]
        rows, cols = np.mgrid[:81, :81] - 40
        return (weight * rows).sum() / weight.sum(), (weight * cols).sum() / weight.sum()

    assert spot("ShearX", 20, 0) == pytest.approx((20, -sign * 0.3 * 60), abs=0.4)
    assert spot("ShearY", 0, 20) == pytest.approx((-sign * 0.3 * 60, 20), abs=0.4)
    angle = math.radians(30) * sign
    expected = (-25 * math.sin(angle), 25 * math.cos(angle))
    assert spot("Rotate", 0, 25) == pytest.approx(expected, abs=0.3)


def test_operations__timms_fifteen():
    assert set(augment.OPERATIONS) == set(
        "AutoContrast Equalize Invert Rotate Posterize Solarize SolarizeAdd Color Contrast "
        "Brightness Sharpness ShearX ShearY TranslateX TranslateY".split()
    )
    maps = augment.RandAugment(9, 0.5, FILL, geometric=False)
    assert len(maps.names) == 10 and not {"Rotate", "ShearX", "TranslateY"} & set(maps.names)


@pytest.mark.slow
def test_rand_augment__two_operations_of_all_each_half_of_the_time_at_9(monkeypatch):
    calls = []
    for name in augment.OPERATIONS:
        note = lambda im, *args, name=name: calls.append((name, *args)) or im  # noqa: E731
        monkeypatch.setitem(augment.OPERATIONS, name, note)
    transform, counts, n = augment.RandAugment(9, 0.5, FILL), [], 4000
    torch.manual_seed(0)
    for _ in range(n):
        before = len(calls)
        transform(None)
        counts.append(len(calls) - before)
    shares = np.bincount(counts, minlength=3) / n
    assert np.abs(shares - [0.25, 0.5, 0.25]).max() < 0.03  # binomial of 2 and 1/2
    names, levels, signs, fills = (np.array(x) for x in zip(*calls))
    chosen = [(names == name).sum() for name in augment.OPERATIONS]
    assert min(chosen) > 200 and max(chosen) < 335  # some 267 each
    assert abs(levels.mean() - 0.9) < 0.005 and abs(levels.std() - 0.05) < 0.005
    assert levels.max() == 1.0 and abs(signs.mean()) < 0.05 and (fills == FILL).all()


def test_color_jitter__factors_and_order(monkeypatch):
    seen = []

    def recorder(kind):
        class Enhance:
            def __init__(self, im):
                pass

            def enhance(self, factor):
                seen.append((kind, factor))

        return Enhance

    monkeypatch.setattr(augment, "JITTER", [recorder(i) for i in range(3)])
    torch.manual_seed(0)
    for _ in range(600):
        augment.color_jitter(None, 0.4)
    kinds = np.array([k for k, _ in seen]).reshape(-1, 3)
    assert (np.sort(kinds) == [0, 1, 2]).all() and len(np.unique(kinds, axis=0)) == 6
    factors = np.array([f for _, f in seen])
    assert 0.6 <= factors.min() < 0.61 and 1.39 < factors.max() <= 1.4
    assert abs(factors.mean() - 1) < 0.02


# -------------------------------------------------------------------------------------- erasing


class Grey(data.Dataset):
    """Images of one colour, the mean."""

    classes, granularities, mean = ("a",), ("rgb",), (0.5, 0.4, 0.3)

    def __len__(self):
        return 2000

    def __getitem__(self, key):
        rgb = (torch.tensor(self.mean) * 255).round().byte()[:, None, None].expand(3, 40, 40)
        return {"rgb": rgb.clone(), "seed": torch.tensor(key[1] * 7919 + 3)}


def augmented(*flags, std=(0.1, 0.2, 0.05)):
    cfg = parse("--method", "cfmae", "--encoder", "tiny", *flags)
    return augment.Augmented(Grey(), cfg, Grey.mean, std)


@pytest.mark.slow
def test_erasing__a_quarter_of_the_images_a_fiftieth_to_a_third_of_the_area():
    dataset = augmented("--reprob", 0.25, "--rand-augment", 0)
    plain, areas, ratios, noise = Grey()[0, 0]["rgb"], [], [], []
    for i in range(len(dataset)):
        changed = (dataset[0, i]["rgb"] != plain).any(0)
        if changed.any():
            rows, cols = changed.any(1).nonzero(), changed.any(0).nonzero()
            h, w = (int(x.max() - x.min()) + 1 for x in (rows, cols))
            areas.append(h * w / 1600)
            ratios.append(h / w)
            if len(noise) < 30:
                box = dataset[0, i]["rgb"][:, rows.min() : rows.max() + 1]
                noise.append(box[:, :, cols.min() : cols.max() + 1].flatten(1))
    assert abs(len(areas) / 2000 - 0.25) < 0.03
    assert 0.01 < min(areas) < 0.03 and 0.3 < max(areas) < 0.37
    assert abs(np.mean(areas) - (0.02 + 1 / 3) / 2) < 0.015  # uniform
    assert 0.25 < min(ratios) < 0.36 and 2.8 < max(ratios) < 4  # 0.3 to 1 / 0.3
    noise = torch.cat(noise, dim=1).float() / 255
    assert noise.mean(1).tolist() == pytest.approx(Grey.mean, abs=0.01)  # normal in the units of
    assert noise.std(1).tolist() == pytest.approx([0.1, 0.19, 0.05], abs=0.01)  # mean and std


def test_augmented__fills_with_the_encoders_mean_and_jitters(monkeypatch):
    seen = []
    monkeypatch.setattr(augment, "color_jitter", lambda im, x: seen.append(x) or im)
    dataset = augmented("--color-jitter", 0.4)
    assert dataset.rand_augment.fill == (128, 102, 76)
    dataset[0, 0]
    assert seen == [0.4]
