"""Mask R-CNN's heads (arXiv 1703.06870), from torchvision's parts.

    RPN, RoI    torchvision's, with losses and samples of our own
    paste       28 x 28 masks in boxes to masks of an image

torchvision's own forward passes draw which anchors and boxes are trained from the global random
generator, and average over all boxes of a batch. Here a draw depends on the sample's seed alone,
and a loss is a mean over a sample's boxes, then over samples: so ranks and micro-batches change
nothing. With one image a device, as ViTDet is trained, the two means are the same. Losses are those
of the public configurations: L1 for boxes, RoIAlign aligned, mask targets cut at one half.
"""

from collections.abc import Sequence
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import roi_align

from noise import uniform


ANCHORS, BOXES = 101, 102  # streams of noise, beside noise.STREAMS
norm = partial(LayerNorm2d, eps=1e-6)


def choose(labels: Tensor, noise: Tensor, count: int, fraction: float) -> Tensor:
    """Choose what is trained: (..., n) bool, at most `count` a row, `fraction` of them positive.

    Args:
        labels: (..., n), above 0 positive, 0 negative, below 0 left out.
        noise: (..., n), the order in which they are taken.
    """
    positive, negative = labels > 0, labels == 0
    most = torch.full_like(labels[..., :1], int(count * fraction), dtype=torch.int64)
    taken = first(positive, noise, most)
    return taken | first(negative, noise, count - taken.sum(-1, keepdim=True))


def first(among: Tensor, noise: Tensor, most: Tensor) -> Tensor:
    """The `most` (..., 1) of those that are `among` (..., n) bool with the smallest noise."""
    order = noise.masked_fill(~among, 2).argsort(dim=-1, stable=True)
    rank = torch.zeros_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return among & (rank < most)


class RPN(RegionProposalNetwork):
    """Proposes boxes; losses by sample.

    Two convolutions, one anchor size a level in three shapes; trained on 256 anchors a sample, at
    most half of them positive, IoU above 0.7 against below 0.3; non-maximum suppression at 0.7.

    Args:
        kept: boxes after suppression; before it as many a level in tests, twice that in training.
        side: of an anchor, in strides: 8, 32 at stride 4.
    """

    def __init__(self, dim: int, strides: Sequence[int], kept: int = 1000, side: float = 8):
        anchors = AnchorGenerator(tuple((side * s,) for s in strides), ((0.5, 1.0, 2.0),) * 5)
        super().__init__(
            anchors, RPNHead(dim, 3, conv_depth=2), 0.7, 0.3, 256, 0.5,
            {"training": 2 * kept, "testing": kept}, {"training": kept, "testing": kept}, 0.7,
        )  # fmt: skip
        self.strides = tuple(strides)

    def anchors(self, maps: list[Tensor]) -> Tensor:
        """(A, 4) in fp32, level by level."""
        self.anchor_generator.set_cell_anchors(torch.float32, maps[0].device)
        grids, steps = [x.shape[2:] for x in maps], [(s, s) for s in self.strides]
        return torch.cat(self.anchor_generator.grid_anchors(grids, steps))

    def forward(
        self, maps: list[Tensor], size: tuple[int, int], boxes: list[Tensor] | None = None,
        seed: Tensor | None = None,
    ) -> tuple[list[Tensor], dict[str, Tensor]]:  # fmt: skip
        """Propose boxes in images of `size` (H, W); with true boxes (n, 4) and seeds, the losses.

        Returns: boxes (k, 4) of each image, the best first; losses.
        """
        scores, deltas = self.head(maps)
        counts, anchors, B = [x[0].numel() for x in scores], self.anchors(maps), len(maps[0])
        scores, deltas = concat_box_prediction_layers(scores, deltas)
        scores, deltas = scores.float().view(B, -1), deltas.float()
        with torch.autocast(deltas.device.type, enabled=False):
            found = self.box_coder.decode(deltas.detach(), [anchors] * B).view(B, -1, 4)
            proposals, _ = self.filter_proposals(found, scores, [size] * B, counts)
            if boxes is None:
                return proposals, {}
            true = [{"boxes": b} for b in boxes]
            labels, matched = self.assign_targets_to_anchors([anchors] * B, true)
            labels, noise = torch.stack(labels), uniform(seed, len(anchors), ANCHORS)
            chosen = choose(labels, noise, 256, 0.5)  # (B, A)
            share = chosen / chosen.sum(1, keepdim=True).clamp(min=1) / B
            error = F.binary_cross_entropy_with_logits(
                scores, labels.clamp(min=0), reduction="none"
            )
            positive, every = (labels > 0).flatten(), anchors.repeat(B, 1)
            shift = distance(self.box_coder, deltas, torch.cat(matched), every, positive)
            losses = {"loss_objectness": (error * share).sum()}
            return proposals, losses | {"loss_proposals": (shift * share.flatten()).sum()}


def distance(
    coder: BoxCoder, deltas: Tensor, true: Tensor, boxes: Tensor, positive: Tensor
) -> Tensor:
    """L1 distance of deltas (n, 4) from those that move boxes to the true ones; (n,), 0 where not
    `positive`. All rows are computed: to pick some, the host would wait for the device to count.
    """
    wanted = coder.encode_single(true.where(positive[:, None], boxes), boxes)
    return (deltas - wanted).abs().sum(1) * positive


def regions(boxes: list[Tensor]) -> Tensor:
    """Boxes (n, 4) of each image as roi_align takes them: (R, 5), the image's number first."""
    index = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    return torch.cat([torch.cat(index), torch.cat(boxes)], dim=1)


def pool(maps: list[Tensor], strides: Sequence[int], rois: Tensor, size: int) -> Tensor:
    """RoIAlign of boxes (R, 5), each from the map that fits its size: (R, C, size, size) float32.

    A box of 14 strides' side, and up to twice that, belongs to a map: FPN's 224 at stride 16.
    """
    side = ((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2])).clamp(min=0).sqrt()
    level = (side / (14 * strides[0])).clamp(min=1e-6).log2().add(1e-6).floor()
    level = level.clamp(0, len(maps) - 1)
    out = maps[0].new_zeros(len(rois), maps[0].shape[1], size, size, dtype=torch.float32)
    for i, (x, stride) in enumerate(zip(maps, strides)):
        (at,) = (level == i).nonzero(as_tuple=True)
        found = roi_align(x.float(), rois[at], size, 1 / stride, aligned=True)
        out = out.index_copy(0, at, found)
    return out


class RoI(RoIHeads):
    """Classifies boxes, moves them and cuts their objects out; losses by sample.

    Four convolutions and a layer of 4 x `dim` for boxes, four convolutions and one of twice the
    size for masks. Trained on `trained` boxes a sample, the true ones among them, at most a quarter
    positive (IoU from 0.5); tested with scores above 0.05, suppression at 0.5, 100 boxes an image.
    """

    def __init__(self, dim: int, strides: Sequence[int], classes: int, trained: int = 512):
        super().__init__(
            None, FastRCNNConvFCHead((dim, 7, 7), [dim] * 4, [4 * dim], norm),
            FastRCNNPredictor(4 * dim, classes + 1), 0.5, 0.5, trained, 0.25,
            (10.0, 10.0, 5.0, 5.0), 0.05, 0.5, 100,
            None, MaskRCNNHeads(dim, [dim] * 4, 1, norm), MaskRCNNPredictor(dim, dim, classes + 1),
        )  # fmt: skip
        self.strides, self.trained = tuple(strides), trained
        fc = next(m for m in self.box_head if isinstance(m, nn.Linear))
        nn.init.kaiming_uniform_(fc.weight, a=1)  # detectron2's first weights, here and below
        nn.init.zeros_(fc.bias)
        for layer, std in (
            (self.box_predictor.cls_score, 0.01),
            (self.box_predictor.bbox_pred, 0.001),
            (self.mask_predictor.mask_fcn_logits, 0.001),
        ):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def pooled(self, maps: list[Tensor], rois: Tensor, size: int) -> Tensor:
        return pool(maps[:4], self.strides, rois, size)

    def classify(self, maps: list[Tensor], rois: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (R, 1 + classes) and deltas (R, 4 (1 + classes)) in fp32; class 0 is none.

        Args: `rois`: boxes of all images, as `regions` has them.
        """
        found = self.box_predictor(self.box_head(self.pooled(maps, rois, 7)))
        return tuple(x.float() for x in found)

    def cut(self, maps: list[Tensor], rois: Tensor, labels: Tensor) -> Tensor:
        """Mask logits (R, 28, 28) of boxes of such classes, in fp32."""
        x = self.mask_predictor(self.mask_head(self.pooled(maps, rois, 14)))
        return x[torch.arange(len(x), device=x.device), labels].float()

    def sample(
        self, proposals: list[Tensor], targets: list[dict[str, Tensor]], seed: Tensor
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Boxes to train on (n, 4) of each image, their classes (n,), and whose they are (n,)."""
        true = [t["boxes"] for t in targets]
        proposals = self.add_gt_proposals(proposals, true)
        matched, labels = self.assign_targets_to_proposals(
            proposals, true, [t["labels"] for t in targets]
        )
        boxes, classes, whose = [], [], []
        for box, label, match, s in zip(proposals, labels, matched, seed):
            noise = uniform(s[None], len(box), BOXES)[0]
            (at,) = choose(label, noise, self.trained, 0.25).nonzero(as_tuple=True)
            boxes, classes, whose = [*boxes, box[at]], [*classes, label[at]], [*whose, match[at]]
        return boxes, classes, whose

    def losses(
        self, maps: list[Tensor], proposals: list[Tensor], targets: list[dict[str, Tensor]],
        seed: Tensor,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Losses of classes, boxes and masks.

        Args: `targets`: boxes (n, 4), labels (n,) from 1, masks (n, H, W) float of each image.
        """
        boxes, labels, whose = self.sample(proposals, targets, seed)
        counts = [0, *accumulate(len(t["boxes"]) for t in targets)]
        whose = torch.cat([i + first for i, first in zip(whose, counts)])  # of all images' objects
        rois, label, share = regions(boxes), torch.cat(labels), shares(labels)
        logits, deltas = self.classify(maps, rois)
        with torch.autocast(logits.device.type, enabled=False):
            error, box = F.cross_entropy(logits, label, reduction="none"), rois[:, 1:]
            true = torch.cat([t["boxes"] for t in targets] if counts[-1] else boxes)
            true = true[whose.clamp(max=len(true) - 1)]  # an image without objects has none
            moved = deltas.view(len(deltas), -1, 4)[
                torch.arange(len(box), device=box.device), label
            ]
            shift = distance(self.box_coder, moved, true, box, label > 0)
            losses = {"loss_class": (error * share).sum(), "loss_box": (shift * share).sum()}
        (at,) = (label > 0).nonzero(as_tuple=True)
        pred = self.cut(maps, rois[at], label[at])
        with torch.autocast(logits.device.type, enabled=False):
            wanted = crops(torch.cat([t["masks"] for t in targets]), box[at], whose[at])
            error = F.binary_cross_entropy_with_logits(pred, wanted, reduction="none")
            positive = torch.stack([(x > 0).sum() for x in labels])[rois[at, 0].long()]
            error = error.mean((1, 2)) / positive / len(labels)
            return losses | {"loss_mask": error.sum()}

    @torch.no_grad()
    def detect(
        self, maps: list[Tensor], proposals: list[Tensor], size: tuple[int, int]
    ) -> list[dict[str, Tensor]]:
        """Objects of each image: boxes (n, 4), labels (n,) from 1, scores (n,), masks (n, 28, 28),
        probabilities inside the boxes; the best first.
        """
        logits, deltas = self.classify(maps, regions(proposals))
        with torch.autocast(logits.device.type, enabled=False):
            found = self.postprocess_detections(logits, deltas, proposals, [size] * len(proposals))
        boxes, scores, labels = found
        masks = self.cut(maps, regions(boxes), torch.cat(labels)).sigmoid()
        masks = masks.split([len(b) for b in boxes])
        rows = zip(boxes, labels, scores, masks)
        return [dict(zip(("boxes", "labels", "scores", "masks"), row)) for row in rows]


def shares(rows: list[Tensor]) -> Tensor:
    """What each row of each sample counts for in a mean over rows, then over samples: (R,)."""
    weights = [
        torch.full_like(x, 1 / max(len(x), 1) / len(rows), dtype=torch.float32) for x in rows
    ]
    return torch.cat(weights)


def crops(masks: Tensor, boxes: Tensor, whose: Tensor, size: int = 28) -> Tensor:
    """Masks (n, H, W) float inside boxes (k, 4), those of `whose` (k,): (k, size, size), 0 or 1."""
    if not len(boxes):
        return boxes.new_zeros(0, size, size)
    rois = torch.cat([whose[:, None].to(boxes.dtype), boxes], dim=1)
    return (roi_align(masks[:, None], rois, size, aligned=True)[:, 0] >= 0.5).float()


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks (n, s, s), probabilities inside boxes (n, 4), to masks (n, H, W) bool of an image.

    A pixel takes the probability at its middle, bilinear, as in detectron2.
    """
    out = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    y, x = (torch.arange(n, device=masks.device) + 0.5 for n in size)
    for i in range(0, len(masks), 16):  # a bound on memory
        m, (x0, y0, x1, y1) = masks[i : i + 16], boxes[i : i + 16].T[..., None]
        at_y, at_x = 2 * (y - y0) / (y1 - y0) - 1, 2 * (x - x0) / (x1 - x0) - 1
        shape = len(m), *size
        grid = torch.stack([at_x[:, None].expand(shape), at_y[:, :, None].expand(shape)], dim=3)
        out[i : i + 16] = F.grid_sample(m[:, None], grid, align_corners=False)[:, 0] >= 0.5
    return out


def unpack(masks: Tensor, width: int) -> Tensor:
    """Masks (n, H, W / 8) uint8 of eight pixels a byte, as numpy's packbits, to (n, H, W) float."""
    bits = torch.arange(7, -1, -1, device=masks.device, dtype=torch.uint8)
    return (masks[..., None] >> bits & 1).flatten(2)[..., :width].float()
