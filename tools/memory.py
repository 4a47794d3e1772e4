"""How much memory suffices: the largest micro-batch, the list of files; for `benchmark memory`."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import data
from engine import UserError


def available() -> float:
    """Memory that this machine can still give, MiB."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 1024
    raise UserError("this system does not say how much memory it has left")


def largest_batch(
    peak_of: Callable[[int], float | None], cuda: bool
) -> tuple[int, dict[int, float]]:
    """Search for the largest batch that fits, within a sixteenth.

    Args: `peak_of`, peak memory in MiB of a step with so many samples; None where it did not fit.
    Returns: that batch, and the peaks that were met.
    """
    peaks: dict[int, float] = {}

    def fits(n: int) -> bool:
        if not cuda and len(peaks) > 1:  # a CPU kills what asks for too much: stop before
            (a, pa), (b, pb) = sorted(peaks.items())[-2:]
            if pa + (pb - pa) / (b - a) * (n - a) > 0.9 * available():
                return False
        if (peak := peak_of(n)) is not None:
            peaks[n] = peak
        return peak is not None

    low, high = 0, 8
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low, peaks


def file_list(count: int = 1_281_167) -> dict:
    """What as many file names as ImageNet has take, and how long they take to open."""
    name = b"n%08d/n%08d_%d.JPEG"
    names = np.array([name % (i % 1000, i % 1000, i) for i in range(count)])
    labels = np.arange(count, dtype=np.int32) % 1000
    with tempfile.TemporaryDirectory() as folder:
        data.FileList(names, labels, {"rgb": "train"}, []).save(folder)
        began = time.perf_counter()
        data.FileList.open(folder)
        opened = time.perf_counter() - began
    size = names.nbytes + labels.nbytes
    print(
        f"file list of {count} names: {size / 2**20:.1f} MiB, {size / count:.1f} bytes each, "
        f"opened in {1e3 * opened:.1f} ms"
    )
    return {"files": count, "bytes": size, "open_s": opened}
