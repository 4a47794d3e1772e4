"""Clips, folders of frames: sampled in time, cropped alike, batched as images are.

    ROOT/{train,val}/[CLASS/]CLIP/000001.jpg ...      tools/frames.py makes such folders of videos

Map: `scan`, `check`, `open_dataset`      as data.py's, for `engine.Run(..., source=clips)`
     `Frames`                             what lies in the folder of a clip
     `dense`, `segments`                  which frames are taken
     `multi_scale_crop`, `side_crops`     where they are cropped
     `ClipDataset`                        clips, or all test views of them

A batch's `rgb` is (B, T, 3, H, W) uint8. All draws come from a sample's seed, one crop and one flip
for all frames of a clip. A frame that is missing or cannot be decoded makes the clip unreadable: as
an image, it is replaced by the next one, under its own seed.
"""

import os
import random
from array import array
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

import data
from data import FolderDataset, centre_crop, random_crop
from files import SUFFIXES, FileList, Unreadable, UserError, decode_image, is_image, patiently
from files import read_bytes, subfolders

LAYOUT = """
Expected: ROOT/{train,val}/[CLASS/]CLIP/000001.jpg, a folder of frames for each clip; of videos,
python -m tools.frames makes them. To start without any files: --data shapes"""


# --------------------------------------------------------------------------------- lists of clips


def _walk(folder: str, prefix: str = "", above: tuple = ()) -> Iterator[str]:
    """Yield the names of the clips below a folder, sorted; follow links. Frames end the search."""
    place = os.path.realpath(folder)
    if place in above:  # a link to a folder above
        return
    if prefix and any(is_image(e.name) for e in os.scandir(folder)):
        yield prefix[:-1]
        return
    for name in subfolders(folder):
        yield from _walk(f"{folder}/{name}", f"{prefix}{name}/", (*above, place))


def class_names(root: str) -> list[str]:
    """Classes of train and val together: first-level folders that are no clip but hold one."""
    names = set()
    for base in (f"{root}/train", f"{root}/val"):
        for name in subfolders(base):
            first = next(_walk(f"{base}/{name}", f"{name}/"), name)
            names |= {name} if first != name else set()
    return sorted(names)


def scan(root: str, split: str, granularities: Sequence[str] = ("rgb",)) -> FileList:
    """List a split's clips, sorted (rank 0 only). Both splits number classes alike."""
    base = f"{root}/{split}"
    if not os.path.isdir(base):
        raise UserError(f"there is no folder {base}{LAYOUT}")
    try:
        if any(map(is_image, os.listdir(base))):
            raise UserError(f"frames lie in {base} itself, in no folder of a clip{LAYOUT}")
        names = list(_walk(base))
        classes = class_names(root)
    except OSError as error:
        raise UserError(f"cannot list {base}: {error}") from None
    if not names:
        raise UserError(f"no folders of frames ({' '.join(SUFFIXES)}) in {base}{LAYOUT}")
    numbers = {name: number for number, name in enumerate(classes)}
    labels = array("i", (numbers[n.partition("/")[0]] if "/" in n else -1 for n in names))
    names = np.array([os.fsencode(name) for name in names])
    return FileList(names, np.frombuffer(labels, np.int32), {"rgb": split}, classes)


class Frames:
    """The frames of a clip's folder, in order: by number where all names are numbers, else by name.

    Numbers count from the first one there is; one that is missing is so, and its neighbours stay.
    """

    def __init__(self, folder: str):
        try:
            names = sorted(filter(is_image, patiently(lambda: os.listdir(folder))))
        except OSError as error:
            raise Unreadable(f"{folder}: {error.strerror}") from None
        if not names:
            raise Unreadable(f"{folder}: no frames")
        stems = [name.rpartition(".")[0] for name in names]
        numbered = all(stem.isascii() and stem.isdecimal() for stem in stems)
        numbers = map(int, stems) if numbered else range(len(names))
        self.folder, self.names = folder, dict(zip(numbers, names))
        self.first, self.last = min(self.names), max(self.names)

    def __len__(self) -> int:
        return self.last - self.first + 1

    def __getitem__(self, at: int) -> Tensor:
        """Decode frame `at` of the clip, (3, H, W) uint8. Raises Unreadable."""
        number = self.first + at
        if number not in self.names:
            raise Unreadable(f"{self.folder}: frame {number} is missing")
        try:
            return decode_image(read_bytes(f"{self.folder}/{self.names[number]}"))
        except Exception as error:  # Pillow raises anything on broken files
            words = str(error) or type(error).__name__
            raise Unreadable(f"{self.folder}/{self.names[number]}: {words}") from None


# ---------------------------------------------------------------------------------- time and space


def dense(length: int, frames: int, stride: int, share: float, views: bool = False) -> list[int]:
    """Take every `stride`-th frame of a part of a clip, as VideoMAE does on Kinetics.

    Args:
        length: of the clip, in frames. stride: 0 takes one frame, again and again.
        share: in [0, 1), where the part begins among all its places; with `views` in [0, 1], from
            the first of them to the last.
    Returns: `frames` indices; where the clip ends before, the last one is repeated.
    """
    if not stride:
        return [min(int(share * length), length - 1)] * frames
    if views:  # places are a stride apart
        start = int(share * max(-(-length // stride) - frames, 0)) * stride
    else:
        start = int(share * (max(length - frames * stride, 0) + 1))
    last = (length - 1 - start) // stride
    return [start + min(i, last) * stride for i in range(frames)]


def segments(length: int, frames: int, shares: Sequence[float]) -> list[int]:
    """Take a frame of each of `frames` equal parts of a clip, as VideoMAE does on SSv2.

    Args: `shares`, in [0, 1), one a part: where in it.
    """
    return [int((i + share) * length / frames) for i, share in enumerate(shares)]


# Where VideoMAE's crops begin, (down, right) in quarters of the room there is.
PLACES = (
    (0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (2, 0), (2, 4), (4, 2), (0, 2), (1, 1), (1, 3), (3, 1),
    (3, 3),
)  # fmt: skip


def multi_scale_crop(draw, height: int, width: int) -> tuple[int, int, int, int]:
    """VideoMAE's crop (top, left, h, w): sides of 1, .875, .75, .66 of the short one.

    The two sides are at most a step apart; the crop lies at one of 13 places. `draw()` is uniform.
    """
    sides = [int(min(height, width) * x) for x in (1, 0.875, 0.75, 0.66)]
    pairs = [(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) <= 1]
    h, w = (max(n, 1) for n in pairs[int(draw() * len(pairs))])
    down, right = PLACES[int(draw() * len(PLACES))]
    return (height - h) // 4 * down, (width - w) // 4 * right, h, w


def side_crops(height: int, width: int, count: int) -> list[tuple[int, int, int, int]]:
    """`count` squares along the longer side, from one end to the other; one: the middle."""
    side, room = min(height, width), abs(height - width)
    steps = [k / (count - 1) for k in range(count)] if count > 1 else [0.5]
    places = [int(step * room) for step in steps]
    return [(p, 0, side, side) if height > width else (0, p, side, side) for p in places]


# --------------------------------------------------------------------------------------- data set


class ClipDataset(FolderDataset):
    """Clips of a folder.

    Args, beside FolderDataset's:
        frames, stride: of a sample.
        sampling: "dense" or "segments".
        crop: "multi-scale", or "resized", the RandomResizedCrop of images.
        flip: whether half of the clips are mirrored in training.
        views: (in time, in space), of every clip all of them: `rgb` (n, T, 3, H, W). None: with
            `train` a random one, else the one in the middle.
    """

    def __init__(
        self, root: str, split: str, files: FileList | None, image_size: int, frames: int = 16,
        stride: int = 4, sampling: str = "dense", crop: str = "multi-scale", flip: bool = True,
        views: tuple[int, int] | None = None, scale: Sequence[float] = (0.08, 1.0),
        train: bool = True, seed: int = 0, crop_pct: float = 1.0,
    ):  # fmt: skip
        super().__init__(
            root, split, scan(root, split) if files is None else files, image_size, scale=scale,
            train=train, seed=seed, crop_pct=crop_pct, transform=self.clip,
        )  # fmt: skip
        self.frames, self.stride, self.sampling = frames, stride, sampling
        self.cropping, self.flip, self.views = crop, flip, views

    def load(self, index: int) -> tuple[Frames, dict]:
        return Frames(self.files.where(self.root, "rgb", index)), {}

    def times(self, length: int, draw) -> list[list[int]]:
        """Frames of each view in time."""
        n, once = self.frames, self.sampling == "dense" or not self.stride  # of one run of frames
        if self.views:
            count = self.views[0]
            if once:
                shares = [v / (count - 1) for v in range(count)] if count > 1 else [0.5]
                return [dense(length, n, self.stride, share, True) for share in shares]
            return [segments(length, n, [v / count] * n) for v in range(count)]
        if once:
            share = draw() if self.train else 0.5
            return [dense(length, n, self.stride, share, not self.train)]
        return [segments(length, n, [draw() if self.train else 0.5 for _ in range(n)])]

    def boxes(self, height: int, width: int, draw) -> list[tuple]:
        """Crops (top, left, h, w) of each view in space."""
        if self.views:
            return side_crops(height, width, self.views[1])
        if not self.train:
            return [centre_crop(height, width, self.size, self.crop_pct)]
        if self.cropping == "resized":
            return [random_crop(draw, height, width, self.scale)]
        return [multi_scale_crop(draw, height, width)]

    def clip(self, frames: Frames, _: dict, seed: int) -> dict[str, Tensor]:
        """Decode, crop, resize and flip the frames of a sample; Unreadable where one is."""
        draw = random.Random(seed).random
        times = self.times(len(frames), draw)
        decoded = {at: frames[at] for at in sorted({at for view in times for at in view})}
        if len({x.shape for x in decoded.values()}) > 1:
            raise Unreadable(f"{frames.folder}: frames of several sizes")
        height, width = next(iter(decoded.values())).shape[1:]
        boxes, views = self.boxes(height, width, draw), []
        flip = self.train and self.flip and draw() < 0.5
        for top, left, h, w in boxes:
            small = {at: x[None, :, top : top + h, left : left + w] for at, x in decoded.items()}
            x = torch.cat(list(small.values())).contiguous(memory_format=torch.channels_last)
            x = F.interpolate(x, self.size, mode="bilinear", antialias=True)
            x = dict(zip(small, x.flip(-1) if flip else x))
            views += [torch.stack([x[at] for at in view]).contiguous() for view in times]
        return {"rgb": torch.stack(views) if self.views else views[0]}


def check(dataset: ClipDataset, limit: int | None = 200) -> str:
    """Decode `limit` evenly spaced clips as seed 0 sees them, see `data.check`."""
    return data.check(dataset, limit, lambda index: dataset.clip(*dataset.load(index), 0))


def open_dataset(
    root: str, split: str, image_size, patch_size: int, granularities: Sequence[str],
    scale: Sequence[float], train: bool, seed: int, files: FileList | None = None, **options,
) -> Dataset:  # fmt: skip
    """Open "shapes", see motion.py, or a folder; `options` as ClipDataset's."""
    if root == "shapes":
        from motion import MovingScenes  # which needs data.py alone

        own = {k: options[k] for k in ("frames", "stride", "flip") if k in options}
        return MovingScenes(split, image_size, train=train, seed=seed, **own)
    return ClipDataset(
        root, split, files, image_size, scale=scale, train=train, seed=seed, **options
    )
