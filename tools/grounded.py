"""The recipe `paper`: how CFMAE's authors made their maps (App. B), as far as they say.

Instances: category names are the prompt of an open-vocabulary detector (Grounding DINO), whose
boxes are the prompts of a segmenter (HQ-SAM). "Starting with a high confidence threshold", it is
lowered for images where nothing is found. Semantics: a model of COCO's 133 classes; theirs is
SEEM, which transformers does not have, ours the recipe `panoptic`'s.

    prompts     category names of class folders
    boxes       scores and boxes of the detector's queries -> those to segment
    paint       masks -> instance map
    Grounded    images to maps
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import engine  # before torch: it sets how threads wait

import numpy as np
import torch
from torch import Tensor

from data import UNLABELLED, UserError
from tools.panoptic import Input, Panoptic, by_shape, load, prepare

# NOTE paper unclear: confidence thresholds. App. B has no numbers; these are ours.
THRESHOLDS = (0.5, 0.4, 0.35, 0.3, 0.25)
OVERLAP = 0.8  # boxes that overlap more are one: a query of the detector may repeat another
MOST = 32  # boxes an image; CFMAE keeps the 16 largest instances of a crop
WNID = re.compile(r"n\d{8}")


def read_names(path: str) -> dict[str, str]:
    """Category names by class folder, from lines of "FOLDER name, synonym, ...": the first name."""
    try:
        with open(path, encoding="utf-8") as file:
            rows = [line.split(None, 1) for line in file if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class-names {path}: {error}") from None
    if any(len(row) < 2 for row in rows):
        raise UserError(f"--class-names {path}: every line is FOLDER name[, synonym ...]")
    return {folder: names.split(",")[0].strip() for folder, names in rows}


def prompts(classes: list[str], path: str | None) -> dict[str, str]:
    """The prompt of each class folder that has a category name.

    Names come from a file; for ImageNet's 1000 folders from torchvision; else the folder's own name
    is one, unless it is a WordNet id.
    """
    names = read_names(path) if path else {}
    wnids = [c for c in classes if WNID.fullmatch(c)]
    if not names and len(wnids) == 1000:
        from torchvision.models import ResNet50_Weights

        names = dict(zip(sorted(wnids), ResNet50_Weights.DEFAULT.meta["categories"]))
    names = {c: c.replace("_", " ") for c in classes if c not in wnids} | names
    return {c: names[c].replace(".", "").lower() + "." for c in classes if c in names}


def boxes(scores: Tensor, corners: Tensor) -> Tensor:
    """Choose boxes: the highest threshold that leaves any, without repetitions.

    Args:
        scores: (Q,) in [0, 1].
        corners: (Q, 4), left, top, right, bottom.
    Returns: (n,) indices, n at most MOST, 0 where all scores are below the lowest threshold.
    """
    from torchvision.ops import nms

    best = float(scores.max()) if len(scores) else 0.0
    level = next((t for t in THRESHOLDS if best > t), 1.0)
    kept = (scores > level).nonzero()[:, 0]
    return kept[nms(corners[kept], scores[kept], OVERLAP)][:MOST]


def paint(masks: np.ndarray) -> np.ndarray:
    """Masks (n, H, W) bool to ids (H, W) uint8, 1 the largest; smaller ones lie on top."""
    area, ids = masks.sum((1, 2)), np.zeros(masks.shape[1:], np.uint8)
    order = [i for i in np.argsort(-area, kind="stable") if area[i]]
    for number, i in enumerate(order[: UNLABELLED - 1], 1):
        ids[masks[i]] = number
    return ids


class Inputs(NamedTuple):
    """An image as the three models see it, and its prompt."""

    panoptic: Input
    detector: Input
    segmenter: dict[str, Tensor]  # pixel_values, original_sizes, reshaped_input_sizes
    prompt: str


def prepare_all(
    panoptic: Callable, detector: object, segmenter: object, texts: dict, default: str,
    rgb: Tensor, name: str,
) -> Inputs:  # fmt: skip
    prompt = texts.get(name.partition("/")[0], default) if "/" in name else default
    made = segmenter(images=rgb, return_tensors="pt")
    return Inputs(panoptic(rgb), prepare(detector, rgb), {k: made[k][0] for k in made}, prompt)


class Grounded:
    """Three models: boxes by words, masks by boxes, and classes of all pixels.

    Args:
        panoptic: for semantics, and the names of its things, the prompt of images without any.
        boxes, masks: folders or names of the detector and of the segmenter.
        texts: prompts by class folder.
    """

    def __init__(
        self, panoptic: Panoptic, boxes: str, masks: str, texts: dict, world: engine.World
    ):
        self.panoptic, self.world = panoptic, world
        self.detector, reader = load(
            "AutoModelForZeroShotObjectDetection", "AutoProcessor", boxes, "--boxes-model"
        )
        self.segmenter, self.painter = load(
            "AutoModelForMaskGeneration", "AutoProcessor", masks, "--masks-model"
        )
        self.detector.to(world.device)
        self.segmenter.to(world.device)
        self.tokenizer = reader.tokenizer
        processors = reader.image_processor, self.painter.image_processor
        self.default = self.all_things()
        self.prepare = functools.partial(
            prepare_all, panoptic.prepare, *processors, texts, self.default
        )

    def all_things(self) -> str:
        """The prompt of an image without a category name: things, as many as the detector reads."""
        names = [f"{name.lower()}." for name in self.panoptic.names[: self.panoptic.things]]
        while len(self.tokenizer(" ".join(names)).input_ids) > self.detector.config.max_text_len:
            names.pop()
        return " ".join(names)

    @torch.no_grad()
    def label(self, inputs: list[Inputs]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(instance, semantic) uint8 maps of each image."""
        semantic = [maps[1] for maps in self.panoptic.label([x.panoptic for x in inputs])]
        found = [None] * len(inputs)
        for group in by_shape(x.detector.pixels for x in inputs):
            for i, corners in zip(group, self.detect([inputs[i] for i in group])):
                found[i] = corners
        return list(zip(self.segment(inputs, found), semantic))

    def detect(self, inputs: list[Inputs]) -> list[Tensor]:
        """Boxes (n, 4) of each image, left, top, right, bottom as shares of its sides."""
        most = self.detector.config.max_text_len
        options = {"padding": True, "truncation": True, "max_length": most, "return_tensors": "pt"}
        text = self.tokenizer([x.prompt for x in inputs], **options)
        pixels = torch.stack([x.detector.pixels for x in inputs])
        given = {k: v.to(self.world.device) for k, v in {"pixel_values": pixels, **text}.items()}
        with self.world.autocast():
            out = self.detector(**given)
        scores = out.logits.float().sigmoid().amax(-1)  # (B, Q), over words
        x, y, w, h = out.pred_boxes.float().unbind(-1)
        corners = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).clamp(0, 1)
        return [c[boxes(s, c)] for s, c in zip(scores, corners)]

    def segment(self, inputs: list[Inputs], found: list[Tensor]) -> list[np.ndarray]:
        """Instance maps from boxes; those of an image are filled up to the most of the batch."""
        maps = [np.zeros(x.panoptic.size, np.uint8) for x in inputs]
        some = [i for i, corners in enumerate(found) if len(corners)]
        if not some:
            return maps
        most = max(len(found[i]) for i in some)
        sides = [inputs[i].segmenter["reshaped_input_sizes"].flip(0).repeat(2) for i in some]
        corners = [
            found[i][torch.arange(most).clamp(max=len(found[i]) - 1)] * side.to(found[i])
            for i, side in zip(some, sides)
        ]
        pixels = torch.stack([inputs[i].segmenter["pixel_values"] for i in some])
        with self.world.autocast():
            out = self.segmenter(
                pixel_values=pixels.to(self.world.device), input_boxes=torch.stack(corners),
                multimask_output=False,
            )  # fmt: skip
        for i, logits in zip(some, out.pred_masks.float()):  # (most, 1, h, w)
            sizes = (
                inputs[i].segmenter[k][None] for k in ("original_sizes", "reshaped_input_sizes")
            )
            (masks,) = self.painter.post_process_masks([logits[: len(found[i])]], *sizes)
            maps[i] = paint(masks[:, 0].cpu().numpy())
        return maps
