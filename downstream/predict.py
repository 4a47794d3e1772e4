"""What a fine-tuned model says of photographs without labels.

    python -m downstream.predict RUN IMAGES... --output OUT

RUN is the folder of a run, or a checkpoint in it; IMAGES are files and folders. By what RUN is:

    finetune  OUT/predictions.csv: the five likeliest classes of each image and their probabilities
    segment   OUT/NAME.png: each pixel's class, with a palette, as maps of data.py are; beside it
              OUT/NAME-overlay.jpg; OUT/predictions.csv: each class's share of the image

Images are read as at a run's own test: the centre crop for classes; for segmentation the whole
image by the run's --evaluation, its labels at the size of the file. What cannot be read is named on
stderr and left out. A further task is an entry of TASKS.
"""

import csv
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
from PIL import Image
from torch import Tensor

import data
import pictures
from downstream import pixels
from downstream.evaluate import open_finetuned
from downstream.photos import photographs
from downstream.segment import class_names, open_run
from downstream.upernet import resize
from engine import UserError
from engine.ranks import World


class Photographs(data.Dataset):
    """`prepare` of each image, a dict, with its `name` and `pixels` (3, H, W) as they are shown, or
    {"unreadable": message}.
    """

    def __init__(self, dataset: data.FolderDataset, prepare: Callable[[Tensor], Tensor]):
        self.dataset, self.prepare = dataset, prepare

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict:
        try:
            rgb, _ = self.dataset.load(index)
        except data.Unreadable as e:
            return {"unreadable": str(e)}
        name = self.dataset.files.name(index)
        return {"rgb": self.prepare(rgb), "name": name, "pixels": rgb}


def batches(photos: Photographs, size: int, workers: int) -> Iterator[list[dict]]:
    """Yield lists of at most `size` images that can be read; the others go to stderr."""
    loader = torch.utils.data.DataLoader(
        photos, size, collate_fn=list, num_workers=workers, worker_init_fn=data.worker_init
    )
    read = 0
    for samples in loader:
        for sample in samples:
            if "unreadable" in sample:
                print(f"left out: {sample['unreadable']}", file=sys.stderr, flush=True)
        samples = [s for s in samples if "rgb" in s]
        read += len(samples)
        if samples:
            yield samples
    if not read:
        raise UserError(f"none of {len(photos)} images can be read")


def centre(dataset: data.FolderDataset, rgb: Tensor) -> Tensor:
    return dataset.crop(rgb, {}, 0)["rgb"]


def whole(crop: tuple[int, int], slide: bool, rgb: Tensor) -> Tensor:
    return pixels.scaled(rgb, pixels.cover(rgb.shape[1:], crop) if slide else crop)


@torch.no_grad()
def classify(path: Path, places: list[str], world: World, args: object) -> Iterator[tuple]:
    """Yield an image's row of the table, its name, then classes and probabilities, and in words."""
    model = open_finetuned(path).to(world.device).eval()
    cfg, n = model.cfg, min(5, len(model.classes))
    if len(cfg.names) > 1:
        raise UserError(f"{path} classifies images with {', '.join(cfg.names[1:])} maps")
    head = [f"{what}_{i + 1}" for i in range(n) for what in ("class", "probability")]
    yield ["image", *head], ""
    root, listed = photographs(places)
    dataset = data.FolderDataset(
        root, "", listed, cfg.image_size, train=False, crop_pct=cfg.crop_pct
    )
    photos = Photographs(dataset, functools.partial(centre, dataset))
    for samples in batches(photos, args.micro_batch or 128, args.workers):
        imgs = torch.stack([s["rgb"] for s in samples]).to(world.device)
        with world.autocast():
            logits = model.classify({"rgb": model.normalize(imgs)}).float()
        found = logits.softmax(1).sort(dim=1, descending=True, stable=True)
        for sample, p, at in zip(samples, found.values.tolist(), found.indices.tolist()):
            pairs = [(model.classes[i], f"{x:.4f}") for x, i in zip(p[:n], at)]
            words = f"{sample['name']}: " + ", ".join(map(" ".join, pairs))
            yield [sample["name"], *(x for pair in pairs for x in pair)], words


def likeliest(logits: Tensor, size: tuple[int, int], few: int = 8) -> Tensor:
    """Class of each pixel, (H, W) uint8: the argmax of logits (1, C, h, w) resized to (H, W), with
    few classes of a large photograph in memory at a time.
    """
    best, ids = logits.new_full(size, -torch.inf), logits.new_zeros(size, dtype=torch.uint8)
    for i, part in enumerate(logits.split(few, dim=1)):
        value, at = resize(part, size)[0].max(0)
        better = value > best
        best, ids = value.where(better, best), (at + i * few).to(torch.uint8).where(better, ids)
    return ids


def segment(path: Path, places: list[str], world: World, args: object) -> Iterator[tuple]:
    """Write maps and overlays; yield an image's row of the table, its name, then shares, and in
    words.
    """
    model, cfg = open_run(path)
    model.to(world.device).eval()
    cfg.micro_batch = args.micro_batch or cfg.micro_batch
    names = class_names(cfg)[: cfg.classes]
    names += [f"class {i}" for i in range(len(names), cfg.classes)]
    yield ["image", *names], ""
    root, listed = photographs(places)
    photos = Photographs(
        data.FolderDataset(root, "", listed, cfg.crop, train=False),
        functools.partial(whole, cfg.crop, cfg.evaluation == "slide"),
    )
    palette, made = pictures.colorize(torch.arange(256)[:, None])[..., 0].T.flatten().tolist(), {}
    for samples in batches(photos, cfg.micro_batch, args.workers):
        for sample, logits in pixels.predict(model, samples, cfg, world):
            name, rgb = sample["name"], sample["pixels"]
            ids = likeliest(logits.float(), rgb.shape[1:]).cpu()
            to = Path(args.output, name).with_suffix(".png")
            if made.setdefault(to, name) != name:
                raise UserError(f"{made[to]} and {name} would both become {to}")
            over_to = to.with_name(f"{to.stem}-overlay.jpg")
            if there := [p for p in (to, over_to) if p.exists()]:  # a photograph, maybe
                raise UserError(f"{there[0]} exists: choose another --output")
            to.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(ids.numpy())
            image.putpalette(palette)
            image.save(to)
            over = (rgb // 2 + pictures.colorize(ids) // 2).permute(1, 2, 0).numpy()
            Image.fromarray(over).save(over_to, quality=90)
            shares = (ids.flatten().bincount(minlength=cfg.classes) / ids.numel()).tolist()
            most = sorted(zip(shares, names), reverse=True)[:5]
            words = ", ".join(f"{what} {x:.1%}" for x, what in most if x)
            yield [name, *(f"{x:.4f}" for x in shares)], f"{name}: {words}"


TASKS = {"classify": classify, "segment": segment}  # by what checkpoints say of their run


def main(argv: list[str] | None = None) -> None:
    """Predict what photographs show, with a fine-tuned classifier or segmenter."""
    parser = engine.Parser(prog="downstream.predict", description=main.__doc__, allow_abbrev=False)
    parser.add_argument("run", help="folder of a finetune or segment run, or a checkpoint in it")
    parser.add_argument("images", nargs="+", help="files and folders")
    parser.add_argument("--output", required=True, help="folder of the results")
    parser.add_argument("--micro-batch", type=int, help="images, or crops of them, at a time")
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    args = parser.parse_args(argv)
    if args.workers < 0 or args.micro_batch is not None and args.micro_batch < 1:
        raise UserError("--micro-batch must be above 0, --workers 0 or above")
    path = Path(args.run, "last.pt") if Path(args.run).is_dir() else Path(args.run)
    content = engine.read(path, mapped=True)
    method = content.get("method") if isinstance(content, dict) else None
    if method not in TASKS:
        raise UserError(f"{path} is of {method}; wanted a run of finetune or segment")
    table = Path(args.output, "predictions.csv")
    if table.exists():
        raise UserError(f"{table} exists: choose another --output")
    world = World(args.device, args.precision)
    (head, _), *rows = TASKS[method](path, args.images, world, args)
    with engine.writing(table):
        table.parent.mkdir(parents=True, exist_ok=True)
        with open(table, "w", newline="") as f:
            csv.writer(f).writerows([head, *(row for row, _ in rows)])
    print("\n".join(words for _, words in rows[:10]))
    print(f"predicted   {len(rows)} images: {table}")


if __name__ == "__main__":
    engine.command("predict", main)
