"""ShapeScenes in motion: clips whose class, a kind of motion, no single frame tells."""

import math
import random

import numpy as np
import torch
from torch import Tensor

from data import sample_seed, scalars
from shapes import ShapeScenes

# How often a clip goes through the phases of (down, right, angle, size).
MOTIONS = {
    "still": (0, 0, 0, 0),
    "sway": (0, 1, 0, 0),  # to the side and back
    "bob": (1, 0, 0, 0),  # up and down
    "loop": (1, 1, 0, 0),
    "spin left": (0, 0, -1, 0),
    "spin right": (0, 0, 1, 0),
    "pulse": (0, 0, 0, 1),
}
MIRROR = dict(zip(range(7), (0, 1, 2, 3, 5, 4, 6)))  # what a flip makes of each class
REACH, SWELL = 0.16, 0.2  # of a path from its middle, of the size


class MovingScenes(ShapeScenes):
    """Clips of ShapeScenes: two or three objects go along periodic paths on the same snow in all
    clips, before a view that moves, too.

    The class is the motion of the largest object, which lies in front. Each of its four phases
    (down, right, angle, size) is drawn uniformly and a motion only adds to some of them, so that in
    every single frame place, angle and size are distributed alike in all classes. (split, index)
    fixes objects and paths; with `train` a sample's seed zooms, mirrors and moves the view.

    Args: as ShapeScenes'; `frames` of a clip; `stride`: 0 shows one frame all the time. There are
    10,000 clips for "train", 1,000 otherwise.
    A sample: `rgb` (T, 3, H, W) uint8, and `label`, `seed`, `bad`, as in data.py.
    """

    def __init__(
        self, split: str = "train", image_size=64, frames: int = 8, stride: int = 1,
        train: bool = True, seed: int = 0, flip: bool = True,
    ):  # fmt: skip
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.margin = min(size) // 16  # the view moves so far
        larger, length = tuple(n + self.margin for n in size), 10_000 if split == "train" else 1_000
        super().__init__(split, larger, 1, ("rgb",), train, seed, length)
        nowhere = (np.zeros(n, np.float32) for n in larger)
        self.ground, _ = self._ground(random.Random(0).random, *nowhere)  # snow
        self.shown, self.frames, self.moves, self.flip = size, frames, stride > 0, flip
        self.classes = list(MOTIONS)

    def _object(self, draw, largest: bool) -> tuple:
        """Seed of what is painted, kind of motion, phases and their speed (4,), size."""
        looks, kind = int(draw() * 2**53), int(draw() * len(MOTIONS))
        phases = [2 * math.pi * draw() for _ in range(4)]
        pace = 2 * math.pi * (0.75 + 0.5 * draw())
        speed = [pace * n for n in list(MOTIONS.values())[kind]]
        return looks, kind, phases, speed, 1.5 if largest else 0.35 + 0.15 * draw()

    def _pose(self, at: float, phases: list, speed: list, size: float) -> tuple:
        down, right, angle, swell = (p + at * v for p, v in zip(phases, speed))
        return (
            REACH * math.sin(down), REACH * math.sin(right), angle,
            size * (1 + SWELL * math.sin(swell)),
        )  # fmt: skip

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Tensor]:
        epoch, index = key
        seed = sample_seed(self.seed, epoch, index)
        draw = random.Random(sample_seed(self.split, 1, index)).random  # the scene
        fixed = sample_seed(self.split, 2, index)
        view = random.Random(seed if self.train else fixed).random  # how it is seen
        zoom, flip = (1 + 0.3 * view(), (view() < 0.5) & self.flip) if self.train else (1, False)
        start, end = ([self.margin * view() for _ in self.shown] for _ in range(2))
        y, x = self._axes(view, zoom)
        light, count = 2 * draw() - 1, 2 + int(draw() * 2)
        objects = [self._object(draw, number == count) for number in range(1, count + 1)]
        lit = 1.05 - 0.2 * (light * (x - 0.5) + (y[:, None] - 0.5))
        clip = np.empty((self.frames, 3, *self.shown), np.uint8)
        for number in range(self.frames):
            at, canvas = number / self.frames * self.moves, self.ground.copy()
            for looks, _, phases, speed, size in objects:
                spread = 0.2 if size > 1 else 0.4
                pose = self._pose(at, phases, speed, size)
                self._paint(random.Random(looks).random, y, x, canvas, light, spread, pose)
            canvas *= lit
            canvas += 12 * self._cut(draw, 6) - 6  # another grain in each frame
            top, left = (round(a + (b - a) * at) for a, b in zip(start, end))
            clip[number] = np.clip(
                canvas[:, top : top + self.shown[0], left : left + self.shown[1]], 0, 255
            )
        label = objects[-1][1]
        if flip:
            clip, label = np.ascontiguousarray(clip[..., ::-1]), MIRROR[label]
        return {"rgb": torch.from_numpy(clip)} | scalars(label, seed, -1)
