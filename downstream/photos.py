"""Photographs from anywhere, without splits, maps or classes, as a list of files."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import files
from engine import UserError


def photographs(places: Sequence[str | Path]) -> tuple[str, files.FileList]:
    """List images: files as they are named, folders with all that lies in them, sorted.

    Returns: the folder that holds them all, and the list, whose names begin there.
    Errors: UserError where a place is neither, or a folder holds no image.
    """
    found: list[str] = []
    for place in map(os.path.abspath, places):
        if os.path.isdir(place):
            inside = [f"{place}/{name}" for name, _ in files._walk(place, [])]
            if not inside:
                raise UserError(f"no images ({' '.join(files.SUFFIXES)}) in {place}")
            found += inside
        elif os.path.isfile(place):
            found.append(place)
        else:
            raise UserError(f"{place}: no such file or folder")
    found = list(dict.fromkeys(found))
    root = os.path.commonpath([os.path.dirname(path) for path in found])
    names = np.array([os.fsencode(os.path.relpath(path, root)) for path in found])
    labels = np.full(len(found), -1, np.int32)
    return root, files.FileList(names, labels, {"rgb": "."}, [])
