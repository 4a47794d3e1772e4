"""clips.py: lists, frames, sampling in time and space, bad clips."""

import os
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import batches, smooth, write

import clips
from clips import ClipDataset, Frames, dense, multi_scale_crop, segments, side_crops
from data import FileList, UserError
from files import Unreadable
from motion import MIRROR

pytestmark = pytest.mark.slow


def write_clip(folder, frames, height=40, width=56, first=1):
    """Frame n is plain but for its number: red is 10 n."""
    for n in range(frames):
        array = np.full((height, width, 3), 100, np.uint8)
        array[..., 0] = 10 * n
        write(f"{folder}/{first + n:06d}.png", array)


@pytest.fixture
def root(tmp_path):
    for i, name in enumerate(("a/x", "a/y", "b/deep/z", "b/w")):
        write_clip(f"{tmp_path}/train/{name}", 5 + 4 * i)
    write_clip(f"{tmp_path}/val/c/v", 3)
    return str(tmp_path)


def dataset(root, split="train", files=None, **options):
    options = {"frames": 4, "stride": 1, **options}
    return ClipDataset(root, split, files, 16, **options)


def times(sample) -> list[int]:
    """Which frames a sample of `write_clip`'s holds."""
    return (sample["rgb"][..., 0, 8, 8] / 10).round().int().tolist()


# --------------------------------------------------------------------------------- lists of clips


def test_scan__clips_classes_links_and_what_is_skipped(root):
    write_clip(f"{root}/train/loose", 2)
    for name in ("a/.hidden/1.png", "a/.x.part/1.png"):
        write(f"{root}/train/{name}", smooth(8, 8))
    os.makedirs(f"{root}/train/empty/nothing")
    open(f"{root}/train/a/notes.txt", "w").close()
    os.symlink(f"{root}/train", f"{root}/train/b/loop")
    os.symlink(f"{root}/train/a/x", f"{root}/train/b/link")
    files = clips.scan(root, "train")
    names = [files.name(i) for i in range(len(files))]
    assert names == ["a/x", "a/y", "b/deep/z", "b/link", "b/w", "loose"]
    assert files.classes == ["a", "b", "c"]  # of train and val together
    assert files.labels.tolist() == [0, 0, 1, 1, 1, -1]
    assert clips.scan(root, "val").labels.tolist() == [2]
    saved = files.save(f"{root}/list")
    assert [pickle.loads(pickle.dumps(saved)).name(i) for i in range(6)] == names
    assert FileList.open(f"{root}/list").folders == {"rgb": "train"}


def test_scan__says_what_it_looked_for(root, tmp_path):
    os.makedirs(f"{root}/void/train")
    write(f"{root}/flat/train/1.jpg", smooth(8, 8))
    for place, words in (
        (f"{root}/none", "there is no folder .*none/train"),
        (f"{root}/void", "no folders of frames .jpg"),
        (f"{root}/flat", "frames lie in .*flat/train itself"),
    ):
        with pytest.raises(UserError, match=words) as error:
            clips.scan(place, "train")
        assert "CLIP/000001.jpg" in str(error.value) and "--data shapes" in str(error.value)


def test_frames__by_number_or_by_name(tmp_path):
    write_clip(f"{tmp_path}/nine", 4, first=8)  # 8, 9, 10, 11 in order, though not as words
    for name in ("8", "9", "10", "11"):
        os.rename(f"{tmp_path}/nine/{int(name):06d}.png", f"{tmp_path}/nine/{name}.png")
    frames = Frames(f"{tmp_path}/nine")
    assert len(frames) == 4
    assert [int(frames[i][0, 0, 0]) for i in range(4)] == [0, 10, 20, 30]
    open(f"{tmp_path}/nine/._8.png", "w").close()  # as macOS leaves
    os.remove(f"{tmp_path}/nine/9.png")
    frames = Frames(f"{tmp_path}/nine")
    assert len(frames) == 4 and int(frames[2][0, 0, 0]) == 20  # its neighbours stay
    with pytest.raises(Unreadable, match="frame 9 is missing"):
        frames[1]
    write_clip(f"{tmp_path}/named", 3)
    for n, name in enumerate("bca"):
        os.rename(f"{tmp_path}/named/{n + 1:06d}.png", f"{tmp_path}/named/{name}.png")
    frames = Frames(f"{tmp_path}/named")
    assert [int(frames[i][0, 0, 0]) for i in range(3)] == [20, 0, 10]
    with pytest.raises(Unreadable, match="No such file"):
        Frames(f"{tmp_path}/none")


# ------------------------------------------------------------------------------ sampling in time


def test_dense__is_videomae_s_on_kinetics():
    """Training: start in 0..n - 64; testing: of every 4th frame, int(view * (m - 16) / 4) on."""
    for length in (64, 65, 100, 301):
        room = length - 64
        starts = {dense(length, 16, 4, s / 1000)[0] for s in range(1000)}
        assert starts == set(range(room + 1))
        assert dense(length, 16, 4, 0.999)[0] == room
        found = dense(length, 16, 4, 0.37)
        assert found == list(range(found[0], found[0] + 64, 4))
        strided = list(range(0, length, 4))
        for view in range(5):
            start = int(view * max((len(strided) - 16) / 4, 0))
            assert dense(length, 16, 4, view / 4, True) == strided[start : start + 16]


@pytest.mark.parametrize("length", [1, 3, 17, 63])
def test_dense__a_short_clip_repeats_its_last_frame(length):
    strided = list(range(0, length, 4))
    expected = (strided + strided[-1:] * 16)[:16]
    for share in (0.0, 0.5, 0.999):
        assert dense(length, 16, 4, share) == dense(length, 16, 4, share, True) == expected
    assert dense(length, 16, 0, 0.999) == [length - 1] * 16  # one frame, again and again


def test_segments__is_videomae_s_on_ssv2():
    """Testing, 2 views: int(n / 16 * x) and int(n / 32 + n / 16 * x); training: one a part."""
    for length in (16, 37, 48, 200):
        tick = length / 16
        assert segments(length, 16, [0.0] * 16) == [int(tick * x) for x in range(16)]
        assert segments(length, 16, [0.5] * 16) == [int(tick / 2 + tick * x) for x in range(16)]
        drawn = segments(length, 16, [0.999] * 16)
        assert all(int(i * tick) <= at < (i + 1) * tick for i, at in enumerate(drawn))
    assert segments(3, 8, [0.5] * 8) == [0, 0, 0, 1, 1, 2, 2, 2]


def test_clip_dataset__times(root):
    files = clips.scan(root, "train")
    long = next(i for i in range(4) if files.name(i) == "b/w")  # 17 frames
    middle = dataset(root, files=files, train=False)[0, long]
    assert times(middle) == [6, 7, 8, 9]
    views = dataset(root, files=files, train=False, views=(3, 2))[0, long]
    assert views["rgb"].shape == (6, 4, 3, 16, 16)
    assert times(views) == [[0, 1, 2, 3], [6, 7, 8, 9], [13, 14, 15, 16]] * 2
    spread = dataset(root, files=files, train=False, views=(2, 1), sampling="segments")[0, long]
    assert times(spread) == [[0, 4, 8, 12], [2, 6, 10, 14]]
    drawn = [times(dataset(root, files=files)[e, long]) for e in range(20)]
    assert all(t == list(range(t[0], t[0] + 4)) for t in drawn) and len({t[0] for t in drawn}) > 5
    drawn = [times(dataset(root, files=files, sampling="segments")[e, long]) for e in range(20)]
    assert all(int(i * 4.25) <= at < (i + 1) * 4.25 for t in drawn for i, at in enumerate(t))
    still = dataset(root, files=files, stride=0)
    assert all(len(set(times(still[e, long]))) == 1 for e in range(5))
    assert len({times(still[e, long])[0] for e in range(20)}) > 5
    still = dict(files=files, stride=0, sampling="segments")  # one picture is one there, too
    assert all(len(set(times(dataset(root, **still)[e, long]))) == 1 for e in range(5))
    still = dataset(root, **still, train=False, views=(2, 1))[0, long]
    assert times(still) == [[0] * 4, [16] * 4]


# ------------------------------------------------------------------------------ sampling in space


def test_multi_scale_crop__is_videomae_s():
    """Its 10 pairs of sides, at most one step apart, and 13 places in quarters of the room."""
    rng = np.random.default_rng(0)
    found = {multi_scale_crop(rng.random, 240, 320) for _ in range(4000)}
    sides = [240, 210, 180, 158]
    pairs = {(h, w) for i, h in enumerate(sides) for j, w in enumerate(sides) if abs(i - j) < 2}
    assert {box[2:] for box in found} == pairs and len(pairs) == 10
    places = {(top, left) for top, left, h, w in found if (h, w) == (180, 180)}
    down, right = 15, 35  # quarters of 60 and 140
    corners = [(0, 0), (0, 4), (4, 0), (4, 4), (2, 2), (0, 2), (2, 0), (4, 2), (2, 4)]
    corners += [(1, 1), (1, 3), (3, 1), (3, 3)]
    assert places == {(a * down, b * right) for a, b in corners}
    assert multi_scale_crop(lambda: 0.999, 1, 1) == (0, 0, 1, 1)


def test_side_crops__three_along_the_longer_side():
    assert side_crops(240, 320, 3) == [(0, 0, 240, 240), (0, 40, 240, 240), (0, 80, 240, 240)]
    assert side_crops(50, 20, 3) == [(0, 0, 20, 20), (15, 0, 20, 20), (30, 0, 20, 20)]
    assert side_crops(30, 30, 1) == [(0, 0, 30, 30)] and side_crops(20, 50, 1) == [(0, 15, 20, 20)]


@pytest.mark.parametrize("crop", ["multi-scale", "resized"])
def test_clip_dataset__one_crop_and_flip_for_all_frames(tmp_path, crop):
    still = smooth(48, 64, 3)
    for n in range(6):
        write(f"{tmp_path}/train/s/{n:03d}.png", still)
    found = [dataset(str(tmp_path), crop=crop)[e, 0]["rgb"] for e in range(12)]
    assert all(torch.equal(clip, clip[:1].expand_as(clip)) for clip in found)
    assert len({clip.numpy().tobytes() for clip in found}) == 12 or crop == "multi-scale"
    plain = [dataset(str(tmp_path), crop=crop, flip=False)[e, 0]["rgb"] for e in range(12)]
    same = [torch.equal(a, b) for a, b in zip(found, plain)]
    mirrored = [torch.equal(a, b.flip(-1)) for a, b in zip(found, plain)]
    assert all(a or b for a, b in zip(same, mirrored)) and any(same) and any(mirrored)


def test_clip_dataset__crops_equal_pillow_s(tmp_path):
    for n in range(4):
        write(f"{tmp_path}/val/s/{n:03d}.png", smooth(48, 64, n))
    for views, boxes in (
        (None, [(8, 0, 56, 48)]),
        ((1, 3), [(0, 0, 48, 48), (8, 0, 56, 48), (16, 0, 64, 48)]),
    ):
        looked = dataset(str(tmp_path), "val", train=False, views=views)
        rgb = looked[0, 0]["rgb"]
        assert all(torch.equal(looked[e, 0]["rgb"], rgb) for e in range(8))  # never mirrored
        rgb = rgb if views else rgb[None]
        for view, box in zip(rgb, boxes, strict=True):
            for n in range(4):
                want = Image.fromarray(smooth(48, 64, n)).crop(box)
                want = want.resize((16, 16), Image.BILINEAR)
                error = view[n].permute(1, 2, 0).int() - torch.from_numpy(np.array(want)).int()
                assert error.abs().max() <= 1


def test_clip_dataset__a_resized_crop_has_the_given_area(tmp_path):
    ramp = np.broadcast_to(np.arange(0, 240, 5, dtype=np.uint8)[:, None], (48, 48, 3))
    write(f"{tmp_path}/train/s/1.png", ramp)
    small = dataset(str(tmp_path), crop="resized", scale=(0.04, 0.05))
    for epoch in range(10):  # at most sqrt(.05 * 4 / 3) of the side
        rgb = small[epoch, 0]["rgb"].int()
        assert 20 < rgb.max() - rgb.min() < 0.26 * 240 + 10


def test_open_dataset__moving_scenes_by_split_size_and_seed():
    def label_and_clip(split, seed, train=True, flip=True):
        place = ("shapes", split, 16, 8, ("rgb",), (0.08, 1.0), train)
        sample = clips.open_dataset(*place, seed, frames=2, stride=1, flip=flip)[0, 3]
        return int(sample["label"]), sample["rgb"]

    (a, x), (b, y) = label_and_clip("train", 0), label_and_clip("train", 7)
    assert b in (a, MIRROR[a]) and not torch.equal(x, y)  # the same scene, seen differently
    assert x.shape == (2, 3, 16, 16)
    mirrored = set()
    for seed in range(8):
        label, clip = label_and_clip("train", seed)
        true, plain = label_and_clip("train", seed, flip=False)
        mirrored |= {not (same := torch.equal(clip, plain))}
        assert (label, True) == (true, same) or torch.equal(clip.flip(-1), plain)
    assert mirrored == {True, False}
    assert torch.equal(label_and_clip("val", 0, False)[1], label_and_clip("val", 7, False)[1])
    still = clips.open_dataset("shapes", "val", 16, 8, ("rgb",), (1, 1), False, 0, stride=0)[0, 3]
    change = still["rgb"].int() - still["rgb"][:1].int()
    assert len(change) == 8 and change.abs().max() <= 13  # the grain of a frame alone


def test_open_dataset__a_folder_s_settings(root):
    place = (root, "train", 16, 8, ("rgb",), (0.3, 0.4), False, 7)
    found = clips.open_dataset(*place, crop_pct=0.5)
    assert (found.scale, found.train, found.seed, found.crop_pct) == ((0.3, 0.4), False, 7, 0.5)


# ----------------------------------------------------------------------------------- bad clips


def test_clip_dataset__a_bad_clip_is_replaced_under_its_own_seed(root):
    good = dataset(root)
    seed = good[2, 0]["seed"]
    for damage in ("corrupt", "missing", "sizes", "gone"):
        place = f"{root}/train/a/x"
        write_clip(place, 5)
        files = clips.scan(root, "train")
        if damage == "corrupt":
            with open(f"{place}/000003.png", "r+b") as f:
                f.truncate(40)
        elif damage == "missing":
            os.remove(f"{place}/000003.png")
        elif damage == "sizes":
            write(f"{place}/000003.png", smooth(20, 20))
        else:
            for name in os.listdir(place):
                os.remove(f"{place}/{name}")
        sample = dataset(root, files=files)[2, 0]
        assert sample["bad"] == 0 and sample["label"] == 0 and sample["seed"] == seed, damage
        fresh = dataset(root, files=files)
        assert torch.equal(sample["rgb"], fresh.clip(*fresh.load(1), int(seed))["rgb"])
        assert dataset(root, files=files)[2, 1]["bad"] == -1


def test_check__counts_and_refuses_nothing_but_bad_clips(root):
    assert clips.check(dataset(root)).startswith("4 of 4 samples checked, 0 unreadable")
    for place, _, names in os.walk(f"{root}/train"):
        for name in names:
            open(f"{place}/{name}", "w").close()
    with pytest.raises(UserError, match="none of 4 .* can be read"):
        clips.check(dataset(root))
    assert "in a row cannot be read" in dataset(root)[0, 0]["error"]


def test_clip_dataset__workers_and_order_do_not_matter(root):
    for a, b in zip(batches(dataset(root), 0), batches(dataset(root), 2), strict=True):
        assert a["rgb"].shape == (4, 4, 3, 16, 16) and a["rgb"].dtype == torch.uint8
        assert all(torch.equal(a[k], b[k]) for k in a)
