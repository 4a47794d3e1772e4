"""A small folder of COCO's format, odd on purpose, for tests of detection."""

import copy
import json

import numpy as np
import torch
from PIL import Image

CATEGORIES = [{"id": 90, "name": "disc"}, {"id": 7, "name": "bar"}, {"id": 2, "name": "dot"}]
SIZES = [(40, 60), (100, 30), (64, 64), (9, 17), (50, 50)]  # (h, w); crops here have 64


def runs(mask):
    """Uncompressed run lengths of a mask (h, w), column by column, as COCO's crowds have them."""
    flat = mask.T.ravel().astype(int)
    ends = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *ends, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def box_polygon(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def content():
    """What the JSON holds: polygons of one and two parts, run lengths, a crowd, one pixel, an
    object that touches the border, an image without objects."""
    disc = (np.hypot(*np.mgrid[-20:20, -30:30]) < 12).astype(np.uint8)
    lone = np.zeros((100, 30), np.uint8)
    lone[70, 11] = 1
    rows = [
        (0, 90, runs(disc), 0),
        (0, 7, [[2, 3, 20, 3, 20, 9, 2, 9], [30, 30, 59.5, 30, 59.5, 39.5, 30, 39.5]], 0),
        (1, 2, runs(lone), 0),
        (1, 7, box_polygon(0, 0, 30, 50), 0),
        (2, 90, box_polygon(40, 40, 64, 64), 0),
        (2, 7, runs(np.ones((64, 64), np.uint8)), 1),
        (3, 90, box_polygon(3.2, 2.1, 12.8, 7.9), 0),
    ]
    annotations = [
        {"id": n, "image_id": 500 - i, "category_id": c, "segmentation": s, "iscrowd": crowd}
        for n, (i, c, s, crowd) in enumerate(rows)
    ]
    images = [
        {
            "id": 500 - i,
            "file_name": f"sub/{i}.png" if i == 1 else f"{i}.png",
            "height": h,
            "width": w,
        }
        for i, (h, w) in enumerate(SIZES)
    ]
    return {"images": images, "annotations": annotations, "categories": copy.deepcopy(CATEGORIES)}


def write(root, given=None, split="train"):
    """Write images and JSON where COCO has them; the JSON's content."""
    found = given or content()
    folder = root / f"{split}2017"
    (folder / "sub").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    for image in found["images"]:
        h, w = image["height"], image["width"]
        pixels = torch.randint(0, 255, (h, w, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(folder / image["file_name"])
    path = root / f"annotations/instances_{split}2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found))
    return found
