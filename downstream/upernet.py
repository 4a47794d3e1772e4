"""Networks that turn an encoder's features into a label for every pixel.

    Neck, PSP, UperNet         UperNet (arXiv 1807.10221) on an encoder's four-level pyramid
    Probe                      a 1x1 convolution on one frozen layer
    Segmenter                  encoder, head and loss: `model(batch, progress)`

None of our four papers describes UperNet. MCMAE's Table 3 counts 163 M parameters with a plain
ViT-B and 153 M with MCMAE-B; 768 channels give 162.50 and 153.54, 512 would give 126.87 and 118.14.
What no paper gives is as in the public configurations of SemanticMIM and ConvMAE, which are
mmsegmentation's: 256 channels and weight 0.4 in the auxiliary head, dropout 0.1 before the
classifiers, the neck, first weights, the loss's mean over all pixels.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from common import IMAGENET_MEAN, IMAGENET_STD, Normalize
from data import UNLABELLED
from downstream.windows import Windows, freeze_unseen, pyramid
from noise import DROPOUT, uniform

POOL_SCALES = (1, 2, 3, 6)  # cells a side of the pyramid pooling
AUX_LEVEL = 2  # the pyramid's third map, stride 16
conv = Conv2dNormActivation  # in, out, kernel size; it keeps the map's size; BatchNorm, ReLU


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize of maps (B, C, h, w)."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


def pool(x: Tensor, cells: int) -> Tensor:
    """Mean of each of `cells` x `cells` windows that cover a map, (B, C, h, w) to (B, C, s, s).

    Window i of n pixels spans floor(i n / s) to ceil((i + 1) n / s): adaptive average pooling, as
    two matrix products in fp32, whose gradient is deterministic on CUDA.
    """

    def means(n: int) -> Tensor:  # (s, n), rows sum to one
        i, at = torch.arange(cells, device=x.device)[:, None], torch.arange(n, device=x.device)
        inside = (at >= i * n // cells) & (at < ((i + 1) * n + cells - 1) // cells)
        return inside / inside.sum(1, keepdim=True)

    with torch.autocast(x.device.type, enabled=False):
        return means(x.shape[2]) @ x.float() @ means(x.shape[3]).T


def levels(
    dim: int, narrow: bool, norm: Callable[[int], nn.Module]
) -> tuple[nn.ModuleList, list[int]]:
    """A plain encoder's map at a quarter, a half, the same and twice its stride; their channels.

    `narrow`: finer ones have fewer channels, as ViTDet; else all have the same, as BEiT and CAE.
    """
    half, quarter = (dim // 2, dim // 4) if narrow else (dim, dim)
    up = partial(nn.ConvTranspose2d, kernel_size=2, stride=2)
    twice = nn.Sequential(up(dim, half), norm(half), nn.GELU(), up(half, quarter))
    scales = [twice, up(dim, half), nn.Identity(), nn.MaxPool2d(2)]
    return nn.ModuleList(scales), [quarter, half, dim, dim]


class Neck(nn.Module):
    """Rescale a plain ViT's four maps, all of stride s, to strides s/4, s/2, s and 2s."""

    def __init__(self, dim: int):
        super().__init__()
        self.scales, _ = levels(dim, False, nn.BatchNorm2d)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [scale(x) for scale, x in zip(self.scales, maps)]


class PSP(nn.Module):
    """Pyramid pooling: a map beside its own means over 1, 4, 9 and 36 windows, then fused."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.convs = nn.ModuleList(conv(in_dim, dim, 1) for _ in POOL_SCALES)
        self.bottleneck = conv(in_dim + len(POOL_SCALES) * dim, dim, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, D, h, w)."""
        pooled = [f(pool(x, s)) for s, f in zip(POOL_SCALES, self.convs)]
        return self.bottleneck(torch.cat([x, *(resize(p, x.shape[2:]) for p in pooled)], dim=1))


class UperNet(nn.Module):
    """Feature pyramid network over four maps, with pyramid pooling on the deepest.

    Args:
        dims: channels of the four maps.
        plain: whether all have the same stride and need the neck.
        classes: of the label maps.
        dim, aux_dim: channels inside, of the auxiliary head; dropout: share of channels.
    """

    def __init__(
        self,
        dims: Sequence[int],
        plain: bool,
        classes: int,
        dim: int = 768,
        aux_dim: int = 256,
        dropout: float = 0.1,
    ):
        super().__init__()
        self.dropout = dropout
        self.neck = Neck(dims[0]) if plain else nn.Identity()
        self.psp = PSP(dims[3], dim)
        self.lateral = nn.ModuleList(conv(d, dim, 1) for d in dims[:3])
        self.output = nn.ModuleList(conv(dim, dim, 3) for _ in range(3))
        self.fuse = conv(4 * dim, dim, 3)
        self.classifier = nn.Conv2d(dim, classes, 1)
        self.aux_conv = conv(dims[AUX_LEVEL], aux_dim, 3)  # the auxiliary head, an FCN
        self.aux_classifier = nn.Conv2d(aux_dim, classes, 1)
        init_head(self)

    def forward(self, maps: list[Tensor], seed: Tensor | None = None) -> list[Tensor]:
        """Logits (B, classes, h, w) of the finest map's size; with `seed` also the auxiliary ones.

        Args:
            maps: four, (B, C_i, h_i, w_i), fine to coarse (a plain ViT's: shallow to deep).
            seed: (B,) int64 turns dropout on, one draw a channel; None in evaluation.
        """
        maps = self.neck(maps)
        levels = [*(f(x) for f, x in zip(self.lateral, maps)), self.psp(maps[3])]
        for i in (2, 1, 0):  # from the coarsest down
            levels[i] = levels[i] + resize(levels[i + 1], levels[i].shape[2:])
        levels = [*(f(x) for f, x in zip(self.output, levels)), levels[3]]
        x = self.fuse(torch.cat([resize(y, levels[0].shape[2:]) for y in levels], dim=1))
        if seed is None:
            return [self.classifier(x)]
        y, n = self.aux_conv(maps[AUX_LEVEL]), x.shape[1]
        keep = uniform(seed, n + y.shape[1], DROPOUT)[..., None, None] >= self.dropout
        keep = keep.to(x.dtype) / (1 - self.dropout)
        return [self.classifier(x * keep[:, :n]), self.aux_classifier(y * keep[:, n:])]


class Probe(nn.Module):
    """One linear layer a token, as a 1x1 convolution (SemanticMIM Sec. 4.2)."""

    def __init__(self, dim: int, classes: int):
        super().__init__()
        self.classifier = nn.Conv2d(dim, classes, 1)
        init_head(self)

    def forward(self, maps: list[Tensor], seed: Tensor | None = None) -> list[Tensor]:
        return [self.classifier(maps[0])]


def init_head(head: nn.Module) -> None:
    """He-normal convolutions before a ReLU, classifiers N(0, 0.01); the neck keeps torch's own."""
    # MCMAE Sec. 3.3 says "Xavier"; this is what its public code does, mmsegmentation's.
    for name, m in head.named_modules():
        if isinstance(m, nn.Conv2d):
            if name.endswith("classifier"):
                nn.init.normal_(m.weight, std=0.01)
            else:
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# -------------------------------------------------------------------------------- the whole model


def pixel_loss(logits: Tensor, labels: Tensor, labelled: bool = False) -> Tensor:
    """Cross-entropy in fp32; unlabelled pixels have none.

    Written out: torch's kernel for maps has no deterministic form on CUDA.

    Args:
        logits: (B, C, h, w), resized to the labels.
        labels: (B, H, W) uint8, 255 = unlabelled.
        labelled: mean over a sample's labelled pixels, then over samples; False: over all pixels,
            mmsegmentation's default, in which a sample weighs less where it is padded.
    """
    logits = resize(logits.float(), labels.shape[1:])
    valid, target = labels != UNLABELLED, labels.long()
    picked = logits.gather(1, target.where(valid, 0)[:, None])[:, 0]
    error = (logits.logsumexp(1) - picked).where(valid, 0)  # (B, H, W)
    if not labelled:
        return error.mean()
    return (error.flatten(1).sum(1) / valid.flatten(1).sum(1).clamp(min=1)).mean()


class Segmenter(nn.Module):
    """An encoder and a head; the batch has `rgb`, `semantic` (B, H, W) and `seed`.

    Args:
        encoder: with the contract of the method scripts; its parameters that the features do not
            depend on (the final norm) are frozen, as DDP waits for every gradient.
        classes: of the label maps.
        layer: None for UperNet on the pyramid; otherwise the 1-based layer that a linear probe
            reads, and the encoder is frozen.
        aux_weight: weight of the auxiliary loss.
        loss_size: short side at which a probe's loss is taken; 0 = that of the labels.
        mean, std: (3,) each, of [0, 1] pixels, as the encoder expects them.
        windows: options of Windows, without a bias; None: blocks attend as the encoder has it.
        sizes: dim, aux_dim, dropout, as UperNet takes them.
    """

    def __init__(
        self,
        encoder: nn.Module,
        classes: int,
        layer: int | None = None,
        aux_weight: float = 0.4,
        loss_size: int = 0,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        windows: dict | None = None,
        **sizes,
    ):
        super().__init__()
        self.encoder, self.layer, self.loss_size = encoder, layer, loss_size
        self.aux_weight, self.normalize = aux_weight, Normalize(mean, std)
        self.windows = Windows(encoder.blocks, encoder.grid, **windows) if windows else None
        if layer:
            encoder.requires_grad_(False)
            shapes = copy.deepcopy(self).to("meta").eval()  # computes shapes alone
            size = (n * encoder.patch_size for n in encoder.grid)
            (x,) = shapes.features(torch.zeros(1, 3, *size, device="meta"))
            self.head = Probe(x.shape[1], classes)
        else:
            plain = len(set(encoder.strides)) == 1
            self.head = UperNet(freeze_unseen(encoder, self.windows), plain, classes, **sizes)

    def features(self, imgs: Tensor, seed: Tensor | None = None) -> list[Tensor]:
        """What the head reads of normalised images (B, 3, H, W): maps (B, C, h, w)."""
        if not self.layer:
            return pyramid(self.encoder, imgs, self.windows, seed)
        with torch.no_grad():
            ((tokens, _),) = self.encoder.forward_features(imgs, [self.layer])
        h, w = self.encoder.grid_of(imgs)
        k = math.isqrt(tokens.shape[1] // (h * w))  # an early stage has k x k tokens a patch
        return [tokens.transpose(1, 2).unflatten(2, (k * h, k * w))]

    def predict(self, rgb: Tensor, seed: Tensor | None = None) -> list[Tensor]:
        """The head's logits (B, classes, h, w) of images (B, 3, H, W) uint8.

        Args: `seed` (B,) turns drop path and dropout on, and UperNet's auxiliary logits.
        """
        return self.head(self.features(self.normalize(rgb), seed), seed)

    def logits(self, rgb: Tensor) -> Tensor:
        """Logits (B, classes, H, W) of images (B, 3, H, W) uint8, as in evaluation."""
        (x,) = self.predict(rgb)
        return resize(x.float(), rgb.shape[2:])

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """The batch's labels, (B, H, W), or smaller: of the size at which the loss is taken."""
        labels = batch["semantic"]
        share = self.loss_size / min(labels.shape[1:])
        if not 0 < share < 1:
            return labels
        size = [round(n * share) for n in labels.shape[1:]]
        return F.interpolate(labels[:, None].float(), size, mode="nearest-exact")[:, 0].byte()

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return pixel_loss(logits, labels, labelled=bool(self.layer))

    def forward(self, batch: dict[str, Tensor], progress: Tensor) -> tuple[Tensor, dict]:
        """Loss of a batch and logs; `progress` changes nothing here."""
        labels = self.labels(batch)
        x, *aux = self.predict(batch["rgb"], batch["seed"])
        loss = total = self.loss(x, labels)
        for y in aux:
            total = total + self.aux_weight * self.loss(y, labels)
        return total, {"loss_main": loss.detach()}
