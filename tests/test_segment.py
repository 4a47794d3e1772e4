"""Segmentation: recipes, crops, sliding windows, scores; test_segment_run.py has whole runs."""

import json

import data
import engine
import numpy as np
import pytest
import torch
from downstream import pixels, segment
from PIL import Image

SMALL = (
    "--data shapes --model tiny --method cfmae --encoder tiny --image-size 32 --batch-size 8 "
    "--iterations 20 --dim 16 --aux-dim 8 --workers 0 --device cpu --precision fp32 --log-every 4 "
    "--val-samples 8 --drop-path 0.2"
).split()


def config(*flags):
    return engine.parse(segment.Config, segment.PRESETS, "", [*SMALL, *map(str, flags)])


# ----------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("method, size, lr, decay", [
    ("cfmae", 512, 4e-4, 0.65),  # CFMAE Table 10, Sec. E.4
    ("semanticmim", 640, 3e-5, None),  # SemanticMIM Table 4; gives no layer decay
    ("mcmae", 512, 1e-4, 0.75),  # MCMAE Sec. 3.3
    ("coma_dyvit", 512, None, None),  # CoMA Table 3
])  # fmt: skip
def test_Config__has_the_papers_upernet(method, size, lr, decay):
    argv = ["--method", method, "--data", "x"]
    cfg = engine.parse(segment.Config, segment.PRESETS, "", argv)
    assert (cfg.crop, cfg.batch_size, cfg.weight_decay) == ((size, size), 16, 0.05)
    assert (cfg.total_steps(1263), cfg.beta1, cfg.beta2) == (160_000, 0.9, 0.999)
    assert cfg.drop_path == 0.1 and cfg.photometric and cfg.evaluation == "slide"
    assert lr in (None, cfg.lr) and decay in (None, cfg.layer_decay) and cfg.classes == 150
    warm = cfg.learning_rate(1499, 1263)  # 1,500 steps up, then a line to 0
    assert warm == pytest.approx(cfg.lr, rel=0.01)
    assert cfg.learning_rate(0, 1263) == pytest.approx(cfg.lr / 1500)
    assert cfg.learning_rate(80_000, 1263) == pytest.approx(cfg.lr / 2)
    assert cfg.learning_rate(159_999, 1263) == pytest.approx(cfg.lr / 160_000)


def test_Config__has_semanticmims_linear_probe():
    argv = "--method semanticmim --protocol linear --data x".split()
    cfg = engine.parse(segment.Config, segment.PRESETS, "", argv)
    found = cfg.crop, cfg.batch_size, cfg.total_steps(12), cfg.lr, cfg.weight_decay, cfg.layer
    assert found == ((448, 448), 120, 25 * 12, 0.01, 0, 6)  # Table 6
    assert (cfg.loss_size, cfg.classes, cfg.learning_rate(0, 12)) == (100, 21, 0.01)
    optimizer = cfg.optimizer([{"params": [torch.zeros(1)]}])
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.defaults["momentum"] == 0.9
    rates = [cfg.learning_rate(step, 12) for step in (239, 240, 299)]  # a tenth after 80 %
    assert rates == pytest.approx([0.01, 0.001, 0.001])
    assert not cfg.photometric and cfg.evaluation == "whole"


# ------------------------------------------------------------------------------------------- crops


def blocks(h=40, w=60):
    """An image whose colour says its label: blocks of 10 x 10 pixels."""
    labels = (np.arange(h)[:, None] // 10 * (w // 10) + np.arange(w) // 10).astype(np.uint8)
    labels[:10, :10] = 255
    rgb = torch.from_numpy(np.where(labels == 255, 250, labels * 10)).byte().repeat(3, 1, 1)
    return rgb, {"semantic": labels}


@pytest.mark.parametrize("crop", [(32, 32), (32, 64), (96, 64)])
def test_Augment__image_and_labels_stay_together(crop):
    cfg = config("--image-size", crop[0], "--crop-width", crop[1])
    augment, (rgb, maps) = pixels.Augment(cfg, True), blocks()
    views = [augment(rgb, maps, seed) for seed in range(40)]
    again = augment(rgb, maps, 3)
    assert all(torch.equal(views[3][k], again[k]) for k in again)
    padded = flipped = 0
    for view in views:
        assert view["rgb"].shape == (3, *crop) and view["semantic"].shape == crop
        labels, colour = view["semantic"].int(), view["rgb"][0].int()
        inside = labels != 255
        off = (colour - labels * 10).abs()[inside] > 4  # the resize mixes colours at edges alone
        assert off.float().mean() < 0.35
        flipped += bool((labels[inside.any(1)][0][inside.any(0)].diff() < 0).any())
        pad = (view["rgb"] == torch.tensor(pixels.MEAN_COLOUR).view(3, 1, 1)).all(0)
        padded += bool(pad.any())
        assert (view["semantic"][pad] == 255).all()
    assert 5 < flipped < 35 and padded > 5


@pytest.mark.parametrize("k", [2, 3])
def test_Augment__takes_the_label_in_the_middle_of_each_cell(k):
    labels = np.random.default_rng(0).integers(0, 16, (32 * k, 32 * k)).astype(np.uint8)
    rgb = torch.zeros(3, *labels.shape, dtype=torch.uint8)
    view = pixels.Augment(config(), False)(rgb, {"semantic": labels}, 0)
    assert np.array_equal(view["semantic"], labels[k // 2 :: k, k // 2 :: k])


def test_Augment__avoids_crops_that_one_class_fills():
    labels = np.zeros((64, 64), np.uint8)
    labels[:, 48:] = 1
    cfg = config("--scale-min", 1, "--scale-max", 2)
    views = [pixels.Augment(cfg, True)(torch.zeros(3, 64, 64).byte(), {"semantic": labels}, s)
             for s in range(30)]  # fmt: skip
    shares = [(v["semantic"] == 0).float().mean() for v in views]
    assert sum(s < 0.75 for s in shares) > 20


def test_distort__changes_each_property_half_of_the_time():
    grey, red = torch.full((3, 8, 8), 90).byte(), torch.full((3, 8, 8), 40).byte()
    red[0, :, :4] = 200
    assert torch.equal(pixels.distort(lambda: 0.9, red), red)  # nothing is drawn
    draws = [0.2, 1.0, 0.9, 0.9, 0.9]  # brightness alone: + 32
    assert (pixels.distort(iter(draws).__next__, grey) == 122).all()
    hue = pixels.distort(iter([0.9, 0.9, 0.9, 0.2, 1.0]).__next__, red)
    assert hue[1, 0, 0] > hue[2, 0, 0] and torch.equal(hue[:, :, 4:], red[:, :, 4:])  # to yellow
    views = [pixels.distort(pixels.random.Random(i).random, red) for i in range(64)]
    same = sum(torch.equal(v, red) for v in views)
    assert 0 < same < 16 and all(v.dtype == torch.uint8 for v in views)


@pytest.mark.parametrize("size, crop, expected", [
    ((480, 640), (512, 512), (512, 683)),
    ((640, 480), (512, 512), (683, 512)),
    ((100, 1000), (512, 512), (205, 2048)),  # 2048 x 512: the long side has its limit
    ((480, 640), (512, 768), (576, 768)),
])  # fmt: skip
def test_cover__short_side_becomes_the_crops(size, crop, expected):
    assert pixels.cover(size, crop) == expected


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


def test_Whole__labels_are_uint8_where_the_file_has_16_bits(tmp_path):
    """Torch 2.6 indexes with no other unsigned type."""
    folder(tmp_path, [(30, 70)] * 2, dtype=np.uint16)
    args = (str(tmp_path), "val", 32, 4, ("rgb", "semantic"), (1, 1), False, 0)
    dataset = data.open_dataset(*args, semantic_classes=3)
    assert dataset.load(1)[1]["semantic"].dtype != np.uint8
    labels = pixels.Whole(config("--data", tmp_path, "--classes", 3), dataset)[1]["semantic"]
    assert labels.dtype == torch.uint8 and labels.shape == (30, 70)
    assert (labels[:3] == 255).all() and (labels[3:] == 1).all()


@pytest.mark.parametrize("evaluation, dtype", [("slide", np.uint8), ("whole", np.uint16)])
def test_finish__reads_all_images_at_their_own_size(tmp_path, evaluation, dtype):
    folder(tmp_path, [(30, 70), (90, 41), (32, 32), (400, 20), (30, 70), (7, 5)], dtype=dtype)
    (tmp_path / "val" / "rgb" / "x.png").write_bytes(b"broken")
    (tmp_path / "val" / "semantic" / "x.png").write_bytes(b"never read")
    (tmp_path / "classes.txt").write_text("black\ngrey\nlight\n")
    cfg = config("--data", tmp_path, "--classes", 3, "--evaluation", evaluation)
    segment.finish(cfg, engine.World(cfg), ReadsColour(), tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["mIoU"] == result["pixel_accuracy"] == 1
    assert (result["images"], result["unreadable"], result["classes_seen"]) == (6, 1, 3)
    rows = (tmp_path / "classes.csv").read_text().splitlines()
    pixels = 27 * 70 + 397 * 20  # images 0 and 3
    assert len(rows) == 4 and rows[1] == f"0,black,1.0000,1.0000,{pixels},{pixels}"
