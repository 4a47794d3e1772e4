"""Objects of COCO's format and of ShapeScenes: files, crops, batches, bad input."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
from coco_folder import CATEGORIES, SIZES, content, write
from data import UserError
from downstream import coco, objects
from downstream.mask_rcnn import unpack
from downstream.objects import CocoImages, Jitter, Scenes, View, collate, sample_of
from shapes import SHAPES

pytestmark = pytest.mark.slow


@pytest.fixture
def root(tmp_path):
    write(tmp_path)
    return tmp_path


def read(root, **changes):
    path = root / "annotations/instances_train2017.json"
    return coco.read_json(path, str(root / "train2017"), **changes)


# ------------------------------------------------------------------------------------------- files


def test_read_json__numbers_categories_by_id_and_leaves_crowds_out(root):
    found = read(root)
    assert found.categories == [[2, "dot"], [7, "bar"], [90, "disc"]]
    assert [found.of(i)[0].tolist() for i in range(5)] == [[3, 2], [1, 2], [3], [3], []]
    assert found.of(0)[1][1] == content()["annotations"][1]["segmentation"]
    assert found.name(1) == "sub/1.png" and len(found) == 5
    assert found.arrays["ids"].tolist() == [500, 499, 498, 497, 496]
    assert found.arrays["sizes"].tolist() == [list(s) for s in SIZES]


def test_objects__saved_mapped_and_pickled_are_the_same(root, tmp_path):
    found = read(root)
    opened = found.save(tmp_path / "list")
    for other in (opened, pickle.loads(pickle.dumps(opened))):
        assert isinstance(other.arrays["texts"], np.memmap)
        assert other.categories == found.categories
        assert all(
            str(other.of(i)) == str(found.of(i)) and other.name(i) == found.name(i)
            for i in range(5)
        )
    with pytest.raises(UserError, match="cannot read the list of objects"):
        coco.Objects.open(tmp_path)


def broken(**changes):
    return {**content(), **changes}


def without(key, field):
    found = content()
    found[key][0].pop(field)
    return found


def changed(key, **fields):
    found = content()
    found[key][0] |= fields
    return found


def segmented(**changes):
    return content()["annotations"][0]["segmentation"] | changes


def boxes_alone():
    found = content()
    for a in found["annotations"]:
        a |= {"segmentation": [], "bbox": [1, 2, 3, 4]}
    return found


@pytest.mark.parametrize(
    "given, words",
    [
        ([1, 2], "no COCO JSON: it has no list of images"),
        (broken(annotations=None), "it has no list of annotations"),
        (broken(categories={}), "it has no list of categories"),
        (broken(images=[3]), "it has no list of images"),
        (broken(images=[]), "0 images with 0 different ids"),
        (without("images", "height"), "1 of 5 images have no height"),
        (without("annotations", "category_id"), "1 of 7 annotations have no category_id"),
        (without("annotations", "segmentation"), "1 annotations have no segmentation: 0"),
        (changed("annotations", image_id=3), "annotation 0 is of an unknown image: 3"),
        (changed("annotations", category_id=3), "annotation 0 is of an unknown category: 3"),
        (changed("images", id=499), "5 images with 4 different ids"),
        (changed("categories", id=7), "3 categories with 2 different ids"),
        (broken(categories=[]), "0 categories"),
        (changed("images", id="a"), "id 'a' of images is no number"),
        (changed("images", height=0), "height 0 of images is no number that fits"),
        (changed("images", width="60"), "width '60' of images is no number"),
        (
            changed("annotations", segmentation=segmented(counts=[10, 5])),
            "0 has run lengths of 15 ",
        ),
        (
            changed("annotations", segmentation=[[1, 2, math.nan, 4, 5, 6]]),
            "a corner at nan, of an",
        ),
        (changed("annotations", segmentation=[[1, 2, 3, 4, 5, 601]]), "a corner at 601"),
        (boxes_alone(), "none of 6 objects has run lengths or a polygon of three points"),
    ],
)
def test_read_json__refuses_what_is_no_coco_json(root, given, words):
    (root / "annotations/instances_train2017.json").write_text(json.dumps(given))
    with pytest.raises(UserError, match=words):
        read(root)


def test_read_json__counts_objects_without_pixels(root):
    given = content()
    given["annotations"][1]["segmentation"] = [[1, 2, 3, 4], []]  # two points, none
    given["annotations"][4]["segmentation"] = [[0, 0, 640, 0, 640, 640]]  # ten sizes far: as it is
    write(root, given)
    found = read(root)
    assert found.left_out == 1 and found.of(0)[0].tolist() == [3] and read(root).of(2)[0].size == 1


def test_read_json__says_what_is_missing(root):
    path = root / "annotations/instances_train2017.json"
    for name in ("0.png", "sub/1.png"):
        (root / "train2017" / name).unlink()
    with pytest.raises(UserError, match=r"2 of 5 images are not in .*train2017: 0.png, sub/1.png"):
        read(root)
    path.write_text("{")
    with pytest.raises(UserError, match="is no JSON"):
        read(root)
    path.unlink()
    with pytest.raises(UserError, match="cannot read"):
        read(root)
    write(root)
    with pytest.raises(UserError, match="there is no folder"):
        coco.read_json(path, str(root / "elsewhere"))


def test_read_json__val_must_have_training_s_categories(root):
    found = read(root, categories=[[1, "more"], [2, "dot"], [7, "bar"], [90, "disc"]])
    assert found.of(0)[0].tolist() == [4, 3]
    with pytest.raises(UserError, match=r"categories that training does not have: \[90, 'disc'\]"):
        read(root, categories=[[2, "dot"], [7, "bar"], [90, "other"]])


# ---------------------------------------------------------------------------------------- geometry


def rectangle(view, x0, y0, x1, y1):
    """Where a rectangle of the image lies in the crop, before it is cut."""
    sy, sx = (a / b for a, b in zip(view.whole, view.original))
    x0, x1, y0, y1 = x0 * sx, x1 * sx, y0 * sy, y1 * sy
    if view.flip:
        x0, x1 = view.whole[1] - x1, view.whole[1] - x0
    return x0 - view.at[1], y0 - view.at[0], x1 - view.at[1], y1 - view.at[0]


VIEWS = [
    View((40, 60), (40, 60), (40, 60), (0, 0), False),
    View((40, 60), (40, 60), (40, 60), (0, 0), True),
    View((40, 60), (93, 140), (64, 64), (11, 30), False),
    View((40, 60), (93, 140), (64, 64), (29, 76), True),
    View((40, 60), (13, 20), (13, 20), (0, 0), True),
]


@pytest.mark.parametrize("view", VIEWS)
def test_mask__polygons_follow_the_image(view):
    tools = pytest.importorskip("pycocotools.mask")
    box = (12, 8, 45, 33)
    x0, y0, x1, y1 = rectangle(view, *box)
    polygon = [[box[0], box[1], box[2], box[1], box[2], box[3], box[0], box[3]]]
    found = view.mask(polygon, tools)
    h, w = view.kept
    y, x = np.mgrid[:h, :w] + 0.5
    want = (x > x0) & (x < x1) & (y > y0) & (y < y1)
    edge = np.minimum.reduce([abs(x - x0), abs(x - x1), abs(y - y0), abs(y - y1)]) <= 1
    assert found.shape == (h, w) and (found == want)[~edge].all() and found.any()


@pytest.mark.parametrize("view", VIEWS)
def test_mask__cut_polygons_are_those_of_the_whole_image(view):
    tools = pytest.importorskip("pycocotools.mask")
    torch.manual_seed(0)
    for _ in range(20):
        polygon = [(torch.rand(14) * 90 - 15).tolist()]  # some of it outside of the image
        whole = View(view.original, view.whole, view.whole, (0, 0), view.flip)
        (top, left), (h, w) = view.at, view.kept
        want = whole.mask(polygon, tools)[top : top + h, left : left + w]
        found = view.mask(polygon, tools)
        assert (found != want).mean() < 0.01  # a vertex is rounded from where it is


@pytest.mark.parametrize("view", VIEWS)
def test_mask__run_lengths_and_the_image_take_the_same_way(view):
    tools = pytest.importorskip("pycocotools.mask")
    torch.manual_seed(0)
    mask = F.interpolate(torch.rand(1, 1, 5, 7), (40, 60))[0, 0] > 0.5
    rgb = (mask * 255).byte()[None].repeat(3, 1, 1)
    found = view.mask(tools.encode(np.asfortranarray(mask.byte().numpy())), tools)
    seen = view.image(rgb, 64, (9, 9, 9))
    h, w = view.kept
    assert seen.shape == (3, 64, 64) and (seen[:, h:] == 9).all() and (seen[:, :, w:] == 9).all()
    sure = (seen[0, :h, :w] < 20) | (seen[0, :h, :w] > 235)  # the others are blurred by the resize
    same = (seen[0, :h, :w] > 127) == torch.from_numpy(found).bool()
    assert sure.float().mean() > 0.3 and same[sure].all()


def test_jitter__lsj_s_range_of_sizes_flips_and_places():
    jitter = Jitter(64, "lsj", (0.1, 2.0))
    views = [jitter.view(40, 60, seed) for seed in range(2000)]
    sides = np.array([v.whole[1] / 64 for v in views])
    assert 0.09 < sides.min() < 0.12 and 1.97 < sides.max() < 2.01
    assert np.allclose(np.quantile(sides, [0.25, 0.5, 0.75]), [0.575, 1.05, 1.525], atol=0.06)
    assert 0.46 < np.mean([v.flip for v in views]) < 0.54
    assert all(abs(v.whole[0] - v.whole[1] * 2 / 3) <= 1 for v in views)
    assert all(v.kept == tuple(min(64, n) for n in v.whole) for v in views)
    ends = [(v.at[1], v.whole[1] - v.kept[1]) for v in views]
    assert all(0 <= a <= b for a, b in ends)
    assert any(a == 0 < b for a, b in ends) and any(a == b > 0 for a, b in ends)
    assert jitter.view(40, 60, 5).__dict__ == jitter.view(40, 60, 5).__dict__


def test_jitter__tests_fit_the_whole_image():
    for size, want in {(40, 60): (43, 64), (100, 30): (64, 19), (9, 17): (34, 64)}.items():
        view = Jitter(64, "lsj", train=False).view(*size, 3)
        assert (view.whole, view.kept, view.at, view.flip) == (want, want, (0, 0), False)


@pytest.mark.parametrize("size, low, high", [((600, 800), 480, 800), ((400, 2000), 267, 267)])
def test_jitter__short_is_cfmae_s(size, low, high):
    jitter = Jitter(objects.CANVAS, "short")
    views = [jitter.view(*size, seed) for seed in range(300)]
    sides = [v.whole[0] for v in views]
    assert low <= min(sides) < low + 8 and high - 8 < max(sides) <= high
    assert all(max(v.whole) <= 1333 and v.kept == v.whole for v in views)
    test = Jitter(objects.CANVAS, "short", train=False).view(*size, 0)
    assert test.whole[0] == high and not test.flip
    half = Jitter(objects.CANVAS // 2, "short", train=False).view(*size, 0)
    assert abs(half.whole[0] - high / 2) <= 1


# ----------------------------------------------------------------------------------------- samples


def test_sample_of__drops_what_the_crop_lost_and_packs_the_rest():
    rgb, masks = torch.zeros(3, 20, 21, dtype=torch.uint8), np.zeros((3, 7, 13), np.uint8)
    masks[0, 2, 3:9], masks[2, 6, 12] = 1, 1
    sample = sample_of(rgb, masks, np.array([4, 5, 6]), ((7, 13), (70, 130)), 11, -1)
    assert sample["labels"].tolist() == [4, 6]
    assert sample["boxes"].tolist() == [[3, 2, 9, 3], [12, 6, 13, 7]]
    assert sample["masks"].shape == (2, 20, 3) and sample["masks"].dtype == torch.uint8
    whole = unpack(sample["masks"], 21)
    assert whole.shape == (2, 20, 21)
    assert (whole[:, :7, :13].numpy() == masks[[0, 2]]).all() and whole.sum() == 7
    assert sample["scaled"].tolist() == [7, 13] and sample["original"].tolist() == [70, 130]


def test_collate__fills_up_and_passes_errors_on(root):
    pytest.importorskip("pycocotools")
    found = CocoImages(str(root / "train2017"), read(root), Jitter(64, train=False))
    samples = [found[0, i] for i in range(5)]
    batch = collate(samples)
    assert batch["rgb"].shape == (5, 3, 64, 64) and batch["boxes"].shape == (5, 2, 4)
    assert batch["labels"].tolist() == [[3, 2], [2, 0], [3, 0], [3, 0], [0, 0]]
    assert batch["masks"].shape == (5, 2, 64, 8)
    for i, sample in enumerate(samples):
        n = len(sample["labels"])
        assert torch.equal(batch["masks"][i, :n], sample["masks"])
        assert torch.equal(batch["boxes"][i, :n], sample["boxes"])
    assert collate([samples[4]])["boxes"].shape == (1, 0, 4)
    assert collate([samples[0], {"error": "first"}, {"error": "second"}]) == {"error": "first"}


def test_coco_images__objects_of_an_odd_folder(root):
    pytest.importorskip("pycocotools")
    found = CocoImages(str(root / "train2017"), read(root), Jitter(64, train=False))
    assert found.classes == ["dot", "bar", "disc"] and len(found) == 5
    data.check(found)
    # 64 x 64 is the crop itself: pixels and boxes are those of the file
    same = found[0, 2]
    assert same["boxes"].tolist() == [[40, 40, 64, 64]] and same["bad"] == -1
    small = found[0, 1]  # one pixel of 100 rows is lost at 64, and with it its object
    assert small["labels"].tolist() == [2] and small["boxes"].tolist() == [[0, 0, 19, 32]]
    large = CocoImages(found.folder, found.files, Jitter(100, train=False))[0, 1]
    assert large["labels"].tolist() == [1, 2] and large["boxes"][0].tolist() == [11, 70, 12, 71]
    empty = found[0, 4]
    assert empty["boxes"].shape == (0, 4) and empty["masks"].shape == (0, 64, 8)
    for epoch in range(8):  # any jitter of any image gives a batch
        one = CocoImages(found.folder, found.files, Jitter(64), seed=epoch)
        batch = collate([one[epoch, i] for i in range(5)])
        boxes = batch["boxes"][batch["labels"] > 0]
        assert (
            (boxes[:, 2:] - boxes[:, :2] >= 1).all() and (boxes >= 0).all() and (boxes <= 64).all()
        )


def test_coco_images__bad_files(root):
    pytest.importorskip("pycocotools")
    (root / "train2017/3.png").write_bytes(b"no image")
    found = CocoImages(str(root / "train2017"), read(root), Jitter(64, train=False))
    replaced = found[0, 3]
    assert replaced["bad"] == 3 and replaced["labels"].tolist() == []  # the next one's
    files = read(root)
    files.arrays["sizes"][0] = (60, 40)
    turned = CocoImages(found.folder, files, Jitter(64))[0, 0]
    assert "0.png is displayed at 60 x 40, its JSON has 40 x 60; does EXIF" in turned["error"]
    wrong = content()
    wrong["annotations"][0]["segmentation"]["size"] = [10, 10]
    write(root, wrong)
    bad = CocoImages(found.folder, read(root), Jitter(64))[0, 0]
    assert "run lengths of size [10, 10]" in bad["error"]
    wrong["annotations"][0]["segmentation"] = {"size": [40, 60], "counts": "zz!!"}
    write(root, wrong)
    bad = CocoImages(found.folder, read(root), Jitter(64))[0, 0]
    assert bad["error"] == "0.png: Invalid RLE mask representation"


def test_scenes__objects_are_those_of_the_maps():
    scenes = Scenes("val", 64, False, length=12)
    assert scenes.classes == list(SHAPES) and scenes.categories[0] == [1, "disc"]
    for i in range(12):
        scene, sample = scenes.scenes[0, i], scenes[0, i]
        masks = unpack(sample["masks"], 64).bool()
        ids = [k for k in scene["instance"].unique().tolist() if k not in (0, 255)]
        assert len(masks) == len(ids) > 0
        for k, mask, label in zip(ids, masks, sample["labels"].tolist()):
            assert torch.equal(mask, scene["instance"] == k)
            kinds = scene["semantic"][mask].unique().tolist()
            assert kinds == [label - 1 + 6] and 1 <= label <= len(CATEGORIES) + 7
    train = Scenes("train", 64, True)
    assert not torch.equal(train[0, 0]["rgb"], train[1, 0]["rgb"])
    assert torch.equal(train[1, 0]["masks"], Scenes("train", 64, True)[1, 0]["masks"])


def test_mask_tools__absent_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "pycocotools", None)
    with pytest.raises(UserError, match="pip install pycocotools"):
        coco.mask_tools()
