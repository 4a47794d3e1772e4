"""Detection and instance segmentation with a pre-trained encoder: Mask R-CNN, COCO's numbers.

    torchrun --nproc_per_node=8 -m downstream.detect --data data/coco --checkpoint runs/.../last.pt
    python -m downstream.detect --data shapes --model tiny --checkpoint runs/.../last.pt
    python -m downstream.detect --train-images DIR --train-json FILE --val-images ... --method mae
    python -m downstream.detect evaluate RUN [--val-images DIR --val-json FILE]   a finished run

Map: detect_recipes.py          the papers' settings, by method
     coco.py, objects.py        data: COCO's format, ShapeScenes, crops, batches
     detector.py, mask_rcnn.py  encoder, neck, heads and their losses
     windows.py                 attention inside windows
     coco_scores.py             predictions in COCO's format, and their scores by pycocotools
     `main`                     training, then `report`: scores of a whole val split

Needs pycocotools (pip install pycocotools). A run leaves, beside every run's files, result.json,
categories.csv, predictions.json and a picture of val images with true and predicted objects.
"""

import csv
import json
import sys
from functools import partial
from pathlib import Path

import engine  # before torch: it sets how threads wait

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

import data
from downstream import coco, encoders, transfer
from downstream.coco_scores import predict, score, truth
from downstream.detect_recipes import PRESETS, Config, learning_rate
from downstream.detector import Detector
from downstream.mask_rcnn import paste
from downstream.objects import CocoImages, Jitter, Scenes, collate
from engine import UserError, parse
from engine.folder import wait_for
from engine.ranks import World
from pictures import colorize

SHOWN = 0.3  # least score of what a picture shows
VAL_SCENES = 500  # of --data shapes, some 2,000 objects
LEAST = 320  # least side of a picture, for its lines and names


def build(cfg: Config, classes: int) -> Detector:
    """The model of a run, with fresh weights."""
    encoder = encoders.build(cfg.described, cfg.image_size, cfg.drop_path, cfg.train_position)
    mean, std = cfg.statistics
    sizes = {k: getattr(cfg, k) for k in ("dim", "proposals", "boxes", "anchor")}
    return Detector(encoder, classes, cfg.neck, cfg.windows, mean, std, **sizes)


def make_optimizer(cfg: Config, model: Detector) -> torch.optim.Optimizer:
    """AdamW; norms, biases, positions and bias tables do not decay. Heads have the full rate."""
    heads = [m for m in (model.windows, model.neck, model.rpn, model.roi) if m is not None]
    groups = engine.layer_decay_groups(model.encoder, heads, cfg.weight_decay, cfg.layer_decay)
    return torch.optim.AdamW(groups, lr=0.0, betas=(cfg.beta1, cfg.beta2), fused=True)


# -------------------------------------------------------------------------------------------- data


def places(cfg: Config, split: str) -> tuple[str, str]:
    """Folder of a split's images, and the JSON of its objects."""
    given = getattr(cfg, f"{split}_images"), getattr(cfg, f"{split}_json")
    folder, name = f"{cfg.data}/{split}2017", f"instances_{split}2017.json"
    return given if given[0] else (folder, f"{cfg.data}/annotations/{name}")


def has_val(cfg: Config) -> bool:
    """Whether there is a val split: its files are named, or where COCO has them."""
    elsewhere = cfg.train_json and not cfg.val_json
    return not elsewhere and bool(cfg.val_json or Path(places(cfg, "val")[1]).is_file())


def open_split(
    cfg: Config, world: World, out: Path, split: str, categories: list | None = None
) -> Dataset | None:
    """Open one split on every rank; None where there is no val.

    Rank 0 reads the JSON once; its objects are frozen in the run's folder, as lists of files are.
    Args: `categories` of training, which val must agree with.
    """
    train = split == "train"
    if cfg.data == "shapes":
        coco.mask_tools()
        return Scenes(split, cfg.image_size, train, cfg.seed, None if train else VAL_SCENES)
    (folder, path), place = places(cfg, split), out / f"objects-{split}"
    scales = (cfg.scale_min, cfg.scale_max)
    jitter = Jitter(cfg.image_size, cfg.augmentation, scales, train, cfg.colour)

    def listing() -> bool:
        if not train and not has_val(cfg):
            return False
        if not ((out / "last.pt").exists() and (place / "objects.json").exists()):
            coco.mask_tools()
            files = coco.read_json(path, folder, categories)
            if "\n" in (words := data.check(CocoImages(folder, files, jitter))):  # unreadable ones
                print(f"warning     {split}: {words}", flush=True)
            if files.left_out:
                print(f"objects     {path}: {files.left_out} have no pixels and are left out")
            with engine.writing(place):
                files.save(place)
        return True

    if not world.from_rank_0(listing):
        return None
    wait_for(place / "objects.json", world)
    return CocoImages(folder, coco.Objects.open(place), jitter, cfg.seed)


class Run(engine.Run):
    """A run on objects in COCO's format."""

    collate = staticmethod(collate)

    def open(self, split: str, **options) -> Dataset | None:
        known = self.facts.get("categories")  # train is opened first, and val must agree with it
        dataset = open_split(self.cfg, self.world, self.out, split, known)
        if dataset is not None:
            self.facts["categories"] = dataset.categories
        return dataset


# -------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model: Detector, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Losses on held-out images."""
    losses = model.losses(batch, None)
    return {"loss": sum(losses.values()), **losses}


@torch.no_grad()
def show(model: Detector, batch: dict[str, Tensor], names: list[str]) -> dict[str, tuple]:
    """Images with their true objects, and with those that are found, as pictures.py draws them."""
    rgb, size = batch["rgb"], tuple(batch["rgb"].shape[2:])
    true, found = [], []
    for image, t, p in zip(rgb, model.targets(batch), model.predict(rgb)):
        sure = p["scores"] >= SHOWN
        words = [f"{names[i - 1]} {s:.2f}" for i, s in zip(p["labels"][sure], p["scores"][sure])]
        masks = paste(p["masks"][sure], p["boxes"][sure], size)
        found.append(draw(image, p["boxes"][sure], masks, p["labels"][sure], words))
        words = [names[i - 1] for i in t["labels"]]
        true.append(draw(image, t["boxes"], t["masks"] > 0, t["labels"], words))
    return {"objects": (torch.stack(true), None, torch.stack(found))}


def draw(rgb: Tensor, boxes: Tensor, masks: Tensor, labels: Tensor, words: list[str]) -> Tensor:
    """An image (3, H, W) uint8 with boxes, masks and names, at least LEAST pixels wide; of masks
    that overlap the first one, the surest, is shown.
    """
    unit = max(1, -(-LEAST // rgb.shape[2]))
    rgb = F.interpolate(rgb[None], scale_factor=unit)[0].cpu()
    if not len(masks):
        return rgb
    masks = masks & (masks.cumsum(0) == 1)  # torchvision paints black what two masks share
    masks = F.interpolate(masks[None].float(), scale_factor=unit)[0].bool().cpu()
    colours = [tuple(c) for c in colorize(labels.cpu()[:, None])[..., 0].T.tolist()]
    rgb = draw_segmentation_masks(rgb, masks, alpha=0.5, colors=colours)
    return draw_bounding_boxes(rgb, boxes.cpu() * unit, words, colours, width=1)


def report(model: Detector, dataset: Dataset, cfg: Config, world: World, out: Path) -> None:
    """Test a model on the whole val split; write predictions.json, result.json, categories.csv."""
    categories = dataset.categories
    images, unreadable = predict(model, dataset, categories, cfg, world, out)
    if world.rank:
        return
    path = None if cfg.data == "shapes" else places(cfg, "val")[1]
    found = json.loads((out / "predictions.json").read_text())
    numbers, rows = score(truth(dataset, path, categories), found)
    with open(out / "categories.csv", "w", newline="") as f:
        table = csv.DictWriter(f, rows[0].keys())
        table.writeheader()
        table.writerows(rows)
    result = {**numbers, "categories": {row["name"]: row for row in rows}}
    result |= {"images": images, "unreadable": unreadable, "predictions": len(found)}
    asked = "data train_json val_json checkpoint init random seed image_size window neck".split()
    result |= {k: getattr(cfg, k) for k in asked} | {"method": cfg.described["method"]}
    (out / "result.json").write_text(json.dumps(result, indent=1))
    box, mask = (", ".join(f"{k} {100 * (x[k] or 0):.1f}" for k in ("AP", "AP50", "AP75"))
                 for x in (numbers["box"], numbers["mask"]))  # fmt: skip
    print(f"result      box {box}; mask {mask}; {images} images: {out}/result.json")


# -------------------------------------------------------------------------------------------- runs


def evaluate_run(argv: list[str]) -> None:
    """Evaluate a finished run without its pre-training checkpoint."""
    parser = engine.Parser(prog="downstream.detect evaluate", description=evaluate_run.__doc__)
    parser.add_argument("run", help="folder of the run")
    parser.add_argument("--data", help="default: that of the run")
    parser.add_argument("--val-images", help="folder of images, with --val-json")
    parser.add_argument("--val-json", help="their objects, in COCO's format")
    parser.add_argument("--output", help="default: RUN/evaluation")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--workers", type=int)
    args = parser.parse_args(argv)
    path = Path(args.run, "last.pt")
    checkpoint = engine.load(path, "detect")
    given = {k: v for k, v in vars(args).items() if v is not None and k not in ("run", "output")}
    if args.data:  # its own files count, not those that the run was told to take
        files = dict.fromkeys(("train_images", "train_json", "val_images", "val_json"))
        given = files | given
    given |= {"resume": True, "output": args.run}
    cfg = engine.load_config(args.run, Config, {**checkpoint["config"], **given})
    cfg.resolve()
    world, out = World(cfg.device, cfg.precision), Path(args.output or Path(args.run, "evaluation"))
    out.mkdir(parents=True, exist_ok=True)
    categories = checkpoint["facts"]["categories"]
    model = build(cfg, len(categories)).to(world.device)
    engine.load_weights(model, checkpoint["model"], path)
    dataset = open_split(cfg, world, out, "val", categories)
    if dataset is None:
        raise UserError(f"{cfg.data} has no val split: give --val-images and --val-json")
    report(model, dataset, cfg, world, out)


def main(argv: list[str] | None = None) -> int | None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["evaluate"]:
        return evaluate_run(argv[1:])
    cfg = parse(Config, PRESETS, __doc__, argv)
    with Run("detect", cfg, cfg.iterations, facts={"description": cfg.described}) as run:
        categories = run.facts["categories"]
        detector = build(cfg, len(categories))
        if not run.checkpoint:
            run.say(transfer.start(detector.encoder, cfg))
        model, optimizer = run.place(detector), make_optimizer(cfg, detector)
        preview = partial(show, names=[name for _, name in categories])
        for step in run.steps(model, optimizer, evaluate, preview):
            for batch in step.micro_batches():  # rgb (B, 3, S, S), boxes (B, n, 4), see objects.py
                with run.autocast():
                    loss, logs = model(batch, step.progress)
                step.backward(loss, logs)
            step.update(learning_rate(cfg, step.number, run.total))
        if run.val_set is None:
            run.say(f"{cfg.data} has no val split: nothing is evaluated")
        elif run.lacks("result.json"):
            report(detector, run.val_set, cfg, run.world, run.out)


if __name__ == "__main__":
    engine.command("detect", main)
