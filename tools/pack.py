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
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from engine import UserError
from files import FileList, layout, packed, replacing, scan
from shards import MEMBER, ShardList, checksum_of, sample_key
from tools.members import Members

BLOCK = 512  # of a tar file: a header, and what a member is filled up to
OURS = re.compile(
    r"(\d{6}\.tar|(names|labels|members)\.npy|(files|packing)\.json|members|lock)(\.tmp)?"
)


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
    elif any(place.glob("*.tar")):
        raise UserError(f"{place} holds shards of which nothing is known: choose another OUT")
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
    rows, digest = [], hashlib.sha256()

    def write(content: bytes) -> None:
        digest.update(content)
        file.write(content)

    while samples.next and (not rows or file.tell() + room(samples.next) <= limit):
        row = []
        for suffix, content in samples.next:
            info = tarfile.TarInfo(f"{sample_key(samples.number)}.{suffix}")
            info.size = len(content)
            write(info.tobuf(tarfile.USTAR_FORMAT))
            row.append((file.tell(), len(content), number))
            write(content + bytes(-len(content) % BLOCK))
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
        self.bar.close() if self.next is None else self.bar.update(0)


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
    try:
        import fcntl
    except ImportError:
        raise UserError("packing locks its folder as Windows does not: pack under WSL") from None
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
        packing = {
            "short_side": args.short_side,
            "quality": args.quality if args.short_side else 0,
            "shard_bytes": int(args.shard_size * 2**20),
            "granularities": list(files.folders),
            "listing": checksum_of(files.names, files.labels),
        }
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
    splits = [s for s in ("train", "val") if [*Path(out, s).glob("*.tar")] or packed(f"{out}/{s}")]
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
            f"{'; '.join(problems[:5])}{more}. Delete damaged shards, or the whole folder of a "
            "damaged index; the command that packed them makes them again"
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
