"""Images with objects, cropped, as batches: of COCO's format, or ShapeScenes.

    Jitter, View           how an image is scaled, mirrored and cut; the same for its polygons
    CocoImages, Scenes     data sets: a sample has an image of fixed size and its objects
    collate                samples to a batch

A batch: `rgb` (B, 3, S, S) uint8; `boxes` (B, n, 4) float32, x0 y0 x1 y1 in pixels; `labels` (B, n)
int64 from 1, 0 where a sample has fewer objects; `masks` (B, n, S, ceil(S / 8)) uint8, eight pixels
a byte as numpy's packbits; `scaled` and `original` (B, 2), height and width in `rgb` and on disk;
`seed`, `bad` (B,). Boxes are those of the masks after the crop, as in detectron2.

Polygons and run lengths are rasterised by pycocotools, whose rounding COCO's scores are defined by.
"""

import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate
from torchvision.ops import masks_to_boxes

import data
from data import Unreadable, UserError, sample_seed
from downstream.coco import Objects, mask_tools, polygons
from downstream.pixels import padded, scaled
from files import decode_image, read_bytes
from shapes import SHAPES, STUFF, ShapeScenes

SHORT, LONG, CANVAS = (480, 800), 1333, 1344  # CFMAE Sec. E.3; a canvas of whole patches around it


# ---------------------------------------------------------------------------------------- geometry


class Jitter:
    """How images become crops of `size` pixels a side; what is left of it is padding.

    Args:
        kind: "lsj", large-scale jitter: scaled to fit `scales` times the crop and cut at random;
            "short": the short side drawn from CFMAE's 480 to 800, the long one at most 1333, all in
            proportion to a crop of 1344; nothing is cut off.
        train: False takes the whole image, scaled to fit the crop (as "short": 800 and 1333).
    """

    def __init__(
        self, size: int, kind: str = "lsj", scales: Sequence[float] = (0.1, 2.0),
        train: bool = True, colour: tuple[int, int, int] = (0, 0, 0),
    ):  # fmt: skip
        self.size, self.kind, self.scales, self.train = size, kind, tuple(scales), train
        self.colour = colour

    def view(self, height: int, width: int, seed: int) -> "View":
        """Draw how one image is seen."""
        draw = random.Random(seed).random
        u = draw() if self.train else 1.0
        if self.kind == "short":
            unit, (low, high) = self.size / CANVAS, SHORT
            ratio = (low + (high - low) * u) * unit / min(height, width)
            ratio = min(ratio, LONG * unit / max(height, width))
        else:
            low, high = self.scales if self.train else (1, 1)
            ratio = self.size * (low + (high - low) * u) / max(height, width)
        whole = tuple(max(1, round(n * ratio)) for n in (height, width))
        kept = tuple(min(n, self.size) for n in whole)
        flip = self.train and draw() < 0.5
        at = tuple(int((draw() if self.train else 0) * (n - k + 1)) for n, k in zip(whole, kept))
        return View((height, width), whole, kept, at, flip)


class View:
    """An image scaled to `whole` (h, w), mirrored if `flip`, and cut to `kept` (h, w) from `at`."""

    def __init__(self, original, whole, kept, at, flip: bool):
        self.original, self.whole, self.kept, self.at, self.flip = original, whole, kept, at, flip

    def image(self, rgb: Tensor, size: int, colour: tuple[int, int, int]) -> Tensor:
        """(3, H, W) uint8 to (3, size, size), padded at the bottom and the right."""
        (top, left), (h, w) = self.at, self.kept
        rgb = scaled(rgb, self.whole)
        rgb = (rgb.flip(-1) if self.flip else rgb)[:, top : top + h, left : left + w]
        return padded(rgb, (size, size), colour).contiguous()

    def mask(self, segmentation: list | dict, tools) -> np.ndarray:
        """Polygons or run lengths as COCO has them to (h, w) uint8 of the crop."""
        (H, W), (top, left), (h, w) = self.original, self.at, self.kept
        if isinstance(segmentation, list):
            unit = np.array([self.whole[1] / W, self.whole[0] / H])
            points = [np.array(p, float).reshape(-1, 2) * unit for p in polygons(segmentation)]
            if self.flip:
                points = [p * [-1, 1] + [self.whole[1], 0] for p in points]
            flat = [(p - [left, top]).ravel().tolist() for p in points]
            return tools.decode(tools.merge(tools.frPyObjects(flat, h, w)))
        if isinstance(segmentation["counts"], list):
            segmentation = tools.frPyObjects(segmentation, *segmentation["size"])
        ids = tools.decode(segmentation)
        rows = data.nearest(0, H, self.whole[0])[top : top + h]
        cols = data.nearest(0, W, self.whole[1], self.flip)[left : left + w]
        return ids[rows[:, None], cols]


def sample_of(
    rgb: Tensor, masks: np.ndarray, labels: np.ndarray, sizes: tuple, seed: int, bad: int
) -> dict[str, Tensor]:
    """A sample of a batch, see the module; masks (n, h, w), h and w at most those of `rgb`.

    Args: `sizes`: (height, width) of the image in `rgb`, and on disk.
    """
    seen = masks.any(axis=(1, 2))
    masks, labels, (H, W) = masks[seen], labels[seen], rgb.shape[1:]
    boxes = masks_to_boxes(torch.from_numpy(masks)) + torch.tensor([0, 0, 1, 1])  # past the last
    below, right = H - masks.shape[1], W - masks.shape[2]
    packed = np.packbits(np.pad(masks, ((0, 0), (0, below), (0, right))), axis=2)
    sample = {"rgb": rgb, "boxes": boxes, "masks": torch.from_numpy(packed)}
    sample["labels"] = torch.from_numpy(labels.astype(np.int64))
    sample |= {k: torch.tensor(v) for k, v in zip(("scaled", "original"), sizes)}
    return sample | {"seed": torch.tensor(seed), "bad": torch.tensor(bad)}


def collate(samples: list[dict]) -> dict:
    """Stack samples to a batch; boxes, labels and masks are filled up with zeros.

    The first {"error": message} among them becomes the batch, as `data.collate` has it.
    """
    if errors := [s for s in samples if "error" in s]:
        return errors[0]
    most, ragged = max(len(s["labels"]) for s in samples), ("boxes", "labels", "masks")
    batch = default_collate([{k: v for k, v in s.items() if k not in ragged} for s in samples])
    for k in ragged:
        batch[k] = torch.zeros(
            len(samples), most, *samples[0][k].shape[1:], dtype=samples[0][k].dtype
        )
        for row, s in zip(batch[k], samples):
            row[: len(s[k])] = s[k]
    return batch


# --------------------------------------------------------------------------------------- data sets


class CocoImages(Dataset):
    """Images of a folder and their objects.

    Args: `folder` of the images; `files`, their objects; `jitter`, how they become crops.
    `dataset[epoch, index]` is a sample. An unreadable image is replaced by the next one under the
    same seed, and `bad` is its index, otherwise -1.
    """

    granularities = ("rgb", "boxes", "masks")

    def __init__(self, folder: str, files: Objects, jitter: Jitter, seed: int = 0):
        self.folder, self.files, self.jitter, self.seed = folder, files, jitter, seed
        self.categories = files.categories  # [[id, name], ...], label 1 first
        self.classes = [name for _, name in self.categories]
        mask_tools()

    def __len__(self) -> int:
        return len(self.files)

    def id(self, index: int) -> int:
        return int(self.files.arrays["ids"][index])

    def load(self, index: int) -> tuple[Tensor, np.ndarray, list]:
        """Decode an image (3, H, W): it, labels, segmentations. Raises Unreadable; UserError."""
        name, size = self.files.name(index), tuple(self.files.arrays["sizes"][index].tolist())
        try:
            rgb = decode_image(read_bytes(f"{self.folder}/{name}"))
        except Exception as error:  # Pillow raises anything on broken files
            raise Unreadable(f"{name}: {str(error) or type(error).__name__}") from None
        if tuple(rgb.shape[1:]) != size:
            raise UserError(
                f"{name} is displayed at {rgb.shape[2]} x {rgb.shape[1]}, its JSON has {size[1]} x "
                f"{size[0]}; does EXIF turn it?"
            )
        labels, segmentations = self.files.of(index)
        wrong = [
            s["size"] for s in segmentations if isinstance(s, dict) and tuple(s["size"]) != size
        ]
        if wrong:
            raise UserError(f"{name}: run lengths of size {wrong[0]}, of an image of {list(size)}")
        return rgb, labels, segmentations

    def sample(self, index: int, seed: int, bad: int = -1) -> dict[str, Tensor]:
        """One image as the jitter sees it. Raises Unreadable; UserError."""
        rgb, labels, segmentations = self.load(index)
        view, tools = self.jitter.view(*rgb.shape[1:], seed), mask_tools()
        try:
            masks = [view.mask(s, tools) for s in segmentations]
        except ValueError as error:
            raise UserError(f"{self.files.name(index)}: {error}") from None
        masks = np.stack(masks) if masks else np.zeros((0, *view.kept), np.uint8)
        image = view.image(rgb, self.jitter.size, self.jitter.colour)
        return sample_of(image, masks, labels, (view.kept, view.original), seed, bad)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        seed, error = sample_seed(self.seed, epoch, index), None
        for skip in range(min(32, len(self))):
            try:
                return self.sample((index + skip) % len(self), seed, index if skip else -1)
            except Unreadable as unreadable:
                error = unreadable
            except UserError as misfit:
                return {"error": str(misfit)}
        return {"error": f"{skip + 1} images in a row cannot be read, at last {error}"}


class Scenes(Dataset):
    """ShapeScenes with their objects; `train` and the seed as there, no other jitter."""

    granularities, folder = ("rgb", "boxes", "masks"), "shapes"
    categories = [[i, name] for i, name in enumerate(SHAPES, start=1)]

    def __init__(
        self, split: str, size: int, train: bool, seed: int = 0, length: int | None = None
    ):
        maps = ("rgb", "instance", "semantic")
        self.scenes = ShapeScenes(split, size, 1, maps, train, seed, length)
        self.classes = list(SHAPES)

    def __len__(self) -> int:
        return len(self.scenes)

    def id(self, index: int) -> int:
        return index

    def sample(self, index: int, seed: int = 0) -> dict[str, Tensor]:
        return self[0, index]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        scene = self.scenes[key]
        ids, kinds = scene["instance"].numpy(), scene["semantic"].numpy()
        numbers = np.unique(ids[(ids > 0) & (ids != data.UNLABELLED)])
        masks = ids == numbers[:, None, None]  # (n, H, W)
        kind = [kinds[mask].flat[0] - len(STUFF) + 1 for mask in masks]
        size = ids.shape
        labels, seed = np.array(kind, np.int64), int(scene["seed"])
        return sample_of(scene["rgb"], masks.astype(np.uint8), labels, (size, size), seed, -1)
