"""Time of the loader, part by part, beside the usual PIL pipeline, for `benchmark loader`."""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import engine  # noqa: F401 - before torch: it sets how threads wait

import torch
from PIL import Image
from torchvision import transforms
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import InterpolationMode

import data
import files
import shapes
from common import IMAGENET_MEAN, IMAGENET_STD
from engine import UserError


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


def rate(run: Callable[[int], object], count: int) -> float:
    """Calls a second, the best of three passes over `count` samples, in this thread."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for i in range(count):
            run(i)
        best = min(best, time.perf_counter() - began)
    return count / best


def loader(args: argparse.Namespace) -> list[dict]:
    """Time the loader in one thread, for RGB alone and, where there are maps, with them."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = args.data or folder
        if args.data is None:
            photographs(Path(root), args.count)
        maps = set(data.GRANULARITIES) <= set(files.layout(root, "train"))
        chosen = [("rgb",)] + [tuple(data.GRANULARITIES)] * maps
        return [loader_parts(root, names, args.count, args.feed) for names in chosen]


def readable(dataset: data.FolderDataset, count: int) -> list[int]:
    """The first `count` images without those that cannot be read, which a line tells.

    Errors: UserError where none can be read, or a map does not fit.
    """
    chosen, broken = [], []
    for i in range(min(count, len(dataset))):
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


def loader_parts(root: str, names: tuple[str, ...], count: int, feed: float | None) -> dict:
    """Time reading, decoding, cropping and collating; for RGB beside the usual PIL pipeline."""
    dataset = data.FolderDataset(root, "train", None, 224, 4, names)
    chosen = readable(dataset, count)
    n, stems = len(chosen), [dataset.files.name(i) for i in chosen]
    decode, paths = {}, {}
    for g, folder in dataset.folders.items():
        decode[g] = data.decode_image if g == "rgb" else data.decode_map
        paths[g] = [f"{folder}/{s if g == 'rgb' else s.rpartition('.')[0] + '.png'}" for s in stems]
    raw = {g: [data.read_bytes(p) for p in paths[g]] for g in paths}
    decoded = [dataset.load(i) for i in chosen[:64]]
    samples = [dataset[0, i] for i in chosen[:64]]
    parts = {
        "read": 1 / rate(lambda i: [data.read_bytes(paths[g][i]) for g in paths], n),
        "decode": 1 / rate(lambda i: [decode[g](raw[g][i]) for g in paths], n),
        "crop": 1 / rate(lambda i: dataset.crop(*decoded[i], i), len(decoded)),
        "collate": 1 / rate(lambda i: data.collate(samples), 4) / len(samples),
    }
    ours = rate(lambda i: dataset[0, chosen[i]], n)
    shares = {k: v / sum(parts.values()) for k, v in parts.items()}
    result = {"granularities": names, "images_per_s": ours, "parts": shares}
    shown = ", ".join(f"{k} {v:.0%}" for k, v in shares.items())
    print(f"{', '.join(names)}: {ours:.0f} images/s a core; {shown}")
    if feed:
        print(f"  {feed / ours:.1f} cores feed {feed:.0f} images/s")
    if names == ("rgb",):
        usual = transforms.Compose([
            transforms.RandomResizedCrop(224, interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(), transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ])  # fmt: skip
        classic = rate(lambda i: usual(Image.open(paths["rgb"][i]).convert("RGB")), n)
        size = sum(map(len, raw["rgb"])) / n / 1000
        shown = f"  {n} images of {size:.0f} kB; PIL and torchvision's transforms {classic:.0f} "
        shown += f"(ours {ours / classic:.2f}x), "
        result["classic"] = classic
        try:
            whole = [torch.from_numpy(x) for x in raw["rgb"]]
            bare = rate(lambda i: decode_jpeg(whole[i], mode=ImageReadMode.RGB), n)
            result["bare_decode"] = bare
            print(f"{shown}bare decode_jpeg {bare:.0f} (ours {ours / bare:.0%})")
        except RuntimeError:
            print(f"{shown}no bare decode_jpeg, as not all are RGB or grey JPEG")
    return result
