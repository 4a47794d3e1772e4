"""Augmentation of fine-tuning: in the loader RandAugment and random erasing, on the device mixing.

    RandAugment, Augmented     what happens to a training image after crop and flip
    draw_mix, mix              mixup and cutmix of a micro-batch with itself in reverse order
    soft_targets               label smoothing, and the mixed targets

All draws come from the sample's seed. What the papers cite by name alone follows timm.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor
from torchvision.transforms import v2 as T

import data
from noise import AUGMENT, uniform


# -------------------------------------------------------------------------------- in the loader


def _affine(im: Image.Image, fill: tuple, *matrix: float) -> Image.Image:
    return im.transform(im.size, Image.AFFINE, matrix, Image.BICUBIC, fillcolor=fill)


def _add(im: Image.Image, amount: int) -> Image.Image:
    return im.point([min(i + amount, 255) if i < 128 else i for i in range(256)] * 3)


def _posterize(im: Image.Image, bits: int) -> Image.Image:
    return im.point([i & -(2 ** (8 - bits)) for i in range(256)] * 3)  # Pillow's refuses 0 bits


def _enhance(kind: type) -> Callable:
    return lambda im, x, sign, fill: kind(im).enhance(max(0.1, 1 + 0.9 * x * sign))


# What timm's "increasing" RandAugment chooses from, as functions of (image, x, sign, fill): x in
# [0, 1] is a tenth of the magnitude, sign is -1 or 1, fill the colour of what comes from outside.
OPERATIONS = {
    "AutoContrast": lambda im, x, sign, fill: ImageOps.autocontrast(im),
    "Equalize": lambda im, x, sign, fill: ImageOps.equalize(im),
    "Invert": lambda im, x, sign, fill: ImageOps.invert(im),
    "Posterize": lambda im, x, sign, fill: _posterize(im, 4 - int(4 * x)),
    "Solarize": lambda im, x, sign, fill: ImageOps.solarize(im, 256 - int(256 * x)),
    "SolarizeAdd": lambda im, x, sign, fill: _add(im, int(110 * x)),
    "Color": _enhance(ImageEnhance.Color),
    "Contrast": _enhance(ImageEnhance.Contrast),
    "Brightness": _enhance(ImageEnhance.Brightness),
    "Sharpness": _enhance(ImageEnhance.Sharpness),
    "Rotate": lambda im, x, sign, fill: im.rotate(30 * x * sign, Image.BICUBIC, fillcolor=fill),
    "ShearX": lambda im, x, sign, fill: _affine(im, fill, 1, 0.3 * x * sign, 0, 0, 1, 0),
    "ShearY": lambda im, x, sign, fill: _affine(im, fill, 1, 0, 0, 0.3 * x * sign, 1, 0),
    "TranslateX": lambda im, x, sign, fill: _affine(
        im, fill, 1, 0, 0.45 * x * sign * im.size[0], 0, 1, 0
    ),
    "TranslateY": lambda im, x, sign, fill: _affine(
        im, fill, 1, 0, 0, 0, 1, 0.45 * x * sign * im.size[1]
    ),
}
GEOMETRIC = {"ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"}  # maps could not follow
JITTER = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


class RandAugment:
    """timm's rand-m9-mstd0.5-inc1, as MAE and SemanticMIM fine-tune; draws from torch's generator.

    `count` times: with probability 1/2 one operation, its magnitude normal around `magnitude` of 10
    and clipped to [0, 10]. torchvision's class has neither that probability nor the deviation,
    leaves Posterize 4 bits where this leaves 1, and lacks Invert and SolarizeAdd.
    """

    def __init__(
        self, magnitude: float, std: float, fill: tuple[int, int, int], geometric: bool = True,
        count: int = 2,
    ):  # fmt: skip
        self.magnitude, self.std, self.fill, self.count = magnitude, std, fill, count
        self.names = [n for n in OPERATIONS if geometric or n not in GEOMETRIC]

    def __call__(self, im: Image.Image) -> Image.Image:
        for _ in range(self.count):
            if torch.rand(()) < 0.5:
                level = min(max(self.magnitude + self.std * torch.randn(()).item(), 0.0), 10.0)
                name = self.names[torch.randint(len(self.names), ())]
                sign = 1 if torch.rand(()) < 0.5 else -1
                im = OPERATIONS[name](im, level / 10, sign, self.fill)
        return im


def color_jitter(im: Image.Image, strength: float) -> Image.Image:
    """Brightness, contrast, saturation in random order, factors uniform in 1 -+ strength."""
    for i in torch.randperm(3).tolist():
        im = JITTER[i](im).enhance(1 + strength * (2 * torch.rand(()).item() - 1))
    return im


class Augmented(data.Dataset):
    """A training split with RandAugment, colour jitter, random erasing after crop and flip.

    They run on the uint8 image, under torch's CPU generator seeded from the sample and put back.
    Erased pixels are normal noise in normalised units, as timm's, here clipped to what uint8 holds.

    Args:
        cfg: rand_augment, rand_augment_std, color_jitter, reprob.
        mean, std: (3,) of pixels in [0, 1]; the mean fills what an operation moves in.
    """

    def __init__(
        self, dataset: data.Dataset, cfg: object, mean: Sequence[float], std: Sequence[float]
    ):
        self.dataset, self.reprob, self.jitter = dataset, cfg.reprob, cfg.color_jitter
        self.classes, self.granularities = dataset.classes, dataset.granularities
        self.files = getattr(dataset, "files", None)
        fill = tuple(min(255, round(255 * x)) for x in mean)
        geometric = len(dataset.granularities) == 1
        self.rand_augment = RandAugment(cfg.rand_augment, cfg.rand_augment_std, fill, geometric)
        self.erase = T.RandomErasing(
            cfg.reprob, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random"
        )
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (mean, std))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        sample = self.dataset[key]
        if "error" in sample:
            return sample
        with torch.random.fork_rng(devices=[]):
            sample["rgb"] = self.augment(sample["rgb"], int(sample["seed"]))
        return sample

    def augment(self, rgb: Tensor, seed: int) -> Tensor:
        """What becomes of an image (3, H, W) uint8."""
        return self.erased(self.distorted(rgb, seed))

    def distorted(self, rgb: Tensor, seed: int) -> Tensor:
        """An image after RandAugment and colour jitter, which a seed draws."""
        torch.default_generator.manual_seed(seed)  # the CPU's alone
        if not (self.rand_augment.magnitude or self.jitter):
            return rgb
        im = Image.fromarray(rgb.permute(1, 2, 0).contiguous().numpy())
        im = self.rand_augment(im) if self.rand_augment.magnitude else im
        im = color_jitter(im, self.jitter) if self.jitter else im
        return torch.from_numpy(np.array(im)).permute(2, 0, 1).contiguous()

    def erased(self, rgb: Tensor) -> Tensor:
        if not self.reprob:
            return rgb
        rgb = self.erase((rgb / 255 - self.mean) / self.std)
        return ((rgb * self.std + self.mean) * 255).round().clamp(0, 255).byte()


# ------------------------------------------------------------------------------ mixup and cutmix


def draw_mix(
    seed: Tensor, size: Sequence[int], mixup: float, cutmix: float, switch_prob: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw how each sample is mixed with its partner, by timm's rules.

    A sample draws for itself, from its own seed (timm's mode "elem"; MAE's "batch" has one draw for
    all): whether cutmix or mixup, lambda from Beta(a, a), and the centre of the box, whose area is
    1 - lambda before it is clipped at the border; lambda is then corrected to what is left.

    Args:
        seed: (B,) int64. size: (h, w) of the grid that boxes lie on. mixup, cutmix: a in (0, 1], or
            0 = off; not both 0.
    Returns: lam (B,), the sample's share in its target; blend (B,), its share in every pixel, 1 for
        cutmix; box (B, h, w) bool, where the partner is pasted, empty for mixup.
    """
    (h, w), tries = size, 32
    u = uniform(seed, 3 + 2 * tries, AUGMENT)
    cut = u[:, 0] < (switch_prob if mixup and cutmix else float(cutmix > 0))
    a = torch.where(cut, cutmix or 1.0, mixup or 1.0)[:, None]  # (B, 1)
    # Beta by Joehnk: x = U^(1/a), y = V^(1/a); the first pair with x + y <= 1 gives x / (x + y). At
    # least half of the pairs do for a <= 1, so 32 fail once in 4e9.
    x, y = u[:, 3 : 3 + tries].log() / a, u[:, 3 + tries :].log() / a  # logs: no underflow
    first = (x.exp() + y.exp() <= 1).float().argmax(dim=1, keepdim=True)
    lam = (x - y).sigmoid().gather(1, first)[:, 0]
    edges = []
    for n, centre in ((h, u[:, 1]), (w, u[:, 2])):
        side, middle = (n * (1 - lam).sqrt()).long(), (n * centre).long()
        at = torch.arange(n, device=seed.device)
        low, high = (middle - side // 2)[:, None], (middle + side // 2)[:, None]
        edges.append((at >= low) & (at < high))
    box = edges[0][:, :, None] & edges[1][:, None] & cut[:, None, None]
    lam = torch.where(cut, 1 - box.float().mean((1, 2)), lam)
    return lam, torch.where(cut, 1.0, lam), box


def mix(x: Tensor, blend: Tensor, box: Tensor) -> Tensor:
    """Mix images (B, C, H, W) or clips (B, T, C, H, W) float, or paste maps (B, H, W), with the
    batch in reverse order.

    `box` (B, h, w) is enlarged to the map's size by whole factors.
    """
    for dim in (1, 2):
        box = box.repeat_interleave(x.shape[dim - 3] // box.shape[dim], dim)
    if x.ndim == 3:
        return torch.where(box, x.flip(0), x)
    blend = blend.view(-1, *[1] * (x.ndim - 1))
    box = box.view(len(x), *[1] * (x.ndim - 3), *box.shape[1:])
    return torch.where(box, x.flip(0), x * blend + x.flip(0) * (1 - blend))


def soft_targets(label: Tensor, lam: Tensor | None, classes: int, smoothing: float) -> Tensor:
    """Smoothed targets (B, classes), mixed with those of the batch in reverse order."""
    off = smoothing / classes
    y = torch.full((len(label), classes), off, device=label.device)
    y.scatter_(1, label[:, None], 1 - smoothing + off)
    return y if lam is None else lam[:, None] * y + (1 - lam[:, None]) * y.flip(0)
