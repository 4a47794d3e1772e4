"""Scores: pycocotools' own numbers, perfect predictions, crowds, other forms of truth."""

import contextlib
import io
import json
import types

import numpy as np
import pytest
import torch

from coco_folder import write
from downstream import coco, coco_scores
from downstream.coco_scores import NUMBERS, entries, fit, predict, score, truth
from downstream.detect import draw
from downstream.objects import CocoImages, Jitter, Scenes
from engine.ranks import World

pytestmark = pytest.mark.slow

tools = pytest.importorskip("pycocotools.mask")


@pytest.fixture
def dataset(tmp_path):
    write(tmp_path)
    path = tmp_path / "annotations/instances_train2017.json"
    objects = coco.read_json(path, str(tmp_path / "train2017"))
    return CocoImages(str(tmp_path / "train2017"), objects, Jitter(64, train=False)), str(path)


def perfect(found):
    """Predictions that are the truth, of what is no crowd."""
    rows = []
    for a in found["annotations"]:
        if not a["iscrowd"]:
            row = {k: a[k] for k in ("image_id", "category_id", "bbox")}
            sizes = {i["id"]: (i["height"], i["width"]) for i in found["images"]}
            run = coco_scores.run_lengths(a["segmentation"], sizes[a["image_id"]], tools)
            rows.append(row | {"segmentation": run, "score": 0.9})
    return rows


def alone(found, predictions, kind):
    """COCO's twelve numbers as pycocotools' own example takes them."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        true = COCO()
        true.dataset = json.loads(json.dumps(found, default=lambda b: b.decode()))
        true.createIndex()
        evaluation = COCOeval(true, true.loadRes(predictions), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats.tolist()


def test_score__perfect_predictions_are_worth_one(dataset):
    found = truth(*dataset, dataset[0].categories)
    numbers, rows = score(found, perfect(found))
    for kind in ("box", "mask"):
        assert list(numbers[kind]) == NUMBERS
        assert all(numbers[kind][k] == pytest.approx(1) for k in ("AP", "AP50", "AP75", "AR100"))
        assert all(row[f"{kind}_AP"] == pytest.approx(1) for row in rows)
    assert [(r["id"], r["name"], r["objects"]) for r in rows] == [
        (2, "dot", 1), (7, "bar", 2), (90, "disc", 3),
    ]  # fmt: skip
    assert numbers["box"]["APl"] is None  # nothing is that large


def test_score__worse_predictions_get_pycocotools_own_numbers(dataset):
    found = truth(*dataset, dataset[0].categories)
    rng, predictions = np.random.default_rng(0), []
    for row in perfect(found) * 3:
        box = (np.array(row["bbox"]) + rng.normal(size=4) * 2).clip(0.5).tolist()
        predictions.append({**row, "bbox": box, "score": rng.random()})
    numbers, rows = score(found, predictions)
    for kind, name in (("bbox", "box"), ("segm", "mask")):
        want = [None if x < 0 else x for x in alone(found, predictions, kind)]
        assert list(numbers[name].values()) == want
        aps = [r[f"{name}_AP"] for r in rows]
        assert np.mean(aps) == pytest.approx(numbers[name]["AP"])
    assert 0 < numbers["box"]["AP"] < 1


def test_score__sizes_of_masks_are_not_those_of_their_boxes():
    """A thin cross of 3,100 pixels is medium; an angle as thin is wrong there, and comes first."""
    drawn = np.zeros((200, 200, 2), np.uint8, order="F")
    drawn[20:180, 90:100, 0] = drawn[90:100, 20:180, 0] = 1
    drawn[20:180, 20:30, 1] = drawn[20:30, 20:180, 1] = 1
    cross, angle = tools.encode(drawn)
    base = {"image_id": 1, "category_id": 1, "bbox": [20, 20, 160, 160]}
    content = {
        "images": [{"id": 1, "height": 200, "width": 200}], "categories": [{"id": 1, "name": "x"}],
        "annotations": [base | {"id": 1, "segmentation": cross, "area": 3100, "iscrowd": 0}],
    }  # fmt: skip
    found = [
        base | {"segmentation": angle, "score": 0.9},
        base | {"segmentation": cross, "score": 0.5},
    ]
    numbers, _ = score(content, found)
    assert numbers["mask"]["APm"] == pytest.approx(0.5) and numbers["mask"]["APl"] is None


def test_score__no_predictions_are_worth_nothing(dataset):
    numbers, rows = score(truth(*dataset, dataset[0].categories), [])
    assert numbers["box"]["AP"] == 0 == numbers["mask"]["AR100"]
    assert all(row["mask_AP"] == 0 for row in rows)


def test_truth__crowds_are_neither_missed_nor_wrong(dataset):
    found = truth(*dataset, dataset[0].categories)
    crowd = next(a for a in found["annotations"] if a["iscrowd"])
    assert crowd["area"] == 64 * 64 and crowd["bbox"] == [0, 0, 64, 64]
    extra = {"image_id": 498, "category_id": 7, "bbox": [5, 5, 9, 9], "score": 0.99}
    inside = np.zeros((64, 64), np.uint8, order="F")
    inside[5:14, 5:14] = 1
    extra["segmentation"] = tools.encode(inside)
    numbers, _ = score(found, [*perfect(found), extra])
    assert numbers["box"]["AP"] == numbers["mask"]["AP"] == pytest.approx(1)
    crowd["iscrowd"] = 0  # as an object it would count
    numbers, _ = score(found, [*perfect({**found, "annotations": found["annotations"]}), extra])
    assert numbers["box"]["AP"] < 1


def test_truth__an_object_of_number_0_counts(dataset):
    given = json.loads(open(dataset[1]).read())
    assert given["annotations"][0]["id"] == 0
    assert [a["id"] for a in truth(*dataset, dataset[0].categories)["annotations"]] == [
        *range(1, 8)
    ]


def test_truth__an_object_without_pixels_is_missed_but_breaks_nothing(dataset):
    given = json.loads(open(dataset[1]).read())
    box = {"image_id": 496, "category_id": 90, "bbox": [1, 2, 10, 10], "area": 100}
    given["annotations"] += [{**box, "segmentation": []}, {**box, "segmentation": [[1, 2, 3, 4]]}]
    open(dataset[1], "w").write(json.dumps(given))
    numbers, rows = score(truth(*dataset, dataset[0].categories), [])
    assert rows[2]["objects"] == 5 and numbers["mask"]["AP"] == 0


def test_truth__scenes():
    scenes = Scenes("val", 64, False, length=4)
    found = truth(scenes, None, scenes.categories)
    numbers, _ = score(found, perfect(found))
    assert numbers["mask"]["AP"] == pytest.approx(1)
    counts = [len(scenes[0, i]["labels"]) for i in range(4)]
    assert len(found["annotations"]) == sum(counts) and len(found["images"]) == 4


def test_fit__boxes_and_masks_in_the_pixels_of_the_image():
    masks = torch.ones(3, 28, 28)
    masks[1, :, :14] = 0  # the part that lies outside the image
    boxes = torch.tensor([[8.0, 4, 16, 12], [-4, 0, 4, 8], [50, 0, 64, 32]])
    found = fit(
        {"boxes": boxes, "masks": masks, "labels": torch.tensor([1, 2, 3]),
         "scores": torch.rand(3)}, [32, 48], [64, 144],
    )  # fmt: skip
    assert found["boxes"].tolist() == [[24, 8, 48, 24], [0, 0, 12, 16]]  # the third was padding
    assert found["labels"].tolist() == [1, 2] and found["masks"].shape == (2, 64, 144)
    want = torch.zeros(64, 144, dtype=torch.bool)
    want[8:24, 24:48] = True
    assert torch.equal(found["masks"][0], want) and found["masks"][1][:16, :12].all()
    row = entries(found, 77, [[5, "a"], [9, "b"], [11, "c"]], tools)[0]
    assert row["bbox"] == [24, 8, 24, 16] and (row["image_id"], row["category_id"]) == (77, 5)
    assert (tools.decode({**row["segmentation"]}) == want.numpy()).all()
    json.dumps(row)


class Oracle(torch.nn.Module):
    """Predicts what the data set holds: boxes of the crop, and masks cut out of it."""

    def __init__(self, dataset):
        super().__init__()
        self.samples = [dataset.sample(i, 0) for i in range(len(dataset)) if i != 3]

    def predict(self, rgb):
        from downstream.mask_rcnn import crops, unpack

        assert not self.training  # the RPN keeps other numbers of boxes then
        found = []
        for image in rgb:
            s = next(s for s in self.samples if torch.equal(s["rgb"], image))
            n = len(s["labels"])
            masks = crops(unpack(s["masks"], 64), s["boxes"], torch.arange(n))
            found.append({**s, "masks": masks, "scores": torch.linspace(0.9, 0.8, n)})
        return found


def test_predict__an_oracle_through_the_whole_way(dataset, tmp_path):
    found, path = dataset
    cfg = types.SimpleNamespace(micro_batch=2, workers=0)
    oracle = Oracle(found)
    (tmp_path / "train2017/3.png").write_bytes(b"unreadable")
    counts = predict(oracle, found, found.categories, cfg, World("cpu", "fp32"), tmp_path)
    assert counts == (4, 1)
    predictions = json.loads((tmp_path / "predictions.json").read_text())
    assert {p["image_id"] for p in predictions} == {500, 499, 498}
    numbers, rows = score(truth(found, path, found.categories), predictions)
    recalls = {r["name"]: r["box_AP"] for r in rows}
    # lost: the lone pixel, which the crop of 64 has not, and the object of the unreadable image
    assert recalls["dot"] == 0 and recalls["bar"] > 0.9 and 0.6 < recalls["disc"] < 0.75
    assert not list(tmp_path.glob("predictions-*"))


def test_draw__shows_objects_in_their_colours():
    rgb, masks = torch.zeros(3, 64, 64, dtype=torch.uint8), torch.zeros(1, 64, 64)
    masks[0, 10:20, 10:20] = 1
    boxes = torch.tensor([[10.0, 10, 20, 20]])
    found = draw(rgb, boxes, masks > 0, torch.tensor([3]), ["star"])
    assert found.shape == (3, 320, 320) and found[:, 60:90, 60:90].any()
    assert not found[:, 150:, 150:].any()
    assert draw(rgb, boxes[:0], masks[:0] > 0, torch.zeros(0, dtype=torch.int64), []).sum() == 0


def test_draw__the_first_of_masks_that_overlap():
    rgb, one, both = torch.zeros(3, 320, 320, dtype=torch.uint8), torch.tensor([3]), [3, 5]
    masks = torch.zeros(2, 320, 320, dtype=torch.bool)
    masks[0, 100:200, 100:200] = masks[1, 150:250, 150:250] = True
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9]])
    alone = draw(rgb, boxes[:1], masks[:1], one, [""])
    found = draw(rgb, boxes, masks, torch.tensor(both), ["", ""])
    assert found[:, 160, 160].tolist() == alone[:, 160, 160].tolist() != [0, 0, 0]
    assert found[:, 240, 240].any() and (found[:, 240, 240] != found[:, 160, 160]).any()
