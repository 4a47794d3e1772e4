"""Map files, their scores, and the recipe regions."""

from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

import engine
import files
from tools import map_files, map_scores, regions
from tools.map_scores import Scores

pytestmark = pytest.mark.slow

IDS = np.arange(256, dtype=np.uint8).reshape(8, 32)


def chunk(png, name):
    """The data of a PNG's first chunk of a name."""
    at = png.index(name)
    return png[at + 4 : at + 4 + int.from_bytes(png[at - 4 : at], "big")]


@pytest.mark.parametrize("ids", [IDS, IDS // 200, IDS.astype(np.uint16) * 257])
def test_encode__keeps_every_id(ids):
    png = map_files.encode(ids)
    assert np.array_equal(files.decode_map(np.frombuffer(png, np.uint8)), ids)
    assert (png[24], png[25]) == ((8, 3) if ids.dtype == np.uint8 else (16, 0))


def test_encode__has_no_row_filters_and_distinct_colours():
    import zlib

    ids = np.random.default_rng(0).integers(0, 5, (40, 60), dtype=np.uint8).repeat(3, 1)
    png = map_files.encode(ids)
    rows = np.frombuffer(zlib.decompress(chunk(png, b"IDAT")), np.uint8).reshape(40, 181)
    assert (rows[:, 0] == 0).all() and np.array_equal(rows[:, 1:], ids)
    colours = np.frombuffer(chunk(png, b"PLTE"), np.uint8).reshape(-1, 3)
    assert len(np.unique(colours, axis=0)) > 200
    assert colours[0].tolist() == [0, 0, 0] and colours[255].tolist() == [255] * 3


def test_convert__rewrites_maps_to_the_same_ids(tmp_path, capsys):
    maps = {
        "train/instance/a/0.png": IDS,
        "train/instance/a/1.png": (IDS // 3).astype(np.uint16),
        "train/instance/a/2.png": np.where(IDS > 250, np.uint16(65535), IDS % 9),
        "train/instance/a/3.png": IDS.astype(np.uint16),  # 255 is an instance there
        "val/semseg/4.png": IDS,
    }
    for name, ids in maps.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(ids).save(tmp_path / name)
    assert map_files.convert(str(tmp_path)) == 0
    said = capsys.readouterr().out.splitlines()
    assert "1 ids above 254, left as they are, 3 rewritten; " in said[0] and len(said) == 2
    for name, ids in maps.items():
        data = files.read_bytes(str(tmp_path / name))
        found = files.decode_map(data)
        wide = name.endswith("3.png")
        assert np.array_equal(found, ids if wide else np.minimum(ids, 255)), name
        assert found.dtype == (np.uint16 if wide else np.uint8) and data[25] == (0 if wide else 3)
    map_files.convert(str(tmp_path))
    assert "3 had one, 1 ids above 254" in capsys.readouterr().out
    (tmp_path / "val/semseg/4.png").write_bytes(b"broken")
    with pytest.raises(engine.UserError, match="4.png: not a PNG file"):
        map_files.convert(str(tmp_path))
    with pytest.raises(engine.UserError, match="no maps in"):
        map_files.convert(str(tmp_path / "train"))


def test_read__an_error_without_words_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "decode_map", mock.Mock(side_effect=MemoryError))
    map_files.write(tmp_path / "x.png", b"")
    with pytest.raises(engine.UserError, match="x.png: MemoryError$"):
        map_files.read(tmp_path / "x.png")


# ------------------------------------------------------------------------------------------ scores


def naive_segments(instance, semantic):
    """{name: (pixels as a set, class)}, and the void."""
    found, void = {}, set()
    top = 255 if instance.dtype == np.uint8 else 65535
    for at in np.ndindex(instance.shape):
        i, s = int(instance[at]), int(semantic[at])
        if i == top or (i == 0 and s == 255):
            void.add(at)
        else:
            found.setdefault(("thing", i) if i else ("stuff", s), {}).setdefault(s, set()).add(at)
    out = {}
    for name, parts in found.items():
        votes = {s: len(p) for s, p in parts.items() if s != 255}
        pixels = set().union(*parts.values())
        if votes:
            out[name] = pixels, min(votes, key=lambda s: (-votes[s], s))
        else:
            void |= pixels
    return out, void


def naive(pairs):
    """Panoptic quality as arXiv 1801.00868 writes it, over segments as sets of pixels."""
    sums, recalls = {}, []
    for truth, found in pairs:
        (a, void), (b, _) = naive_segments(*truth), naive_segments(*found)
        hit_a, hit_b = set(), set()
        for k, (p, c) in a.items():
            for m, (q, d) in b.items():
                iou = len(p & q) / len((p | q) - (q & void))
                if c == d and iou > 0.5:
                    hit_a.add(k), hit_b.add(m)
                    sums.setdefault(c, [0, 0, 0, 0])
                    sums[c][0] += iou
                    sums[c][1] += 1
        for k in a.keys() - hit_a:
            sums.setdefault(a[k][1], [0, 0, 0, 0])[3] += 1
        for m in b.keys() - hit_b:
            if len(b[m][0] & void) <= 0.5 * len(b[m][0]):
                sums.setdefault(b[m][1], [0, 0, 0, 0])[2] += 1
        for i in set(truth[0].ravel().tolist()) - {0, 255}:
            p = truth[0] == i
            others = set(found[0].ravel().tolist()) - {0, 255}
            best = max(
                ((p & (q := found[0] == j)).sum() / (p | q).sum() for j in others), default=0
            )
            recalls += [best >= t / 100 for t in range(50, 100, 5)]
    quality = [s / (tp + fp / 2 + fn / 2) for s, tp, fp, fn in sums.values()]
    return 100 * np.mean(quality), 100 * np.mean(recalls)


def pictures(seed, n=6):
    """Pairs of maps that overlap: blocks, shifted by a pixel or two, with void."""
    draw, out = np.random.default_rng(seed), []
    for _ in range(n):
        instance = np.zeros((12, 14), np.uint8)
        semantic = draw.integers(0, 2, (3, 2)).repeat(4, 0).repeat(7, 1).astype(np.uint8)
        for k in range(1, 4):
            y, x = draw.integers(0, 8, 2)
            instance[y : y + 5, x : x + 5] = k
            semantic[y : y + 5, x : x + 5] = draw.integers(2, 4)
        semantic[draw.random((12, 14)) < 0.1] = 255
        instance[draw.random((12, 14)) < 0.03] = 255
        shift = tuple(draw.integers(0, 3, 2))
        moved = [np.roll(x, shift, (0, 1)) for x in (instance, semantic)]
        out.append(((instance, semantic), tuple(moved)))
    return out


@pytest.mark.parametrize("seed", range(4))
def test_scores__equal_naive_sets_of_pixels(seed):
    pairs, scores = pictures(seed), Scores()
    for pair in pairs:
        scores.add(*pair)
    got, (quality, recall) = scores.summary(), naive(pairs)
    assert got["PQ"] == pytest.approx(quality) and got["AR"] == pytest.approx(recall)
    assert 5 < quality < 95 and 5 < recall < 95
    hit, union = np.zeros(256), np.zeros(256)
    for (_, t), (_, f) in pairs:
        for c in range(255):
            hit[c] += ((t == c) & (f == c)).sum()
            union[c] += (((t == c) | (f == c)) & (t != 255)).sum()
    assert got["mIoU"] == pytest.approx(100 * (hit[union > 0] / union[union > 0]).mean())


def test_scores__worked_by_hand():
    """Two things of 10 pixels: one found to 8 of 10 (IoU 0.8), the other missed; stuff is right."""
    instance = np.array([[1] * 10, [2] * 10, [0] * 10], np.uint8)
    semantic = np.array([[5] * 10, [5] * 10, [9] * 10], np.uint8)
    found = np.array([[7] * 8 + [255] * 2, [255] * 10, [0] * 10], np.uint8)
    scores = Scores()
    scores.add((instance, semantic), (found, np.where(found == 255, 255, semantic)))
    got = scores.summary()
    assert got["PQ"] == pytest.approx(100 * (0.8 / 1.5 + 1) / 2)  # class 5: one hit, one miss
    assert got["SQ"] == pytest.approx(90) and got["RQ"] == pytest.approx(100 * (1 / 1.5 + 1) / 2)
    assert got["mIoU"] == pytest.approx(100 * (8 / 20 + 1) / 2)
    assert got["AR"] == pytest.approx(100 * 7 / 20)  # IoU 0.8 passes 0.5 .. 0.8, of two


def test_scores__void_takes_no_part():
    """What covers mostly void is no mistake; an instance's class is that of its labelled pixels."""
    instance = np.array([[1] * 10, [0] * 10], np.uint8)
    semantic = np.array([[4] * 4 + [255] * 6, [255] * 6 + [3] * 4], np.uint8)
    found = np.array([[1] * 10, [2] * 9 + [0]], np.uint8)
    scores = Scores()
    scores.add((instance, semantic), (found, np.array([[4] * 10, [6] * 9 + [3]], np.uint8)))
    assert scores.tp[4] == 1 and scores.iou[4] == 1
    assert scores.fp[6] == 0 and scores.fn[3] == 1  # 6 of its 9 pixels are void


def test_scores__16_bit_ids_and_empty_maps():
    wide = np.array([[300, 300, 255, 65535]], np.uint16)
    semantic = np.zeros((1, 4), np.uint8)
    scores = Scores()
    scores.add((wide, semantic), (np.array([[1, 1, 2, 255]], np.uint8), semantic))
    assert len(scores.best) == 2 and scores.summary()["AR"] == scores.summary()["PQ"] == 100
    assert np.isnan(list(Scores().summary().values())).all()


def test_scores_majority__a_class_is_renamed_and_unlabelled_stays():
    truth, found = np.array([[3, 3, 3, 8, 8, 255]]), np.array([[7, 7, 1, 7, 255, 2]])
    scores, none = Scores(), np.zeros((1, 6), np.uint8)
    scores.add((none, truth.astype(np.uint8)), (none, found.astype(np.uint8)))
    names = scores.majority()
    assert names[[7, 1, 2, 255, 0]].tolist() == [3, 3, 255, 255, 255]


def save(root, maps, split="train"):
    for (g, name), ids in maps.items():
        map_files.write(root / split / g / name, map_files.encode(ids))


def test_compare__renames_clusters_and_leaves_out_what_is_not_there(tmp_path, capsys):
    truth, ids = tmp_path / "truth", {}
    for i, ((instance, semantic), _) in enumerate(pictures(0)):
        ids |= {("instance", f"{i}.png"): instance, ("semantic", f"{i}.png"): semantic}
    save(truth, ids)
    clusters = {}
    for (g, name), x in ids.items():
        if name == "5.png":
            x = np.full((1, 1), 255, np.uint8)  # of an image that could not be read
        elif g == "semantic":
            x = np.where(x == 255, x, 77 - x).astype(np.uint8)
        clusters |= {(g, name): x} if name != "4.png" else {}
    save(tmp_path / "out", clusters)
    assert map_scores.compare(str(tmp_path / "out"), str(truth)) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("train: 4 images, ")
    assert "as they are: PQ 0.0 " in said[1] and "mIoU 0.0  AR 100.0" in said[1]
    assert "renamed by train: PQ 100.0 " in said[2] and "mIoU 100.0  AR 100.0" in said[2]
    save(truth, ids, "val")  # where the clusters are others
    save(tmp_path / "out", {k: x // 16 if k[0] == "semantic" else x for k, x in ids.items()}, "val")
    map_scores.compare(str(tmp_path / "out"), str(truth))
    said = capsys.readouterr().out.splitlines()
    assert said[2].startswith("  classes renamed by train: PQ 100.0 ")
    assert said[3].startswith("val: 6 images") and "renamed by train: PQ 0.0 " in said[5]
    save(tmp_path / "out", {("semantic", "0.png"): np.zeros((3, 3), np.uint8)})
    with pytest.raises(engine.UserError, match="train/0.png: maps of sizes"):
        map_scores.compare(str(tmp_path / "out"), str(truth))
    with pytest.raises(engine.UserError, match="neither train nor val in common"):
        map_scores.compare(str(tmp_path / "none"), str(truth))
    save(tmp_path / "half", {("semantic", "0.png"): IDS})
    with pytest.raises(engine.UserError, match="no instance maps in both"):
        map_scores.compare(str(tmp_path / "half"), str(truth))


# ----------------------------------------------------------------------------------------- regions


def scene(height=60, width=80):
    """Sky over grass, and a red square in the middle."""
    rgb = torch.empty(3, height, width, dtype=torch.uint8)
    rgb[:, : height // 2] = torch.tensor([120, 170, 240], dtype=torch.uint8)[:, None, None]
    rgb[:, height // 2 :] = torch.tensor([50, 140, 40], dtype=torch.uint8)[:, None, None]
    y, x = height // 3, width // 3
    rgb[:, y : y + height // 3, x : x + width // 3] = torch.tensor([220, 20, 20])[:, None, None]
    return rgb


@pytest.mark.parametrize("size", [(60, 80), (300, 400), (500, 20)])
def test_regions_describe__finds_the_parts_of_a_scene(size):
    pytest.importorskip("skimage")
    found, features, border = regions.describe(scene(*size))
    assert max(found.shape) == min(max(size), 128) and features.shape == (len(border), 16)
    assert np.isfinite(features).all() and border.sum() == pytest.approx(1)
    assert set(found.ravel()) == set(range(len(border)))
    if min(size) > 50:
        h, w = found.shape
        picks = [found[2, 2], found[h // 2, w // 2], found[h - 3, 2]]
        assert len(set(picks)) == 3
        light, a = features[picks][:, 0], features[picks][:, 1]
        assert light[0] > light[1] and a[1] > 40 and a[2] < -20  # L and a of blue, red, green
        assert border[picks[1]] == 0 and features[picks[0], -1] < features[picks[2], -1]


def test_regions_describe__texture_tells_stripes_apart():
    pytest.importorskip("skimage")
    stripes = torch.zeros(3, 64, 64, dtype=torch.uint8) + 100
    stripes[:, ::4] = stripes[:, 1::4] = 130
    upright, flat = (regions.describe(x)[1].mean(0) for x in (stripes.mT.contiguous(), stripes))
    assert flat[6:14].argmax() == 4 and upright[6:14].argmax() == 0  # gradients at 90, 0 degrees
    assert flat[14] > regions.describe(scene())[1][0, 14]


def test_regions_maps__ground_is_background_and_alike_regions_share_a_class():
    pytest.importorskip("skimage")
    images = [scene(), scene().flip(-1), scene(90, 60), scene(120, 160)]
    book = regions.learn(np.concatenate([regions.describe(x)[1] for x in images]), 5)
    classes = set()
    for rgb in images:
        instance, semantic = regions.maps(book, rgb)
        h, w = rgb.shape[1:]
        assert instance.shape == semantic.shape == (h, w)
        assert instance.dtype == semantic.dtype == np.uint8
        assert instance[0, 0] == instance[-1, -1] == 0 and instance[h // 2, w // 2] == 1
        classes.add(picks := tuple(semantic[at] for at in ((1, 1), (h // 2, w // 2), (h - 2, 1))))
        assert len(set(picks)) == 3
    assert len(classes) < 3  # of four images
    assert np.array_equal(
        regions.learn(book[2:].repeat(4, 0), 3), regions.learn(book[2:].repeat(4, 0), 3)
    )


def test_regions_maps__numbers_instances_by_area_up_to_254(monkeypatch):
    pytest.importorskip("skimage")
    cells = np.arange(400).reshape(20, 20).repeat(4, 0).repeat(4, 1)
    cells[:12, :4] = 20  # the largest
    cells = np.unique(cells, return_inverse=True)[1].reshape(80, 80)
    n = cells.max() + 1
    made = cells, np.zeros((n, 16), np.float32), np.zeros(n)
    monkeypatch.setattr(regions, "describe", lambda rgb: made)
    book = np.concatenate([np.zeros((1, 16)), np.ones((1, 16)), np.eye(2, 16)]).astype(np.float32)
    instance, semantic = regions.maps(book, torch.zeros(3, 160, 80, dtype=torch.uint8))
    assert instance[0, 0] == 1 and (instance == 1).sum() == 2 * 48
    assert len(np.unique(instance)) == 255 and (instance == 255).any() and not (instance == 0).any()
    assert not semantic.any()


def test_regions_learn__refuses_more_clusters_than_regions():
    with pytest.raises(engine.UserError, match="4 regions in all: --clusters 5"):
        pytest.importorskip("scipy")
        regions.learn(np.zeros((4, 16), np.float32), 5)
