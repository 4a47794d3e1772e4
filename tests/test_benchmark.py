"""The benchmark's own arithmetic; times are never asserted."""

import argparse
import json

import engine  # noqa: F401  (first: it sets how threads wait)

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from engine import UserError
from tools import benchmark

STEP = dict(method=None, model="base", flags="--model tiny --image-size 32", precision="fp32",
            device="cpu", compile=False, batch_size=2, steps=1, warmup=0, details=True,
            json=None, rounds=1, peers=False)  # fmt: skip


def options(**changes):
    return argparse.Namespace(**{**STEP, **changes})


@pytest.mark.parametrize("groups", [1, 4])
def test_count_flops__counts_a_convolution_by_hand(groups):
    conv = nn.Conv2d(8, 16, 3, padding=1, groups=groups)
    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    forward, whole = benchmark.count_flops(lambda: conv(x).sum())
    by_hand = 2 * 2 * 16 * 5 * 7 * (8 // groups) * 9
    assert forward == by_hand
    assert whole == 3 * by_hand  # the input's gradient and the weight's cost as much each


def test_count_flops__counts_a_linear_layer_by_hand():
    layer, x = nn.Linear(6, 10), torch.randn(4, 6)
    forward, whole = benchmark.count_flops(lambda: layer(x).sum())
    assert (forward, whole) == (2 * 4 * 6 * 10, 2 * 2 * 4 * 6 * 10)  # x needs no gradient


def test_parts__books_forward_and_backward_on_the_module():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder_pred = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return F.mse_loss(self.decoder_pred(self.encoder(x)), x)

    with benchmark.Parts(cuda=False) as parts:
        Model()(torch.randn(4, 8)).backward()
    shares = parts.shares()
    assert set(shares) == {"encoder", "decoder", "masks, loss"}
    assert sum(shares.values()) == pytest.approx(1)
    # two linear layers each way, forward and backward: neither part has forward operators alone
    operators = [part for part, _, _ in parts.spans]
    assert operators.count("encoder") > 2 and operators.count("decoder") > 2


@pytest.mark.parametrize("row", [r for r in benchmark.ROWS if not r.startswith("beit")])
def test_one__every_row_runs(row):
    result = benchmark.one(options(rows=row))
    assert result["row"] == row and len(result["times"]) == 1
    assert result["flops_step"] > 1.5 * result["flops"] > 0
    assert sum(result["parts"].values()) == pytest.approx(1)


def test_random_tokenizer__is_one_that_the_script_takes(tmp_path):
    import semanticmim

    benchmark.random_tokenizer(tmp_path / "t.pth")
    assert semanticmim.load_tokenizer(tmp_path / "t.pth", 224, 14).num_codes == 8192


def test_ratios__name_rows_that_exist():
    known = {*benchmark.ROWS, *benchmark.peers.PEERS}
    assert {r for _, a, b, _ in benchmark.RATIOS for r in (a, b)} <= known


def test_step__refuses_unknown_rows():
    with pytest.raises(UserError, match="choose from mae"):
        benchmark.step(options(rows="mae,nothing"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA there is nothing to refuse")
def test_on_cuda__never_falls_back_in_silence():
    assert not benchmark.on_cuda(options(device="auto"))
    with pytest.raises(UserError, match="--device cpu works anywhere"):
        benchmark.on_cuda(options(device="cuda"))


def test_step__writes_a_table(capsys, tmp_path):
    results = benchmark.step(options(rows="mae"))
    assert "| mae |" in capsys.readouterr().out
    assert results[0]["images_per_s"] == pytest.approx(2 / results[0]["times"][0])
    json.dumps(results)


def test_loader__times_all_parts(capsys):
    rgb, everything = benchmark.loader(argparse.Namespace(data=None, count=4, feed=100.0))
    for r in (rgb, everything):
        assert set(r["parts"]) == {"read", "decode", "crop", "collate"}
        assert r["images_per_s"] > 0
    assert rgb["classic"] > 0 and rgb["bare_decode"] > 0
    assert "cores feed 100 images/s" in capsys.readouterr().out


@pytest.mark.parametrize("most", [5, 8, 37, 100])
def test_memory__finds_the_largest_micro_batch(monkeypatch, most):
    def child(args, batch_size, **_):
        return {"peak": 100 + 10 * batch_size} if batch_size <= most else None

    monkeypatch.setattr(benchmark, "child", child)
    monkeypatch.setattr(benchmark, "available", lambda: 1e9)
    (row, files) = benchmark.memory(options(rows="mae"))
    assert most - max(1, most // 16) <= row["micro_batch"] <= most
    assert files["files"] == 1_281_167 and 20 < files["bytes"] / files["files"] < 60


def test_memory__on_a_cpu_stops_before_memory_runs_out(monkeypatch):
    def child(args, batch_size, **_):
        assert 100 + 10 * batch_size < 1000, "the system would have killed this"
        return {"peak": 100 + 10 * batch_size}

    monkeypatch.setattr(benchmark, "child", child)
    monkeypatch.setattr(benchmark, "available", lambda: 1000.0)
    (row, _) = benchmark.memory(options(rows="mae"))
    assert 70 <= row["micro_batch"] <= 80  # 0.9 x 1000 MiB are 80 samples
