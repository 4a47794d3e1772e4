"""Files of images and maps: listed once, shared by all workers, decoded from bytes.

    layout, scan, FileList       which images a split has, and where their maps lie
    decode_image, decode_map     bytes to arrays; nothing of a broken file is believed

A folder is ROOT/{train,val}/{rgb,instance,semantic}/, with class folders or without; docs/data.md.
Where tools/pack.py made shards of it, ROOT/{train,val}/ is a list of files itself, see shards.py.
"""

import contextlib
import io
import json
import os
import struct
import time
import typing
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

# Names of each granularity's folder below a split; the first is ours, `semseg` MultiMAE's.
FOLDERS = {"rgb": ("rgb",), "instance": ("instance",), "semantic": ("semantic", "semseg")}


class UserError(Exception):
    """A mistake the user can mend: printed as one message, exit status 2, no traceback."""


# A suffix only decides what is listed; the first bytes of a file say what it is. Not all that
# Pillow opens: its EPS reader starts Ghostscript.
SUFFIXES = "jpg jpeg jpe jfif png webp bmp gif tif tiff ppm pgm jp2".split()
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
LAYOUT = """
Expected: ROOT/{train,val}/rgb/[CLASS/]NAME.jpg and, where maps are asked for,
ROOT/{train,val}/{instance,semantic}/[CLASS/]NAME.png; or, for RGB alone,
ROOT/{train,val}/[CLASS/]NAME.jpg, or a folder of photographs.
To start without any files: --data shapes"""


T = typing.TypeVar("T")


class Unreadable(Exception):
    """An image that cannot be decoded; training replaces it."""


def patiently(read: Callable[[], T]) -> T:
    """Call `read` until it raises no OSError; network file systems get three more chances."""
    for pause in (0.05, 0.1, 0.2):
        try:
            return read()
        except OSError:
            time.sleep(pause)
    return read()


def read_bytes(path: str) -> np.ndarray:
    """Return a file's bytes, (n,) uint8."""
    return patiently(lambda: np.fromfile(path, np.uint8))


def open_image(data: np.ndarray, formats: Sequence[str]) -> Image.Image:
    """Open bytes with Pillow, whose own message would name the address of a buffer."""
    try:
        return Image.open(io.BytesIO(data), formats=formats)
    except UnidentifiedImageError:
        raise ValueError("not an image that Pillow or torchvision reads") from None


def decode_image(data: np.ndarray) -> Tensor:
    """Decode bytes (n,) uint8 to RGB (3, H, W) uint8 as displayed. Any Exception: unreadable.

    Pillow reads the header and refuses decompression bombs. Grey and RGB JPEG then go through
    torchvision, all else through Pillow: torchvision's PNG decoder crashes on truncated files.
    Alpha is dropped, 16-bit grey keeps its upper byte, an animation its first frame.
    """
    from torchvision.io import ImageReadMode, decode_jpeg  # two CPU seconds, for folders alone

    with open_image(data, FORMATS) as image:
        if image.format in ("JPEG", "MPO") and image.mode in ("L", "RGB"):
            data = torch.from_numpy(data)
            return decode_jpeg(data, mode=ImageReadMode.RGB, apply_exif_orientation=True)
        if image.mode in ("I", "F") and image.format != "PNG":
            raise ValueError("more than 8 bits a pixel; 16-bit grey is read as PNG or TIFF")
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def unfiltered(data: bytes) -> np.ndarray | None:
    """Ids (H, W) uint8 of a palette PNG of 8 bits whose rows are not filtered, as Pillow and libpng
    write them, in half of Pillow's time; None of any other, for Pillow to read or to refuse.
    """
    width, height, *kind = struct.unpack_from(">2I5B", data.ljust(29), 16)
    if kind != [8, 3, 0, 0, 0] or width * height > Image.MAX_IMAGE_PIXELS:
        return None
    at, parts, name = 8, [], b""
    while at + 8 <= len(data) and name != b"IEND":
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"IDAT":
            parts.append(data[at + 8 : at + 8 + length])
        at += 12 + length
    size, stream = height * (width + 1), zlib.decompressobj()  # a row's filter stands before it
    try:
        rows = np.frombuffer(stream.decompress(b"".join(parts), size + 1), np.uint8)
    except zlib.error:
        return None
    if name != b"IEND" or not stream.eof or len(rows) != size:
        return None
    rows = rows.reshape(height, width + 1)
    return None if rows[:, 0].any() else rows[:, 1:]


def decode_map(data: np.ndarray) -> np.ndarray:
    """Decode a label map's bytes to ids (H, W), 8 bits or wider; any Exception says what is wrong.

    Grey of 1, 2 or 4 bits is refused: decoders stretch its values to 0..255 without a word.
    """
    if bytes(data[:8]) != b"\x89PNG\r\n\x1a\n":
        raise ValueError("not a PNG file")
    if (ids := unfiltered(data.tobytes())) is not None:
        return ids
    with open_image(data, ("PNG",)) as image:
        depth, colour = data[24], data[25]  # in the IHDR chunk; 0 is grey, 3 palette
        if colour != 3 and (colour or depth < 8):
            kind = {0: "grey", 2: "RGB", 4: "grey + alpha", 6: "RGBA"}[int(colour)]
            raise ValueError(f"{depth}-bit {kind}; a map is 8- or 16-bit grey, or has a palette")
        return np.asarray(image)


class FileList:
    """Names, labels and folders of one split.

    Opened, its arrays are mapped from files that all workers share: no Python object per image.

    Args:
        names: (n,) bytes, padded to the longest; paths below the folder of images.
        labels: (n,) int32, an image's class, -1 without one.
        folders: {granularity: path below the root}.
        classes: names, in the order of the labels.
    """

    ARRAYS: tuple[str, ...] = ("names", "labels")  # each a .npy of its own
    FACTS: tuple[str, ...] = ("folders", "classes")  # in files.json

    def __init__(self, names: np.ndarray, labels: np.ndarray, folders: dict, classes: list):
        if names.shape != labels.shape or names.dtype.kind != "S":
            raise ValueError("names and labels do not fit each other")
        self.names, self.labels, self.folders, self.classes = names, labels, folders, classes
        self.place = None

    @staticmethod
    def open(place: str | os.PathLike) -> "FileList":
        """Map the list that `save` left in a folder, a ShardList where it is one of shards."""
        try:
            with open(f"{place}/files.json") as file:
                meta = json.load(file)
            cls = FileList
            if "shards" in meta:
                from shards import ShardList as cls  # which needs this module
            arrays = {k: np.load(f"{place}/{k}.npy", mmap_mode="r") for k in cls.ARRAYS}
            files = cls(**arrays, **{k: meta[k] for k in cls.FACTS})
        except (OSError, ValueError, TypeError, KeyError, EOFError) as error:
            raise UserError(f"cannot read the list of files in {place}: {error}") from None
        files.place = place
        return files

    def save(self, place: str | os.PathLike) -> "FileList":
        """Write the list into a folder, its description last, and return it mapped."""
        os.makedirs(place, exist_ok=True)
        for name in self.ARRAYS:
            with replacing(f"{place}/{name}.npy") as file:
                np.save(file, getattr(self, name))
        with replacing(f"{place}/files.json") as file:
            file.write(json.dumps({k: getattr(self, k) for k in self.FACTS}).encode())
        return FileList.open(place)

    def __reduce__(self):  # a worker that is started afresh maps the files again
        parts = [getattr(self, name) for name in (*self.ARRAYS, *self.FACTS)]
        return (FileList.open, (self.place,)) if self.place else (type(self), tuple(parts))

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        return os.fsdecode(bytes(self.names[index]))

    def where(self, root: str, granularity: str, index: int) -> str:
        """The path of an image or of one of its maps."""
        name = self.name(index)
        name = name if granularity == "rgb" else f"{name.rpartition('.')[0]}.png"
        return f"{root}/{self.folders[granularity]}/{name}"

    def read(self, root: str, granularity: str, index: int) -> np.ndarray:
        """Bytes (n,) uint8 of an image or of one of its maps. Raises OSError."""
        return read_bytes(self.where(root, granularity, index))

    def verify(self, root: str) -> None:
        """UserError where what is listed cannot be there; single files are met as they are read."""


@contextlib.contextmanager
def replacing(path: str) -> Iterator[io.BufferedWriter]:
    """Open a file to write, which takes its name once it is whole and on the disk."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise


def packed(folder: str) -> FileList | None:
    """Open a split that tools/pack.py wrote; None of any other folder."""
    return FileList.open(folder) if os.path.isfile(f"{folder}/files.json") else None


def subfolders(path: str) -> list[str]:
    try:
        return sorted(e.name for e in os.scandir(path) if e.is_dir() and e.name[0] != ".")
    except OSError:
        return []


def class_folders(path: str) -> list[str]:
    """Return the names of the folders that hold an image, at any depth, sorted: the classes."""
    if files := packed(path):
        return [files.classes[label] for label in np.unique(files.labels) if label >= 0]

    def holds(folder: str, above: tuple = ()) -> bool:
        place = os.path.realpath(folder)
        return place not in above and any(  # a link to a folder above
            holds(e.path, (*above, place)) if e.is_dir() else is_image(e.name)
            for e in os.scandir(folder)
            if e.name[0] != "."
        )

    try:
        return [name for name in subfolders(path) if holds(f"{path}/{name}")]
    except OSError as error:
        raise UserError(f"cannot list {path}: {error}") from None


def layout(root: str, split: str) -> dict[str, str]:
    """Return {granularity: folder below root} of a split; {"rgb": split} if it has none of them.

    A folder with photographs in it and no splits is a train split itself: {"rgb": "."}.
    """
    if files := packed(f"{root}/{split}"):
        return dict.fromkeys(files.folders, split)
    inside = subfolders(f"{root}/{split}")
    names = [(g, name) for g, folders in FOLDERS.items() for name in reversed(folders)]
    found = {g: f"{split}/{name}" for g, name in names if name in inside}
    if not found and split == "train" and not {"train", "val"} & set(subfolders(root)):
        names = os.listdir(root) if os.path.isdir(root) else ()
        return {"rgb": "."} if any(map(is_image, names)) else {}
    return found or ({"rgb": split} if os.path.isdir(f"{root}/{split}") else {})


def is_image(name: str) -> bool:
    """Whether a file of this name is listed."""
    stem, _, suffix = name.rpartition(".")
    return bool(stem) and name[0] != "." and suffix.lower() in SUFFIXES


def _walk(folder: str, maps: list[str], prefix: str = "", above: tuple = ()) -> Iterator[tuple]:
    """Yield (name, map folders that lack it) of the images below a folder, sorted; follow links.

    A map folder is listed once: one call per map would take hours on a network file system.
    """
    stat = os.stat(folder)
    if (stat.st_dev, stat.st_ino) in above:  # a link to a folder above
        return
    above = *above, (stat.st_dev, stat.st_ino)
    known = [set(os.listdir(m)) if os.path.isdir(m) else () for m in maps]
    for entry in sorted(os.scandir(folder), key=lambda e: e.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            inner = [f"{m}/{entry.name}" for m in maps]
            yield from _walk(entry.path, inner, f"{prefix}{entry.name}/", above)
        elif is_image(entry.name) and (entry.is_file() or entry.is_symlink()):
            name = f"{entry.name.rpartition('.')[0]}.png"  # of its maps
            lacking = [m for m, names in zip(maps, known) if name not in names]
            yield prefix + entry.name, lacking


def scan(root: str, split: str, granularities: Sequence[str] = ("rgb",)) -> FileList:
    """List a split's images, sorted, and make sure that each has its maps (rank 0 only).

    Classes are the first-level folders of train and val together that hold an image, so both splits
    number them alike. A packed split was listed so when it was packed.
    """
    base, folders = f"{root}/{split}", layout(root, split)
    if not folders:
        if os.path.isfile(root):
            raise UserError(f"{root} is a file, a folder was wanted{LAYOUT}")
        seen = ", ".join(subfolders(root)[:8]) or "no folders"
        where = f"{base} (in {root}: {seen})" if os.path.isdir(root) else root
        raise UserError(f"there is no folder {where}{LAYOUT}")
    lacking = [g for g in ("rgb", *granularities) if g not in folders]
    if lacking:
        found = f"only {', '.join(folders)} found in {base}, no {', '.join(lacking)}"
        if "instance" in lacking:
            found += ". CFMAE learns from images alone, too: --granularities R"
        raise UserError(found + LAYOUT)
    folders = {g: folders[g] for g in FOLDERS if g == "rgb" or g in granularities}
    if files := packed(base):
        return files
    images, *maps = (f"{root}/{folder}" for folder in folders.values())
    places = [f"{root}/{layout(root, s).get('rgb', '?')}" for s in {split, "train", "val"}]
    classes = sorted({name for place in places for name in class_folders(place)})
    numbers = {name: number for number, name in enumerate(classes)}
    names, labels, count, orphans = [], array("i"), 0, []
    try:
        for name, lacking in _walk(images, maps):
            names.append(os.fsencode(name))
            labels.append(numbers[name.partition("/")[0]] if "/" in name else -1)
            count += bool(lacking)
            orphans += [f"\n  {name}: not in {m}" for m in lacking if len(orphans) < 5]
    except OSError as error:
        raise UserError(f"cannot list {images}: {error}") from None
    if not labels and any(name.endswith(".tar") for name in os.listdir(images)):
        raise UserError(
            f"{images} holds shards without their index, files.json: packing did not finish; the "
            "same tools.pack command continues it"
        )
    if not labels:
        raise UserError(f"no images ({' '.join(SUFFIXES)}) in {images}{LAYOUT}")
    if count:
        raise UserError(
            f"{count} of {len(labels)} images have no map, a .png of the same name:"
            + "".join(orphans)
        )
    return FileList(np.array(names), np.frombuffer(labels, np.int32), folders, classes)
