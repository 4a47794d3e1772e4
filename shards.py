"""Samples in tar shards, each member read by one pread; tools/pack.py writes them.

    ROOT/train/000000.tar, 000001.tar, ...     000000000.jpg, 000000000.instance.png, ... .cls
    ROOT/train/names.npy, labels.npy           as of any list of files (files.py), in its order
    ROOT/train/members.npy, files.json         where each member lies; the shards' sizes and sums

So sample i is the folder's sample i: same seed, label, name, and the same place in every epoch.
Nothing is unpacked, there is no Python object per image, and workers share the mapped index. The
shards are ordinary tar files in WebDataset's convention, which its package reads without the index.
"""

import hashlib
import os
import threading

import numpy as np

from files import FileList, UserError, patiently

MEMBER = np.dtype([("at", "<u8"), ("size", "<u4"), ("shard", "<u4")])
OPEN = 128  # shards a process keeps open; ImageNet as it is has 600
AGAIN = "; the tools.pack command that wrote it makes it again"


def checksum_of(*arrays: np.ndarray) -> str:
    """SHA-256 of the bytes of arrays, one after the other."""
    total = hashlib.sha256()
    for array in arrays:
        total.update(np.ascontiguousarray(array).view(np.uint8))
    return total.hexdigest()


def sample_key(index: int) -> str:
    """What a sample's members are called in a shard, up to the first dot."""
    return f"{index:09d}"


class ShardList(FileList):
    """A list of files whose bytes lie in shards.

    Args, beside FileList's:
        members: (n, len(folders)) of MEMBER, columns in the order of `folders`.
        shards: [{"name", "bytes", "samples", "sha256"}, ...].
        packing: how they were made, and from what; tools/pack.py's own.
        checksum: of the arrays, as `checksum_of` gives it.
    """

    ARRAYS = (*FileList.ARRAYS, "members")
    FACTS = (*FileList.FACTS, "shards", "packing", "checksum")

    def __init__(
        self, names: np.ndarray, labels: np.ndarray, members: np.ndarray,
        folders: dict, classes: list, shards: list[dict], packing: dict, checksum: str,
    ):  # fmt: skip
        super().__init__(names, labels, folders, classes)
        if members.dtype != MEMBER or members.shape != (len(labels), len(folders)):
            raise ValueError("names and members do not fit each other")
        if len(labels) != sum(shard["samples"] for shard in shards):
            raise ValueError("members and shards do not fit each other")
        self.members, self.shards, self.packing, self.checksum = members, shards, packing, checksum
        self.opened, self.lock = {}, threading.Lock()

    def shard(self, root: str, number: int) -> str:
        return f"{root}/{self.folders['rgb']}/{self.shards[number]['name']}"

    def where(self, root: str, granularity: str, index: int) -> str:
        """Shard and name of an image or of one of its maps, for messages."""
        number = self.members[index]["shard"][0]
        kind = "" if granularity == "rgb" else f".{granularity}"
        return f"{self.shard(root, number)}: {sample_key(index)}{kind} ({self.name(index)})"

    def read(self, root: str, granularity: str, index: int) -> np.ndarray:
        """Bytes (n,) uint8 of an image or of one of its maps. Raises OSError; UserError where the
        shard ends before them.
        """
        member = self.members[index][[*self.folders].index(granularity)]
        at, size, number = member.item()
        data = np.empty(size, np.uint8)  # torch wants bytes that may be written

        def read() -> int:
            with self.lock:  # `data.check` reads in threads: no other may close this shard now
                try:
                    return os.preadv(self.handle(root, number), [data], at)
                except OSError:  # a file server that began anew knows no old handle
                    if number in self.opened:
                        os.close(self.opened.pop(number))
                    raise

        if patiently(read) < size:
            raise UserError(
                f"{self.where(root, granularity, index)}: the shard is cut short{AGAIN}"
            )
        return data

    def handle(self, root: str, number: int) -> int:
        """A shard's file descriptor; the one that was opened first makes room."""
        if number not in self.opened:
            if len(self.opened) == OPEN:
                os.close(self.opened.pop(next(iter(self.opened))))
            self.opened[number] = os.open(self.shard(root, number), os.O_RDONLY)
        return self.opened[number]

    def verify(self, root: str) -> None:
        """UserError naming the first shard that is absent or has another size than was written."""
        for number in range(len(self.shards)):
            if problem := self.damage(root, number):
                raise UserError(problem + AGAIN)

    def damage(self, root: str, number: int) -> str | None:
        """What is wrong with a shard, by its size alone."""
        path, wanted = self.shard(root, number), self.shards[number]["bytes"]
        try:
            size = os.path.getsize(path)
        except OSError as error:
            return f"{path}: {error.strerror}"
        return None if size == wanted else f"{path} has {size} bytes of {wanted}"
