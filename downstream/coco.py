"""Files of COCO's format, as flat arrays that all workers share.

load_json     a file, whole
read_json     a file and its images, checked -> Objects
Objects       images and their segmentations, mapped from a run's folder
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import UserError


def mask_tools():
    """pycocotools.mask; UserError where it is not installed."""
    try:
        from pycocotools import mask
    except ImportError:
        words = "detection reads and scores objects with pycocotools: pip install pycocotools"
        raise UserError(words) from None
    return mask


def load_json(path: str | Path) -> dict:
    """A file of COCO's format, whole; UserError where it is none."""
    try:
        with open(path) as file:
            content = json.load(file)
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is no JSON: {e}") from None
    for key, fields in (
        ("images", ("id", "file_name", "height", "width")),
        ("annotations", ("image_id", "category_id")),
        ("categories", ("id", "name")),
    ):
        rows = content.get(key) if isinstance(content, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise UserError(f"{path} is no COCO JSON: it has no list of {key}")
        for field in fields:
            if lacking := sum(row.get(field) is None for row in rows):
                raise UserError(f"{path}: {lacking} of {len(rows)} {key} have no {field}")
            least = {"id": -math.inf, "height": 1, "width": 1}.get(field)
            for value in (row[field] for row in rows if least is not None):
                if not isinstance(value, (int, float)) or value < least:
                    raise UserError(f"{path}: {field} {value!r} of {key} is no number that fits")
    return content


def usable(segmentation: object) -> bool:
    """Whether it is run lengths, or polygons of three points or more."""
    if isinstance(segmentation, dict):
        return {"counts", "size"} <= segmentation.keys()
    return bool(polygons(segmentation))


def misfit(segmentation: list | dict, height: int, width: int) -> str | None:
    """What is wrong with a usable segmentation of an image of such a size; None: nothing.

    pycocotools walks along the edges of a polygon: a corner in the infinite takes all memory.
    """
    if isinstance(segmentation, dict):
        runs = segmentation["counts"]
        found = sum(runs) if isinstance(runs, list) else height * width
        return None if found == height * width else f"run lengths of {found} pixels"
    far = 10 * max(height, width)
    for polygon in polygons(segmentation):
        corners = np.array(polygon, float)
        if not (np.abs(corners) <= far).all():  # nor where it is no number
            return f"a corner at {corners[~(np.abs(corners) <= far)][0]}"
    return None


def polygons(segmentation: list) -> list[list[float]]:
    return [p for p in segmentation if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0]


def first_few(names: Sequence, count: int = 5) -> str:
    return ", ".join(map(str, names[:count])) + (", ..." if len(names) > count else "")


def check_names(folder: str, names: Sequence[str]) -> None:
    """UserError with the count and the first names of images that are not there."""
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}; its images are listed in the JSON")
    known = set(os.listdir(folder))  # once: a call per name takes hours on a network file system
    lost = [n for n in names if n not in known and not os.path.isfile(f"{folder}/{n}")]
    if lost:
        raise UserError(
            f"{len(lost)} of {len(names)} images are not in {folder}: {first_few(lost)}"
        )


def read_json(path: str | Path, folder: str, categories: list | None = None) -> "Objects":
    """Read a file of COCO's format, without crowds, and make sure that its images are there.

    Args: `categories`: [[id, name], ...] of training, which `path` must agree with; None: its own.
    """
    content = load_json(path)
    own = sorted([c["id"], c["name"]] for c in content["categories"])
    numbers = {row[0]: i for i, row in enumerate(categories or own, start=1)}
    if unknown := [c for c in own if c not in (categories or own)]:
        raise UserError(f"{path} has categories that training does not have: {first_few(unknown)}")
    if len(numbers) != len(categories or own) or not numbers:
        raise UserError(f"{path}: {len(own)} categories with {len(numbers)} different ids")
    images = content["images"]
    place = {image["id"]: i for i, image in enumerate(images)}
    if len(place) != len(images) or not images:
        raise UserError(f"{path}: {len(images)} images with {len(place)} different ids")
    rows, left_out = sort_out(path, content, place, numbers)
    check_names(folder, [str(image["file_name"]) for image in images])
    texts = [json.dumps(s, separators=(",", ":")).encode() for row in rows for _, s in row]
    arrays = {
        "names": np.array([os.fsencode(str(image["file_name"])) for image in images]),
        "ids": np.array([image["id"] for image in images], np.int64),
        "sizes": np.array([(image["height"], image["width"]) for image in images], np.int32),
        "first": np.cumsum([0, *map(len, rows)]),
        "labels": np.array([label for row in rows for label, _ in row], np.int32),
        "starts": np.cumsum([0, *map(len, texts)]),
        "texts": np.frombuffer(b"".join(texts), np.uint8),
    }
    return Objects(arrays, categories or own, left_out=left_out)


def sort_out(
    path: str | Path, content: dict, place: dict, numbers: dict
) -> tuple[list[list[tuple[int, list | dict]]], int]:
    """The objects of each image, label and segmentation, and how many were left out, without any
    pixel. Args: `place` of an image by its id; `numbers`, labels by the category's id.
    """
    rows, lacking, objects = [[] for _ in place], [], 0
    for a in content["annotations"]:
        for known, table in (("image", place), ("category", numbers)):
            if a[f"{known}_id"] not in table:
                words = f"is of an unknown {known}: {a[f'{known}_id']}"
                raise UserError(f"{path}: annotation {a.get('id')} {words}")
        i, given = place[a["image_id"]], a.get("segmentation")
        h, w = (content["images"][i][k] for k in ("height", "width"))
        whole = isinstance(given, (list, dict)) and usable(given)
        if whole and (words := misfit(given, h, w)):
            words += f", of an image of {h} x {w}"
            raise UserError(f"{path}: annotation {a.get('id')} has {words}")
        if a.get("iscrowd"):  # neither object nor background; the evaluation knows them
            continue
        objects += 1
        if not isinstance(given, (list, dict)):
            lacking.append(a.get("id"))
        elif whole:
            rows[i].append((numbers[a["category_id"]], given))
    if lacking:
        words = f"{len(lacking)} annotations have no segmentation: {first_few(lacking)}"
        raise UserError(f"{path}: {words}")
    found = sum(map(len, rows))
    if objects and not found:
        raise UserError(
            f"{path}: none of {objects} objects has run lengths or a polygon of three points, and "
            "masks cannot be learned from boxes"
        )
    return rows, objects - found


class Objects:
    """Images of one split and their objects; arrays alone, so that workers share them.

    Args:
        arrays: names (n,) bytes; ids (n,); sizes (n, 2) height and width; first (n + 1,) object of
            each image; labels (m,) from 1; starts (m + 1,) of each segmentation in texts, JSON.
        categories: [[id, name], ...], label 1 first.
        left_out: objects of the JSON that have no pixels, known when it is read.
    """

    NAMES = ("names", "ids", "sizes", "first", "labels", "starts", "texts")

    def __init__(
        self, arrays: dict[str, np.ndarray], categories: list, place: str | None = None,
        left_out: int = 0,
    ):  # fmt: skip
        self.arrays, self.categories, self.place = arrays, categories, place
        self.left_out = left_out

    def save(self, place: str | Path) -> "Objects":
        """Write the arrays into a folder, its description last, and return them mapped."""
        os.makedirs(place, exist_ok=True)
        for k, x in self.arrays.items():
            np.save(f"{place}/{k}.npy", x)
        with open(f"{place}/objects.json.tmp", "w") as file:
            json.dump(self.categories, file)
        os.replace(f"{place}/objects.json.tmp", f"{place}/objects.json")
        return Objects.open(place)

    @classmethod
    def open(cls, place: str | Path) -> "Objects":
        try:
            arrays = {k: np.load(f"{place}/{k}.npy", mmap_mode="r") for k in cls.NAMES}
            with open(f"{place}/objects.json") as file:
                return cls(arrays, json.load(file), str(place))
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read the list of objects in {place}: {error}") from None

    def __reduce__(self):  # a worker that is started afresh maps the files again
        parts = (self.arrays, self.categories)
        return (Objects.open, (self.place,)) if self.place else (Objects, parts)

    def __len__(self) -> int:
        return len(self.arrays["ids"])

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self.arrays["names"][index]))

    def of(self, index: int) -> tuple[np.ndarray, list]:
        """Labels (k,) from 1 and segmentations, as the JSON has them, of an image."""
        first, last = self.arrays["first"][index : index + 2].tolist()
        ends = self.arrays["starts"][first : last + 1].tolist()
        texts = [bytes(self.arrays["texts"][a:b]) for a, b in zip(ends, ends[1:])]
        return np.array(self.arrays["labels"][first:last]), [json.loads(t) for t in texts]
