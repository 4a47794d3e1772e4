"""ShapeScenes: determinism, alignment, labels, and that colour does not give the class away."""

import numpy as np
import pytest
import torch
from test_data import batches
from torch.nn.functional import interpolate

from shapes import SHAPES, STUFF, ShapeScenes


@pytest.fixture(scope="module")
def scenes():
    """400 scenes with a label for every pixel (patch size 4)."""
    dataset = ShapeScenes("train", 64, 1, train=False)
    return [dataset[0, i] for i in range(400)]


def test_scenes__keys_types_and_ranges(scenes):
    for s in scenes[:50]:
        assert list(s) == ["rgb", "instance", "semantic", "label", "seed", "bad"]
        assert s["rgb"].shape == (3, 64, 64) and s["rgb"].dtype == torch.uint8
        assert s["instance"].shape == s["semantic"].shape == (64, 64)
        things = s["semantic"] >= len(STUFF)
        assert torch.equal(things, s["instance"] > 0)
        assert s["semantic"].max() < ShapeScenes.SEMANTIC_CLASSES == 16
        assert 0 <= s["label"] < len(SHAPES) and s["bad"] == -1
    assert len(ShapeScenes()) == 20_000 and len(ShapeScenes("val")) == 2_000
    semantic_alone = ShapeScenes(granularities=("semantic",))[0, 0]
    assert list(semantic_alone) == ["semantic", "label", "seed", "bad"]


@pytest.mark.slow
def test_scenes__instances_are_whole_objects_by_area(scenes):
    counts = []
    for s in scenes:
        areas = torch.bincount(s["instance"].flatten().long())[1:]
        assert (areas[:-1] >= areas[1:]).all() and areas[-1] > 0
        for number in range(1, len(areas) + 1):  # one instance, one class
            assert len(s["semantic"][s["instance"] == number].unique()) == 1
        largest = [
            int(s["semantic"][s["instance"] == n][0])
            for n in range(1, len(areas) + 1)
            if areas[n - 1] == areas[0]
        ]
        assert int(s["label"]) + len(STUFF) in largest
        counts.append(len(areas))
    assert min(counts) >= 1 and max(counts) == 6 and np.mean(np.array(counts) >= 2) > 0.9


def test_scenes__all_classes_appear_evenly(scenes):
    labels = np.bincount([int(s["label"]) for s in scenes], minlength=10)
    assert labels.min() > 20 and labels.max() < 65
    stuff = np.bincount(torch.cat([s["semantic"].unique() for s in scenes]).numpy(), minlength=16)
    assert stuff.min() > 60


@pytest.mark.parametrize("train", [False, True])
def test_scenes__maps_are_aligned_with_the_image(train):
    """Edges of the image lie on borders of the maps: shifted maps meet fewer of them."""
    scenes = ShapeScenes("train", 64, 1, train=train)
    shifts = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    for s in (scenes[0, i] for i in range(30)):
        ids, met = s["instance"].int() * 20 + s["semantic"], dict.fromkeys(shifts, 0)
        for axis in (0, 1):
            edges = s["rgb"].int().diff(dim=axis + 1).abs().sum(0)
            borders = ids.diff(dim=axis) != 0
            for shift in shifts:
                met[shift] += int(edges[borders.roll(shift, (0, 1))].sum())
        assert max(met, key=met.get) == (0, 0)


def test_scenes__low_resolution_maps_are_nearest_exact_samples(scenes):
    for size, stride in ((64, 2), (64, 4)):
        small = ShapeScenes("train", size, stride, train=False)
        for i in range(10):
            full = scenes[i]["semantic"][None, None].float()
            want = interpolate(full, small.label_size, mode="nearest-exact")[0, 0].byte()
            assert torch.equal(small[0, i]["semantic"], want)
            assert torch.equal(small[0, i]["rgb"], scenes[i]["rgb"])


@pytest.mark.slow
def test_scenes__colour_does_not_tell_the_class():
    """Nearest class mean on mean, deviation and extremes of an object's colours stays at chance."""
    dataset = ShapeScenes("train", 32, 1, train=False)
    features, classes = [], []
    for i in range(1500):
        s = dataset[0, i]
        for number in range(1, int(s["instance"].max()) + 1):
            inside = s["instance"] == number
            if inside.sum() >= 20:
                pixels = s["rgb"][:, inside].float()
                features.append(torch.cat([pixels.mean(1), pixels.std(1)]).numpy())
                classes.append(int(s["semantic"][inside][0]) - len(STUFF))
    x, y = np.array(features), np.array(classes)
    x = (x - x.mean(0)) / x.std(0)
    half = len(y) // 2
    means = np.stack([x[:half][y[:half] == c].mean(0) for c in range(10)])
    guess = ((x[half:, None] - means) ** 2).sum(-1).argmin(1)
    mean_only = ((x[half:, None, :3] - means[:, :3]) ** 2).sum(-1).argmin(1)
    share = np.bincount(y[half:]).max() / len(y[half:])
    assert (mean_only == y[half:]).mean() < share + 0.03
    assert (guess == y[half:]).mean() < share + 0.08  # shading differs a little with shape


@pytest.mark.slow
def test_scenes__are_fixed_by_split_and_index():
    a, b = ShapeScenes("train", train=False, seed=0), ShapeScenes("train", train=False, seed=1)
    assert torch.equal(a[0, 5]["rgb"], b[3, 5]["rgb"]) and a[0, 5]["seed"] != b[3, 5]["seed"]
    val = ShapeScenes("val", train=False)
    train, val = ({d[0, i]["rgb"].numpy().tobytes() for i in range(300)} for d in (a, val))
    assert len(train) == len(val) == 300 and not train & val


@pytest.mark.slow
def test_scenes__views_differ_by_epoch_and_repeat_by_seed():
    a, b = ShapeScenes("train"), ShapeScenes("train")
    for i in range(5):
        assert all(torch.equal(a[1, i][k], b[1, i][k]) for k in a[1, i])
        assert not torch.equal(a[0, i]["rgb"], a[1, i]["rgb"])
    views = [a[0, i] for i in range(300)]
    assert all(0 <= int(v["label"]) < 10 and v["instance"].max() >= 1 for v in views)


@pytest.mark.slow
def test_scenes__draw_the_same_scene_at_any_size():
    small, large = ShapeScenes("val", 64, 1, train=False), ShapeScenes("val", 192, 3, train=False)
    agree = [(small[0, i]["semantic"] == large[0, i]["semantic"]).float().mean() for i in range(20)]
    assert min(agree) > 0.93
    wide = ShapeScenes("val", (32, 96), 4, train=True)[0, 0]
    assert wide["rgb"].shape == (3, 32, 96) and wide["semantic"].shape == (8, 24)


@pytest.mark.slow
def test_scenes__workers_do_not_matter():
    scenes = ShapeScenes(length=20)
    for a, b in zip(batches(scenes, 0), batches(scenes, 2), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a) and len(a) == 6
