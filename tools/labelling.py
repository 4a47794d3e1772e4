"""What surrounds a recipe of `tools.pseudo_label`: images of a folder, this rank's share, writing.

    open_splits   which images there are, and where their maps go
    place         the folder of the maps, and how they were made
    Labeller      loads, labels and writes one rank's share, and can be stopped

A recipe has `prepare(rgb, name)`, called in loader processes, and `label(list of what it gave)`,
which returns (instance, semantic), ids (H, W) uint8, of each.
"""

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import engine  # before torch: it sets how threads wait

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import files
from data import UNLABELLED
from engine import UserError
from tools import map_files
from tools.map_files import MAPS

RECORD = "pseudo_label.json"  # in OUT: how its maps were made
BLANK = np.full((1, 1), UNLABELLED, np.uint8)  # the map of an image that cannot be decoded


class Split(NamedTuple):
    """One split: its name, its images as `data.scan` lists them, their folder, where maps go."""

    name: str
    files: files.FileList
    images: str
    out: str


class Images(Dataset):
    """Images decoded and prepared in loader processes.

    Args: `picks`, indices into the split's list; `prepare`, (rgb (3, H, W) uint8, name) -> any.
    Items: (name, what `prepare` gave), or (name, Unreadable).
    """

    def __init__(self, split: Split, picks: np.ndarray, prepare: Callable):
        self.split, self.picks, self.prepare = split, picks, prepare

    def __len__(self) -> int:
        return len(self.picks)

    def __getitem__(self, at: int) -> tuple[str, object]:
        name = self.split.files.name(self.picks[at])
        try:
            rgb = files.decode_image(files.read_bytes(f"{self.split.images}/{name}"))
        except Exception as error:  # Pillow raises anything on broken files
            return name, data.Unreadable(str(error) or type(error).__name__)
        return name, self.prepare(rgb, name)


# ------------------------------------------------------------------------------- folders and ranks


def open_splits(root: str, output: str | None) -> list[Split]:
    """List the images of ROOT; UserError where maps have no place beside them."""
    root = os.path.abspath(root)
    names = [s for s in ("train", "val") if files.layout(root, s)]
    where = [(s, root, s) for s in names] or [("train", *os.path.split(root))]
    splits = []
    for name, base, folder in where:
        listed = data.scan(base, folder)
        images = os.path.normpath(f"{base}/{listed.folders['rgb']}")
        out = os.path.abspath(output or root)
        if images != f"{out}/{name}/rgb" and output is None:
            raise UserError(
                f"{images} has the images themselves in it and no rgb folder: name another folder "
                f"for the maps, --output {root}_maps"
            )
        if f"{out}/".startswith(f"{images}/"):
            raise UserError(f"--output {output} lies among the images, in {images}")
        stems = sorted(listed.name(i).rpartition(".")[0] for i in range(len(listed)))
        if twice := next((a for a, b in zip(stems, stems[1:]) if a == b), None):
            raise UserError(f"{images}: several images would share the map {twice}.png")
        splits.append(Split(name, listed, images, f"{out}/{name}"))
    return splits


def place(out: str, splits: list[Split], settings: dict, lead: bool) -> None:
    """Make the folder of the maps (rank 0), or enter one that was made with the same settings."""
    path = f"{out}/{RECORD}"
    if os.path.exists(path):
        with open(path) as file:
            old = json.load(file)
        changed = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
        if changed:
            shown = "; ".join(f"{k} was {old.get(k)}, is {settings.get(k)}" for k in changed)
            raise UserError(f"{out} holds maps made otherwise: {shown}; choose another --output")
    elif lead:
        for folder in (f"{split.out}/{g}" for split in splits for g in MAPS):
            if next(map_files.pngs(folder), None):
                raise UserError(f"{folder} holds maps of another origin; choose another --output")
        map_files.write(path, (json.dumps(settings, indent=1) + "\n").encode())
    for split in splits if lead else ():
        link = f"{split.out}/rgb"
        if not os.path.lexists(link):
            os.makedirs(split.out, exist_ok=True)
            os.symlink(split.images, link, target_is_directory=True)
        elif os.path.realpath(link) != os.path.realpath(split.images):
            raise UserError(f"{link} is there and is not {split.images}; choose another --output")


def to_do(split: Split, rank: int, ranks: int) -> np.ndarray:
    """Indices of this rank's images that lack a map."""
    stems = [split.files.name(i).rpartition(".")[0] for i in range(rank, len(split.files), ranks)]
    lacking = np.zeros(len(stems), bool)
    for folder in (f"{split.out}/{g}" for g in MAPS):
        there = {}  # one listing a folder: a call a file takes hours on a network file system
        for i, stem in enumerate(stems):
            inner, _, name = stem.rpartition("/")
            if inner not in there:
                place = f"{folder}/{inner}"
                there[inner] = set(os.listdir(place)) if os.path.isdir(place) else set()
            lacking[i] |= f"{name}.png" not in there[inner]
    return np.flatnonzero(lacking) * ranks + rank


class Signals:
    """SIGTERM and Ctrl-C, remembered: the loop ends between two batches."""

    def __enter__(self) -> "Signals":
        self.number = 0
        self.old = {s: signal.signal(s, self.note) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def note(self, number: int, frame: object) -> None:
        self.number = self.number or number

    def __exit__(self, *error: object) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)


class Stopped(Exception):
    """A signal came: args[0] is its number."""


class Labeller:
    """One rank's share of the work.

    Args: `batch_size`, images that a recipe labels at a time; `workers`, loader processes.
    """

    def __init__(self, world: engine.World, signals: Signals, batch_size: int, workers: int | None):
        self.world, self.signals = world, signals
        self.options = {"batch_size": batch_size, "num_workers": world.workers(workers)}

    def batches(self, split: Split, picks: np.ndarray, prepare: Callable) -> Iterator[list]:
        """Yield lists of (name, prepared), with a bar; Stopped after a signal."""
        images = Images(split, picks, prepare)
        common = {"collate_fn": list, "worker_init_fn": data.worker_init}
        loader = DataLoader(images, **common, **self.options)
        ranks = f" (rank 0 of {self.world.size})" if self.world.size > 1 else ""
        bar = tqdm(
            total=len(picks), desc=f"{split.name}{ranks}", unit="image", dynamic_ncols=True,
            disable=self.world.rank > 0, mininterval=0.5 if sys.stderr.isatty() else 30,
        )  # fmt: skip
        with bar:
            for batch in loader:
                yield batch
                bar.update(len(batch))
                if self.signals.number:
                    raise Stopped(self.signals.number)

    def run(self, split: Split, recipe: object) -> None:
        """Label this rank's images of a split that have no maps yet."""
        picks, unreadable = to_do(split, self.world.rank, self.world.size), {}
        began, pending = time.monotonic(), []
        with ThreadPoolExecutor(map_files.THREADS) as pool:
            try:
                for batch in self.batches(split, picks, recipe.prepare):
                    unreadable |= {n: x for n, x in batch if isinstance(x, data.Unreadable)}
                    named = [(n, x) for n, x in batch if n not in unreadable]
                    made = recipe.label([x for _, x in named])
                    self.wait(pending)
                    pending = [pool.submit(write, split, n, m) for (n, _), m in zip(named, made)]
            finally:
                self.wait(pending)
        leave_out(split, unreadable)
        share = f"rank {self.world.rank}: " if self.world.size > 1 else ""
        rate = len(picks) / (time.monotonic() - began)
        said = (
            f"{len(picks)} images labelled, {rate:.1f} images/s" if len(picks) else "nothing left"
        )
        blank = f"; {len(unreadable)} of them unreadable" if unreadable else ""
        print(f"{split.name}: {share}{said}{blank}; maps in {split.out}", flush=True)

    @staticmethod
    def wait(pending: list) -> None:
        for future in pending:
            future.result()


def write(split: Split, name: str, maps: tuple[np.ndarray, np.ndarray]) -> None:
    """Write an image's maps, in the order of MAPS."""
    for g, ids in zip(MAPS, maps):
        path = f"{split.out}/{g}/{name.rpartition('.')[0]}.png"
        map_files.write(path, map_files.encode(ids))


def leave_out(split: Split, unreadable: dict[str, Exception]) -> None:
    """List images that cannot be decoded, then give each its blank maps."""
    path = f"{split.out}/unreadable.txt"
    listed = ""
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        listed = file.read()
    lines = [f"{name}: {error}\n" for name, error in sorted(unreadable.items())]
    if lines := [line for line in lines if line not in listed.splitlines(True)]:
        with open(path, "a") as file:  # one short write: ranks may do so at the same time
            file.write("".join(lines))
    for name in unreadable:
        write(split, name, (BLANK, BLANK))
