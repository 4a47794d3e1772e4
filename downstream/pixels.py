"""Images and label maps of segmentation: crops, whole images, sliding windows, scores, layouts.

    Augment                      a crop of an image and its labels, for training
    Whole, slide                 images at their own aspect, and windows over them
    confusion, scores            mIoU, mean accuracy, pixel accuracy
    prepare_ade, prepare_voc     from the data sets' own folders to ours

Images are (3, H, W) uint8, labels (H, W) uint8 with 255 = unlabelled. Crops and sizes are (H, W).
"""

import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine  # before torch: it sets how threads wait

import numpy as np
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from torch import Tensor

import data
from data import UNLABELLED
from shapes import ShapeScenes
from engine import UserError


# --------------------------------------------------------------------------------------- training


def cover(size: tuple[int, int], crop: tuple[int, int], ratio: float = 1.0) -> tuple[int, int]:
    """Size (h, w) of an image scaled to cover the crop times `ratio`, keeping its aspect.

    For a square crop the short side becomes the crop's. The long side is at most four times the
    crop's: an image narrower than that is padded.
    """
    scale = max(c / n for c, n in zip(crop, size))
    scale = min(scale, 4 * max(crop) / max(size)) * ratio
    return tuple(max(1, round(n * scale)) for n in size)


def scaled(rgb: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image (3, H, W) uint8, bilinear with antialiasing."""
    rgb = rgb[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(rgb, size, mode="bilinear", antialias=True)[0]


def padded(rgb: Tensor, size: tuple[int, int], colour: tuple[int, int, int]) -> Tensor:
    """Pad an image (3, h, w) at the bottom and the right to at least `size`."""
    h, w = (max(n, m) for n, m in zip(rgb.shape[1:], size))
    if (h, w) == tuple(rgb.shape[1:]):
        return rgb
    out = torch.tensor(colour, dtype=torch.uint8)[:, None, None].repeat(1, h, w)
    out[:, : rgb.shape[1], : rgb.shape[2]] = rgb
    return out


class Augment:
    """What data.FolderDataset.crop does, for segmentation: image and labels to one crop.

    Training: scale, crop so that no class covers more than three quarters of the labels, flip,
    colours, pad, as mmsegmentation for ADE20K; or, where `crop_scale_min` is given, torchvision's
    RandomResizedCrop and flip. All from the sample's seed. Otherwise: the centre.
    """

    def __init__(self, cfg: engine.Config, train: bool):
        self.crop, self.train, self.photometric = cfg.crop, train, cfg.photometric
        self.scale, self.area = (cfg.scale_min, cfg.scale_max), cfg.crop_scale_min
        self.colour = cfg.colour

    def __call__(self, rgb: Tensor, maps: dict[str, np.ndarray], seed: int) -> dict[str, Tensor]:
        """rgb (3, H, W) uint8 and maps["semantic"] (H, W) give `rgb` and `semantic` of the crop."""
        draw = random.Random(seed).random
        labels = torch.from_numpy(maps["semantic"].astype(np.uint8))
        if self.train and self.area:
            top, left, h, w = data.random_crop(draw, *labels.shape, (self.area, 1.0))
            rgb, labels = (x[..., top : top + h, left : left + w] for x in (rgb, labels))
            size = self.crop
        else:
            low, high = self.scale if self.train else (1, 1)
            size = cover(rgb.shape[1:], self.crop, low + (high - low) * draw())
        rgb, labels = scaled(rgb, size), nearest(labels, size)
        (H, W), (h, w) = size, (min(n, m) for n, m in zip(size, self.crop))
        top, left = (H - h) // 2, (W - w) // 2
        for _ in range(10 if self.train else 0):
            top, left = int(draw() * (H - h + 1)), int(draw() * (W - w + 1))
            count = labels[top : top + h, left : left + w].flatten().bincount(minlength=256)
            count = count[:UNLABELLED]
            if (count > 0).sum() > 1 and count.max() < 0.75 * count.sum():
                break
        rgb, labels = (x[..., top : top + h, left : left + w] for x in (rgb, labels))
        if self.train and draw() < 0.5:
            rgb, labels = rgb.flip(-1), labels.flip(-1)
        if self.train and self.photometric:
            rgb = distort(draw, rgb)
        labels = F.pad(labels, (0, self.crop[1] - w, 0, self.crop[0] - h), value=UNLABELLED)
        rgb = padded(rgb, self.crop, self.colour)
        return {"rgb": rgb.contiguous(), "semantic": labels.contiguous()}


def nearest(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize labels (H, W): each takes the one under its middle, as Pillow does."""
    return F.interpolate(labels[None, None], size, mode="nearest-exact")[0, 0]


def distort(draw: Callable[[], float], rgb: Tensor) -> Tensor:
    """Distort colours as mmsegmentation's PhotoMetricDistortion; `draw()` is uniform in [0, 1).

    Brightness, saturation, hue and, before or after these two, contrast, each half of the time.
    """
    if draw() < 0.5:
        rgb = (rgb + (64 * draw() - 32)).clamp(0, 255).byte()
    contrast = [draw() < 0.5 for _ in range(2)]  # at all; before saturation
    if all(contrast):
        rgb = (rgb * (0.5 + draw())).clamp(max=255).byte()
    if draw() < 0.5:  # HSV's: the largest channel stays, the others' distance to it is scaled
        top, low = rgb.amax(0).float(), rgb.amin(0)
        factor = (top / (top - low)).clamp(max=0.5 + draw()).nan_to_num()
        rgb = (top - (top - rgb) * factor).round().byte()
    if draw() < 0.5:
        rgb = TF.adjust_hue(rgb, 0.2 * draw() - 0.1)
    if contrast[0] and not contrast[1]:
        rgb = (rgb * (0.5 + draw())).clamp(max=255).byte()
    return rgb


class Whole(data.Dataset):
    """Images of a split as evaluation takes them: `rgb` (3, H, W) and `semantic` as it is on disk,
    or both at the crop's size (`evaluation` crop).

    An unreadable image is {"unreadable": message}; a map that does not fit {"error": message}.
    """

    def __init__(self, cfg: engine.Config, dataset: data.Dataset):
        self.dataset, self.crop, self.evaluation = dataset, cfg.crop, cfg.evaluation

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        if isinstance(self.dataset, ShapeScenes):
            return self.dataset[0, index]
        try:
            rgb, maps = self.dataset.load(index)
        except data.Unreadable as e:
            return {"unreadable": str(e)}
        except UserError as e:
            return {"error": str(e)}
        size = cover(rgb.shape[1:], self.crop) if self.evaluation == "slide" else self.crop
        labels = torch.from_numpy(maps["semantic"].astype(np.uint8))  # a copy; ids are below 256
        labels = nearest(labels, self.crop) if self.evaluation == "crop" else labels
        return {"rgb": scaled(rgb, size), "semantic": labels}


# -------------------------------------------------------------------------------------- evaluation


def starts(length: int, window: int) -> list[int]:
    """First pixels of windows that cover a side, two thirds of a window apart, the last flush."""
    stride = max(1, window * 2 // 3)  # 341 for 512, 426 for 640
    count = -(-(length - window) // stride) + 1
    return [min(i * stride, length - window) for i in range(count)]


def slide(
    logits: Callable, imgs: Tensor, crop: tuple[int, int], limit: int = 16
) -> Tensor:
    """Mean of the logits of all windows that see a pixel.

    Args:
        logits: (b, 3, h, w) to (b, C, h, w), for crops.
        imgs: (B, 3, H, W), at least as large as the crop.
        limit: most crops at a time (at least B).
    Returns: (B, C, H, W).
    """
    (B, _, H, W), (h, w) = imgs.shape, crop
    boxes = [(top, left) for top in starts(H, h) for left in starts(W, w)]
    total, count = 0.0, imgs.new_zeros(H, W, dtype=torch.float32)
    step = max(1, limit // B)
    for chunk in (boxes[i : i + step] for i in range(0, len(boxes), step)):
        crops = torch.cat([imgs[:, :, t : t + h, l : l + w] for t, l in chunk])
        for (t, l), y in zip(chunk, logits(crops).split(B)):
            if isinstance(total, float):
                total = y.new_zeros(B, y.shape[1], H, W)
            total[:, :, t : t + h, l : l + w] += y
            count[t : t + h, l : l + w] += 1
    return total / count


def confusion(pred: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Count labelled pixels by (label, prediction), (classes, classes) int64."""
    valid = labels != UNLABELLED
    pairs = labels[valid].long() * classes + pred[valid]
    return pairs.bincount(minlength=classes**2).view(classes, classes)


def scores(matrix: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """Scores of a confusion matrix (C, C), and IoU (C,) and accuracy (C,) of the classes.

    mIoU is a mean over the classes that labels or predictions have, mean accuracy over those that
    labels have; a class without is NaN.
    """
    hits, labelled, predicted = matrix.diag().double(), matrix.sum(1), matrix.sum(0)
    iou, accuracy = hits / (labelled + predicted - hits), hits / labelled
    means = {"mIoU": iou.nanmean(), "mean_accuracy": accuracy.nanmean()}
    means["pixel_accuracy"] = hits.sum() / matrix.sum()
    return {k: float(v) for k, v in means.items()}, iou, accuracy


# --------------------------------------------------------------------------------- other layouts


def link(source: Path, target: Path) -> None:
    if not source.is_file():
        raise UserError(f"{source} is missing")
    if not target.is_symlink():
        os.symlink(source.resolve(), target)


def read_map(path: Path) -> np.ndarray:
    """Ids (H, W) of a label map; UserError where it cannot be read."""
    try:
        return data.decode_map(np.fromfile(path, np.uint8))
    except Exception as error:  # Pillow raises anything on broken files
        raise UserError(f"{path}: {error or type(error).__name__}") from None


def folders(dst: Path) -> dict[str, tuple[Path, Path]]:
    """Create DST/{train,val}/{rgb,semantic}; {split: (rgb, semantic)}."""
    made = {s: (dst / s / "rgb", dst / s / "semantic") for s in ("train", "val")}
    for folder in (f for pair in made.values() for f in pair):
        folder.mkdir(parents=True, exist_ok=True)
    return made


def prepare_ade(argv: list[str]) -> int:
    """Lay out ADEChallengeData2016: link images; in maps 0 (other) becomes 255, others one less."""
    src, dst = _source(argv, "prepare-ade", prepare_ade.__doc__, "images/training")
    for split, (rgb, semantic) in folders(dst).items():
        part = {"train": "training", "val": "validation"}[split]
        images = sorted((src / "images" / part).glob("*.jpg"))

        def one(image: Path, part=part, rgb=rgb, semantic=semantic) -> None:
            name = f"{image.stem}.png"
            ids = read_map(src / "annotations" / part / name)
            Image.fromarray(ids.astype(np.uint8) - np.uint8(1)).save(semantic / name)
            link(image, rgb / image.name)

        with ThreadPoolExecutor() as pool:
            list(pool.map(one, images))
        print(f"{split}: {len(images)} images")
    if (table := src / "objectInfo150.txt").is_file():  # the last column; its first line is a head
        rows = table.read_text().splitlines()[1:]
        (dst / "classes.txt").write_text("".join(r.split("\t")[-1].strip() + "\n" for r in rows))
    return 0


VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
    "motorbike person pottedplant sheep sofa train tvmonitor"
).split()


def prepare_voc(argv: list[str]) -> int:
    """Lay out VOCdevkit/VOC2012 by links: its palette maps, with 255 as border, fit as they are.

    SemanticMIM's probe is trained on the larger set of 10,582 images: put its list, trainaug.txt,
    and its maps, SegmentationClassAug, beside VOC's own 1,464, which are taken otherwise.
    """
    src, dst = _source(argv, "prepare-voc", prepare_voc.__doc__, "ImageSets/Segmentation")
    for split, (rgb, semantic) in folders(dst).items():
        lists, maps = src / "ImageSets" / "Segmentation", "SegmentationClass"
        if split == "train" and (lists / "trainaug.txt").is_file():
            split, maps = "trainaug", "SegmentationClassAug"
        names = (lists / f"{split}.txt").read_text().split()
        for name in names:
            own = (src / maps / f"{name}.png").is_file()  # else VOC's
            png = src / (maps if own else "SegmentationClass") / f"{name}.png"
            link(src / "JPEGImages" / f"{name}.jpg", rgb / f"{name}.jpg")
            link(png, semantic / f"{name}.png")
        print(f"{split}: {len(names)} images")
        if split == "train":
            print(f"  VOC's own: there is no {lists}/trainaug.txt, SemanticMIM's training set")
    (dst / "classes.txt").write_text("\n".join(VOC) + "\n")
    return 0


def _source(argv: list[str], name: str, doc: str, must_have: str) -> tuple[Path, Path]:
    parser = engine.Parser(prog=f"downstream.segment {name}", description=doc)
    parser.add_argument("src", type=Path)
    parser.add_argument("dst", type=Path)
    args = parser.parse_args(argv)
    if not (args.src / must_have).is_dir():
        raise UserError(f"there is no folder {args.src / must_have}")
    return args.src, args.dst
