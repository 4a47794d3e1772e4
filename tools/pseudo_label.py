"""Instance and semantic maps from photographs, as CFMAE trains on them.

    python -m tools.pseudo_label ROOT [--output OUT] --recipe regions
    torchrun --nproc_per_node=8 -m tools.pseudo_label ROOT [--output OUT] --recipe panoptic
    python -m tools.pseudo_label ROOT --convert             rewrite existing maps, same ids
    python -m tools.pseudo_label ROOT --compare TRUTH       score ROOT's maps by TRUTH's

    recipe     how                                                       needs
    panoptic   one panoptic model (Mask2Former) gives both maps          transformers, its weights
    paper      CFMAE App. B: boxes from category names (Grounding        transformers, weights of
               DINO), their masks (HQ-SAM); semantics by Mask2Former     three models
    regions    Felzenszwalb's regions and k-means clusters of them       scikit-image

ROOT has {train,val}/rgb, and maps are written beside it. Where it has none (ImageNet as it is
unpacked, or a bare folder of photographs), or to leave ROOT alone, name another folder, --output:
its {train,val}/rgb become links to the images, and the scripts read it with --data OUT.

Work is split over torchrun's ranks by the images' numbers; ranks share nothing but the folder. Maps
that are there are skipped, so the same command continues what was stopped. An image that cannot be
decoded is listed in OUT/{train,val}/unreadable.txt and gets maps of one unlabelled pixel: training
replaces such images by others. docs/data.md has the whole way, rates and scores.
"""

import argparse
import functools
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
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import files
from data import UNLABELLED
from engine import UserError
from tools import map_files, regions

MAPS = ("instance", "semantic")
SETTINGS = "pseudo_label.json"  # in OUT: how its maps were made
BLANK = map_files.encode(np.full((1, 1), UNLABELLED, np.uint8))


class Split(NamedTuple):
    """One split: its name, its images as `data.scan` lists them, their folder, where maps go."""

    name: str
    files: files.FileList
    images: str
    out: str


class Images(Dataset):
    """Images decoded and prepared in loader processes.

    Args: `prepare`, (rgb (3, H, W) uint8, name) -> anything; `picks`, indices into the split's list.
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
        images, out = f"{base}/{listed.folders['rgb']}", os.path.abspath(output or root)
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
    """Make the folder of the maps, or enter one that was made with the same settings."""
    path = f"{out}/{SETTINGS}"
    if os.path.exists(path):
        with open(path) as file:
            old = json.load(file)
        changed = [k for k in {**old, **settings} if old.get(k) != settings.get(k)]
        if changed:
            shown = "; ".join(f"{k} was {old.get(k)}, is {settings.get(k)}" for k in changed)
            raise UserError(f"{out} holds maps made otherwise: {shown}; choose another --output")
    else:
        for folder in (f"{split.out}/{g}" for split in splits for g in MAPS):
            if next(map_files.pngs(folder), None):
                raise UserError(f"{folder} holds maps of another origin; choose another --output")
        if lead:
            map_files.write(path, (json.dumps(settings, indent=1) + "\n").encode())
    for split in splits:
        link = f"{split.out}/rgb"
        if split.images == link or not lead:
            continue
        os.makedirs(split.out, exist_ok=True)
        if not os.path.lexists(link):
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
    """One rank's share of the work: loads, labels, writes."""

    def __init__(self, args: argparse.Namespace, world: engine.World, signals: Signals):
        self.args, self.world, self.signals = args, world, signals

    def batches(self, split: Split, picks: np.ndarray, prepare: Callable) -> Iterator[list]:
        """Yield lists of (name, prepared), with a bar; Stopped after a signal."""
        loader = DataLoader(
            Images(split, picks, prepare), self.args.batch_size, collate_fn=list,
            num_workers=self.world.workers(self.args.workers), worker_init_fn=data.worker_init,
        )  # fmt: skip
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
        picks, unreadable, began = to_do(split, self.world.rank, self.world.size), {}, time.time()
        with ThreadPoolExecutor(map_files.THREADS) as pool:
            pending = []
            try:
                for batch in self.batches(split, picks, recipe.prepare):
                    unreadable |= {n: x for n, x in batch if isinstance(x, data.Unreadable)}
                    named = [(n, x) for n, x in batch if n not in unreadable]
                    made = recipe.label([x for _, x in named])
                    self.wait(pending)
                    pending = [
                        pool.submit(self.write, split, name, maps)
                        for (name, _), maps in zip(named, made)
                    ]
            finally:
                self.wait(pending)
        if unreadable:
            self.leave_out(split, unreadable)
        rate = len(picks) / max(time.time() - began, 1e-9)
        share = f"rank {self.world.rank}: " if self.world.size > 1 else ""
        print(
            f"{split.name}: {share}{len(picks)} images labelled, {rate:.1f} images/s, "
            f"{len(unreadable)} of them unreadable; maps in {split.out}",
            flush=True,
        )

    @staticmethod
    def wait(pending: list) -> None:
        for future in pending:
            future.result()

    @staticmethod
    def write(split: Split, name: str, maps: tuple[np.ndarray, np.ndarray]) -> None:
        for g, ids in zip(MAPS, maps):
            path = f"{split.out}/{g}/{name.rpartition('.')[0]}.png"
            map_files.write(path, map_files.encode(ids))

    def leave_out(self, split: Split, unreadable: dict[str, Exception]) -> None:
        """List images that cannot be decoded, and give each its blank maps."""
        path = f"{split.out}/unreadable.txt"
        listed = open(path).read() if os.path.exists(path) else ""
        lines = [f"{name}: {error}\n" for name, error in sorted(unreadable.items())]
        with open(path, "a") as file:  # one short write: ranks may do so at the same time
            file.write("".join(line for line in lines if line not in listed))
        for name in unreadable:
            for g in MAPS:
                map_files.write(f"{split.out}/{g}/{name.rpartition('.')[0]}.png", BLANK)


# ----------------------------------------------------------------------------------------- recipes


def only_features(rgb: torch.Tensor, name: str) -> np.ndarray:
    return regions.describe(rgb)[1]


def only_maps(book: np.ndarray, rgb: torch.Tensor, name: str) -> tuple[np.ndarray, np.ndarray]:
    return regions.maps(book, rgb)


class Regions:
    """Regions and clusters: all the work is done in the loader processes."""

    def __init__(self, labeller: Labeller, splits: list[Split], out: str):
        path, args = f"{out}/regions.npy", labeller.args
        if labeller.world.rank == 0 and not os.path.exists(path):
            split = splits[0]
            count = min(args.cluster_images, len(split.files))
            picks = np.linspace(0, len(split.files) - 1, count).astype(int)
            found = [
                x
                for batch in labeller.batches(split, picks, only_features)
                for _, x in batch
                if not isinstance(x, data.Unreadable)
            ]
            book = regions.learn(np.concatenate(found), args.clusters)
            with open(f"{path}.tmp", "wb") as file:
                np.save(file, book)
            os.replace(f"{path}.tmp", path)
        while not os.path.exists(path):  # rank 0 is at it; should it fail, torchrun ends us all
            time.sleep(0.5)
        self.prepare = functools.partial(only_maps, np.load(path))

    def label(self, prepared: list) -> list:
        return prepared

    @staticmethod
    def settings(args: argparse.Namespace) -> dict:
        return {"clusters": args.clusters, "cluster_images": args.cluster_images}


RECIPES = {"regions": Regions}


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = engine.Parser(
        prog="python -m tools.pseudo_label", description=__doc__, allow_abbrev=False,
        formatter_class=raw,
    )  # fmt: skip
    top.add_argument("root", help="the folder that holds train/ and val/")
    top.add_argument("--output", help="where the maps go; default: ROOT")
    top.add_argument("--recipe", default="panoptic", choices=list(RECIPES) + ["panoptic"])
    top.add_argument("--batch-size", type=int, default=16, help="images at a time (16)")
    top.add_argument("--workers", type=int, help="loader processes a rank; default: its cores")
    top.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    top.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    top.add_argument("--clusters", type=int, default=133, help="semantic classes of regions (133)")
    top.add_argument("--cluster-images", type=int, default=10000, help="for clusters (10000)")
    top.add_argument("--convert", action="store_true", help="rewrite ROOT's maps with palettes")
    top.add_argument("--compare", metavar="TRUTH", help="a folder with maps of the same images")
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.convert:
        map_files.convert(args.root)
        return 0
    cls = RECIPES[args.recipe]
    out = os.path.abspath(args.output or args.root)
    world = engine.World(args.device, args.precision)
    splits = open_splits(args.root, args.output)
    place(out, splits, {"recipe": args.recipe, **cls.settings(args)}, world.rank == 0)
    with Signals() as signals:
        labeller = Labeller(args, world, signals)
        try:
            recipe = cls(labeller, splits, out)
            for split in splits:
                labeller.run(split, recipe)
        except Stopped as stop:
            print("stopped; the same command continues", flush=True)
            return 128 + stop.args[0]
    return 0


if __name__ == "__main__":
    engine.command("pseudo_label", main)
