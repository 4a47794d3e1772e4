"""Pack a folder of images and maps into tar shards: hundreds of files instead of millions.

    python -m tools.pack ROOT OUT                     # bytes as they are: trains bit for bit alike
    python -m tools.pack ROOT OUT --short-side 256    # reduced on the way: several times as fast
    python -m tools.pack --check OUT                  # sizes and checksums of all that is there

`--data OUT` then reads the shards (shards.py). A shard appears under its name once it is whole and
on the disk, so a packing that was killed is continued by the same command, to the same bytes; a
shard that is cut short or deleted is made again by it, with those after it.
"""

import argparse
import contextlib
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import engine  # before torch: it sets how threads wait

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import data
import pictures
from engine import UserError
from files import FileList, layout, packed, replacing, scan
from shards import MEMBER, ShardList, checksum_of, sample_key

BLOCK = 512  # of a tar file: a header, and what a member is filled up to
OURS = re.compile(
    r"(\d{6}\.tar|(names|labels|members)\.npy|(files|packing)\.json|members|lock)(\.tmp)?"
)
PALETTE = pictures.colorize(torch.arange(256)[None])[:, 0].T.flatten().tolist()


# ------------------------------------------------------------------------------ samples to members


def encode_map(ids: np.ndarray, granularity: str) -> bytes:
    """A map as palette PNG without row filters, which decodes fastest; its ids stay.

    Instances of a wide map are renumbered in their order, which `data.relabel` cannot tell, if 8
    bits suffice.
    """
    if ids.dtype != np.uint8 and granularity == "instance":
        found = np.unique(ids[(ids != 0) & (ids != 65535)])
        if len(found) > 254:
            return png(Image.fromarray(ids.astype(np.uint16)))
        known = (np.searchsorted(found, ids) + 1).astype(np.uint8)
        ids = np.where(ids == 65535, 255, np.where(ids == 0, 0, known))
    image = Image.fromarray(ids.astype(np.uint8))
    image.putpalette(PALETTE)
    return png(image)


def png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG", compress_level=1)
    return file.getvalue()


def reduce(rgb: Tensor, maps: dict, short_side: int) -> tuple[Tensor, dict[str, np.ndarray]]:
    """Scale an image (3, H, W) uint8 and its maps (H, W) to this shorter side."""
    height, width = rgb.shape[1:]
    share = short_side / min(height, width)
    h, w = round(height * share), round(width * share)
    rgb = rgb[None].contiguous(memory_format=torch.channels_last)
    rgb = F.interpolate(rgb, (h, w), mode="bicubic", antialias=True)[0]
    rows, cols = data.nearest(0, height, h), data.nearest(0, width, w)
    return rgb, {g: ids[rows[:, None], cols] for g, ids in maps.items()}


def suffix_of(name: str, content: bytes) -> str:
    """What an image is called by: its first bytes, then its name."""
    heads = {b"\xff\xd8": "jpg", b"\x89PNG": "png"}
    found = (suffix for head, suffix in heads.items() if content.startswith(head))
    return next(found, name.rpartition(".")[2].lower())


class Members(Dataset):
    """Each sample's members of a shard: [(what follows its key, bytes), ...], or {"error": words}.

    An image that cannot be read or needs no reduction stays as it is, with its maps, so that
    samples keep their numbers; one that cannot even be opened becomes an empty member.
    """

    def __init__(self, dataset: data.FolderDataset, short_side: int, quality: int):
        self.dataset, self.short_side, self.quality = dataset, short_side, quality

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> list[tuple[str, bytes]] | dict:
        try:
            members, label = self.images(index), int(self.dataset.files.labels[index])
        except UserError as error:
            return {"error": str(error)}
        return members + ([("cls", b"%d" % label)] if label >= 0 else [])

    def images(self, index: int) -> list[tuple[str, bytes]]:
        if self.short_side:
            try:
                rgb, maps = self.dataset.load(index)
                if min(rgb.shape[1:]) > self.short_side:
                    return self.encode(*reduce(rgb, maps, self.short_side))
            except data.Unreadable:
                pass
        return [self.as_it_is(g, index) for g in self.dataset.files.folders]

    def encode(self, rgb: Tensor, maps: dict[str, np.ndarray]) -> list[tuple[str, bytes]]:
        image = Image.fromarray(rgb.permute(1, 2, 0).numpy())
        image.save(file := io.BytesIO(), "JPEG", quality=self.quality)
        return [("jpg", file.getvalue())] + [
            (f"{g}.png", encode_map(ids, g)) for g, ids in maps.items()
        ]

    def as_it_is(self, granularity: str, index: int) -> tuple[str, bytes]:
        files, root = self.dataset.files, self.dataset.root
        try:
            content = files.read(root, granularity, index).tobytes()
        except OSError as error:
            if granularity != "rgb":
                where = files.where(root, granularity, index)
                raise UserError(f"{where}: {error.strerror}") from None
            content = b""
        if granularity != "rgb":
            return f"{granularity}.png", content
        return suffix_of(files.name(index), content), content


# --------------------------------------------------------------------------------------- to shards


def room(members: list[tuple[str, bytes]]) -> int:
    return sum(BLOCK + len(content) + -len(content) % BLOCK for _, content in members)


def begun(place: Path, packing: dict, columns: int) -> tuple[list[dict], np.ndarray]:
    """The leading shards that an earlier call left whole, and the rows of their members.

    Errors: UserError where it packed something else, or otherwise.
    """
    shards, members = [], np.empty((0, columns), MEMBER)
    if strange := [p.name for p in place.iterdir() if not OURS.fullmatch(p.name)]:
        raise UserError(f"{place} holds {strange[0]}, which is no shard: choose another OUT")
    if (files := packed(str(place))) is not None:
        before, shards, members = files.packing, files.shards, files.members
    elif (place / "packing.json").exists():
        before, shards = json.loads((place / "packing.json").read_text())
        members = np.fromfile(place / "members", MEMBER)
        members = members[: len(members) // columns * columns].reshape(-1, columns)
    for k in packing if shards else ():
        if before.get(k) != packing[k]:
            was = f"{k} was {before.get(k)}, is {packing[k]}"
            was = "ROOT held other images or maps" if k == "listing" else was
            raise UserError(f"{place} was begun otherwise, {was}: choose another OUT")
    whole = list(itertools.takewhile(lambda shard: is_whole(place, shard), shards))
    return whole, np.array(members[: sum(shard["samples"] for shard in whole)])


def is_whole(place: Path, shard: dict) -> bool:
    path = place / shard["name"]
    return path.exists() and path.stat().st_size == shard["bytes"]


def write_shard(
    file: io.BufferedWriter, samples: "Samples", number: int, limit: int, columns: int
) -> tuple[list, str]:
    """Write samples while they fit, one at least; their rows (at, size, shard), and SHA-256."""
    rows, at, digest = [], 0, hashlib.sha256()

    def write(content: bytes) -> None:
        digest.update(content)
        file.write(content)

    while samples.next and (not rows or at + room(samples.next) <= limit):
        row = []
        for suffix, content in samples.next:
            info = tarfile.TarInfo(f"{sample_key(samples.number)}.{suffix}")
            info.size = len(content)
            write(info.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % BLOCK))
            row.append((at + BLOCK, len(content), number))
            at += room([(suffix, content)])
        rows.append(row[:columns])  # without its class
        samples.advance()
    write(bytes(2 * BLOCK))  # the end of a tar file
    return rows, digest.hexdigest()


class Samples:
    """The members of each sample, in order: `next` is sample `number`'s, None after the last."""

    def __init__(self, members: Members, start: int, workers: int, words: str):
        loader = DataLoader(
            members, batch_size=16, sampler=range(start, len(members)), num_workers=workers,
            collate_fn=list, worker_init_fn=data.worker_init,
        )  # fmt: skip
        bar = tqdm(total=len(members), initial=start, unit=" images", desc=words)
        self.bar, self.number = bar, start - 1
        self.left = itertools.chain.from_iterable(loader)
        self.advance()

    def advance(self) -> None:
        self.next, self.number = next(self.left, None), self.number + 1
        if isinstance(self.next, dict):
            raise UserError(self.next["error"])
        self.bar.n = self.number
        self.bar.update(0)


def note(place: Path, packing: dict, shards: list[dict]) -> None:
    """Keep what is whole, for a packing that is continued."""
    with replacing(f"{place}/packing.json") as file:
        file.write(json.dumps([packing, shards]).encode())


def tidy(place: Path) -> None:
    """Remove what only a packing that is continued needs."""
    for name in ("members", "packing.json"):
        (place / name).unlink(missing_ok=True)


@contextlib.contextmanager
def alone(place: Path) -> Iterator[None]:
    """Keep other processes from packing into the same folder."""
    with open(place / "lock", "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which workers do not inherit
        except OSError:
            raise UserError(f"another process is packing into {place}") from None
        try:
            yield
        finally:
            (place / "lock").unlink()


def pack(files: FileList, root: str, place: Path, packing: dict, workers: int) -> str:
    """Write a split's shards, those that are not there yet, then its index; a line of what is."""
    folders = dict.fromkeys(files.folders, place.name)
    shards, members = begun(place, packing, len(folders))
    done = len(members)
    if done == len(files) and packed(str(place)):
        tidy(place)
        return f"{place}: {done} samples in {len(shards)} shards, packed before"
    dataset = data.FolderDataset(
        root, place.name, files, granularities=tuple(folders), semantic_classes=data.UNLABELLED
    )
    with replacing(f"{place}/members") as kept:
        kept.write(members.tobytes())
    note(place, packing, shards)
    (place / "files.json").unlink(missing_ok=True)
    todo = Members(dataset, packing["short_side"], packing["quality"])
    samples = Samples(todo, done, workers, place.name)
    while samples.next:
        path, limit = place / f"{len(shards):06d}.tar", packing["shard_bytes"]
        with replacing(str(path)) as file, open(place / "members", "ab") as kept:
            rows, digest = write_shard(file, samples, len(shards), limit, len(folders))
            kept.write(np.array(rows, MEMBER).tobytes())
            kept.flush()
            os.fsync(kept.fileno())
        facts = path.name, path.stat().st_size, len(rows), digest
        shards.append(dict(zip(("name", "bytes", "samples", "sha256"), facts)))
        note(place, packing, shards)
    members = np.fromfile(place / "members", MEMBER).reshape(-1, len(folders))
    arrays = files.names, files.labels, members
    total = checksum_of(*arrays)
    ShardList(*arrays, folders, files.classes, shards, packing, total).save(place)
    tidy(place)
    size = sum(shard["bytes"] for shard in shards) / 2**30
    return f"{place}: {len(files)} samples in {len(shards)} shards, {size:.2f} GiB"


def run(args: argparse.Namespace) -> None:
    """Pack each split that there is; UserError on what cannot be packed or written."""
    splits = [s for s in ("train", "val") if layout(args.root, s)] or ["train"]
    for split in splits:
        files = scan(args.root, split, tuple(layout(args.root, split)) or ("rgb",))
        place = Path(args.out, split)
        packing = {"short_side": args.short_side, "quality": args.quality if args.short_side else 0}
        packing |= {
            "shard_bytes": int(args.shard_size * 2**20),
            "granularities": list(files.folders),
        }
        packing |= {"listing": checksum_of(files.names, files.labels)}
        try:
            place.mkdir(parents=True, exist_ok=True)
            with alone(place):
                print(pack(files, args.root, place, packing, args.workers))
            if (names := Path(args.root, "classes.txt")).is_file():  # of segmentation
                with replacing(f"{args.out}/classes.txt") as file:
                    file.write(names.read_bytes())
        except OSError as error:
            where, why = error.filename or place, error.strerror or error
            stay = "the shards that are whole stay, and the same command continues"
            raise UserError(f"{where}: {why}; {stay}") from None


# ------------------------------------------------------------------------------------------- check


def check(out: str) -> None:
    """Compare all shards and indices with their checksums; UserError naming what differs."""
    splits = [s for s in ("train", "val") if list(Path(out, s).glob("*.tar"))]
    if not splits:
        raise UserError(f"{out} holds no packed split, neither train/*.tar nor val/*.tar")
    problems = []
    for split in splits:
        files = scan(out, split)
        if files.checksum != checksum_of(files.names, files.labels, files.members):
            problems.append(f"{out}/{split}: the index differs from its checksum")
        with ThreadPoolExecutor() as pool:
            sums = pool.map(lambda i, f=files: damage(f, out, i), range(len(files.shards)))
            problems += filter(None, tqdm(sums, total=len(files.shards), desc=split))
        print(f"{split}: {len(files)} samples in {len(files.shards)} shards checked")
    if problems:
        more = f"; {len(problems) - 5} more" if problems[5:] else ""
        raise UserError(
            f"{'; '.join(problems[:5])}{more}. Delete what is damaged, and files.json with an "
            "index; the command that packed it makes it again"
        )


def damage(files: ShardList, out: str, number: int) -> str | None:
    """What is wrong with a shard, of which every byte is read."""
    if problem := files.damage(out, number):
        return problem
    with open(files.shard(out, number), "rb") as file:
        total = hashlib.sha256()
        while block := file.read(1 << 20):
            total.update(block)
    same = total.hexdigest() == files.shards[number]["sha256"]
    return None if same else f"{files.shard(out, number)} differs from its checksum"


def main(argv: list[str] | None = None) -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = engine.Parser(description=__doc__, formatter_class=raw)
    parser.add_argument("root", nargs="?", metavar="ROOT", help="folder of images and maps")
    parser.add_argument("out", metavar="OUT", help="folder for the shards")
    parser.add_argument("--short-side", type=int, default=0, help="pixels; 0: bytes as they are")
    parser.add_argument("--quality", type=int, default=90, help="of reduced JPEG (default 90)")
    parser.add_argument("--shard-size", type=float, default=256, help="at most, MiB (default 256)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    parser.add_argument("--check", action="store_true", help="compare OUT with its checksums")
    args = parser.parse_args(argv)
    limits = {"short_side": (0, 65535), "quality": (1, 100), "shard_size": (0.001, 65536)}
    for name, (low, high) in (limits | {"workers": (0, 1024)}).items():
        if not low <= (value := getattr(args, name)) <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: wanted {low} to {high}")
    if args.check != (args.root is None):
        parser.error("wanted: ROOT OUT, or --check OUT")
    check(args.out) if args.check else run(args)


if __name__ == "__main__":
    engine.command("pack", main)
