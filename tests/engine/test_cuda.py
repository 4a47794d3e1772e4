"""A step never waits for the device: CUDA's driver is told to raise where one would.

Steps that write a line of the log do read the device, so here no line falls among those watched.
And with --deterministic every step runs, and twice to the same bits.
"""

import importlib

import engine  # first: it sets how threads wait

import pytest
import tiny_run
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
PRETRAINING = [
    "mae", "cfmae --clip-grad 1", "cfmae --mix sample", "cfmae --masking RD", "mcmae",
    "mcmae --no-sparse", "mcmae --masking token", "semanticmim",
    "semanticmim --target dvae --tokenizer random", "coma_dyvit", "coma_dyvit --evaluation shared",
    "videomcmae", "videomcmae --no-sparse",
]  # fmt: skip
TRANSFER = [
    "downstream.finetune --method mae --encoder tiny --mixup 0.8 --cutmix 1 --drop-path 0.2",
    "downstream.finetune --method cfmae --encoder tiny --granularities R+I+S",
    "downstream.segment --method mae --encoder tiny",
    "downstream.segment --method mae --encoder tiny --protocol linear",
]
FLAGS = (
    "--data shapes --model tiny --device cuda --steps 10 --log-every 100 --workers 0 "
    "--batch-size 8 --micro-batch 4 --val-samples 8"
).split()
WATCHED = range(3, 9)  # the first steps set up libraries, the last writes a line


@pytest.fixture
def watch(monkeypatch):
    """Raise where one of the steps watched waits; a list of those that went by."""
    steps, seen = engine.Run.steps, []

    def watched(run, *args):
        for step in steps(run, *args):
            if step.number in WATCHED:
                torch.cuda.set_sync_debug_mode("error")
            yield step
            torch.cuda.set_sync_debug_mode("default")
            seen.append(step.number)

    monkeypatch.setattr(engine.Run, "steps", watched)
    yield seen
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("command", PRETRAINING + TRANSFER)
def test_step__does_not_wait_for_the_device(watch, tmp_path, command, precision):
    script, *flags = command.split()
    flags += [*FLAGS, "--precision", precision, "--output", str(tmp_path)]
    importlib.import_module(script).main(flags)
    assert watch == [*range(10)]


def test_watch__sees_a_step_that_waits(watch, tmp_path, monkeypatch):
    mae = importlib.import_module("mae")
    monkeypatch.setattr(mae, "cosine", lambda cfg, step: 1e-4 * float(step.progress))
    with pytest.raises(RuntimeError, match="synchroniz"):
        mae.main([*FLAGS, "--output", str(tmp_path)])
    assert watch == [0, 1, 2]


@pytest.fixture
def undone():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("command", PRETRAINING + TRANSFER)
def test_deterministic__two_runs_end_alike(undone, tmp_path, command):
    script, *flags = command.split()
    for name in ("a", "b"):
        out = ["--deterministic", "--output", str(tmp_path / name)]
        importlib.import_module(script).main([*flags, *FLAGS, *out])
    assert tiny_run.same_result(tmp_path / "a", tmp_path / "b")
