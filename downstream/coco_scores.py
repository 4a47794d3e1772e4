"""Detection's scores: predictions of a whole split in COCO's format, scored by pycocotools.

Whole, predict    every image of a split once, shared out over the ranks
truth             ground truth as pycocotools takes it
score             COCO's 12 numbers for boxes, 12 for masks, and those of each category
"""

import contextlib
import io
import json
from pathlib import Path

import engine  # before torch: it sets how threads wait

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from data import Unreadable, UserError
from downstream.coco import load_json, mask_tools, polygons
from downstream.mask_rcnn import paste
from downstream.pixels import read_share
from engine.ranks import World

NUMBERS = "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()  # in COCOeval's order


class Whole(Dataset):
    """Images of a split as the tests take them, see objects.py; `index` is in each sample.

    An unreadable image is {"unreadable": message}, another mistake {"error": message}.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        try:
            sample = self.dataset.sample(index, 0)
        except Unreadable as e:
            return {"unreadable": str(e)}
        except UserError as e:
            return {"error": str(e)}
        kept = ("rgb", "scaled", "original")  # objects are the scorer's
        return {k: sample[k] for k in kept} | {"index": torch.tensor(index)}


def fit(found: dict[str, Tensor], scaled: list[int], original: list[int]) -> dict[str, Tensor]:
    """Objects of a padded image, as `Detector.predict`, in the pixels of the image on disk.

    Args: `scaled`, `original`: (h, w) of the image in the crop, and on disk.
    Returns: boxes (n, 4), labels (n,), scores (n,), masks (n, h, w) bool.
    """
    (h, w), (H, W) = scaled, original
    unit = found["boxes"].new_tensor([W / w, H / h, W / w, H / h])
    low, high = torch.zeros_like(unit), unit.new_tensor([W, H, W, H])
    boxes = found["boxes"] * unit
    masks, inside = paste(found["masks"], boxes, (H, W)), boxes.clamp(low, high)
    kept = (inside[:, 2] > inside[:, 0]) & (inside[:, 3] > inside[:, 1])
    rows = {"boxes": inside, "labels": found["labels"], "scores": found["scores"], "masks": masks}
    return {k: v[kept] for k, v in rows.items()}


def entries(found: dict[str, Tensor], image: int, categories: list, tools) -> list[dict]:
    """Objects of an image, as `fit` gives them, as rows of a results file of COCO's."""
    x0, y0, x1, y1 = found["boxes"].double().cpu().T
    boxes = torch.stack([x0, y0, x1 - x0, y1 - y0], dim=1).tolist()
    masks = np.asfortranarray(found["masks"].cpu().numpy().astype(np.uint8).transpose(1, 2, 0))
    runs = tools.encode(masks) if masks.shape[2] else []
    rows = zip(boxes, found["labels"].tolist(), found["scores"].tolist(), runs)
    return [
        {
            "image_id": image,
            "category_id": categories[label - 1][0],
            "bbox": [round(x, 3) for x in box],
            "score": score,
            "segmentation": {"size": run["size"], "counts": run["counts"].decode()},
        }
        for box, label, score, run in rows
    ]


@torch.no_grad()
def predict(
    model: nn.Module, dataset: Dataset, categories: list, cfg: object, world: World, out: Path
) -> tuple[int, int]:
    """Predict all of a split, each rank its share, into predictions.json.

    Args: `categories`: [[id, name], ...], label 1 first; `cfg`: micro_batch and workers.
    Returns: images that were read, and those that could not be.
    """
    model.eval()
    tools, found = mask_tools(), {}
    for samples in read_share(Whole(dataset), cfg, world):
        with world.autocast():
            objects = model.predict(torch.stack([s["rgb"] for s in samples]).to(world.device))
        for s, x in zip(samples, objects):
            index = int(s["index"])
            fitted = fit(x, s["scaled"].tolist(), s["original"].tolist())
            found[index] = entries(fitted, dataset.id(index), categories, tools)
    parts = [out / f"predictions-{r}.json" for r in range(world.size)]
    with engine.writing(part := parts[world.rank]):
        part.write_text(json.dumps([*found.items()]))
    world.maximum(0)  # all ranks have written
    if world.rank:
        return 0, 0
    rows = sorted(row for part in parts for row in json.loads(part.read_text()))  # by index
    with engine.writing(path := out / "predictions.json"):
        path.write_text(json.dumps([entry for _, image in rows for entry in image]))
    for part in parts:
        part.unlink()
    return len(rows), len(dataset) - len(rows)


def truth(dataset: Dataset, path: str | None, categories: list) -> dict:
    """Ground truth in COCO's format: of a JSON file, or of a data set without one.

    Numbers of objects are made anew: pycocotools takes an object 0 for none. Areas that are not
    given are those of the masks.
    """
    tools = mask_tools()
    if path:
        content = load_json(path)
        sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
        annotations = [dict(a) for a in content["annotations"]]
        for a in annotations:
            run = run_lengths(a.get("segmentation") or [], sizes[a["image_id"]], tools)
            a["segmentation"] = run
            a["iscrowd"] = a.get("iscrowd") or 0
            if a.get("area") is None:
                a["area"] = float(tools.area(run))
            if not a.get("bbox"):
                a["bbox"] = tools.toBbox(run).tolist()
        images = content["images"]
    else:
        images, annotations = [], []
        for i in range(len(dataset)):
            sample = dataset.sample(i)
            H, W = sample["rgb"].shape[1:]
            images.append({"id": dataset.id(i), "height": H, "width": W, "file_name": ""})
            masks = np.unpackbits(sample["masks"].numpy(), axis=2)[..., :W]
            runs = tools.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
            for label, run in zip(sample["labels"].tolist(), runs):
                annotations.append({
                    "image_id": dataset.id(i), "category_id": categories[label - 1][0],
                    "segmentation": run, "area": float(tools.area(run)), "iscrowd": 0,
                    "bbox": tools.toBbox(run).tolist(),
                })  # fmt: skip
    for number, a in enumerate(annotations, start=1):
        a["id"] = number
    kinds = [{"id": i, "name": name} for i, name in categories]
    return {"images": images, "annotations": annotations, "categories": kinds}


def run_lengths(segmentation: list | dict, size: tuple[int, int], tools) -> dict:
    """One object's run lengths, compressed, of whatever form COCO has; without any, no pixel."""
    if isinstance(segmentation, dict):
        whole = isinstance(segmentation["counts"], (str, bytes))
        return segmentation if whole else tools.frPyObjects(segmentation, *segmentation["size"])
    if not polygons(segmentation):
        return tools.encode(np.zeros(size, np.uint8, order="F"))
    return tools.merge(tools.frPyObjects(polygons(segmentation), *size))


def score(content: dict, predictions: list[dict]) -> tuple[dict, list[dict]]:
    """COCO's numbers, by pycocotools.

    Args: `content`: ground truth in COCO's format; `predictions`: a results file's rows.
    Returns: {"box": {AP, ...}, "mask": {...}}, None where there is nothing to find; for each
        category, its id, name, objects, box AP and mask AP.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints what it does
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval

        true, nothing = COCO(), COCO()
        true.dataset = content
        true.createIndex()
        nothing.dataset = {**content, "annotations": []}
        nothing.createIndex()
        numbers, tables = {}, {}
        for kind, name in (("bbox", "box"), ("segm", "mask")):
            # beside a box pycocotools takes the box's area for the mask's; detectron2 drops it, too
            drop = "bbox" if kind == "segm" else ""
            found = [{k: v for k, v in p.items() if k != drop} for p in predictions]
            evaluation = COCOeval(true, true.loadRes(found) if found else nothing, kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
            numbers[name] = dict(zip(NUMBERS, map(known, evaluation.stats)))
            tables[name] = evaluation.eval["precision"][:, :, :, 0, -1]  # IoU, recall, category
            order = [int(i) for i in evaluation.params.catIds]
    rows = []
    for i, category in enumerate(order):
        ap = {k: x[:, :, i][x[:, :, i] > -1] for k, x in tables.items()}
        row = {"id": category, "name": true.cats[category]["name"]}
        row |= {"objects": len(true.getAnnIds(catIds=[category], iscrowd=False))}
        rows.append(row | {f"{k}_AP": float(x.mean()) if x.size else None for k, x in ap.items()})
    return numbers, rows


def known(x: float) -> float | None:
    return None if x < 0 else float(x)
