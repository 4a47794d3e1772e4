"""A detector: an encoder, a neck that makes a pyramid of its maps, and Mask R-CNN's heads.

Neck        an encoder's maps to five of 256 channels: FPN, or ViTDet's simple pyramid
Detector    `model(batch, progress)`, `predict(rgb)`
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

import coma_dyvit
from common import IMAGENET_MEAN, IMAGENET_STD, Normalize
from downstream.mask_rcnn import RPN, RoI, norm, unpack
from downstream.upernet import levels
from downstream.windows import Windows, freeze_unseen, pyramid


class Neck(nn.Module):
    """Maps of an encoder to five of `dim` channels, each of twice the stride of the one before.

    Args:
        dims: channels of the encoder's maps.
        kind: "fpn" of maps as they are; "levels": FPN of a plain encoder's four, brought to four
            strides first (BEiT, CAE); "simple": of its last map alone, without a way down (ViTDet).
    """

    def __init__(self, dims: Sequence[int], kind: str, dim: int = 256):
        super().__init__()
        self.kind, self.scales = kind, None
        if kind != "fpn":
            self.scales, dims = levels(dims[-1], kind == "simple", norm)
        if kind == "simple":
            self.output = nn.ModuleList(
                nn.Sequential(
                    nn.Conv2d(d, dim, 1, bias=False), norm(dim),
                    nn.Conv2d(dim, dim, 3, padding=1, bias=False), norm(dim),
                ) for d in dims
            )  # fmt: skip
        else:
            self.fpn = FeaturePyramidNetwork(list(dims), dim, LastLevelMaxPool(), norm)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """(B, C_i, h_i, w_i), fine to coarse, four or, for "simple", one, to (B, dim, ...) five."""
        if self.scales is not None:
            maps = maps * len(self.scales) if len(maps) == 1 else maps
            maps = [scale(x) for scale, x in zip(self.scales, maps)]
        if self.kind != "simple":
            return list(self.fpn({str(i): x for i, x in enumerate(maps)}).values())
        maps = [f(x) for f, x in zip(self.output, maps)]
        return [*maps, F.max_pool2d(maps[-1], 1, 2)]


class Detector(nn.Module):
    """An encoder, a neck and Mask R-CNN's heads.

    Args:
        encoder: with the contract of the method scripts; its parameters that no map depends on
            (prefix tokens, the final norm) are frozen, as DDP waits for every gradient.
        classes: without the background.
        neck: of a plain encoder, "simple" or "levels", see Neck.
        windows: options of Windows: window, everywhere, shifted, bias. DyViT has its own.
        mean, std: (3,) each, of [0, 1] pixels, as the encoder expects them.
        dim, proposals, boxes: channels of neck and heads; boxes that the RPN keeps of an image, and
            that heads are trained on.
        anchor: side of the RPN's anchors, in strides.
    """

    def __init__(
        self, encoder: nn.Module, classes: int, neck: str = "simple", windows: dict | None = None,
        mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
        dim: int = 256, proposals: int = 1000, boxes: int = 512, anchor: float = 8,
    ):  # fmt: skip
        super().__init__()
        self.encoder, self.normalize, self.windows = encoder, Normalize(mean, std), None
        plain, p = len(set(encoder.strides)) == 1, encoder.patch_size
        self.kind = neck if plain else "fpn"
        if not isinstance(encoder, coma_dyvit.DyViT):
            self.windows = Windows(encoder.blocks, encoder.grid, **(windows or {}))
        dims = freeze_unseen(encoder, self.windows, self.kind == "simple")
        strides = [p / 4, p / 2, p, 2 * p] if plain else list(encoder.strides)
        self.neck = Neck(dims, self.kind, dim)
        self.rpn = RPN(dim, [*strides, 2 * strides[-1]], proposals, anchor)
        self.roi = RoI(dim, strides, classes, boxes)

    def maps(self, imgs: Tensor, seed: Tensor | None = None) -> list[Tensor]:
        """What the neck reads of normalised images (B, 3, H, W): maps (B, C, h, w)."""
        return pyramid(self.encoder, imgs, self.windows, seed, self.kind == "simple")

    def pyramid(self, rgb: Tensor, seed: Tensor | None = None) -> list[Tensor]:
        """Five maps of images (B, 3, H, W) uint8; `seed` (B,) turns drop path on."""
        return self.neck(self.maps(self.normalize(rgb), seed))

    def targets(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """A batch's objects image by image, see objects.collate; masks (n, H, W) float."""
        counts, width = (batch["labels"] > 0).sum(1).tolist(), batch["rgb"].shape[3]
        rows = zip(counts, batch["boxes"], batch["labels"], batch["masks"])
        return [
            {"boxes": b[:n], "labels": l[:n], "masks": unpack(m[:n], width)} for n, b, l, m in rows
        ]

    def losses(self, batch: dict[str, Tensor], seed: Tensor | None) -> dict[str, Tensor]:
        """The five losses; `seed` None: without drop path."""
        maps, targets = self.pyramid(batch["rgb"], seed), self.targets(batch)
        boxes, size = [t["boxes"] for t in targets], tuple(batch["rgb"].shape[2:])
        proposals, losses = self.rpn(maps, size, boxes, batch["seed"])
        return losses | self.roi.losses(maps, proposals, targets, batch["seed"])

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch (see objects.collate), and its five parts; `progress` changes nothing."""
        losses = self.losses(batch, batch["seed"])
        return sum(losses.values()), {k: v.detach() for k, v in losses.items()}

    @torch.no_grad()
    def predict(self, rgb: Tensor) -> list[dict[str, Tensor]]:
        """Objects in images (B, 3, H, W) uint8, in their pixels, as `RoI.detect`."""
        maps, size = self.pyramid(rgb), tuple(rgb.shape[2:])
        proposals, _ = self.rpn(maps, size)
        return self.roi.detect(maps, proposals, size)
