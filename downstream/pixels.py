"""Images and label maps of segmentation: crops, whole images, sliding windows, scores.

    Augment              a crop of an image and its labels, for training
    Whole, slide         images at their own aspect, and windows over them
    predict              logits of whole images
    read_share           a rank's share of a split
    count, scores        a whole split's pixels by class; mIoU, mean accuracy, pixel accuracy

Images are (3, H, W) uint8, labels (H, W) uint8 with 255 = unlabelled. Crops and sizes are (H, W).
"""

import random
from collections.abc import Callable, Iterator

import engine.config  # before torch: it sets how threads wait

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pad

import data
from data import UNLABELLED
from downstream.upernet import resize
from engine import UserError
from engine.ranks import World
from shapes import ShapeScenes

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
    below, right = (max(n - m, 0) for n, m in zip(size, rgb.shape[1:]))
    return pad(rgb, [0, 0, right, below], fill=list(colour))


class Augment:
    """`transform` of data.FolderDataset: image and labels to one crop, labels at every pixel.

    Training: scale, crop so that no class covers more than three quarters of the labels, flip,
    colours, pad, as mmsegmentation for ADE20K; or, where `crop_scale_min` is given, torchvision's
    RandomResizedCrop and flip. All from the sample's seed. Otherwise: the centre.
    """

    def __init__(self, cfg: engine.config.Config, train: bool):
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

    def __init__(self, cfg: engine.config.Config, dataset: data.Dataset):
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


def slide(logits: Callable, imgs: Tensor, crop: tuple[int, int], limit: int = 16) -> Tensor:
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


@torch.no_grad()
def predict(
    model: nn.Module, samples: list[dict], cfg: engine.config.Config, world: World
) -> Iterator[tuple[dict, Tensor]]:
    """Yield samples with their logits (1, C, h, w) at the size of their `rgb` (3, h, w), images of
    one size together.
    """
    groups: dict[torch.Size, list[dict]] = {}
    for sample in samples:
        groups.setdefault(sample["rgb"].shape, []).append(sample)
    for (_, h, w), group in groups.items():
        imgs = torch.stack([padded(s["rgb"], cfg.crop, cfg.colour) for s in group])
        imgs = imgs.to(world.device)
        with world.autocast():
            y = slide(model.logits, imgs, cfg.crop, cfg.micro_batch)[:, :, :h, :w]
        yield from zip(group, y.split(1))


def read_share(
    whole: data.Dataset, cfg: engine.config.Config, world: World
) -> Iterator[list[dict]]:
    """Yield this rank's share of a split, at most `micro_batch` samples of those that can be read.

    Errors: UserError on every rank of the first {"error": message}.
    """
    loader = torch.utils.data.DataLoader(
        torch.utils.data.Subset(whole, range(world.rank, len(whole), world.size)),
        batch_size=cfg.micro_batch,
        collate_fn=list,
        num_workers=world.workers(cfg.workers) if len(whole) > 256 else 0,
        worker_init_fn=data.worker_init,
    )
    failed = {}
    for samples in loader:
        if failed := next((s for s in samples if "error" in s), {}):
            break
        if samples := [s for s in samples if "rgb" in s]:
            yield samples
    world.raise_error(failed)


@torch.no_grad()
def count(
    model: nn.Module, dataset: data.Dataset, cfg: engine.config.Config, world: World
) -> tuple[Tensor, int]:
    """Run a model over a whole split, shared out over the ranks.

    Returns: confusion matrix (C, C) int64 on the CPU, on every rank; images read.
    """
    model.eval()
    C = cfg.classes
    matrix = torch.zeros(C * C + 1, dtype=torch.float64)  # the last: images read
    for samples in read_share(Whole(cfg, dataset), cfg, world):
        for sample, logits in predict(model, samples, cfg, world):
            labels = sample["semantic"].to(world.device)
            pred = resize(logits, labels.shape).argmax(1)[0]
            matrix[:-1] += confusion(pred, labels, C).flatten().cpu()
        matrix[-1] += len(samples)
    if world.size > 1:
        dist.all_reduce(matrix)
    return matrix[:-1].view(C, C).long(), int(matrix[-1])
