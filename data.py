"""Images with maps of several granularities: files, joint augmentation, batches.

A batch is a dict: `rgb` (B, 3, H, W) uint8; `instance` and `semantic` (B, H/s, W/s) uint8, s the
label stride; `label`, `seed`, `bad` (B,) int64. What a method does not ask for is absent.

Map: `GRANULARITIES`                            what lies in which folder and becomes what
     `sample_seed`, `BatchSampler`, `collate`   which samples, in which order, with which seeds
     `random_crop`, `centre_crop`, `relabel`    geometry and labels, in numpy
     `FolderDataset`, `check`                   images with or without maps, in folders or shards

All randomness comes from a sample's seed, so nothing depends on the number of workers or ranks, or
on where a run was interrupted. docs/data.md has the layout of a folder.
"""

import math
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler, default_collate
from tqdm import tqdm

from files import LAYOUT, FileList, Unreadable, UserError, class_folders, decode_image  # noqa: F401
from files import decode_map, layout, read_bytes, scan  # noqa: F401

UNLABELLED = 255  # in all maps: no label
MAX_INSTANCES = 16  # ids 1..16 by decreasing area in the crop; smaller ones become UNLABELLED


# ------------------------------------------------------------------------------ seeds and batches

GAMMA = 0x9E3779B97F4A7C15  # the odd step of splitmix64


def _mix(x):
    """Scramble 64 bits one-to-one (splitmix64's finaliser): a Python integer or a uint64 array."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return x ^ (x >> 31)


def sample_seed(run_seed: int, epoch: int, index: int) -> int:
    """Hash (run seed, epoch, sample index) to 63 bits, the only source of a sample's randomness."""
    x = 0
    for value in (run_seed, epoch, index):
        x = _mix((x + (value + 1) * GAMMA) & (2**64 - 1))
    return x >> 1


class BatchSampler(Sampler):
    """Yield one rank's micro-batches, lists of (epoch, index): a pure function of the global step.

    Step s takes the s-th `batch_size` positions of its epoch's permutation; an epoch's remainder is
    dropped. Micro-batch a of rank r takes [r * per_rank + a * micro : + micro] of them. So a step's
    samples depend neither on ranks nor on micro-batches, and a resumed run goes on inside an epoch.
    It runs across epochs, as persistent workers are never told of a new one.

    Args: `length` of the data set; global `batch_size`; `stop_step`, excluded (None: never stops).
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1,
        accum: int = 1, start_step: int = 0, stop_step: int | None = None,
    ):  # fmt: skip
        if length < batch_size:
            words = f"the data has {length} samples, fewer than one batch of {batch_size}"
            raise UserError(f"{words}: lower --batch-size")
        if batch_size % (world * accum):
            raise UserError(f"batch size {batch_size} is not divisible by {world} ranks x {accum}")
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.steps_per_epoch = length // batch_size
        self.micro = batch_size // (world * accum)
        self.starts = [(rank * accum + a) * self.micro for a in range(accum)]
        self.start_step, self.stop_step = start_step, stop_step
        self.epoch, self.order = None, None

    def indices(self, step: int) -> list[tuple[int, int]]:
        """Return the global batch of a step, over all ranks and micro-batches."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self.epoch:  # sorted by a hash of (seed, epoch, position)
            key = sample_seed(self.seed, epoch, -2)
            keys = _mix(np.arange(self.length, dtype=np.uint64) * GAMMA + key)
            self.epoch, self.order = epoch, np.argsort(keys, kind="stable")
        batch = self.order[at * self.batch_size : (at + 1) * self.batch_size]
        return [(epoch, index) for index in batch.tolist()]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while self.stop_step is None or step < self.stop_step:
            batch = self.indices(step)
            yield from (batch[start : start + self.micro] for start in self.starts)
            step += 1


def collate(samples: list[dict]) -> dict:
    """Stack samples to a batch; the first {"error": message} among them becomes the batch.

    A worker returns its errors: DataLoader would wrap a raised one in a traceback.
    """
    errors = [sample for sample in samples if "error" in sample]
    return errors[0] if errors else default_collate(samples)


def worker_init(worker_id: int) -> None:
    """Give a worker one thread, and leave Ctrl-C and a cluster's SIGTERM to the main process.

    A SIGTERM from the main process still ends it: at exit, Python sends one to workers that are
    left, and then waits for them without limit.
    """

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
            pass
        os._exit(0)

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey, daemon=True).start()


def shield_forkserver() -> None:
    """Keep a SIGTERM to a whole group from the process that Python 3.14 starts workers from."""
    if multiprocessing.get_start_method() == "forkserver":
        from multiprocessing import forkserver, resource_tracker  # not on Windows

        resource_tracker.ensure_running()  # first, as its start lifts the mask
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        forkserver.ensure_running()  # with the mask of its parent
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


# -------------------------------------------------------------------- geometry and granularities


def random_crop(draw, height: int, width: int, scale: Sequence[float]) -> tuple[int, ...]:
    """Draw torchvision's RandomResizedCrop box (top, left, h, w); `draw()` is uniform in [0, 1)."""
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw())
        ratio = math.exp((2 * draw() - 1) * math.log(4 / 3))  # log-uniform in 3/4..4/3
        h, w = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw() * (height - h + 1)), int(draw() * (width - w + 1)), h, w
    h, w = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def centre_crop(height: int, width: int, size: Sequence[int], share: float) -> tuple[int, ...]:
    """Return the centred box (top, left, h, w) of `size`'s aspect, `share` of the largest one."""
    unit = min(height / size[0], width / size[1]) * share
    h, w = max(1, round(size[0] * unit)), max(1, round(size[1] * unit))
    return (height - h) // 2, (width - w) // 2, h, w


def nearest(start: int, length: int, out: int, flip: bool = False) -> np.ndarray:
    """Return `out` nearest-exact indices into [start, start + length), mirrored first on `flip`."""
    at = (2 * np.arange(out) + 1) * length // (2 * out)  # floor((k + 0.5) * length / out)
    return start + (length - 1 - at if flip else at)


def relabel(ids: np.ndarray, unlabelled: int = UNLABELLED) -> np.ndarray:
    """Renumber instances 1, 2, ... by decreasing area, ties by id; return uint8 of the same shape.

    Background 0 stays; `unlabelled` and whatever comes after MAX_INSTANCES become UNLABELLED.
    """
    area = np.bincount(ids.ravel(), minlength=unlabelled + 1)
    area[[0, unlabelled]] = 0
    found = np.flatnonzero(area)
    kept = found[np.argsort(-area[found], kind="stable")][:MAX_INSTANCES]
    table = np.full(len(area), UNLABELLED, np.uint8)
    table[0], table[kept] = 0, np.arange(1, len(kept) + 1)
    return table[ids]


class Granularity(NamedTuple):
    """One kind of map: what its pixels are, and what a batch holds of them.

    Args:
        kind: "pixels", at the image's size, or "labels", ids at the label stride, UNLABELLED where
            there is none.
        prepare: values of a crop (h, w), as decoded, to what the batch holds.
    """

    kind: str
    prepare: Callable[[np.ndarray], np.ndarray]


def renumber(ids: np.ndarray) -> np.ndarray:
    return relabel(ids, UNLABELLED if ids.dtype == np.uint8 else 65535)


# A further map, depth say, is a row here and in files.FOLDERS; the rest: docs/architecture.md.
GRANULARITIES = {
    "rgb": Granularity("pixels", lambda pixels: pixels),
    "instance": Granularity("labels", renumber),
    "semantic": Granularity("labels", lambda ids: ids.astype(np.uint8)),
}


class FolderDataset(Dataset):
    """Images of a folder and their maps, cropped and flipped together.

    Args:
        root, split: see the module.
        files: as `scan` or `FileList.open` gives it; None: scanned now.
        image_size: a number or (H, W).
        label_stride: pixels of the image a label of the maps, a quarter of the patch size.
        granularities: keys of GRANULARITIES.
        scale: the random crop's share of the area.
        train: False takes the largest centred crop times `crop_pct` (224 / 256 is usual).
        transform: (rgb (3, h, w) uint8, {granularity: ids (h, w)}, seed) -> a sample's images, in
            place of the crops here.
    `dataset[epoch, index]` is a batch without its first axis. An unreadable image is replaced by
    the next one under the same seed, and `bad` is its index, otherwise -1. A map that does not fit
    its image is never replaced: the sample is {"error": message}.
    """

    def __init__(
        self, root: str, split: str, files: FileList | None, image_size=224, label_stride: int = 4,
        granularities: Sequence[str] = ("rgb",), scale: Sequence[float] = (0.2, 1.0),
        train: bool = True, seed: int = 0, semantic_classes: int = 133, crop_pct: float = 1.0,
        transform: Callable | None = None,
    ):  # fmt: skip
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.label_size = tuple(n // label_stride for n in self.size)
        if not 1 <= semantic_classes <= UNLABELLED:
            raise UserError(f"semantic_classes {semantic_classes}: use 1 to {UNLABELLED}")
        self.files = files = scan(root, split, granularities) if files is None else files
        if not set(granularities) <= set(files.folders):
            raise UserError(f"this list of files has {', '.join(files.folders)} alone")
        files.verify(root)
        self.root, self.granularities, self.classes = root, tuple(granularities), files.classes
        self.scale, self.train, self.seed, self.crop_pct = scale, train, seed, crop_pct
        self.semantic_classes, self.transform = semantic_classes, transform or self.crop

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> tuple[Tensor, dict[str, np.ndarray]]:
        """Decode an image (3, H, W) and its maps (H, W). Raises Unreadable; UserError on maps."""
        files, maps = self.files, {}
        try:
            rgb = decode_image(files.read(self.root, "rgb", index))
        except UserError:  # a damaged shard
            raise
        except Exception as error:  # Pillow raises anything on broken files
            raise Unreadable(f"{files.name(index)}: {str(error) or type(error).__name__}") from None
        for granularity in (g for g in self.granularities if g != "rgb"):
            try:
                maps[granularity] = decode_map(files.read(self.root, granularity, index))
                problem = self.misfit(granularity, maps[granularity], rgb.shape[1:])
            except UserError:
                raise
            except Exception as error:
                problem = str(error) or type(error).__name__
            if problem:
                raise UserError(f"{files.where(self.root, granularity, index)}: {problem}")
        return rgb, maps

    def misfit(self, granularity: str, ids: np.ndarray, size: Sequence[int]) -> str | None:
        """What is wrong with a map beside an image of `size` (h, w), if anything."""
        if ids.shape != tuple(size):
            return (
                f"{ids.shape[1]} x {ids.shape[0]}, but its image is displayed at {size[1]} x "
                f"{size[0]}; does EXIF turn it?"
            )
        wide = ids.dtype != np.uint8 or (ids + 1).max() > self.semantic_classes  # 255 wraps to 0
        if granularity == "semantic" and wide:
            wrong = ids[(ids >= self.semantic_classes) & (ids != UNLABELLED)]
            if wrong.size:
                return (
                    f"id {wrong[0]} is neither below semantic_classes = {self.semantic_classes} "
                    f"nor {UNLABELLED}, unlabelled"
                )
        return None

    def crop(self, rgb: Tensor, maps: dict, seed: int) -> dict[str, Tensor]:
        """Crop, resize and flip what `load` gave, all alike."""
        draw = random.Random(seed).random
        if self.train:
            (top, left, h, w), flip = random_crop(draw, *rgb.shape[1:], self.scale), draw() < 0.5
        else:
            (top, left, h, w), flip = centre_crop(*rgb.shape[1:], self.size, self.crop_pct), False
        sample = {}
        if "rgb" in self.granularities:  # channels last, as decoded: the fastest resize
            rgb = rgb[None, :, top : top + h, left : left + w]
            rgb = rgb.contiguous(memory_format=torch.channels_last)
            rgb = F.interpolate(rgb, self.size, mode="bicubic", antialias=True)[0]
            sample["rgb"] = (rgb.flip(-1) if flip else rgb).contiguous()
        for granularity, ids in maps.items():
            kind, prepare = GRANULARITIES[granularity]
            height, width = self.label_size if kind == "labels" else self.size
            ids = ids[nearest(top, h, height)][:, nearest(left, w, width, flip)]
            sample[granularity] = torch.from_numpy(prepare(ids))
        return sample

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        seed, error = sample_seed(self.seed, epoch, index), None
        for skip in range(min(32, len(self))):
            at = (index + skip) % len(self)
            try:
                sample = self.transform(*self.load(at), seed)
                return sample | scalars(int(self.files.labels[at]), seed, index if skip else -1)
            except Unreadable as unreadable:
                error = unreadable
            except UserError as misfit:
                return {"error": str(misfit)}
        return {"error": f"{skip + 1} images in a row cannot be read, at last {error}"}


def scalars(label: int, seed: int, bad: int) -> dict[str, Tensor]:
    return {"label": torch.tensor(label), "seed": torch.tensor(seed), "bad": torch.tensor(bad)}


def check(
    dataset: Dataset, limit: int | None = 1000, load: Callable[[int], object] | None = None
) -> str:
    """Load `limit` evenly spaced samples, None for all, and return a line of findings.

    Args: `load`: what loads a sample, None: `dataset.load`.
    Raises UserError with the count and the first few if maps do not fit. Unreadable images are only
    counted, as training replaces them, unless there is no other.
    """
    total = len(dataset)
    picks = np.linspace(0, total - 1, min(total, limit or total)).astype(int).tolist()
    found = {Unreadable: [], UserError: []}

    def look(index: int) -> None:
        try:
            (load or dataset.load)(index)
        except (Unreadable, UserError) as error:
            found[type(error)].append(str(error))

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        starts = range(0, len(picks), 1024)  # a bounded queue
        for start in tqdm(starts, "checking", disable=len(starts) < 2, unit=" x 1024 samples"):
            list(pool.map(look, picks[start : start + 1024]))
    unreadable, misfits = sorted(found[Unreadable]), sorted(found[UserError])
    if misfits:
        lines = [f"{len(misfits)} of {len(picks)} checked samples do not fit:", *misfits[:5]]
        raise UserError("\n  ".join(lines))
    if len(unreadable) == len(picks):
        raise UserError(f"none of {len(picks)} samples can be read, e.g. {unreadable[0]}")
    line = f"{len(picks)} of {total} samples checked, {len(unreadable)} unreadable"
    return "\n  ".join([line, *unreadable[:5]])


def open_dataset(
    root: str, split: str, image_size, patch_size: int, granularities: Sequence[str],
    scale: Sequence[float], train: bool, seed: int, files: FileList | None = None,
    label_stride: int | None = None, **options,
) -> Dataset:  # fmt: skip
    """Open "shapes", see shapes.py, or a folder; `options` as FolderDataset's.

    Args: `label_stride`, None: a quarter of the patch size, so that a patch has 4 x 4 labels.
    """
    if label_stride is None and set(granularities) != {"rgb"} and patch_size % 4:
        raise UserError(f"patch_size {patch_size}: use a multiple of 4, a patch has 4 x 4 labels")
    label_stride = label_stride or max(patch_size // 4, 1)
    if root == "shapes":
        from shapes import ShapeScenes  # which needs this module

        return ShapeScenes(split, image_size, label_stride, granularities, train, seed)
    return FolderDataset(
        root, split, files, image_size, label_stride, granularities, scale, train, seed, **options
    )
