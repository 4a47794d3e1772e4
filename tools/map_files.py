"""Map files: written whole or not at all, as PNG that decodes fast; others' maps rewritten so.

A palette PNG has no row filters, so a loader unpacks it and is done: 8-bit grey as Pillow writes it
takes twice as long to decode. The palette's colours are for people; a pixel's index is its id.
"""

import colorsys
import contextlib
import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import files
from data import UNLABELLED, UserError

MAPS = ("instance", "semantic")  # in the order in which recipes give them
THREADS = 4  # zlib and the disk leave Python's lock alone


def _palette() -> bytes:
    """256 colours: black for 0, white for 255, the others far from their neighbours' in hue."""
    hues = ((k * 0.61803, 0.55 + 0.45 * (k % 3) / 2, 0.65 + 0.35 * (k % 2)) for k in range(1, 255))
    colours = [(0, 0, 0), *(colorsys.hsv_to_rgb(h % 1, s, v) for h, s, v in hues), (1, 1, 1)]
    return bytes(round(255 * c) for colour in colours for c in colour)


PALETTE = _palette()


def encode(ids: np.ndarray) -> bytes:
    """A map (H, W) as PNG: uint8 with a palette, wider ids as 16-bit grey."""
    small = ids.dtype == np.uint8
    image = Image.fromarray(ids if small else ids.astype(np.uint16))
    if small:
        image.putpalette(PALETTE)
    with io.BytesIO() as file:
        image.save(file, "PNG", compress_level=3)  # 1 and 3 decode fastest
        return file.getvalue()


def write(path: str | Path, data: bytes) -> None:
    """Write a file so that `path` is at any moment absent, the old file or the new one, whole."""
    folder, name = os.path.split(path)
    temporary = f"{folder}/.{name}.tmp"  # of this name always: what a killed run left is replaced
    try:
        os.makedirs(folder, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise OSError(
            f"cannot write {path}: {error.strerror or error}. All maps there are whole; once there "
            "is room, the same command goes on"
        ) from None


# ------------------------------------------------------------------------------- rewriting others'


def pngs(folder: str) -> Iterator[str]:
    """Paths of the PNG files below a folder."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders.sort()
        yield from (f"{place}/{n}" for n in sorted(names) if n.endswith(".png") and n[0] != ".")


def read(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """The bytes (n,) uint8 of a map file, and its ids (H, W); UserError where it is broken."""
    try:
        data = files.read_bytes(path)
        return data, files.decode_map(data)
    except Exception as error:  # Pillow raises anything on broken files
        raise UserError(f"{path}: {str(error) or type(error).__name__}") from None


def rewrite(path: str) -> tuple[int, int, str]:
    """Rewrite a map with a palette, the same ids to the loader: (old size, new size, outcome)."""
    data, ids = read(path)
    if data[25] == 3:  # the colour type in the header: a palette already
        return len(data), len(data), "had one"
    if ids.dtype != np.uint8:
        if ((ids >= UNLABELLED) & (ids != 65535)).any():
            return len(data), len(data), "ids above 254, left as they are"
        ids = np.minimum(ids, UNLABELLED).astype(np.uint8)  # 65535 is unlabelled in 16 bits
    new = encode(ids)
    if not np.array_equal(files.decode_map(np.frombuffer(new, np.uint8)), ids):
        raise RuntimeError(f"{path}: the rewritten map has other ids")
    write(path, new)
    return len(data), len(new), "rewritten"


def convert(root: str) -> int:
    """Rewrite all maps of a folder in place, and say what came of it."""
    layouts = [(s, g, f) for s in ("train", "val") for g, f in files.layout(root, s).items()]
    folders = [(split, f"{root}/{f}") for split, g, f in layouts if g != "rgb"]
    if not folders:
        raise UserError(f"no maps in {root}/{{train,val}}/{{instance,semantic}}{files.LAYOUT}")
    for _, folder in folders:
        old = new = 0
        came = {}
        with ThreadPoolExecutor(THREADS) as pool, tqdm(desc=folder, unit="map") as bar:
            for before, after, what in pool.map(rewrite, pngs(folder)):
                old, new, came[what] = old + before, new + after, came.get(what, 0) + 1
                bar.update()
        shown = ", ".join(f"{n} {what}" for what, n in sorted(came.items())) or "no maps"
        print(f"{folder}: {shown}; {old / 1e6:.1f} MB -> {new / 1e6:.1f} MB")
    return 0
