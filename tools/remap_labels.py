"""Renumber the ids of label maps: a void class to 255 (unlabelled), classes to 0, 1, 2, ...

    python -m tools.remap_labels data/camvid/train/semantic data/camvid-255/train/semantic 11=255
    python -m tools.remap_labels SRC DST 0=255 1-150=0-149

SRC is a folder of PNG maps, DST a new one, where each lies under its own name; `old=new` or ranges
of equal length, all applied at once. Ids that are not named stay. Maps are written as grey PNG of 8
bits, or 16 where the old one has 16 or a new id needs them. What every id became is counted.
"""

import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine  # before torch: it sets how threads wait

import numpy as np
from PIL import Image

from engine import UserError
from tools import map_files

LIMIT = 65536  # ids of a 16-bit map


def read_changes(words: Sequence[str]) -> np.ndarray:
    """The table (65536,) of new ids that "11=255" or "1-150=0-149" ask for; UserError."""
    table, named = np.arange(LIMIT), Counter()
    for word in words:
        try:
            old, new = ([int(n) for n in side.split("-")] for side in word.split("="))
        except ValueError:
            old, new = (), ()
        ok = len(old) == len(new) in (1, 2) and old[0] <= old[-1] and max(*old, *new) < LIMIT
        if not ok or old[-1] - old[0] != new[-1] - new[0]:
            raise UserError(
                f"{word!r}: wanted OLD=NEW, e.g. 11=255, or ranges of one length, 1-9=0-8"
            )
        table[old[0] : old[-1] + 1] = range(new[0], new[-1] + 1)
        named.update(range(old[0], old[-1] + 1))
    if twice := [i for i, n in named.items() if n > 1]:
        raise UserError(f"id {twice[0]} is named twice")
    return table


def remap(source: Path, target: Path, table: np.ndarray) -> np.ndarray:
    """Write one map with new ids; the pixels of each old id (65536,)."""
    _, ids = map_files.read(source)
    new = table[ids]
    target.parent.mkdir(parents=True, exist_ok=True)
    narrow = ids.dtype == np.uint8 and new.max() < 256
    Image.fromarray(new.astype(np.uint8 if narrow else np.uint16)).save(target)
    return np.bincount(ids.ravel(), minlength=LIMIT)


def main(argv: list[str] | None = None) -> None:
    """Renumber the ids of a folder of label maps."""
    parser = engine.Parser(
        prog="python -m tools.remap_labels", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument("src", type=Path, help="folder of PNG maps, at any depth")
    parser.add_argument("dst", type=Path, help="folder to write, which must not exist")
    parser.add_argument("changes", nargs="+", help="OLD=NEW, e.g. 11=255 or 1-150=0-149")
    args = parser.parse_args(argv)
    table = read_changes(args.changes)
    if not args.src.is_dir():
        raise UserError(f"there is no folder {args.src}")
    if args.dst.exists():
        raise UserError(f"{args.dst} exists; name a new folder")
    maps = sorted(args.src.rglob("*.png"))
    if not maps:
        raise UserError(f"no .png in {args.src}")
    counts, targets = np.zeros(LIMIT, np.int64), [args.dst / p.relative_to(args.src) for p in maps]
    with engine.writing(args.dst), ThreadPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(remap, maps, targets, [table] * len(maps)):
            counts += found
    for i in np.flatnonzero(counts).tolist():
        became = f"-> {table[i]}" if table[i] != i else "stays"
        print(f"id {i:<5} {became:<9} {counts[i] / counts.sum():8.3%} of the pixels")
    for i in (i for i in np.flatnonzero(table != np.arange(LIMIT)).tolist() if not counts[i]):
        print(f"id {i:<5} is in no map")
    print(f"wrote       {len(maps)} maps: {args.dst}")


if __name__ == "__main__":
    engine.command("remap_labels", main)
