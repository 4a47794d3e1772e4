"""How well maps agree with others of the same images: panoptic quality, mIoU, instance recall.

The counts come from pairs of ids (bincount), so an image costs milliseconds:

    panoptic    segments, matched where they overlap by more than half: PQ = SQ x RQ
    confusion   pixels by (true class, found class): mIoU, and which class a cluster is mostly
    recall      best overlap of each true instance, classes aside: AR over IoU 0.5, 0.55 .. 0.95

Panoptic quality: "Panoptic Segmentation", arXiv 1801.00868, Eq. 1. As no two segments of a map
overlap, a found segment with IoU > 0.5 is the only one, and no score is needed to rank any.
"""

from typing import NamedTuple

import numpy as np

from data import UNLABELLED

CLASSES = 256  # ids of a semantic map, UNLABELLED among them
THRESHOLDS = np.arange(50, 100, 5) / 100  # COCO's, of IoU


class Segments(NamedTuple):
    """A picture cut into segments: which one each pixel belongs to, and the class of each.

    `index` (H, W) int64; `classes` (n,) int64, UNLABELLED for the void, which is segment 0.
    """

    index: np.ndarray
    classes: np.ndarray


def segments(instance: np.ndarray, semantic: np.ndarray) -> Segments:
    """Cut a picture: each instance is a segment, and so is each class outside of instances.

    An instance has the class that most of its pixels have; pixels without a label in either map
    are void.
    """
    inside = (instance > 0) & (instance != UNLABELLED) & (instance != 65535)
    void = (semantic == UNLABELLED) | ((instance != 0) & ~inside)
    key = np.where(inside, CLASSES + instance.astype(np.int64), semantic)
    key[void & ~inside] = UNLABELLED
    found, index = np.unique(key, return_inverse=True)
    pairs = index.ravel() * CLASSES + semantic.ravel()
    votes = np.bincount(pairs, minlength=len(found) * CLASSES).reshape(len(found), CLASSES)
    votes[:, UNLABELLED] = 0  # an instance is void where all of it is
    classes = np.where(votes.any(1), votes.argmax(1), UNLABELLED)
    table = np.where(classes == UNLABELLED, 0, np.cumsum(classes != UNLABELLED))
    kept = np.r_[UNLABELLED, classes[classes != UNLABELLED]]
    return Segments(table[index.reshape(instance.shape)], kept)


def overlaps(a: np.ndarray, b: np.ndarray, n: int, m: int) -> np.ndarray:
    """Pixels by (index in a, index in b): (n, m) int64."""
    return np.bincount(a.ravel() * m + b.ravel(), minlength=n * m).reshape(n, m)


class Scores:
    """Sums over images; `names`, (256,) int64, renames the classes found (clusters, say)."""

    def __init__(self, names: np.ndarray | None = None):
        self.names = np.arange(CLASSES) if names is None else names
        self.confusion = np.zeros((CLASSES, CLASSES), np.int64)  # (true, found)
        self.iou, self.tp, self.fp, self.fn = np.zeros((4, CLASSES))
        self.best = []  # IoU of each true instance with the found segment that covers it best

    def add(self, truth: tuple[np.ndarray, np.ndarray], found: tuple[np.ndarray, np.ndarray]):
        """Count an image; both are (instance, semantic), ids (H, W)."""
        semantic = self.names[found[1]]
        self.confusion += overlaps(truth[1].astype(np.int64), semantic, CLASSES, CLASSES)
        a, b = segments(*truth), segments(found[0], semantic)
        n, m = len(a.classes), len(b.classes)
        both = overlaps(a.index, b.index, n, m)
        self.panoptic(a.classes, b.classes, both)
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
        top = 65535 if found.dtype.itemsize > 1 or true.dtype.itemsize > 1 else UNLABELLED
        (a, i), (b, j) = (np.unique(x, return_inverse=True) for x in (true, found))
        both = overlaps(i, j, len(a), len(b))
        iou = both / (both.sum(1)[:, None] + both.sum(0) - both)
        real = [(x != 0) & (x != UNLABELLED) & (x != top) for x in (a, b)]
        self.best += list(np.where(real[1], iou, 0)[real[0]].max(1))

    def majority(self) -> np.ndarray:
        """The true class that each found one covers most, (256,): names for clusters."""
        votes = self.confusion[:UNLABELLED]
        return np.where(votes.any(0), votes.argmax(0), UNLABELLED)

    def summary(self) -> dict[str, float]:
        """PQ, SQ, RQ, mIoU in percent, means over the classes that there are; AR in percent."""
        seen = self.tp + self.fp + self.fn > 0
        tp, half = self.tp[seen], (self.tp + 0.5 * self.fp + 0.5 * self.fn)[seen]
        counted = self.confusion[:UNLABELLED]  # unlabelled pixels of the truth are left out
        hit, true, found = np.diag(counted), counted.sum(1), counted[:, :UNLABELLED].sum(0)
        union = true + found - hit
        best = np.array(self.best)
        recall = (best[:, None] >= THRESHOLDS).mean() if len(best) else np.nan
        return {
            "PQ": 100 * (self.iou[seen] / half).mean(),
            "SQ": 100 * (self.iou[seen] / np.maximum(tp, 1)).mean(),
            "RQ": 100 * (tp / half).mean(),
            "mIoU": 100 * (hit / np.maximum(union, 1))[union > 0].mean(),
            "AR": 100 * recall,
        }
