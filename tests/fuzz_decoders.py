"""Feed damaged images and maps to FolderDataset: no crash, no hang, no exception may come out.

Not part of pytest: `python tests/fuzz_decoders.py --cases 10000 [--first 0]`. A case is a number:
it fixes the file, the kind of damage and its place, so `--cases 1 --first N` repeats case N. Cases
run in child processes. A child that dies, or is still at a case after 30 s (SIGALRM's default
action ends it even inside a C decoder), is a failure; a fresh child goes on behind it.
"""

import argparse
import collections
import io
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import zlib

import numpy as np
from PIL import Image

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import data  # noqa: E402

SIZE = (48, 72)


def encode(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def sources() -> dict[str, bytes]:
    """Intact files by "rgb", "instance" or "semantic" and kind."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    photo = np.stack([y * 4, x * 3, y + x], -1) + rng.integers(0, 30, (*SIZE, 3))
    photo = Image.fromarray(photo.clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x0132] = 6, "a description", "2020:01:01 00:00:00"
    ids = (y // 8 * 9 + x // 8).astype(np.uint8)
    palette = Image.fromarray(ids)
    palette.putpalette(list(range(256)) * 3)
    grey, wide = Image.fromarray(ids), Image.fromarray(ids.astype(np.uint16) * 500)
    files = {
        "jpeg": encode(photo, "JPEG"),
        "jpeg444": encode(photo, "JPEG", subsampling=0, quality=95),
        "progressive": encode(photo, "JPEG", progressive=True),
        "exif": encode(photo, "JPEG", exif=exif),
        "grey": encode(photo.convert("L"), "JPEG"),
        "cmyk": encode(photo.convert("CMYK"), "JPEG"),
        "png": encode(photo, "PNG"),
        "png-p": encode(photo.convert("P"), "PNG"),
        "png16": encode(wide, "PNG"),
        "png-exif": encode(photo, "PNG", exif=exif),
        "webp": encode(photo, "WEBP", exif=exif),
        "webp-lossless": encode(photo, "WEBP", lossless=True),
        "gif": encode(photo, "GIF"),
        "bmp": encode(photo, "BMP"),
        "tiff": encode(photo, "TIFF"),
        "ppm": encode(photo, "PPM"),
        "tiff-lzw": encode(photo.convert("CMYK"), "TIFF", compression="tiff_lzw"),
        "jp2": encode(photo, "JPEG2000"),
    }
    maps = {"grey": encode(grey, "PNG"), "palette": encode(palette, "PNG")}
    found = {f"rgb {k}": v for k, v in files.items()} | {"instance deep": encode(wide, "PNG")}
    return found | {f"{g} {k}": v for g in ("instance", "semantic") for k, v in maps.items()}


def mend_png(content: bytes) -> bytes:
    """Give every chunk its right checksum, so that the damage gets past it."""
    out, at = bytearray(content), 8
    while at + 12 <= len(out):
        size = int.from_bytes(out[at : at + 4], "big")
        if at + 12 + size > len(out):
            break
        out[at + 8 + size : at + 12 + size] = zlib.crc32(out[at + 4 : at + 8 + size]).to_bytes(
            4, "big"
        )
        at += 12 + size
    return bytes(out)


def damage(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """Spoil a file in one of seven ways."""
    kinds = ["cut", "bits", "head", "run", "drop", "insert", "random"]
    kind, out, n = kinds[rng.integers(len(kinds))], bytearray(content), len(content)
    if kind == "cut":
        out = out[: rng.integers(0, n)]
    elif kind in ("bits", "head"):  # the first 200 bytes hold sizes, tables, EXIF
        for at in rng.integers(0, n if kind == "bits" else min(n, 200), rng.integers(1, 9)):
            out[at] ^= 1 << int(rng.integers(0, 8))
    elif kind == "random":  # noise behind a true beginning
        keep = rng.integers(0, 64)
        out = out[:keep] + rng.bytes(int(rng.integers(0, 2000)))
    else:
        at, size = rng.integers(0, n), int(rng.integers(1, 64))
        out[at : at + (0 if kind == "insert" else size)] = (
            b"" if kind == "drop" else rng.bytes(size)
        )
    out = bytes(out)
    return kind, mend_png(out) if out[:4] == b"\x89PNG" and rng.random() < 0.7 else out


def child(first: int, last: int, current, results) -> None:
    """Run cases and report outcomes; `current` tells where it was if this process dies."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    files, names = sources(), sorted(sources())
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libjpeg and libtiff comment on damage
    with tempfile.TemporaryDirectory() as root:
        paths = {g: f"{root}/train/{g}" for g in data.GRANULARITIES}
        for granularity, path in paths.items():
            os.makedirs(path)
            for name in ("a", "b"):
                kind = "png" if granularity == "rgb" else "grey"
                with open(f"{path}/{name}.png", "wb") as file:
                    file.write(files[f"{granularity} {kind}"])
        dataset = data.FolderDataset(root, "train", None, 32, 16, data.GRANULARITIES)
        for case in range(first, last):
            current.value = case
            rng = np.random.Generator(np.random.PCG64(case))
            name = names[rng.integers(len(names))]
            granularity = name.split()[0]
            kind, content = damage(files[name], rng)
            path = f"{paths[granularity]}/a.png"
            with open(path, "rb") as file:
                intact = file.read()
            with open(path, "wb") as file:
                file.write(content)
            signal.alarm(30)
            began = time.monotonic()
            try:
                sample = dataset[case, 0]
                error = sample.get("error")
                outcome = "error" if error else "replaced" if sample["bad"] >= 0 else "read"
                if error and granularity == "rgb" and "is displayed at" not in error:
                    outcome = f"FAILED: {error}"  # an image alone may only change its size
            except BaseException as error:
                outcome = f"FAILED: {type(error).__name__}: {error}"
            signal.alarm(0)
            results.put((case, name, kind, outcome, time.monotonic() - began))
            with open(path, "wb") as file:
                file.write(intact)
    results.put(None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    context = multiprocessing.get_context("fork")
    first, last, slowest = args.first, args.first + args.cases, (0.0,)
    counts, failures = collections.Counter(), []
    while first < last:
        current, results = context.Value("q", first), context.Queue()
        process = context.Process(target=child, args=(first, last, current, results))
        process.start()
        done = False
        while not done and (process.is_alive() or not results.empty()):
            try:
                item = results.get(timeout=1)
            except Exception:
                continue
            done = item is None
            if item:
                case, name, kind, outcome, seconds = item
                counts[name.split()[0], outcome.split(":")[0]] += 1
                slowest = max(slowest, (seconds, case, name, kind))
                if outcome.startswith("FAILED"):
                    failures.append(item)
        process.join()
        if not done:
            failures.append((current.value, f"FAILED: child ended with {process.exitcode}"))
        first = last if done else current.value + 1
    for failure in failures[:20]:
        print("case", *failure)
    table = ", ".join(f"{g} {outcome} {n}" for (g, outcome), n in sorted(counts.items()))
    print(f"{sum(counts.values())} cases: {table}; slowest {slowest}; {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
