"""data.py: order and seeds, geometry, joint augmentation, workers (files: test_data_files.py)."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from multiprocessing import forkserver
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import RandomResizedCrop, v2

import data
from data import BatchSampler, FolderDataset, UserError, sample_seed

ALL = data.GRANULARITIES
BICUBIC = v2.InterpolationMode.BICUBIC


def smooth(height, width, seed=0):
    """A photograph-like image (H, W, 3) uint8."""
    cells = torch.rand(1, 3, 5, 7, generator=torch.Generator().manual_seed(seed))
    image = F.interpolate(cells, (height, width), mode="bicubic")[0].clamp(0, 1) * 255
    return image.byte().permute(1, 2, 0).numpy()


def write(path, array, **options):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Image.fromarray(array).save(path, **options)


def write_triplet(root, name, rgb, instance, semantic, split="train", suffix=".png"):
    write(f"{root}/{split}/rgb/{name}{suffix}", rgb)
    write(f"{root}/{split}/instance/{name}.png", instance)
    write(f"{root}/{split}/semantic/{name}.png", semantic)


@pytest.fixture
def triplets(tmp_path):
    """Eight images of several sizes with maps: 16-bit instances, 8-bit semantics, class folders."""
    rng = np.random.default_rng(0)
    for i in range(8):
        h, w = 40 + 9 * i, 90 - 7 * i
        instance = rng.integers(0, 40, (h // 8 + 1, w // 8 + 1), np.uint16)
        instance = np.where(instance > 30, 65535, instance * 300).astype(np.uint16)
        instance = instance.repeat(8, 0).repeat(8, 1)[:h, :w]
        semantic = rng.integers(0, 133, (h, w), np.uint8)
        name = f"{'ab'[i % 2]}/{i}"
        write_triplet(tmp_path, name, smooth(h, w, i), instance, semantic, suffix=".jpg")
    return str(tmp_path)


# seeds and batches


@pytest.mark.slow
def test_sample_seed__golden_and_without_collisions():
    assert data._mix(1234567 + data.GAMMA) == 6457827717110365317  # splitmix64's test vector
    assert sample_seed(0, 0, 0) == 1279368494785126216
    assert sample_seed(7, 3, 1_281_166) == 8608513877569843875
    assert sample_seed(2**40, 399, 5) == 3401248100427553803
    seeds = [sample_seed(0, epoch, index) for epoch in range(4) for index in range(50_000)]
    assert len(set(seeds)) == 200_000 and min(seeds) >= 0 and max(seeds) < 2**63
    bits = np.array(seeds[:100_000])[:, None] >> np.arange(63) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 0.01


def test_batch_sampler__is_the_described_slice_of_a_permutation():
    whole = BatchSampler(103, 12, seed=5, stop_step=20)
    epochs = [whole.indices(step) for step in range(16)]  # 8 steps an epoch
    for epoch in (0, 1):
        order = [i for batch in epochs[8 * epoch : 8 * epoch + 8] for e, i in batch if e == epoch]
        assert len(order) == len(set(order)) == 96 and set(order) <= set(range(103))
    assert epochs[0] != [(0, i) for _, i in epochs[8]]
    assert epochs[0] != BatchSampler(103, 12, seed=6).indices(0)
    for world, accum in ((1, 1), (2, 1), (1, 4), (2, 3), (3, 4)):
        for rank in range(world):
            sampler = BatchSampler(103, 12, 5, rank, world, accum, stop_step=20)
            got, per_rank = list(sampler), 12 // world
            assert len(got) == 20 * accum
            for step in range(20):
                mine = whole.indices(step)[rank * per_rank : (rank + 1) * per_rank]
                assert sum(got[step * accum : (step + 1) * accum], []) == mine
                assert {len(batch) for batch in got} == {per_rank // accum}


def test_batch_sampler__resumed_equals_the_tail():
    full = list(BatchSampler(50, 8, 1, rank=1, world=2, accum=2, stop_step=15))
    tail = list(BatchSampler(50, 8, 1, rank=1, world=2, accum=2, start_step=7, stop_step=15))
    assert tail == full[14:]
    endless = iter(BatchSampler(50, 8, 1, rank=1, world=2, accum=2))
    assert [next(endless) for _ in range(30)] == full


def test_batch_sampler__refuses_less_than_a_batch():
    with pytest.raises(UserError, match="7 samples.*batch of 8"):
        BatchSampler(7, 8, 0)
    with pytest.raises(UserError, match="divisible"):
        BatchSampler(70, 8, 0, world=3)


def test_collate__stacks_or_passes_the_error_on():
    samples = [
        {"rgb": torch.full((3, 2, 2), i, dtype=torch.uint8), "seed": torch.tensor(2**62 + i)}
        for i in range(3)
    ]
    batch = data.collate(samples)
    assert batch["rgb"][:, 2, 1, 1].tolist() == [0, 1, 2] and batch["rgb"].dtype == torch.uint8
    assert batch["seed"].tolist() == [2**62, 2**62 + 1, 2**62 + 2]
    assert data.collate([samples[0], {"error": "x"}, {"error": "y"}]) == {"error": "x"}


def wait_for_signals(pipe):
    data.worker_init(0)
    pipe.send(torch.get_num_threads())
    while True:
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells")
def test_shield_forkserver__it_blocks_sigterm_and_this_process_does_not(monkeypatch):
    server = forkserver.ForkServer()
    monkeypatch.setattr(forkserver, "ensure_running", server.ensure_running)
    for method in ("fork", "forkserver"):
        assert server._forkserver_pid is None
        monkeypatch.setattr(multiprocessing, "get_start_method", lambda m=method: m)
        data.shield_forkserver()
    status = Path(f"/proc/{server._forkserver_pid}/status").read_text()
    server._stop()
    assert int(status.partition("SigBlk:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_worker_init__sigterm_of_others_is_ignored_and_the_parents_obeyed():
    here, there = multiprocessing.Pipe()
    worker = multiprocessing.Process(target=wait_for_signals, args=(there,), daemon=True)
    worker.start()
    assert here.recv() == 1
    os.kill(worker.pid, signal.SIGINT)
    for _ in range(2):
        subprocess.run([sys.executable, "-c", f"import os; os.kill({worker.pid}, 15)"], check=True)
    worker.join(0.3)
    assert worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0


# geometry


def test_nearest__is_exact_and_agrees_with_torch():
    cases = [(0, 7, 3), (5, 3, 7), (2, 10, 3), (0, 1, 4), (9, 224, 56), (3, 481, 56), (1, 640, 56)]
    for start, length, out in cases:
        exact = [start + int((k + Fraction(1, 2)) * length / out) for k in range(out)]
        assert data.nearest(start, length, out).tolist() == exact
        line = torch.arange(start, start + length, dtype=torch.float64)[None, None]
        assert F.interpolate(line, out, mode="nearest-exact")[0, 0].tolist() == exact
        mirrored = F.interpolate(line.flip(-1), out, mode="nearest-exact")[0, 0].tolist()
        assert data.nearest(start, length, out, flip=True).tolist() == mirrored


@pytest.mark.slow
def test_random_crop__has_torchvisions_distribution():
    image, rng = torch.empty(3, 375, 500), np.random.default_rng(0)
    ours = np.array([data.random_crop(rng.random, 375, 500, (0.2, 1)) for _ in range(6000)])
    torch.manual_seed(0)
    theirs = np.array(
        [RandomResizedCrop.get_params(image, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(6000)]
    )
    assert ours.min() >= 0
    assert (ours[:, 0] + ours[:, 2]).max() == 375 and (ours[:, 1] + ours[:, 3]).max() == 500
    for draws in ([0.0] * 4, [1 - 1e-12] * 4):  # the corners are within reach
        top, left, h, w = data.random_crop(iter(draws).__next__, 400, 400, (0.2, 0.2))
        assert (top, left) == ((400 - h, 400 - w) if draws[0] else (0, 0)) and h != w
    at = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(ours, at, 0), np.quantile(theirs, at, 0), atol=16)
    for h, w in ((10, 1000), (1000, 10), (1, 1), (1, 9), (300, 299)):
        image = torch.empty(3, h, w)  # a scale of 9 never fits: the fallback
        theirs = RandomResizedCrop.get_params(image, [9.0, 9.0], [3 / 4, 4 / 3])
        assert data.random_crop(rng.random, h, w, (9, 9)) == theirs


def test_relabel__equals_a_naive_loop():
    rng = np.random.default_rng(0)
    for case in range(60):
        none, dtype = ((255, np.uint8), (65535, np.uint16))[case % 2]
        pool = [0, none, *rng.choice(none, rng.integers(1, 30), replace=False)]
        ids = rng.choice(pool, (14, 14)).astype(dtype)
        areas = sorted((-int((ids == i).sum()), int(i)) for i in np.unique(ids) if i % none)
        naive = np.full(ids.shape, 255)
        naive[ids == 0] = 0
        for rank, (_, i) in enumerate(areas[:16]):
            naive[ids == i] = rank + 1
        got = data.relabel(ids, none)
        assert got.dtype == np.uint8 and (got == naive).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_folder__maps_show_the_same_place_as_the_image(tmp_path, axis):
    y, x = np.mgrid[:180, :240]
    place = (y, x)[axis]
    rgb, semantic = np.stack([y, x, x], -1).astype(np.uint8), (place // 2).astype(np.uint8)
    write_triplet(tmp_path, "a", rgb, place.astype(np.uint16) + 1, semantic)
    dataset = FolderDataset(str(tmp_path), "train", None, 64, 4, ALL)
    flips = 0
    for epoch in range(30):
        sample = dataset[epoch, 0]
        shown = F.avg_pool2d(sample["rgb"][axis].float()[None], 4)[0]  # the place of a label
        difference = (sample["semantic"] * 2.0 + 1 - (shown + 0.5))[1:-1, 1:-1]
        assert difference.abs().max() < 5 and difference.mean().abs() < 1.1
        flips += int(sample["rgb"][1, 0, 0] > sample["rgb"][1, 0, -1])
    assert 5 < flips < 25


def test_folder__a_further_map_of_pixels_has_the_size_of_the_image(tmp_path, monkeypatch):
    depth = data.Granularity("pixels", lambda x: x[None] / np.float32(65535))
    monkeypatch.setitem(data.GRANULARITIES, "depth", depth)
    monkeypatch.setitem(data.layout.__globals__["FOLDERS"], "depth", ("depth",))
    y, x = np.mgrid[:90, :120].astype(np.uint8)
    write(f"{tmp_path}/train/rgb/a.png", np.stack([y, x, x], -1))
    write(f"{tmp_path}/train/depth/a.png", x.astype(np.uint16) * 257)
    dataset = FolderDataset(str(tmp_path), "train", None, 32, 4, ("rgb", "depth"))
    for epoch in range(5):
        sample = dataset[epoch, 0]
        assert sample["depth"].shape == (1, 32, 32) and sample["depth"].dtype == torch.float32
        difference = (sample["depth"][0] * 255 - sample["rgb"][1])[:, 2:-2].abs()
        assert difference.max() < 3  # the same place, up to rounding to the nearest pixel


def test_folder__rgb_is_torchvisions_resized_crop(triplets):
    dataset = FolderDataset(triplets, "train", None, (48, 32), 4, ALL, seed=3)
    seen = set()
    for index in range(8):
        rgb, maps = dataset.load(index)
        sample = dataset[2, index]
        draw = data.random.Random(sample_seed(3, 2, index)).random
        top, left, h, w = data.random_crop(draw, *rgb.shape[1:], (0.2, 1.0))
        flip = draw() < 0.5
        want = v2.functional.resized_crop(rgb, top, left, h, w, [48, 32], BICUBIC, antialias=True)
        assert torch.equal(sample["rgb"], want.flip(-1) if flip else want)
        part = torch.tensor(maps["semantic"])[None, None, top : top + h, left : left + w].double()
        part = part.flip(-1) if flip else part
        want = F.interpolate(part, (12, 8), mode="nearest-exact")[0, 0].byte()
        assert torch.equal(sample["semantic"], want) and sample["instance"].shape == (12, 8)
        assert sample["label"] == index // 4  # in order: a/0 a/2 a/4 a/6 b/1 ...
        seen.add(flip)
    assert seen == {True, False}


def test_folder__evaluation_is_resize_and_centre_crop(tmp_path):
    write(f"{tmp_path}/val/a.png", smooth(120, 200))
    image = Image.open(f"{tmp_path}/val/a.png")
    for pct, resize in ((1.0, 64), (0.875, 73)):
        ours = FolderDataset(str(tmp_path), "val", None, 64, 4, train=False, crop_pct=pct)[0, 0]
        theirs = v2.CenterCrop(64)(v2.Resize(resize, BICUBIC)(image))
        difference = ours["rgb"].permute(1, 2, 0).numpy() - np.asarray(theirs, float)
        assert np.abs(difference).mean() < 1.5 and np.abs(difference).max() < 12
    assert data.centre_crop(120, 200, (32, 64), 1.0) == (10, 0, 100, 200)  # of the size's shape
    assert data.centre_crop(120, 200, (64, 32), 0.5) == (30, 85, 60, 30)


def batches(dataset, workers):
    """Six batches of four."""
    return list(
        torch.utils.data.DataLoader(
            dataset, batch_sampler=BatchSampler(len(dataset), 4, 0, stop_step=6),
            collate_fn=data.collate, num_workers=workers, worker_init_fn=data.worker_init,
        )
    )  # fmt: skip


@pytest.mark.slow
def test_folder__workers_do_not_matter(triplets):
    dataset = FolderDataset(triplets, "train", None, 32, 4, ALL)
    for a, b in zip(batches(dataset, 0), batches(dataset, 2), strict=True):
        assert list(a) == list(b) == ["rgb", "instance", "semantic", "label", "seed", "bad"]
        assert all(torch.equal(a[k], b[k]) for k in a)
        assert [a[k].dtype for k in a] == [torch.uint8] * 3 + [torch.int64] * 3
