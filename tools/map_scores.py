"""How well maps agree with others of the same images: panoptic quality, mIoU, instance recall.

The counts come from pairs of ids (bincount), so an image costs milliseconds:

    panoptic    segments, matched where they overlap by more than half: PQ = SQ x RQ
    confusion   pixels by (true class, found class): mIoU, and which class a cluster is mostly
    recall      best overlap of each true instance, classes aside: AR over IoU 0.5, 0.55 .. 0.95

Panoptic quality: "Panoptic Segmentation", arXiv 1801.00868, Eq. 1. As no two segments of a map
overlap, a found segment with IoU > 0.5 is the only one, and no score is needed to rank any.
"""

import os
import sys
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

import files
from data import UNLABELLED, UserError
from tools.map_files import MAPS, pngs, read

CLASSES = 256  # ids of a semantic map, UNLABELLED among them
THRESHOLDS = np.arange(50, 100, 5) / 100  # COCO's, of IoU


def objects(instance: np.ndarray) -> np.ndarray:
    """Where there is an instance: neither background nor unlabelled."""
    return (instance != 0) & (instance != (UNLABELLED if instance.dtype.itemsize == 1 else 65535))


def distinct(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ids there are, and which of them each pixel has; np.unique sorts, and takes long."""
    there = np.bincount(ids.ravel()) > 0
    return np.flatnonzero(there).astype(ids.dtype), (np.cumsum(there) - 1)[ids]


def segments(instance: np.ndarray, semantic: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut a picture: each instance is a segment, and so is each class outside of instances.

    An instance has the class that most of its pixels have; pixels without a label in either map
    are void.

    Returns: (H, W) int64, the segment of each pixel, 0 the void; (n,) int64, segments' classes.
    """
    inside = objects(instance)
    key = np.where(inside, CLASSES + instance.astype(np.int64), semantic)
    key[(instance != 0) & ~inside] = UNLABELLED
    found, index = distinct(key)
    votes = overlaps(index, semantic, len(found), CLASSES)
    votes[:, UNLABELLED] = 0  # an instance is void where all of it is
    votes[found == UNLABELLED] = 0
    classes = np.where(votes.any(1), votes.argmax(1), UNLABELLED)
    table = np.where(classes == UNLABELLED, 0, np.cumsum(classes != UNLABELLED))
    kept = np.r_[UNLABELLED, classes[classes != UNLABELLED]]
    return table[index], kept


def overlaps(a: np.ndarray, b: np.ndarray, n: int, m: int) -> np.ndarray:
    """Pixels by (index in a, index in b): (n, m) int64."""
    return np.bincount(a.ravel() * m + b.ravel(), minlength=n * m).reshape(n, m)


class Scores:
    """Sums over images; `names`, (256,) int64, renames the classes found (clusters, say)."""

    def __init__(self, names: np.ndarray | None = None):
        self.names = np.arange(CLASSES) if names is None else names
        self.confusion = np.zeros((CLASSES, CLASSES), np.int64)  # (true, found)
        self.iou, self.tp, self.fp, self.fn = np.zeros((4, CLASSES))
        self.images = 0
        self.best = []  # IoU of each true instance with the found segment that covers it best

    def add(self, truth: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray]):
        """Count an image; both are (instance, semantic), ids (H, W)."""
        semantic, self.images = self.names[found[1]], self.images + 1
        self.confusion += overlaps(truth[1].astype(np.int64), semantic, CLASSES, CLASSES)
        (a, true), (b, classes) = segments(*truth), segments(found[0], semantic)
        self.panoptic(true, classes, overlaps(a, b, len(true), len(classes)))
        self.instances(truth[0], found[0])

    def panoptic(self, true: np.ndarray, found: np.ndarray, both: np.ndarray) -> None:
        """Match segments; `both` (n, m) counts pixels, row and column 0 the void.

        Void pixels of the truth count neither for nor against a segment that covers them.
        """
        inner = both[1:, 1:]
        union = both[1:].sum(1)[:, None] + (both[:, 1:].sum(0) - both[0, 1:]) - inner
        iou = inner / np.maximum(union, 1)
        hit = (iou > 0.5) & (true[1:, None] == found[None, 1:])
        rows, columns = np.nonzero(hit)
        np.add.at(self.iou, true[1:][rows], iou[rows, columns])
        np.add.at(self.tp, true[1:][rows], 1)
        np.add.at(self.fn, true[1:][~hit.any(1)], 1)
        mostly_void = both[0, 1:] > 0.5 * both[:, 1:].sum(0)
        np.add.at(self.fp, found[1:][~hit.any(0) & ~mostly_void], 1)

    def instances(self, true: np.ndarray, found: np.ndarray) -> None:
        (a, i), (b, j) = distinct(true), distinct(found)
        both = overlaps(i, j, len(a), len(b))
        iou = both / (both.sum(1)[:, None] + both.sum(0) - both)
        self.best += list(np.where(objects(b), iou, 0)[objects(a)].max(1))

    def majority(self) -> np.ndarray:
        """The true class that each found one covers most, (256,): names for clusters."""
        votes = self.confusion[:UNLABELLED].copy()
        votes[:, UNLABELLED] = 0
        return np.where(votes.any(0), votes.argmax(0), UNLABELLED)

    def summary(self) -> dict[str, float]:
        """PQ, SQ, RQ, mIoU in percent, means over the classes that there are; AR in percent."""
        seen = self.tp + self.fp + self.fn > 0
        tp, half = self.tp[seen], (self.tp + 0.5 * self.fp + 0.5 * self.fn)[seen]
        counted = self.confusion[:UNLABELLED]  # unlabelled pixels of the truth are left out
        hit, found = np.diag(counted), counted[:, :UNLABELLED].sum(0)
        union = counted.sum(1) + found - hit
        shares = {
            "PQ": self.iou[seen] / half,
            "SQ": self.iou[seen] / np.maximum(tp, 1),
            "RQ": tp / half,
            "mIoU": hit[union > 0] / union[union > 0],
            "AR": np.array(self.best)[:, None] >= THRESHOLDS,
        }
        return {k: 100 * float(x.mean()) if x.size else float("nan") for k, x in shares.items()}


# ---------------------------------------------------------------------------------- two folders


def pairs(root: str, truth: str, split: str) -> Iterator[tuple[tuple, tuple]]:
    """Yield ((instance, semantic) of truth, of root) of the images that both have maps of."""
    there = [files.layout(top, split) for top in (truth, root)]
    if lacking := [g for g in MAPS if not all(g in found for found in there)]:
        raise UserError(f"no {lacking[0]} maps in both {root}/{split} and {truth}/{split}")
    places = [[f"{top}/{found[g]}" for g in MAPS] for top, found in zip((truth, root), there)]
    pause = 0.5 if sys.stderr.isatty() else 30
    for path in tqdm(list(pngs(places[0][0])), split, mininterval=pause, leave=False):
        name = os.path.relpath(path, places[0][0])
        if not os.path.exists(f"{places[1][0]}/{name}"):
            continue
        both = [tuple(read(f"{place}/{name}")[1] for place in side) for side in places]
        shapes = {ids.shape for side in both for ids in side}
        if {ids.shape for ids in both[1]} == {(1, 1)} != shapes:  # of an unreadable image
            continue
        if len(shapes) > 1:
            raise UserError(f"{split}/{name}: maps of sizes {sorted(shapes)}")
        yield both


def compare(root: str, truth: str) -> int:
    """Print the scores of a folder's maps by the maps of another.

    Clusters have no names, so scores come twice: with the classes as they are, and with each
    renamed to the true class that it covers most in the first split.
    """
    splits = [s for s in ("train", "val") if all(files.layout(r, s) for r in (root, truth))]
    if not splits:
        raise UserError(f"{root} and {truth} have neither train nor val in common{files.LAYOUT}")
    names = None
    for split in splits:
        plain = Scores()
        for both in pairs(root, truth, split):
            plain.add(*both)
        if not plain.images:
            raise UserError(f"{root}/{split} and {truth}/{split} have no image in common")
        names = plain.majority() if names is None else names
        renamed = Scores(names)
        for both in pairs(root, truth, split):
            renamed.add(*both)
        print(f"{split}: {plain.images} images, {len(plain.best)} true instances")
        for words, scores in (("as they are", plain), (f"renamed by {splits[0]}", renamed)):
            shown = "  ".join(f"{k} {v:.1f}" for k, v in scores.summary().items())
            print(f"  classes {words}: {shown}")
    return 0
