"""The recipe `panoptic`: both maps from one panoptic model, Mask2Former trained on COCO.

Its 133 classes are 80 things, then 53 stuff, as CFMAE's App. B counts them. Models come from a
local folder or by name through transformers' Auto classes.

    load         a model and its processor, or one line that says what to get
    segment      queries to segments: Mask2Former's panoptic inference
    Panoptic     images to maps
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import engine
from data import UNLABELLED, UserError, nearest

SURE = 0.8  # least score of a query, OBJECT_MASK_THRESHOLD of Mask2Former's COCO configuration
WHOLE = 0.8  # share of its own mask that a query must win, OVERLAP_THRESHOLD there
LARGEST = 640  # longest side on which segments compete; beyond, maps are enlarged


def load(kind: str, processor: str, name: str, flag: str) -> tuple[nn.Module, object]:
    """Load a model and its processor with transformers.

    Args: `kind`, `processor`, Auto classes; `name`, a folder or a name; `flag`, for errors.
    Errors: UserError where the package, the files or some weights are not there.
    """
    try:
        import transformers
    except ImportError:
        words = "pip install transformers, which has these models; --recipe regions needs none"
        raise UserError(f"{flag}: {words}") from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        tool = getattr(transformers, processor).from_pretrained(name)
        auto = getattr(transformers, kind)
        model, info = auto.from_pretrained(name, output_loading_info=True)
    except Exception as error:  # what it raises depends on the file that is missing or broken
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{flag} {name}: {line} - it takes a folder with the model's configuration, processor "
            f"and weights, as `hf download NAME --local-dir FOLDER` leaves them, for {kind}"
        ) from None
    if absent := sorted(info["missing_keys"]):  # transformers would draw them at random
        raise UserError(f"{flag} {name}: no weights for {len(absent)} tensors, e.g. {absent[0]}")
    return model.eval().requires_grad_(False), tool


class Input(NamedTuple):
    """What a model sees of an image: pixels (3, h, w), of which `seen` (h, w) are not padding."""

    pixels: Tensor
    seen: tuple[int, int]
    size: tuple[int, int]  # of the image itself


def prepare(processor: object, rgb: Tensor, name: str = "") -> Input:
    """Resize and normalise an image (3, H, W) uint8 as a model's own processor does."""
    made = processor(images=rgb, return_tensors="pt")
    pixels = made["pixel_values"][0]
    mask = made["pixel_mask"][0] if "pixel_mask" in made else torch.ones_like(pixels[0])
    seen = int(mask[:, 0].sum()), int(mask[0].sum())
    return Input(pixels, seen, tuple(rgb.shape[1:]))


def by_shape(tensors: Iterable[Tensor]) -> list[list[int]]:
    """Positions of tensors of one shape each: they are stacked, so no image is ever padded."""
    groups = {}
    for i, x in enumerate(tensors):
        groups.setdefault(tuple(x.shape), []).append(i)
    return list(groups.values())


def segment(classes: Tensor, masks: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Let queries compete for pixels, as Mask2Former's panoptic inference does.

    Transformers' own post-processing has loops over queries, and its numbers of segments collide
    where classes are fused.

    Args:
        classes: (Q, C + 1) logits, the last of no object.
        masks: (Q, h, w) logits.
        size: (H, W) wanted.
    Returns: (H, W) int64, the segment of each pixel, -1 for none; (n,) int64, segments' classes.
    """
    scores, labels = classes.softmax(-1).max(-1)
    kept = (labels < classes.shape[-1] - 1) & (scores > SURE)
    scores, labels = scores[kept], labels[kept]
    if not len(labels):
        return classes.new_full(size, -1, dtype=torch.long), labels
    inside = F.interpolate(masks[kept][None], size, mode="bilinear")[0].sigmoid()  # (n, H, W)
    owner = (scores[:, None, None] * inside).argmax(0)
    sure = inside >= 0.5
    won = owner.flatten().bincount(minlength=len(labels))
    real = won > WHOLE * sure.flatten(1).sum(1)
    own = sure.gather(0, owner[None])[0] & real[owner]
    return owner.where(own, -1), labels


def tables(owner: Tensor, labels: Tensor, things: int) -> tuple[np.ndarray, np.ndarray]:
    """Segments to (instance, semantic) (H, W) uint8; no segment is unlabelled in both."""
    owner, labels = owner.cpu().numpy(), labels.cpu().numpy()
    area = np.bincount(owner.ravel() + 1, minlength=len(labels) + 1)[1:]
    instance = np.zeros(len(labels) + 1, np.uint8)  # the last is read by -1
    objects = [i for i in np.argsort(-area, kind="stable") if labels[i] < things and area[i]]
    instance[objects] = np.minimum(np.arange(1, len(objects) + 1), UNLABELLED)
    instance[-1] = UNLABELLED
    return instance[owner], np.append(labels, UNLABELLED).astype(np.uint8)[owner]


class Panoptic:
    """A panoptic model that gives both maps.

    Args:
        model: folder or name.
        things: classes with a smaller id are things, which have instances.
        world: device and precision.
    """

    def __init__(self, model: str, things: int, world: engine.World):
        flag = "--panoptic-model"
        self.model, processor = load(
            "AutoModelForUniversalSegmentation", "AutoImageProcessor", model, flag
        )
        if (n := self.model.config.num_labels) > UNLABELLED:
            raise UserError(f"{flag} {model} has {n} classes; a map holds {UNLABELLED}")
        self.model.to(world.device)
        self.things, self.world = things, world
        self.names = [self.model.config.id2label[i] for i in range(n)]
        self.prepare = functools.partial(prepare, processor)  # for loader processes: no model

    @torch.no_grad()
    def label(self, inputs: list[Input]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(instance, semantic) uint8 maps of each image."""
        found = [None] * len(inputs)
        for group in by_shape(x.pixels for x in inputs):
            pixels = torch.stack([inputs[i].pixels for i in group]).to(self.world.device)
            with self.world.autocast():
                out = self.model(pixel_values=pixels)
            classes, masks = out.class_queries_logits.float(), out.masks_queries_logits.float()
            for i, c, m in zip(group, classes, masks):
                found[i] = self.maps(inputs[i], c, m)
        return found

    def maps(self, x: Input, classes: Tensor, masks: Tensor) -> tuple[np.ndarray, np.ndarray]:
        h, w = (round(n * s / p) for n, s, p in zip(masks.shape[1:], x.seen, x.pixels.shape[1:]))
        share = min(1.0, LARGEST / max(x.size))
        size = tuple(max(round(n * share), 1) for n in x.size)
        owner, labels = segment(classes, masks[:, :h, :w], size)
        rows, columns = (nearest(0, n, N) for n, N in zip(size, x.size))
        return tuple(ids[rows[:, None], columns] for ids in tables(owner, labels, self.things))
