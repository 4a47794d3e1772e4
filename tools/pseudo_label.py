"""Instance and semantic maps from photographs, as CFMAE trains on them.

    python -m tools.pseudo_label ROOT [--output OUT] --recipe regions
    torchrun --nproc_per_node=8 -m tools.pseudo_label ROOT [--output OUT] --recipe panoptic
    python -m tools.pseudo_label ROOT --convert             existing maps, rewritten to decode fast
    python -m tools.pseudo_label ROOT --compare TRUTH       scores of ROOT's maps by TRUTH's

    recipe     how                                                    needs
    panoptic   one panoptic model (Mask2Former) gives both maps       transformers, its weights
    paper      CFMAE App. B: category names -> boxes (Grounding       transformers, weights of
               DINO) -> masks (HQ-SAM); semantics by Mask2Former      three models
    regions    Felzenszwalb's regions, and k-means clusters of them   scikit-image

ROOT has {train,val}/rgb, and maps are written beside it. Where it has none (ImageNet as it is
unpacked, or a bare folder of photographs), or to leave ROOT alone, name another folder, --output:
its {train,val}/rgb become links to the images, and the scripts read it with --data OUT.

The work is split over torchrun's ranks, which share nothing but the folder. Maps that are there are
skipped, so the same command continues what was stopped. An image that cannot be decoded is listed
in OUT/{train,val}/unreadable.txt and gets maps of one unlabelled pixel; training puts others in the
place of such images. docs/data.md has the whole way, with rates and scores.
"""

import argparse
import io
import os
import time

import engine  # before torch: it sets how threads wait

import numpy as np
import torch
import torch.distributed as dist

from data import Unreadable
from engine import UserError
from tools import grounded, map_files, map_scores, regions
from tools.labelling import Labeller, Signals, Split, Stopped, open_splits, place
from tools.panoptic import Panoptic

SETTINGS = {  # flags that are part of a recipe's result
    "panoptic": ("panoptic_model", "things"),
    "paper": ("panoptic_model", "things", "boxes_model", "masks_model", "class_names"),
    "regions": ("clusters", "cluster_images"),
}


class Regions:
    """Regions and clusters; all the work is done in the loader processes."""

    def __init__(self, book: np.ndarray):
        self.book = book

    def prepare(self, rgb: torch.Tensor, name: str) -> tuple[np.ndarray, np.ndarray]:
        return regions.maps(self.book, rgb)

    def label(self, prepared: list) -> list:
        return prepared


def region_features(rgb: torch.Tensor, name: str) -> np.ndarray:
    return regions.describe(rgb)[1]


def clusters(labeller: Labeller, split: Split, out: str, args: argparse.Namespace) -> np.ndarray:
    """The clusters of a folder: found once by rank 0, from images spread evenly over a split."""
    path = f"{out}/regions.npy"
    if labeller.world.rank == 0 and not os.path.exists(path):
        count = min(args.cluster_images, len(split.files))
        picks = np.linspace(0, len(split.files) - 1, count).astype(int)
        found = [
            features
            for batch in labeller.batches(split, picks, region_features)
            for _, features in batch
            if not isinstance(features, Unreadable)
        ]
        if not found:
            raise UserError(f"none of {count} images in {split.images} can be read")
        np.save(file := io.BytesIO(), regions.learn(np.concatenate(found), args.clusters))
        map_files.write(path, file.getvalue())
    while not os.path.exists(path):  # rank 0 is at it; should it fail, torchrun ends all ranks
        time.sleep(0.2)
    return np.load(path)


def open_recipe(world: engine.World, splits: list[Split], args: argparse.Namespace):
    """Load what a recipe needs: an object with `prepare` and `label`, see labelling.py. None of
    regions, whose clusters are found in the images.
    """
    if args.recipe == "regions":
        return regions.require()
    panoptic = Panoptic(args.panoptic_model, args.things, world)
    if args.recipe == "panoptic":
        return panoptic
    texts = grounded.prompts(splits[0].files.classes, args.class_names)
    recipe = grounded.Grounded(panoptic, args.boxes_model, args.masks_model, texts, world)
    if world.rank == 0:
        shown = f", e.g. {next(iter(texts.values()))!r}" if texts else ""
        print(f"prompts: names of {len(texts)} class folders{shown}; else {recipe.default!r}")
    return recipe


def parser() -> argparse.ArgumentParser:
    top = engine.Parser(
        prog="python -m tools.pseudo_label", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = top.add_argument
    add("root", help="the folder that holds train/ and val/")
    add("--output", help="where the maps go; default: ROOT")
    add("--recipe", default="panoptic", choices=list(SETTINGS), help="see above (panoptic)")
    add("--convert", action="store_true", help="rewrite ROOT's maps with palettes, same ids")
    add("--compare", metavar="TRUTH", help="a folder with maps of the same images")
    add("--batch-size", type=int, default=16, help="images that models see at a time (16)")
    add("--workers", type=int, help="loader processes a rank; default: its cores, at most 16")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"])
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    mask2former = "facebook/mask2former-swin-large-coco-panoptic"
    add("--panoptic-model", default=mask2former, help=f"folder or name ({mask2former})")
    add("--things", type=int, default=80, help="its classes below this id have instances (80)")
    add("--boxes-model", default=(name := "IDEA-Research/grounding-dino-base"), help=f"({name})")
    add("--masks-model", default=(name := "syscv-community/sam-hq-vit-huge"), help=f"({name})")
    add("--class-names", help="lines FOLDER name[, synonym ...]; ImageNet's are known")
    add("--clusters", type=int, default=133, help="semantic classes of regions (133, as COCO)")
    add("--cluster-images", type=int, default=10000, help="that clusters are found from (10000)")
    return top


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 128 + its number after a signal."""
    args = parser().parse_args(argv)
    if args.convert:
        return map_files.convert(args.root)
    if args.compare:
        return map_scores.compare(args.root, args.compare)
    if not 1 <= args.clusters <= 255 or min(args.batch_size, args.cluster_images) < 1:
        raise UserError("--clusters takes 1 to 255, --batch-size and --cluster-images at least 1")
    world = engine.World(args.device, args.precision)
    if dist.is_initialized():  # a rank may end hours before another, and owes it nothing
        dist.destroy_process_group()
    out, splits = os.path.abspath(args.output or args.root), open_splits(args.root, args.output)
    settings = {k: getattr(args, k) for k in ("recipe", *SETTINGS[args.recipe])}
    recipe = open_recipe(world, splits, args)  # before OUT remembers what cannot be opened
    place(out, splits, settings, world.rank == 0)
    with Signals() as signals:
        labeller = Labeller(world, signals, args.batch_size, args.workers)
        try:
            recipe = recipe or Regions(clusters(labeller, splits[0], out, args))
            for split in splits:
                labeller.run(split, recipe)
        except Stopped as stop:
            print("stopped; the same command continues", flush=True)
            return 128 + stop.args[0]
    return 0


if __name__ == "__main__":
    engine.command("pseudo_label", main)
