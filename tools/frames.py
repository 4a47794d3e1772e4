"""Videos to folders of frames, the layout of clips.py.

    python -m tools.frames VIDEOS OUT --fps 30 --short-side 320

VIDEOS/[CLASS/]NAME.mp4 becomes OUT/[CLASS/]NAME/000001.jpg, ...; run it once for train and once for
val, e.g. on k400/train and data/k400/train. It wants PyAV, which brings FFmpeg: pip install av.

A clip is written into a hidden folder and renamed when it is whole; so an interrupted run is
continued by the same command, which leaves finished clips alone and does unfinished ones again.
Videos that cannot be read, or not to their end, are named and left out; an end is what the file's
header says, and a twentieth may lack. A folder that was begun with other settings is refused.
"""

import argparse
import contextlib
import errno
import functools
import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from files import UserError

SUFFIXES = "mp4 mkv webm avi mov m4v mpg mpeg wmv flv 3gp ts ogv".split()
SETTINGS = ".frames.json"  # in OUT: what it was made with


def videos(root: Path) -> list[Path]:
    """Videos below a folder, relative to it, sorted; UserError where there are none."""
    if not root.is_dir():
        raise UserError(f"{root} is no folder of videos")
    found = []
    for at, folders, names in os.walk(root, followlinks=True):  # but no link to a folder above
        here = Path(at).resolve()
        folders[:] = [x for x in folders if not here.is_relative_to(Path(at, x).resolve())]
        found += [Path(at, x) for x in names]
    found = [p for p in found if p.suffix[1:].lower() in SUFFIXES and p.is_file()]
    found = sorted(p.relative_to(root) for p in found)
    found = [p for p in found if not any(part[0] == "." for part in p.parts)]
    if not found:
        raise UserError(f"no videos ({' '.join(SUFFIXES)}) in {root}")
    names: dict[Path, Path] = {}
    for path in found:
        if (first := names.setdefault(path.with_suffix(""), path)) != path:
            raise UserError(f"{root}: {first} and {path} would be one clip; rename one of them")
    for path in found:
        if first := next((names[p] for p in path.parents if p in names), None):
            raise UserError(f"{root}: {path} would lie in the clip of {first}; rename one of them")
    return found


def at_rate(frames: Iterable[tuple[float, object]], fps: float | None) -> Iterator[object]:
    """Frames at a constant rate, of (time it is shown from in seconds, frame); None: as they are.

    At k / fps seconds after the first one stands the last that has begun by then. The last of all
    is shown for as long as the one before it.
    """
    first, before, held, taken, step = None, None, None, 0, 0.0
    for time, frame in frames:
        if fps is None:
            yield frame
            continue
        if first is None:
            first = time
        else:
            step = time - before
            while taken < (time - first) * fps - 1e-6:
                yield held
                taken += 1
        before, held = time, frame
    if first is not None:
        for _ in range(taken, max(1, math.ceil((before + step - first) * fps - 1e-6))):
            yield held


def decode(path: Path) -> Iterator[tuple[float, object]]:
    """Yield (seconds, PyAV's frame) of a video. Any Exception: it is broken."""
    import av

    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type, start, end = "AUTO", None, 0.0
        length = float(stream.duration * stream.time_base) if stream.duration else 0.0
        if not stream.duration and container.duration:  # Matroska and WebM tell the file's alone
            length = container.duration / 1e6
        rate = float(stream.average_rate or 25)
        for number, frame in enumerate(container.decode(stream)):
            if frame.is_corrupt:
                raise ValueError(f"frame {number} is damaged")
            time = number / rate if frame.time is None else frame.time
            yield time, frame
            start, end = time if start is None else start, time + 1 / rate
        if start is None:
            raise ValueError("no frames")
        if end - start + 2 / rate < 0.95 * length:  # a file that was cut off ends without a word
            raise ValueError(f"ends after {end - start:.1f} of {length:.1f} s")


def picture(frame: object, short_side: int | None) -> Image.Image:
    """PyAV's frame as displayed; a larger one with this short side."""
    image = frame.to_image()
    if angle := getattr(frame, "rotation", 0):  # old versions do not tell
        image = image.rotate(angle, expand=True)
    if short_side and short_side < min(image.size):
        scale = short_side / min(image.size)
        size = tuple(max(1, round(n * scale)) for n in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
    return image


def write(job: tuple[Path, Path], fps: float | None, short_side: int | None, quality: int) -> str:
    """Write the frames of one video; "" or what is wrong. The folder is whole or not there."""
    path, out = job
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        for number, frame in enumerate(at_rate(decode(path), fps), start=1):
            picture(frame, short_side).save(part / f"{number:06d}.jpg", quality=quality)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        if error.errno == errno.ENOSPC:
            raise
        return f"{path}: {error}"
    except Exception as error:  # FFmpeg's are of many kinds
        shutil.rmtree(part, ignore_errors=True)
        return f"{path}: {str(error) or type(error).__name__}"
    part.rename(out)
    return ""


def settle(out: Path, settings: dict) -> None:
    """Remember what a folder is made with; UserError where it was made with other settings."""
    file, part = out / SETTINGS, out / f"{SETTINGS}.part"
    if file.exists():
        found = json.loads(file.read_text())
        if found != settings:
            raise UserError(f"{out} was begun with {found}, now it would be {settings}")
    elif out.is_dir() and set(out.iterdir()) - {part}:
        raise UserError(f"{out} holds something else; choose an empty folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(settings))
        part.rename(file)


def make(args: argparse.Namespace) -> int:
    """Write all clips that are not there yet; how many videos could not be read."""
    if importlib.util.find_spec("av") is None:
        raise UserError("PyAV reads the videos and is not installed: pip install av")
    root, out = Path(args.videos), Path(args.out)
    settings = {"fps": args.fps, "short_side": args.short_side, "quality": args.quality}
    listed = videos(root)
    settle(out, settings)
    jobs = [(root / path, out / path.with_suffix("")) for path in listed]
    left = [job for job in jobs if not job[1].exists()]
    print(f"{len(jobs)} videos, {len(jobs) - len(left)} done before", flush=True)
    broken, task = [], functools.partial(write, **settings)
    pool = ProcessPoolExecutor(args.workers) if args.workers > 1 else contextlib.nullcontext()
    with pool:
        try:
            found = (pool.map if args.workers > 1 else map)(task, left)
            for problem in tqdm(found, total=len(left), unit="clip", mininterval=1):
                broken += [problem] if problem else []
        except BaseException:
            if args.workers > 1:
                pool.shutdown(cancel_futures=True)
            raise
    print(f"{len(left) - len(broken)} clips written, {len(broken)} videos cannot be read")
    print(*broken, sep="\n", end="\n" if broken else "")
    return 1 if broken else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0; 1 where videos could not be read, 2 where nothing could be done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("videos", help="folder of videos, in class folders or not")
    parser.add_argument("out", help="folder of clips, e.g. data/k400/train")
    parser.add_argument("--fps", type=float, help="frames a second; default: all frames")
    parser.add_argument(
        "--short-side", type=int, help="pixels of larger ones; default: as they are"
    )
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    try:
        for name in ("fps", "short_side", "quality", "workers"):
            value = getattr(args, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')} {value} must be above 0")
        return make(args)
    except (UserError, OSError, BrokenProcessPool) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
