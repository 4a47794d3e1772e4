"""Images with instance and semantic maps: files, joint augmentation, batches, and ShapeScenes.

A batch is a dict: `rgb` (B, 3, H, W) uint8; `instance` and `semantic` (B, H/s, W/s) uint8 with
s = patch_size / 4; `label`, `seed`, `bad` (B,) int64. What a method does not ask for is absent.

Map: `sample_seed`, `BatchSampler`, `collate`   which samples, in which order, with which seeds
     `random_crop`, `centre_crop`, `relabel`    geometry and labels, in numpy
     `decode_image`, `decode_map`               bytes to arrays
     `FileList`, `scan`                         1.28 million names in one block, shared by workers
     `FolderDataset`, `check`                   a folder of images, with or without maps
     `ShapeScenes`                              procedural scenes, which need no files

All randomness comes from a sample's seed, so nothing depends on the number of workers or ranks, or
on where a run was interrupted. `python data.py ROOT --check` reads a whole folder.

Folder: ROOT/{train,val}/{rgb,instance,semantic}/, with class folders or without. A map has its
image's name, but ends in .png. `semseg` may stand for `semantic`. For RGB alone, ROOT/{train,val}/
may hold the images itself. Maps are PNG, grey of 8 or 16 bits or with a palette (its indices are
the ids; Pillow reads these in half the time, as it writes them without row filters), and lie as the
image is displayed. Instance ids: 0 background, 255 (in 16 bits: 65535) unlabelled. Semantic ids:
below `semantic_classes`, or 255 unlabelled.
"""

from __future__ import annotations

import argparse
import colorsys
import io
import json
import math
import os
import random
import signal
import sys
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import Dataset, Sampler, default_collate
from torchvision.io import ImageReadMode, decode_jpeg

GRANULARITIES = ("rgb", "instance", "semantic")
UNLABELLED = 255  # in both maps: no label
MAX_INSTANCES = 16  # ids 1..16 by decreasing area in the crop; smaller ones become UNLABELLED


class UserError(Exception):
    """A mistake the user can mend: printed as one message, exit status 2, no traceback."""


# ---------------------------------------------------------------------- seeds and batches

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

    def __init__(self, length: int, batch_size: int, seed: int, rank: int = 0, world: int = 1,
                 accum: int = 1, start_step: int = 0, stop_step: int | None = None):
        if length < batch_size:
            raise UserError(f"the data has {length} samples, fewer than one batch of {batch_size}")
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
        if epoch != self.epoch:      # sorted by a hash of (seed, epoch, position)
            key = sample_seed(self.seed, epoch, -2)
            keys = _mix(np.arange(self.length, dtype=np.uint64) * GAMMA + key)
            self.epoch, self.order = epoch, np.argsort(keys, kind="stable")
        batch = self.order[at * self.batch_size:(at + 1) * self.batch_size]
        return [(epoch, index) for index in batch.tolist()]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while self.stop_step is None or step < self.stop_step:
            batch = self.indices(step)
            yield from (batch[start:start + self.micro] for start in self.starts)
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
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):                   # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=obey, daemon=True).start()


# ---------------------------------------------------------------------- geometry, labels


def _sizes(image_size, patch_size: int, granularities: Sequence[str]) -> tuple[tuple, tuple]:
    """Return ((H, W), (H/s, W/s)) with s = patch_size / 4; the second is () without maps."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    maps = set(granularities) - {"rgb"}
    if maps and (patch_size < 4 or patch_size % 4):
        raise UserError(f"patch_size {patch_size}: use a multiple of 4, a patch has 4 x 4 labels")
    for n in size:
        if n < patch_size or n % patch_size:
            low = max(n // patch_size, 1) * patch_size
            raise UserError(f"image_size {n} is not divisible by patch_size {patch_size}: "
                            f"use {low} or {low + patch_size}")
    return size, tuple(n * 4 // patch_size for n in size if maps)


def random_crop(draw, height: int, width: int, scale: Sequence[float]) -> tuple[int, ...]:
    """Draw torchvision's RandomResizedCrop box (top, left, h, w); `draw()` is uniform in [0, 1)."""
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * draw())
        ratio = math.exp((2 * draw() - 1) * math.log(4 / 3))         # log-uniform in 3/4..4/3
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


def _nearest(start: int, length: int, out: int, flip: bool = False) -> np.ndarray:
    """Return `out` nearest-exact indices into [start, start + length), mirrored first on `flip`."""
    at = (2 * np.arange(out) + 1) * length // (2 * out)          # floor((k + 0.5) * length / out)
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


# ---------------------------------------------------------------------- files

# A suffix only decides what is listed; the first bytes of a file say what it is. Not all that
# Pillow opens: its EPS reader starts Ghostscript.
SUFFIXES = "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm jp2".split()
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
LAYOUT = """
Expected: ROOT/{train,val}/rgb/[CLASS/]NAME.jpg and, where maps are asked for,
ROOT/{train,val}/{instance,semantic}/[CLASS/]NAME.png; or, for RGB alone,
ROOT/{train,val}/[CLASS/]NAME.jpg. To start without any files: --data shapes"""


class Unreadable(Exception):
    """An image that cannot be decoded; training replaces it."""


def _read(path: str) -> np.ndarray:
    """Return a file's bytes, (n,) uint8; network file systems get three more chances."""
    for pause in (0.05, 0.1, 0.2):
        try:
            return np.fromfile(path, np.uint8)
        except OSError:
            time.sleep(pause)
    return np.fromfile(path, np.uint8)


def decode_image(data: np.ndarray) -> torch.Tensor:
    """Decode bytes (n,) uint8 to RGB (3, H, W) uint8 as displayed. Any Exception: unreadable.

    Pillow reads the header and refuses decompression bombs. Grey and RGB JPEG then go through
    torchvision, all else through Pillow: torchvision's PNG decoder crashes on truncated files.
    Alpha is dropped, 16-bit grey keeps its upper byte, an animation its first frame.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            data = torch.from_numpy(data)
            return decode_jpeg(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        if image.mode in ("I", "F") and image.format != "PNG":
            raise ValueError("pixels of 32 bits")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def decode_map(data: np.ndarray) -> np.ndarray:
    """Decode a label map's bytes to ids (H, W), 8 bits or wider; any Exception says what is wrong.

    Grey of 1, 2 or 4 bits is refused: decoders stretch its values to 0..255 without a word.
    """
    if bytes(data[:8]) != b"\x89PNG\r\n\x1a\n":
        raise ValueError("not a PNG file")
    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        depth, colour = data[24], data[25]               # in the IHDR chunk; 0 is grey, 3 palette
        if colour != 3 and (colour or depth < 8):
            kind = {0: "grey", 2: "RGB", 4: "grey + alpha", 6: "RGBA"}[int(colour)]
            raise ValueError(f"{depth}-bit {kind}; a map is 8- or 16-bit grey, or has a palette")
        return np.asarray(image)


class FileList:
    """Names, labels and folders of one split in a single block of bytes, in memory or mapped.

    No Python object per file and no copy per worker: a list that was opened is pickled as its path.
    `block` (n,) uint8: int64 number of files, bytes of names, bytes of JSON; int64 offsets
    (files + 1); int32 labels; names, joined; JSON {"folders": {granularity: path}, "classes": []}.
    """

    def __init__(self, block: np.ndarray, folder: str | None = None):
        self.block, self.folder = block, folder
        count, names, meta = block[:24].view(np.int64).tolist()
        cuts = np.cumsum([24, 8 * (count + 1), 4 * count, names, meta])
        kinds = (np.int64, np.int32, np.uint8, np.uint8)
        self.offsets, self.labels, self.names, meta = (
            block[a:b].view(kind) for a, b, kind in zip(cuts, cuts[1:], kinds))
        meta = json.loads(meta.tobytes())
        self.folders, self.classes = meta["folders"], meta["classes"]

    @classmethod
    def build(cls, names: bytes, offsets: array, labels: array, folders: dict,
              classes: list) -> FileList:
        """Join the parts that the class docstring names; arrays of type "q" and "i"."""
        meta = json.dumps({"folders": folders, "classes": classes}).encode()
        parts = array("q", [len(labels), len(names), len(meta)]), offsets, labels, names, meta
        return cls(np.concatenate([np.frombuffer(part, np.uint8) for part in parts]))

    @classmethod
    def open(cls, folder: str) -> FileList:
        """Map the list that `save` left in a folder; pages are read when they are needed."""
        try:
            return cls(np.asarray(np.load(f"{folder}/files.npy", mmap_mode="r")), folder)
        except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
            raise UserError(f"cannot read the list of files {folder}/files.npy: {error}") from None

    def save(self, folder: str) -> FileList:
        """Write `files.npy` into a folder (temporary file, then renamed) and return it mapped."""
        os.makedirs(folder, exist_ok=True)
        with open(f"{folder}/files.npy.tmp", "wb") as file:
            np.save(file, self.block)
        os.replace(f"{folder}/files.npy.tmp", f"{folder}/files.npy")
        return FileList.open(folder)

    def __reduce__(self):
        return (FileList.open, (self.folder,)) if self.folder else (FileList, (self.block,))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return an image's path below the folder of images."""
        return os.fsdecode(self.names[self.offsets[index]:self.offsets[index + 1]].tobytes())

    def label(self, index: int) -> int:
        """Return the position of an image's first-level folder in `classes`, -1 without one."""
        return int(self.labels[index])


def _subfolders(path: str) -> list[str]:
    try:
        return sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != ".")
    except OSError:
        return []


def class_folders(path: str) -> list[str]:
    """Return the names of the folders that hold an image, at any depth, sorted: the classes."""
    def holds(folder: str, above: tuple = ()) -> bool:
        place = os.path.realpath(folder)
        return place not in above and any(               # a link to a folder above
            holds(e.path, (*above, place)) if e.is_dir()
            else e.name.rpartition(".")[2].lower() in SUFFIXES
            for e in os.scandir(folder) if e.name[0] != ".")

    try:
        return [name for name in _subfolders(path) if holds(f"{path}/{name}")]
    except OSError as error:
        raise UserError(f"cannot list {path}: {error}") from None


def layout(root: str, split: str) -> dict[str, str]:
    """Return {granularity: folder below root} of a split; {"rgb": split} if it has none of them."""
    inside = _subfolders(f"{root}/{split}")
    semantic = "semantic" if "semantic" in inside else "semseg"
    names = zip(GRANULARITIES, ("rgb", "instance", semantic))
    found = {g: f"{split}/{name}" for g, name in names if name in inside}
    return found or ({"rgb": split} if os.path.isdir(f"{root}/{split}") else {})


def _walk(folder: str, maps: list[str], prefix: str = "", above: tuple = ()) -> Iterator[tuple]:
    """Yield (name, map folders that lack it) of the images below a folder, sorted; follow links.

    A map folder is listed once: one call per map would take hours on a network file system.
    """
    stat = os.stat(folder)
    if (stat.st_dev, stat.st_ino) in above:                  # a link to a folder above
        return
    above = *above, (stat.st_dev, stat.st_ino)
    known = [set(os.listdir(m)) if os.path.isdir(m) else () for m in maps]
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        stem, _, suffix = entry.name.rpartition(".")
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            inner = [f"{m}/{entry.name}" for m in maps]
            yield from _walk(entry.path, inner, f"{prefix}{entry.name}/", above)
        elif stem and suffix.lower() in SUFFIXES and (entry.is_file() or entry.is_symlink()):
            lacking = [m for m, names in zip(maps, known) if f"{stem}.png" not in names]
            yield prefix + entry.name, lacking


def scan(root: str, split: str, granularities: Sequence[str] = ("rgb",)) -> FileList:
    """List a split's images, sorted, and make sure that each has its maps (rank 0 only).

    Classes are the first-level folders of train and val together that hold an image, so both splits
    number them alike.
    """
    base, folders = f"{root}/{split}", layout(root, split)
    if not folders:
        seen = ", ".join(_subfolders(root)[:8]) or "no folders"
        where = f"{base} (in {root}: {seen})" if os.path.isdir(root) else root
        raise UserError(f"there is no folder {where}{LAYOUT}")
    lacking = [g for g in ("rgb", *granularities) if g not in folders]
    if lacking:
        found = f"only {', '.join(folders)} found in {base}, no {', '.join(lacking)}"
        raise UserError(found + LAYOUT)
    folders = {g: folders[g] for g in GRANULARITIES if g == "rgb" or g in granularities}
    images, *maps = (f"{root}/{folder}" for folder in folders.values())
    places = [f"{root}/{layout(root, s).get('rgb', '?')}" for s in {split, "train", "val"}]
    classes = sorted({name for place in places for name in class_folders(place)})
    numbers = {name: number for number, name in enumerate(classes)}
    names, offsets, labels, count, orphans = bytearray(), array("q", [0]), array("i"), 0, []
    try:
        for name, lacking in _walk(images, maps):
            names += os.fsencode(name)
            offsets.append(len(names))
            labels.append(numbers[name.partition("/")[0]] if "/" in name else -1)
            count += bool(lacking)
            orphans += [f"\n  {name}: not in {m}" for m in lacking if len(orphans) < 5]
    except OSError as error:
        raise UserError(f"cannot list {images}: {error}") from None
    if not labels:
        raise UserError(f"no images ({' '.join(SUFFIXES)}) in {images}{LAYOUT}")
    if count:
        raise UserError(f"{count} of {len(labels)} images have no map, a .png of the same name:"
                        + "".join(orphans))
    return FileList.build(bytes(names), offsets, labels, folders, classes)


class FolderDataset(Dataset):
    """Images of a folder and their maps, cropped and flipped together.

    Args: `root` and `split`, see the module; `files`, None to scan now; `image_size`, a number or
    (H, W); `scale`, the crop's share of the area; `train` False takes the largest centred crop
    times `crop_pct` (0.875 for the usual resize to 256 and crop to 224).

    `dataset[epoch, index]` is a batch without its first axis. An unreadable image is replaced by
    the next one under the same seed, and `bad` is its index, otherwise -1. A map that does not fit
    its image is never replaced: the sample is {"error": message}.
    """

    def __init__(self, root: str, split: str, files: FileList | None, image_size=224,
                 patch_size: int = 16, granularities: Sequence[str] = ("rgb",),
                 scale: Sequence[float] = (0.2, 1.0), train: bool = True, seed: int = 0,
                 semantic_classes: int = 133, crop_pct: float = 1.0):
        self.size, self.label_size = _sizes(image_size, patch_size, granularities)
        if not 1 <= semantic_classes <= UNLABELLED:
            raise UserError(f"semantic_classes {semantic_classes}: use 1 to {UNLABELLED}")
        self.files = files = scan(root, split, granularities) if files is None else files
        if not set(granularities) <= set(files.folders):
            raise UserError(f"this list of files has {', '.join(files.folders)} alone")
        self.folders = {g: f"{root}/{folder}" for g, folder in files.folders.items()}
        self.granularities = tuple(granularities)
        self.scale, self.train, self.seed, self.crop_pct = scale, train, seed, crop_pct
        self.semantic_classes, self.classes = semantic_classes, files.classes

    def __len__(self) -> int:
        return len(self.files)

    def load(self, index: int) -> tuple[torch.Tensor, dict[str, np.ndarray]]:
        """Decode an image (3, H, W) and its maps (H, W). Raises Unreadable; UserError on maps."""
        name, maps = self.files.name(index), {}
        try:
            rgb = decode_image(_read(f"{self.folders['rgb']}/{name}"))
        except Exception as error:                       # Pillow raises anything on broken files
            raise Unreadable(f"{name}: {error or type(error).__name__}") from None
        height, width = rgb.shape[1:]
        for granularity in (g for g in self.granularities if g != "rgb"):
            path = f"{self.folders[granularity]}/{name.rpartition('.')[0]}.png"
            try:
                ids = maps[granularity] = decode_map(_read(path))
            except Exception as error:
                raise UserError(f"{path}: {error or type(error).__name__}") from None
            if ids.shape != (height, width):
                raise UserError(f"{path}: {ids.shape[1]} x {ids.shape[0]}, but its image is "
                                f"displayed at {width} x {height}; does EXIF turn it?")
            if granularity == "semantic" and (
                    ids.dtype != np.uint8 or (ids + 1).max() > self.semantic_classes):   # 255 wraps
                wrong = ids[(ids >= self.semantic_classes) & (ids != UNLABELLED)]
                if wrong.size:
                    raise UserError(f"{path}: id {wrong[0]} is neither below semantic_classes = "
                                    f"{self.semantic_classes} nor {UNLABELLED}, unlabelled")
        return rgb, maps

    def augment(self, rgb: torch.Tensor, maps: dict, seed: int) -> dict[str, torch.Tensor]:
        """Crop, resize and flip what `load` gave, all alike."""
        draw = random.Random(seed).random
        if self.train:
            (top, left, h, w), flip = random_crop(draw, *rgb.shape[1:], self.scale), draw() < 0.5
        else:
            (top, left, h, w), flip = centre_crop(*rgb.shape[1:], self.size, self.crop_pct), False
        sample = {}
        if "rgb" in self.granularities:              # channels last, as decoded: the fastest resize
            rgb = rgb[None, :, top:top + h, left:left + w]
            rgb = rgb.contiguous(memory_format=torch.channels_last)
            rgb = F.interpolate(rgb, self.size, mode="bicubic", antialias=True)[0]
            sample["rgb"] = (rgb.flip(-1) if flip else rgb).contiguous()
        for granularity, ids in maps.items():
            rows = _nearest(top, h, self.label_size[0])[:, None]
            cols = _nearest(left, w, self.label_size[1], flip)
            unlabelled, ids = UNLABELLED if ids.dtype == np.uint8 else 65535, ids[rows, cols]
            ids = relabel(ids, unlabelled) if granularity == "instance" else ids.astype(np.uint8)
            sample[granularity] = torch.from_numpy(ids)
        return sample

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        seed, error = sample_seed(self.seed, epoch, index), None
        for skip in range(min(32, len(self))):
            at = (index + skip) % len(self)
            try:
                sample = self.augment(*self.load(at), seed)
                return sample | _scalars(self.files.label(at), seed, index if skip else -1)
            except Unreadable as unreadable:
                error = unreadable
            except UserError as misfit:
                return {"error": str(misfit)}
        return {"error": f"{skip + 1} images in a row cannot be read, at last {error}"}


def _scalars(label: int, seed: int, bad: int) -> dict[str, torch.Tensor]:
    return {"label": torch.tensor(label), "seed": torch.tensor(seed), "bad": torch.tensor(bad)}


def check(dataset: Dataset, limit: int | None = 1000) -> str:
    """Load `limit` evenly spaced samples, None for all, and return a line of findings.

    Raises UserError with the count and the first few if maps do not fit. Unreadable images are only
    counted, as training replaces them, unless there is no other.
    """
    if isinstance(dataset, ShapeScenes):
        return "ShapeScenes: nothing to check"
    total = len(dataset)
    picks = np.linspace(0, total - 1, min(total, limit or total)).astype(int).tolist()
    found = {Unreadable: [], UserError: []}

    def load(index: int) -> None:
        try:
            dataset.load(index)
        except (Unreadable, UserError) as error:
            found[type(error)].append(str(error))

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(picks), 1024):         # a bounded queue
            list(pool.map(load, picks[start:start + 1024]))
    unreadable, misfits = sorted(found[Unreadable]), sorted(found[UserError])
    if misfits:
        lines = [f"{len(misfits)} of {len(picks)} checked samples do not fit:", *misfits[:5]]
        raise UserError("\n  ".join(lines))
    if len(unreadable) == len(picks):
        raise UserError(f"none of {len(picks)} images can be read, e.g. {unreadable[0]}")
    line = f"{len(picks)} of {total} samples checked, {len(unreadable)} images unreadable"
    return "\n  ".join([line, *unreadable[:5]])


# ---------------------------------------------------------------------- ShapeScenes

STUFF = {   # two palettes each, from dark to light: colour may hint, but the texture tells
    "sky": ((0x5B93D6, 0xF2F6FA), (0xD98A6A, 0xFBE3C0)),
    "grass": ((0x3C6B2A, 0x8DBB55), (0x7A7438, 0xC9BE78)),
    "water": ((0x1F5A80, 0x74B5C9), (0x4A6A6E, 0xB9CCC8)),
    "sand": ((0xA98A5A, 0xEBD9AE), (0x98725C, 0xDDB598)),
    "brick": ((0x9C4B3A, 0xD9CDBE), (0x6E6A68, 0xC9C4BC)),
    "snow": ((0x93ABCB, 0xFFFFFF), (0xA9A6BC, 0xFFF7F0)),
}
SHAPES = tuple("disc square triangle star cross ring crescent heart flower bar".split())
HOLES = {"ring": (0.0, 0.55), "crescent": (0.5, 0.75)}       # centre and radius of a disc cut out
ANGLES = 720                                                 # entries of an outline


def _outlines() -> np.ndarray:
    """Return the radius of each of SHAPES at ANGLES angles from -pi to pi, (10, ANGLES) float32."""
    a = (np.arange(ANGLES) + 0.5) * (2 * np.pi / ANGLES) - np.pi
    disc = np.ones(ANGLES)

    def polygon(sides):
        return 1 / np.cos(a % (2 * np.pi / sides) - np.pi / sides)

    def box(w, h):
        return np.minimum(w / np.abs(np.cos(a)), h / np.abs(np.sin(a)))

    t = np.abs((a * 5 / (2 * np.pi)) % 1 - 0.5) * (2 * np.pi / 5)        # from an inner corner
    star = 0.4 * np.sin(np.pi / 5) / (0.4 * np.sin(t) + np.sin(np.pi / 5 - t))
    heart = np.max([0.5 * polygon(4), np.cos(a - 0.75 * np.pi), np.cos(a + 0.75 * np.pi)], axis=0)
    flower = 0.5 + 0.5 * np.sqrt(np.abs(np.cos(2.5 * a)))
    cross = np.maximum(box(1, 0.33), box(0.33, 1))
    bar, square, triangle = box(1, 0.36), box(1, 1), polygon(3)
    radii = [disc, square, triangle, star, cross, disc, disc, heart, flower, bar]
    return np.array(radii, np.float32)


class ShapeScenes(Dataset):
    """Procedural scenes: 2 to 6 objects of ten SHAPES on two or three of six kinds of STUFF.

    They stand in for photographs with panoptic maps: RGB and maps agree to the pixel, and neither
    colour, size nor pose tells an object's class. (split, index) fixes the scene; with `train` a
    sample's seed shifts, zooms and mirrors the view, so that epochs differ. Scenes live in unit
    coordinates (the short side is 1) and are drawn at any image size.

    Args and samples as FolderDataset's; `length` None is 20,000 for "train" and 2,000 otherwise.
    `label` is the shape of the largest visible object; semantic ids count STUFF, then SHAPES.
    """

    CLASS_NAMES = SHAPES
    SEMANTIC_NAMES = (*STUFF, *SHAPES)
    SEMANTIC_CLASSES = len(STUFF) + len(SHAPES)

    def __init__(self, split: str = "train", image_size=64, patch_size: int = 8,
                 granularities: Sequence[str] = GRANULARITIES, train: bool = True, seed: int = 0,
                 length: int | None = None):
        self.size, self.label_size = _sizes(image_size, patch_size, granularities)
        self.granularities, self.train, self.seed = tuple(granularities), train, seed
        self.split, self.classes = int.from_bytes(split.encode(), "little"), list(SHAPES)
        self.length = length if length is not None else 20_000 if split == "train" else 2_000
        self.extent = tuple(n / min(self.size) for n in self.size)
        self.outlines = _outlines()
        v, u = np.mgrid[-2:2:0.02, -2:2:0.02].astype(np.float32)
        area = [(self._inside(shape, u, v) > 0).mean() * 16 for shape in range(len(SHAPES))]
        self.scale = np.sqrt(np.pi / np.array(area)).tolist()     # to equal areas
        self.sheets = self._sheets()

    def __len__(self) -> int:
        return self.length

    def _inside(self, shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return how deep (u, v) lies inside a shape's outline, measured along the ray."""
        turn = np.arctan2(v, u) * (ANGLES / (2 * np.pi)) + ANGLES / 2
        outline = self.outlines[shape].take(turn.astype(np.intp), mode="clip")
        inside = outline - np.sqrt(u * u + v * v)
        if SHAPES[shape] in HOLES:
            centre, radius = HOLES[SHAPES[shape]]
            inside = np.minimum(inside, np.sqrt((u - centre) ** 2 + v * v) - radius)
        return inside

    def _sheets(self) -> np.ndarray:
        """Draw sheets of each stuff's texture and of white noise, (7, 2H, 2W), to cut from."""
        H, W = (2 * n for n in self.size)
        y, x = (((np.arange(n) + 0.5) / min(self.size)).astype(np.float32) for n in (H, W))
        y, rng = y[:, None], np.random.Generator(np.random.PCG64(0))

        def noise(fy, fx):                                   # smooth, fy x fx cells per unit
            cells = [math.ceil(2 * f * e) for f, e in zip((fy, fx), self.extent)]
            cells = torch.from_numpy(rng.random((1, 1, *cells), np.float32))
            return F.interpolate(cells, (H, W), mode="bilinear")[0, 0].numpy()

        row, column = y * 9, x * 4.5 + np.floor(y * 9) * 0.5
        joint = (np.abs(row % 1 - 0.5) > 0.42) | (np.abs(column % 1 - 0.5) > 0.46)
        waves = np.sin(2 * np.pi * (9 * y + 1.1 * noise(9, 2.5)))
        return np.stack([
            np.clip(0.6 * noise(4, 2) + 0.6 * noise(9, 5) - 0.1, 0, 1) ** 2,        # clouds
            0.75 * noise(9, 48) + 0.25 * noise(3, 3),                               # blades
            0.5 + 0.5 * waves * noise(6, 3),                                        # ripples
            0.7 * noise(60, 60) + 0.3 * noise(3, 3),                                # grains
            np.where(joint, 1, 0.15 + 0.35 * noise(9, 4.5)),                        # bricks
            1 - 0.8 * noise(7, 2) * noise(3, 2) - (noise(24, 24) > 0.85) * 0.3,     # drifts, tracks
            rng.random((H, W), np.float32),
        ]).astype(np.float32)

    def _cut(self, draw, sheet: int) -> np.ndarray:
        top, left = int(draw() * self.size[0]), int(draw() * self.size[1])
        return self.sheets[sheet, top:top + self.size[0], left:left + self.size[1]]

    def _ground(self, draw, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Paint a far, a middle and a near kind of stuff: RGB (3, H, W) in 0..255, ids (H, W)."""
        kinds = [(0, 0, 4, 5)[int(draw() * 4)]]              # the far one: sky, sky, brick or snow
        while len(kinds) < 3:
            kinds += {1 + int(draw() * 5)} - set(kinds)
        band, level = np.zeros(self.size, np.intp), 0.2
        for height in (0.3, 0.6):                            # the near one is often out of view
            level += height * draw() * self.extent[0]
            bend, waves, phase = 0.04 * draw(), 2 + 6 * draw(), 6.3 * draw()
            band += y[:, None] > level + bend * np.sin(waves * x + phase)
            level += 0.2
        tones = np.empty((2, 3, 3), np.float32)              # dark or light, channel, band
        for b, kind in enumerate(kinds):
            palette = list(STUFF.values())[kind][int(draw() * 2)]
            for c, bits in enumerate((16, 8, 0)):
                shift = 40 * draw() - 20
                tones[:, c, b] = [(colour >> bits & 255) + shift for colour in palette]
        canvas = (tones[1] - tones[0])[:, band]
        canvas *= np.choose(band, [self._cut(draw, kind) for kind in kinds])
        canvas += tones[0][:, band]
        return canvas, np.array(kinds, np.uint8)[band]

    def _paint(self, draw, y, x, canvas: np.ndarray, light: float, spread: float) -> tuple:
        """Paint an object and its shadow; return its shape, window and cover in the window."""
        shape = int(draw() * len(SHAPES))
        cy, cx = (e * (0.5 + spread * (2 * draw() - 1)) for e in self.extent)
        angle, aspect = 2 * math.pi * draw(), 0.85 + 0.3 * draw()
        size = (0.09 + 0.09 * draw()) * self.scale[shape]
        reach = size * float(self.outlines[shape].max()) * max(aspect, 1 / aspect)
        rows = slice(*np.searchsorted(y, (cy - reach, cy + reach)))
        cols = slice(*np.searchsorted(x, (cx - reach, cx + reach)))
        dy, dx = (y[rows, None] - cy) / size, (x[None, cols] - cx) / size
        c, s = math.cos(angle), math.sin(angle)
        u, v = (c * dx + s * dy) * aspect, (c * dy - s * dx) / aspect
        inside, pixel = self._inside(shape, u, v), size / float(y[1] - y[0])
        cover = np.clip(inside * pixel + 0.5, 0, 1)          # soft edges
        drop = max(1, round(0.25 * pixel))
        below = canvas[:, rows.start + drop:rows.stop + drop, cols]
        below *= 1 - 0.35 * cover[:below.shape[1]]
        pattern, waves, phase = int(draw() * 4), 4 + 5 * draw(), 6.3 * draw()
        mark = np.float32(0)
        if pattern:                                          # else plain; stripes, checks, rings
            mark = np.sin(waves * (u if pattern < 3 else u * u + v * v) + phase)
            mark = np.clip(2 * (mark * np.sin(waves * v) if pattern == 2 else mark) + 0.5, 0, 1)
        hue, step, value = draw(), 0.1 + 0.4 * draw(), 0.45 + 0.5 * draw()
        saturation = 0.25 + 0.7 * draw()
        first = colorsys.hsv_to_rgb(hue, saturation, value)
        second = colorsys.hsv_to_rgb(hue + step, saturation * 0.8, 1.3 - value)
        first, second = np.array((first, second), np.float32)[:, :, None, None] * 255
        shade = 1 - 0.3 * (light * dx + dy) - 0.35 * np.exp(-5 * np.maximum(inside, 0))
        window = canvas[:, rows, cols]
        window += cover * ((first + (second - first) * mark) * shade - window)
        return shape, (rows, cols), cover > 0.5

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, index = key
        seed = sample_seed(self.seed, epoch, index)
        draw = random.Random(sample_seed(self.split, 0, index)).random   # the scene
        view = random.Random(seed).random                                # how it is seen
        zoom, flip = (1 + 0.3 * view(), view() < 0.5) if self.train else (1, False)
        y, x = ((np.arange(n) + 0.5) / (min(self.size) * zoom) + e * (1 - 1 / zoom) * view()
                for n, e in zip(self.size, self.extent))
        y, x = y.astype(np.float32), x.astype(np.float32)
        canvas, semantic = self._ground(draw, y, x)
        instance, shapes = np.zeros(self.size, np.uint8), []
        light, count = 2 * draw() - 1, 2 + int(draw() * 5)
        for number in range(1, count + 1):                   # the last one is always in view
            spread = 0.4 if number < count else 0.2
            shape, window, covered = self._paint(draw, y, x, canvas, light, spread)
            instance[window][covered] = number
            semantic[window][covered] = len(STUFF) + shape
            shapes.append(shape)
        canvas *= 1.05 - 0.2 * (light * (x - 0.5) + (y[:, None] - 0.5))
        canvas += 24 * self._cut(draw, 6) - 12
        label = shapes[int(np.bincount(instance.ravel(), minlength=count + 1)[1:].argmax())]
        rgb = np.clip(canvas[:, :, ::-1] if flip else canvas, 0, 255).astype(np.uint8)
        sample = {"rgb": rgb}
        if self.label_size:
            rows, cols = (_nearest(0, n, out) for n, out in zip(self.size, self.label_size))
            at = rows[:, None], self.size[1] - 1 - cols if flip else cols
            sample |= {"instance": relabel(instance[at]), "semantic": semantic[at]}
        sample = {g: torch.from_numpy(a) for g, a in sample.items() if g in self.granularities}
        return sample | _scalars(label, seed, -1)


# ---------------------------------------------------------------------- entry points


def open_dataset(data: str, split: str, image_size, patch_size: int, granularities: Sequence[str],
                 scale: Sequence[float], train: bool, seed: int, files: FileList | None = None,
                 semantic_classes: int = 133) -> Dataset:
    """Open "shapes" or a folder; see ShapeScenes and FolderDataset."""
    if data == "shapes":
        return ShapeScenes(split, image_size, patch_size, granularities, train, seed)
    return FolderDataset(data, split, files, image_size, patch_size, granularities, scale, train,
                         seed, semantic_classes)


def main(argv: Sequence[str] | None = None) -> int:
    """List the splits of a folder and, with --check, read all of it."""
    parser = argparse.ArgumentParser(description="Look over a folder of images and maps.")
    parser.add_argument("root", help="the folder that holds train/ and val/")
    parser.add_argument("--check", action="store_true", help="decode every image and map")
    parser.add_argument("--semantic-classes", type=int, default=133, help="how many (default 133)")
    args = parser.parse_args(argv)
    try:
        for split in [s for s in ("train", "val") if layout(args.root, s)] or ["train"]:
            found = tuple(layout(args.root, split))
            data = FolderDataset(args.root, split, None, granularities=found or ("rgb",),
                                 semantic_classes=args.semantic_classes)
            found = ", ".join(data.folders)
            print(f"{split}: {len(data)} images, {len(data.classes)} class folders, {found}")
            if args.check:
                print(f"{split}: {check(data, None)}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
