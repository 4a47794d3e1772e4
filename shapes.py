"""ShapeScenes: procedural scenes with instance and semantic maps, which need no files."""

import colorsys
import math
import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from data import GRANULARITIES, nearest, relabel, sample_seed, scalars

STUFF = {  # two palettes each, from dark to light: colour may hint, but the texture tells
    "sky": ((0x5B93D6, 0xF2F6FA), (0xD98A6A, 0xFBE3C0)),
    "grass": ((0x3C6B2A, 0x8DBB55), (0x7A7438, 0xC9BE78)),
    "water": ((0x1F5A80, 0x74B5C9), (0x4A6A6E, 0xB9CCC8)),
    "sand": ((0xA98A5A, 0xEBD9AE), (0x98725C, 0xDDB598)),
    "brick": ((0x9C4B3A, 0xD9CDBE), (0x6E6A68, 0xC9C4BC)),
    "snow": ((0x93ABCB, 0xFFFFFF), (0xA9A6BC, 0xFFF7F0)),
}
SHAPES = tuple("disc square triangle star cross ring crescent heart flower bar".split())
HOLES = {"ring": (0.0, 0.55), "crescent": (0.5, 0.75)}  # centre and radius of a disc cut out
ANGLES = 720  # entries of an outline


def _outlines() -> np.ndarray:
    """Return the radius of each of SHAPES at ANGLES angles from -pi to pi, (10, ANGLES) float32."""
    a = (np.arange(ANGLES) + 0.5) * (2 * np.pi / ANGLES) - np.pi
    disc = np.ones(ANGLES)

    def polygon(sides):
        return 1 / np.cos(a % (2 * np.pi / sides) - np.pi / sides)

    def box(w, h):
        return np.minimum(w / np.abs(np.cos(a)), h / np.abs(np.sin(a)))

    t = np.abs((a * 5 / (2 * np.pi)) % 1 - 0.5) * (2 * np.pi / 5)  # from an inner corner
    star = 0.4 * np.sin(np.pi / 5) / (0.4 * np.sin(t) + np.sin(np.pi / 5 - t))
    heart = np.max([0.5 * polygon(4), np.cos(a - 0.75 * np.pi), np.cos(a + 0.75 * np.pi)], axis=0)
    flower = 0.5 + 0.5 * np.sqrt(np.abs(np.cos(2.5 * a)))
    cross = np.maximum(box(1, 0.33), box(0.33, 1))
    bar, square, triangle = box(1, 0.36), box(1, 1), polygon(3)
    radii = [disc, square, triangle, star, cross, disc, disc, heart, flower, bar]
    return np.array(radii, np.float32)


class ShapeScenes(Dataset):
    """Procedural scenes: 2 to 6 objects of ten SHAPES on two or three of six kinds of STUFF.

    They stand in for photographs with panoptic maps: RGB and maps agree to the pixel, and neither
    colour, size nor pose tells an object's class. (split, index) fixes the scene; with `train` a
    sample's seed shifts, zooms and mirrors the view, so that epochs differ. Scenes live in unit
    coordinates (the short side is 1) and are drawn at any image size.

    Args and samples as FolderDataset's; `length` None is 20,000 for "train" and 2,000 otherwise.
    `label` is the shape of the largest visible object; semantic ids count STUFF, then SHAPES.
    """

    SEMANTIC_NAMES = (*STUFF, *SHAPES)
    SEMANTIC_CLASSES = len(STUFF) + len(SHAPES)

    def __init__(
        self, split: str = "train", image_size=64, label_stride: int = 2,
        granularities: Sequence[str] = GRANULARITIES, train: bool = True, seed: int = 0,
        length: int | None = None,
    ):  # fmt: skip
        self.size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.label_size = tuple(n // label_stride for n in self.size)
        self.granularities, self.train, self.seed = tuple(granularities), train, seed
        self.split, self.classes = int.from_bytes(split.encode(), "little"), list(SHAPES)
        self.length = length if length is not None else 20_000 if split == "train" else 2_000
        self.extent = tuple(n / min(self.size) for n in self.size)
        self.outlines = _outlines()
        v, u = np.mgrid[-2:2:0.02, -2:2:0.02].astype(np.float32)
        area = [(self._inside(shape, u, v) > 0).mean() * 16 for shape in range(len(SHAPES))]
        self.scale = np.sqrt(np.pi / np.array(area)).tolist()  # to equal areas
        self.sheets = self._sheets()

    def __len__(self) -> int:
        return self.length

    def _inside(self, shape: int, u: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Return how deep (u, v) lies inside a shape's outline, measured along the ray."""
        turn = np.arctan2(v, u) * (ANGLES / (2 * np.pi)) + ANGLES / 2
        outline = self.outlines[shape].take(turn.astype(np.intp), mode="clip")
        inside = outline - np.sqrt(u * u + v * v)
        if SHAPES[shape] in HOLES:
            centre, radius = HOLES[SHAPES[shape]]
            inside = np.minimum(inside, np.sqrt((u - centre) ** 2 + v * v) - radius)
        return inside

    def _sheets(self) -> np.ndarray:
        """Draw sheets of each stuff's texture and of white noise, (7, 2H, 2W), to cut from."""
        H, W = (2 * n for n in self.size)
        y, x = (((np.arange(n) + 0.5) / min(self.size)).astype(np.float32) for n in (H, W))
        y, rng = y[:, None], np.random.Generator(np.random.PCG64(0))

        def noise(fy, fx):  # smooth, fy x fx cells per unit
            cells = [math.ceil(2 * f * e) for f, e in zip((fy, fx), self.extent)]
            cells = torch.from_numpy(rng.random((1, 1, *cells), np.float32))
            return F.interpolate(cells, (H, W), mode="bilinear")[0, 0].numpy()

        row, column = y * 9, x * 4.5 + np.floor(y * 9) * 0.5
        joint = (np.abs(row % 1 - 0.5) > 0.42) | (np.abs(column % 1 - 0.5) > 0.46)
        waves = np.sin(2 * np.pi * (9 * y + 1.1 * noise(9, 2.5)))
        sheets = [
            np.clip(0.6 * noise(4, 2) + 0.6 * noise(9, 5) - 0.1, 0, 1) ** 2,  # clouds
            0.75 * noise(9, 48) + 0.25 * noise(3, 3),  # blades
            0.5 + 0.5 * waves * noise(6, 3),  # ripples
            0.7 * noise(60, 60) + 0.3 * noise(3, 3),  # grains
            np.where(joint, 1, 0.15 + 0.35 * noise(9, 4.5)),  # bricks
            1 - 0.8 * noise(7, 2) * noise(3, 2) - 0.3 * (noise(24, 24) > 0.85),  # drifts, tracks
            rng.random((H, W), np.float32),
        ]
        return np.stack(sheets).astype(np.float32)

    def _cut(self, draw, sheet: int) -> np.ndarray:
        top, left = int(draw() * self.size[0]), int(draw() * self.size[1])
        return self.sheets[sheet, top : top + self.size[0], left : left + self.size[1]]

    def _ground(self, draw, y: np.ndarray, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Paint a far, a middle and a near kind of stuff: RGB (3, H, W) in 0..255, ids (H, W)."""
        kinds = [(0, 0, 4, 5)[int(draw() * 4)]]  # the far one: sky, sky, brick or snow
        while len(kinds) < 3:
            kinds += {1 + int(draw() * 5)} - set(kinds)
        band, level = np.zeros(self.size, np.intp), 0.2
        for height in (0.3, 0.6):  # the near one is often out of view
            level += height * draw() * self.extent[0]
            bend, waves, phase = 0.04 * draw(), 2 + 6 * draw(), 6.3 * draw()
            band += y[:, None] > level + bend * np.sin(waves * x + phase)
            level += 0.2
        tones = np.empty((2, 3, 3), np.float32)  # dark or light, channel, band
        for b, kind in enumerate(kinds):
            palette = list(STUFF.values())[kind][int(draw() * 2)]
            for c, bits in enumerate((16, 8, 0)):
                shift = 40 * draw() - 20
                tones[:, c, b] = [(colour >> bits & 255) + shift for colour in palette]
        canvas = (tones[1] - tones[0])[:, band]
        canvas *= np.choose(band, [self._cut(draw, kind) for kind in kinds])
        canvas += tones[0][:, band]
        return canvas, np.array(kinds, np.uint8)[band]

    def _paint(
        self, draw, y, x, canvas: np.ndarray, light: float, spread: float,
        pose: tuple = (0.0, 0.0, 0.0, 1.0),
    ) -> tuple:  # fmt: skip
        """Paint an object and its shadow; return its shape, window and cover in the window.

        `pose` moves what is drawn: down, right, by an angle, in size (motion.py).
        """
        shape = int(draw() * len(SHAPES))
        cy, cx = (
            e * (0.5 + spread * (2 * draw() - 1)) + shift for e, shift in zip(self.extent, pose)
        )
        angle, aspect = 2 * math.pi * draw() + pose[2], 0.85 + 0.3 * draw()
        size = (0.09 + 0.09 * draw()) * self.scale[shape] * pose[3]
        reach = size * float(self.outlines[shape].max()) * max(aspect, 1 / aspect)
        rows = slice(*np.searchsorted(y, (cy - reach, cy + reach)))
        cols = slice(*np.searchsorted(x, (cx - reach, cx + reach)))
        dy, dx = (y[rows, None] - cy) / size, (x[None, cols] - cx) / size
        c, s = math.cos(angle), math.sin(angle)
        u, v = (c * dx + s * dy) * aspect, (c * dy - s * dx) / aspect
        inside, pixel = self._inside(shape, u, v), size / float(y[1] - y[0])
        cover = np.clip(inside * pixel + 0.5, 0, 1)  # soft edges
        drop = max(1, round(0.25 * pixel))
        below = canvas[:, rows.start + drop : rows.stop + drop, cols]
        below *= 1 - 0.35 * cover[: below.shape[1]]
        pattern, waves, phase = int(draw() * 4), 4 + 5 * draw(), 6.3 * draw()
        mark = np.float32(0)
        if pattern:  # else plain; stripes, checks, rings
            mark = np.sin(waves * (u if pattern < 3 else u * u + v * v) + phase)
            mark = np.clip(2 * (mark * np.sin(waves * v) if pattern == 2 else mark) + 0.5, 0, 1)
        hue, step, value = draw(), 0.1 + 0.4 * draw(), 0.45 + 0.5 * draw()
        saturation = 0.25 + 0.7 * draw()
        first = colorsys.hsv_to_rgb(hue, saturation, value)
        second = colorsys.hsv_to_rgb(hue + step, saturation * 0.8, 1.3 - value)
        first, second = np.array((first, second), np.float32)[:, :, None, None] * 255
        shade = 1 - 0.3 * (light * dx + dy) - 0.35 * np.exp(-5 * np.maximum(inside, 0))
        window = canvas[:, rows, cols]
        window += cover * ((first + (second - first) * mark) * shade - window)
        return shape, (rows, cols), cover > 0.5

    def _axes(self, view, zoom: float) -> list[np.ndarray]:
        """Where the rows (H,) and columns (W,) of a zoomed view lie; `view()` draws its place."""
        axes = (
            (np.arange(n) + 0.5) / (min(self.size) * zoom) + e * (1 - 1 / zoom) * view()
            for n, e in zip(self.size, self.extent)
        )
        return [x.astype(np.float32) for x in axes]

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        seed = sample_seed(self.seed, epoch, index)
        draw = random.Random(sample_seed(self.split, 0, index)).random  # the scene
        view = random.Random(seed).random  # how it is seen
        zoom, flip = (1 + 0.3 * view(), view() < 0.5) if self.train else (1, False)
        y, x = self._axes(view, zoom)
        canvas, semantic = self._ground(draw, y, x)
        instance, shapes = np.zeros(self.size, np.uint8), []
        light, count = 2 * draw() - 1, 2 + int(draw() * 5)
        for number in range(1, count + 1):  # the last one is always in view
            spread = 0.4 if number < count else 0.2
            shape, window, covered = self._paint(draw, y, x, canvas, light, spread)
            instance[window][covered] = number
            semantic[window][covered] = len(STUFF) + shape
            shapes.append(shape)
        canvas *= 1.05 - 0.2 * (light * (x - 0.5) + (y[:, None] - 0.5))
        canvas += 24 * self._cut(draw, 6) - 12
        label = shapes[int(np.bincount(instance.ravel(), minlength=count + 1)[1:].argmax())]
        rgb = np.clip(canvas[:, :, ::-1] if flip else canvas, 0, 255).astype(np.uint8)
        sample = {"rgb": rgb}
        if self.granularities != ("rgb",):
            rows, cols = (nearest(0, n, out) for n, out in zip(self.size, self.label_size))
            at = rows[:, None], self.size[1] - 1 - cols if flip else cols
            sample |= {"instance": relabel(instance[at]), "semantic": semantic[at]}
        sample = {g: torch.from_numpy(a) for g, a in sample.items() if g in self.granularities}
        return sample | scalars(label, seed, -1)
