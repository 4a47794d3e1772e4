"""`benchmark detect`: both kinds of rows take their steps; times are never asserted."""

import functools

import engine  # noqa: F401 - first: it sets how threads wait

import pytest
import torch
from torchvision.models import detection

from engine import UserError
from tools import benchmark, benchmark_detect

pytestmark = pytest.mark.slow


def options(*flags):
    return benchmark.parse(["detect", "--size", "64", "--classes", "10", *flags])


@pytest.mark.parametrize("row", ["mcmae", "torchvision"])
def test_one__trains_on_scenes(row, monkeypatch):
    torch.set_num_threads(1)
    small = dict(box_batch_size_per_image=8, rpn_post_nms_top_n_train=20)
    theirs = functools.partial(detection.maskrcnn_resnet50_fpn_v2, **small)
    monkeypatch.setattr(detection, "maskrcnn_resnet50_fpn_v2", theirs)
    flags = "--flags", "--dim 16 --boxes 8 --proposals 20", "--steps", "2", "--warmup", "0"
    args = options("--rows", row, "--model", "tiny", *flags)
    found = benchmark_detect.one(args)
    assert found["row"] == row and found["peak"] > 100
    assert len(found["times"]) == len(found["cpu"]) == 2
    if row == "torchvision":  # its ResNet-50, FPN and heads for 11 classes
        assert 40e6 < found["parameters"] < 50e6


def test_run__times_rows_in_turns(capsys):
    asked = []

    def child(args, rows):
        asked.append(rows)
        times = {"times": [1.0, 3.0, 2.0], "cpu": [0.5] * 3}
        return {"row": rows, **times, "peak": 7.0, "parameters": 2_500_000}

    found = benchmark_detect.run(options("--rows", "mae,torchvision", "--rounds", "2"), child)
    assert asked == ["mae", "torchvision"] * 2
    assert [r["median"] for r in found] == [2.0, 2.0] and len(found[0]["times"]) == 6
    assert "| mae | 2.5 | 2.00 (1.00-3.00) | 0.50 | 0.500 | 7 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="--rows ours: choose from mae, cfmae"):
        benchmark_detect.run(options("--rows", "ours"), child)
    with pytest.raises(UserError, match="--classes 5: scenes have 10"):
        benchmark_detect.run(options("--classes", "5"), child)
    with pytest.raises(UserError, match="^mae: not enough memory for batch 1$"):
        benchmark_detect.run(options("--rows", "mae"), lambda *_, **__: None)


def test_child__says_why_a_row_failed():
    args = options("--size", "65", "--model", "tiny")
    with pytest.raises(UserError, match="^mae: --image-size 65"):
        benchmark.child(args, rows="mae")
