"""motion.py: what a moving scene is, that its label is its motion, and that one frame hides it."""

import random
from unittest import mock

import numpy as np
import pytest
import torch

from motion import MIRROR, MOTIONS, MovingScenes

pytestmark = pytest.mark.slow


def test_moving_scenes__keys_determinism_and_splits():
    a, b = MovingScenes("train", 32, 4), MovingScenes("train", 32, 4)
    sample = a[1, 3]
    assert list(sample) == ["rgb", "label", "seed", "bad"]
    assert sample["rgb"].shape == (4, 3, 32, 32) and sample["rgb"].dtype == torch.uint8
    assert all(torch.equal(sample[k], b[1, 3][k]) for k in sample)
    assert not torch.equal(sample["rgb"], a[2, 3]["rgb"])
    fixed = MovingScenes("train", 32, 4, train=False)
    assert torch.equal(fixed[0, 5]["rgb"], fixed[3, 5]["rgb"])
    val = MovingScenes("val", 32, 4, train=False)
    assert not torch.equal(fixed[0, 5]["rgb"], val[0, 5]["rgb"])
    labels = np.bincount([int(val[0, i]["label"]) for i in range(210)], minlength=7)
    assert len(labels) == len(MOTIONS) == len(val.classes) == 7 and labels.min() > 15
    wide = MovingScenes("val", (24, 40), 2, train=False)[0, 0]["rgb"]
    assert wide.shape == (2, 3, 24, 40)


def test_moving_scenes__single_frames_are_distributed_alike():
    """A motion adds to phases that are uniform, and nothing that is drawn depends on it."""
    scenes, size = MovingScenes("val", 32, 8, train=False), 3
    for kind in MOTIONS.values():
        poses = []
        for at in (0.0, 0.4):
            grid = np.linspace(0, 2 * np.pi, 64, endpoint=False)
            speed = [6.0 * n for n in kind]
            poses.append([scenes._pose(at, [p] * 4, speed, size) for p in grid])
        first, later = (np.array(p) for p in poses)
        for axis in (0, 1, 3):  # the same values, in another order, up to the grid's step
            assert np.abs(np.sort(first[:, axis]) - np.sort(later[:, axis])).max() < 0.05 * size
        turned = (later[:, 2] - first[:, 2]) / 6.0
        assert np.allclose(turned, 0.4 * kind[2])


def test_moving_scenes__the_labelled_object_is_the_largest():
    scenes = MovingScenes("val", 32, 4, train=False)
    rng = np.random.default_rng(0)
    front = [scenes._object(rng.random, True)[-1] for _ in range(50)]
    others = [scenes._object(rng.random, False)[-1] for _ in range(200)]
    swell = 0.2  # and a shape's own size is drawn from 0.09 to 0.18
    assert min(front) * 0.09 * (1 - swell) >= max(others) * 0.18 * (1 + swell) - 1e-9


def test_moving_scenes__a_still_view_and_mirrored_labels():
    still = MovingScenes("val", 32, 4, stride=0, train=False)
    moving = MovingScenes("val", 32, 4, train=False)
    for i in range(6):
        a, b = still[0, i]["rgb"].int(), moving[0, i]["rgb"].int()
        assert (a - a[:1]).abs().max() <= 13 < (b - b[:1]).abs().max()  # the grain alone
        assert still[0, i]["label"] == moving[0, i]["label"]
    names = list(MOTIONS)
    assert {names[a]: names[b] for a, b in MIRROR.items() if a != b} == {
        "spin left": "spin right", "spin right": "spin left",
    }  # fmt: skip
    train, fixed = MovingScenes("train", 32, 4), MovingScenes("train", 32, 4, train=False)
    for i in range(60):
        true = int(fixed[0, i]["label"])
        seen = {int(train[e, i]["label"]) for e in range(12)}
        assert seen == {true, MIRROR[true]}
        if i > 8 and true in (4, 5):
            break


def painted(scenes, key) -> tuple[dict, list[list[tuple]]]:
    """A sample, and of each of its objects (rows), in the order of painting, what was given to
    `_paint` in each frame: (pose, looks, spread).
    """
    calls, paint = [], MovingScenes._paint

    def spy(self, draw, y, x, canvas, light, spread, pose):
        calls.append((pose, draw.__self__.getstate(), spread))
        return paint(self, draw, y, x, canvas, light, spread, pose)

    with mock.patch.object(MovingScenes, "_paint", spy):
        sample = scenes[key]
    return sample, [
        calls[n :: len(calls) // scenes.frames] for n in range(len(calls) // scenes.frames)
    ]


def test_moving_scenes__the_label_is_how_the_object_in_front_moves():
    """Its poses, frame by frame, are those of the motion; looks stay; all others are smaller."""
    scenes, found = MovingScenes("val", 16, 8, train=False), set()
    for i in range(40):
        sample, objects = painted(scenes, (0, i))
        label = int(sample["label"])
        changes = []
        for poses in objects:
            assert all(looks == poses[0][1] for _, looks, _ in poses)
            changes.append([len({round(p[axis], 9) for p, *_ in poses}) == 8 for axis in range(4)])
        assert changes[-1] == [n != 0 for n in list(MOTIONS.values())[label]]
        angles = [pose[2] for pose, *_ in objects[-1]]
        assert np.sign(np.diff(angles)).tolist() == [list(MOTIONS.values())[label][2]] * 7
        largest = [max(pose[3] for pose, *_ in poses) for poses in objects]
        assert max(largest[:-1]) < largest[-1] / 2 and len(objects) > 1
        found |= {label, *map(tuple, changes[:-1])}
    assert found >= set(range(7)) and len(found) > 7 + 3  # others move in ways of their own


def test_moving_scenes__nothing_but_the_motion_depends_on_the_label():
    """Looks, place and phases are drawn apart from it: over 4,000 objects their means agree."""
    scenes, rng = MovingScenes("val", 16, 8, train=False), random.Random(0)
    drawn = [scenes._object(rng.random, True) for _ in range(4000)]
    for kind in range(7):
        mine = [(looks / 2**53, *phases) for looks, k, phases, *_ in drawn if k == kind]
        assert len(mine) > 450
        unit = np.array(mine) / [1, *[2 * np.pi] * 4]
        assert np.abs(unit.mean(0) - 0.5).max() < 4 * (1 / 12 / len(mine)) ** 0.5
        assert np.abs((unit**2).mean(0) - 1 / 3).max() < 4 * (4 / 45 / len(mine)) ** 0.5
        looks = [looks % 7 for looks, k, *_ in drawn if k == kind]
        assert np.bincount(looks, minlength=7).min() > 40


def test_moving_scenes__the_view_moves_and_mirrors():
    """Each frame is a window of its canvas, which wanders evenly, and a mirrored one says so."""
    scenes, moved, mirrored = MovingScenes("train", 32, 4), set(), set()
    label = {i: int(MovingScenes("train", 32, 4, train=False)[0, i]["label"]) for i in range(30)}
    index, paint = next(i for i in label if label[i] == 4), MovingScenes._paint
    for epoch in range(8):
        canvases = {}  # in which all that follows is done in place

        def spy(*args, seen=canvases):
            seen[id(args[4])] = args[4]
            return paint(*args)

        with mock.patch.object(MovingScenes, "_paint", spy):
            sample = scenes[epoch, index]
        found, m = [], scenes.margin
        for frame, canvas in zip(sample["rgb"].numpy(), canvases.values(), strict=True):
            canvas = np.clip(canvas, 0, 255).astype(np.uint8)
            windows = {
                (top, left, flip): canvas[:, top : top + 32, left : left + 32][..., :: 1 - 2 * flip]
                for top in range(m + 1) for left in range(m + 1) for flip in (0, 1)
            }  # fmt: skip
            found += [at for at, window in windows.items() if np.array_equal(window, frame)]
        places, flips = np.array(found)[:, :2], {at[2] for at in found}
        assert len(found) == 4 and len(flips) == 1
        assert np.abs(np.diff(places, 2, axis=0)).max() <= 2  # evenly, but for rounding
        assert sample["label"] == (5 if flips == {1} else 4)
        moved |= {tuple(places[-1] - places[0])}
        mirrored |= flips
    assert mirrored == {0, 1} and len(moved) > 3


def test_moving_scenes__spins_turn_the_way_their_names_say():
    """A rotation by the pose's angle takes the x axis towards y, which points down: clockwise."""
    scenes = MovingScenes("val", 64, 2, train=False)
    y = x = ((np.arange(72) + 0.5) / 64).astype(np.float32)

    def bar(angle):
        canvas = np.zeros((3, 72, 72), np.float32)
        draws = iter([0.95, 0.5, 0.5, angle / (2 * np.pi), 0.5, 1.0] + [0.5] * 20)
        _, window, cover = scenes._paint(lambda: next(draws), y, x, canvas, 0.0, 0.2)
        rows, cols = np.nonzero(cover)
        rows, cols = rows - rows.mean(), cols - cols.mean()
        return 0.5 * np.arctan2(2 * (rows * cols).mean(), (cols**2 - rows**2).mean())

    assert 0.2 < bar(0.5) - bar(0.1) < 0.6 and MOTIONS["spin right"][2] == 1
