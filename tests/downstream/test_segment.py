"""Segmentation: sliding windows, scores, files; test_segment_recipes.py, test_segment_run.py."""

import json

import data
import engine
import numpy as np
import pytest
import torch
from downstream import pixels, segment
from downstream.segment_recipes import PRESETS, Config
from engine.folder import open_data
from engine.ranks import World
from PIL import Image

SMALL = (
    "--data shapes --model tiny --method cfmae --encoder tiny --image-size 32 --batch-size 8 "
    "--iterations 20 --dim 16 --aux-dim 8 --workers 0 --device cpu --precision fp32 --log-every 4 "
    "--val-samples 8 --drop-path 0.2"
).split()


def config(*flags):
    return engine.parse(Config, PRESETS, "", [*SMALL, *map(str, flags)])


# -------------------------------------------------------------------------------------- evaluation


def net(x):
    """A network that knows where in its window a pixel lies."""
    place = torch.arange(x.shape[2] * x.shape[3]).view(1, 1, *x.shape[2:])
    return torch.cat([x.float().cumsum(3), x[:, :2].float() * place], 1)


def test_slide__one_window_is_the_plain_forward():
    imgs = torch.randint(256, (2, 3, 6, 9), dtype=torch.uint8)
    assert torch.equal(pixels.slide(net, imgs, (6, 9)), net(imgs))


@pytest.mark.parametrize("limit", [1, 5, 100])
def test_slide__is_the_mean_over_windows(limit):
    imgs = torch.randint(256, (2, 3, 13, 20), dtype=torch.uint8)
    total, count = torch.zeros(2, 5, 13, 20), torch.zeros(13, 20)
    for top in (0, 4, 7):  # windows of 6, 4 apart
        for left in (0, 6, 11):  # of 9, 6 apart
            window = net(imgs[:, :, top : top + 6, left : left + 9])
            for i in range(6):
                for j in range(9):
                    total[:, :, top + i, left + j] += window[:, :, i, j]
                    count[top + i, left + j] += 1
    torch.testing.assert_close(pixels.slide(net, imgs, (6, 9), limit), total / count)
    assert pixels.starts(683, 512) == [0, 171] and pixels.starts(1024, 512) == [0, 341, 512]
    assert pixels.starts(853, 640) == [0, 213]


def test_scores__equal_a_loop_over_pixels():
    rng, C = np.random.default_rng(0), 6
    labels, pred = rng.integers(0, 4, (8, 9)), rng.integers(0, 5, (8, 9))  # 4: predicted alone
    labels[:2] = 255
    pairs = [(a, b) for a, b in zip(labels.ravel(), pred.ravel()) if a != 255]
    ious, recalls = [], []
    for c in range(C):
        both = sum(a == b == c for a, b in pairs)
        either = sum(c in (a, b) for a, b in pairs)
        mine = sum(a == c for a, _ in pairs)
        ious += [both / either] if either else []  # 5 is in neither
        recalls += [both / mine] if mine else []
    matrix = pixels.confusion(*(torch.from_numpy(x) for x in (pred, labels)), C)
    means, iou, _ = pixels.scores(matrix)
    assert len(ious) == 5 and len(recalls) == 4 and iou[5].isnan() and iou[4] == 0
    expected = {"mIoU": np.mean(ious), "mean_accuracy": np.mean(recalls)}
    expected["pixel_accuracy"] = np.mean([a == b for a, b in pairs])
    assert means == pytest.approx(expected)


class ReadsColour(torch.nn.Module):
    def logits(self, rgb):
        assert not self.training  # BatchNorm's means are those of training
        return -(rgb[:, :1].float() - 100 * torch.arange(3).view(1, 3, 1, 1)).abs()


def folder(root, sizes, split="val", classes=3, dtype=np.uint8):
    """Images of one colour each, with labels of that class and an unlabelled edge."""
    for i, (h, w) in enumerate(sizes):
        for name in ("rgb", "semantic"):
            (root / split / name).mkdir(parents=True, exist_ok=True)
        labels = np.full((h, w), i % classes, dtype)
        labels[:3] = 255
        Image.fromarray(np.full((h, w, 3), 100 * (i % classes), np.uint8)).save(
            root / split / "rgb" / f"{i}.png")  # fmt: skip
        Image.fromarray(labels).save(root / split / "semantic" / f"{i}.png")


def test_Whole__images_cover_the_crop_and_labels_of_16_bits_are_uint8(tmp_path):
    """Torch 2.6 indexes with no other unsigned type."""
    folder(tmp_path, [(30, 70)] * 2, dtype=np.uint16)
    args = (str(tmp_path), "val", 32, 4, ("rgb", "semantic"), (1, 1), False, 0)
    dataset = data.open_dataset(*args, label_stride=1, semantic_classes=3)
    assert dataset.load(1)[1]["semantic"].dtype != np.uint8
    labels = pixels.Whole(config("--data", tmp_path, "--classes", 3), dataset)[1]["semantic"]
    assert labels.dtype == torch.uint8 and labels.shape == (30, 70)
    assert (labels[:3] == 255).all() and (labels[3:] == 1).all()
    for evaluation, size in (("slide", (32, 75)), ("whole", (32, 32)), ("crop", (32, 32))):
        cfg = config("--data", tmp_path, "--classes", 3, "--evaluation", evaluation)
        assert pixels.Whole(cfg, dataset)[1]["rgb"].shape == (3, *size)  # of 30 x 70


@pytest.mark.parametrize("evaluation, dtype", [
    ("slide", np.uint8), ("whole", np.uint16), ("crop", np.uint8),
])  # fmt: skip
def test_report__reads_all_images_at_their_own_size(tmp_path, evaluation, dtype):
    """`crop`: labels at the crop's, 32 x 32, as SemanticMIM's probe is scored at 448 x 448."""
    folder(tmp_path, [(30, 70), (90, 41), (32, 32), (400, 20), (30, 70), (7, 5)], dtype=dtype)
    (tmp_path / "val" / "rgb" / "x.png").write_bytes(b"broken")
    (tmp_path / "val" / "semantic" / "x.png").write_bytes(b"never read")
    (tmp_path / "classes.txt").write_text("black\ngrey\nlight\n")
    cfg = config("--data", tmp_path, "--classes", 3, "--evaluation", evaluation)
    world = World("cpu", "fp32")
    dataset = open_data(cfg, world, tmp_path, "val", **segment.samples(cfg))
    segment.report(ReadsColour(), dataset, cfg, world, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["mIoU"] == result["pixel_accuracy"] == 1
    assert (result["images"], result["unreadable"], result["classes_seen"]) == (6, 1, 3)
    rows = (tmp_path / "classes.csv").read_text().splitlines()
    pixels = 27 * 70 + 397 * 20  # images 0 and 3
    if evaluation == "crop":
        pixels = (32 - 3) * 32 + 32 * 32  # 3 rows of 30 are those below 3.2 of 32; 3 of 400: none
    assert len(rows) == 4 and rows[1] == f"0,black,1.0000,1.0000,{pixels},{pixels}"
