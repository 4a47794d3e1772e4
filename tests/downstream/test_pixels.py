"""Crops and colours of segmentation, and other layouts, against Pillow, OpenCV and the maps."""

import numpy as np
import pytest
import torch
from data import UserError
from downstream import pixels, prepare
from PIL import Image
from test_segment import config


def blocks(h=40, w=60):
    """An image whose colour says its label: blocks of 10 x 10 pixels."""
    labels = (np.arange(h)[:, None] // 10 * (w // 10) + np.arange(w) // 10).astype(np.uint8)
    labels[:10, :10] = 255
    rgb = torch.from_numpy(np.where(labels == 255, 250, labels * 10)).byte().repeat(3, 1, 1)
    return rgb, {"semantic": labels}


@pytest.mark.parametrize("crop", [(32, 32), (32, 64), (96, 64)])
def test_Augment__image_and_labels_stay_together(crop):
    cfg = config("--image-size", crop[0], "--crop-width", crop[1])
    augment, (rgb, maps) = pixels.Augment(cfg, True), blocks()
    views = [augment(rgb, maps, seed) for seed in range(40)]
    again = augment(rgb, maps, 3)
    assert all(torch.equal(views[3][k], again[k]) for k in again)
    padded = flipped = 0
    for view in views:
        assert view["rgb"].shape == (3, *crop) and view["semantic"].shape == crop
        labels, colour = view["semantic"].int(), view["rgb"][0].int()
        inside = labels != 255
        off = (colour - labels * 10).abs()[inside] > 4  # the resize mixes colours at edges alone
        assert off.float().mean() < 0.35
        flipped += bool((labels[inside.any(1)][0][inside.any(0)].diff() < 0).any())
        pad = (view["rgb"] == torch.tensor((124, 116, 104)).view(3, 1, 1)).all(0)  # ImageNet's mean
        padded += bool(pad.any())
        assert (view["semantic"][pad] == 255).all()
        assert not pad[0, 0]  # it is at the bottom and the right, flipped or not
    assert 5 < flipped < 35 and padded > 5


def test_Augment__pads_with_the_mean_that_is_subtracted():
    cfg = config("--mean", "0.5,0.4,0.2", "--scale-max", 0.5)
    view = pixels.Augment(cfg, True)(*blocks(), 0)
    assert view["rgb"][:, -1, -1].tolist() == [128, 102, 51] and view["semantic"][-1, -1] == 255


def test_Augment__distorts_colours_where_it_is_asked_to():
    rgb, maps = blocks()
    one, two = (config(flag, "--scale-min", 1, "--scale-max", 1)
                for flag in ("--photometric", "--no-photometric"))  # fmt: skip
    pairs = [[pixels.Augment(c, True)(rgb, maps, s) for c in (one, two)] for s in range(20)]
    assert all(torch.equal(a["semantic"], b["semantic"]) for a, b in pairs)
    assert 10 < sum(not torch.equal(a["rgb"], b["rgb"]) for a, b in pairs)


def ramp(h=200, w=240):
    """An image whose red says the column and whose green the row; labels are the columns / 10."""
    rows, cols = np.mgrid[:h, :w].astype(np.uint8)
    rgb = torch.from_numpy(np.stack([cols, rows, 0 * rows]))
    return rgb, {"semantic": cols // 10}


@pytest.mark.slow
def test_Augment__the_probes_crop_is_torchvisions_random_resized_crop():
    cfg = config("--protocol", "linear", "--image-size", 64, "--crop-scale-min", 0.8)
    areas, ratios, left, flips = [], [], [], 0
    for seed in range(200):
        view = pixels.Augment(cfg, True)(*ramp(), seed)
        (x0, x1), (y0, y1) = (sorted((int(v[3]), int(v[-4]))) for v in (
            view["rgb"][0, 30], view["rgb"][1, :, 30]))  # fmt: skip
        w, h = (x1 - x0) / 57 * 64, (y1 - y0) / 57 * 64  # cells 3 and 60 of 64
        areas.append(w * h / (200 * 240))
        ratios.append(w / h)
        left.append(x0 - 3.5 / 64 * w)
        flips += bool(view["rgb"][0, 30, 3] > view["rgb"][0, 30, -4])
        off = (view["rgb"][0].int() // 10 - view["semantic"].int()).abs()
        assert view["semantic"].shape == (64, 64) and off.max() <= 1
    assert 0.78 < min(areas) < 0.82 and 0.97 < max(areas) < 1.02
    assert np.mean(areas) == pytest.approx(0.88, abs=0.03)  # high ratios do not fit large areas
    assert 0.72 < min(ratios) and max(ratios) < 1.37 and max(ratios) - min(ratios) > 0.3
    assert max(left) - min(left) > 20 and 70 < flips < 130
    centre = pixels.Augment(cfg, False)(*ramp(), 0)["rgb"][:2].int()  # columns 20 to 219
    assert (centre[:, 0, 0] - torch.tensor([21, 1])).abs().max() <= 1
    assert (centre[:, -1, -1] - torch.tensor([218, 198])).abs().max() <= 2


@pytest.mark.parametrize("k", [2, 3])
def test_Augment__takes_the_label_in_the_middle_of_each_cell(k):
    labels = np.random.default_rng(0).integers(0, 16, (32 * k, 32 * k)).astype(np.uint8)
    rgb = torch.zeros(3, *labels.shape, dtype=torch.uint8)
    view = pixels.Augment(config(), False)(rgb, {"semantic": labels}, 0)
    assert np.array_equal(view["semantic"], labels[k // 2 :: k, k // 2 :: k])


def test_Augment__avoids_crops_that_one_class_fills():
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 48:] = 1
    cfg = config("--scale-min", 1, "--scale-max", 2)
    views = [pixels.Augment(cfg, True)(torch.zeros(3, 64, 64).byte(), {"semantic": labels}, s)
             for s in range(30)]  # fmt: skip
    shares = [(v["semantic"] == 0).float().mean() for v in views]
    assert sum(s < 0.75 for s in shares) > 20


@pytest.mark.parametrize("size", [(7, 9), (64, 31), (448, 448), (13, 100)])
def test_nearest__equals_pillows(size):
    labels = np.random.default_rng(0).integers(0, 256, (37, 53)).astype(np.uint8)
    expected = Image.fromarray(labels).resize(size[::-1], Image.NEAREST)
    found = pixels.nearest(torch.from_numpy(labels), size)
    assert np.array_equal(found.numpy(), np.asarray(expected))


PIXELS = [(200, 40, 40), (40, 200, 90), (10, 20, 250), (120, 110, 100), (255, 255, 255), (0, 0, 0),
          (250, 240, 10)]  # fmt: skip
# What mmsegmentation's PhotoMetricDistortion makes of them: OpenCV's HSV of 8 bits, S times a
# factor, H plus an angle / 2; and all of it times a factor, cut off. Draws: brightness? contrast?
# before the others? saturation? hue? each with its amount behind it.
OPENCV = {
    "S x 0.5": ((1, 1, 1, 0, 0.0, 1), [
        (200, 120, 120), (120, 200, 144), (130, 134, 250), (120, 115, 110), (255, 255, 255),
        (0, 0, 0), (250, 246, 130)]),
    "S x 1.4": ((1, 1, 1, 0, 0.9, 1), [
        (200, 0, 0), (0, 200, 60), (0, 8, 250), (120, 106, 92), (255, 255, 255), (0, 0, 0),
        (250, 242, 0)]),
    "H + 9": ((1, 1, 1, 1, 0, 0.75), [
        (200, 88, 40), (40, 200, 136), (74, 10, 250), (120, 116, 100), (255, 255, 255), (0, 0, 0),
        (186, 250, 10)]),
    "H - 18": ((1, 1, 1, 1, 0, 0.0), [
        (200, 40, 136), (88, 200, 40), (10, 162, 250), (120, 100, 102), (255, 255, 255), (0, 0, 0),
        (250, 98, 10)]),
    "x 0.7, first": ((1, 0, 0, 0.2, 1, 1), [
        (140, 28, 28), (28, 140, 63), (7, 14, 175), (84, 77, 70), (178, 178, 178), (0, 0, 0),
        (175, 168, 7)]),
    "x 1.4, last": ((1, 0, 1, 1, 1, 0.9), [
        (255, 56, 56), (56, 255, 126), (14, 28, 255), (168, 154, 140), (255, 255, 255), (0, 0, 0),
        (255, 255, 14)]),
    "+ 16": ((0, 0.75, 1, 1, 1, 1), [
        (216, 56, 56), (56, 216, 106), (26, 36, 255), (136, 126, 116), (255, 255, 255),
        (16, 16, 16), (255, 255, 26)]),
    "- 32": ((0, 0.0, 1, 1, 1, 1), [
        (168, 8, 8), (8, 168, 58), (0, 0, 218), (88, 78, 68), (223, 223, 223), (0, 0, 0),
        (218, 208, 0)]),
}  # fmt: skip


@pytest.mark.parametrize("name", OPENCV)
def test_distort__equals_mmsegmentations(name):
    draws, expected = OPENCV[name]
    rgb, left = torch.tensor(PIXELS, dtype=torch.uint8).T[:, None], iter(draws)
    found = pixels.distort(left.__next__, rgb)[:, 0].T.int()
    assert next(left, None) is None and (found - torch.tensor(expected)).abs().max() <= 2
    assert (found - rgb[:, 0].T).abs().max() > 10


def test_distort__contrast_comes_first_or_last():
    red = torch.tensor([200, 150, 180], dtype=torch.uint8).view(3, 1, 1)
    first, last = (pixels.distort(iter(draws).__next__, red).flatten().tolist()
                   for draws in ((1, 0, 0, 0.9, 0, 0, 1), (1, 0, 1, 0, 0, 1, 0.9)))  # fmt: skip
    assert first == pytest.approx([255, 232.5, 253.5], abs=1)  # x 1.4, cut off at 255; S x 0.5
    assert last == pytest.approx([255, 245, 255], abs=1)  # S x 0.5: 200, 175, 190; x 1.4


def test_distort__each_change_comes_half_of_the_time():
    rgb = torch.tensor(PIXELS, dtype=torch.uint8).T[:, None]
    views = [pixels.distort(pixels.random.Random(i).random, rgb) for i in range(400)]
    same = sum(torch.equal(v, rgb) for v in views)
    assert 10 < same < 45 and all(v.dtype == torch.uint8 for v in views)  # 400 / 16


@pytest.mark.parametrize("size, crop, expected", [
    ((480, 640), (512, 512), (512, 683)),
    ((640, 480), (512, 512), (683, 512)),
    ((100, 1000), (512, 512), (205, 2048)),  # 2048 x 512: the long side has its limit
    ((480, 640), (512, 768), (576, 768)),
])  # fmt: skip
def test_cover__short_side_becomes_the_crops(size, crop, expected):
    assert pixels.cover(size, crop) == expected


# ---------------------------------------------------------------------------------- other layouts


def write_voc(root, aug):
    """A VOC with one image a split; with the larger training set's list and half of its maps."""
    for kind in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / kind).mkdir(parents=True)
    for name in ("train_1", "val_1", "aug_1"):
        Image.new("RGB", (3, 2)).save(root / "JPEGImages" / f"{name}.jpg")
    for name, classes in (("train_1", 1), ("val_1", 2)):
        Image.fromarray(np.full((2, 3), classes, np.uint8)).save(
            root / "SegmentationClass" / f"{name}.png")  # fmt: skip
        (root / "ImageSets/Segmentation" / f"{name[:-2]}.txt").write_text(f"{name}\n")
    if aug:
        (root / "SegmentationClassAug").mkdir()
        Image.fromarray(np.full((2, 3), 7, np.uint8)).save(
            root / "SegmentationClassAug" / "aug_1.png")  # fmt: skip
        (root / "ImageSets/Segmentation/trainaug.txt").write_text("train_1\naug_1\n")
    return root


@pytest.mark.parametrize("aug", [True, False])
def test_prepare_voc__takes_the_larger_training_set_and_says_so_where_it_is_missing(
    tmp_path, capsys, aug
):
    source, out = write_voc(tmp_path / "voc", aug), tmp_path / "out"
    assert prepare.prepare_voc([str(source), str(out)]) == 0
    said = capsys.readouterr().out
    maps = {p.stem: int(np.asarray(Image.open(p))[0, 0]) for p in out.glob("*/semantic/*.png")}
    if aug:
        assert maps == {"train_1": 1, "aug_1": 7, "val_1": 2} and "trainaug: 2 images" in said
    else:
        assert maps == {"train_1": 1, "val_1": 2} and "no" in said and "trainaug.txt" in said


def test_prepare_ade__an_unreadable_map_is_one_message(tmp_path):
    for kind in ("images", "annotations"):
        for part in ("training", "validation"):
            (tmp_path / kind / part).mkdir(parents=True)
    Image.new("RGB", (3, 2)).save(tmp_path / "images/training/a.jpg")
    args = [str(tmp_path), str(tmp_path / "out")]
    for content, words in ((None, "No such file"), (b"broken", "not a PNG file")):
        if content:
            (tmp_path / "annotations/training/a.png").write_bytes(content)
        with pytest.raises(UserError, match=f"annotations/training/a.png.*{words}|{words}.*a.png"):
            prepare.prepare_ade(args)


def test_read_map__gives_the_ids(tmp_path):
    ids = np.arange(6, dtype=np.uint8).reshape(2, 3)
    Image.fromarray(ids).save(tmp_path / "a.png")
    assert np.array_equal(prepare.read_map(tmp_path / "a.png"), ids)
