"""What a run says: what a large model will need of a CPU, what was learned, what to do next."""

from types import SimpleNamespace

import data
import engine
import pytest
import tiny_run
import torch
from engine import World
from engine.report import following, learned, warn_of_size
from torch import nn


def test_run__says_what_it_learned_and_what_to_do_next(tmp_path, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr("engine.loop.warn_of_size", asked.append)

    def evaluate(model, batch):
        zero = torch.zeros(())
        loss = zero + 3 - 2 * evaluate.calls.pop()
        return {"loss": loss, "loss_flat": zero + 4, "other": zero, "hits": zero + 0.7,
                "hits_nearest": zero + 0.5, "hits_mean_colour": zero + 0.1}  # fmt: skip

    evaluate.calls = [1, 0]
    assert tiny_run.train(tmp_path, "--steps", 1, evaluate=evaluate) == 0
    said = capsys.readouterr().out
    guesses = "by guesses that learn nothing:"
    words = f"learned     loss 3 -> 1 ({guesses} flat 4); hits 0.7 ({guesses} nearest 0.5, mean "
    assert words + "colour 0.1), on held-out images\n" in said
    assert f"python -m tools.visualize reconstruct --checkpoint {tmp_path}/last.pt\n" in said
    words = "python -m downstream.probe --data shapes --model tiny --checkpoint"
    assert f"{words} {tmp_path}/last.pt\n" in said
    assert "warning" not in said and len(asked) == 1


def test_following__commands_that_run_as_they_stand(tmp_path):
    """Of quoted paths; and a probe needs classes and a val split."""
    cfg = SimpleNamespace(model="tiny", data="my photos")
    sets = dict(train_set=SimpleNamespace(classes=["a", "b"]), val_set=[0])
    run = SimpleNamespace(cfg=cfg, last="my runs/last.pt", then=engine.run.NEXT, **sets)
    said = following(run).splitlines()
    words = "python -m tools.visualize reconstruct --checkpoint 'my runs/last.pt'"
    assert said[0] == f"next        {words} --data 'my photos'"
    words = "python -m downstream.probe --data 'my photos' --model tiny --checkpoint"
    assert said[1].strip() == f"{words} 'my runs/last.pt'"
    for change in ({"val_set": None}, {"train_set": SimpleNamespace(classes=["a"])}):
        said = following(SimpleNamespace(**vars(run) | change)).splitlines()
        assert "probe --data DATA --model tiny" in said[1] and "class folders" in said[2]


def test_learned__without_a_val_split_nothing_is_known(tmp_path):
    run = SimpleNamespace(val_set=None, cfg=SimpleNamespace(data="photos"), out=tmp_path)
    assert learned(run) == "\nlearned     not measured: photos has no val split beside train"


class Wide(nn.Module):
    """Many parameters, of which a few have a part in the loss; a buffer that a pass changes."""

    def __init__(self, million, device="cpu"):
        super().__init__()
        self.most = nn.Parameter(torch.empty(int(1e6 * million), device=device))
        self.gain, self.passes = nn.Parameter(torch.ones(1)), nn.Buffer(torch.zeros(1))

    def forward(self, batch, progress):
        self.passes += 1
        x = batch["rgb"].float() + 0 * torch.rand(1)
        return (x * self.gain).sum(), {}


def large(model, device="cpu", batch_size=64):
    world, sampler = World("cpu", "fp32"), data.BatchSampler(100, 8, 0)
    sample = {"rgb": torch.zeros(3, 512, 512, dtype=torch.uint8), "seed": torch.tensor(1)}
    return SimpleNamespace(
        device=torch.device(device), model=model, collate=data.collate, sampler=sampler, stop=110,
        train_set={pair: sample for pair in sampler.indices(0)}, world=world, number=10, micro=32,
        autocast=world.autocast, cfg=SimpleNamespace(batch_size=batch_size),
    )  # fmt: skip


@pytest.mark.parametrize(
    "million, device, warned", [(21, "cpu", True), (19, "cpu", False), (21, "cuda", False)]
)
def test_warn_of_size__large_models_on_a_cpu(million, device, warned, capsys, monkeypatch):
    now = iter(range(0, 1000, 9))  # the trial takes nine seconds
    monkeypatch.setattr("engine.report.time.perf_counter", lambda: next(now))
    warn_of_size(large(Wide(million), device))
    said = capsys.readouterr().out
    if not warned:
        assert not said
        return
    assert "0.3 GiB" in said  # 4 numbers of 4 bytes
    assert "what 32 samples keep for the backward pass 0.1 GiB" in said  # 3 MiB each
    assert "the 100 steps about 4 hours, as a trial of 4 samples has it" in said  # 100 * 64 / 4 * 9
    warn_of_size(large(Wide(million), batch_size=1_000_000))
    assert "the 100 steps about 2,604 days" in capsys.readouterr().out


def test_warn_of_size__leaves_no_trace(capsys):
    run, state = large(Wide(21)), torch.get_rng_state()
    run.micro = 3  # who asks for few has room for no more
    warn_of_size(run)
    said = capsys.readouterr().out
    assert "minutes" in said and "a trial of 3 samples" in said
    assert run.model.gain.grad is None and run.model.passes == 0
    assert torch.equal(state, torch.get_rng_state())
    run.train_set = dict.fromkeys(run.train_set, {"error": "05.png: RGB"})
    warn_of_size(run)  # the loop says so
    assert not capsys.readouterr().out
