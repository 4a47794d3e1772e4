"""Time of the loader, part by part: a folder beside its shards, beside the usual PIL pipeline."""

import argparse
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import engine  # noqa: F401 - before torch: it sets how threads wait

import torch
from PIL import Image

import data
import files
import shapes
from common import IMAGENET_MEAN, IMAGENET_STD
from engine import UserError
from tools import map_files, pack

SIZE = 224


# ----------------------------------------------------------------------------- what is measured


def photographs(root: Path, count: int) -> None:
    """Write scenes as 496 x 368 JPEG of photographs' size, about 43 kB, with both maps as PNG."""
    scenes = shapes.ShapeScenes("train", (368, 496), 1)
    for i in range(count):
        sample = scenes[0, i]
        for name in data.GRANULARITIES:
            path = root / "train" / name / f"{i}.{'jpg' if name == 'rgb' else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if name == "rgb":
                Image.fromarray(sample[name].permute(1, 2, 0).numpy()).save(path, quality=80)
            else:
                Image.fromarray(sample[name].numpy()).save(path)


def readable(dataset: data.FolderDataset, count: int) -> list[int]:
    """`count` images, evenly spaced, without those that cannot be read, which a line tells.

    Errors: UserError where none can be read, or a map does not fit.
    """
    chosen, broken, total = [], [], len(dataset)
    for i in range(0, total, max(1, total // count))[:count]:
        try:
            dataset.load(i)
            chosen.append(i)
        except data.Unreadable as e:
            broken.append(str(e))
    if not chosen:
        raise UserError(f"none of {len(broken)} images can be read, e.g. {broken[0]}")
    if broken:
        print(f"left out {len(broken)} images that cannot be read, e.g. {broken[0]}")
    return chosen


def link(dataset: data.FolderDataset, chosen: list[int], place: Path) -> None:
    """Lay out some images and their maps as a folder of their own."""
    for i in chosen:
        for g in dataset.granularities:
            source = Path(dataset.files.where(dataset.root, g, i)).resolve()
            path = place / "train" / g / f"{i:09d}{source.suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            os.symlink(source, path)


def with_palette(root: Path, place: Path) -> None:
    """The same folder, its maps as palette PNG."""
    shutil.copytree(root, place)
    for g in map_files.MAPS:
        for path in map_files.pngs(f"{place}/train/{g}"):
            map_files.rewrite(path)


def variants(args: argparse.Namespace, place: Path) -> list[tuple[str, Path, tuple[str, ...]]]:
    """(what it is, root, granularities) of all that is timed; what is lacking is written."""
    root = args.data or str(place / "scenes")
    if args.data is None:
        photographs(Path(root), args.count)
    everything = tuple(data.GRANULARITIES)
    maps = set(everything) <= set(files.layout(root, "train"))
    names = everything if maps else ("rgb",)
    chosen = [("rgb",), everything] if maps else [("rgb",)]
    if files.packed(f"{root}/train"):
        return [("packed", Path(root), g) for g in chosen]
    dataset = data.FolderDataset(root, "train", None, granularities=names)
    link(dataset, readable(dataset, args.count), place / "folder")
    rows = [("folder", place / "folder", g) for g in chosen]
    if maps:
        with_palette(place / "folder", place / "palette")
        rows.append(("folder, palette maps", place / "palette", everything))
    for name, side in (("packed", 0), (f"packed, short side {args.short_side}", args.short_side)):
        flags = ["--short-side", str(side), "--workers", "0"]
        pack.main([str(place / "folder"), str(place / name), *flags])
        rows += [(name, place / name, g) for g in chosen]
    return rows


# ------------------------------------------------------------------------------------------ times


def seconds(run: Callable[[int], object], count: int) -> tuple[float, float]:
    """(CPU, wall) seconds of a call, over `count` of them in this thread."""
    cpu, wall = time.process_time(), time.perf_counter()
    for i in range(count):
        run(i)
    return (time.process_time() - cpu) / count, (time.perf_counter() - wall) / count


def best(runs: dict[object, tuple[Callable[[int], object], int]]) -> dict:
    """`seconds` of each, the least of three rounds in which they take turns."""
    rounds = [{name: seconds(*run) for name, run in runs.items()} for _ in range(3)]
    return {name: tuple(map(min, zip(*(r[name] for r in rounds)))) for name in runs}


def loader(args: argparse.Namespace) -> list[dict]:
    """Time a folder and its shards in one thread, for RGB alone and, where there are maps, with
    them; CPU seconds give images/s a core, also on a machine with other work.
    """
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        rows = variants(args, Path(place))
        sets = [data.FolderDataset(str(root), "train", None, SIZE, 4, g) for _, root, g in rows]
        chosen = readable(sets[-1], args.count)
        runs = {
            i: (lambda k, d=dataset: d[0, chosen[k]], len(chosen)) for i, dataset in enumerate(sets)
        }
        times, results = best(runs), []
        for i, (name, _, granularities) in enumerate(rows):
            result = {"source": name, "granularities": granularities} | parts(sets[i], chosen)
            result |= dict(zip(("images_per_s", "images_per_s_wall"), (1 / x for x in times[i])))
            print(line(result, results))
            results.append(result)
        if args.feed:
            print(
                f"  {args.feed * times[0][0]:.1f} cores feed {args.feed:.0f} images/s of the first"
            )
        if rows[0][0] == "folder":
            results[0] |= usual(sets[0], times[0][0])
        return results


def line(result: dict, before: list[dict]) -> str:
    names, speed = result["granularities"], result["images_per_s"]
    shown = ", ".join(f"{k} {v:.0%}" for k, v in result["parts"].items())
    words = f"{result['source']}, {' + '.join(names)}: {speed:.0f} images/s a core ("
    words += f"{result['images_per_s_wall']:.0f} by the clock), {result['bytes'] / 1000:.0f} kB, "
    words += f"{result['enlarged']:.0%} of crops enlarged; {shown}"
    first = {r["granularities"]: r["images_per_s"] for r in reversed(before)}
    last = {r["granularities"]: r["images_per_s"] for r in before}
    if names != ("rgb",):
        words += f"; {last['rgb',] / speed:.2f} of RGB's time"
    if names in first:
        words += f"; {speed / first[names]:.2f}x the {before[0]['source']}'s"
    return words


def parts(dataset: data.FolderDataset, chosen: list[int]) -> dict:
    """Shares of reading, decoding, cropping and collating; bytes of a sample; enlarged crops."""
    root, names, n = dataset.root, dataset.granularities, len(chosen)
    decode = {g: data.decode_image if g == "rgb" else data.decode_map for g in names}
    raw = [{g: dataset.files.read(root, g, i) for g in names} for i in chosen]
    decoded = [dataset.load(i) for i in chosen[:64]]
    samples = [dataset[0, i] for i in chosen[:64]]
    times = best({
        "read": (lambda i: [dataset.files.read(root, g, chosen[i]) for g in names], n),
        "decode": (lambda i: [decode[g](raw[i][g]) for g in names], n),
        "crop": (lambda i: dataset.crop(*decoded[i], i), len(decoded)),
        "collate": (lambda i: data.collate(samples), 4),
    })  # fmt: skip
    cpu = {k: v[0] / (len(samples) if k == "collate" else 1) for k, v in times.items()}
    crops = [
        data.random_crop(random.Random(seed).random, *rgb.shape[1:], dataset.scale)
        for rgb, _ in decoded
        for seed in range(20)
    ]
    return {
        "parts": {k: v / sum(cpu.values()) for k, v in cpu.items()},
        "bytes": sum(len(x) for sample in raw for x in sample.values()) / n,
        "enlarged": sum(h * w < SIZE * SIZE for _, _, h, w in crops) / len(crops),
    }


def usual(dataset: data.FolderDataset, ours: float) -> dict:
    """The same images through PIL and torchvision's transforms, and decoded alone."""
    from torchvision import transforms  # two CPU seconds, which other benchmarks need not
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms import InterpolationMode

    pipeline = transforms.Compose([
        transforms.RandomResizedCrop(SIZE, interpolation=InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.ToTensor(),
        transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
    ])  # fmt: skip
    n = len(dataset)
    paths = [dataset.files.where(dataset.root, "rgb", i) for i in range(n)]
    whole = [torch.from_numpy(files.read_bytes(path)) for path in paths]
    runs = {"classic": (lambda i: pipeline(Image.open(paths[i]).convert("RGB")), n)}
    runs["bare_decode"] = (lambda i: decode_jpeg(whole[i], mode=ImageReadMode.RGB), n)
    said = f"  {n} images; PIL and torchvision's transforms "
    try:
        times = best(runs)
    except RuntimeError:
        times = best({"classic": runs["classic"]})
    found = {name: 1 / cpu for name, (cpu, _) in times.items()}
    said += f"{found['classic']:.0f} (ours {1 / ours / found['classic']:.2f}x), "
    if "bare_decode" in found:
        bare = found["bare_decode"]
        print(f"{said}bare decode_jpeg {bare:.0f} (ours {1 / ours / bare:.0%})")
    else:
        print(f"{said}no bare decode_jpeg, as not all are RGB or grey JPEG")
    if torch.cuda.is_available() and "bare_decode" in found:
        found["cuda_decode"] = on_cuda(whole)
        print(f"  decode_jpeg on the device, all of them in one call: {found['cuda_decode']:.0f}")
    return found


def on_cuda(whole: list[torch.Tensor]) -> float:
    """Images/s, by the clock, that torchvision decodes on the device."""
    from torchvision.io import ImageReadMode, decode_jpeg

    def batch(_: int) -> None:
        decode_jpeg(whole, mode=ImageReadMode.RGB, device="cuda")
        torch.cuda.synchronize()

    batch(0)
    return len(whole) / seconds(batch, 3)[1]
